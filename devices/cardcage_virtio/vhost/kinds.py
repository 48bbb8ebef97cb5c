"""The kinds of vhost-user devices: disks, shares, and any other; what each needs of the front end."""

from __future__ import annotations

import errno
import struct
from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import ge, in_, le, max_len, min_len
from cardcage.config import HostPath

from cardcage_virtio.share import fuse
from cardcage_virtio.vhost.user import VhostUser

if TYPE_CHECKING:
    from cardcage_virtio.queue.request import Request
    from cardcage_virtio.vhost.channel import Channel

__all__ = [
    "VhostUserBlkOptions",
    "VhostUserFsOptions",
    "VhostUserOptions",
    "vhost_user_blk",
    "vhost_user_device",
    "vhost_user_fs",
]

SIZES = [1 << at for at in range(2, 16)]


@frozen
class VhostUserOptions:
    """Options of ``vhost-user-device``, for any kind of virtio device.

    Attributes:
        socket: AF_UNIX socket that the back end listens at.
        device_id: of the virtio device (virtio 1.2, chapter 5).
        queues: 1 to 256. queue_size: entries of each, a power of two.
        config_size: bytes of configuration space that the back end has, 0 for none.
    """

    socket: HostPath = field(validator=min_len(1))
    device_id: int = field(validator=[ge(1), le(63)])
    queues: int = field(default=1, validator=[ge(1), le(256)])
    queue_size: int = field(default=128, validator=in_(SIZES))
    config_size: int = field(default=0, validator=[ge(0), le(256)])


@frozen
class VhostUserBlkOptions:
    """Options of ``vhost-user-blk``: ``socket``, ``queues`` (1 to 64), ``queue_size`` as for ``vhost-user-device``."""

    socket: HostPath = field(validator=min_len(1))
    queues: int = field(default=1, validator=[ge(1), le(64)])
    queue_size: int = field(default=128, validator=in_(SIZES))


@frozen
class VhostUserFsOptions:
    """Options of ``vhost-user-fs`` (virtiofs).

    Attributes:
        socket: that ``virtiofsd --socket-path`` listens at.
        tag: what the guest mounts it by (``mount -t virtiofs TAG /mnt``).
        queues: request queues, 1 to 16. queue_size: entries of each.
    """

    socket: HostPath = field(validator=min_len(1))
    tag: str = field(default="share", validator=[min_len(1), max_len(36)])
    queues: int = field(default=1, validator=[ge(1), le(16)])
    queue_size: int = field(default=128, validator=in_(SIZES))


def vhost_user_device(options: VhostUserOptions) -> VhostUser:
    """Any virtio device served by another process."""
    size = options.config_size
    return VhostUser(options, options.device_id, options.queues, lambda channel: channel.config(size) if size else b"")


def vhost_user_blk(options: VhostUserBlkOptions) -> VhostUser:
    """A disk served by another process."""

    def config(channel: Channel) -> bytes:
        found = bytearray(channel.config(60))
        struct.pack_into("<H", found, 34, options.queues)
        return bytes(found)

    def refuse(request: Request) -> None:
        room = request.writable_size
        if room:
            request.write(b"\1", room - 1)  # VIRTIO_BLK_S_IOERR
        request.done(room)

    return VhostUser(options, 2, options.queues, config, refuse)


def vhost_user_fs(options: VhostUserFsOptions) -> VhostUser:
    """A host directory served by virtiofsd; queue 0 is for what must not wait."""
    config = options.tag.encode().ljust(36, b"\0") + struct.pack("<I", options.queues)

    def refuse(request: Request) -> None:
        if request.readable_size < fuse.IN_HEADER.size or request.writable_size < fuse.OUT_HEADER.size:
            request.done()  # FUSE_FORGET has no answer
            return
        head = b"".join(fuse.part(request.readable, 0, fuse.IN_HEADER.size))  # the rest may be as long as all memory
        unique = fuse.IN_HEADER.unpack(head)[2]
        request.done(request.write(fuse.OUT_HEADER.pack(fuse.OUT_HEADER.size, -errno.EACCES, unique)))

    return VhostUser(options, 26, options.queues + 1, lambda channel: config, refuse)
