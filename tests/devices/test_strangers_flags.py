"""Shorthands of the command line take whatever a stranger's card offers: no table of names decides."""

from __future__ import annotations

from pathlib import Path

import pytest
from strangers import Shop

CARD = """
from typing import Any, Literal
from cardcage.backends import BlockInfo, NetFeatures
from cardcage.ram import Memfd
from cardcage.units import Duration, Size

def told(*what):
    print(*what, flush=True)

@frozen
class Options:
    number: int | None = None
    ready: bool = False
    word: str = ""
    mode: Literal["fast", "7"] = "fast"
    size: Size = Size(512)
    rate: float = 1.0
    ports: list[int] = field(factory=list)
    queues: int = 1

class Net:
    def __init__(self, slot, options):
        told("net", options)
        self.features = NetFeatures(queues=options.queues)
    def start(self, received, /): ...
    def send(self, queue, parts, /): ...
    def resume(self, queue, /): ...
    def set_offloads(self, offloads, header, /): ...
    def close(self): ...

class Plain(Net):
    def __init__(self, slot):
        told("plain")
        self.features = NetFeatures()

class Block:
    def __init__(self, slot, options):
        told("block", options)
        self.info = BlockInfo(options.size)
    def readv(self, offset, buffers, /): ...
    def writev(self, offset, buffers, /): ...
    def flush(self): ...
    def discard(self, offset, length, /): ...
    def write_zeroes(self, offset, length, /, *, unmap): ...
    def close(self): ...

def memory(options):
    told("memory", options)
    return Memfd()

class Share:
    def __init__(self, options):
        told("share", options)
    def read(self, offset, size, /): return 0
    def write(self, offset, size, value, /): ...

@frozen
class Shared:
    path: str
    tag: str
    depth: int = 0

def own(text):
    return {"word": text.upper()}

@hookimpl
def cardcage_register(registry):
    registry.backend("net", "acme", Net, options=Options)
    registry.backend("net", "own", Net, options=Options, shorthand=own)
    registry.backend("net", "plain", Plain)
    registry.backend("block", "acme", Block, options=Options)
    registry.backend("block", "own", Block, options=Options, shorthand=own)
    registry.memory("acme", memory, options=Options)
    registry.device("acme-share", Share, options=Shared, mounts="9p")
    registry.device("acme", Share, options=Options)
"""

DEFAULT = {
    "number": None, "ready": False, "word": "", "mode": "fast", "size": 512, "rate": 1.0, "ports": [], "queues": 1
}  # fmt: skip


def options(**given: object) -> str:
    """The card's options as text."""
    return "Options({})".format(", ".join(f"{key}={value!r}" for key, value in {**DEFAULT, **given}.items()))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--net", "acme"], f"net {options()}"),
        (["--net", "plain,id=n0"], "plain"),
        (
            ["--net", "acme,number=0x10,ready=on,word=7,mode=7,size=1M,rate=2,ports=1,ports=2,mac=52:54:00:00:00:01"],
            f"net {options(number=16, ready=True, word='7', mode='7', size=1 << 20, rate=2.0, ports=[1, 2])}",
        ),
        (["--net", "acme,word=a,,b,queues=2"], f"net {options(word='a,b', queues=2)}"),
        (["--net", "own,x=y,id=n1,z"], f"net {options(word='X=Y,Z')}"),
        (["--drive", "type=acme,size=4K,id=d0,ready=yes"], f"block {options(size=4096, ready=True)}"),
        (["--drive", "acme:word=x,queues=1,serial=s"], f"block {options(word='x')}"),
        (["--drive", "own:some/where,id=d1"], f"block {options(word='SOME/WHERE')}"),
        (["--device", "virtio-blk,drive=acme:word=8"], f"block {options(word='8')}"),
        (["--device", "acme,word=12,number=13,ready=off"], f"share {options(word='12', number=13)}"),
        (["--memory-backend", "acme,number=3,word=4,preallocate=on"], f"memory {options(number=3, word='4')}"),
        (["--share", ".,type=acme-share,depth=3"], "share Shared(path='.', tag='share', depth=3)"),
    ],
)
@pytest.mark.once
def test_a_strangers_offer_is_taken(tmp_path: Path, words: list[str], said: str) -> None:
    """A flag takes a stranger's back end or device, and its options say what each text is."""
    shop = Shop(tmp_path)
    shop.card("card1", CARD)
    shop.machine()
    result = shop.run("run", "vm.toml", "--set", "machine.platform=pc", *words)
    assert (result.status, result.out) == (1, [said]), result.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--net", "acem"], '--net acem: no network "acem". Did you mean "acme"?'),
        (["--net", "acme,numbre=3"], '--net acme,numbre=3: no key "numbre". Did you mean "number"?'),
        (["--net", "acme,number=many"], '--net acme,number=many: number: expected a whole number, got "many"'),
        (["--net", "acme,ready=perhaps"], '--net acme,ready=perhaps: ready: expected on or off, got "perhaps"'),
        (["--net", "acme,queues=2,queues=3"], '"queues" is given twice'),
        (["--net", "plain,x=1"], 'no such key. "net:plain" takes no options'),
        (["--drive", "type=acem"], 'no card offers backend "block:acem". Did you mean "block:acme"'),
        (["--drive", "acme:x"], '--drive acme:x: "x": expected key=value'),
        (["--memory-backend", "acem"], 'no card offers memory "acem". Did you mean "acme"?'),
        (["--share", ".,type=nfs"], "type=nfs: expected virtiofs, 9p, "),
        (["--device", "acem"], 'no card offers device "acem". Did you mean "acme"?'),
        (["--device", "acme,numbre=1"], 'no key "numbre". Did you mean "number"?'),
    ],
)
@pytest.mark.once
def test_a_wrong_word_is_named(tmp_path: Path, words: list[str], said: str) -> None:
    """What does not fit is one line with the flag, the key and what was expected, status 2."""
    shop = Shop(tmp_path)
    shop.card("card1", CARD)
    shop.machine()
    result = shop.run("run", "vm.toml", "--set", "machine.platform=pc", *words)
    assert (result.status, len(result.err)) == (2, 1), result.err
    assert said in result.outcome


def test_a_broken_card_that_may_have_had_it_is_named(tmp_path: Path) -> None:
    """An unknown back end's line names the broken cards, one of which may have offered it."""
    shop = Shop(tmp_path)
    file = shop.card("card1", "raise RuntimeError('no luck')")
    shop.machine()
    assert f"RuntimeError: no luck (in <module>, {file}:" in shop.run("run", "vm.toml", "--net", "acme").outcome


def test_init_mounts_what_a_stranger_shares() -> None:
    """`cardcage boot` tells init the tag and file system of each device that says how it is mounted."""
    from cardcage.config import Draft
    from cardcage.hookspecs import hookimpl
    from cardcage.host import Host
    from cardcage.registry import Registry
    from cardcage_boot.command import _shares
    from cardcage_boot.report import Report

    class Card:
        @hookimpl
        def cardcage_register(self, registry: Registry) -> None:
            registry.device("acme-fs", dict, mounts="9p")

    tags = {"acme-fs": "a", "virtio-fs": "b", "virtio-9p-mmio": "c", "virtio-blk": "d"}
    draft = Draft.of({"device": [{"type": name, "tag": tag} for name, tag in tags.items()]})
    assert _shares(draft, Host([Card()]), Report()) == "9p:a virtiofs:b 9p:c"
