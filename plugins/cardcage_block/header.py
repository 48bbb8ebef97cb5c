"""The qcow2 header, its extensions and the snapshot table, each length and offset checked: an image may be hostile.

Specification: QEMU docs/interop/qcow2.txt. The limits on table sizes are QEMU's own.
"""

from __future__ import annotations

import os
from struct import Struct
from typing import TYPE_CHECKING

from attrs import field
from cardcage.errors import ConfigError
from cardcage.values import define, frozen

from cardcage_block.formats import shown

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = [
    "AUTOCLEAR_BITMAPS",
    "COMPAT_LAZY",
    "INCOMPAT_COMPRESSION",
    "INCOMPAT_CORRUPT",
    "INCOMPAT_DIRTY",
    "MAGIC",
    "BitmapDirectory",
    "Header",
    "Snapshot",
]

MAGIC = b"QFI\xfb"
INCOMPAT_DIRTY, INCOMPAT_CORRUPT, INCOMPAT_DATA_FILE, INCOMPAT_COMPRESSION, INCOMPAT_EXTENDED_L2 = 1, 2, 4, 8, 16
COMPAT_LAZY = 1
AUTOCLEAR_BITMAPS = 1

MAX_L1_BYTES = 32 << 20
MAX_REFTABLE_BYTES = 8 << 20
MAX_SNAPSHOTS = 65536
MAX_SNAPSHOT_TABLE = 64 << 20

EXT_END, EXT_BACKING_FORMAT, EXT_FEATURES, EXT_BITMAPS = 0, 0xE2792ACA, 0x6803F857, 0x23852875
EXT_DATA_FILE = 0x44415441

_V2 = Struct(">4sIQIIQIIQQIIQ")
_V3 = Struct(">QQQII")
_EXTENSION = Struct(">II")
_SNAPSHOT = Struct(">QIHHIIQII")


@frozen
class BitmapDirectory:
    """Where persistent dirty bitmaps are listed."""

    count: int
    size: int
    offset: int


@frozen
class Snapshot:
    """An internal snapshot: its level 1 table, which keeps clusters alive."""

    id: str
    name: str
    l1_offset: int
    l1_size: int
    seconds: int
    vm_state_size: int


@define
class Header:
    """The contents of the first cluster. Sizes and offsets are bytes, ``l1_size`` is entries."""

    version: int
    cluster_bits: int
    size: int
    l1_size: int
    l1_offset: int
    reftable_offset: int
    reftable_clusters: int
    backing_offset: int = 0
    backing_size: int = 0
    crypt_method: int = 0
    snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_length: int = 72
    compression: int = 0
    backing_file: str | None = None
    backing_format: str | None = None
    data_file: str | None = None
    bitmaps: BitmapDirectory | None = None
    features: dict[tuple[int, int], str] = field(factory=dict)

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def lacks(self) -> list[str]:
        """In words, what the image needs and this package has not; empty for an image that can be used."""
        found = []
        if self.crypt_method:
            kinds = {1: "AES", 2: "LUKS"}
            found.append(f"encryption ({kinds.get(self.crypt_method, self.crypt_method)})")
        if self.incompatible & INCOMPAT_DATA_FILE:
            found.append("an external data file" + (f" ({shown(self.data_file)})" if self.data_file else ""))
        if self.incompatible & INCOMPAT_EXTENDED_L2:
            found.append("extended L2 entries")
        for bit in range(5, 64):
            if self.incompatible >> bit & 1:
                found.append(f"an unknown feature ({shown(self.features.get((0, bit), f'bit {bit}'))})")
        return found

    def pack(self) -> bytes:
        """The fixed fields: 72 bytes for version 2, 112 for version 3 (104 when the image's header has no more)."""
        fixed = _V2.pack(
            MAGIC,
            self.version,
            self.backing_offset,
            self.backing_size,
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_offset,
            self.reftable_offset,
            self.reftable_clusters,
            self.snapshots,
            self.snapshots_offset,
        )
        if self.version == 2:
            return fixed
        flags = (self.incompatible, self.compatible, self.autoclear)
        fixed += _V3.pack(*flags, self.refcount_order, self.header_length)
        return fixed + bytes([self.compression]) if self.header_length > 104 else fixed

    def pack_all(self) -> bytes:
        """The fixed fields, the extensions and the backing file's name, for a new image."""
        self.header_length = 72 if self.version == 2 else 112
        extensions = b""
        if self.backing_format:
            extensions += _extension(EXT_BACKING_FORMAT, self.backing_format.encode())
        if self.version > 2:
            names = {(0, 0): "dirty bit", (0, 1): "corrupt bit", (0, 3): "compression type", (1, 0): "lazy refcounts"}
            table = b"".join(bytes(key) + name.encode().ljust(46, b"\0") for key, name in names.items())
            extensions += _extension(EXT_FEATURES, table)
        extensions += _extension(EXT_END, b"")
        name = os.fsencode(self.backing_file or "")
        self.backing_size = len(name)
        self.backing_offset = self.header_length + len(extensions) if name else 0
        packed = self.pack().ljust(self.header_length, b"\0") + extensions + name
        if len(name) > 1023 or len(packed) > self.cluster_size:
            raise ConfigError(f"the backing file's name has {len(name)} bytes: at most 1023, in the first cluster")
        return packed

    @classmethod
    def parse(cls, read: Callable[[int, int], bytes], path: str, *, lenient: bool = False) -> Header:
        """Read and check the header.

        Args:
            read: ``read(offset, length)`` gives bytes of the file, zeros past its end.
            path: for errors.
            lenient: take what is not supported too (:attr:`lacks`), to tell of it.

        Raises :exc:`~cardcage.errors.ConfigError` with the field that is wrong.
        """

        def bad(problem: str) -> ConfigError:
            return ConfigError(problem, file=path)

        magic, version, *rest = _V2.unpack(read(0, _V2.size))
        if magic != MAGIC:
            raise bad("not a qcow2 image: it does not begin with QFI\\xfb")
        if version not in (2, 3):
            raise bad(f"qcow2 version {version}: only 2 and 3 exist")
        backing_offset, backing_size, bits, size, crypt, l1_size, l1_offset, reftable, clusters, count, where = rest
        if not 9 <= bits <= 21:
            raise bad(f"qcow2 cluster size 2^{bits}: expected 2^9 to 2^21 bytes")
        head = cls(
            version,
            bits,
            size,
            l1_size,
            l1_offset,
            reftable,
            clusters,
            backing_offset=backing_offset,
            backing_size=backing_size,
            crypt_method=crypt,
            snapshots=count,
            snapshots_offset=where,
        )
        if version == 3:
            fields = _V3.unpack(read(_V2.size, _V3.size))
            head.incompatible, head.compatible, head.autoclear, head.refcount_order, head.header_length = fields
            if head.header_length < 104 or head.header_length % 8 or head.header_length > head.cluster_size:
                raise bad(f"qcow2 header length {head.header_length}: expected a multiple of 8 from 104 to a cluster")
            if head.header_length > 104:
                head.compression = read(104, 1)[0]
        head._read_extensions(read, bad)
        if head.lacks and not lenient:
            raise bad(f"qcow2 image with {', '.join(head.lacks)}: not supported; convert it with qemu-img convert")
        head._check(bad)
        if backing_offset:
            if backing_size > 1023 or backing_offset + backing_size > head.cluster_size:
                raise bad(f"qcow2 backing file name of {backing_size} bytes at {backing_offset:#x}: outside the header")
            head.backing_file = os.fsdecode(read(backing_offset, backing_size)) or None
            if head.backing_file and "\0" in head.backing_file:
                raise bad("qcow2 backing file name: holds a NUL byte")
        return head

    def _read_extensions(self, read: Callable[[int, int], bytes], bad: Callable[[str], ConfigError]) -> None:
        at, end = self.header_length, self.cluster_size
        if self.backing_offset:
            end = min(end, self.backing_offset)
        while at + _EXTENSION.size <= end:
            kind, length = _EXTENSION.unpack(read(at, _EXTENSION.size))
            at += _EXTENSION.size
            if kind == EXT_END:
                return
            if length > end - at:
                raise bad(f"qcow2 header extension {kind:#x} of {length} bytes: reaches out of the header")
            if kind == EXT_BACKING_FORMAT:
                self.backing_format = read(at, length).decode("ascii", "replace")
            elif kind == EXT_DATA_FILE:
                self.data_file = os.fsdecode(read(at, length))
            elif kind == EXT_FEATURES:
                table = read(at, length)
                for one in range(0, length - 47, 48):
                    name = table[one + 2 : one + 48].rstrip(b"\0").decode("ascii", "replace")
                    self.features[table[one], table[one + 1]] = name
            elif kind == EXT_BITMAPS and length >= 24:
                count, _, size, offset = Struct(">IIQQ").unpack(read(at, 24))
                self.bitmaps = BitmapDirectory(count, size, offset)
            at += (length + 7) & ~7

    def _check(self, bad: Callable[[str], ConfigError]) -> None:
        if bool(self.incompatible & INCOMPAT_COMPRESSION) != bool(self.compression) or self.compression > 1:
            raise bad(f"qcow2 compression type {self.compression}: expected 0 (zlib) or 1 (zstd)")
        if self.refcount_order > 6:
            raise bad(f"qcow2 refcount width 2^{self.refcount_order}: at most 64 bits")
        mask = self.cluster_size - 1
        if self.l1_size * 8 > MAX_L1_BYTES:
            raise bad(f"qcow2 L1 table of {self.l1_size} entries: larger than {MAX_L1_BYTES >> 20} MiB")
        entries = -(-self.size // (self.cluster_size * self.cluster_size // 8))
        if self.size >> 63 or self.l1_size < entries:
            raise bad(f"qcow2 L1 table of {self.l1_size} entries: too small for a disk of {self.size} bytes")
        if not 0 < self.reftable_clusters << self.cluster_bits <= max(MAX_REFTABLE_BYTES, self.cluster_size):
            raise bad(f"qcow2 refcount table of {self.reftable_clusters} clusters: expected 1 to 8 MiB")
        for name, offset in (
            ("L1 table", self.l1_offset if self.l1_size else 0),
            ("refcount table", self.reftable_offset),
            ("snapshot table", self.snapshots_offset if self.snapshots else 0),
        ):
            if offset & mask or offset >> 56:
                raise bad(f"qcow2 {name} at {offset:#x}: not at a cluster's start")
        if not self.reftable_offset or (self.l1_size and not self.l1_offset):
            raise bad("qcow2 refcount or L1 table at 0: that is where the header is")
        if self.snapshots > MAX_SNAPSHOTS:
            raise bad(f"qcow2 image with {self.snapshots} snapshots: at most {MAX_SNAPSHOTS}")

    def read_snapshots(self, read: Callable[[int, int], bytes], path: str) -> tuple[list[Snapshot], int]:
        """The snapshot table, and how many bytes it takes. Raises ConfigError."""
        found: list[Snapshot] = []
        at = self.snapshots_offset
        for _ in range(self.snapshots):
            fixed = _SNAPSHOT.unpack(read(at, _SNAPSHOT.size))
            l1_offset, l1_size, id_size, name_size, seconds, _, _, vm_state, extra = fixed
            at += _SNAPSHOT.size
            if l1_size * 8 > MAX_L1_BYTES or l1_offset & (self.cluster_size - 1) or l1_offset >> 56:
                raise ConfigError(f"qcow2 snapshot {len(found)}: its L1 table is out of bounds", file=path)
            if extra > 1024 or at - self.snapshots_offset > MAX_SNAPSHOT_TABLE:
                raise ConfigError(f"qcow2 snapshot {len(found)}: the table is out of bounds", file=path)
            text = read(at + extra, id_size + name_size)
            names = (text[:id_size].decode("utf-8", "replace"), text[id_size:].decode("utf-8", "replace"))
            found.append(Snapshot(*names, l1_offset, l1_size, seconds, vm_state))
            at += (extra + id_size + name_size + 7) & ~7
        return found, at - self.snapshots_offset


def _extension(kind: int, data: bytes) -> bytes:
    return _EXTENSION.pack(kind, len(data)) + data + bytes(-len(data) % 8)
