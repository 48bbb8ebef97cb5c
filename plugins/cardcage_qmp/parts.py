"""Commands about a machine's parts: disks, character devices, the balloon, and the tree of objects."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal, NotRequired, Protocol, TypedDict

from cardcage.abilities import has
from cardcage.config import DeviceConfig
from cardcage.machine import Machine, PluggedDevice
from cardcage_hotplug.control import grow_drive

from cardcage_qmp.control import inner, present
from cardcage_qmp.errors import QmpError
from cardcage_qmp.names import DEVICES, OBJECTS, ON_PCI, qemu_name
from cardcage_qmp.session import Session

__all__ = [
    "Layered",
    "balloon",
    "block_resize",
    "device_list_properties",
    "qom_get",
    "qom_list",
    "qom_list_properties",
    "qom_list_types",
    "query_balloon",
    "query_block",
    "query_blockstats",
    "query_chardev",
    "query_named_block_nodes",
]

Cache = TypedDict("Cache", {"writeback": bool, "direct": bool, "no-flush": bool})
Qcow2Data = TypedDict(
    "Qcow2Data",
    {
        "compat": str,
        "compression-type": str,
        "refcount-bits": int,
        "lazy-refcounts": NotRequired[bool],
        "corrupt": NotRequired[bool],
        "extended-l2": NotRequired[bool],
    },
)


class ImageSpecific(TypedDict):
    """Facts that images of one format alone have."""

    type: Literal["qcow2"]
    data: Qcow2Data


ImageInfo = TypedDict(
    "ImageInfo",
    {
        "filename": str,
        "format": str,
        "virtual-size": int,
        "actual-size": NotRequired[int],
        "dirty-flag": NotRequired[bool],
        "cluster-size": NotRequired[int],
        "backing-filename": NotRequired[str],
        "full-backing-filename": NotRequired[str],
        "backing-filename-format": NotRequired[str],
        "format-specific": NotRequired[ImageSpecific],
        "backing-image": NotRequired["ImageInfo"],
    },
)
BlockDeviceInfo = TypedDict(
    "BlockDeviceInfo",
    {
        "file": str,
        "node-name": NotRequired[str],
        "ro": bool,
        "drv": str,
        "backing_file": NotRequired[str],
        "backing_file_depth": int,
        "encrypted": bool,
        "detect_zeroes": Literal["off"],
        "bps": int,
        "bps_rd": int,
        "bps_wr": int,
        "iops": int,
        "iops_rd": int,
        "iops_wr": int,
        "image": ImageInfo,
        "cache": Cache,
        "write_threshold": int,
    },
)
BlockInfo = TypedDict(
    "BlockInfo",
    {
        "device": str,
        "qdev": NotRequired[str],
        "type": str,
        "removable": bool,
        "locked": bool,
        "tray_open": NotRequired[bool],
        "inserted": NotRequired[BlockDeviceInfo],
        "io-status": NotRequired[Literal["ok", "failed", "nospace"]],
    },
)


class BlockDeviceStats(TypedDict):
    """Counts of a disk's requests since the machine was made."""

    rd_bytes: int
    wr_bytes: int
    rd_operations: int
    wr_operations: int
    flush_operations: int
    failed_rd_operations: int
    failed_wr_operations: int
    wr_highest_offset: int


BlockStats = TypedDict("BlockStats", {"device": str, "node-name": str, "qdev": str, "stats": BlockDeviceStats})
ChardevInfo = TypedDict("ChardevInfo", {"label": str, "filename": str, "frontend-open": bool})


class BalloonInfo(TypedDict):
    """Bytes that the guest has."""

    actual: int


class ObjectProperty(TypedDict):
    """A property of an object, or an object below it."""

    name: str
    type: str


class ObjectType(TypedDict):
    """A type of objects."""

    name: str
    abstract: NotRequired[bool]
    parent: NotRequired[str]


class ObjectPropertyInfo(TypedDict):
    name: str
    type: str
    description: NotRequired[str]


BOARDS = {"pc": "pc-i440fx-7.2"}
"""QEMU's names of platforms, where they differ."""
NESTED = 100
"""Images in one another that are told of; of what is below, the depth and the nodes tell."""


class Layered(Protocol):
    """A block back end that knows the image that it is, and those that this stands on."""

    def layers(self) -> Sequence[ImageInfo]:
        """All of them, the guest's own first, each without ``backing-image``. Any thread. Raises OSError."""


TYPE: tuple[ObjectPropertyInfo, ...] = ({"name": "type", "type": "string"},)
"""Properties of each object. libvirt 9 crashes where a list of properties is empty."""


def configured(machine: Machine, plugged: PluggedDevice) -> DeviceConfig | None:
    """The configuration of a device, None for one that the platform added."""
    mine = [one for one in machine.config.devices if one.type == plugged.type]
    named = {one.id: one for one in mine if one.id is not None}
    if plugged.id in named:
        return named[plugged.id]
    nameless = [one for one in mine if one.id is None]
    others = [one.id for one in present(machine) if one.type == plugged.type and one.id not in named]
    at = others.index(plugged.id) if plugged.id in others else len(nameless)  # it may have gone since
    return nameless[at] if at < len(nameless) else None


def tray(plugged: PluggedDevice) -> Any:
    """A CD-ROM drive, None for another device."""
    return inner(plugged.device).drive if plugged.type == "virtio-cdrom" else None


def disks(machine: Machine) -> Iterator[tuple[PluggedDevice, Any]]:
    """Devices with a block back end, and that: None for a CD-ROM drive without a disc."""
    for one in present(machine):
        if (drive := tray(one)) is not None:
            disc = drive.disc
            yield one, disc and disc.image
            continue
        for backend in one.slot.host.opened:
            if hasattr(backend, "readv"):
                yield one, backend
                break


def alias(session: Session, id: str) -> str:
    """The name that who made the machine, or added the device, has for what stands behind device *id*."""
    if id in session.control.names:
        return session.control.names[id]
    for one in present(session.machine):
        if one.type == "qmp" and id in one.device.options.names:
            return str(one.device.options.names[id])
    return id


def _place(table: dict[str, Any]) -> str:
    """What the configuration says of where an image is; a disk of an NBD server by its URI."""
    export = table.get("export", "")
    if table.get("type") != "nbd":
        return str(table.get("file", table.get("path", "")))
    if "path" in table:
        return f"nbd+unix:///{export}?socket={table['path']}"
    return f"nbd://{table.get('host', '')}:{table.get('port', 10809)}/{export}"


def _layers(backend: Any) -> list[ImageInfo]:
    """The image of a back end and those below it; nothing where it does not know, or is being closed."""
    if has(backend, Layered):
        with suppress(OSError):
            return list(backend.layers())
    return []


def _nested(layers: list[ImageInfo]) -> ImageInfo:
    """An image with those below it in it."""
    top: ImageInfo = {**layers[0]}
    at = top
    for one in layers[1:NESTED]:
        at["backing-image"] = at = {**one}
    return top


def node(session: Session, plugged: PluggedDevice, backend: Any, flat: bool = False) -> BlockDeviceInfo:
    """Facts about a disk's image; *flat*: without those of the images below it."""
    config = configured(session.machine, plugged)
    spec: Any = config.options.get("drive", "") if config is not None else ""
    while isinstance(spec, dict) and "disk" in spec:  # of a machine that came from elsewhere: the drive itself
        spec = spec["disk"]
    table = spec if isinstance(spec, dict) else {"file": str(spec)}
    file, cache = _place(table), table.get("cache", "writeback")
    if later := backend not in plugged.slot.host.opened:
        file, table = "", {}  # a disc that came later, by a descriptor
    said = str(table.get("format", table.get("type", "auto")))
    kind = type(backend).__name__.lower()
    known = next((one for one in ("raw", "qcow2", "nbd") if one in (said, kind) or one in kind), said)
    image: ImageInfo = {"filename": file, "format": known, "virtual-size": backend.info.size}
    if layers := _layers(backend):
        if said == "temporary" or not (file or later):
            file = layers[0]["filename"]
        image = {**(layers[0] if flat else _nested(layers)), "filename": file}
        known = image["format"]
    found: BlockDeviceInfo = {
        "file": file,
        "node-name": alias(session, plugged.id),
        "ro": bool(backend.info.readonly or getattr(inner(plugged.device), "readonly", False)),
        "drv": known,
        "backing_file_depth": max(len(layers) - 1, 0),
        "encrypted": False,
        "detect_zeroes": "off",
        "bps": 0,
        "bps_rd": 0,
        "bps_wr": 0,
        "iops": 0,
        "iops_rd": 0,
        "iops_wr": 0,
        "image": image,
        "cache": {"writeback": True, "direct": cache == "none", "no-flush": cache == "unsafe"},
        "write_threshold": 0,
    }
    if len(layers) > 1:
        found["backing_file"] = layers[1]["filename"]
    return found


def _below(top: BlockDeviceInfo, id: str, layers: list[ImageInfo]) -> Iterator[BlockDeviceInfo]:
    """The nodes of the images below a disk's, which have names that QEMU would give: nobody else gave them any."""
    for depth, one in enumerate(layers[1:], 1):
        found: BlockDeviceInfo = {**top, "file": one["filename"], "drv": one["format"], "image": one, "ro": True}
        found |= {"node-name": f"#block-{id}-{depth}", "backing_file_depth": len(layers) - 1 - depth}
        found.pop("backing_file", None)
        if depth + 1 < len(layers):
            found["backing_file"] = layers[depth + 1]["filename"]
        yield found


def query_block(session: Session) -> list[BlockInfo]:
    """The disks."""
    machine = session.machine
    found: list[BlockInfo] = []
    for plugged, backend in disks(machine):
        drive = tray(plugged)
        one: BlockInfo = {
            "device": plugged.id,
            "qdev": f"/machine/peripheral/{plugged.id}/virtio-backend",
            "type": "unknown",
            "removable": drive is not None,
            "locked": drive is not None and drive.locked,
            "io-status": "nospace" if plugged.id in machine.waiting else "ok",
        }
        if drive is not None:
            one["tray_open"] = drive.open
        if backend is not None:
            one["inserted"] = node(session, plugged, backend)
        found.append(one)
    return found


def query_named_block_nodes(session: Session, flat: bool = False) -> list[BlockDeviceInfo]:
    """The images of the disks, and those that they stand on; with *flat*, none is told of in another."""
    found: list[BlockDeviceInfo] = []
    for plugged, backend in disks(session.machine):
        if backend is not None:
            top = node(session, plugged, backend, flat)
            found += [top, *_below(top, plugged.id, _layers(backend))]
    return found


def query_blockstats(session: Session, query_nodes: bool = False) -> list[BlockStats]:
    """Counts of the disks' requests, as far as their devices count it."""
    found: list[BlockStats] = []
    for plugged, _ in disks(session.machine):
        if (counts := getattr(inner(plugged.device), "counts", None)) is None:
            continue
        stats: BlockDeviceStats = {
            "rd_bytes": counts.read_bytes,
            "wr_bytes": counts.written_bytes,
            "rd_operations": counts.reads,
            "wr_operations": counts.writes,
            "flush_operations": counts.flushes,
            "failed_rd_operations": counts.failed_reads,
            "failed_wr_operations": counts.failed_writes,
            "wr_highest_offset": 0,
        }
        name, qdev = alias(session, plugged.id), f"/machine/peripheral/{plugged.id}/virtio-backend"
        found.append({"device": plugged.id, "node-name": name, "qdev": qdev, "stats": stats})
    return found


def block_resize(session: Session, size: int, device: str | None = None, node_name: str | None = None) -> None:
    """Make a disk larger, and tell the guest; by its device, or the name of its node."""
    if (device is None) is (node_name is None):
        raise QmpError("expected one of 'device' and 'node-name'")
    wanted = device if device is not None else node_name
    for plugged, backend in disks(session.machine):
        if backend is not None and wanted in (plugged.id, alias(session, plugged.id)):
            grow_drive(session.machine, plugged.id, size)
            return
    raise QmpError(f"Cannot find device='{device or ''}' nor node-name='{node_name or ''}'", "DeviceNotFound")


def query_chardev(session: Session) -> list[ChardevInfo]:
    """The character back ends."""
    machine = session.machine
    found: list[ChardevInfo] = []
    for plugged in present(machine):
        backends = [one for one in plugged.slot.host.opened if hasattr(one, "start") and not hasattr(one, "send")]
        config = configured(machine, plugged)
        for at, backend in enumerate(backends):
            id = f"{plugged.id}.{at}" if at else plugged.id
            spec: Any = config.options.get("char", "null") if config is not None and not at else "null"
            if plugged.slot.host.has_console:
                spec = machine.config.machine.console
            kind = str(spec.get("type") if isinstance(spec, dict) else spec.partition(":")[0])
            where = getattr(backend, "path", None) if kind == "pty" else None
            if where is None and isinstance(spec, dict):
                where = spec.get("path")
            elif where is None:
                where = spec.partition(":")[2]
            kind = {"socket": "unix", "none": "null"}.get(kind, kind)
            found.append(
                {
                    "label": alias(session, id),
                    "filename": f"{kind}:{where}" if where else kind,
                    "frontend-open": True,
                }
            )
    return found


def query_balloon(session: Session) -> BalloonInfo:
    """Memory that the balloon leaves the guest. Raises QmpError without one."""
    return {"actual": session.machine.config.machine.memory - inflated(session).size}


def inflated(session: Session) -> Any:
    """The machine's balloon. Raises QmpError without one."""
    found = session.machine.services.get("balloon")
    if found is None:
        raise QmpError("No balloon device has been activated", "DeviceNotActive")
    return found


def balloon(session: Session, value: int) -> None:
    """Ask the guest to make do with *value* bytes. It does so in its own time."""
    device, machine = inflated(session), session.machine
    memory = machine.config.machine.memory
    if value <= 0:
        raise QmpError("Parameter 'target' expects a size")
    with machine.lock:
        device.resize(max(memory - value, 0))


# objects


def tree(session: Session) -> dict[str, dict[str, tuple[str, Any]]]:
    """The objects: path to properties, each a type and a value."""
    machine = session.machine
    config = machine.config.machine
    found: dict[str, dict[str, tuple[str, Any]]] = {
        "": {"type": ("string", "container"), "machine": ("child<machine>", None)},
        "/machine": {"type": ("string", f"{BOARDS.get(config.platform, config.platform)}-machine")},
        "/machine/peripheral": {"type": ("string", "container")},
        "/machine/unattached": {"type": ("string", "container")},
    }
    for name in ("peripheral", "unattached"):
        found["/machine"][name] = ("child<container>", None)
    cpu = f"{config.cpu}-x86_64-cpu"
    for vcpu in machine.vcpus:
        name = f"device[{vcpu.index}]"
        found["/machine/unattached"][name] = (f"child<{cpu}>", None)
        found[f"/machine/unattached/{name}"] = {"type": ("string", cpu), "realized": ("bool", True)}
    for plugged in present(machine):
        kind = qemu_name(plugged.type)
        found["/machine/peripheral"][plugged.id] = (f"child<{kind}>", None)
        mine: dict[str, tuple[str, Any]] = {"type": ("string", kind), "realized": ("bool", True)}
        known = DEVICES.get(kind)
        options = getattr(inner(plugged.device), "options", None)
        for property, key in known.options.items() if known is not None else ():
            if hasattr(options, key):
                word = known.types.get(property, "str") if known is not None else "str"
                mine[property] = (word, getattr(options, key))
        found[f"/machine/peripheral/{plugged.id}"] = mine
    return found


def at_path(session: Session, path: str) -> dict[str, tuple[str, Any]]:
    """The object at *path*. Raises QmpError."""
    known = tree(session)
    if path.startswith("/"):
        found = known.get(path.rstrip("/"))
    else:  # a part of one
        found = next((one for at, one in known.items() if at and at.endswith(f"/{path}")), None)
    if found is None:
        raise QmpError(f"Device '{path:.100}' not found", "DeviceNotFound")
    return found


def qom_list(session: Session, path: str) -> list[ObjectProperty]:
    """The properties of an object, and the objects below it."""
    return [{"name": name, "type": kind} for name, (kind, _) in at_path(session, path).items()]


def qom_get(session: Session, path: str, property: str) -> Any:
    """The value of a property."""
    found = at_path(session, path)
    if property not in found:
        raise QmpError(f"Property '{found['type'][1]}.{property:.100}' not found")
    kind, value = found[property]
    return f"{path.rstrip('/')}/{property}" if kind.startswith("child<") else value


def qom_list_types(session: Session, implements: str | None = None, abstract: bool = False) -> list[ObjectType]:
    """The types of what ``cardcage-qemu`` takes by ``-device`` and ``-object``."""
    devices: list[ObjectType] = [{"name": name, "parent": one.parent} for name, one in DEVICES.items()]
    objects: list[ObjectType] = [{"name": name, "parent": parent} for name, (parent, _) in OBJECTS.items()]
    if implements == "device":
        return devices
    return [one for one in (*devices, *objects) if implements in (None, one["name"], one["parent"])]


def device_list_properties(session: Session, typename: str) -> list[ObjectPropertyInfo]:
    """The properties that ``cardcage-qemu -device`` takes for a type."""
    known = DEVICES.get(typename)
    if known is None:
        raise QmpError(f"Device '{typename:.100}' not found", "DeviceNotFound")
    found: list[ObjectPropertyInfo] = [*TYPE]
    if known.parent in ON_PCI:
        found.append({"name": "addr", "type": "str"})
    for one in (*known.options, *known.links):
        found.append({"name": one, "type": known.types.get(one, "str")})
    return found


def qom_list_properties(session: Session, typename: str) -> list[ObjectPropertyInfo]:
    """As ``device-list-properties``; a machine's or CPU's type has none that can be set."""
    if typename in DEVICES:
        return device_list_properties(session, typename)
    if typename in OBJECTS:
        found: list[ObjectPropertyInfo] = [*TYPE]
        for name, kind in OBJECTS[typename][1].items():
            found.append({"name": name, "type": kind})
        return found
    if typename.endswith(("-machine", "-x86_64-cpu")) or typename in ("memory-backend", "virtio-pci", "device"):
        return [*TYPE]
    raise QmpError(f"Class '{typename:.100}' not found", "DeviceNotFound")
