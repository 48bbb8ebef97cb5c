"""Snapshots whose RAM is made on another one's: all of it comes back, and the chain is held together."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from cardcage.errors import ConfigError, Denied, UsageError
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.ram import PAGE
from cardcage.security import Act, Mediator
from cardcage_cli import main
from cardcage_snapshot import chain, manifest
from cardcage_snapshot.creating import Snapshot, remove
from cardcage_snapshot.loading import load
from cardcage_snapshot.places import Folder, located
from cardcage_snapshot.restoring import check_files
from snapshot_kit import counting, rewrite

MEMORY = 5 << 20


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots and the key of this test alone."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def host() -> Iterator[Host]:
    """A host with the installed cards."""
    with Host() as made:
        yield made


@pytest.fixture
def vm(tmp_path: Path, host: Host) -> Iterator[Machine]:
    """A machine that stands still, with bytes in every other page of its first two mebibytes."""
    with counting(tmp_path, host, memory=str(MEMORY)) as made:
        made.start()
        made.pause()
        for page in range(16, 512, 2):
            made.memory.write(page * PAGE, bytes([page % 255 + 1]) * PAGE)
        yield made


def save(vm: Any, where: Any, **keys: Any) -> Snapshot:
    made: Snapshot = vm.snapshot(where, **keys)
    return made


def ram(vm: Machine) -> bytes:
    return bytes(vm.memory.ranges[0].block.view)


def restored(where: Any, host: Host) -> bytes:
    """The RAM of a machine that goes on from a snapshot."""
    made: Any = Machine
    with made.restore(where, host=host, start=False) as vm:
        return ram(vm)


def change(vm: Machine, seed: int) -> None:
    """Pages get other bytes, or zeros, or those of their neighbours; new ones get some; a piece becomes zero."""
    draw = Random(seed)
    for page in draw.sample(range(16, 1024), 60):
        other = vm.memory.read(draw.randrange(16, 512) * PAGE, PAGE)
        vm.memory.write(page * PAGE, draw.choice([bytes(PAGE), draw.randbytes(PAGE), other]))
    vm.memory.write(MEMORY - PAGE, draw.randbytes(PAGE))
    if seed == 2:
        vm.memory.write(1 << 20, bytes(1 << 20))


@pytest.mark.parametrize("packed", [(False,) * 4, (True,) * 4, (True, False, True, False), (False, True, False, True)])
def test_all_of_a_chain_comes_back(vm: Machine, host: Host, packed: tuple[bool, ...]) -> None:
    """Each snapshot of a chain, compressed or not, has RAM as it was then, restored or loaded into a machine that is
    there, and is found undamaged; one that nothing was written before has no page of its own."""
    kept = []
    for seed, compress in enumerate(packed):
        if 0 < seed < 3:
            change(vm, seed)
        save(vm, f"s{seed}", compress=compress, parent=f"s{seed - 1}" if seed else None)
        kept.append(ram(vm))
    for seed, then in enumerate(kept):
        assert restored(f"s{seed}", host) == then
        load(vm, located(f"s{seed}"))
        assert ram(vm) == then
        with Folder(located(f"s{seed}")) as folder:
            check_files(folder, manifest.read(folder)[0])
    assert not any((located("s3") / "pages").read_bytes())
    assert sum(byte.bit_count() for byte in (located("s1") / "pages").read_bytes()) <= 61


def test_parts_are_written_until_all_is(vm: Machine, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the kernel writes a part of what it is given, the rest follows."""
    vm.memory.write(64 * PAGE, Random(3).randbytes(1 << 16))  # which is not packed into less
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: whole(fd, data[:5000], at))
    save(vm, "a", compress=True)
    change(vm, 1)
    save(vm, "b", parent="a")
    assert restored("b", host) == ram(vm)


def test_less_is_stored(vm: Machine) -> None:
    """A snapshot on another one takes little more than what was written since, and keeps that alone."""
    save(vm, "whole")
    for page in range(16, 80):
        vm.memory.write(page * PAGE, b"new!" * (PAGE // 4))
    assert save(vm, "less", parent="whole").stored <= 64 * PAGE + (64 << 10)


def test_a_restored_one_is_saved_again(vm: Machine, host: Host, tmp_path: Path) -> None:
    """A machine that goes on from a chain, whose RAM is a map of its root, is saved whole and on the chain."""
    save(vm, "a")
    change(vm, 1)
    save(vm, "b", parent="a")
    made: Any = Machine
    with made.restore("b", host=host) as again:
        again.pause()
        change(again, 2)
        save(again, "whole")
        save(again, "c", parent="b")
        assert restored("whole", host) == restored("c", host) == ram(again)


def test_a_parent_has_to_fit(vm: Machine, host: Host, tmp_path: Path) -> None:
    """A parent lies beside its child, is another snapshot, undamaged, of a machine with as much memory."""
    save(vm, "a")
    for where, parent in (("b", tmp_path / "x" / "a"), ("a", "a")):
        with pytest.raises(UsageError, match="expected a parent that lies beside"):
            save(vm, where, parent=parent, replace=True)
    with pytest.raises(ConfigError, match=r"none: there is no such snapshot"):
        save(vm, "b", parent="none")
    with counting(tmp_path, host, memory="6M") as other:
        other.start()
        with pytest.raises(ConfigError, match=r"cannot be the parent: it has 5 MiB of memory: the machine has 6 MiB"):
            save(other, "b", parent="a")
    with (located("a") / "ram").open("r+b") as file:
        file.truncate(1 << 20)
    with pytest.raises(ConfigError, match=r"a/ram: RAM at 0x100000-0x1fffff is damaged: the file ends before"):
        save(vm, "b", parent="a")
    assert not located("b").exists()


class Keeps:
    """A checker that lets nobody read what it is told of. Attribute ``name``: the path."""

    name = ""

    def check(self, act: Act, /) -> None:
        if act.tclass == "image" and "read" in act.permissions and act.facts["name"] == self.name:
            raise Denied(str(act))


def test_a_parent_is_read_by_leave(tmp_path: Path) -> None:
    """A checker is asked about each snapshot of a chain before one on it is made, restored or loaded."""
    keeps = Keeps()
    with Host(mediator=Mediator((keeps,))) as host, counting(tmp_path, host, memory=str(MEMORY)) as vm:
        vm.start()
        vm.pause()
        save(vm, "a")
        save(vm, "b", parent="a")
        keeps.name = str(located("a"))
        with pytest.raises(Denied):
            save(vm, "c", parent="b")
        with pytest.raises(Denied):
            restored("b", host)
        with pytest.raises(Denied):
            load(vm, located("b"))
        keeps.name = ""
        save(vm, "c", parent="b")
        assert restored("c", host) == ram(vm)


def test_a_parent_that_is_needed_stays(vm: Machine, host: Host, capsys: pytest.CaptureFixture[str]) -> None:
    """A parent is neither removed nor replaced while another is made on it; children are told by list and show."""
    save(vm, "a")
    save(vm, "b", parent="a")
    save(vm, "c", parent="a")
    for act in (lambda: remove(host, located("a")), lambda: save(vm, "a", replace=True)):
        with pytest.raises(ConfigError, match=r"snapshots/a: is needed: b, c are made on it"):
            act()
    assert main(["snapshot", "show", "b"]) == 0
    assert "parent         a\n" in capsys.readouterr().out
    assert main(["snapshot", "list", "--json"]) == 0
    assert capsys.readouterr().out.count('"parent": "a"') == 2
    assert main(["snapshot", "rm", "b", "c", "a"]) == 0


def test_a_chain_that_is_broken_is_named(vm: Machine, host: Host) -> None:
    """Where a parent is missing, is another, or a part of the chain is damaged, that is named, and nothing restored."""
    save(vm, "a")
    change(vm, 1)
    save(vm, "b", parent="a")
    save(vm, "c", parent="b")
    at = located("a").parent

    def fails(match: str) -> None:
        with pytest.raises(ConfigError, match=match):
            restored("c", host)

    (at / "a").rename(at / "gone")
    fails(r'snapshots/a: there is no such snapshot \(snapshot "b" is made on it\)')
    save(vm, "a")
    fails(r'snapshots/a: is another snapshot than the one that "b" was made on')
    shutil.rmtree(at / "a")
    (at / "gone").rename(at / "a")
    restored("c", host)
    data = (at / "b" / "pages").read_bytes()
    (at / "b" / "pages").write_bytes(bytes([data[0] ^ 1]) + data[1:])
    fails(r"b/pages: is damaged: its sum is not that of the manifest")
    (at / "b" / "pages").write_bytes(data)
    with (at / "a" / "ram").open("r+b") as file:
        file.seek(20 * PAGE)
        file.write(b"?")
    with Folder(at / "c") as folder, pytest.raises(ConfigError, match=r"a/ram: RAM at 0x0-0xfffff is damaged"):
        check_files(folder, manifest.read(folder)[0])


@pytest.mark.parametrize(
    ("path", "value", "match"),
    [
        ("name", "../a", "does not fit"),
        ("name", ".", "does not fit"),
        ("sum", "0" * 64, "is another snapshot"),
        ("pages", {"size": 1 << 40, "sum": "0" * 32}, "bytes of pages: expected 160"),
        ("pages", {"size": 160, "sum": "0" * 32}, "pages: is damaged"),
    ],
)
def test_a_hostile_parent_reaches_nothing(vm: Machine, host: Host, path: str, value: Any, match: str) -> None:
    """A parent is a plain name of the same directory, with a map of pages of the right size and sum."""
    save(vm, "a")
    save(vm, "b", parent="a")
    rewrite(located("b"), lambda table: table["ram"]["parent"].update({path: value}))
    with Folder(located("b")) as folder, pytest.raises(ConfigError, match=match):
        chain.Chain(folder, manifest.read(folder)[0])


def test_a_chain_has_an_end(vm: Machine, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain has so many snapshots at most, when it is made and when it is read."""
    save(vm, "s0")
    for at in range(1, 4):
        save(vm, f"s{at}", parent=f"s{at - 1}")
    monkeypatch.setattr(chain, "DEEPEST", 3)
    with pytest.raises(ConfigError, match=r"s3: more than 3 snapshots are made one on another"):
        restored("s3", host)
    restored("s2", host)
    with pytest.raises(ConfigError, match=r"s2: cannot be the parent: it is the last of 3 made one on another"):
        save(vm, "s4", parent="s2")
