"""Drives: the options that name an image, their shorthands, and opening an image with all that it stands on."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, Any, Literal

from attrs import evolve, fields, frozen
from cardcage.errors import ConfigError
from cardcage.pairs import join_pairs, parse_repeated, split_pairs, typed_pairs
from cardcage.registry import BackendOffer

from cardcage_block.header import INCOMPAT_DIRTY, MAGIC, Header
from cardcage_block.hostfile import HostFile
from cardcage_block.locks import lock_image
from cardcage_block.qcow2 import Qcow2Image
from cardcage_block.raw import RawImage
from cardcage_block.tables import read_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.device import Slot
    from cardcage.host import Host

    from cardcage_block.hostfile import Image

    Allow = Callable[[str, tuple[str, ...]], None]

__all__ = ["Drive", "open_drive", "open_image", "open_qcow2", "open_raw", "parse_drive_flag"]

MAX_CHAIN = 64


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
    """

    file: str
    format: Literal["auto", "raw", "qcow2"] = "auto"
    readonly: bool = False
    cache: Literal["writeback", "none", "unsafe"] = "writeback"
    discard: Literal["unmap", "ignore"] = "unmap"
    locking: Literal["auto", "on", "off"] = "auto"
    shared: bool = False


def open_drive(slot: Slot, options: Drive) -> Image:
    """Back end ``block:drive``: an image of whichever format. Raises ConfigError or HostError."""
    return open_image(options, warn=slot.log.warning, allow=allowed(slot, options))


def open_raw(slot: Slot, options: Drive) -> Image:
    """Back end ``block:raw``."""
    return open_image(evolve(options, format="raw"), warn=slot.log.warning, allow=allowed(slot, options))


def open_qcow2(slot: Slot, options: Drive) -> Image:
    """Back end ``block:qcow2``."""
    return open_image(evolve(options, format="qcow2"), warn=slot.log.warning, allow=allowed(slot, options))


def allowed(slot: Slot, options: Drive) -> Allow:
    """Return a function that asks for permission to use an image, before it is opened."""

    def ask(path: str, acts: tuple[str, ...]) -> None:
        slot.host.ask("image", path, acts, readonly="write" not in acts, shared=options.shared)

    return ask


def _allow_all(path: str, acts: tuple[str, ...]) -> None:
    pass


def open_image(
    drive: Drive,
    *,
    warn: Callable[[str], object],
    allow: Allow = _allow_all,
    repair: bool = True,
    above: tuple[tuple[int, int], ...] = (),
) -> Image:
    """Open an image and its backing chain.

    Args:
        drive: which, and how.
        warn: called with a sentence for a person.
        allow: asked with its path and what is to be done before each file is opened; raises Denied.
        repair: put the reference counts of an image right that was not closed (its dirty bit is set) before writing it.
        above: the files that this file backs, to find a loop.

    Raises :exc:`~cardcage.errors.ConfigError` for an image that is missing, damaged or of another kind and
    :exc:`~cardcage.errors.HostError` for an image in use.
    """
    allow(drive.file, ("open", "read") if drive.readonly else ("open", "read", "write"))
    file = HostFile(
        drive.file, writable=not drive.readonly, direct=drive.cache == "none", stable=drive.cache != "unsafe"
    )
    try:
        status = os.fstat(file.fd)
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            raise ConfigError("the backing chain loops: this image is its own backing file", file=drive.file)
        if len(above) >= MAX_CHAIN:
            raise ConfigError(f"the backing chain is longer than {MAX_CHAIN} images", file=drive.file)
        required = drive.locking == "on"
        if (
            drive.locking != "off"
            and not drive.shared
            and not lock_image(file.fd, drive.file, write=not drive.readonly, required=required)
        ):
            warn(f"{drive.file}: its file system has no locks: nothing prevents another machine from writing to it")
        form = drive.format
        if form == "auto":
            form = "qcow2" if read_bytes(file, 0, 4) == MAGIC else "raw"
        if form == "raw":
            guessed = drive.format == "auto" and not drive.readonly
            if guessed:
                warn(
                    f"{drive.file}: no format given, assuming raw: the guest may not write another format's magic "
                    "number at its beginning. Use format=raw to allow all writes"
                )
            return RawImage(file, readonly=drive.readonly, discard=drive.discard == "unmap", guessed=guessed)
        header = Header.parse(lambda at, size: read_bytes(file, at, size), drive.file)
        if header.incompatible & INCOMPAT_DIRTY and not drive.readonly and repair:
            from cardcage_block.check import repair_counts

            warn(f"{drive.file}: was not closed: its reference counts are being rebuilt")
            repair_counts(file, header)
        backing = _open_backing(drive, header, warn, allow, (*above, identity))
        try:
            discard = drive.discard == "unmap"
            return Qcow2Image(file, header, backing=backing, readonly=drive.readonly, discard=discard, warn=warn)
        except BaseException:
            if backing is not None:
                backing.close()
            raise
    except BaseException as error:
        file.close()
        if isinstance(error, OSError):
            raise ConfigError(f"cannot be read: {error.strerror or error}", file=drive.file) from error
        raise


def backing_path(path: str, name: str) -> str:
    """The path of a backing file that the image at *path* calls *name*. Raises ConfigError for what is not a file."""
    if name.startswith("file:"):
        name = name[5:]
    elif re.match(r"[A-Za-z][A-Za-z0-9+.-]+:", name):
        raise ConfigError(f'backing file "{name}": only files can back an image', file=path)
    return os.path.join(os.path.dirname(path), name)


def _open_backing(
    drive: Drive,
    header: Header,
    warn: Callable[[str], object],
    allow: Allow,
    above: tuple[tuple[int, int], ...],
) -> Image | None:
    if header.backing_file is None:
        return None
    below = backing_path(drive.file, header.backing_file)
    form = header.backing_format
    if form is None:
        warn(f"{drive.file}: does not state the format of its backing file {below}, which is detected instead")
    elif form not in ("raw", "qcow2"):
        raise ConfigError(f'backing file {below} is of format "{form}": expected raw or qcow2', file=drive.file)
    try:
        # The whole chain is changed by nobody: the files below are opened and locked for reading.
        known: Literal["auto", "raw", "qcow2"] = "raw" if form == "raw" else "qcow2" if form == "qcow2" else "auto"
        below_drive = evolve(drive, file=below, format=known, readonly=True)
        return open_image(below_drive, warn=warn, allow=allow, above=above)
    except ConfigError as error:
        raise ConfigError(f"its backing file: {error}", file=drive.file) from error


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
    type: str = ""


def parse_drive_flag(text: str, host: Host) -> dict[str, Any]:
    """``--drive file=root.qcow2,format=qcow2,readonly=on`` as a ``virtio-blk`` device; a bare path will do.

    ``type=NAME``, or ``NAME:`` before all else, is a back end of whichever card, and what is left are its options. Else
    the keys are those of :class:`Drive`. The device's are ``id``, ``serial`` and ``queues``. Raises :exc:`ValueError`,
    or NotOffered.
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
