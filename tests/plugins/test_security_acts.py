"""Every act of docs/security.md is asked about before it is done, by each way to do it; a refusal leaves nothing."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attrs import define, field, frozen
from cardcage._host import cards as hosts
from cardcage._host.discovery import Announcement, announced
from cardcage.config import Draft
from cardcage.errors import Denied
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.memory import GuestMemoryError
from cardcage.registry import DeviceOffer, Registry
from cardcage.security import CLASSES, Act
from cardcage_cli import main
from cardcage_fleet.roster import Roster, ask
from cardcage_fork import fork
from cardcage_memory_policies import MachineMemory
from cardcage_migrate import Refused
from cardcage_selinux.card import DEFAULT, Selinux, SelinuxOptions
from cardcage_snapshot.state import capture, restore
from leftovers import Leftovers
from migrate_kit import Coming, over
from snapshot_kit import count, counting, counts_on

PAGE = Path(__file__).parents[2] / "docs" / "security.md"


@define(eq=False)
class Recorder:
    """Refuses one permission, and remembers all that it was asked."""

    refused: tuple[str, str] | None = None
    asked: set[tuple[str, str]] = field(factory=set)

    def check(self, act: Act, /) -> None:
        for permission in act.permissions:
            self.asked.add((act.tclass, permission))
            if (act.tclass, permission) == self.refused:
                raise Denied(f"not {permission} {act.tclass}")


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    """A security card `recorder` that is installed beside ours."""
    made = Recorder()

    class Card:
        @hookimpl
        def cardcage_register(self, registry: Registry) -> None:
            registry.security("recorder", lambda: made)

    load = Announcement.load
    ours = Announcement("recorder", "recorder", "recorder", "1", "")
    monkeypatch.setattr(Announcement, "load", lambda one: Card() if one is ours else load(one))
    monkeypatch.setattr(hosts, "announced", lambda group: [ours, *announced(group)])
    return made


@frozen
class Made:
    """An act that the configuration of a machine asks for.

    Attributes:
        device: a table, with FOLDER in it; machine: keys of ``[machine]``. left: a file that the act would make.
    """

    device: dict[str, Any] | None = None
    machine: dict[str, Any] = field(factory=dict)
    left: str = ""


def drive(**more: Any) -> Made:
    return Made({"type": "virtio-blk", "drive": {"file": "FOLDER/disk", "format": "raw", **more}}, {"platform": "pc"})


NET = {"type": "virtio-net"}
VHOST = {"type": "vhost-user-blk", "socket": "FOLDER/there"}
MADE = {
    "machine create": Made(),
    "memory map": Made(),
    "memory execmem": Made(),
    "device attach": Made({"type": "debugcon"}),
    "device configure": Made({"type": "debugcon"}),
    "bus claim": Made({"type": "debugcon"}),
    "backend open": Made({"type": "debugcon", "char": "file:FOLDER/out"}, left="out"),
    "image create": Made({"type": "debugcon", "char": "file:FOLDER/out"}, left="out"),
    "image open": drive(),
    "image read": drive(readonly=True),
    "image write": drive(),
    "socket listen": Made({"type": "debugcon", "char": "socket:FOLDER/out"}, left="out"),
    "socket connect": Made({"type": "debugcon", "char": {"type": "socket", "path": "FOLDER/there", "server": False}}),
    "memory share": Made(VHOST, {"platform": "pc"}),
    "interrupt raise": Made({"type": "isa-serial", "port": 0x3F8, "irq": 4}),
    "tap open": Made({**NET, "net": {"type": "tap", "ifname": "cctest9"}}, {"platform": "pc"}),
    "program start": Made({**NET, "net": {"type": "user", "engine": "FOLDER/engine"}}, {"platform": "pc"}, left="out"),
    "management reach": Made(None, {"platform": "pc"}),
}
"""Acts that a configuration asks for, each by all ways that take one."""


def add(vm: Machine) -> Any:
    return vm.add("port80")


def paused(vm: Machine) -> Machine:
    vm.start()
    vm.pause()
    return vm


def shared(act: Callable[[MachineMemory], Any]) -> Callable[[Machine], Any]:
    return lambda vm: act(MachineMemory(vm))


def moved(vm: Machine) -> None:
    with vm.lock:
        vm._board.change_memory(remove=tuple(vm.memory.ranges[:1]))


def slot(vm: Machine) -> Any:
    return vm.devices["debugcon"].device and vm.devices["debugcon"].slot


ACTS: dict[str, tuple[Callable[[Machine], Any], Callable[[Machine], Any]]] = {
    "machine start": (lambda vm: vm, Machine.start),
    "machine pause": (Machine.start, Machine.pause),
    "machine resume": (paused, Machine.resume),
    "machine reset": (Machine.start, Machine.reset),
    "machine stop": (Machine.start, Machine.stop),
    "machine destroy": (Machine.start, Machine.close),
    "device detach": (Machine.start, Machine.close),
    "machine add": (lambda vm: vm, add),
    "machine save": (lambda vm: vm, capture),
    "machine load": (lambda vm: vm, lambda vm: restore(vm, capture(vm))),
    "memory map": (lambda vm: vm, moved),
    "memory merge": (lambda vm: vm, shared(lambda memory: memory.merge())),
    "memory reclaim": (lambda vm: vm, shared(lambda memory: memory.reclaim(4096))),
    "memory dma_read": (lambda vm: vm, lambda vm: slot(vm).memory.read(0, 1)),
    "memory dma_write": (lambda vm: vm, lambda vm: slot(vm).memory.write(0, b"x")),
    "interrupt raise": (lambda vm: vm, Machine.inject_nmi),
    "bus move": (lambda vm: vm, lambda vm: slot(vm).ranges.mappings[0].move(0x80)),
}
"""Acts on a machine that exists: how it comes to where the act is possible, and the act."""

ELSEWHERE = {
    "card load": "test_loading_a_card",
    "management command": "test_commands",
    "interrupt route": "test_messages",
    "machine fork": "test_copies",
    "machine migrate_in": "test_moves",
    "machine migrate_out": "test_moves",
    "policy load": "test_changes_of_the_policy",
    "policy setbool": "test_changes_of_the_policy",
    "policy setenforce": "test_changes_of_the_policy",
}
"""Acts with a test of their own, by its name."""


def documented() -> set[str]:
    """The acts in the table of the page."""
    found = set()
    for row in PAGE.read_text().split("## Mediated operations")[1].split("\n\n")[1].splitlines()[2:]:
        tclass, permissions = re.findall(r"`(\w+)`", row.split("|")[1])[0], re.findall(r"`(\w+)`", row.split("|")[2])
        found |= {f"{tclass} {permission}" for permission in permissions}
    return found


def test_every_documented_act_has_a_test() -> None:
    """The table of docs/security.md, the code's classes and the tests here name the same acts."""
    code = {f"{tclass} {permission}" for tclass, permissions in CLASSES.items() for permission in permissions}
    assert documented() == code | {"policy load", "policy setbool", "policy setenforce"}
    assert documented() == MADE.keys() | ACTS.keys() | ELSEWHERE.keys()
    assert set(ELSEWHERE.values()) <= globals().keys()


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A disk, a socket that somebody listens at, and a program that leaves a file when it is started."""
    (tmp_path / "disk").write_bytes(bytes(1 << 20))
    (tmp_path / "engine").write_text(f"#!/bin/sh\ntouch {tmp_path}/out\nexit 1\n")
    (tmp_path / "engine").chmod(0o755)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "there"))
        listener.listen()
        listener.setblocking(False)
        yield tmp_path
        with pytest.raises(BlockingIOError):  # nobody connected
            listener.accept()


def inline(value: Any) -> str:
    """A value as TOML."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {inline(one)}" for key, one in value.items()) + " }"
    return json.dumps(value)


@pytest.mark.parametrize("way", ["python", "toml", "command line"])
@pytest.mark.parametrize("act", MADE)
def test_what_a_configuration_asks_for(act: str, way: str, recorder: Recorder, folder: Path, capfd: Any) -> None:
    """A machine whose configuration asks for a refused act is not made: no file, thread, link or machine is left."""
    made = MADE[act]
    draft = Draft.of({"machine": {"platform": "none", "memory": "2M", "accel": "tcg", **made.machine}})
    if made.device:
        draft.add({"device": [json.loads(json.dumps(made.device).replace("FOLDER", str(folder)))]})
    if act == "memory share":
        draft.add({"memory": {"type": "memfd"}})
    (folder / "vm.toml").write_text(toml(draft))
    tclass, permission = act.split()
    recorder.refused, left = (tclass, permission), Leftovers()
    if way == "command line":
        assert main(["run", str(folder / "vm.toml"), "--security", "recorder"]) == 2
        assert f"not {permission} {tclass}" in capfd.readouterr().err
    else:
        security = Draft.of({"security": "recorder"}).config().security
        with Host(security=security) as host:
            make: Any = Machine.from_config if way == "python" else Machine.from_toml
            with pytest.raises(Denied, match=f"not {permission} {tclass}"):
                make(draft.config() if way == "python" else folder / "vm.toml", host=host)
            assert host.machines == []
    assert left.threads() == []
    assert not made.left or not (folder / made.left).exists()
    assert not os.path.exists("/sys/class/net/cctest9")
    assert (tclass, permission) in recorder.asked


def toml(draft: Draft) -> str:
    """What is in *draft*, as TOML."""
    lines = []
    for name, table in draft._tables.items():
        for one in [table] if isinstance(table, dict) else [one for _, one in table]:
            lines.append(f"[{name}]" if isinstance(table, dict) else f"[[{name}]]")
            lines += [f"{key} = {inline(value)}" for key, value in one.items()]
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize("act", ACTS)
def test_acts_on_a_machine(act: str, recorder: Recorder) -> None:
    """A refused act on a machine changes nothing: it is in the state that it was in, and can go on."""
    before, do = ACTS[act]
    tclass, permission = act.split()
    devices = [{"type": "debugcon"}]
    security = Draft.of({"security": "recorder"}).config().security
    with Host(security=security) as host:
        vm = Machine(host=host, machine={"platform": "none", "memory": "2M", "accel": "tcg"}, devices=devices)
        before(vm)

        def now() -> Any:
            return vm.state, list(vm.devices), [one.base for one in vm.pio], vm.memory.slots

        state, left = now(), Leftovers()
        recorder.refused = tclass, permission
        with pytest.raises((Denied, GuestMemoryError), match=f"not {permission} {tclass}|refused by the security"):
            do(vm)
        assert now() == state
        assert left.threads() == []
        assert (tclass, permission) in recorder.asked
        recorder.refused = None
        vm.close()


def test_loading_a_card(recorder: Recorder) -> None:
    """A card that may not be loaded is not imported, and offers nothing."""
    recorder.refused = ("card", "load")
    with Host(security=Draft.of({"security": "recorder"}).config().security) as host:
        assert [card.name for card in host.cards] == ["recorder"]
        assert {one.name for one in host.broken} >= {"pc", "tcg"}
        assert host.registry.names(DeviceOffer) == []


def test_commands(recorder: Recorder, tmp_path: Path, capfd: Any) -> None:
    """A command that may not run does nothing; nor does one that may not make its file."""
    for refused in (("management", "command"), ("image", "create")):
        recorder.refused = refused
        assert main(["--security", "recorder", "image", "create", str(tmp_path / "new"), "1M"]) == 2
        assert f"not {refused[1]} {refused[0]}" in capfd.readouterr().err
        assert not (tmp_path / "new").exists()


def test_messages(recorder: Recorder) -> None:
    """A message that is not granted is lost, and so are those after it; no more is asked about each."""
    with Host(security=Draft.of({"security": "recorder"}).config().security) as host:
        vm = Machine(
            host=host, machine={"platform": "none", "memory": "2M", "accel": "tcg"}, devices=[{"type": "debugcon"}]
        )
        sent: list[int] = []
        vm.vm = SimpleNamespace(signal_msi=lambda address, data: sent.append(data), close=vm.vm.close)
        recorder.refused = ("interrupt", "route")
        slot(vm).interrupts.msi(0xFEE00000, 1)
        recorder.asked.clear()
        slot(vm).interrupts.msi(0xFEE00000, 2)
        assert sent == []
        assert not recorder.asked


def test_copies(recorder: Recorder) -> None:
    """A machine that may not be copied is not, and goes on."""
    with Host(security=Draft.of({"security": "recorder"}).config().security) as host:
        vm = Machine(host=host, machine={"platform": "none", "memory": "2M", "accel": "tcg"})
        recorder.refused = ("machine", "fork")
        with pytest.raises(Denied, match="fork"):
            fork(vm)
        assert vm.state == "built"
        vm.close()


def test_moves(recorder: Recorder, tmp_path: Path) -> None:
    """A machine that may not leave, or may not come in, does not, and goes on where it is."""
    security = Draft.of({"security": "recorder"}).config().security
    with Host(security=security) as host, counting(tmp_path, host) as vm:
        vm.start()
        with Coming(host) as there:
            recorder.refused = ("machine", "migrate_out")
            with pytest.raises(Denied, match="migrate_out"):
                over(vm, there.link)
            recorder.refused = ("machine", "migrate_in")
            with pytest.raises(Refused, match="migrate_in"):
                over(vm, there.link)
            assert isinstance(there.done().error, Denied)
        counts_on(vm, count(vm))


def test_what_other_processes_ask(recorder: Recorder) -> None:
    """`cardcage stats` is told of a machine's balloon only if the machine may be reached; nothing stops."""
    with Host(security=Draft.of({"security": "recorder"}).config().security) as host:
        vm = Machine(host=host, machine={"memory": "16M", "accel": "tcg"}, devices=[{"type": "virtio-balloon"}])
        (entry,) = [one for one in Roster().read()[0] if one.pid == os.getpid() and one.balloon]
        assert ask(entry, 20)
        recorder.refused = ("management", "reach")
        assert not ask(entry)
        assert vm.state == "built"


def test_changes_of_the_policy(tmp_path: Path) -> None:
    """A policy may forbid the operator to change it: then nothing changes."""
    site = tmp_path / "site.cil"
    site.write_text(DEFAULT.read_text().replace("(allow operator_t policy_t", ";(allow operator_t policy_t"))
    card = Selinux(SelinuxOptions(policy=[str(site)], audit="none", labels="none"))
    policy = card.avc.policy
    for act in (card.reload, lambda: card.set_booleans(nic_dump=True), lambda: card.set_enforcing(False)):
        with pytest.raises(Denied, match="policy"):
            act()
    assert card.avc.policy is policy
    assert card.avc.enforcing
