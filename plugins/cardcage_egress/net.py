"""The back end ``net:egress``: what the guest sends is taken apart here, and the gate is asked for connections."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
from contextlib import suppress
from importlib.util import find_spec
from ipaddress import IPv4Address
from typing import TYPE_CHECKING, Any

from attrs import field, frozen
from cardcage.backends import NetFeatures
from cardcage.config import HostPath
from cardcage.errors import ConfigError, HostError
from cardcage.pairs import parse_repeated, typed_pairs
from cardcage_net.pcap import dumped

from cardcage_egress.answers import GATEWAY, GUEST, Names, Question, lease
from cardcage_egress.packets import ACK, RST, SYN, TCP, UDP, Arp, Datagram, Ip, Malformed, Segment
from cardcage_egress.policy import INSIDE, READY, Policy, is_name
from cardcage_egress.tcp import Connection, refusal

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cardcage.backends import NetBackend
    from cardcage.device import Slot
    from typing_extensions import Buffer

__all__ = ["Egress", "EgressNet", "open_egress", "parse_egress"]

MAC = b"\x52\x55\xc6\x12\0\1"
"""The gateway's. What goes to another address leads nowhere."""
BROADCAST = b"\xff" * 6
EVERYBODY = b"\xff" * 4
CONNECTIONS = 128
TICK = 250_000_000
SECOND = 1_000_000_000
QUESTIONS = 100
"""Names asked for in a second; some more at once."""
LINES = 20
"""Refusals that are told at once; then one in three seconds."""
DHCP, DNS = 67, 53
START = 60
"""Seconds that the gate may take to be there."""


@frozen
class Egress:
    """Options of ``net:egress``.

    Attributes:
        allow: names and addresses that may be reached; see :class:`cardcage_egress.Policy`.
        dump: pcap file of what passes.
    """

    allow: list[str] = field(factory=list)
    dump: HostPath | None = None


def parse_egress(text: str) -> dict[str, Any]:
    """Options as text: ``pypi.org,allow=10.1.0.0/16``. Raises ValueError."""
    return typed_pairs(parse_repeated(text, "allow"), Egress) if text else {}


class Bucket:
    """So many at once, and so many a second. Times are nanoseconds."""

    def __init__(self, most: int, every: int) -> None:
        self._most, self._every = most, every
        self._left, self._at = most, 0

    def take(self, now: int) -> bool:
        """One more; False where that is too many."""
        gained = (now - self._at) // self._every
        if gained:
            self._left, self._at = min(self._left + gained, self._most), self._at + gained * self._every
        if not self._left:
            return False
        self._left -= 1
        return True


class EgressNet:
    """A network of the guest and this. Satisfies :class:`~cardcage.backends.NetBackend`.

    Raises ConfigError for a wrong entry, HostError when the gate cannot be started.
    """

    features = NetFeatures()

    def __init__(self, slot: Slot, options: Egress) -> None:
        try:
            self._policy = Policy(options.allow)
        except ValueError as error:
            raise ConfigError(f"net egress: allow: {error}") from error
        if any("http" in one.ports.values() for one in self._policy.names) and find_spec("h11") is None:
            raise ConfigError("net egress: HTTP needs h11: pip install 'cardcage[egress]', or open NAME:443 alone")
        self._slot, self.loop = slot, slot.loop
        slot.host.ask("program", "egress-gate", ("start",))
        for one in self._policy.entries:
            slot.host.ask("socket", one, ("connect",))
        self._received: Callable[[int, bytes], bool] | None = None
        self._connections: dict[tuple[int, bytes, int], Connection] = {}
        self._names = Names()
        self._mac = BROADCAST
        self._timer, self._armed = slot.clock.timer(self._tick), False
        self._asked, self._told, self._untold = Bucket(QUESTIONS, SECOND // QUESTIONS), Bucket(LINES, 3 * SECOND), 0
        self._link: socket.socket | None = None
        self._process, self._gate = start_gate(self._policy)
        self._owner, self._copied = os.getpid(), False
        try:
            self._join()
        except BaseException:
            self._end_gate()
            raise

    # the gate

    def _join(self) -> None:
        """Have a link of our own to the gate."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                socket.send_fds(self._gate, [b"join"], [theirs.fileno()])
            except OSError:
                ours.close()
                self._slot.log.error("the gate is gone: nothing gets out")
                return
        ours.setblocking(False)
        self._link = ours
        self.loop.add_reader(ours.fileno(), self._hears)

    def _hears(self) -> None:
        """The gate tells of something that it refused."""
        assert self._link is not None
        try:
            data = self._link.recv(1024)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if data:
            self._refused(data.decode("ascii", "replace"))
            return
        self._leave()
        self._slot.log.error("the gate has ended: nothing gets out")
        for one in list(self._connections.values()):
            one.reset()

    def _end_gate(self) -> None:
        """Let the gate end, which it does once nobody holds the way to it, and reap it."""
        self._gate.close()
        if os.getpid() != self._owner or self._process.returncode is not None:
            return
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if self._copied else 2)
            return
        threading.Thread(target=self._process.wait, name="egress-gate", daemon=True).start()

    def _gate_ended(self) -> bool:
        """True once nobody is at the other end of our link, or of the way, where the gate says nothing."""
        if self._link is None:
            return True
        try:
            return not self._gate.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True

    def _leave(self) -> None:
        if self._link is not None:
            self.loop.remove_reader(self._link.fileno())
            self._link.close()
            self._link = None

    def _refused(self, what: str) -> None:
        """A line of the log, while there are not too many."""
        if not self._told.take(self.now()):
            self._untold += 1
            return
        more = {"untold": self._untold} if self._untold else {}
        self._untold = 0
        self._slot.log.warning("egress refused", what=what, **more)

    # what is ours of the machine

    def now(self) -> int:
        return self._slot.clock.now()

    def start(self, received: Callable[[int, bytes | memoryview], bool], /) -> None:
        """Begin."""
        self._received = received

    def resume(self, queue: int, /) -> None:
        """The guest has given buffers."""
        for one in list(self._connections.values()):
            one.pump()

    def set_offloads(self, offloads: frozenset[str], vnet_header: int, /) -> None:
        """Nothing is left to us."""

    def may_fork(self) -> str:
        """Why no copy can be made: it would have no way out, where the gate has ended. Nobody starts another: from
        inside the jail none can, and what is asked to from there would have to believe a machine that was taken over.
        """
        if self._gate_ended():
            return "net egress: the gate has ended, so that a copy would have no way out: make the machine anew"
        self._copied = True
        return ""

    def forked(self) -> None:
        """The connections are the parent's: here they are no more, which the guest is told when it uses one."""
        self._leave()
        for one in list(self._connections.values()):
            one.close()
        self._join()

    def close(self) -> None:
        """Idempotent. The gate ends with the last copy of the machine."""
        self._timer.cancel()
        for one in list(self._connections.values()):
            one.close()
        self._leave()
        self._end_gate()

    # packets

    def send(self, queue: int, parts: Sequence[Buffer], /) -> None:
        """One frame from the guest."""
        frame = b"".join(parts)
        if len(frame) < 14 or frame[6] & 1 or frame[:6] not in (MAC, BROADCAST):
            return
        self._mac = frame[6:12]
        try:
            match frame[12:14]:
                case b"\x08\x06":
                    asked = Arp.of(frame)
                    if asked is not None and asked.target == GATEWAY and asked.sender in (GUEST, bytes(4)):
                        self._give(asked.answered(MAC))
                case b"\x08\x00":
                    self._packet(Ip.of(frame))
                case b"\x86\xdd":
                    self._refused("IPv6")
        except Malformed as error:
            self._refused(str(error))

    def _packet(self, ip: Ip) -> None:
        if ip.protocol == UDP and ip.source in (GUEST, bytes(4)) and ip.target in (GATEWAY, EVERYBODY):
            datagram = Datagram.of(ip)
            if datagram.target == DHCP:
                if (answer := lease(datagram.data)) is not None:
                    self._give(Datagram(DHCP, 68, answer).packed(GATEWAY, EVERYBODY).framed(self._mac, MAC))
                return
        if ip.source != GUEST:
            self._refused(f"a packet of {IPv4Address(ip.source)}, which is not the guest")
        elif ip.protocol == UDP:
            self._datagram(Datagram.of(ip), ip)
        elif ip.protocol == TCP:
            self._segment(Segment.of(ip), ip)
        else:
            self._refused(f"protocol {ip.protocol} to {IPv4Address(ip.target)}")

    def _datagram(self, datagram: Datagram, ip: Ip) -> None:
        if ip.target != GATEWAY or datagram.target != DNS:
            self._refused(f"UDP to {IPv4Address(ip.target)}:{datagram.target}")
            return
        question = Question.of(datagram.data)
        if not self._asked.take(self.now()):
            return
        name = question.name
        address = self._names.address(name) if is_name(name) and self._policy.ports_of(name) else None
        if address is None and not name.endswith(".arpa"):
            self._refused(f"the name {ascii(name)[1:-1]:.100}")
        answer = Datagram(DNS, datagram.source, question.answered(address))
        self._give(answer.packed(GATEWAY, GUEST).framed(self._mac, MAC))

    def _segment(self, segment: Segment, ip: Ip) -> None:
        key = (segment.source, ip.target, segment.target)
        connection = self._connections.get(key)
        if connection is not None:
            connection.heard(segment)
        elif segment.flags & (SYN | ACK | RST) == SYN and self._open(key, segment):
            self._arm()
        elif not segment.flags & RST:
            self._give(refusal(segment).packed(ip.target, GUEST).framed(self._mac, MAC))

    def _open(self, key: tuple[int, bytes, int], syn: Segment) -> bool:
        """Ask the gate for a connection; False where there is none."""
        address = IPv4Address(key[1])
        name = self._names.name(key[1]) if address in INSIDE else None
        may = syn.target in self._policy.ports_of(name) if name else self._policy.opens(address, syn.target)
        where = f"{name or address}:{syn.target}"
        if not may:
            self._refused(f"TCP to {where}")
            return False
        if len(self._connections) >= CONNECTIONS:
            self._refused(f"TCP to {where}: there are {CONNECTIONS} connections")
            return False
        if self._link is None:
            return False
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        with theirs:
            try:
                request = json.dumps({"to": name or str(address), "port": syn.target}).encode()
                socket.send_fds(self._link, [request], [theirs.fileno()])
            except OSError:  # it is gone, or has too much to do
                ours.close()
                return False
        self._connections[key] = Connection(self, key[1], syn, ours)
        return True

    def emit(self, connection: Connection, segment: Segment, /) -> bool:
        return self._give(segment.packed(connection.address, GUEST).framed(self._mac, MAC))

    def over(self, connection: Connection, /) -> None:
        del self._connections[connection.source, connection.address, connection.target]

    def _give(self, frame: bytes) -> bool:
        return self._received is not None and self._received(0, frame)

    def _arm(self) -> None:
        if self._connections and not self._armed:
            self._armed = True
            self._timer.arm(self.now() + TICK)

    def _tick(self) -> None:
        self._armed = False
        for one in list(self._connections.values()):
            one.tick()
        self._arm()


def start_gate(policy: Policy) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """Start the gate's process; the way to it too, which ends it when all have closed it. Raises HostError."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        words = [sys.executable, "-P", "-m", "cardcage_egress.gate", str(theirs.fileno())]
        try:
            process = subprocess.Popen(
                words,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=(theirs.fileno(),),
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            raise HostError(f"net egress: the gate cannot be started: {error.strerror}") from error
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    with process.stdin, process.stdout, process.stderr:
        with suppress(OSError):  # it has ended, and says why
            process.stdin.write(json.dumps(policy.entries).encode())
            process.stdin.close()
        poll = select.poll()
        poll.register(process.stdout, select.POLLIN)
        said = os.read(process.stdout.fileno(), 100) if poll.poll(START * 1000) else b""
        if said != READY:
            ours.close()
            process.kill()
            why = process.stderr.read().decode(errors="replace").strip().splitlines()[-1:]
            process.wait()
            raise HostError(f"net egress: the gate cannot be started: {''.join(why)}")
    ours.setblocking(False)
    return process, ours


def open_egress(slot: Slot, options: Egress) -> NetBackend:
    """Back end ``net:egress``."""
    return dumped(slot, options.dump, lambda: EgressNet(slot, options))
