"""The everyday verbs, from one process to a machine in another, or in the same."""

from __future__ import annotations

import json
import threading
from io import BytesIO
from pathlib import Path

import pytest
from cardcage.errors import StateError, UsageError
from cardcage.machine import Machine
from cardcage_cli import main
from cardcage_fleet.control import command
from cardcage_fleet.session import FRAME, HEAD, Kind, converse
from cardcage_verbs.console import key
from cardcage_verbs.keep import KeptFile
from cardcage_verbs.listing import duration
from cardcage_verbs.machine import _writers
from cardcage_verbs.running import _Input
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from leftovers import Leftovers
from verbs_kit import Front, entry, front, machine

pytestmark = pytest.mark.usefixtures("runtime", "quick")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who went away is noticed soon."""
    monkeypatch.setattr("cardcage_verbs.machine.LOOK", 0.01)


def test_stop_presses_the_power_button_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """``stop`` ends a guest by its power button; one that does not obey in time, or would not hear, is ended hard."""
    with machine() as vm:
        vm.start()
        assert command(entry(), "stop", {}) == {"outcome": "the guest powered off"}
        assert front(vm).pressed == 1
    monkeypatch.setattr(Front, "obeys", False)
    with machine() as vm:
        vm.start()
        told = command(entry(), "stop", {"timeout": 0.01})
        assert told == {"outcome": "stopped by the host (the guest did not power off within 0.01 s)"}
    with machine(stop_timeout="10ms") as vm:
        vm.start()
        assert "within 0.01 s" in command(entry(), "stop", {})["outcome"]
    monkeypatch.setattr(Front, "hears", False)
    with machine() as vm:
        vm.start()
        assert "does not hear" in command(entry(), "stop", {"timeout": 60})["outcome"]
        assert front(vm).pressed == 0
    with machine():
        assert command(entry(), "stop", {})["outcome"] == "stopped by the host (asked for by the operator)"


def test_the_other_acts() -> None:
    """``pause``, ``resume``, ``shutdown`` and ``kill`` do what they say, or tell why not."""
    with machine() as vm:
        vm.start()
        assert command(entry(), "pause", {}) == {}
        assert vm.state == "paused"
        with pytest.raises(StateError, match="cannot pause: the machine is paused"):
            command(entry(), "pause", {})
        with pytest.raises(StateError, match="cannot shut down"):
            command(entry(), "shutdown", {})
        assert command(entry(), "resume", {}) == {}
        assert vm.state == "running"
        assert command(entry(), "shutdown", {}) == {}
        assert str(vm.wait(60)) == "the guest powered off"
    with machine() as vm:
        vm.start()
        assert command(entry(), "kill", {}) == {"outcome": "stopped by the host (killed by the operator)"}


@pytest.mark.parametrize(
    ("name", "arguments", "why"),
    [
        ("pause", {"a": 1}, 'no such argument: "a"; known: none'),
        ("stop", {"timeout": "x"}, "timeout: expected int or float"),
        ("stop", {"timeout": -1}, "timeout: expected 0 to"),
        ("stop", {"timeout": True}, "timeout: expected int or float"),
        ("console", {"write": 1}, "write: expected bool"),
        ("exec", {}, "command: expected a list of text"),
        ("exec", {"command": [1]}, "command: expected a list of text"),
        ("exec", {"command": ["a"], "env": {"a": 1}}, "env: expected a table of text"),
        ("exec", {"command": ["a"], "pty": [1]}, "pty: expected rows and columns"),
        ("exec", {"command": ["a"]}, "no card offers an agent"),
    ],
)
def test_wrong_arguments_are_refused(name: str, arguments: dict[str, object], why: str) -> None:
    """A command that a machine does not understand is an error in words, and changes nothing."""
    with machine() as vm:
        vm.start()
        with pytest.raises(UsageError, match=why):
            command(entry(), name, arguments)
        assert vm.state == "running"


def test_inspect_tells_all(capsys: pytest.CaptureFixture[str]) -> None:
    """``inspect`` prints a list of tables: state, accelerator, devices and configuration."""
    with machine() as vm:
        vm.start()
        assert main(["inspect", "vm"]) == 0
        (found,) = json.loads(capsys.readouterr().out)
        assert (found["name"], found["state"], found["accelerator"]["name"]) == ("vm", "running", "scripted")
        assert [one["id"] for one in found["devices"]] == ["front"]
        assert found["config"]["machine"]["memory"] == 2 << 20


def test_ps_lists_machines(capsys: pytest.CaptureFixture[str]) -> None:
    """``ps`` has a line for each machine, ``--json`` a list of tables, ``-q`` names; none is an empty list."""
    assert main(["ps", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == []
    with machine() as one, machine() as two:
        one.start()
        assert main(["ps"]) == 0
        head, *rows = capsys.readouterr().out.splitlines()
        assert head.split() == ["NAME", "PID", "STATE", "ACCEL", "CPUS", "MEMORY", "UP"]
        assert [row.split()[0] for row in rows] == ["vm", "vm-2"]
        assert main(["ps", "--json"]) == 0
        tables = json.loads(capsys.readouterr().out)
        assert [(row["name"], row["state"], row["cpus"], row["memory"]) for row in tables] == [
            ("vm", "running", 1, 2 << 20),
            ("vm-2", "built", 1, 2 << 20),
        ]
        assert main(["ps", "-q"]) == 0
        assert capsys.readouterr().out == "vm\nvm-2\n"
        assert two.name == "vm-2"


def test_verbs_take_several_machines(capsys: pytest.CaptureFixture[str]) -> None:
    """Of several machines each is done, what failed is told by name, and the status is 1; a wrong name changes none."""
    with machine() as one, machine() as two:
        two.start()
        assert main(["pause", "vm", "other"]) == 2
        assert two.state == "running"
        assert main(["pause", "vm", "vm-2"]) == 1
        assert "vm (pid" in (said := capsys.readouterr().err)
        assert "cannot pause: the machine is built" in said
        assert (one.state, two.state) == ("built", "paused")


def test_a_console_is_read_by_many_and_written_by_one() -> None:
    """Each reader gets what was written before, as much as it asks for, and all from then on; one of them types."""
    with machine() as vm:
        vm.start()
        vm.console.write(b"before")
        asked = {"history": 3}
        with converse(entry(), "console", asked) as one, converse(entry(), "console", {**asked, "write": True}) as two:
            for talk in (one, two):
                assert talk.receive() == (Kind.DATA, 0, b"ore")
            with pytest.raises(UsageError, match="somebody else types"), converse(entry(), "console", {"write": True}):
                pass
            vm.console.write(b"now")
            for talk in (one, two):
                assert talk.receive() == (Kind.DATA, 0, b"now")
            one.send(Kind.DATA, b"from a reader")
            two.send(Kind.RESIZE, bytes([24, 0, 80, 0]))
            two.send(Kind.DATA, b"typed")
            arrived(vm, b"typed")
            vm.stop()
            for talk in (one, two):
                assert talk.result(talk.receive()) == {"outcome": "stopped by the host"}
        assert (front(vm).typed, front(vm).size) == (b"typed", (80, 24))


def test_typing_reaches_the_guest() -> None:
    """What a writer types arrives in order, and its place is free once it has left."""
    with machine() as vm:
        vm.start()
        for text in (b"first ", b"second"):
            with converse(entry(), "console", {"write": True}) as talk:
                talk.send(Kind.DATA, text)
                arrived(vm, text)
            vm.console.write(b"x")  # wakes who looks whether the writer is there
            until_free(vm)
        assert front(vm).typed == b"first second"


def arrived(vm: Machine, text: bytes) -> None:
    """Wait for *text* by what the loop thread does after it."""
    device = front(vm)
    for _ in range(1000):
        done = threading.Event()
        device.slot.loop.call_soon(done.set)
        assert done.wait(60)
        if device.typed.endswith(text):
            return
    raise AssertionError(device.typed)


def until_free(vm: Machine) -> None:
    """Wait until nobody types on the console."""
    lock = _writers[vm]
    assert lock.acquire(timeout=60)
    lock.release()


def test_who_reads_nothing_stalls_nobody() -> None:
    """A reader that is stuck misses what is older than the last MiB and is told so; guest and others go on."""
    with machine() as vm:
        vm.start()
        with converse(entry(), "console", {}) as stuck, converse(entry(), "console", {}) as reader:
            wrote = 0
            for at in range(64):
                vm.console.write(bytes([65 + at % 26]) * 65536)
                wrote += 65536
                got = b""
                while len(got) < 65536:
                    frame = reader.receive()
                    assert frame is not None
                    got += frame.data
            text = b""
            while b"bytes of the console were not read in time]" not in text:
                assert len(text) < wrote, "nothing was missed"  # how much had left for it by then, nobody knows
                frame = stuck.receive()
                assert frame is not None
                text += frame.data
            vm.stop()


@given(data=st.binary(max_size=64) | st.binary(max_size=8).map(lambda end: HEAD.pack(1, 0, 0, FRAME + 1) + end))
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_no_frame_ends_a_session(data: bytes) -> None:
    """Whatever bytes a caller sends, its session ends in order, and the door stays open."""
    with machine() as vm:
        vm.start()
        with converse(entry(), "console", {"write": True}) as talk:
            talk._peer.sendall(data)
            talk._peer.shutdown(1)
            vm.console.write(b"x")
            while (frame := talk.receive()) is not None and frame.kind is Kind.DATA:
                pass
            assert frame is None or talk.result(frame) == {}
        assert command(entry(), "inspect", {})["state"] == "running"


def test_a_session_ends_with_its_machine() -> None:
    """Closing a machine ends its sessions, and leaves no thread."""
    left = Leftovers()
    vm = machine()
    vm.start()
    with converse(entry(), "console", {}) as talk:
        vm.close()
        frame = talk.receive()
        assert frame is not None
        assert talk.result(frame)["outcome"]
    assert left.threads() == []


def test_a_kept_file_is_bounded(tmp_path: Path) -> None:
    """Two files hold the last of what was written, each of its size and one write; descriptors follow."""
    path = tmp_path / "log"
    made = KeptFile(path, 8192)
    for at in range(100):
        made.write(b"%05d\n" % at * 100)
    kept = Path(f"{path}.1").read_bytes() + path.read_bytes()
    made.close()
    assert kept[-600:] == b"00099\n" * 100
    assert 8192 <= len(kept) <= 3 * 8192


def test_input_ends_once() -> None:
    """Behind the end of a command's input nothing is kept, however many ends and bytes a caller sends."""
    written = BytesIO()
    given = _Input(Never(), written)  # type: ignore[arg-type]  # as much of a session as is asked
    for data in (b"", b"late", *[b""] * 100):
        given.put(data)
    assert list(given._kept) == [b""]
    given.carry()
    assert written.closed


class Never:
    """A session that nothing is sent on."""


def test_keys_and_times_are_read() -> None:
    """The key that leaves is a control character, a character or none; times have two units at most."""
    assert [key(text) for text in ("^]", "^a", "x", "none")] == [b"\x1d", b"\x01", b"x", b""]
    assert [duration(one) for one in (0, 61, 7200, 90061)] == ["0s", "1m 1s", "2h", "1d 1h"]


def test_a_wrong_key_is_refused(runtime: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A key that is none is a wrong argument, whether or not the machine runs."""
    assert main(["console", "vm", "--detach-key", "ctrl-x"]) == 2
    assert 'outcome: bad configuration: --detach-key: expected a key such as "^]"' in capsys.readouterr().err
