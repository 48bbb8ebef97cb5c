"""QEMU's monitor protocol: what a request may be, what is answered, who may ask, and what no peer can do."""

from __future__ import annotations

import array
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from cardcage.errors import ConfigError, Denied
from cardcage.hookspecs import hookimpl
from cardcage.machine import Machine
from cardcage.registry import Registry
from cardcage.security import Act
from cardcage_qmp import HmpCommand, QmpCommand, QmpEvent, Session, control_of
from cardcage_qmp.server import BACKLOG, EVENTS, PEERS, parse_qmp
from qmp_kit import Client, machines


class Card:
    """Offers commands, some of them broken, and refuses an act when told to."""

    def __init__(self) -> None:
        self.refused: tuple[str, ...] = ()
        self.asked: list[Act] = []

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.security("guard", lambda: self)
        registry.add(QmpCommand("echo", echo))
        registry.add(QmpCommand("break", broken))
        registry.add(QmpCommand("either", either))
        registry.add(QmpCommand("unheard-of", untyped))
        registry.add(HmpCommand("break", lambda session, words: broken(session), help="break [WHAT]"))
        registry.add(HmpCommand("info words", lambda session, words: f"{words}\n"))
        registry.add(QmpEvent("NOTHING"))

    def check(self, act: Act, /) -> None:
        self.asked.append(act)
        if act.permissions == self.refused:
            raise Denied(f"not {act.permissions[0]}")


def echo(session: Session, text: str, times: int = 1) -> list[str]:
    return [text] * times


def broken(session: Session) -> None:
    raise ZeroDivisionError("a card's mistake")


def either(session: Session, what: int | str) -> int | str:
    return what


def untyped(session: Session, what: bytes) -> None: ...


@pytest.fixture
def card() -> Card:
    return Card()


@pytest.fixture
def make(tmp_path: Path, card: Card) -> Iterator[Callable[..., Machine]]:
    yield from machines(tmp_path, card, checkers=("guard",))


def test_a_conversation(make: Callable[..., Machine], tmp_path: Path) -> None:
    """A peer is greeted, negotiates, and has its id back, whatever it is; commands before that are not found."""
    make()
    with Client(tmp_path / "qmp", ready=False) as peer:
        assert peer.greeting["QMP"]["version"]["qemu"] == {"major": 7, "minor": 2, "micro": 0}
        assert peer.ask("query-status")["error"]["class"] == "CommandNotFound"
        peer.send(b'{"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}}')
        assert "not available" in peer.answer()["error"]["desc"]
        assert peer.ask("qmp_capabilities") == {"return": {}}
        assert peer.ask("qmp_capabilities")["error"]["class"] == "CommandNotFound"
        peer.send(b'{"execute": "query-name", "id": {"a": [1, null]}}')
        assert peer.answer() == {"return": {"name": "vm"}, "id": {"a": [1, None]}}
        peer.send(b"{'execute': 'query-name'}\n\n{\"execute\":\n\"query-target\"}")
        peer.send(b"{'execute':'query-iothreads','id':'it\\'s \"4\"'}")
        assert [peer.answer() for _ in range(3)] == [
            {"return": {"name": "vm"}},
            {"return": {"arch": "x86_64"}},
            {"return": [], "id": 'it\'s "4"'},
        ]


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        ("[]", "QMP input must be a JSON object"),
        ("{}", "QMP input lacks member 'execute'"),
        ('{"execute": 1}', "QMP input member 'execute' must be a string"),
        ('{"execute": "echo", "arguments": []}', "QMP input member 'arguments' must be an object"),
        ('{"execute": "echo", "more": 1}', "QMP input member 'more' is unexpected"),
        ('{"execute": "echo"}', "Parameter 'text' is missing"),
        ('{"execute": "echo", "arguments": {"text": 1}}', "Invalid parameter type for 'text', expected: string"),
        ('{"execute": "echo", "arguments": {"text": "", "times": true}}', "expected: integer"),
        ('{"execute": "echo", "arguments": {"text": "", "times": 1e99}}', "expected: integer"),
        ('{"execute": "echo", "arguments": {"text": "", "t": 1}}', "Parameter 't' is unexpected"),
        ('{"execute": "either", "arguments": {"what": []}}', "expected: int | str"),
        ('{"execute": "break"}', "a card's mistake"),
        ('{"execute": "x", "execute": "y"}', "duplicate key"),
        ('{"execute": NaN}', "JSON parse error"),
        ("garbage\n", "JSON parse error"),
        ("{,}", "JSON parse error"),
        ('{"\\ud800": 1}', "is unexpected"),
    ],
)
def test_what_is_wrong_is_said(make: Callable[..., Machine], tmp_path: Path, request_: str, error: str) -> None:
    """Each wrong request has one answer that says what was expected, and the conversation goes on."""
    make()
    with Client(tmp_path / "qmp") as peer:
        peer.send(request_.encode())
        assert error in peer.answer()["error"]["desc"]
        assert peer.ask("echo", text="a", times=2) == {"return": ["a", "a"]}


def test_the_schema_is_what_is_there(make: Callable[..., Machine], tmp_path: Path) -> None:
    """query-qmp-schema has each command of query-commands, with arguments and types that resolve; what has no schema
    is no command."""
    make()
    with Client(tmp_path / "qmp") as peer:
        commands = {one["name"] for one in peer.ask("query-commands")["return"]} - {"qmp_capabilities"}
        schema = {one["name"]: one for one in peer.ask("query-qmp-schema")["return"]}
    assert commands == {name for name, one in schema.items() if one["meta-type"] == "command"}
    assert "unheard-of" not in commands
    members = {one["name"]: one for one in schema[schema["echo"]["arg-type"]]["members"]}
    assert members == {
        "text": {"name": "text", "type": "str"},
        "times": {"name": "times", "type": "int", "default": None},
    }
    assert schema["echo"]["ret-type"] == "[str]"
    assert schema["SHUTDOWN"]["meta-type"] == "event"
    used = {one[key] for one in schema.values() for key in ("arg-type", "ret-type", "element-type") if key in one}
    used |= {inner["type"] for one in schema.values() if one["meta-type"] != "enum" for inner in one.get("members", [])}
    assert used <= schema.keys()


def test_life_by_commands(make: Callable[..., Machine], tmp_path: Path) -> None:
    """stop, cont, system_reset and quit do what they say, each with its event and reason, in that order."""
    machine = make().start()
    with Client(tmp_path / "qmp") as peer:
        assert peer.ask("query-status")["return"] == {"running": True, "singlestep": False, "status": "running"}
        assert peer.ask("stop") == peer.ask("stop") == {"return": {}}
        assert peer.ask("query-status")["return"]["status"] == "paused"
        assert peer.ask("cont") == peer.ask("cont") == {"return": {}}
        assert peer.ask("system_reset") == {"return": {}}
        assert [one["event"] for one in peer.events] == ["STOP", "RESUME", "RESET"]
        assert peer.events[-1]["data"] == {"guest": False, "reason": "host-qmp-system-reset"}
        assert peer.events[0]["timestamp"].keys() == {"seconds", "microseconds"}
        assert "power button" in peer.ask("system_powerdown")["error"]["desc"]
        assert peer.ask("quit") == {"return": {}}
        assert peer.event("SHUTDOWN")["data"] == {"guest": False, "reason": "host-qmp-quit"}
        assert str(machine.wait()) == "stopped by the host (quit)"
        assert peer.ask("query-status")["return"]["status"] == "shutdown"
        assert "stopped by the host" in peer.ask("cont")["error"]["desc"]


def test_the_guests_own_end(make: Callable[..., Machine], tmp_path: Path) -> None:
    """A guest's panic and power-off are told with their reasons, before the socket is closed."""
    ended = {"off": ("guest-shutdown", None), "panic": ("guest-panic", "GUEST_PANICKED")}
    for act, (reason, first) in ended.items():
        machine = make().start()
        with Client(tmp_path / "qmp") as peer:
            power = machine.devices["qmp"].slot.power
            power.off() if act == "off" else power.panic("why")
            machine.wait()
            machine.close()
            if first:
                assert peer.event(first)["data"] == {"action": "poweroff"}
            assert peer.event("SHUTDOWN")["data"] == {"guest": True, "reason": reason}
            assert peer.line() is None
    assert not (tmp_path / "qmp").exists()


def test_what_is_told_of_the_machine(make: Callable[..., Machine], tmp_path: Path) -> None:
    """Name, memory, processors and objects are the machine's; what there is none of is an empty list, or an error of
    QEMU's class."""
    make().start()
    with Client(tmp_path / "qmp") as peer:
        assert peer.ask("query-memory-size-summary")["return"]["base-memory"] == 2 << 20
        (cpu,) = peer.ask("query-cpus-fast")["return"]
        assert Path(f"/proc/self/task/{cpu['thread-id']}").exists()
        assert {one["name"] for one in peer.ask("qom-list", path="/machine/peripheral")["return"]} == {"type", "qmp"}
        assert peer.ask("qom-get", path="/machine/peripheral/qmp", property="type") == {"return": "qmp"}
        assert peer.ask("qom-get", path="/nowhere", property="type")["error"]["class"] == "DeviceNotFound"
        assert peer.ask("query-balloon")["error"]["class"] == "DeviceNotActive"
        assert peer.ask("device-list-properties", typename="nothing")["error"]["class"] == "DeviceNotFound"
        names = {one["name"] for one in peer.ask("qom-list-types", implements="device")["return"]}
        for name in names:
            assert isinstance(peer.ask("device-list-properties", typename=name)["return"], list)
        assert peer.ask("query-block") == peer.ask("query-iothreads") == {"return": []}
        assert peer.ask("query-kvm")["return"]["enabled"] is False
        assert peer.ask("screendump")["error"]["class"] == "CommandNotFound"
        assert peer.ask("set-action", shutdown="pause", reboot="reset") == {"return": {}}
        assert "as long as this machine lives" in peer.ask("set-action", reboot="shutdown")["error"]["desc"]


def test_the_human_monitor(make: Callable[..., Machine], tmp_path: Path) -> None:
    """human-monitor-command and a socket in readline mode carry out lines; what is no command is said."""
    make({"type": "qmp", "socket": f"unix:{tmp_path}/hmp", "mode": "readline"}).start()
    with Client(tmp_path / "qmp") as peer:

        def line(text: str) -> str:
            found = peer.ask("human-monitor-command", command_line=text)["return"]
            assert isinstance(found, str)
            return found

        assert line("info status") == "VM status: running\r\n"
        assert "RAX=0000" in line("info registers")
        assert line("nmi") == line("") == ""
        assert line("sendkey ctrl-alt-delete") == "unknown command: 'sendkey'\r\n"
        assert line("info tlb").startswith("unknown command: 'info tlb'")
        assert line("balloon 1").startswith("Error: No balloon")
        assert line("'") == "Error: No closing quotation\r\n"
        assert line("stop") == ""
        assert "info status" in line("help")
        with socket.socket(socket.AF_UNIX) as typed:
            typed.connect(f"{tmp_path}/hmp")
            typed.sendall(b"info status\r\ninfo name\n")
            typed.shutdown(socket.SHUT_WR)
            said = b"".join(iter(lambda: typed.recv(4096), b"")).decode()
    prompt = "(qemu) "
    assert said.endswith(f"{prompt}VM status: paused\r\n{prompt}vm\r\n{prompt}")


def test_memory_is_saved(make: Callable[..., Machine], tmp_path: Path) -> None:
    """pmemsave and memsave write what guest memory holds, and nothing of what lies outside of it."""
    machine = make().start()
    machine.memory.write(0x1FFE, b"over a page")
    no = f"{tmp_path}/n"
    with Client(tmp_path / "qmp") as peer:
        assert peer.ask("pmemsave", val=0x1FFE, size=11, filename=f"{tmp_path}/m") == {"return": {}}
        assert (tmp_path / "m").read_bytes() == b"over a page"
        machine.memory.write((2 << 20) - 4096, b"last")
        assert peer.ask("pmemsave", val=1, size=(2 << 20) - 1, filename=f"{tmp_path}/m") == {"return": {}}
        assert (tmp_path / "m").read_bytes() == machine.memory.read(1, (2 << 20) - 1)
        assert "Invalid addr 0x200000" in peer.ask("pmemsave", val=(2 << 20) - 1, size=2, filename=no)["error"]["desc"]
        assert "at most the machine's memory" in peer.ask("pmemsave", val=0, size=1 << 62, filename=no)["error"]["desc"]
        assert "stop it first" in peer.ask("memsave", val=0, size=1, filename=no)["error"]["desc"]
        peer.ask("stop")
        assert peer.ask("memsave", val=0x1FFE, size=4, filename=f"{tmp_path}/m") == {"return": {}}
        assert (tmp_path / "m").read_bytes() == b"over"
        assert not (tmp_path / "n").exists()
        assert "No such file" in peer.ask("memsave", val=0, size=1, filename=f"{tmp_path}/no/m")["error"]["desc"]


def test_descriptors_come_along(make: Callable[..., Machine], tmp_path: Path) -> None:
    """A descriptor sent along is kept by name or in a set, closed on demand, and with its peer; none is left behind."""
    make()
    before = len(os.listdir("/proc/self/fd"))
    with Client(tmp_path / "qmp") as peer:
        (tmp_path / "f").write_text("")

        def send(text: bytes, count: int = 1) -> Any:
            fds = [os.open(tmp_path / "f", os.O_RDONLY) for _ in range(count)]
            peer.socket.sendmsg([text], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])
            for one in fds:
                os.close(one)
            return peer.answer()

        named = b'{"execute": "getfd", "arguments": {"fdname": "%s"}}'
        assert send(named % b"one") == send(named % b"one") == {"return": {}}
        assert "not starting with a digit" in send(named % b"1")["error"]["desc"]
        assert "No file descriptor" in peer.ask("getfd", fdname="two")["error"]["desc"]
        assert peer.ask("closefd", fdname="one") == {"return": {}}
        assert "not found" in peer.ask("closefd", fdname="one")["error"]["desc"]
        assert send(b'{"execute": "add-fd", "arguments": {"opaque": "rw"}}')["return"]["fdset-id"] == 0
        (one,) = peer.ask("query-fdsets")["return"]
        assert one["fds"][0]["opaque"] == "rw"
        assert peer.ask("remove-fd", fdset_id=0) == {"return": {}}
        assert peer.ask("query-fdsets") == {"return": []}
        for _ in range(20):
            assert send(b'{"execute": "query-name"}', 10)["return"]
        send(named % b"kept")
        assert len(os.listdir("/proc/self/fd")) < before + 100


def test_who_may_ask(make: Callable[..., Machine], tmp_path: Path, card: Card) -> None:
    """The checkers are asked before a command runs: by its machine, and by its name; what they refuse is not done."""
    machine = make().start()
    with Client(tmp_path / "qmp") as peer:
        card.asked.clear()
        peer.ask("query-name")
        asked = [(one.source, one.target, one.tclass, one.permissions) for one in card.asked]
        assert asked == [
            ("operator", "vm", "management", ("reach",)),
            ("operator", "query-name", "management", ("command",)),
        ]
        for refused in ("reach", "command", "pause"):
            card.refused = (refused,)
            assert peer.ask("stop")["error"] == {"class": "GenericError", "desc": f"not {refused}"}
        assert machine.state == "running"


def test_a_peer_that_reads_nothing(make: Callable[..., Machine], tmp_path: Path) -> None:
    """A peer that leaves answers and events unread is no longer listened to, then hung up on; others, and the machine,
    go on, and memory does not grow."""
    machine = make().start()
    with Client(tmp_path / "qmp") as lazy, Client(tmp_path / "qmp") as other:
        lazy.socket.setblocking(False)
        asked = b'{"execute": "echo", "arguments": {"text": "%s", "times": 100}}' % (b"x" * 100)
        sent = 0
        with suppress(BlockingIOError):
            while sent < 1 << 26:
                sent += lazy.socket.send(asked)
        assert sent < 1 << 26
        assert other.ask("query-name")["return"]
        assert machine.state == "running"
        control = control_of(machine)
        while (held := max(len(one._out) for one in control.peers)) < BACKLOG:
            other.ask("query-name")
        assert held < BACKLOG + (1 << 20)
        for _ in range(EVENTS + 1):
            control.emit("NOTHING")
            other.event("NOTHING")
        while len(control.peers) > 1:
            other.ask("query-name")
    machine.close()


def test_peers_wait_for_their_turn(make: Callable[..., Machine], tmp_path: Path) -> None:
    """More peers than there is room for wait, and are served when others have gone."""
    make()
    peers = [Client(tmp_path / "qmp") for _ in range(PEERS)]
    late = socket.socket(socket.AF_UNIX)
    late.connect(f"{tmp_path}/qmp")
    peers.pop().close()
    late.settimeout(60)
    assert b"QMP" in late.recv(4096)
    late.close()
    for one in peers:
        assert one.ask("query-name")["return"]
        one.close()


def test_a_socket_that_connects_and_one_that_is_waited_for(make: Callable[..., Machine], tmp_path: Path) -> None:
    """With ``server = false`` the machine connects; with ``wait`` it starts only once a peer came."""
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"{tmp_path}/tool")
        listening.listen()
        machine = make({"type": "qmp", "socket": f"unix:{tmp_path}/tool", "server": False}, wait=True)
        peer, _ = listening.accept()
        with peer:
            assert b"QMP" in peer.recv(4096)
        starter = threading.Thread(target=machine.start)
        starter.start()
        assert machine.state == "built"
        with Client(tmp_path / "qmp"):
            starter.join()
            assert machine.state == "running"


@pytest.mark.parametrize(
    ("socket_", "error"),
    [
        ("unix:", "expected unix:PATH"),
        ("file", "expected unix:PATH"),
        ("stdio:x", "expected unix:PATH"),
        ("tcp:localhost", "expected tcp:HOST:PORT"),
        ("tcp:localhost:²", "expected tcp:HOST:PORT"),
        ("tcp:localhost:65536", "expected tcp:HOST:PORT"),
        ("fd:99999", "Bad file descriptor"),
        ("fd:x", "expected fd:N"),
        ("fd:³", "expected fd:N"),
        ("fd:" + "9" * 5000, "expected fd:N"),
        ("unix:/no/such/folder/q", "No such file"),
        ("unix:{}/file", "exists and is not a socket"),
        ("unix:" + "x" * 200, "too long"),
    ],
)
def test_sockets_that_cannot_be(make: Callable[..., Machine], tmp_path: Path, socket_: str, error: str) -> None:
    """What no socket can be made of is an error of the configuration that names its key."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=error) as caught:
        make({"type": "qmp", "socket": socket_.format(tmp_path), "id": "second"})
    assert caught.value.key == "socket"


def test_descriptors_of_sockets(make: Callable[..., Machine]) -> None:
    """A socket that is handed over listens, or is connected, as its options say; else it stays its owner's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with pytest.raises(ConfigError, match="that listens"):
            make({"type": "qmp", "socket": f"fd:{theirs.fileno()}", "id": "second"})
        make({"type": "qmp", "socket": f"fd:{theirs.detach()}", "server": False, "id": "second"})
        assert b"QMP" in ours.recv(4096)


def test_descriptors_in_sets_end_with_the_machine(make: Callable[..., Machine], tmp_path: Path) -> None:
    """A descriptor that a peer left in a set is closed once its machine is."""
    machine = make()
    ours, theirs = socket.socketpair()
    with ours, Client(tmp_path / "qmp") as peer:
        socket.send_fds(peer.socket, [b'{"execute": "add-fd"}'], [theirs.fileno()])
        theirs.close()
        assert "return" in peer.answer()
        machine.close()
        assert ours.recv(1) == b""


def test_the_flag() -> None:
    """``--qmp`` takes QEMU's words."""
    flags = {
        "unix:/q": {},
        "unix:/q,server=on,wait=off": {"server": True, "wait": False},
        "unix:/a,,b,server,nowait": {"socket": "unix:/a,b", "server": True, "wait": False},
        "tcp:127.0.0.1:4444,server=off,pretty=on": {"server": False, "pretty": True},
    }
    for text, more in flags.items():
        (device,) = parse_qmp(text)["device"]
        assert device == {"type": "qmp", "socket": text.split(",")[0], **more}
    for text in ("", "unix:/q,colour=red", "unix:/q,server=perhaps"):
        with pytest.raises(ValueError, match=r".+"):
            parse_qmp(text)


def test_lines_of_other_cards(make: Callable[..., Machine], card: Card, tmp_path: Path) -> None:
    """A card's line of the human monitor has its words, is in the help, is asked for, and what breaks in it is told."""
    make()

    def line(text: str) -> str:
        return str(peer.ask("human-monitor-command", command_line=text)["return"])

    with Client(tmp_path / "qmp") as peer:
        assert line("info words 'a b' c") == "['a b', 'c']\r\n"
        assert "break [WHAT]\r\n" in line("help")
        assert "a card's mistake" in line("break")
        card.refused = ("command",)
        assert peer.ask("human-monitor-command", command_line="info words")["error"]["desc"].startswith("not command")
    assert "info words" in [one.facts.get("name") for one in card.asked]
