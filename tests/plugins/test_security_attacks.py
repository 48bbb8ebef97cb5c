"""The default policy against cards that try what they may not: each is denied, audited, and harms nothing."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen
from cardcage.config import Draft
from cardcage.device import Pio, Slot
from cardcage.errors import ConfigError, Denied, UsageError
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.registry import DeviceOffer, Registry
from cardcage.security import CLASSES, Act
from cardcage_selinux.card import DEFAULT
from cardcage_selinux.server.policy import load

LINE = re.compile(
    r"type=AVC msg=audit\(\d+\.\d{3}:\d+\): avc:  denied  \{ (?P<permissions>[\w ]+) \} for  pid=\d+ .*"
    r"scontext=(?P<source>\S+) tcontext=(?P<target>\S+) tclass=(?P<tclass>\w+) permissive=0"
)


@frozen
class EvilOptions:
    char: str = "none"


class EvilDevice:
    """A stranger's device; tests act with its slot."""

    def __init__(self, options: EvilOptions) -> None:
        self.options = options

    def plug(self, slot: Slot, /) -> None:
        self.slot = slot
        if self.options.char != "none":
            slot.host.open("char", self.options.char)

    def read(self, offset: int, size: int, /) -> int:
        return len(self.slot.board.devices)  # what it may not reach, in the guest's access

    def write(self, offset: int, size: int, value: int, /) -> None: ...


class Evil:
    """A card that does not come with cardcage."""

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.device("evil", EvilDevice, options=EvilOptions, regions=(Pio(4, 0x200),))


class Yard:
    """A host under the default policy, and what it audited."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.folder, self.log = folder, folder / "audit.log"
        spec = {"type": "selinux", "audit": str(self.log), "state": str(folder / "state"), **options}
        self.host = Host([Evil()], security=Draft.of({"security": [spec]}).config().security)

    def machine(self, name: str, *devices: dict[str, Any], **more: Any) -> Machine:
        wanted = {"name": name, "memory": "16M", "accel": "tcg"}
        return Machine(host=self.host, machine=wanted, devices=devices, **more)

    def denials(self) -> list[tuple[str, str, str, str]]:
        """(permissions, source type, target type, class) of each line; every line has the grammar."""
        found = []
        for line in self.log.read_text().splitlines() if self.log.exists() else ():
            match = LINE.fullmatch(line)
            assert match, line
            source, target = (match[side].split(":")[2] for side in ("source", "target"))
            found.append((match["permissions"], source, target, match["tclass"]))
        return found


@pytest.fixture
def yard(tmp_path: Path) -> Iterator[Yard]:
    made = Yard(tmp_path)
    assert made.host.broken == []
    with made.host:
        yield made


def slot_of(vm: Machine, id: str) -> Slot:
    found: Slot = vm.devices[id].device.slot
    return found


def test_what_the_default_policy_allows_runs(yard: Yard, tmp_path: Path) -> None:
    """A machine of ours with a disk, a network card, a log, and a stranger's device is denied nothing."""
    (tmp_path / "disk.raw").write_bytes(bytes(1 << 20))
    devices = [
        {"type": "virtio-blk", "drive": {"file": str(tmp_path / "disk.raw"), "format": "raw"}},
        {"type": "virtio-net", "net": "null"},
        {"type": "virtio-rng"},
        {"type": "virtio-balloon"},
        {"type": "virtio-fs", "path": str(tmp_path), "tag": "f"},
        {"type": "virtio-console", "char": f"file:{tmp_path}/log"},
        {"type": "virtio-vsock", "cid": 5, "uds": str(tmp_path / "v")},
        {"type": "virtio-9p", "path": str(tmp_path), "tag": "t"},
        {"type": "evil", "irq": 5},
    ]
    with yard.machine("one", *devices) as vm:
        slot_of(vm, "evil").interrupts.line()
        slot_of(vm, "evil").memory.write(0, b"x")
        vm.start()
        vm.pause()
        vm.resume()
        vm.reset()
        vm.stop()
    assert yard.denials() == []


def test_machines_have_categories_of_their_own(yard: Yard) -> None:
    """Each machine and its devices have a pair that no other has."""
    with yard.machine("one", {"type": "evil"}) as one, yard.machine("two", {"type": "evil"}) as two:
        ranges = {vm.label.split(":", 3)[3] for vm in (one, two)}
        assert len(ranges) == 2
        assert one.label.startswith("system_u:system_r:svirt_t:s0:c")
        label = one.devices["evil"].slot.label
        assert label == one.label.replace("svirt_t", "stranger_t")


@pytest.mark.parametrize(
    ("act", "denial"),
    [
        (lambda slot, path: slot.board.stop(), ("reach", "stranger_t", "svirt_t", "management")),
        (lambda slot, path: slot.interrupts.line(4), ("raise", "stranger_t", "line_t", "interrupt")),
        (lambda slot, path: slot.host.open("block", path), ("open", "stranger_t", "block_backend_t", "backend")),
        (lambda slot, path: slot.host.open("net", "user"), ("open", "stranger_t", "net_backend_t", "backend")),
        (
            lambda slot, path: slot.host.open("char", f"file:{path}"),
            ("create write", "stranger_t", "file_t", "image"),
        ),
        (
            lambda slot, path: slot.host.ask("image", path, ("open", "read")),
            ("open read", "stranger_t", "file_t", "image"),
        ),
        (
            lambda slot, path: slot.host.ask("socket", "unix:/x", ("connect",)),
            ("connect", "stranger_t", "port_t", "socket"),
        ),
        (
            lambda slot, path: slot.host.ask("program", "sh", ("start",)),
            ("start", "stranger_t", "program_t", "program"),
        ),
        (
            lambda slot, path: slot.host.shared_memory(lambda: None, lambda: None),
            ("share", "stranger_t", "svirt_t", "memory"),
        ),
        (
            lambda slot, path: slot.ranges.mappings[0].move(0x3F8),
            ("move", "stranger_t", "serial_t", "bus"),
        ),
    ],
)
def test_a_stranger_is_confined(yard: Yard, act: Callable[[Any, str], Any], denial: Any, tmp_path: Path) -> None:
    """What a stranger's device may not do raises Denied, is one AVC line, and changes neither file nor machine."""
    path = tmp_path / "disk.raw"
    path.write_bytes(b"precious")
    with yard.machine("one", {"type": "evil"}) as vm:
        before = [(claim.base, claim.size, claim.name) for claim in vm.pio]
        for _ in range(2):
            with pytest.raises(Denied):
                act(slot_of(vm, "evil"), str(path))
        assert yard.denials() == [denial]
        assert [(claim.base, claim.size, claim.name) for claim in vm.pio] == before
        assert vm.state == "built"
    assert path.read_bytes() == b"precious"


def test_a_denial_in_a_guests_access_is_harmless(yard: Yard) -> None:
    """A stranger's device that grabs at the machine when the guest reads it is denied; the machine runs on."""
    with yard.machine("one", {"type": "evil"}) as vm:
        vm.start()
        assert vm._board.ops.pio_read(0x200, 1) == 0xFF
        vm.pause()
        assert vm.state == "paused"
    assert yard.denials() == [("reach", "stranger_t", "svirt_t", "management")]


def test_a_network_card_cannot_reach_a_disk(yard: Yard, tmp_path: Path) -> None:
    """A device of the NIC's type, whatever its code, gets no block back end, no image and no dump over one."""
    path = tmp_path / "disk.raw"
    path.write_bytes(bytes(1 << 20))
    with yard.machine("one") as vm:
        pass
    held = "system_u:system_r:svirt_t:s0:c7,c8"
    nic = "system_u:system_r:nic_t:s0:c7,c8"
    disk = {"type": "virtio-blk", "drive": {"file": str(path), "format": "raw"}}
    wanted = {"name": "one", "memory": "16M", "accel": "tcg", "label": held}
    with Machine(host=yard.host, machine=wanted, devices=[disk, {"type": "evil", "label": nic}]) as vm:
        slot = slot_of(vm, "evil")
        for act in (
            lambda: slot.host.open("block", str(path)),
            lambda: slot.host.ask("image", str(path), ("open", "read")),
            lambda: slot.host.open("net", {"type": "null", "dump": str(path)}),
        ):
            with pytest.raises(Denied):
                act()
    assert yard.denials() == [
        ("open", "nic_t", "block_backend_t", "backend"),
        ("open read", "nic_t", "svirt_image_t", "image"),
        ("create write", "nic_t", "svirt_image_t", "image"),
    ]
    assert path.read_bytes() == bytes(1 << 20)


def test_a_machine_cannot_reach_another(yard: Yard, tmp_path: Path) -> None:
    """Another machine's disk and socket are denied to devices of the right type, by their categories; so is memory."""
    path, there = tmp_path / "disk.raw", str(tmp_path / "socket")
    path.write_bytes(bytes(1 << 20))
    disk = {"type": "virtio-blk", "drive": {"file": str(path), "format": "raw", "locking": "off"}}
    debug = {"type": "debugcon", "port": 0xE9, "char": {"type": "socket", "path": there}}
    with yard.machine("one", disk, debug) as one:
        client = {"type": "debugcon", "port": 0xE9, "char": {"type": "socket", "path": there, "server": False}}
        for device in (disk, {**disk, "drive": {**disk["drive"], "readonly": True}}, client):
            with pytest.raises(Denied):
                yard.machine("two", device)
        assert yard.host.machines == [one]
        with yard.machine("three", {"type": "evil"}) as three:
            label = three.devices["evil"].slot.label
            for permission in ("dma_read", "dma_write"):
                with pytest.raises(Denied):
                    three.mediator.check(Act(label, one.label, "memory", (permission,)))
        with socket.socket(socket.AF_UNIX) as probe:
            probe.connect(there)  # it was there all the time
    assert yard.denials() == [
        ("open read write", "disk_t", "svirt_image_t", "image"),
        ("open read", "disk_t", "svirt_image_t", "image"),
        ("connect", "serial_t", "svirt_socket_t", "socket"),
        ("dma_read", "stranger_t", "svirt_t", "memory"),
        ("dma_write", "stranger_t", "svirt_t", "memory"),
    ]


def test_the_translator_needs_execmem(tmp_path: Path) -> None:
    """With the boolean machine_execmem off, a machine on the translator is not made."""
    yard = Yard(tmp_path, booleans={"machine_execmem": False})
    with yard.host, pytest.raises(Denied, match="may not execmem memory"):
        yard.machine("one")
    assert yard.denials() == [("execmem", "svirt_t", "svirt_t", "memory")]


def test_policy_changes_while_a_machine_runs(tmp_path: Path) -> None:
    """A change of policy revokes and restores what is wired, at once; a policy that is wrong changes nothing."""
    site = tmp_path / "site.cil"
    site.write_text("; nothing yet\n")
    yard = Yard(tmp_path, policy=["default", str(site)])
    with yard.host, yard.machine("one", {"type": "evil"}) as vm:
        card: Any = yard.host.mediator.checkers[0]
        slot: Any = slot_of(vm, "evil")
        vm.start()
        card.set_enforcing(False)
        line = slot.interrupts.line(4)  # permissive: logged, and let pass
        line.set(True)
        assert vm.lines[4].level
        card.set_enforcing(True)
        assert not vm.lines[4].level
        site.write_text("(allow stranger_t line_t (interrupt (raise)))\n(boolean net false)\n")
        card.reload()
        assert vm.lines[4].level
        site.write_text("(oops)")
        with pytest.raises(ConfigError, match=r"site.cil:1:\d+: "):
            card.reload()
        with pytest.raises(UsageError, match="no boolean"):
            card.set_booleans(nothing=True)
        assert vm.lines[4].level
        site.write_text("")
        card.reload()
        assert not vm.lines[4].level
        assert vm.state == "running"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"policy": ["/nonexistent.cil"]}, "/nonexistent.cil: policy cannot be read: No such file"),
        ({"policy": ["default", "(allow a b (c (d)))"]}, "a"),
        ({"booleans": {"machine_execmen": True}}, 'no boolean is called "machine_execmen". Did you mean'),
        ({"audit": "/nonexistent/log"}, "/nonexistent/log: the audit log cannot be written"),
        ({"enforcing": "no"}, "enforcing: expected true or false"),
    ],
)
def test_a_card_that_cannot_start_stops_everything(options: dict[str, Any], error: str, tmp_path: Path) -> None:
    """A policy or option that is wrong is one line, and no host is made."""
    with pytest.raises(ConfigError, match=re.escape(error)) as caught:
        Yard(tmp_path, **options)
    assert "\n" not in str(caught.value)


def test_the_default_policy_knows_all_classes() -> None:
    """Each class and permission that the core asks about is in the default policy, which denies what it lacks."""
    policy = load(DEFAULT)
    for tclass, permissions in CLASSES.items():
        found = policy.class_of(tclass)
        assert found is not None
        assert set(permissions) <= set(found.permissions)
    assert policy.tables.handle_unknown == "deny"


def test_the_default_policy_names_our_devices() -> None:
    """Each device that it names is one that a card of ours offers."""
    named = set(re.findall(r'device "([\w-]+)"', DEFAULT.read_text()))
    with Host() as host:
        assert named <= set(host.registry.names(DeviceOffer))
