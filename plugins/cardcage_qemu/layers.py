"""Overlays that come and go while a guest uses its disk: ``blockdev-snapshot``, ``block-commit``, ``transaction``.

The device has another drive from then on (``cardcage_hotplug.control.change_drive``): the images are opened anew, as by
a machine that starts with them, so an overlay's own header has to name what it stands on.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypedDict

from cardcage.errors import StateError
from cardcage_block.chain import find_below
from cardcage_block.header import Header
from cardcage_block.hostfile import HostFile
from cardcage_block.make import Qcow2Shape, create_qcow2, create_raw
from cardcage_block.tables import read_bytes
from cardcage_hotplug.control import change_drive
from cardcage_qmp import QmpError, Session
from cardcage_qmp.jobs import GaveUp, Job, begin, begin_job, change
from cardcage_qmp.parts import alias, disks

from cardcage_qemu.coming import _unused, changed

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.machine import PluggedDevice

    from cardcage_qemu.coming import Added

__all__ = ["block_commit", "blockdev_create", "blockdev_snapshot", "blockdev_snapshot_sync", "hmp_snapshot_blkdev"]
__all__ += ["transaction"]

LOOK = 0.2
"""Seconds between two looks at what a guest has written since its overlay and the image below it were equal."""


class BlockdevSnapshot(TypedDict):
    """The node that a disk has, and the overlay that it is to have."""

    node: str
    overlay: str


BlockdevSnapshotSync = TypedDict(
    "BlockdevSnapshotSync",
    {
        "device": NotRequired[str],
        "node-name": NotRequired[str],
        "snapshot-file": str,
        "snapshot-node-name": NotRequired[str],
        "format": NotRequired[Literal["qcow2"]],
        "mode": NotRequired[Literal["existing", "absolute-paths"]],
    },
)


class OfSnapshot(TypedDict):
    """An overlay that was described before."""

    type: Literal["blockdev-snapshot"]
    data: BlockdevSnapshot


class OfSnapshotSync(TypedDict):
    """An overlay that is made, or opened by its name."""

    type: Literal["blockdev-snapshot-sync"]
    data: BlockdevSnapshotSync


CreateQcow2 = TypedDict(
    "CreateQcow2",
    {
        "driver": Literal["qcow2"],
        "file": str,
        "size": int,
        "version": NotRequired[Literal["v2", "v3"]],
        "backing-file": NotRequired[str],
        "backing-fmt": NotRequired[Literal["raw", "qcow2"]],
        "cluster-size": NotRequired[int],
        "refcount-bits": NotRequired[int],
        "lazy-refcounts": NotRequired[bool],
        "preallocation": NotRequired[Literal["off"]],
    },
)


class CreateFile(TypedDict):
    """A file that is a hole."""

    driver: Literal["file"]
    filename: str
    size: int
    preallocation: NotRequired[Literal["off"]]


class CreateRaw(TypedDict):
    """A node's file that gets another size."""

    driver: Literal["raw"]
    file: str
    size: int


def blockdev_create(session: Session, options: CreateQcow2 | CreateFile | CreateRaw, job_id: str) -> None:
    """Make an image, as a job: a file, or in that of a node the image."""
    table: dict[str, Any] = dict(options)
    with changed(session) as there:
        if table["driver"] == "file":
            path = table["filename"]
        elif (spec := there.line.nodes.get(table["file"])) is None or "file" not in spec:
            raise QmpError(f"Cannot find device='' nor node-name='{table['file']:.100}'")
        else:
            _unused(session, there.line, table["file"])
            path = spec["file"]
    work: Callable[[], object]
    if table["driver"] == "qcow2":
        shape = Qcow2Shape(
            table.get("cluster-size", 65536),
            2 if table.get("version") == "v2" else 3,
            table.get("refcount-bits", 16),
            table.get("lazy-refcounts", False),
            table.get("backing-file"),
            table.get("backing-fmt"),
        )
        work = partial(create_qcow2, path, table["size"], shape, force=True)
    else:
        work = partial(create_raw, path, table["size"], force=table["driver"] == "raw")
    begin_job(session, job_id, "create", work)


def _disk(session: Session, name: str) -> tuple[PluggedDevice, Any]:
    """The device whose disk is *name*, a node or the device itself, and its back end. Raises QmpError."""
    for plugged, backend in disks(session.machine):
        if backend is not None and name in (plugged.id, alias(session, plugged.id)):
            return plugged, backend
    raise QmpError(f"Cannot find device='{name:.100}' nor node-name='{name:.100}'", "DeviceNotFound")


def _images(plugged: PluggedDevice, backend: Any) -> list[dict[str, Any]]:
    """The images of a disk, the guest's own first. Raises QmpError for one that has none."""
    found: list[dict[str, Any]] = list(backend.layers()) if hasattr(backend, "layers") else []
    if not found or not os.path.exists(found[0]["filename"]):
        raise QmpError(f"the disk of device '{plugged.id}' is no image file")
    return found


def _overlaid(session: Session, there: Added, name: str, spec: dict[str, Any], overlay: str) -> Callable[[], None]:
    """Have the disk *name* stand on an overlay, which *spec* describes and which is called *overlay*; what undoes that.

    Raises QmpError, and what opening it raises.
    """
    machine, control = session.machine, session.control
    plugged, backend = _disk(session, name)
    images = _images(plugged, backend)
    if spec.get("format") != "qcow2" or spec.get("readonly"):
        raise QmpError(f"The overlay '{overlay}' has to be a qcow2 image that can be written")
    base, path = images[0]["filename"], spec["file"]
    file = HostFile(path, writable=False)
    try:
        header = Header.parse(lambda at, size: read_bytes(file, at, size), path)
    finally:
        file.close()
    below = find_below(path, header.backing_file, header.backing_format) if header.backing_file else None
    if below is None or not os.path.exists(below.path) or not os.path.samefile(below.path, base):
        raise QmpError(f"The header of '{path}' has to name '{base}' as its backing file")
    if header.size != backend.info.size:
        raise QmpError(f"The overlay '{overlay}' has {header.size} bytes, not {backend.info.size}")
    before = plugged.config.options["drive"]
    node, known = alias(session, plugged.id), control.names.get(plugged.id)
    kept = {**spec, "backing": [os.path.abspath(one["filename"]) for one in images]}
    change_drive(machine, plugged.id, kept)
    control.names[plugged.id] = overlay
    there.line.drives.setdefault(overlay, (spec, {}))
    stood = there.line.below.get(overlay)
    there.line.below[overlay] = (stood or set()) | {node}

    def undo() -> None:
        change_drive(machine, plugged.id, before)
        control.names.pop(plugged.id)
        if known is not None:
            control.names[plugged.id] = known
        there.line.below.pop(overlay)
        if stood is not None:
            there.line.below[overlay] = stood

    return undo


def _snapshot(session: Session, there: Added, data: BlockdevSnapshot) -> Callable[[], None]:
    overlay = data["overlay"]
    if (spec := there.line.nodes.get(overlay)) is None or "file" not in spec:
        raise QmpError(f"Cannot find device='{overlay:.100}' nor node-name='{overlay:.100}'")
    _unused(session, there.line, overlay)
    if above := next((name for name, below in there.line.below.items() if overlay in below), None):
        raise QmpError(f"Node '{overlay}' is busy: node is used as part of '{above}'")
    return _overlaid(session, there, data["node"], spec, overlay)


def _snapshot_sync(session: Session, there: Added, data: BlockdevSnapshotSync) -> Callable[[], None]:
    name, path = data.get("device", data.get("node-name")), os.path.abspath(data["snapshot-file"])
    if name is None or ("device" in data and "node-name" in data):
        raise QmpError("expected one of 'device' and 'node-name'")
    overlay = data.get("snapshot-node-name") or f"#block-{os.path.basename(path)}"
    if overlay in there.line.drives:
        raise QmpError(f"Duplicate nodes with node-name='{overlay:.100}'")
    made = data.get("mode", "absolute-paths") == "absolute-paths"
    if made:
        plugged, backend = _disk(session, name)
        top = _images(plugged, backend)[0]
        shape = Qcow2Shape(backing_file=os.path.abspath(top["filename"]), backing_format=top["format"])
        create_qcow2(path, backend.info.size, shape, force=os.path.exists(path) and not os.path.getsize(path))
    try:
        spec = {"file": path, "format": "qcow2", "discard": "unmap"}
        undo = _overlaid(session, there, name, spec, overlay)
        there.line.nodes[overlay] = spec
    except BaseException:
        if made:
            os.unlink(path)
        raise

    def undone() -> None:
        undo()
        del there.line.nodes[overlay], there.line.drives[overlay]
        if made:
            os.unlink(path)

    return undone


def blockdev_snapshot(session: Session, data: BlockdevSnapshot, /) -> None:
    """Have a disk stand on an overlay, which ``blockdev-add`` has described: what it was stays as it is."""
    with changed(session) as there, session.machine.lock:
        _snapshot(session, there, data)


def blockdev_snapshot_sync(session: Session, data: BlockdevSnapshotSync, /) -> None:
    """Make an overlay, or take an *existing* one, and have a disk stand on it."""
    with changed(session) as there, session.machine.lock:
        _snapshot_sync(session, there, data)


def transaction(session: Session, actions: list[OfSnapshot | OfSnapshotSync]) -> None:
    """Overlays for several disks at one moment, or, where one fails, for none."""
    with changed(session) as there, session.machine.lock, ExitStack() as undoing:
        for one in actions:
            if one["type"] == "blockdev-snapshot":
                undoing.callback(_snapshot(session, there, one["data"]))
            else:
                undoing.callback(_snapshot_sync(session, there, one["data"]))
        undoing.pop_all()


def hmp_snapshot_blkdev(session: Session, words: list[str]) -> str:
    """``snapshot_blkdev [-n] DEVICE FILE [FORMAT]``; with ``-n`` the file is there."""
    options, rest = [one for one in words if one.startswith("-")], [one for one in words if not one.startswith("-")]
    if not 2 <= len(rest) <= 3 or options not in ([], ["-n"]):
        raise QmpError("expected snapshot_blkdev [-n] DEVICE FILE [FORMAT]")
    asked: dict[str, Any] = {"device": rest[0], "snapshot-file": rest[1], "format": [*rest, "qcow2"][2]}
    asked["mode"] = "existing" if options else "absolute-paths"
    session.run("blockdev-snapshot-sync", asked)
    return ""


def block_commit(
    session: Session,
    device: str,
    job_id: str | None = None,
    base_node: str | None = None,
    base: str | None = None,
    top_node: str | None = None,
    top: str | None = None,
    auto_finalize: bool = True,
    auto_dismiss: bool = True,
) -> None:
    """Merge a disk's overlay into an image below it, by default the lowest, as a job; once that is ready,
    ``job-complete`` has the disk stand on that image."""
    machine = session.machine
    if not auto_finalize:
        raise QmpError("Parameter 'auto-finalize': a job ends by itself here")
    with changed(session) as there, machine.lock:
        plugged, backend = _disk(session, device)
        images, node = _images(plugged, backend), alias(session, plugged.id)
        if top_node not in (None, node) or (top is not None and not _same(top, images[0]["filename"])):
            raise QmpError("Parameter 'top-node': cardcage merges the image that the guest writes, and no other")
        wanted = _below(there, plugged, images, base_node, base)
        before = plugged.config.options["drive"]
        if isinstance(before, str):
            before = {"file": images[0]["filename"]}
        if before.get("type", "drive") not in ("drive", "qcow2"):
            raise QmpError(f"the disk of device '{plugged.id}' is no overlay in an image file")
        files = [os.path.abspath(one["filename"]) for one in images]
        spec = {**before, "type": "commit", "format": "qcow2", "backing": files[1:], "into": wanted["filename"]}
        change_drive(machine, plugged.id, spec)
    known = [name for name, one in there.line.nodes.items() if _same(one.get("file", ""), spec["into"])]
    known.sort(key=lambda name: (name != base_node, "format" not in there.line.nodes[name]))
    keys = {key: before[key] for key in ("cache", "discard", "locking") if key in before}
    after = {**keys, "file": spec["into"], "format": wanted["format"]}
    if (at := images.index(wanted) + 1) < len(images):
        after["backing"] = files[at:]
    id = plugged.id
    job = Job(job_id or id, "commit", total=int(backend.info.size), block=True, auto=auto_dismiss)

    def back(drive: Any) -> None:
        with machine.lock:
            if machine.devices.get(id) is plugged:  # else it was taken out meanwhile
                change_drive(machine, id, drive)

    def work(job: Job) -> None:
        committing = next((one for at, one in disks(machine) if at is plugged), None)
        if committing is None:
            raise StateError(f"device '{id}' is gone")
        try:
            _merged(session, job, committing)
            back(after)
        except BaseException:
            committing.give_up()
            back(before)
            raise
        session.control.names[id] = known[0] if known else f"#block-{id}-base"

    try:
        begin(session, job, work)
    except BaseException:
        back(before)
        raise


def _same(one: str, other: str) -> bool:
    return os.path.exists(one) and os.path.exists(other) and os.path.samefile(one, other)


def _below(
    there: Added, plugged: PluggedDevice, images: list[dict[str, Any]], node: str | None, path: str | None
) -> dict[str, Any]:
    """The image that is meant. Raises QmpError."""
    if len(images) < 2:
        raise QmpError(f"the disk of device '{plugged.id}' stands on no other image")
    if node is None and path is None:
        return images[-1]
    for depth, one in enumerate(images[1:], 1):
        spec = there.line.nodes.get(node or "", {})
        if node == f"#block-{plugged.id}-{depth}" or _same(spec.get("file", path or ""), one["filename"]):
            return one
    raise QmpError(f"Node '{node or path}' is none that '{images[0]['filename']}' stands on")


def _merged(session: Session, job: Job, committing: Any) -> None:
    """Copy, until somebody says that it may be completed. Raises GaveUp, OSError, StateError."""

    def goes_on() -> bool:
        job.done = committing.done
        return job.goes_on()

    def check() -> None:
        if job.cancelled:
            raise GaveUp
        if session.machine.state == "stopped":
            raise StateError("the machine has ended")

    committing.copy(goes_on)
    check()
    while committing.catch_up(job.goes_on):
        check()
    change(session.control, job, "ready")
    while not job.told.wait(LOOK):
        check()
        committing.catch_up(job.goes_on)
    check()
