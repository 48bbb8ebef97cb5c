"""User-mode networking by passt: the guest's connections become sockets of an unprivileged process of the host.

passt (https://passt.top) is a process of its own, joined by a socket pair on which each frame follows its length. The
guest gets its address by DHCP; the gateway's address stands for the host.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import socket
import subprocess
from contextlib import suppress
from errno import EACCES, EADDRINUSE, EADDRNOTAVAIL, EAFNOSUPPORT
from struct import pack
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import ge, le
from cardcage.backends import NetFeatures
from cardcage.config import HostPath
from cardcage.errors import ConfigError, HostError
from cardcage.security import Needs
from cardcage_jail import is_inside, start_program

from cardcage_net.framing import BACKLOG, enlarge
from cardcage_net.halfclosed import WHOLE, HalfClosed, damages
from cardcage_net.link import Link
from cardcage_net.pcap import dumped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cardcage.backends import NetBackend
    from cardcage.device import Slot
    from typing_extensions import Buffer

__all__ = ["User", "UserNet", "check_passt", "forward", "open_user"]

START_TIMEOUT = 10.0
FIRST_RETRY, LAST_RETRY = 1_000_000_000, 30_000_000_000
INSTALL = "apt install passt (or your distribution's package of that name)"
NO_ROUTE = ("--interface", "lo", "--mac-addr", "52:55:0a:00:02:02", "--ipv4-only")
"""For a host without a default route: passt takes no interface by itself then, and the loopback's MAC address is none.

Connections still go where the host's routes lead at the time; the MAC address is that of QEMU's gateway.
"""
_FORWARD = re.compile(r"(?:(tcp|udp):)?(\[[0-9a-fA-F:]+\]|[0-9.]*):(\d+)-([0-9.]*):(\d+)", re.ASCII)


@frozen
class User:
    """Options of ``net:user``.

    Attributes:
        hostfwd: ports of the host that lead to the guest, as ``tcp:127.0.0.1:2222-:22`` (QEMU's words); without an
            address all of the host's are meant.
        address: the guest's, with the length of its prefix. gateway: what the guest sees the host at.
        dns: name server that DHCP tells, by default those of the host.
        interface: of the host, whose routes are used; by default that of the default route, where there is one.
        mtu: announced by DHCP; a large MTU makes it fast.
        ipv6: offer IPv6 too where the host has it.
        engine: the program.
        dump: pcap file of what passes.
    """

    hostfwd: list[str] = field(factory=list)
    address: str = "10.0.2.15/24"
    gateway: str = "10.0.2.2"
    dns: str | None = None
    interface: str | None = None
    mtu: int = field(default=65520, validator=[ge(68), le(65520)])
    ipv6: bool = True
    engine: str = "passt"
    dump: HostPath | None = None


def forward(text: str) -> tuple[str, str]:
    """Return passt's option for a *hostfwd* (``-t`` or ``-u``) and its value. Raises ConfigError."""
    found = _FORWARD.fullmatch(text)
    if found is None or not (0 < int(found[3]) < 65536 and 0 < int(found[5]) < 65536):
        raise ConfigError(f'hostfwd "{text}": expected the form tcp:127.0.0.1:2222-:22')
    address = found[2].strip("[]")
    try:
        if address:
            ipaddress.ip_address(address)
        if found[4]:
            ipaddress.IPv4Address(found[4])
    except ValueError as error:
        raise ConfigError(f'hostfwd "{text}": {error}') from error
    return "-u" if found[
        1
    ] == "udp" else "-t", f"{address}/{found[3]}:{found[5]}" if address else f"{found[3]}:{found[5]}"


def _arguments(options: User, fd: object) -> list[str]:
    try:
        interface = ipaddress.IPv4Interface(options.address)
        gateway = ipaddress.IPv4Address(options.gateway)
        if options.dns is not None:
            ipaddress.ip_address(options.dns)
    except ValueError as error:
        raise ConfigError(f"net user: {error}") from error
    if gateway not in interface.network or gateway == interface.ip:
        raise ConfigError(f"net user: gateway {gateway} is not another address of {interface.network}")
    words = [options.engine, "--foreground", "--quiet", "--stderr", "--one-off", "--fd", str(fd)]
    words += ["--address", str(interface.ip), "--netmask", str(interface.netmask), "--gateway", str(gateway)]
    words += ["--mtu", str(options.mtu)]
    words += ["--dns", options.dns] if options.dns is not None else []
    if options.interface is not None:
        words += ["--interface", options.interface]
    elif not _has_default_route():
        words += NO_ROUTE
    words += ["--ipv4-only"] if not options.ipv6 and "--ipv4-only" not in words else []
    for one in options.hostfwd:
        if interface.ip != ipaddress.IPv4Address(_guest(one) or interface.ip):
            raise ConfigError(f'hostfwd "{one}": the guest has the address {interface.ip}')
        words += forward(one)
    return words


def _has_default_route() -> bool:
    """True when a route of this thread's network namespace leads everywhere, as passt looks for it."""
    with suppress(OSError), open("/proc/thread-self/net/route") as table:
        if any(one[1:8:6] == ["00000000", "00000000"] for one in map(str.split, table)):  # destination and mask
            return True
    with suppress(OSError), open("/proc/thread-self/net/ipv6_route") as table:
        return any(one[:2] == ["0" * 32, "00"] and one[9] != "lo" for one in map(str.split, table))
    return False


def check_ports(hostfwd: list[str]) -> None:
    """Raise ConfigError or HostError, in our words, for a port of *hostfwd* that cannot be had on this host."""
    seen: set[tuple[bool, int]] = set()
    for text in hostfwd:
        found = _FORWARD.fullmatch(text)
        if found is None:
            continue  # said with the other options
        udp, address, port = found[1] == "udp", found[2].strip("[]"), int(found[3])
        if (udp, port) in seen:  # passt knows a port once, whatever the addresses
            raise ConfigError(f'net user: hostfwd "{text}": port {port} of the host is led elsewhere already')
        seen.add((udp, port))
        what = f"{'UDP' if udp else 'TCP'} port {port} of {address or 'the host'}"
        for family, everywhere in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            if address and (":" in address) != (family == socket.AF_INET6):
                continue
            try:
                _try_port(family, udp, address or everywhere, port)
            except OSError as error:
                if not address and error.errno in (EAFNOSUPPORT, EADDRNOTAVAIL):
                    continue  # a host without IPv6
                why = {
                    EADDRINUSE: f"{what} is taken: another program or machine has it",
                    EACCES: f"{what} is not for this user: those below net.ipv4.ip_unprivileged_port_start are root's",
                    EADDRNOTAVAIL: f"{address} is no address of this host",
                }.get(error.errno or 0, f"{what}: {error.strerror}")
                raise HostError(f'net user: hostfwd "{text}": {why}') from error


def _try_port(family: socket.AddressFamily, udp: bool, address: str, port: int) -> None:
    """Take the port and give it back. Raises OSError."""
    with socket.socket(family, socket.SOCK_DGRAM if udp else socket.SOCK_STREAM) as probe:
        if family == socket.AF_INET6:
            probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if not udp:  # as passt does: what is left of closed connections is in nobody's way
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((address, port))


def _guest(text: str) -> str:
    found = _FORWARD.fullmatch(text)
    forward(text)
    return found[4] if found else ""


class UserNet:
    """The engine and the socket to it. Satisfies :class:`~cardcage.backends.NetBackend`.

    An engine that dies while the machine runs is started again, after a second and then ever longer.

    Raises :exc:`~cardcage.errors.HostError` when there is no engine or it cannot start, in its own words, and
    :exc:`~cardcage.errors.ConfigError` for options that do not fit.
    """

    features = NetFeatures()

    def __init__(self, slot: Slot, options: User) -> None:
        self._slot, self._options = slot, options
        self._link = Link(slot.loop, self._lost)
        self._process: subprocess.Popen[bytes] | None = None
        self._errors = -1
        self._retry = FIRST_RETRY
        self._timer = slot.clock.timer(self._restart)
        self._closed = False
        slot.host.ask("program", options.engine, ("start",))
        for one in options.hostfwd:
            slot.host.ask("socket", one, ("listen",))
        check_ports(options.hostfwd)
        self._again = tuple(_arguments(options, "{fd}"))
        connection = self._spawn()
        try:
            self._await(connection)
        except BaseException:
            connection.close()
            self._end()
            raise
        self._halves = HalfClosed(self._tell_old) if damages(options.engine) else None
        self._link.attach(connection)

    def _tell_old(self) -> None:
        self._slot.log.warning(
            "the guest closed its half of a connection first: what comes then is cut short by this old passt",
            needed=f"passt {WHOLE} or later",
        )

    def needs(self) -> Needs:
        """The engine, when it has to be started again."""
        return Needs(programs=(self._again,))

    def _spawn(self) -> socket.socket:
        if is_inside():
            try:
                return start_program(self._again)
            except OSError as error:
                raise HostError(f"net user: {self._again[0]} cannot be started: {error.strerror}") from error
        ours, theirs = socket.socketpair()
        # The engine drops what does not fit, so the room should be that of a large TCP window.
        enlarge(theirs)
        with theirs:
            words = _arguments(self._options, theirs.fileno())
            self._errors, errors = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)  # what does not fit in the pipe is lost
            try:
                self._process = subprocess.Popen(
                    words,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    pass_fds=(theirs.fileno(),),
                    cwd="/",
                )
            except OSError as error:
                ours.close()
                os.close(self._errors)
                if isinstance(error, FileNotFoundError):
                    raise HostError(f"net user: {words[0]} is not installed: {INSTALL}") from error
                raise HostError(f"net user: {words[0]} cannot be started: {error.strerror}") from error
            finally:
                os.close(errors)
        return ours

    def _await(self, connection: socket.socket) -> None:
        """Wait until the engine answers an ARP request for the gateway, which it does from its first moment on."""
        mac = b"\x52\x54\0\0\0\1"
        own = ipaddress.IPv4Interface(self._options.address).ip
        gateway = ipaddress.IPv4Address(self._options.gateway)
        arp = b"\xff" * 6 + mac + pack(">HHHBBH", 0x0806, 1, 0x0800, 6, 4, 1)
        arp += mac + own.packed + bytes(6) + gateway.packed + bytes(18)
        connection.settimeout(START_TIMEOUT)
        try:
            connection.sendall(pack(">I", len(arp)) + arp)
            while True:
                length = int.from_bytes(_exactly(connection, 4), "big")
                if not 14 <= length <= 1 << 17 or _exactly(connection, length)[12:14] == b"\x08\x06":
                    break
        except TimeoutError as error:
            raise HostError(f"net user: {self._options.engine} did not answer in {START_TIMEOUT:.0f} s") from error
        except (ConnectionError, EOFError) as error:
            raise HostError(f"net user: {self._reason()}") from error

    def _reason(self) -> str:
        """The engine's last words."""
        if self._process is not None:
            try:
                self._process.wait(1)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        try:
            text = os.read(self._errors, 1 << 16).decode("utf-8", "replace")
        except OSError:
            text = ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        telling = [line for line in lines if "syslog" not in line and not line.startswith("Don't run as root")]
        return f"{self._options.engine} ended: {'; '.join(telling) or 'it gave no reason'}"

    def _end(self) -> None:
        """Let the engine end, which it does once its socket is closed, and reap it."""
        if self._process is not None:
            try:
                self._process.wait(1)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            os.close(self._errors)
            self._process, self._errors = None, -1

    def _lost(self, reason: str) -> None:
        self._slot.log.warning("user networking ended, restarting it", reason=self._reason())
        self._end()
        self._timer.arm(self._slot.clock.now() + self._retry)

    def _restart(self) -> None:
        if self._closed:
            return
        self._retry = min(self._retry * 2, LAST_RETRY)
        try:
            self._link.attach(self._spawn())
            if self._halves is not None:
                self._halves.forget()
        except HostError as error:
            self._slot.log.warning("user networking cannot be restarted", reason=str(error))
            self._timer.arm(self._slot.clock.now() + self._retry)

    def start(self, received: Callable[[int, bytes | memoryview], bool], /) -> None:
        """Begin."""
        self._link.start(received if self._halves is None else self._halves.watch(received))

    def send(self, queue: int, parts: Sequence[Buffer], /) -> None:
        """One frame from the guest."""
        if self._halves is not None:
            parts = self._halves.outgoing(parts)
        if parts:
            self._link.send(parts)

    def resume(self, queue: int, /) -> None:
        self._link.resume()

    def set_offloads(self, offloads: frozenset[str], vnet_header: int, /) -> None:
        """passt fills in all checksums and takes none over."""

    def close(self) -> None:
        """Idempotent. The engine has ended when this returns."""
        if not self._closed:
            self._closed = True
            self._timer.cancel()
            self._link.close()
            self._end()


def _exactly(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data


def open_user(slot: Slot, options: User) -> NetBackend:
    """Back end ``net:user``."""
    return dumped(slot, options.dump, lambda: UserNet(slot, options))


def check_passt() -> tuple[bool, str, str]:
    """A line of ``cardcage doctor``."""
    found = shutil.which("passt")
    if found is None:
        return False, "no passt", INSTALL
    with open("/proc/sys/net/core/wmem_max") as file:
        most = int(file.read())
    faults = []
    if most < BACKLOG and os.geteuid() != 0:
        slow = f"slow towards the guest: sockets hold {most >> 10} KiB, and passt drops the rest"
        faults.append((slow, f"sysctl -w net.core.wmem_max={BACKLOG}"))
    if damages(found):
        old = "an old one: what comes after the guest has closed its half of a connection is cut short"
        faults.append((old, f"passt {WHOLE} or later (Debian 13 has it)"))
    if faults:
        return False, f"passt at {found}, {'; '.join(why for why, _ in faults)}", "; ".join(how for _, how in faults)
    return True, f"passt at {found}", ""
