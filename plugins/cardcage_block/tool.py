"""``cardcage image``: create, info, check, resize and convert."""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Literal

from attrs import asdict, evolve
from cardcage.errors import ConfigError, near
from cardcage.pairs import parse_pairs
from cardcage.security import HOST, OPERATOR, Act
from cardcage.units import Size

from cardcage_block.chain import Fence, find_below
from cardcage_block.check import check
from cardcage_block.drive import Drive, open_image
from cardcage_block.formats import detect, refuse_foreign, shown
from cardcage_block.header import COMPAT_LAZY, INCOMPAT_CORRUPT, INCOMPAT_DIRTY, Header
from cardcage_block.hostfile import HostFile
from cardcage_block.layout import Tables
from cardcage_block.locks import lock_image
from cardcage_block.make import Qcow2Shape, create_qcow2, create_raw, resize
from cardcage_block.tables import read_bytes

if TYPE_CHECKING:
    import argparse

    from cardcage.host import Host

    from cardcage_block.drive import Allow
    from cardcage_block.hostfile import Image

__all__ = ["configure", "convert", "run"]

CHUNK = 2 << 20
GRAIN = 65536
FORMATS = ("raw", "qcow2")
NAMED = "by default raw for names ending in .raw or .img, otherwise qcow2"


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``cardcage image``."""
    acts = parser.add_subparsers(dest="act", required=True, metavar="create|info|check|resize|convert")
    create = acts.add_parser("create", help="create an empty image")
    create.add_argument("file", help="new image")
    create.add_argument("size", nargs="?", help="such as 20G; by default the size of the backing file")
    create.add_argument("-f", "--format", choices=FORMATS, help=NAMED)
    create.add_argument(
        "-b", "--backing", help="backing file, read where nothing is written; relative to the new image"
    )
    create.add_argument("-F", "--backing-format", choices=FORMATS, help="format of the backing file")
    info = acts.add_parser("info", help="show the format, size and backing file of an image")
    info.add_argument("file", help="image")
    info.add_argument("--backing-chain", action="store_true", help="include the whole backing chain")
    checker = acts.add_parser("check", help="look for damage and leaks (status 0 if sound, 2 if damaged, 3 if leaking)")
    checker.add_argument("file", help="image")
    checker.add_argument("--repair", choices=("leaks", "all"), default="", help="what to repair")
    sizer = acts.add_parser("resize", help="change the size of the disk")
    sizer.add_argument("file", help="image")
    sizer.add_argument("size", help="new size such as 20G, or an increase such as +5G")
    sizer.add_argument("--shrink", action="store_true", help="allow a smaller size, which discards the end of the disk")
    converter = acts.add_parser("convert", help="copy a disk to a new image")
    converter.add_argument("file", help="image to copy")
    converter.add_argument("target", help="new image")
    converter.add_argument("-O", "--output-format", choices=FORMATS, help=NAMED)
    for one in (create, info, sizer, converter):
        one.add_argument(
            "--allow-backing",
            metavar="PATH",
            default="folder",
            help="a file or folder outside the image's own that may back it; also none or any",
        )
    for one in (create, converter):
        one.add_argument(
            "-o", "--options", default="", help="such as cluster_size=64k,compat=1.1,refcount_bits=16,lazy_refcounts=on"
        )
        one.add_argument("--force", action="store_true", help="overwrite an existing file")
    for one in (sizer, converter):
        one.add_argument("-f", "--format", choices=("auto", *FORMATS), default="auto", help="by default detected")
    for one in (info, checker):
        one.add_argument("--json", action="store_true", help="print JSON")


def run(host: Host, arguments: argparse.Namespace) -> int:
    """Carry out ``cardcage image``; the process's status. Raises ConfigError, HostError and Denied."""

    def allow(path: str, permissions: tuple[str, ...], /, **facts: Any) -> None:
        host.mediator.ask(Act(OPERATOR, HOST, "image", permissions, facts), path)

    acts = {"create": _create, "info": _info, "check": _check, "resize": _resize, "convert": _convert}
    try:
        return acts[arguments.act](arguments, allow)
    except OSError as error:
        raise ConfigError(str(error.strerror or error), file=arguments.file) from error


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def _size(text: str, file: str) -> int:
    try:
        return Size(text)
    except ValueError as error:
        raise ConfigError(str(error), file=file) from error


def _shape(text: str, file: str) -> Qcow2Shape:
    known = ("cluster_size", "compat", "lazy_refcounts", "refcount_bits")
    shape = Qcow2Shape()
    try:
        for key, value in (parse_pairs(text) if text else {}).items():
            if key == "cluster_size":
                shape = evolve(shape, cluster_size=int(Size(value)))
            elif key == "compat" and value in ("0.10", "1.1", "v2", "v3"):
                shape = evolve(shape, version=2 if value in ("0.10", "v2") else 3)
            elif key == "lazy_refcounts" and value in ("on", "off"):
                shape = evolve(shape, lazy_refcounts=value == "on")
            elif key == "refcount_bits" and value.isdecimal():
                shape = evolve(shape, refcount_bits=int(value))
            elif key in known:
                raise ValueError(f"{key}={value}: not a valid value")
            else:
                raise ValueError(f'no option "{key}".{near(key, known) or " Known: " + ", ".join(known)}')
    except ValueError as error:
        raise ConfigError(str(error), file=file) from error
    return shape


def _new_format(asked: Literal["raw", "qcow2"] | None, path: str, options: str) -> Literal["raw", "qcow2"]:
    """The format of a new image. Raises ConfigError for options that it does not take."""
    form: Literal["raw", "qcow2"] = asked or ("raw" if path.lower().endswith((".raw", ".img")) else "qcow2")
    if form == "raw" and options:
        raise ConfigError("a raw image takes no -o options; use the format qcow2", file=path)
    return form


def _create(arguments: argparse.Namespace, allow: Allow) -> int:
    form = _new_format(arguments.format or ("qcow2" if arguments.backing else None), arguments.file, arguments.options)
    size = _size(arguments.size, arguments.file) if arguments.size else None
    shape = _shape(arguments.options, arguments.file)
    allow(arguments.file, ("create", "write"))
    with ExitStack() as held:  # what the new image stands on, with its locks: --force must not overwrite that
        if arguments.backing:
            if form == "raw":
                raise ConfigError("a raw image has no backing file", file=arguments.file)
            below = find_below(arguments.file, arguments.backing).path
            lower: Literal["auto", "raw", "qcow2"] = arguments.backing_format or "auto"
            base = Drive(below, format=lower, readonly=True, backing=arguments.allow_backing)
            image = open_image(base, warn=_warn, allow=allow)
            held.callback(image.close)
            size = image.info.size if size is None else size
            found = arguments.backing_format or _format(below)
            shape = evolve(shape, backing_file=arguments.backing, backing_format=found)
        if size is None:
            raise ConfigError("expected a size, such as 20G", file=arguments.file)
        if form == "raw":
            create_raw(arguments.file, size, force=arguments.force)
        else:
            create_qcow2(arguments.file, -(-size // 512) * 512, shape, force=arguments.force)
    if arguments.backing:
        try:
            Fence(arguments.file).admit(arguments.file, below)
        except ConfigError:
            _warn(
                f"{arguments.file}: a drive of it needs backing={os.path.realpath(below)}, which is not in its folder"
            )
    return 0


def _format(path: str) -> str:
    file = HostFile(path, writable=False)
    try:
        return detect(file)
    finally:
        file.close()


def describe(path: str) -> dict[str, Any]:
    """Return the fields of ``cardcage image info`` for a file. Raises ConfigError."""
    file = HostFile(path, writable=False)
    try:
        status, form = os.fstat(file.fd), detect(file)
        found: dict[str, Any] = {"file": path, "format": form, "virtual-size": file.size()}
        found["actual-size"] = status.st_blocks * 512
        if form == "raw":
            return found
        if form != "qcow2":
            del found["virtual-size"]  # which its own headers would say
            return found | {"unsupported": [f"the format {form}"]}
        header = Header.parse(lambda at, size: read_bytes(file, at, size), path, lenient=True)
        found |= {"virtual-size": header.size, "cluster-size": header.cluster_size}
        found |= {"version": header.version, "refcount-bits": 1 << header.refcount_order}
        found["compression"] = ("zlib", "zstd")[header.compression]
        for key, bit in (("dirty", INCOMPAT_DIRTY), ("corrupt", INCOMPAT_CORRUPT)):
            found[key] = bool(header.incompatible & bit)
        found["lazy-refcounts"] = bool(header.compatible & COMPAT_LAZY)
        if header.backing_file is not None:
            found |= {"backing-file": header.backing_file, "backing-format": header.backing_format}
        if header.data_file is not None:
            found["data-file"] = header.data_file
        if header.lacks:
            return found | {"unsupported": header.lacks}
        tables = Tables(file, header, OSError)
        if tables.snapshots:
            found["snapshots"] = [asdict(one) for one in tables.snapshots]
        return found
    finally:
        file.close()


def _describe_chain(path: str, fence: Fence, allow: Allow, whole: bool) -> list[dict[str, Any]]:
    """The image at *path*, and with *whole* what it stands on, as far as *fence* admits it; the rest is only named."""
    allow(path, ("open", "read"))
    chain = [describe(path)]
    seen = {os.path.realpath(path)}
    while (name := chain[-1].get("backing-file")) is not None:
        above = chain[-1]
        try:
            below = find_below(path, name, above["backing-format"]).path
            above["full-backing-file"] = below
            real = fence.admit(path, below)
        except ConfigError as error:
            above["backing-refused"] = error.problem
            break
        if not whole:
            break
        if real in seen:
            raise ConfigError("the backing chain loops: this image is its own backing file", file=shown(below))
        seen.add(real)
        allow(real, ("open", "read"), backing=path)
        path = below
        chain.append({**describe(real), "file": below})
    return chain


def _info(arguments: argparse.Namespace, allow: Allow) -> int:
    fence = Fence(arguments.file, arguments.allow_backing)
    chain = _describe_chain(arguments.file, fence, allow, arguments.backing_chain)
    if arguments.json:
        print(json.dumps(chain if arguments.backing_chain else chain[0], indent=2))
        return 0
    for at, one in enumerate(chain):
        print(end="\n" if at else "")
        for key, value in one.items():
            if key in ("virtual-size", "actual-size", "cluster-size"):
                value = f"{Size(value)} ({value} bytes)" if value % 1024 == 0 and value else f"{value} bytes"
            elif key == "snapshots":
                value = ", ".join(f"{shot['id']} {shot['name']}" for shot in value)
            elif key == "unsupported":
                value = ", ".join(value)
            elif isinstance(value, bool):
                value = "yes" if value else "no"
            print(f"{key + ':':18} {shown(str(value))}")
    return 0


def _check(arguments: argparse.Namespace, allow: Allow) -> int:
    allow(arguments.file, ("open", "read", "write") if arguments.repair else ("open", "read"))
    file = HostFile(arguments.file, writable=bool(arguments.repair))
    try:
        lock_image(file.fd, arguments.file, write=bool(arguments.repair), required=False)
        form = detect(file)
        refuse_foreign(form, arguments.file)
        if form == "raw":
            raise ConfigError("a raw image has nothing to check", file=arguments.file)
        header = Header.parse(lambda at, size: read_bytes(file, at, size), arguments.file)
        report = check(file, header, fix=arguments.repair)
    finally:
        file.close()
    leaks, corruptions = report.leaks - report.leaks_fixed, report.corruptions - report.corruptions_fixed
    if arguments.json:
        print(json.dumps(asdict(report), indent=2))
    else:
        for problem in report.problems:
            print(problem)
        more = report.leaks + report.corruptions - len(report.problems)
        if more > 0:
            print(f"... and {more} more")
        if report.leaks_fixed or report.corruptions_fixed:
            print(f"repaired: {report.leaks_fixed} leaks, {report.corruptions_fixed} corruptions")
        print(f"{corruptions} corruptions, {leaks} leaks; {report.allocated} of {report.total} clusters allocated")
    return 2 if corruptions else 3 if leaks else 0


def _resize(arguments: argparse.Namespace, allow: Allow) -> int:
    allow(arguments.file, ("open", "read", "write"))
    drive = Drive(arguments.file, format=arguments.format, backing=arguments.allow_backing)
    size = _size(arguments.size.removeprefix("+"), arguments.file)
    if arguments.size.startswith("+"):
        image = open_image(evolve(drive, readonly=True), warn=_warn, allow=allow)
        size += image.info.size
        image.close()
    resize(drive, size, shrink=arguments.shrink, warn=_warn, allow=allow)
    return 0


def _convert(arguments: argparse.Namespace, allow: Allow) -> int:
    form = _new_format(arguments.output_format, arguments.target, arguments.options)
    shape = _shape(arguments.options, arguments.target)
    allow(arguments.target, ("create", "write"))
    drive = Drive(arguments.file, format=arguments.format, readonly=True, backing=arguments.allow_backing)
    source = open_image(drive, warn=_warn, allow=allow)
    try:
        if form == "raw":
            create_raw(arguments.target, source.info.size, force=arguments.force)
        else:
            create_qcow2(arguments.target, source.info.size, shape, force=arguments.force)
        try:
            _fill(source, Drive(arguments.target, format=form))
        except BaseException:  # half a copy looks like a whole one
            os.unlink(arguments.target)
            raise
    finally:
        source.close()
    return 0


def _fill(source: Image, drive: Drive) -> None:
    target = open_image(drive, warn=_warn)
    try:
        convert(source, target)
        target.flush()
    finally:
        target.close()


def convert(source: Image, target: Image) -> None:
    """Copy what is not zeros of *source* into *target*, which is all zeros and as large. Errors are OSError."""
    size, at = source.info.size, 0
    room = memoryview(bytearray(CHUNK))
    nothing = bytes(GRAIN)
    while at < size:
        has_data, end = source.data(at, size)
        while has_data and at < end:
            length = min(end - at, CHUNK - at % GRAIN)
            length = -(-length // 512) * 512
            source.readv(at, [room[:length]])
            for start, stop in _filled(room[:length], nothing):
                target.writev(at + start, [room[start:stop]])
            at += length
        at = max(at, end)


def _filled(data: memoryview, nothing: bytes) -> list[tuple[int, int]]:
    """The stretches of *data*, in grains, that are not zeros."""
    found: list[tuple[int, int]] = []
    for start in range(0, len(data), GRAIN):
        piece = data[start : start + GRAIN]
        if piece == nothing[: len(piece)]:
            continue
        if found and found[-1][1] == start:
            found[-1] = (found[-1][0], start + len(piece))
        else:
            found.append((start, start + len(piece)))
    return found
