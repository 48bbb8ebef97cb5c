"""Forks and checkpoints that are refused: in one line that names what is in the way, before anything stops."""

from __future__ import annotations

import fcntl
import os
import resource
import socket
import struct
import subprocess
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.device import Pio
from cardcage.errors import CardcageError, Denied, HostError, StateError, UsageError
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.security import Act, Mediator
from cardcage_fork import Copy, checkpoint, fork, process, revert, reverting
from cardcage_fork.plan import refuse
from cardcage_fork.process import Made
from cardcage_fork.wire import Peer, pack_error, pack_value, raise_error, unpack_value
from hypothesis import example, given, settings
from hypothesis import strategies as st
from leftovers import Leftovers

if TYPE_CHECKING:
    from pathlib import Path

    from cardcage.registry import Registry


class Holder:
    """A device that has something to give back."""

    def read(self, offset: int, size: int, /) -> int:
        return 0

    def write(self, offset: int, size: int, value: int, /) -> None:
        """Nothing."""

    def unplug(self) -> None:
        """Give it back."""


class Busy(Holder):
    """A device that works of its own accord."""

    def pause(self) -> None:
        """Stop."""

    def resume(self) -> None:
        """Go on."""


class Card:
    """Offers both, and may refuse."""

    __name__ = "holders"
    why: str | None = None

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.device("holder", Holder, regions=(Pio(4, 0x500),))
        registry.device("busy", Busy, regions=(Pio(4, 0x540),))

    @hookimpl
    def cardcage_forking(self, machine: Any) -> str | None:
        return self.why


def machine(*devices: dict[str, Any], card: Card | None = None, **keys: Any) -> Machine:
    host = Host(cards=(card or Card(),), mediator=keys.pop("mediator", None))
    return Machine(memory="16M", accel="tcg", devices=devices, host=host, **keys)


def test_a_plain_machine_can_be_forked() -> None:
    """A PC with a serial port, and virtio devices without a host's side, has nothing in the way."""
    devices = [{"type": "virtio-net", "net": "null"}, {"type": "virtio-rng"}, {"type": "virtio-balloon"}]
    with machine(*devices) as vm:
        refuse(vm)
        assert vm.why_not_parked() == ""
        with pytest.raises(UsageError, match="1 to 1000"):
            fork(vm, 0)


def test_a_machine_goes_on_when_parking_it_or_what_followed_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part that fails to park, and an exception while it is parked, leave a machine that ran running."""
    (tmp_path / "endless").write_bytes(bytes.fromhex("ebfe"))
    boot = {"protocol": "raw", "image": str(tmp_path / "endless")}
    with Machine(memory="1M", accel="tcg", machine={"platform": "none"}, boot=boot) as vm:
        vm.start()
        with pytest.raises(ZeroDivisionError), vm.parked():
            raise ZeroDivisionError
        assert vm.state == "running"
        with monkeypatch.context() as patch:
            patch.setattr(vm.vm, "park", lambda: 1 // 0)
            with pytest.raises(ZeroDivisionError), vm.parked():
                pytest.fail("it is not parked")
        assert vm.state == "running"
        vm.pause()
        with vm.parked():
            pass
        assert vm.state == "paused"


def test_what_holds_the_host_is_named(tmp_path: Path) -> None:
    """RAM that is shared, a share, vsock, a file that takes output, a stranger's device that does not say how, memory
    policies and a card that refuses are each named in the line."""
    refusing = Card()
    refusing.why = "the stars are wrong"
    memfd = {"memory": {"type": "memfd"}}
    cases: list[tuple[str, Any]] = [
        ("RAM of type memfd", {"fragments": [memfd]}),
        ('"virtio-9p" holds', {"devices": ({"type": "virtio-9p", "path": str(tmp_path), "tag": "x"},)}),
        ("shares a directory that its guest may change", {"devices": ({"type": "virtio-fs", "path": str(tmp_path)},)}),
        ('"virtio-vsock" holds', {"devices": ({"type": "virtio-vsock", "cid": 3, "uds": str(tmp_path / "v")},)}),
        ("a file takes", {"devices": ({"type": "virtio-console", "char": f"file:{tmp_path / 'out'}"},)}),
        ('"holder" .* does not say', {"devices": ({"type": "holder"},)}),
        ('"busy" .* of its own accord', {"devices": ({"type": "busy"},)}),
        ("the stars are wrong", {"card": refusing}),
    ]
    for line, keys in cases:
        with machine(*keys.pop("devices", ()), **keys) as vm:
            before = vm.state
            with pytest.raises(StateError, match=f"{vm.name} cannot be forked: .*{line}") as caught:
                fork(vm)
            assert "\n" not in str(caught.value)
            assert vm.state is before


def test_a_fork_is_asked_about_first() -> None:
    """A checker hears of ``machine fork`` and may refuse; one that has let it does not say how it is in two processes,
    and is named."""

    class Checker:
        asked: list[tuple[str, ...]] = []  # noqa: RUF012  one test's
        refuses = True

        def check(self, act: Act, /) -> None:
            self.asked.append(act.permissions)
            if self.refuses and "fork" in act.permissions:
                raise Denied("no copies here")

    checker = Checker()
    with machine(mediator=Mediator((checker,))) as vm:
        with pytest.raises(Denied, match="no copies here"):
            fork(vm)
        assert checker.asked[-1] == ("fork",)
        checker.refuses = False
        with pytest.raises(StateError, match="checker Checker is one process's"):
            fork(vm)


def test_a_checkpoint_is_refused_where_not_all_goes_back(tmp_path: Path) -> None:
    """A disk that the guest can write, and a stranger's device without state, are named."""
    (tmp_path / "disk.img").write_bytes(bytes(1 << 20))
    drive = {"file": str(tmp_path / "disk.img"), "format": "raw"}
    with (
        machine({"type": "virtio-rng"}) as vm,
        pytest.raises(StateError, match="cannot have a checkpoint: it is built"),
    ):
        checkpoint(vm)
    for line, device in (
        ('drive of device "virtio-blk"', {"type": "virtio-blk", "drive": drive}),
        ('"holder" .* its state', {"type": "holder"}),
    ):
        with machine(device) as vm:
            vm.start()
            vm.pause()
            with pytest.raises(StateError, match=f"cannot have a checkpoint: .*{line}"):
                checkpoint(vm)


def test_a_machine_of_other_parts_does_not_go_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that came since the checkpoint is said, and nothing is put back; a checkpoint for which there is no
    memory leaves no log behind."""
    with machine({"type": "virtio-rng"}) as vm:
        vm.start()
        vm.pause()
        with monkeypatch.context() as patch:
            patch.setattr(reverting, "fenced", _no_room)
            with pytest.raises(HostError, match="no memory for a checkpoint"):
                checkpoint(vm)
        checkpoint(vm)
        vm.memory.write(0x5000, b"kept")
        vm.add("virtio-rng", id="late")
        with pytest.raises(StateError, match=f"{vm.name} cannot go back: devices or memory came, or went"):
            revert(vm)
        assert vm.memory.read(0x5000, 4) == b"kept"
        checkpoint(vm)
        vm.memory.write(0x5000, b"gone")
        assert revert(vm) >= 1
        assert vm.memory.read(0x5000, 4) == b"kept"


def _no_room(*_: object) -> None:
    raise OSError(12, "Cannot allocate memory")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_values_pass_between_processes(value: Any) -> None:
    """Each value comes out as it went in."""
    assert unpack_value(pack_value(value)) == value


KINDS = st.sampled_from("bytes table pattern completed outcome timeout os class text".split())
ANSWERS = st.recursive(
    st.none() | st.integers() | st.text() | st.sampled_from(["Stopped", "(", "a{99999999999}", "HostError"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KINDS | st.text(), inner, max_size=2),
)


@settings(max_examples=200, deadline=None)
@given(ANSWERS)
@example({"outcome": []})
@example({"pattern": ["(", 0]})
@example({"pattern": ["", 1 << 80]})
@example({"os": 5})
@example({"timeout": [1]})
def test_an_answer_may_be_anything(packed: Any) -> None:
    """What a copy's process says is a value, or an error of ours or the system's, whatever it is."""
    with suppress(CardcageError):
        unpack_value(packed)
    with pytest.raises((CardcageError, OSError, subprocess.TimeoutExpired)):
        raise_error(packed)


def nested() -> Any:
    deep: Any = 1
    for _ in range(100_000):
        deep = [deep]
    return deep


def test_a_message_may_be_anything() -> None:
    """A copy's process that sends what nobody asked for, or what is nested without end, makes nothing grow here."""
    ours, theirs = socket.socketpair()
    with theirs:
        copy, peer = Copy(Made(os.getpid(), ours)), Peer(theirs)
        for number in (7, 1, "1", None, [1]):
            peer.send({"id": number, "return": 1}, (theirs.fileno(),) * 3)
        left = Leftovers()
        assert copy._call("born") == 1
        for number in (2, {}):
            peer.send({"id": number, "return": [[1, "init"]]}, (theirs.fileno(),))
        with pytest.raises(HostError, match="has ended, or is none"):
            copy.fork()
        assert not copy._answers
        assert left() == []
        data = b"[" * 100_000
        theirs.sendall(struct.pack("<IB", len(data), 0) + data)
        with pytest.raises(HostError, match="no message"):
            copy._call("born")
        copy._hang_up()
    with pytest.raises(HostError, match="cannot be understood"):
        unpack_value(nested())


def test_a_descriptor_may_have_any_number(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link whose number is beyond what select(2) takes is waited for; a process without a descriptor to spare is told
    so in one line."""
    ours, theirs = socket.socketpair()
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    with ours, theirs:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before[1], before[1]))
        try:
            number = fcntl.fcntl(ours, fcntl.F_DUPFD_CLOEXEC, 2000)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)
        made = Made(1, socket.socket(fileno=number))
        Peer(theirs).send({"name": "high"})
        process._await([made], process.NAME)
        assert made.name == "high"
        made.end.close()
    monkeypatch.setattr(socket, "socketpair", _no_room)
    with machine() as vm, pytest.raises(HostError, match=f"{vm.name} cannot be forked: Cannot allocate memory"):
        fork(vm)


def test_errors_pass_between_processes() -> None:
    """An error of cardcage's has its class and words, one of the system its number."""
    with pytest.raises(StateError, match="closed"):
        raise_error(pack_error(StateError("closed")))
    with pytest.raises(FileNotFoundError, match="/x"):
        raise_error(pack_error(FileNotFoundError(2, "No such file", "/x")))
