"""Tap interfaces: frames to and from the host's own network stack (Linux, Documentation/networking/tuntap.rst)."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from struct import pack, unpack_from
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import ge, le, max_len
from cardcage.backends import NetFeatures
from cardcage.config import HostPath
from cardcage.errors import ConfigError, HostError

from cardcage_net.inbox import FRAME_MAX, Inbox
from cardcage_net.pcap import dumped

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cardcage.backends import NetBackend
    from cardcage.device import Slot
    from typing_extensions import Buffer

__all__ = ["Tap", "TapNet", "open_tap"]

TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ, TUNGETIFF = 0x400454CA, 0x400454D0, 0x400454D8, 0x800454D2
IFF_TAP, IFF_NO_PI, IFF_MULTI_QUEUE, IFF_VNET_HDR, IFF_UP = 0x0002, 0x1000, 0x0100, 0x4000, 0x1
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFMTU, SIOCBRADDIF, SIOCGIFINDEX = 0x8913, 0x8914, 0x8922, 0x89A2, 0x8933
OFFLOADS = {"csum": 1, "tso4": 2, "tso6": 4, "ecn": 8, "ufo": 16}
HEADER = 12
ROUND = 64
"""Frames that one turn of the loop reads at most, so that others get theirs."""


@frozen
class Tap:
    """Options of ``net:tap``.

    Attributes:
        ifname: the interface, made when there is none of this name (which needs CAP_NET_ADMIN; one that the
            administrator made for this user does not); empty lets the host choose a name.
        bridge: bridge that the interface joins.
        queues: queue pairs, 1 to 64; the device's ``queues`` should say the same.
        vnet_header: let the host and the guest leave checksums and segmentation to each other.
        up: bring the interface up.
        mtu: of the interface, 0 leaves it.
        dump: pcap file of what passes.
        fds: descriptors of an interface that somebody else made and set up, one for each queue pair; the other keys but
            *dump* say nothing then.
    """

    ifname: str = ""
    bridge: str | None = None
    queues: int = field(default=1, validator=[ge(1), le(64)])
    vnet_header: bool = True
    up: bool = True
    mtu: int = field(default=0, validator=[ge(0), le(65521)])
    dump: HostPath | None = None
    fds: tuple[int, ...] = field(default=(), validator=max_len(64))


def _request(name: str, rest: bytes) -> bytes:
    """A struct ifreq."""
    return name.encode().ljust(16, b"\0") + rest.ljust(24, b"\0")


class TapNet:
    """A tap interface. Satisfies :class:`~cardcage.backends.NetBackend`.

    Raises :exc:`~cardcage.errors.HostError` with what would make it possible when the host refuses.
    """

    def __init__(self, slot: Slot, options: Tap) -> None:
        if len(options.ifname.encode()) > 15 or "/" in options.ifname or "%" in options.ifname:
            raise ConfigError(f'interface name "{options.ifname}": expected at most 15 bytes without / and %')
        if options.fds:
            slot.host.ask("tap", f"/proc/self/fd/{options.fds[0]}", ("open",))
        else:
            slot.host.ask("tap", options.ifname or "tap%d", ("open",), bridge=options.bridge or "")
        self._slot = slot
        self._vnet = HEADER if options.vnet_header else 0
        self._fds: list[int] = []
        self._room = memoryview(bytearray(FRAME_MAX + HEADER))
        self.name = options.ifname
        try:
            for fd in options.fds:
                self._take(fd)
            for _ in range(0 if options.fds else options.queues):
                self._open(multiple=options.queues > 1)
            offloads = self._probe_offloads() if self._vnet else frozenset[str]()
            if not options.fds:
                self._configure(options)
        except BaseException:
            self.close()
            raise
        self.features = NetFeatures(self._vnet, len(self._fds), offloads)
        self._inboxes = [
            # default arguments bind this turn's values; mypy cannot infer such lambdas
            Inbox(at, lambda fd=fd: slot.loop.remove_reader(fd), lambda at=at: self._watch(at))  # type: ignore[misc]
            for at, fd in enumerate(self._fds)
        ]

    def _take(self, given: int) -> None:
        """A queue that somebody else opened; *given* stays its owner's. Raises ConfigError."""
        try:
            fd = fcntl.fcntl(given, fcntl.F_DUPFD_CLOEXEC, 0)
            self._fds.append(fd)
            answer = fcntl.ioctl(fd, TUNGETIFF, bytes(40))
            flags = unpack_from("H", answer, 16)[0]
            if not flags & IFF_TAP or not flags & IFF_NO_PI:
                raise ConfigError("expected a tap interface without packet information", key="fds")
            self.name = answer[:16].rstrip(b"\0").decode("utf-8", "replace")
            self._vnet = HEADER if flags & IFF_VNET_HDR else 0
            if self._vnet:
                fcntl.ioctl(fd, TUNSETVNETHDRSZ, pack("i", HEADER))
            os.set_blocking(fd, False)
        except OSError as error:
            raise ConfigError(f"descriptor {given} is no tap interface: {error.strerror}", key="fds") from error

    def _open(self, *, multiple: bool) -> None:
        try:
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            advice = "sudo chmod 666 /dev/net/tun" if error.errno == errno.EACCES else "load the module tun"
            raise HostError(f"tap: /dev/net/tun: {error.strerror}: {advice}, or use net user") from error
        self._fds.append(fd)
        flags = IFF_TAP | IFF_NO_PI | (IFF_VNET_HDR if self._vnet else 0) | (IFF_MULTI_QUEUE if multiple else 0)
        try:
            answer = fcntl.ioctl(fd, TUNSETIFF, _request(self.name, pack("H", flags)))
            self.name = answer[:16].rstrip(b"\0").decode()
            if self._vnet:
                fcntl.ioctl(fd, TUNSETVNETHDRSZ, pack("i", HEADER))
        except OSError as error:
            raise HostError(self._why(error)) from error

    def _why(self, error: OSError) -> str:
        name = self.name or "tap0"
        if error.errno == errno.EPERM:
            return (
                f"tap {name}: permission denied; create it once as root: ip tuntap add dev {name} mode tap user $USER"
            )
        if error.errno == errno.EBUSY:
            return f"tap {name}: in use by another process"
        if error.errno == errno.EINVAL:
            return f"tap {name}: exists, but is not a tap interface with that many queues: see ip -d link show {name}"
        return f"tap {name}: {error.strerror}"

    def _probe_offloads(self) -> frozenset[str]:
        """Return the offloads that this kernel takes (newer kernels have no UFO); leaves all off."""
        found = {"csum"} if self._try_offloads({"csum"}) else set()
        for name in OFFLOADS if found else ():
            with_base = found | {name} | ({"tso4"} if name == "ecn" else set())
            if self._try_offloads(with_base):
                found.add(name)
        self._try_offloads(set())
        return frozenset(found)

    def _try_offloads(self, names: set[str]) -> bool:
        try:
            fcntl.ioctl(self._fds[0], TUNSETOFFLOAD, sum(OFFLOADS[name] for name in names))
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise HostError(f"tap {self.name}: {error.strerror}") from error
            return False
        return True

    def _configure(self, options: Tap) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
            try:
                if options.mtu:
                    fcntl.ioctl(control, SIOCSIFMTU, _request(self.name, pack("i", options.mtu)))
                if options.bridge is not None:
                    index = unpack_from("i", fcntl.ioctl(control, SIOCGIFINDEX, _request(self.name, b"")), 16)[0]
                    self._join(control, options.bridge, index)
                flags = unpack_from("H", fcntl.ioctl(control, SIOCGIFFLAGS, _request(self.name, b"")), 16)[0]
                if options.up and not flags & IFF_UP:
                    fcntl.ioctl(control, SIOCSIFFLAGS, _request(self.name, pack("H", flags | IFF_UP)))
            except OSError as error:
                raise HostError(f"tap {self.name}: cannot be set up: {error.strerror}") from error

    def _join(self, control: socket.socket, bridge: str, index: int) -> None:
        if os.path.exists(f"/sys/class/net/{self.name}/master"):
            there = os.path.basename(os.path.realpath(f"/sys/class/net/{self.name}/master"))
            if there == bridge:
                return
        try:
            fcntl.ioctl(control, SIOCBRADDIF, _request(bridge, pack("i", index)))
        except OSError as error:
            if error.errno == errno.EBUSY and self._is_member(bridge):
                return
            reasons = {errno.ENODEV: "no such interface", errno.EOPNOTSUPP: "not a bridge"}
            reason = reasons.get(error.errno or 0, error.strerror)
            raise HostError(f"tap {self.name}: cannot join bridge {bridge}: {reason}") from error

    def _is_member(self, bridge: str) -> bool:
        return os.path.exists(f"/sys/class/net/{bridge}/brif/{self.name}")

    def start(self, received: Callable[[int, bytes | memoryview], bool], /) -> None:
        """Begin to read."""
        for at, inbox in enumerate(self._inboxes):
            inbox.received = received
            self._watch(at)

    def _watch(self, at: int) -> None:
        if self._fds:
            self._slot.loop.add_reader(self._fds[at], lambda: self._readable(at))

    def _readable(self, at: int) -> None:
        fd, put, room = self._fds[at], self._inboxes[at].put, self._room
        try:
            for _ in range(ROUND):
                if not put(room[: os.readv(fd, (room,))]):
                    return
        except BlockingIOError:
            return
        except OSError as error:  # EIO while the interface is down, EBADFD once it was deleted
            if error.errno != errno.EIO:
                self._slot.loop.remove_reader(fd)
                self._slot.log.warning("tap is gone", interface=self.name, reason=error.strerror)

    def send(self, queue: int, parts: Sequence[Buffer], /) -> None:
        """One frame from the guest; what the host has no room for, or does not like, is dropped."""
        if len(parts) > 512:
            parts = [b"".join(parts)]
        try:
            os.writev(self._fds[queue % len(self._fds)], parts)
        except OSError as error:
            if error.errno == errno.EBADF:
                raise

    def resume(self, queue: int, /) -> None:
        """The guest has given receive buffers again."""
        if queue < len(self._inboxes):
            self._inboxes[queue].resume()

    def set_offloads(self, offloads: frozenset[str], vnet_header: int, /) -> None:
        """Set the offloads that the guest takes; *vnet_header* is the size in :attr:`features`."""
        if self._vnet:
            wanted = set(offloads & self.features.offloads)
            if "csum" not in wanted:
                wanted = set()
            if not wanted & {"tso4", "tso6"}:
                wanted -= {"ecn"}
            if not self._try_offloads(wanted):
                self._slot.log.warning("tap refused offloads", interface=self.name, offloads=sorted(wanted))

    def close(self) -> None:
        """Idempotent. An interface that was made here is gone with it."""
        fds, self._fds = self._fds, []
        for fd in fds:
            self._slot.loop.remove_reader(fd)
            os.close(fd)


def open_tap(slot: Slot, options: Tap) -> NetBackend:
    """Back end ``net:tap``."""
    return dumped(slot, options.dump, lambda: TapNet(slot, options))
