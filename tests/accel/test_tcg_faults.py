"""What a fault in the middle of an instruction leaves."""

from __future__ import annotations

import struct

import pytest
from tcg_guest import Guest
from tcg_host import CODE, DATA, DATA_SIZE, State

MEMORY = (bytes(16) + struct.pack("<QI", 0x7FF0000000000001, 0x7F800001)).ljust(DATA_SIZE, b"\0")


# div dword [rbx]; idiv; ptest xmm1, [rbx+8]; ucomisd xmm1, [rbx+16] (a signalling NaN); comiss xmm1, [rbx+24]
@pytest.mark.parametrize("text", ["f733", "f73b", "660f38174b08", "660f2e4b10", "0f2f4b18"])
@pytest.mark.parametrize("flags", [0x2, 0x8D7])
def test_a_fault_has_the_flags_of_before(text: str, flags: int) -> None:
    """An instruction that would write all flags, and faults after its operand was found, leaves them as they were."""
    guest = Guest()
    image = struct.pack("<H22xI4x", 0x37F, 0x1F00).ljust(512, b"\0") + struct.pack("<Q", 3) + bytes(312)
    start = State([1, 0, 0, DATA, DATA + 0x800, *[0] * 11], CODE, flags | 0x200, image)
    try:
        got = guest.run(bytes.fromhex(text) + b"\x0f\x0b", start, MEMORY)
    finally:
        guest.close()
    assert got.ended == ("SIGSEGV" if text == "660f38174b08" else "SIGFPE")
    assert (got.rip, got.flags & 0x8D7) == (CODE, flags)
