"""Types of QMP's arguments about images and networks: what the schema says of ``blockdev-add`` and ``netdev_add``."""

from __future__ import annotations

from typing import Literal, NotRequired, TypedDict

__all__ = ["BlockdevOptions", "ChardevBackend", "ChardevReturn", "Netdev", "ObjectOptions"]

BlockdevCacheOptions = TypedDict("BlockdevCacheOptions", {"direct": NotRequired[bool], "no-flush": NotRequired[bool]})


class UnixSocketAddress(TypedDict):
    """The socket of an NBD server."""

    type: Literal["unix"]
    path: str


class InetSocketAddress(TypedDict):
    """The address of an NBD server."""

    type: Literal["inet"]
    host: str
    port: str


BlockdevOptionsFile = TypedDict(
    "BlockdevOptionsFile",
    {
        "driver": Literal["file", "host_device"],
        "node-name": str,
        "filename": str,
        "locking": NotRequired[Literal["auto", "on", "off"]],
        "aio": NotRequired[Literal["threads", "native", "io_uring"]],
        "read-only": NotRequired[bool],
        "auto-read-only": NotRequired[bool],
        "force-share": NotRequired[bool],
        "discard": NotRequired[Literal["ignore", "unmap"]],
        "detect-zeroes": NotRequired[Literal["off"]],
        "cache": NotRequired[BlockdevCacheOptions],
    },
)
BlockdevOptionsFormat = TypedDict(
    "BlockdevOptionsFormat",
    {
        "driver": Literal["raw", "qcow2"],
        "node-name": str,
        "file": str,
        "backing": NotRequired[str | None],
        "read-only": NotRequired[bool],
        "auto-read-only": NotRequired[bool],
        "force-share": NotRequired[bool],
        "discard": NotRequired[Literal["ignore", "unmap"]],
        "detect-zeroes": NotRequired[Literal["off"]],
        "cache": NotRequired[BlockdevCacheOptions],
    },
)
BlockdevOptionsNbd = TypedDict(
    "BlockdevOptionsNbd",
    {
        "driver": Literal["nbd"],
        "node-name": str,
        "server": UnixSocketAddress | InetSocketAddress,
        "export": NotRequired[str],
        "read-only": NotRequired[bool],
        "auto-read-only": NotRequired[bool],
        "discard": NotRequired[Literal["unmap"]],
        "detect-zeroes": NotRequired[Literal["off"]],
        "cache": NotRequired[BlockdevCacheOptions],
    },
)
BlockdevOptions = BlockdevOptionsFile | BlockdevOptionsFormat | BlockdevOptionsNbd
"""A node; ``file`` and ``backing`` name others, which were added before."""


class OfPath(TypedDict):
    """A path, in the table that QEMU has around it."""

    path: str


class UnixSocketAddressLegacy(TypedDict):
    """A Unix socket, in QEMU's older form."""

    type: Literal["unix"]
    data: OfPath


class ChardevSocket(TypedDict):
    """A socket: of a vhost-user device, say."""

    addr: UnixSocketAddressLegacy
    server: NotRequired[bool]
    wait: NotRequired[bool]


class ChardevFile(TypedDict):
    """A file that has the output."""

    out: str
    append: NotRequired[bool]


class Nothing(TypedDict):
    """No members."""


class ChardevBackendSocket(TypedDict):
    """As ``-chardev socket``."""

    type: Literal["socket"]
    data: ChardevSocket


class ChardevBackendFile(TypedDict):
    """As ``-chardev file``."""

    type: Literal["file"]
    data: ChardevFile


class ChardevBackendNull(TypedDict):
    """As ``-chardev null``."""

    type: Literal["null"]
    data: Nothing


ChardevBackend = ChardevBackendSocket | ChardevBackendFile | ChardevBackendNull
"""A character back end."""


class ChardevReturn(TypedDict):
    """QEMU's answer: the terminal's path, of a kind that has one."""

    pty: NotRequired[str]


class String(TypedDict):
    """QEMU's list of texts has tables of one."""

    str: str


class NetdevUserOptions(TypedDict):
    """The user's network, by passt."""

    type: Literal["user"]
    id: str
    hostfwd: NotRequired[list[String]]
    ipv6: NotRequired[bool]
    dns: NotRequired[str]
    host: NotRequired[str]


class NetdevTapOptions(TypedDict):
    """A tap interface of the host's; ``fd`` and ``fds`` are names of ``getfd``."""

    type: Literal["tap"]
    id: str
    fd: NotRequired[str]
    fds: NotRequired[str]
    ifname: NotRequired[str]
    br: NotRequired[str]
    queues: NotRequired[int]
    script: NotRequired[Literal["no"]]
    downscript: NotRequired[Literal["no"]]
    vhost: NotRequired[bool]
    vhostfd: NotRequired[str]
    vhostfds: NotRequired[str]


class NetdevBridgeOptions(TypedDict):
    """A tap interface in a bridge of the host's."""

    type: Literal["bridge"]
    id: str
    br: NotRequired[str]


class NetdevSocketOptions(TypedDict):
    """A stream of frames."""

    type: Literal["socket"]
    id: str
    listen: NotRequired[str]
    connect: NotRequired[str]


class NetdevStreamOptions(TypedDict):
    """A stream of frames by its address."""

    type: Literal["stream"]
    id: str
    addr: UnixSocketAddress | InetSocketAddress
    server: NotRequired[bool]
    reconnect: NotRequired[int]


class NetdevDgramOptions(TypedDict):
    """Datagrams, a frame in each."""

    type: Literal["dgram"]
    id: str
    local: NotRequired[UnixSocketAddress | InetSocketAddress]
    remote: NotRequired[UnixSocketAddress | InetSocketAddress]


Netdev = (
    NetdevUserOptions
    | NetdevTapOptions
    | NetdevBridgeOptions
    | NetdevSocketOptions
    | NetdevStreamOptions
    | NetdevDgramOptions
)
"""A network, by its type."""


ObjectOptionsRngRandom = TypedDict(
    "ObjectOptionsRngRandom", {"qom-type": Literal["rng-random"], "id": str, "filename": NotRequired[str]}
)
ObjectOptionsRngBuiltin = TypedDict("ObjectOptionsRngBuiltin", {"qom-type": Literal["rng-builtin"], "id": str})
ObjectOptionsSecret = TypedDict(
    "ObjectOptionsSecret",
    {
        "qom-type": Literal["secret"],
        "id": str,
        "data": NotRequired[str],
        "file": NotRequired[str],
        "format": NotRequired[Literal["raw", "base64"]],
        "keyid": NotRequired[str],
        "iv": NotRequired[str],
    },
)
ObjectOptionsTlsCredsX509 = TypedDict(
    "ObjectOptionsTlsCredsX509",
    {
        "qom-type": Literal["tls-creds-x509"],
        "id": str,
        "dir": NotRequired[str],
        "endpoint": NotRequired[Literal["client", "server"]],
        "verify-peer": NotRequired[bool],
        "sanity-check": NotRequired[bool],
    },
)
ObjectOptions = ObjectOptionsRngRandom | ObjectOptionsRngBuiltin | ObjectOptionsSecret | ObjectOptionsTlsCredsX509
"""An object that may come later: memory is there from the start."""
