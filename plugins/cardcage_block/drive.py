"""Drives: the options that name an image, their shorthands, and opening an image with all that it stands on."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Literal, Protocol

from attrs import evolve, fields
from cardcage.config import HostPath
from cardcage.errors import ConfigError
from cardcage.pairs import join_pairs, parse_repeated, split_pairs, typed_pairs
from cardcage.registry import BackendOffer
from cardcage.values import frozen

from cardcage_block.chain import Below, Fence, find_below
from cardcage_block.formats import detect, refuse_foreign, shown
from cardcage_block.header import INCOMPAT_DIRTY, Header
from cardcage_block.hostfile import HostFile
from cardcage_block.locks import lock_image
from cardcage_block.qcow2 import Qcow2Image
from cardcage_block.raw import RawImage
from cardcage_block.tables import read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cardcage.device import Slot
    from cardcage.host import Host

    from cardcage_block.hostfile import Image

__all__ = ["Allow", "Drive", "allow_all", "open_drive", "open_image", "open_qcow2", "open_raw", "parse_drive_flag"]

MAX_CHAIN = 1024
"""Images below one another; qemu-img reads chains of about a thousand."""


@frozen
class Drive:
    """A disk image.

    Attributes:
        file: path of the image file or block device.
        format: of the image. ``auto`` looks at it; a raw image should be called raw
            (see :class:`~cardcage_block.raw.RawImage`).
        readonly: the guest cannot write.
        cache: ``writeback`` uses the host's page cache, ``none`` goes past it (O_DIRECT), ``unsafe`` ignores flushes.
        discard: ``unmap`` gives what the guest discards back to the host.
        shared: other machines may write it too (a cluster file system): not locked, and not labelled for one machine.
        locking: ``auto`` locks where the file system can, ``on`` insists, ``off`` does not.
        backing: which files may stand below a qcow2 image, whatever its header names: ``folder`` (those of its own
            folder), ``none``, ``any``, or paths of more files and folders.
    """

    file: HostPath
    format: Literal["auto", "raw", "qcow2"] = "auto"
    readonly: bool = False
    cache: Literal["writeback", "none", "unsafe"] = "writeback"
    discard: Literal["unmap", "ignore"] = "unmap"
    locking: Literal["auto", "on", "off"] = "auto"
    shared: bool = False
    backing: str | tuple[str, ...] = "folder"


def open_drive(slot: Slot, options: Drive) -> Image:
    """Back end ``block:drive``: an image of whichever format. Raises ConfigError or HostError."""
    return open_image(options, warn=slot.log.warning, allow=allowed(slot, options))


def open_raw(slot: Slot, options: Drive) -> Image:
    """Back end ``block:raw``."""
    return open_image(evolve(options, format="raw"), warn=slot.log.warning, allow=allowed(slot, options))


def open_qcow2(slot: Slot, options: Drive) -> Image:
    """Back end ``block:qcow2``."""
    return open_image(evolve(options, format="qcow2"), warn=slot.log.warning, allow=allowed(slot, options))


class Allow(Protocol):
    """Asks for permission to use an image, before it is opened. Raises Denied."""

    def __call__(self, path: str, acts: tuple[str, ...], /, **facts: Any) -> None: ...


def allowed(slot: Slot, options: Drive) -> Allow:
    """Return a function that asks in the name of a device."""

    def ask(path: str, acts: tuple[str, ...], /, **facts: Any) -> None:
        slot.host.ask("image", path, acts, readonly="write" not in acts, shared=options.shared, **facts)

    return ask


def allow_all(path: str, acts: tuple[str, ...], /, **facts: Any) -> None:
    """Ask nobody."""


@frozen
class Layer:
    """One opened file of a chain. ``header`` is None for a raw one, ``path`` as its user or the image above says it."""

    file: HostFile
    path: str
    header: Header | None
    written: bool


def open_image(
    drive: Drive,
    *,
    warn: Callable[[str], object],
    allow: Allow = allow_all,
    repair: bool = True,
    into: str | None = None,
) -> Image:
    """Open an image and its backing chain.

    Args:
        drive: which, and how.
        warn: called with a sentence for a person.
        allow: asked with its path and what is to be done before each file is opened; raises Denied. A backing file is
            called by its real path, with the fact ``backing``: the image that names it.
        repair: put the reference counts of an image right that was not closed (its dirty bit is set) before writing it.
        into: the real path of an image below, which is opened to be written too.

    Raises :exc:`~cardcage.errors.ConfigError` for an image that is missing, damaged or of another kind, and for a
    backing file that the drive does not allow; :exc:`~cardcage.errors.HostError` for an image in use.
    """
    with ExitStack() as failing:
        layers = _open_chain(drive, warn, allow, repair, failing, into)
        image: Image | None = None
        while layers:
            one = layers.pop()
            readonly, discard = not one.written, drive.discard == "unmap"
            with _blamed(one.path, drive.file):
                if one.header is None:
                    guessed = drive.format == "auto" and not readonly
                    image = RawImage(one.file, readonly=readonly, discard=discard, guessed=guessed)
                else:
                    image = Qcow2Image(
                        one.file, one.header, backing=image, readonly=readonly, discard=discard, warn=warn
                    )
        assert image is not None
        failing.pop_all()
        return image


def _open_chain(
    drive: Drive,
    warn: Callable[[str], object],
    allow: Allow,
    repair: bool,
    failing: ExitStack,
    into: str | None = None,
) -> list[Layer]:
    """The image, and what it stands on, from top to bottom; *failing* closes the files."""
    fence = Fence(drive.file, drive.backing)
    layers: list[Layer] = []
    seen: set[tuple[int, int]] = set()
    facts: dict[str, Any] = {}
    below, real = Below(drive.file, drive.format), drive.file
    while True:
        if len(layers) > MAX_CHAIN:
            raise ConfigError(f"the backing chain is longer than {MAX_CHAIN} images", file=drive.file)
        # The whole chain is changed by nobody else: the files below are opened and locked for reading.
        write = real == into if layers else not drive.readonly
        with _blamed(below.path, drive.file):
            allow(real, ("open", "read", "write") if write else ("open", "read"), **facts)
            file = HostFile(real, writable=write, direct=drive.cache == "none", stable=drive.cache != "unsafe")
            failing.callback(file.close)
            file.path, file.shared = shown(below.path), drive.shared
            status = os.fstat(file.fd)
            if (status.st_dev, status.st_ino) in seen:
                raise ConfigError("the backing chain loops: this image is its own backing file", file=file.path)
            seen.add((status.st_dev, status.st_ino))
            _lock(file, drive, write, warn)
            layers.append(Layer(file, below.path, _read_header(file, below, write and repair, warn), write))
            if write and below.format == "auto" and layers[0].header is None:
                warn(
                    f"{drive.file}: no format given, assuming raw: the guest may not write another format's magic "
                    "number at its beginning. Use format=raw to allow all writes"
                )
            header = layers[-1].header
            if header is None or header.backing_file is None:
                return layers
            above, below = below.path, find_below(below.path, header.backing_file, header.backing_format)
            real, facts = fence.admit(above, below.path), {"backing": above}
            if below.format is None:
                warn(f"{above}: does not state the format of its backing file {shown(below.path)}, which is detected")
                below = evolve(below, format="auto")
            elif below.format not in ("raw", "qcow2"):
                raise ConfigError(
                    f'backing file {shown(below.path)} is of format "{shown(below.format)}": expected raw or qcow2',
                    file=above,
                )


def _lock(file: HostFile, drive: Drive, write: bool, warn: Callable[[str], object]) -> None:
    if drive.locking == "off" or drive.shared:
        return
    file.lock = write, drive.locking == "on"
    if not lock_image(file.fd, file.path, write=write, required=drive.locking == "on"):
        warn(f"{file.path}: its file system has no locks: nothing prevents another machine from writing to it")


def _read_header(file: HostFile, below: Below, repair: bool, warn: Callable[[str], object]) -> Header | None:
    """The header of a qcow2 image, None for a raw one. Raises ConfigError for other formats."""
    form = below.format
    if form == "auto":
        form = detect(file)
        refuse_foreign(form, file.path)
    if form == "raw":
        return None
    header = Header.parse(lambda at, size: read_bytes(file, at, size), file.path)
    if header.incompatible & INCOMPAT_DIRTY and repair:
        from cardcage_block.check import repair_counts

        warn(f"{file.path}: was not closed: its reference counts are being rebuilt")
        repair_counts(file, header)
    return header


@contextmanager
def _blamed(path: str, top: str) -> Iterator[None]:
    """Errors about the file at *path* name the image *top* that the user named."""
    try:
        yield
    except (ConfigError, OSError) as error:
        if isinstance(error, ConfigError) and path == top:
            raise
        found = str(error)
        if isinstance(error, OSError):
            found = f"cannot be read: {error.strerror or error}"
            if path == top:
                raise ConfigError(found, file=top) from error
            found = f"{path}: {found}"
        raise ConfigError(f"its backing file: {shown(found)}", file=top) from error


def parse_file(text: str) -> dict[str, Any]:
    """Shorthand of a drive: the path of the image."""
    if not text:
        raise ValueError("expected the path of an image")
    return {"file": text}


_DISCARD = {"unmap": "unmap", "on": "unmap", "ignore": "ignore", "off": "ignore"}


@frozen
class _Disk:
    """The keys of ``--drive`` that are not the back end's."""

    id: str = ""
    serial: str = ""
    queues: int = 1
    logical_block: int = 512
    physical_block: int = 512
    werror: str = ""
    rerror: str = ""
    type: str = ""


def parse_drive_flag(text: str, host: Host) -> dict[str, Any]:
    """``--drive file=root.qcow2,format=qcow2,readonly=on`` as a ``virtio-blk`` device; a bare path will do.

    ``type=NAME``, or ``NAME:`` before all else, is a back end of whichever card, and what is left are its options. Else
    the keys are those of :class:`Drive`. The device's are those of :class:`_Disk`. Raises :exc:`ValueError`, or
    NotOffered.
    """
    parts = split_pairs(text)
    disk: dict[str, Any] = {}
    name, colon, first = parts[0].partition(":")
    offers = {one.name for one in host.registry.offers(BackendOffer)}
    named = bool(colon) and "=" not in name and f"block:{name}" in offers
    own = [first] if named else []
    for part in parts[named:]:
        key, equals, value = part.partition("=")
        if equals and key == "if":
            if value not in ("virtio", "none"):
                raise ValueError(f"if={value}: only virtio disks are supported")
        elif equals and key in {one.name for one in fields(_Disk)}:
            if key in disk:
                raise ValueError(f'"{key}" is given twice')
            disk |= typed_pairs([(key, value)], _Disk)
        else:
            own.append(part)
    kind = name if named else disk.pop("type", "")
    if not kind:
        return {"device": [{"type": "virtio-blk", **disk, "drive": _image(own)}]}
    offer = host.registry.get(BackendOffer, f"block:{kind}")
    pairs = [] if named or not own else parse_repeated(join_pairs(own))
    table = host.expand(offer, join_pairs(own)) if named else typed_pairs(pairs, offer.load_options())
    return {"device": [{"type": "virtio-blk", **disk, "drive": {"type": kind, **table}}]}


def _image(parts: list[str]) -> dict[str, Any]:
    """The table of an image file, with QEMU's words for ``discard``."""
    drive = typed_pairs(parse_repeated(join_pairs(parts), "file") if parts else [], Drive)
    if (discard := drive.get("discard", "unmap")) not in _DISCARD:
        raise ValueError(f"discard={discard}: expected unmap or ignore")
    if "discard" in drive:
        drive["discard"] = _DISCARD[discard]
    if not drive.get("file"):
        raise ValueError("file=PATH is missing")
    return drive
