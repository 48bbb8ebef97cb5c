"""Commands to running machines: who may give them, what a request may be, and what a machine answers."""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import cardcage_fleet
import pytest
from cardcage.errors import ConfigError, Denied, HostError, StateError, UsageError
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.security import Act
from cardcage_fleet import ControlOffer
from cardcage_fleet.control import CALLERS, Door, command, find
from cardcage_fleet.roster import MOST, connected
from leftovers import Leftovers
from scripted import Scripted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cardcage.registry import Registry
    from cardcage_fleet.roster import RosterEntry


class Card:
    """Offers commands, and refuses an act when told to."""

    def __init__(self) -> None:
        self.refused: tuple[str, ...] = ()
        self.asked: list[Act] = []
        self.inside, self.go = threading.Event(), threading.Event()

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.security("guard", lambda: self)
        registry.add(ControlOffer("echo", lambda vm, arguments: {"name": vm.name, "said": arguments}))
        registry.add(ControlOffer("wrong", self.wrong))
        registry.add(ControlOffer("wait", self.wait))
        registry.add(ControlOffer("break", lambda vm, arguments: 1 // 0))
        registry.add(ControlOffer("set", lambda vm, arguments: {1, 2}))

    def check(self, act: Act, /) -> None:
        self.asked.append(act)
        if act.permissions == self.refused:
            raise Denied(f"not {act.permissions[0]}")

    def wrong(self, vm: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
        raise {"state": StateError, "config": ConfigError}[arguments["kind"]]("a \x1b[1mreason")

    def wait(self, vm: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
        self.inside.set()
        assert self.go.wait(60)
        with vm.lock:
            return {}


@pytest.fixture
def card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Card:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    return Card()


@pytest.fixture
def make(card: Card) -> Iterator[Callable[..., Machine]]:
    """Makes machines that *card* watches, and closes them."""
    made: list[Machine] = []

    def build(name: str = "vm") -> Machine:
        host = Host([Scripted(), cardcage_fleet, card], installed=False)
        keys = {"platform": "none", "memory": "1M", "accel": "scripted", "name": name}
        made.append(Machine(host=host, machine=keys, fragments=[{"security": {"checkers": ["guard"]}}]))
        return made[-1]

    yield build
    card.refused = ()
    card.go.set()
    for one in made:
        one.close()


def door(entry: RosterEntry) -> Path:
    return Path(entry.file).with_suffix(".control")


def raw(entry: RosterEntry, data: bytes) -> Any:
    """What is answered to *data*."""
    with connected(door(entry), 30) as peer, peer.makefile("rb") as file:
        peer.sendall(data)
        return json.loads(file.readline())


def test_a_command_is_executed_and_answered(make: Any, card: Card) -> None:
    """Arguments arrive and the result comes back; reach and command are asked about first, and in this order."""
    make()
    entry = find("vm")
    card.asked.clear()
    assert command(entry, "echo", {"a": [1, None, "x"]}) == {"name": "vm", "said": {"a": [1, None, "x"]}}
    assert card.asked == [
        Act("operator", "vm", "management", ("reach",)),
        Act("operator", "echo", "management", ("command",)),
    ]


@pytest.mark.parametrize("refused", ["reach", "command"])
def test_a_refused_command_is_not_executed(refused: str, make: Any, card: Card) -> None:
    """Whoever may not reach the machine, or give the command, gets Denied, and nothing runs."""
    make()
    card.refused = (refused,)
    with pytest.raises(Denied, match=f"not {refused}"):
        command(find("vm"), "wait", {})
    assert not card.inside.is_set()


def test_errors_come_back_as_what_they_are(make: Any) -> None:
    """Errors of the command have their kind and one printable line; a card's own are told, and harm nothing."""
    vm = make()
    entry = find("vm")
    with pytest.raises(StateError, match=r"a \?\[1mreason"):
        command(entry, "wrong", {"kind": "state"})
    with pytest.raises(ConfigError, match="reason"):
        command(entry, "wrong", {"kind": "config"})
    with pytest.raises(ConfigError, match=r'no card offers control "ecko".* "echo"'):
        command(entry, "ecko", {})
    for name in ("break", "wrong", "set"):
        told = raw(entry, b'{"execute": "%s"}\n' % name.encode())["error"]
        assert told["class"] == "CardError"
        assert f'control "{name}" (card ' in told["desc"]
    assert vm.state == "built"
    assert command(entry, "echo", {})["name"] == "vm"


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"x",
        b"[]",
        b"{}",
        b"[" * 9000,
        b"\xff\0",
        b'{"execute": 1}',
        b'{"execute": "echo", "arguments": []}',
        b'{"execute": "echo", "id": 1}',
    ],
)
def test_what_is_no_request_is_an_error(line: bytes, make: Any) -> None:
    """Anything that is not a request is answered with one error, and the door stays open."""
    make()
    entry = find("vm")
    assert raw(entry, line + b"\n")["error"]["class"] == "UsageError"
    assert command(entry, "echo", {})["name"] == "vm"


def test_a_line_that_is_too_long_is_hung_up_on(make: Any) -> None:
    """A caller that never ends its line gets no answer."""
    make()
    with connected(door(find("vm")), 30) as peer:
        peer.sendall(b" " * (MOST + 4096))
        peer.shutdown(socket.SHUT_WR)
        with pytest.raises((ConnectionResetError, AssertionError)):
            assert peer.recv(1) != b""


def test_the_machine_goes_on_while_a_command_runs(make: Any, card: Card) -> None:
    """A command holds up neither the loop thread nor other commands; more callers than CALLERS are hung up on."""
    vm = make()
    entry = find("vm")
    with connected(door(entry), 60) as slow:
        slow.sendall(b'{"execute": "wait"}\n')
        assert card.inside.wait(60)
        assert command(entry, "echo", {})["name"] == "vm"
        ran = threading.Event()
        vm.loop.call_soon(ran.set)
        assert ran.wait(60)
        idle = [connected(door(entry), 60) for _ in range(CALLERS - 1)]
        with connected(door(entry), 60) as late:
            assert late.recv(1) == b""
        for one in idle:
            one.close()
        card.go.set()
        assert json.loads(slow.recv(100)) == {"return": {}}


def test_closing_waits_for_commands(make: Any, card: Card) -> None:
    """close() hangs up on who has said nothing, lets a command that runs end, and leaves no file and no thread."""
    left = Leftovers()
    vm = make()
    entry = find("vm")
    with connected(door(entry), 60) as idle, connected(door(entry), 60) as busy:
        busy.sendall(b'{"execute": "wait"}\n')
        assert card.inside.wait(60)
        closing = threading.Thread(target=vm.close)
        closing.start()
        assert idle.recv(1) == b""
        assert closing.is_alive()
        card.go.set()
        closing.join()
    assert not door(entry).exists()
    assert left.threads() == []
    with pytest.raises(HostError, match=r"machine vm \(pid \d+\) takes no command"):
        command(entry, "echo", {})


def test_the_socket_is_private(make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only this user can connect: mode 0600 in a directory of mode 0700, and another's process is hung up on."""
    make()
    path = door(find("vm"))
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    monkeypatch.setattr("cardcage_fleet.control.is_ours", lambda peer: False)
    with connected(path, 30) as peer:
        assert peer.recv(1) == b""


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")
def test_the_kernel_says_who_calls(tmp_path: Path) -> None:
    """A caller of another user's is told from one of ours by what the kernel says of it."""
    from cardcage_fleet.roster import is_ours
    from cardcage_jail import listen_at

    with listen_at(str(tmp_path / "s")) as listener:
        os.chmod(tmp_path / "s", 0o666)
        found = []
        for user in (0, 65534):
            pid = os.fork()
            if not pid:
                folder = os.open(tmp_path, os.O_PATH)
                if user:
                    os.fchown(os.open(tmp_path, os.O_RDONLY), user, -1)
                os.setuid(user)
                peer = socket.socket(socket.AF_UNIX)
                peer.connect(f"/proc/self/fd/{folder}/s")
                os._exit(0)
            os.waitpid(pid, 0)
            with listener.accept()[0] as caller:
                found.append(is_ours(caller))
    assert found == [True, False]


def test_machines_are_found_by_name_pid_or_number(make: Any) -> None:
    """A name or pid that several have is refused with their numbers; one that none has with near names."""
    make("one")
    make("two")
    assert find("one").name == "one"
    number = Path(find("two").file).stem
    assert find(number).name == "two"
    with pytest.raises(UsageError, match=rf'2 machines run as "{os.getpid()}": .*{number}'):
        find(str(os.getpid()))
    with pytest.raises(UsageError, match=r'no machine "tow" of this user runs.* "two"'):
        find("tow")


def test_without_commands_there_is_no_door(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose cards offer no command opens no socket."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    opened: list[Any] = []
    monkeypatch.setattr(Door, "__init__", lambda *given: opened.append(given))
    keys = {"platform": "none", "memory": "1M", "accel": "scripted", "name": "vm"}
    with Machine(host=Host([Scripted(), cardcage_fleet], installed=False), machine=keys):
        assert opened == []
        with pytest.raises(HostError, match="takes no command: No such file"):
            command(find("vm"), "echo", {})
