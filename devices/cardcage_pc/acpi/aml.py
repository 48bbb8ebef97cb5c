"""ACPI machine language (ACPI 6.4, chapters 6.4 and 20): the few terms that our DSDT is made of, as bytes."""

from __future__ import annotations

import re
import struct

__all__ = [
    "acquire",
    "address_window",
    "argument",
    "both",
    "buffer",
    "device",
    "fields",
    "hardware_id",
    "integer",
    "interrupt",
    "io_ports",
    "memory_range",
    "method",
    "mutex",
    "name",
    "notify",
    "package",
    "path",
    "ports",
    "release",
    "resources",
    "scope",
    "shift_left",
    "store",
    "string",
    "when",
]

MEMORY, IO, BUS = 0, 1, 2


def _length(size: int) -> bytes:
    """PkgLength of *size* bytes that follow it, itself counted in."""
    if size + 1 < 0x40:
        return bytes((size + 1,))
    for extra in (1, 2, 3):
        total = size + 1 + extra
        if total < 1 << 4 + 8 * extra:
            return bytes((extra << 6 | total & 15,)) + (total >> 4).to_bytes(extra, "little")
    raise ValueError(f"an AML package of {size} bytes is too large")


def path(text: str) -> bytes:
    r"""A name string such as ``\_SB_.PCI0``; each segment of at most four characters."""
    root = text[: len(text) - len(text.lstrip("\\^"))]
    segments = [part.ljust(4, "_") for part in text[len(root) :].split(".") if part]
    for segment in segments:
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]{3}", segment):
            raise ValueError(f"{text!r} is not an ACPI name")
    joined = "".join(segments).encode()
    match len(segments):
        case 0:
            return root.encode() + b"\0"
        case 1:
            return root.encode() + joined
        case 2:
            return root.encode() + b"\x2e" + joined
    return root.encode() + bytes((0x2F, len(segments))) + joined


def integer(value: int) -> bytes:
    """The shortest encoding of 0 to 2**64 - 1."""
    if value in (0, 1):
        return bytes((value,))
    for code, size in ((0x0A, 1), (0x0B, 2), (0x0C, 4), (0x0E, 8)):
        if 0 <= value < 1 << 8 * size:
            return bytes((code,)) + value.to_bytes(size, "little")
    raise ValueError(f"{value} is not a 64-bit unsigned integer")


def string(text: str) -> bytes:
    """An ASCII string without NUL."""
    data = text.encode("ascii")
    if b"\0" in data:
        raise ValueError("an AML string cannot hold NUL")
    return b"\x0d" + data + b"\0"


def buffer(data: bytes) -> bytes:
    size = integer(len(data))
    return b"\x11" + _length(len(size) + len(data)) + size + data


def package(*elements: bytes) -> bytes:
    """A package of up to 255 elements."""
    body = bytes((len(elements),)) + b"".join(elements)
    return b"\x12" + _length(len(body)) + body


def name(where: str, value: bytes) -> bytes:
    """``Name (where, value)``."""
    return b"\x08" + path(where) + value


def scope(where: str, *terms: bytes) -> bytes:
    body = path(where) + b"".join(terms)
    return b"\x10" + _length(len(body)) + body


def device(where: str, *terms: bytes) -> bytes:
    body = path(where) + b"".join(terms)
    return b"\x5b\x82" + _length(len(body)) + body


# code


def method(where: str, arguments: int, *terms: bytes) -> bytes:
    """``Method (where, arguments)``, not serialized, of up to seven arguments."""
    body = path(where) + bytes((arguments,)) + b"".join(terms)
    return b"\x14" + _length(len(body)) + body


def argument(number: int) -> bytes:
    return bytes((0x68 + number,))


def store(value: bytes, target: str) -> bytes:
    return b"\x70" + value + path(target)


def shift_left(value: bytes, count: bytes) -> bytes:
    return b"\x79" + value + count + b"\0"


def both(one: bytes, other: bytes) -> bytes:
    """The bits that are set in both."""
    return b"\x7b" + one + other + b"\0"


def when(condition: bytes, *terms: bytes) -> bytes:
    """``If (condition)``."""
    body = condition + b"".join(terms)
    return b"\xa0" + _length(len(body)) + body


def notify(where: str, value: bytes) -> bytes:
    return b"\x86" + path(where) + value


def mutex(where: str) -> bytes:
    return b"\x5b\x01" + path(where) + b"\0"


def acquire(where: str) -> bytes:
    """Wait for a mutex for as long as it takes."""
    return b"\x5b\x23" + path(where) + b"\xff\xff"


def release(where: str) -> bytes:
    return b"\x5b\x27" + path(where)


def ports(where: str, base: int, size: int) -> bytes:
    """``OperationRegion (where, SystemIO, base, size)``."""
    return b"\x5b\x80" + path(where) + b"\x01" + integer(base) + integer(size)


def fields(region: str, *parts: tuple[str, int]) -> bytes:
    """``Field (region, DWordAcc, NoLock, WriteAsZeros)`` of names and their bits, fewer than 64 each."""
    body = path(region) + b"\x43" + b"".join(path(where) + bytes((bits,)) for where, bits in parts)
    return b"\x5b\x81" + _length(len(body)) + body


def hardware_id(text: str) -> bytes:
    """A ``_HID``: the compressed form for ``PNP0501`` and its like, else a string."""
    if not re.fullmatch(r"[A-Z]{3}[0-9A-F]{4}", text):
        return string(text)
    first, second, third = (ord(letter) - 0x40 for letter in text[:3])
    return b"\x0c" + struct.pack(">HH", first << 10 | second << 5 | third, int(text[3:], 16))


# resource descriptors (6.4)


def resources(*descriptors: bytes) -> bytes:
    """A resource template: descriptors and the end tag, whose checksum of 0 stands for none."""
    return buffer(b"".join(descriptors) + b"\x79\0")


def io_ports(base: int, size: int) -> bytes:
    """Fixed I/O ports, 16-bit decode; ranges over 255 ports take a word descriptor."""
    if size > 0xFF:
        return address_window("io", base, size, producer=False)
    return struct.pack("<BBHHBB", 0x47, 1, base, base, 1, size)


def memory_range(base: int, size: int) -> bytes:
    """A fixed, writable memory range; above 4 GiB it takes a quad-word descriptor."""
    if base + size > 1 << 32:
        return address_window("memory64", base, size, producer=False)
    return struct.pack("<BHBII", 0x86, 9, 1, base, size)


def interrupt(gsi: int, *, level: bool) -> bytes:
    """An interrupt: ISA interrupts without flags, level-triggered interrupts active high and shared."""
    if gsi < 16 and not level:
        return struct.pack("<BH", 0x22, 1 << gsi)
    flags = 1 | (0 if level else 2) | (8 if level else 0)  # consumer; edge; shared
    return struct.pack("<BHBBI", 0x89, 6, flags, 1, gsi)


def address_window(kind: str, base: int, size: int, *, producer: bool = True) -> bytes:
    """An address space descriptor: ``bus``, ``io`` (words), ``memory`` (double words) or ``memory64`` (quad words)."""
    tag, form, type, flags = {
        "bus": (0x88, "H", BUS, 0),
        "io": (0x88, "H", IO, 3),  # the entire range
        "memory": (0x87, "I", MEMORY, 1),  # read-write, not cacheable
        "memory64": (0x8A, "Q", MEMORY, 1),
    }[kind]
    general = (0 if producer else 1) | 0x0C  # minimum and maximum are fixed
    body = struct.pack(f"<BBB5{form}", type, general, flags, 0, base, base + size - 1, 0, size)
    return struct.pack("<BH", tag, len(body)) + body
