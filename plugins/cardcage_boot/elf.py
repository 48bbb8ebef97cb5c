"""ELF files, as far as booting needs them: segments, notes and named sections (System V gABI, chapters 4 and 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cardcage_boot.files import BootFile

__all__ = ["EM_X86_64", "Elf", "Segment", "is_elf", "read_elf", "section"]

EM_386, EM_X86_64 = 3, 62
PT_LOAD, PT_INTERP, PT_NOTE, SHT_NOBITS = 1, 3, 4, 8


@frozen
class Segment:
    """A PT_LOAD segment: *data* goes to *address* (physical), zeros fill it up to *size* bytes in memory.

    *virtual* is where it is linked to run.
    """

    address: int
    data: bytes = field(repr=False)
    size: int
    virtual: int = 0


@frozen
class Elf:
    """An executable: class (32 or 64), entry point, segments to load, notes as (name, type, contents), and whether it
    asks for a dynamic loader."""

    bits: int
    entry: int
    segments: tuple[Segment, ...]
    notes: tuple[tuple[bytes, int, bytes], ...]
    interpreter: bool = False

    def physical_entry(self) -> int:
        """The entry point as a physical address: a kernel that is linked high gives its virtual address."""
        for one in self.segments:
            if one.virtual <= self.entry < one.virtual + one.size:
                return self.entry - one.virtual + one.address
        return self.entry


def is_elf(data: bytes) -> bool:
    """True if the magic number is there."""
    return data[:4] == b"\x7fELF"


def _bits(file: BootFile) -> int:
    ident = file.bytes(0, 16, "the ELF identification")
    if not is_elf(ident) or ident[4] not in (1, 2) or ident[5] != 1:
        raise file.error("not a little-endian ELF file of class 32 or 64")
    return 32 * ident[4]


def read_elf(file: BootFile) -> Elf:
    """Parse an x86 ELF executable's program headers. Raises ConfigError if damaged or for another machine."""
    bits = _bits(file)
    kind, machine = file.unpack("HH", 16, "the ELF header")
    if machine not in (EM_386, EM_X86_64) or kind not in (2, 3):
        raise file.error(f"ELF machine {machine}, type {kind}: expected an x86 executable")
    entry, table = file.unpack("QQ" if bits == 64 else "II", 24, "the ELF header")
    entry_size, count = file.unpack("HH", 54 if bits == 64 else 42, "the ELF header")
    form = "IIQQQQQQ" if bits == 64 else "IIIIIIII"
    if count and entry_size < (56 if bits == 64 else 32):
        raise file.error(f"ELF program headers of {entry_size} bytes: expected {56 if bits == 64 else 32}")
    segments: list[Segment] = []
    notes: list[tuple[bytes, int, bytes]] = []
    dynamic = False
    for at in range(count):
        numbers = file.unpack(form, table + at * entry_size, "an ELF program header")
        if bits == 64:
            kind, _, offset, virtual, physical, size, memory, align = numbers
        else:
            kind, offset, virtual, physical, size, memory, _, align = numbers
        if kind == PT_LOAD and memory:
            if size > memory or physical + memory > 1 << 52:
                raise file.error(f"ELF segment {at}: {size:#x} file bytes for {memory:#x} at {physical:#x} cannot be")
            segments.append(Segment(physical, file.bytes(offset, size, f"ELF segment {at}"), memory, virtual))
        elif kind == PT_INTERP:
            dynamic = True
        elif kind == PT_NOTE:
            notes += _notes(file.bytes(offset, size, "the ELF notes"), 8 if align == 8 else 4)
    return Elf(bits, entry, tuple(segments), tuple(notes), dynamic)


def _notes(data: bytes, align: int) -> Iterator[tuple[bytes, int, bytes]]:
    at = 0
    while at + 12 <= len(data):
        name_size, size, kind = (int.from_bytes(data[at + spot : at + spot + 4], "little") for spot in (0, 4, 8))
        start = at + 12 + name_size
        start += -start % align
        if start + size > len(data):
            return  # a damaged note ends the list: none of those after it can be told apart
        yield data[at + 12 : at + 12 + name_size].rstrip(b"\0"), kind, data[start : start + size]
        at = start + size + -size % align


def section(file: BootFile, name: str) -> bytes | None:
    """The contents of the first section called *name*, ``None`` if there is none."""
    bits = _bits(file)
    (table,) = file.unpack("Q" if bits == 64 else "I", 40 if bits == 64 else 32, "the ELF header")
    size, count, names = file.unpack("HHH", 58 if bits == 64 else 46, "the ELF header")
    form = "IIQQQQ" if bits == 64 else "IIIIII"

    def header(at: int) -> tuple[int, ...]:
        return file.unpack(form, table + at * size, "an ELF section header")

    if not count or names >= count:
        return None
    _, _, _, _, texts, length = header(names)
    text = file.bytes(texts, length, "the ELF section names")
    wanted = name.encode() + b"\0"
    for at in range(count):
        label, kind, _, _, offset, length = header(at)
        if text[label : label + len(wanted)] == wanted:
            return b"" if kind == SHT_NOBITS else file.bytes(offset, length, f"ELF section {name}")
    return None
