"""Cards: loading, staging and what becomes of broken ones."""

from __future__ import annotations

import re
import signal
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen
from cardcage import machine as machines
from cardcage._host.discovery import announced
from cardcage.errors import CardError, ConfigError, Denied, MissingExtra, UsageError
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.outcome import DebugExit
from cardcage.registry import DeviceOffer, Registry
from cardcage.security import Act, Mediator


def card(register: Any, name: str = "mine", **more: Any) -> types.ModuleType:
    """A module with the hook."""
    module = types.ModuleType(name)
    module.cardcage_register = hookimpl(register)
    for key, value in more.items():
        setattr(module, key, value)
    return module


def test_a_card_fills_the_registry() -> None:
    """What a card offers can be found by kind and name, with its card."""

    def cardcage_register(registry: Registry) -> None:
        registry.device("thing", object, help="a thing")

    host = Host([card(cardcage_register)], installed=False)
    assert host.registry.get(DeviceOffer, "thing").card == "mine"
    assert [one.name for one in host.cards] == ["mine"]


def raises(registry: Registry) -> None:
    registry.device("half", object)
    raise RuntimeError("boom")


def wrong_signature(registry: Registry, more: int) -> None:
    registry.device("half", object)


def taken(registry: Registry) -> None:
    registry.device("fresh", object)
    registry.device("there", object)


def twice(registry: Registry) -> None:
    registry.device("half", object)
    registry.device("half", object)


@pytest.mark.parametrize(
    ("register", "reason"),
    [
        (raises, "RuntimeError: boom"),
        (wrong_signature, "more"),
        (taken, "device 'there': already offered by card good"),
        (twice, "device 'half': already offered by card bad"),
    ],
)
def test_a_broken_card_leaves_nothing_behind(register: Any, reason: str) -> None:
    """A card that fails to register is named with the reason; nothing of it stays, and the others work."""
    good = card(lambda registry: registry.device("there", object), "good")
    host = Host([good, card(register, "bad")], installed=False)
    assert [(one.name, one.distribution) for one in host.broken] == [("bad", "given to Host")]
    assert reason in str(host.broken[0])
    assert [(offer.kind, offer.name) for offer in host.registry] == [("device", "there")]
    assert [one.name for one in host.cards] == ["good"]


def test_card_names_are_unique() -> None:
    """A second card of the same name is left out, and named."""
    host = Host([card(lambda registry: None), card(lambda registry: None)], installed=False)
    said = 'another card has the name "mine" already (given to Host): expected one of its own'
    assert [one.reason for one in host.broken] == [said]


def test_a_misspelt_hook_is_an_error_of_its_card() -> None:
    """An implementation of a hook that does not exist makes the card broken, and only that card."""
    module = card(lambda registry: None, "typo")
    module.cardcage_regster = hookimpl(lambda registry: None)
    host = Host([module, card(lambda registry: registry.device("x", object), "next")], installed=False)
    assert [one.name for one in host.broken] == ["typo"]
    assert "cardcage_regster" in host.broken[0].reason
    assert host.registry.names(DeviceOffer) == ["x"]


def test_installed_cards_are_found_by_entry_point() -> None:
    """The project's own cards come through the entry point group, as a stranger's do."""
    host = Host()
    assert {"kvm", "tcg", "pc", "pci", "virtio", "boot"} <= {one.name for one in host.cards}
    assert not host.broken
    assert all(one.distribution.startswith("cardcage ") for one in host.cards if one.name in ("kvm", "pc"))


def test_discovery_answers_as_importlib_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry points of a group are those that importlib.metadata finds, in each form that metadata has."""

    def add(folder: str, name: str, points: str, metadata: str = "METADATA") -> None:
        made = tmp_path / folder / name
        made.mkdir(parents=True)
        project, _, version = name.rpartition(".")[0].partition("-")
        (made / metadata).write_text(
            f"Metadata-Version: 2.1\nName: {project.replace('_', '-')}\nVersion: {version}\n"
            f"Requires-Dist: cardcage-more\nRequires-Dist: cardcage>=3 ; extra == 'x'\n\nName: not this\n"
        )
        (made / "entry_points.txt").write_text(points)

    add(
        "one",
        "my_card-1.0.dist-info",
        "# no\n[other]\nx = y\n\n[cardcage]\n my = my_card \n# off = z\nsub=a.b:c.d [more]\n",
    )
    add("one", "old-2.egg-info", "[cardcage]\nold = old\n", "PKG-INFO")
    add("one", "none-3.dist-info", "[console_scripts]\nnone = none:main\n")
    add("two", "My.Card-9.dist-info", "[cardcage]\nhidden = hidden\n")
    for folder in ("missing", "two", "one"):
        monkeypatch.syspath_prepend(tmp_path / folder)
    for group in ("cardcage", "console_scripts", "pytest11", "nothing"):
        theirs = {
            (one.name, one.value, one.dist.name, one.dist.version) for one in entry_points(group=group) if one.dist
        }
        assert {(one.name, one.value, one.project, one.version) for one in announced(group)} == theirs
    (mine,) = (one for one in announced("cardcage") if one.name == "my")
    assert mine.requires("cardcage") == "cardcage>=3 ; extra == 'x'"
    assert mine.requires("pytest") is None
    (script,) = (one for one in announced("console_scripts") if one.name == "cardcage")
    assert callable(script.load())


def test_discovery_sees_what_was_installed_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process finds a distribution that came, changed, was put in place of another, or went, since it last looked."""
    monkeypatch.syspath_prepend(tmp_path)
    folder, points = tmp_path / "late-1.dist-info", tmp_path / "late-1.dist-info" / "entry_points.txt"

    def told() -> list[tuple[str, str, str]]:
        return [(one.name, one.value, one.version) for one in announced("cardcage") if one.project == "late"]

    assert told() == []
    folder.mkdir()
    (folder / "METADATA").write_text("Name: late\nVersion: 1\n\n")
    points.write_text("[cardcage]\na = one\n")
    assert told() == [("a", "one", "1")]
    points.write_text("[cardcage]\na = two\n")  # of the same size, in the same file
    assert told() == [("a", "two", "1")]
    (tmp_path / "other").write_text("[cardcage]\nb = six\n")
    (tmp_path / "other").replace(points)
    (folder / "METADATA").write_text("Name: late\nVersion: 2\n\n")
    assert told() == [("b", "six", "2")]
    points.unlink()
    assert told() == []


def test_registering_imports_nothing_heavy() -> None:
    """Loading all cards imports neither asyncio, cattrs, rich, structlog nor iced-x86, nor any card's own modules."""
    import subprocess

    code = (
        "import sys; from cardcage.host import Host; Host();"
        "heavy = {'asyncio', 'cattrs', 'rich', 'structlog', 'iced_x86', 'difflib'} & set(sys.modules);"
        "own = [m for m in sys.modules if m.startswith('cardcage_') and '.' in m];"
        "print(sorted(heavy), own)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[] []"


def test_building_a_machine_imports_nothing_heavy() -> None:
    """A machine of the pc platform is configured and built without cattrs, rich, structlog, asyncio and OpenSSL."""
    import subprocess

    code = (
        "import sys; from cardcage import Machine\n"
        "with Machine(memory='16M', accel='tcg', machine={'platform': 'pc'}): pass\n"
        "heavy = {'asyncio', 'cattrs', 'rich', 'structlog', '_hashlib', 'shutil', 'difflib'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_unknown_name_says_what_is_near() -> None:
    """An unknown card is refused with near matches, or with what there is."""
    host = Host([card(lambda registry: registry.device("virtio-blk", object))], installed=False)
    with pytest.raises(ConfigError, match=re.escape('no card offers device "virtio-blok". Did you mean "virtio-blk"?')):
        host.registry.get(DeviceOffer, "virtio-blok")
    with pytest.raises(ConfigError, match=re.escape('"zzz". Known: virtio-blk')):
        host.registry.get(DeviceOffer, "zzz")


def test_a_missing_extra_says_how_to_get_it() -> None:
    """A card whose optional distribution is missing says what to install; other import errors are its fault."""

    def cardcage_register(registry: Registry) -> None:
        registry.device("heavy", "no_such_module:X", needs="net")
        registry.device("wrong", "no_such_module:X")
        registry.device("nothing", "cardcage.errors:NoSuchThing")

    host = Host([card(cardcage_register)], installed=False)
    with pytest.raises(MissingExtra, match=r"pip install 'cardcage\[net\]'"):
        host.registry.get(DeviceOffer, "heavy").load()
    for name in ("wrong", "nothing"):
        with pytest.raises(CardError, match="card mine, given to Host"):
            host.registry.get(DeviceOffer, name).load()


@frozen
class Options:
    speed: int = 1


def test_options_are_structured_and_text_goes_through_the_shorthand() -> None:
    """A table becomes the card's class; text does in the card's way, else as pairs; without options there are none."""

    def cardcage_register(registry: Registry) -> None:
        registry.device("typed", object, options=Options, shorthand=lambda text: {"speed": int(text)})
        registry.device("plain", object, options=Options)
        registry.device("bare", object)

    host = Host([card(cardcage_register)], installed=False)
    typed, plain, bare = (host.registry.get(DeviceOffer, name) for name in ("typed", "plain", "bare"))
    assert host.options(typed, {"speed": 3}) == host.options(typed, "3") == Options(3)
    assert host.options(bare, {}) is None
    for offer, value, error in (
        (typed, "x", "invalid literal"),
        (plain, "3", 'k: "3": expected key=value'),
        (plain, {"sped": 1}, 'k.sped: no such key. Did you mean "speed"?'),
        (bare, {"a": 1}, 'k.a: no such key. "bare" takes no options'),
    ):
        with pytest.raises(ConfigError, match=re.escape(error)):
            host.options(offer, value, key="k")


def test_loading_a_card_is_mediated() -> None:
    """A checker may refuse a card, which is then left out and named."""

    class Checker:
        def check(self, act: Act, /) -> None:
            if (act.tclass, act.permissions, act.facts["card"]) == ("card", ("load",), "evil"):
                raise Denied("evil is not allowed")

    loaded = []
    cards = [card(lambda registry, name=name: loaded.append(name), name) for name in ("evil", "good")]
    host = Host(cards, installed=False, mediator=Mediator((Checker(),)))
    assert [one.name for one in host.cards] == loaded == ["good"]
    assert host.broken[0].reason.endswith("evil is not allowed")


def test_signal_handlers_have_one_owner() -> None:
    """Claims are counted, verify() puts ours back, and the last release restores the first handler."""
    signals = Host(installed=False).signals
    before = signal.getsignal(signal.SIGUSR2)

    def handler(signum: int, frame: Any) -> None: ...

    signals.claim(signal.SIGUSR2, handler)
    signals.claim(signal.SIGUSR2, handler)
    with pytest.raises(UsageError, match="SIGUSR2 already has another handler"):
        signals.claim(signal.SIGUSR2, lambda *_: None)
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    signals.verify()
    assert signal.getsignal(signal.SIGUSR2) is handler
    signals.release(signal.SIGUSR2)
    assert signal.getsignal(signal.SIGUSR2) is handler
    signals.release(signal.SIGUSR2)
    assert signal.getsignal(signal.SIGUSR2) == before
    with pytest.raises(UsageError, match="was not claimed"):
        signals.release(signal.SIGUSR2)


def test_one_machines_fault_does_not_keep_the_others_open() -> None:
    """Closing a host closes each of its machines, and raises the first error once all are closed."""

    class Stuck:
        def __init__(self, host: Host, error: Exception | None) -> None:
            self.host, self.error, self.closed = host, error, False
            host.add(self)

        def dismantle(self) -> None:
            self.closed = True
            if self.error is not None:
                raise self.error

    host = Host(installed=False)
    made = [Stuck(host, error) for error in (None, RuntimeError("first"), None, RuntimeError("second"))]
    with pytest.raises(RuntimeError, match="first"):
        host.close()
    assert all(one.closed for one in made)


def test_a_machine_needs_no_roster_policies_or_snapshots(tmp_path: Path) -> None:
    """A real guest runs on a host whose only cards are an accelerator, a boot protocol and a device."""
    import cardcage_boot
    import cardcage_pc
    import cardcage_tcg

    (tmp_path / "guest").write_bytes(bytes.fromhex("b003e6f4f4"))  # mov al, 3; out 0xf4, al; hlt
    host = Host([cardcage_tcg, cardcage_boot, cardcage_pc], installed=False)
    keys = {"platform": "none", "memory": "1M"}
    boot = {"protocol": "raw", "image": str(tmp_path / "guest"), "address": 0x1000}
    devices = [{"type": "isa-debug-exit", "iobase": 0xF4}]
    with Machine(host=host, machine=keys, boot=boot, devices=devices) as vm:
        assert vm.start().wait(60) == DebugExit(3)


def test_looking_for_hooks_looks_for_no_makers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card that has imported Machine is taken without a look for what is announced as ways to make one."""
    monkeypatch.setattr(machines, "announced", lambda group: pytest.fail(group))
    with Host([card(lambda registry: registry.policy_key("k"), Machine=Machine)], installed=False) as host:
        assert [one.name for one in host.cards] == ["mine"]
