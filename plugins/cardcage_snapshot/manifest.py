"""The manifest: what a snapshot is of, what it is made of, and the sums by which damage is found.

It is hostile input: bounded, typed, and each file that it names is one of the snapshot's own directory. Its
*configuration* can name all that a machine may open on this host, so it is used by itself only where its *seal* says
that it is that of a machine of this account: a keyed sum, by a key that only this account can read. A machine in a jail
has the seal of its configuration from the time before, and can have none for another.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache
from typing import TYPE_CHECKING, Any

from attrs import Factory, define, field
from attrs.validators import and_, ge, in_, le, matches_re
from cardcage.errors import CardcageError, ConfigError

from cardcage_snapshot.places import NAME, printable
from cardcage_snapshot.sealing import canonical, is_ours

if TYPE_CHECKING:
    from cattrs import Converter

    from cardcage_snapshot.places import Folder, Publication

__all__ = [
    "CHUNKS",
    "FORMAT",
    "MANIFEST",
    "DeviceCard",
    "Disk",
    "File",
    "Manifest",
    "Parent",
    "Ram",
    "chunk_size",
    "converter",
    "decoded",
    "in_one_line",
    "read",
    "written",
]

MANIFEST = "manifest.json"
FORMAT = 2
"""Version of the directory's layout; a reader takes its own and all before it. 2: RAM may have a parent."""
MOST = 4 << 20
"""Bytes of a manifest."""
CHUNKS = 4096
"""Pieces of RAM at most that have a sum of their own."""
LEAST = 1 << 20
DEEPEST = 64
SIZE = and_(ge(0), le(1 << 60))
SUM = matches_re(r"[0-9a-f]{32}")


def in_one_line(of: object, attribute: Any, value: str) -> None:
    """Hold text of a file to one line of letters: it is told in errors, and on terminals."""
    if not value.isprintable():
        raise ValueError(f"{attribute.name}: expected printable text")


def chunk_size(size: int) -> int:
    """Bytes of a piece that has a sum of its own: 1 MiB, more where RAM would have too many."""
    chunk = LEAST
    while -(-size // chunk) > CHUNKS:
        chunk *= 2
    return chunk


@define
class File:
    """A small file that is read whole: its size in bytes, and its sum (blake2b of 16 bytes)."""

    size: int = field(validator=SIZE)
    sum: str = field(validator=SUM)


@define
class Parent:
    """Another snapshot, in the directory of this one's directory, on which RAM is made.

    Attributes:
        name: of its directory. sum: of its manifest. pages: file ``pages`` (see :mod:`cardcage_snapshot.chain`).
    """

    name: str = field(validator=matches_re(NAME))
    sum: str = field(validator=matches_re(r"[0-9a-f]{64}"))
    pages: File


@define
class Ram:
    """How RAM is kept.

    Attributes:
        file: its name in the directory.
        compression: ``none``: the file is RAM byte for byte, with holes where that is zero; ``zstd``: a frame for each
            piece that is not zero, one after another.
        chunk: bytes of a piece, a power of two from 4 KiB.
        chunks: of each piece that is not zero: its number, its offset and length in the file, its sum.
        parent: the snapshot whose RAM this is made on; the file has only what is other, and zeros elsewhere.
    """

    file: str
    compression: str = field(validator=in_(("none", "zstd")))
    chunk: int = field(validator=in_([1 << at for at in range(12, 49)]))
    chunks: list[tuple[int, int, int, str]] = Factory(list)
    parent: Parent | None = None


@define
class Disk:
    """A device's disk at the same point.

    Attributes:
        device: id. file: its name in the directory; empty for one that the guest only reads, which stays at *path*.
        format: ``raw`` or ``qcow2``. size: bytes of the disk. length: of the file. modified: of *path*, nanoseconds.
        sum: of the file. path: where the image was.
    """

    device: str = field(validator=in_one_line)
    format: str = field(validator=in_(("raw", "qcow2")))
    size: int = field(validator=SIZE)
    length: int = field(validator=SIZE)
    file: str = ""
    sum: str = ""
    path: str = ""
    modified: int = 0


@define
class DeviceCard:
    """Whose a device is: the type that a configuration names, its card, the card's distribution and that's release."""

    id: str = field(validator=in_one_line)
    type: str = field(validator=in_one_line)
    card: str = field(default="", validator=in_one_line)
    distribution: str = field(default="", validator=in_one_line)
    release: str = field(default="", validator=in_one_line)


@define
class Manifest:
    """All that is said about a snapshot.

    Attributes:
        cardcage: the version that made it. made: seconds since 1970. machine: name. label: security label.
        memory: bytes. cpus: number. accelerator: that ran it. processor, kernel: of the host.
        config: tables as of a TOML file, with ``defaults``: assignments to devices of the platform. seal: see above.
        devices: those of the machine, in their order. agent: an agent answered in the guest.
        state: the file ``state.json``. ram, disks: see there.
        sum: of the file that it was read from; empty for one that was not.
    """

    cardcage: str = field(validator=in_one_line)
    made: float
    machine: str = field(validator=in_one_line)
    label: str = field(validator=in_one_line)
    memory: int = field(validator=[ge(1 << 12), le(1 << 48)])
    cpus: int = field(validator=[ge(1), le(255)])
    accelerator: str = field(validator=in_one_line)
    config: dict[str, Any]
    devices: list[DeviceCard]
    state: File
    ram: Ram
    seal: str = field(default="", validator=matches_re(r"([0-9a-f]{64})?"))
    disks: list[Disk] = Factory(list)
    agent: bool = False
    processor: str = field(default="", validator=in_one_line)
    kernel: str = field(default="", validator=in_one_line)
    sum: str = field(default="", init=False, eq=False)

    def check(self, where: str) -> None:
        """Hold the parts to each other. Raises ConfigError."""
        pieces = -(-self.memory // self.ram.chunk)
        last, end = -1, 0
        for number, offset, length, sum in self.ram.chunks:
            fits = last < number < pieces and 0 < length <= self.ram.chunk + 4096 and len(sum) == 32
            if (
                not fits
                or offset > self.memory + pieces * 4096
                or offset < (end if self.ram.compression == "zstd" else 0)
            ):
                raise ConfigError(f"piece {number} of RAM is out of place", file=where, key="ram.chunks")
            if self.ram.compression == "none" and offset != number * self.ram.chunk:
                raise ConfigError(f"piece {number} of RAM is out of place", file=where, key="ram.chunks")
            last, end = number, offset + length
        if self.ram.chunk > (most := chunk_size(self.memory)):
            raise ConfigError(f"pieces of {self.ram.chunk} bytes: expected at most {most}", file=where, key="ram.chunk")
        if self.ram.parent is not None and self.ram.chunk != most:
            raise ConfigError(f"pieces of {self.ram.chunk} bytes: expected {most}", file=where, key="ram.chunk")
        if pieces > CHUNKS:
            raise ConfigError(f"{pieces} pieces of RAM: expected at most {CHUNKS}", file=where, key="ram.chunk")


@cache
def converter() -> Converter:
    """The converter of attrs classes and JSON."""
    from cattrs.gen import make_dict_unstructure_fn, override
    from cattrs.preconf.json import make_converter

    made = make_converter(forbid_extra_keys=True)
    without = make_dict_unstructure_fn(Ram, made, parent=override(omit_if_default=True))  # as format 1 has it
    made.register_unstructure_hook(Ram, without)
    return made


def decoded(data: bytes, where: str) -> Any:
    """JSON in *data*. Raises ConfigError for anything else, and for what is nested too deeply."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not JSON: {error}", file=where) from error
    level: list[Any] = [found]
    for _ in range(DEEPEST):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [one for values in inner for one in values if isinstance(one, dict | list)]
        if not level:
            return found
    raise ConfigError(f"nested deeper than {DEEPEST}", file=where)


def written(manifest: Manifest, into: Publication) -> None:
    """Write the manifest."""
    table = converter().unstructure(manifest)
    sum = hashlib.sha256(canonical(table)).hexdigest()
    version = 1 if manifest.ram.parent is None else FORMAT
    text = json.dumps({"cardcage snapshot": version, "sum": sum, "manifest": table}, indent=1)
    into.write(MANIFEST, text.encode())


def read(folder: Folder) -> tuple[Manifest, bool]:
    """The manifest, and whether its configuration is that of a machine of this account.

    Raises ConfigError that names the file and what is wrong.
    """
    where = folder.where(MANIFEST)
    outer = decoded(folder.read(MANIFEST, MOST), where)
    version = outer.get("cardcage snapshot") if isinstance(outer, dict) else None
    if type(version) is not int or version < 1:
        raise ConfigError('no manifest of a snapshot: expected "cardcage snapshot" and its version', file=where)
    table = outer.get("manifest")
    if version > FORMAT:
        by = table.get("cardcage") if isinstance(table, dict) else None
        who = f" (written by cardcage {by!r:.40})" if isinstance(by, str) else ""
        raise ConfigError(f"is of format {version}{who}: this cardcage reads format {FORMAT}", file=where)
    sum = outer.get("sum")
    if not isinstance(table, dict) or not isinstance(sum, str):
        raise ConfigError("expected manifest and sum", file=where)
    if hashlib.sha256(canonical(table)).hexdigest() != sum:
        raise ConfigError("is damaged: its sum is not that of its contents", file=where)
    try:
        found = converter().structure(table, Manifest)
        found.check(where)
        found.sum = sum
    except CardcageError:
        raise
    except Exception as error:  # a damaged file can be wrong in every way that cattrs knows
        from cattrs import transform_error

        raise ConfigError(f"does not fit: {printable('; '.join(transform_error(error)))[:500]}", file=where) from error
    return found, is_ours(found.config, found.label, found.seal)
