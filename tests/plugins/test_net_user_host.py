"""User mode and its host: a host without a route, and ports that cannot be had."""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
from cardcage.errors import CardcageError, ConfigError, HostError
from cardcage_net.tap import Tap, TapNet
from cardcage_net.user import User, UserNet, check_ports, open_user
from net_lab import Cable, Namespace, Slot

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="namespaces and tap interfaces need root"),
    pytest.mark.skipif(shutil.which("passt") is None, reason="passt is not installed"),
]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as made:
        yield made


@pytest.fixture
def slot(stack: ExitStack) -> Slot:
    return stack.enter_context(closing(Slot()))


@pytest.fixture
def lonely(stack: ExitStack) -> Namespace:
    """A host with loopback alone."""
    return stack.enter_context(closing(Namespace()))


def server(where: tuple[str, int], kind: socket.SocketKind = socket.SOCK_STREAM) -> socket.socket:
    made = socket.socket(socket.AF_INET6 if ":" in where[0] else socket.AF_INET, kind)
    made.settimeout(30)
    made.bind(where)
    if kind == socket.SOCK_STREAM:
        made.listen()
    return made


def test_without_a_route_guest_and_host_reach_each_other(stack: ExitStack, slot: Slot, lonely: Namespace) -> None:
    """Without a default route the guest reaches the host by the gateway's address, and is reached by hostfwd."""
    user = lonely.run(lambda: open_user(slot, User(hostfwd=["tcp:127.0.0.1:2222-:22"])))
    inside = stack.enter_context(closing(Namespace()))
    tap = inside.run(lambda: TapNet(slot, Tap("eth0", vnet_header=False)))
    stack.enter_context(closing(Cable(slot, user, tap)))
    inside.shell("ip addr add 10.0.2.15/24 dev eth0", "ip route add default via 10.0.2.2")

    listening = stack.enter_context(lonely.run(lambda: server(("127.0.0.1", 8080))))
    client = stack.enter_context(inside.run(lambda: socket.create_connection(("10.0.2.2", 8080), 30)))
    served, _ = listening.accept()
    with served:
        client.sendall(b"up")
        assert served.recv(9) == b"up"
        served.sendall(b"down")
        assert client.recv(9) == b"down"

    shell = stack.enter_context(inside.run(lambda: server(("10.0.2.15", 22))))
    visitor = stack.enter_context(lonely.run(lambda: socket.create_connection(("127.0.0.1", 2222), 30)))
    visitor.sendall(b"hello")  # Debian 12's passt ends the handshake only with data
    accepted, _ = shell.accept()
    with accepted:
        assert accepted.recv(9) == b"hello"


@pytest.mark.parametrize(
    ("held", "kind", "hostfwd", "words"),
    [
        ("127.0.0.1", socket.SOCK_STREAM, "tcp:127.0.0.1:2222-:22", "TCP port 2222 of 127.0.0.1 is taken"),
        ("127.0.0.1", socket.SOCK_STREAM, "tcp::2222-:22", "TCP port 2222 of the host is taken"),
        ("::1", socket.SOCK_STREAM, "tcp::2222-:22", "TCP port 2222 of the host is taken"),
        ("::1", socket.SOCK_STREAM, "tcp:[::1]:2222-:22", "TCP port 2222 of ::1 is taken"),
        ("0.0.0.0", socket.SOCK_DGRAM, "udp:127.0.0.1:2222-:22", "UDP port 2222 of 127.0.0.1 is taken"),
    ],
)
def test_a_port_that_is_taken_is_said(
    lonely: Namespace, slot: Slot, held: str, kind: socket.SocketKind, hostfwd: str, words: str
) -> None:
    """The forward, the port and what is wrong with it are named, in our words."""
    with lonely.run(lambda: server((held, 2222), kind)), pytest.raises(HostError) as caught:
        lonely.run(lambda: UserNet(slot, User(hostfwd=["tcp::2223-:23", hostfwd])))
    assert str(caught.value) == f'net user: hostfwd "{hostfwd}": {words}: another program or machine has it'


def test_a_port_of_another_machine_is_taken(lonely: Namespace, slot: Slot) -> None:
    """Two machines with one forward: the second is told, and the first goes on."""
    options = User(hostfwd=["tcp::2222-:22"])
    with closing(lonely.run(lambda: UserNet(slot, options))) as first:
        with pytest.raises(HostError, match="another program or machine has it"):
            lonely.run(lambda: UserNet(slot, options))
        assert first._process is not None
        assert first._process.poll() is None
    lonely.run(lambda: UserNet(slot, options)).close()


@pytest.mark.parametrize(
    ("hostfwd", "kind", "words"),
    [
        (["tcp:198.51.100.1:2222-:22"], HostError, "198.51.100.1 is no address of this host"),
        (["tcp::2222-:22", "tcp:127.0.0.1:2222-:23"], ConfigError, "port 2222 of the host is led elsewhere already"),
        (
            ["tcp:127.0.0.1:2222-:23", "tcp:127.0.0.2:2222-:22"],
            ConfigError,
            "port 2222 of the host is led elsewhere already",
        ),
    ],
)
def test_what_cannot_be_forwarded_is_said(
    lonely: Namespace, hostfwd: list[str], kind: type[CardcageError], words: str
) -> None:
    """An address of another host, and one port for two guests' ports, are refused with the forward's text."""
    with pytest.raises(kind, match=words):
        lonely.run(lambda: check_ports(hostfwd))


def test_ports_that_do_not_meet_are_fine(lonely: Namespace, slot: Slot) -> None:
    """One number for TCP and UDP is no conflict."""
    hostfwd = ["tcp:127.0.0.1:2222-:22", "udp:127.0.0.1:2222-:22"]
    lonely.run(lambda: UserNet(slot, User(hostfwd=hostfwd))).close()
