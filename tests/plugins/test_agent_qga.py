"""QEMU's guest agent: Debian's own as a process of this host, and guests that send anything."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from subprocess import CalledProcessError, TimeoutExpired
from typing import Any

import pytest
from agent_kit import Slot
from cardcage.errors import StateError, UsageError
from cardcage.machine import State
from cardcage.security import Mediator
from cardcage_agent import AgentError, AgentTimeout, NoAgent, ProtocolError
from cardcage_agent.qga import LINES_MAX, PIECE, Qga, QgaLink
from hypothesis import given
from hypothesis import strategies as st


class QgaMachine:
    """A machine without anything but the link."""

    name = label = "vm"
    state = State.RUNNING

    def __init__(self, slot: Slot) -> None:
        self.link = QgaLink(slot)  # type: ignore[arg-type]  # as much of one as it uses
        self.services: dict[str, Any] = {"qga": self.link}
        self.mediator = Mediator()
        self.qga = Qga(self)


@pytest.fixture(scope="module")
def vm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[QgaMachine]:
    """Debian's agent, on a socket in place of its port. It is asked for nothing that changes the host."""
    program = shutil.which("qemu-ga", path="/usr/sbin:/usr/bin")
    if program is None:
        pytest.skip("needs qemu-guest-agent")
    folder = tmp_path_factory.mktemp("qga")
    with socket.socket(socket.AF_UNIX) as peer:
        words = [program, "-m", "unix-listen", "-p", str(folder / "port"), "-t", str(folder), "-f", str(folder / "pid")]
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(words, stdin=quiet, stdout=quiet, stderr=quiet)
        try:
            while True:
                assert process.poll() is None
                with suppress(OSError):
                    peer.connect(str(folder / "port"))
                    break
            made = QgaMachine(Slot())
            made.link.start(peer.sendall)

            def read() -> None:
                while data := peer.recv(4096):
                    made.link.write(data)

            reader = threading.Thread(target=read, daemon=True)
            reader.start()
            yield made
        finally:
            process.kill()
            process.wait()
        reader.join()


def test_debians_agent_answers(vm: QgaMachine) -> None:
    """It says what it is; what it refuses comes in its own words, and it goes on."""
    assert vm.qga.ping() > 0
    assert "guest-exec" in [one["name"] for one in vm.qga.info()["supported_commands"]]
    assert "id" in vm.qga.execute("guest-get-osinfo")
    with pytest.raises(AgentError, match=r"vm: guest-nonesuch: .*guest-nonesuch has not been found"):
        vm.qga.execute("guest-nonesuch")
    assert vm.qga.ping() > 0


def test_programs_run_by_it(vm: QgaMachine) -> None:
    """Output, errors, input, status and signal, as subprocess has them."""
    done = vm.qga.run(["/bin/sh", "-c", "cat; echo err >&2; exit 3"], input=b"any\0bytes")
    assert (done.stdout, done.stderr, done.returncode) == (b"any\0bytes", b"err\n", 3)
    assert vm.qga.run(["/bin/sh", "-c", "kill -9 $$"]).returncode == -9
    assert vm.qga.run(["/bin/sh", "-c", "echo $A"], env={"A": "b"}).stdout == b"b\n"
    with pytest.raises(CalledProcessError):
        vm.qga.run(["/bin/false"], check=True)
    with pytest.raises(TimeoutExpired):
        vm.qga.run(["/bin/sleep", "2"], timeout=0.05)
    with pytest.raises(AgentError, match="nonesuch"):
        vm.qga.run(["/nonesuch"])
    with pytest.raises(UsageError, match="seconds since 1970"):
        vm.qga.set_time(-1)
    with pytest.raises(UsageError, match="expected a list"):
        vm.qga.run("text")
    with pytest.raises(AgentError, match="a request of"):
        vm.qga.run(["/bin/cat"], input=bytes(4 * PIECE))


def test_files_by_it(vm: QgaMachine, tmp_path: Path) -> None:
    """Beyond one piece, appended to, bounded, and with an error that names the command."""
    data = bytes(range(256)) * (3 * PIECE // 256) + b"tail"
    vm.qga.write(str(tmp_path / "file"), data)
    vm.qga.write(str(tmp_path / "file"), b"more", append=True)
    assert (tmp_path / "file").read_bytes() == data + b"more"
    assert vm.qga.read(str(tmp_path / "file")) == data + b"more"
    with pytest.raises(AgentError, match="more than 10 bytes"):
        vm.qga.read(str(tmp_path / "file"), limit=10)
    with pytest.raises(AgentError, match="guest-file-open"):
        vm.qga.read(str(tmp_path / "none"))


class Played:
    """A guest that the test plays: it answers each request by a function."""

    def __init__(self, answer: Any) -> None:
        self.vm = QgaMachine(Slot())
        self.asked: list[dict[str, Any]] = []

        def received(data: bytes) -> None:
            request = json.loads(data.lstrip(b"\xff"))
            self.asked.append(request)
            for piece in answer(request):
                self.vm.link.write(piece)

        self.vm.link.start(received)


def synchronized(request: dict[str, Any]) -> list[bytes]:
    """The answer to a synchronization."""
    return [b"\xff" + json.dumps({"return": request["arguments"]["id"]}).encode() + b"\n"]


def is_sync(request: dict[str, Any]) -> bool:
    return bool(request["execute"] == "guest-sync-delimited")


def test_what_was_left_over_is_no_answer() -> None:
    """Lines from before the synchronization, and its answer to somebody else, are passed over."""

    def answer(request: dict[str, Any]) -> list[bytes]:
        if not is_sync(request):
            return [b'{"return"', b': "new"}\n']
        return [b'{"return": "old"}\n{"ret', *synchronized({"arguments": {"id": 1}}), *synchronized(request)]

    guest = Played(answer)
    assert guest.vm.qga.execute("guest-x") == "new"
    assert guest.vm.qga.execute("guest-x") == "new"
    assert [one["execute"] for one in guest.asked] == ["guest-sync-delimited", "guest-x", "guest-x"]


def test_silence_has_its_bound() -> None:
    """A guest without the agent is NoAgent; one that stops answering AgentTimeout, and is synchronized with again."""
    silent = Played(lambda request: [])
    with pytest.raises(NoAgent, match=r"no qemu-guest-agent has answered within 0\.05 s"):
        silent.vm.qga.ping(timeout=0.05)
    guest = Played(lambda request: synchronized(request) if is_sync(request) else [])
    for _ in range(2):
        with pytest.raises(AgentTimeout, match=r"guest-ping: no answer within 0\.5 s"):
            guest.vm.qga.ping(timeout=0.5)
    assert [one["execute"] for one in guest.asked] == ["guest-sync-delimited", "guest-ping"] * 2


def test_a_machine_without_a_port_says_how_it_gets_one() -> None:
    """StateError, with the device."""
    machine = QgaMachine(Slot())
    machine.services.clear()
    with pytest.raises(StateError, match=r'named "org.qemu.guest_agent.0" with char = "qemu-agent"'):
        machine.qga.ping()


def test_a_guest_cannot_make_it_grow() -> None:
    """Neither by a line without an end, nor by lines without end; what nobody asked for is not kept at all."""
    unasked = QgaMachine(Slot())
    unasked.link.write(bytes(1 << 20))
    assert not unasked.link._kept
    for pieces in ([b"x" * (1 << 20)] * 17, [b"x\n" * (LINES_MAX + 1)]):
        guest = Played(lambda request, pieces=pieces: pieces)
        with pytest.raises(ProtocolError, match="more than the answer to one request"):
            guest.vm.qga.ping(timeout=30)
        assert not guest.vm.link._kept
        assert not guest.vm.link._lines


KEYS = ["return", "error", "desc", "pid", "exited", "out-data", "buf-b64", "eof", "exitcode", "signal"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=8,
)
ANSWERS = st.dictionaries(st.just("return"), VALUES).map(lambda value: json.dumps(value).encode() + b"\n")


@given(st.lists(ANSWERS | st.binary(max_size=40), max_size=6))
def test_whatever_a_guest_answers_is_an_error_of_ours(pieces: list[bytes]) -> None:
    """Any answer is taken, or refused by an AgentError."""
    guest = Played(lambda request: synchronized(request) if is_sync(request) else pieces)
    for act in (
        lambda: guest.vm.qga.run(["/bin/true"], timeout=0.001),
        lambda: guest.vm.qga.read("/x", limit=1000, timeout=0.001),
        lambda: guest.vm.qga.write("/x", b"x", timeout=0.001),
        lambda: guest.vm.qga.freeze(timeout=0.001),
        lambda: guest.vm.qga.info(timeout=0.001),
    ):
        with suppress(AgentError, TimeoutExpired):
            act()
