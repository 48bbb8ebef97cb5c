"""Devices, images and networks that come and go by QMP while a machine runs."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, TypedDict

import pytest
from cardcage import Machine
from cardcage.hookspecs import hookimpl
from cardcage.registry import Registry
from cardcage_qemu import translate
from cardcage_qemu.coming import added
from cardcage_qmp import QmpCommand, Session, removals
from hotplug_kit import LETS_GO
from installed import PROGRAM
from listens import listens
from qmp_kit import Client, machines


class One(TypedDict):
    kind: Literal["one", "uno"]
    number: int


class Two(TypedDict):
    kind: Literal["two"]
    text: str | None
    more: list[bool]


def told(session: Session, what: One | Two, /) -> list[str]:
    return sorted(what)


def opened(session: Session, rest: dict[str, Any], /, name: str) -> list[str]:
    return [name, *sorted(rest)]


def wrong(session: Session, what: str, /) -> None: ...


class Card:
    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        for name, function in (("told", told), ("opened", opened), ("wrong", wrong)):
            registry.add(QmpCommand(name, function))


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    yield from machines(tmp_path, Card())


@pytest.fixture
def vm(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Machine]:
    """A machine whose guest lets go of devices, or another guest; its monitor is ``qmp``, its disk ``root.img``."""
    (tmp_path / "image").write_bytes(getattr(request, "param", LETS_GO))
    for name in ("root.img", "b.img"):
        (tmp_path / name).write_bytes(bytes(1 << 16))
    devices = [
        {"type": "qmp", "socket": f"unix:{tmp_path}/qmp", "names": {"root": "node0"}},
        {"type": "virtio-blk", "id": "root", "drive": {"file": str(tmp_path / "root.img"), "format": "raw"}},
    ]
    boot = {"protocol": "raw", "image": str(tmp_path / "image")}
    with Machine(boot=boot, memory="16M", accel="tcg", name="coming", devices=devices) as machine:
        yield machine


def add_disk(peer: Client, path: Path, name: str, **more: Any) -> Any:
    """libvirt's own three commands for a disk; returns the answer to the last."""
    storage = {"driver": "file", "filename": str(path), "auto-read-only": True, "discard": "unmap"}
    assert peer.ask("blockdev-add", node_name=f"{name}-storage", **storage) == {"return": {}}
    of = {"driver": "raw", "file": f"{name}-storage", "read-only": False}
    assert peer.ask("blockdev-add", node_name=f"{name}-format", **of) == {"return": {}}
    return peer.ask("device_add", driver="virtio-blk-pci", drive=f"{name}-format", id=name, bus="pci.0", **more)


def test_tables_that_a_word_tells_apart(make: Callable[..., Machine], tmp_path: Path) -> None:
    """All arguments as one object: the schema has its tag and variants, and what is given is held to the right one.
    Arguments without a parameter are passed on, and a signature that says neither is no command."""
    make()
    with Client(tmp_path / "qmp") as peer:
        assert peer.ask("told", kind="uno", number=3) == {"return": ["kind", "number"]}
        assert peer.ask("told", kind="two", text=None, more=[True]) == {"return": ["kind", "more", "text"]}
        for arguments, words in (
            ({}, "Parameter 'kind' is missing"),
            ({"kind": 1}, "Invalid parameter type for 'kind', expected: string"),
            ({"kind": "three"}, "Parameter 'kind' does not accept value 'three'"),
            ({"kind": "one"}, "Parameter 'number' is missing"),
            ({"kind": "one", "number": 1, "text": ""}, "Parameter 'text' is unexpected"),
            ({"kind": "two", "text": 1, "more": []}, "Invalid parameter type for 'text', expected: str | NoneType"),
            ({"kind": "two", "text": "", "more": [1]}, "Invalid parameter type for 'more[0]', expected: boolean"),
        ):
            assert peer.ask("told", **arguments)["error"]["desc"] == words
        assert peer.ask("opened", name="a", other={"b": 1}) == {"return": ["a", "other"]}
        assert "'name' is missing" in peer.ask("opened", other=1)["error"]["desc"]
        assert "not been found" in peer.ask("wrong")["error"]["desc"]
        schema = {one["name"]: one for one in peer.ask("query-qmp-schema")["return"]}
    whole = schema[schema["told"]["arg-type"]]
    assert (whole["tag"], [one["name"] for one in whole["members"]]) == ("kind", ["kind"])
    cases = {one["case"]: [member["name"] for member in schema[one["type"]]["members"]] for one in whole["variants"]}
    assert cases == {"one": ["number"], "uno": ["number"], "two": ["text", "more"]}


def test_a_disk_comes_and_goes(vm: Machine, tmp_path: Path) -> None:
    """device_add has the disk plugged in where it should be; device_del returns at once, and DEVICE_DELETED tells
    when the guest has let go; each name can be used again then, and what is in use cannot be forgotten."""
    vm.start()
    with Client(tmp_path / "qmp") as peer:
        for _ in range(2):
            assert add_disk(peer, tmp_path / "b.img", "b", addr="0x7", serial="S7") == {"return": {}}
            found = {one["device"]: one for one in peer.ask("query-block")["return"]}
            assert found["b"]["inserted"]["node-name"] == "b-format"
            assert found["b"]["inserted"]["file"] == str(tmp_path / "b.img")
            there = {one["qdev_id"]: one for one in peer.ask("query-pci")["return"][0]["devices"]}
            assert (there["b"]["slot"], there["b"]["id"]["device"]) == (7, 0x1042)
            assert "b" in {one["name"] for one in peer.ask("qom-list", path="/machine/peripheral")["return"]}
            assert "in use by device 'b'" in peer.ask("blockdev-del", node_name="b-format")["error"]["desc"]
            assert "part of 'b-format'" in peer.ask("blockdev-del", node_name="b-storage")["error"]["desc"]
            assert peer.ask("device_del", id="b") == {"return": {}}
            assert peer.event("DEVICE_DELETED")["data"] == {"device": "b", "path": "/machine/peripheral/b"}
            for name in ("b-format", "b-storage"):
                assert peer.ask("blockdev-del", node_name=name) == {"return": {}}
        assert peer.ask("device_del", id="b")["error"]["class"] == "DeviceNotFound"


def test_a_network_comes_and_goes_by_lines_of_the_human_monitor(vm: Machine, tmp_path: Path) -> None:
    """netdev_add, device_add, device_del and netdev_del, and entropy, in the words that people type."""
    vm.start()
    with Client(tmp_path / "qmp") as peer:

        def line(text: str) -> str:
            return str(peer.ask("human-monitor-command", command_line=text)["return"])

        assert line(f"netdev_add stream,id=n,server=on,addr.type=unix,addr.path={tmp_path}/n") == ""
        assert "Duplicate" in line(f"netdev_add socket,id=n,connect={tmp_path}/n")
        assert line("device_add virtio-net-pci,netdev=n,id=card,mac=52:54:00:00:00:09") == ""
        assert 'id "card"' in line("info pci")
        assert "in use by device 'card'" in line("netdev_del n")
        assert line("device_del card") == ""
        peer.event("DEVICE_DELETED")
        assert line("netdev_del n") == ""
        assert "not found" in line("netdev_del n")
        assert line("object_add rng-random,id=r,filename=/dev/urandom") == ""
        assert line("device_add virtio-rng-pci,rng=r,id=rng") == ""
        assert line("object_del r") == ""
        assert "expected key=value" in line("device_add virtio-rng-pci,rng")


def test_a_character_back_end_comes_and_goes(vm: Machine, tmp_path: Path) -> None:
    """It is described for a device, which opens it; what a device has, or the command line had, is busy."""
    vm.start()
    socket = {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": f"{tmp_path}/v"}}, "server": False}}
    with Client(tmp_path / "qmp") as peer:

        def told(name: str, **arguments: object) -> str:
            return str(peer.ask(name, **arguments)["error"]["desc"])

        assert peer.ask("chardev-add", id="v", backend=socket) == {"return": {}}
        assert peer.ask("chardev-add", id="n", backend={"type": "null", "data": {}}) == {"return": {}}
        assert told("chardev-add", id="v", backend=socket) == "Chardev with id 'v' already exists"
        assert "does not accept value 'vc'" in told("chardev-add", id="w", backend={"type": "vc", "data": {}})
        assert "expected a socket" in told("device_add", driver="vhost-user-blk-pci", chardev="n", id="d")
        assert "cannot be shared" in told("device_add", driver="vhost-user-blk-pci", chardev="v", id="d")
        for name in ("v", "n"):
            assert peer.ask("chardev-remove", id=name) == {"return": {}}
        assert told("chardev-remove", id="v") == "Chardev 'v' not found"
        added(vm).chars["w"] = "root"
        added(vm).line.chardevs["w"] = {"type": "null"}
        assert told("chardev-remove", id="w") == "Chardev 'w' is busy"


@pytest.mark.parametrize("vm", [b"\xfa\xf4"], ids=["halts"], indirect=True)
def test_a_guest_that_keeps_its_device(vm: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second request meanwhile is refused; after a time DEVICE_UNPLUG_GUEST_ERROR tells that the guest has not let
    go, and the device is there."""
    monkeypatch.setattr(removals, "PATIENCE", 0.05)
    vm.start()
    vm.pause()
    with Client(tmp_path / "qmp") as peer:
        assert "while the machine is paused" in peer.ask("device_del", id="root")["error"]["desc"]
        vm.resume()
        assert peer.ask("device_del", id="/machine/peripheral/root") == {"return": {}}
        data = peer.event("DEVICE_UNPLUG_GUEST_ERROR")["data"]
        assert data == {"device": "root", "path": "/machine/peripheral/root"}
        monkeypatch.setattr(removals, "PATIENCE", 600)
        assert peer.ask("device_del", id="root") == {"return": {}}
        assert "already in the process" in peer.ask("device_del", id="root")["error"]["desc"]
        assert "node0" in {one["node-name"] for one in peer.ask("query-named-block-nodes")["return"]}


def test_what_cannot_come(vm: Machine, tmp_path: Path) -> None:
    """What is wrong is said in one answer, and nothing of it stays."""
    vm.start()
    with Client(tmp_path / "qmp") as peer:
        before = peer.ask("qom-list", path="/machine/peripheral")
        assert peer.ask("blockdev-add", node_name="n", driver="file", filename=str(tmp_path / "b.img")) == {
            "return": {}
        }
        for name, arguments, words in (
            ("blockdev-add", {"node-name": "n", "driver": "file", "filename": "/dev/zero"}, "Duplicate nodes"),
            ("blockdev-add", {"node-name": "m", "driver": "file", "filename": "/dev/zero"}, "a file or a block device"),
            ("blockdev-add", {"node-name": "m", "driver": "file", "filename": "/nothing"}, "No such file"),
            ("blockdev-add", {"node-name": "m", "driver": "file", "filename": "/dev/fdset/9"}, "made this set"),
            ("blockdev-add", {"node-name": "m", "driver": "raw", "file": "k"}, "no -blockdev before it"),
            ("blockdev-add", {"node-name": "m", "driver": "vvfat"}, "does not accept value 'vvfat'"),
            ("blockdev-add", {"driver": "raw", "file": "n"}, "'node-name' is missing"),
            ("blockdev-del", {"node-name": "m"}, "Failed to find node"),
            ("device_add", {"driver": "e1000"}, "no such device"),
            ("device_add", {"driver": "virtio-blk-pci"}, "expected drive=..."),
            ("device_add", {"driver": "virtio-blk-pci", "drive": "m"}, "no -drive or -blockdev m"),
            ("device_add", {"driver": "virtio-blk-pci", "drive": "node0"}, "no -drive or -blockdev node0"),
            ("device_add", {"driver": "virtio-rng-pci", "id": "root"}, "Duplicate device ID"),
            ("device_add", {"driver": "virtio-rng-pci", "addr": "0x0"}, "taken"),
            ("device_add", {"driver": "virtio-rng-pci", "bus": "pci.4"}, "one PCI bus"),
            ("device_add", {"driver": "virtio-rng-pci", "colour": "red"}, "colour=red"),
            ("device_add", {"driver": "virtserialport", "chardev": "c"}, "no -device virtio-serial-pci"),
            ("device_add", {"driver": "virtio-serial-pci", "id": "s"}, "no ports and consoles that come later"),
            ("device_add", {"driver": "virtio-rng-device"}, "comes with the machine"),
            ("device_add", {"driver": "isa-serial"}, "before the machine starts"),
            ("device_del", {"id": "pic"}, "cannot be taken out"),
            ("netdev_add", {"type": "hub", "id": "n"}, "does not accept value 'hub'"),
            ("netdev_add", {"type": "tap", "id": "n", "fd": "nothing"}, "'nothing' has not been found"),
            ("object-add", {"qom-type": "iothread", "id": "i"}, "does not accept value 'iothread'"),
        ):
            assert words in peer.ask(name, **arguments)["error"]["desc"], (name, arguments)
        assert peer.ask("qom-list", path="/machine/peripheral") == before


def test_an_image_by_descriptor_in_a_jail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process in its jail opens no file that a peer names; one whose descriptor the peer sends is a disk, once."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "image").write_bytes(LETS_GO)
    (tmp_path / "b.img").write_bytes(bytes(1 << 16))
    keys = f'accel = ["tcg"]\nmemory = "16M"\n[boot]\nprotocol = "raw"\nimage = "{tmp_path}/image"\n'
    monitor = f'[[device]]\ntype = "qmp"\nsocket = "unix:{tmp_path}/qmp"\n'
    (tmp_path / "vm.toml").write_text(f"[machine]\n{keys}{monitor}")
    command = [*PROGRAM, "run", str(tmp_path / "vm.toml")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            while not listens(tmp_path / "qmp"):
                assert process.poll() is None
            with Client(tmp_path / "qmp") as peer:
                while peer.ask("query-status")["return"]["status"] != "running":
                    pass
                assert "is in its jail" in add_disk(peer, tmp_path / "b.img", "b")["error"]["desc"]
                fd = os.open(tmp_path / "b.img", os.O_RDWR)
                request = {"execute": "add-fd", "arguments": {"fdset-id": 4}}
                socket.send_fds(peer.socket, [json.dumps(request).encode()], [fd])
                os.close(fd)
                assert peer.answer()["return"]["fdset-id"] == 4
                assert add_disk(peer, Path("/dev/fdset/4"), "c") == {"return": {}}
                again = peer.ask("blockdev-add", node_name="d", driver="file", filename="/dev/fdset/4")
                assert "is used by another node" in again["error"]["desc"]
                found = {one["device"]: one for one in peer.ask("query-block")["return"]}
                assert found["c"]["inserted"]["image"]["virtual-size"] == 1 << 16
                assert peer.ask("device_del", id="c") == {"return": {}}
                peer.event("DEVICE_DELETED")
        finally:
            process.terminate()
            process.communicate()


def test_a_drive_for_a_device_that_comes_later_can_be_opened_then(tmp_path: Path) -> None:
    """The jail lets the process open an image that no device has yet; not one that a device has."""
    for name in ("used", "late"):
        (tmp_path / name).touch()
    words = "-accel tcg -bios x -drive if=none,id=a,format=raw,file={0}/used -device virtio-blk-pci,drive=a"
    words += " -drive if=none,id=b,format=raw,file={0}/late -drive if=none,id=c,format=raw,file={0}/missing"
    assert translate(words.format(tmp_path).split()).config()["security"] == {"open_later": [f"{tmp_path}/late"]}
