"""String and odd integer instructions of the translator's native half."""

from __future__ import annotations

import pytest
from cardcage_tcg import layout as L
from tcg_cpu import CODE0, DATA16, DS, ES, GDT, PF, RAM, RAX, RBP, RCX, RDI, RSI, RSP, SS, Cpu, load


@pytest.fixture
def cpu() -> Cpu:
    return Cpu(load())


MOVS, CMPS, STOS, LODS, SCAS = range(5)


def string(op: int, size: int, rep: int, asize: int = 8, seg: int = DS) -> int:
    return op | (size.bit_length() - 1) << 3 | rep << 5 | (asize.bit_length() - 2) << 7 | seg << 9


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("distance", [1, 3, 8, 100, 5000, -1, -8, -5000])
def test_rep_movs_is_element_wise(cpu: Cpu, size: int, back: bool, distance: int) -> None:
    """REP MOVS over pages gives what moving one element after the other gives, overlaps included."""
    cpu.long()
    count, start = 9000 // size, 0x100003
    data = bytes(i * 7 & 255 for i in range(0x8000))
    cpu.ram[start - 0x4000 : start + 0x4000] = data
    model = bytearray(data)
    first = (count - 1) * size if back else 0
    for i in range(count):
        at = 0x4000 + (first - i * size if back else i * size)
        if at + distance + size <= 0x8000:
            model[at + distance : at + distance + size] = model[at : at + size]
    assert 0x4000 + count * size + distance <= 0x8000
    cpu.flags = 0x402 if back else 2
    cpu[RSI], cpu[RDI], cpu[RCX] = start + first, start + first + distance, count
    assert cpu.do("STRING", string(MOVS, size, 1)) == L.H_CONTINUE
    step = -size * count if back else size * count
    assert (cpu[RCX], cpu[RSI], cpu[RDI]) == (0, start + first + step, start + first + distance + step)
    assert cpu.ram[start - 0x4000 : start + 0x4000] == bytes(model)


def test_rep_stos_stops_at_a_fault(cpu: Cpu) -> None:
    """REP STOS into an absent page raises #PF with the registers at the element that failed."""
    cpu.long()
    cpu[RDI], cpu[RCX], cpu[RAX] = RAM - 64, 20, 0x1122334455667788
    assert cpu.do("STRING", string(STOS, 8, 1)) == L.H_REDIRECT
    assert (cpu.taken(), cpu[RCX], cpu[RDI], cpu.get("CR2")) == (PF, 12, RAM, RAM)
    assert cpu.read(cpu[RSP], "QQ") == (2, 0x7000)
    assert cpu.read(RAM - 8, "Q") == (0x1122334455667788,)


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_scans_and_compares(cpu: Cpu, size: int) -> None:
    """REPNE SCAS finds, REPE CMPS stops after the first difference, with the flags of that comparison."""
    cpu.long()
    cpu[RDI], cpu[RCX], cpu[RAX] = 0x100FF0, 5000 // size, 0x80
    cpu.ram[0x100000:0x103000] = bytes(0x3000)
    cpu.write(0x100FF0 + 2000 * size // 8 * 8 % 4096, "B", 0x80)
    cpu.do("STRING", string(SCAS, size, 2))
    done = 5000 // size - cpu[RCX]
    assert (cpu.flags & 0x40, cpu.ram[cpu[RDI] - size], cpu[RDI]) == (0x40, 0x80, 0x100FF0 + done * size)
    cpu[RSI], cpu[RDI], cpu[RCX] = 0x110000, 0x120000, 100
    cpu.ram[0x110000:0x110400] = cpu.ram[0x120000:0x120400] = b"\x11" * 0x400
    cpu.ram[0x110000 + 10 * size] = 0x12
    cpu.do("STRING", string(CMPS, size, 1))
    assert (cpu[RCX], cpu[RSI], cpu.flags & 0x8D5) == (89, 0x110000 + 11 * size, 0x0)
    cpu[RCX] = 0
    assert (cpu.do("STRING", string(CMPS, size, 1)), cpu.flags & 0x8D5) == (L.H_CONTINUE, 0)


def test_string_address_size_wraps(cpu: Cpu) -> None:
    """16-bit STOS wraps DI around within its segment and leaves the upper half of EDI alone."""
    cpu.protected()
    cpu.call("load_segment", ES, DATA16)
    cpu[RDI], cpu[RCX], cpu[RAX] = 0xABCDFFFE, 0x10004, 0x55
    cpu.do("STRING", string(STOS, 1, 1, 2))
    assert (cpu[RDI], cpu[RCX], cpu.read(0x3FFFE, "BB"), cpu.read(0x30000, "BBB")) == (
        0xABCD0002,
        0x10000,
        (0x55, 0x55),
        (0x55, 0x55, 0),
    )


def test_string_polls(cpu: Cpu) -> None:
    """A pending event ends a long REP between pages with RIP at the instruction."""
    cpu.long()
    cpu[RDI], cpu[RCX] = 0x100000, 0x4000
    cpu.put32("POLL", 1)
    assert (cpu.do("STRING", string(STOS, 1, 1)), cpu.rip, cpu[RCX]) == (L.H_REDIRECT, 0x7000, 0x3000)


def test_frames(cpu: Cpu) -> None:
    """PUSHA and POPA mirror each other but for ESP; ENTER builds a nested frame."""
    cpu.protected()
    for i in range(8):
        if i != RSP:
            cpu[i] = 0x1000 + i
    cpu.do("PUSHA", 4)
    assert cpu.read(cpu[RSP], "8I") == (0x1007, 0x1006, 0x1005, 0x40000, 0x1003, 0x1002, 0x1001, 0x1000)
    for i in (0, 1, 2, 3, 5, 6, 7):
        cpu[i] = 0
    cpu.do("POPA", 4)
    assert [cpu[i] for i in range(8)] == [0x1000, 0x1001, 0x1002, 0x1003, 0x40000, 0x1005, 0x1006, 0x1007]
    cpu[RBP] = 0x3E000
    cpu.write(0x3DFFC, "I", 0xABCD)
    cpu.do("ENTER", 4, info=(0x20 | 2 << 16,))
    assert (cpu[RBP], cpu[RSP], cpu.read(0x3FFF4, "III")) == (0x3FFFC, 0x3FFF4 - 0x20, (0x3FFFC, 0xABCD, 0x3E000))


@pytest.mark.parametrize(
    ("helper", "ax", "flags", "result", "cf_af"),
    [
        ("AAA", 0x000F, 0, 0x0105, 0x11), ("AAA", 0x0105, 0, 0x0105, 0), ("AAS", 0x0200, 0x10, 0x000A, 0x11),
        ("DAA", 0x79, 0, 0x79, 0),
        ("DAA", 0x9A, 0, 0x00, 0x11), ("DAA", 0xAE, 0, 0x14, 0x11), ("DAS", 0x2F, 0x10, 0x29, 0x10),
        ("DAS", 0x9A, 0, 0x34, 0x11),
        ("AAM", 0x0035, 0, 0x0503, 0), ("AAD", 0x0503, 0, 0x0035, 0),
    ],
)  # fmt: skip
def test_bcd(cpu: Cpu, helper: str, ax: int, flags: int, result: int, cf_af: int) -> None:
    """The decimal adjustments give the manual's results, with carry and adjust flags."""
    cpu.protected()
    cpu[RAX], cpu.flags = ax, flags | 2
    cpu.do(helper, 10)
    assert (cpu[RAX], cpu.flags & 0x11) == (result, cf_af)


@pytest.mark.parametrize(("back", "left", "at"), [(False, 8, 0x10000), (True, 0xFFF8, 0xFFFFFFFF)])
def test_strings_stop_at_the_segment_limit(cpu: Cpu, back: bool, left: int, at: int) -> None:
    """REP STOS that runs over the end of ES does what fits and raises #GP(0) at the element that does not."""
    cpu.protected()
    cpu.call("load_segment", ES, DATA16)
    cpu.flags = 0x402 if back else 2
    cpu[RDI], cpu[RCX] = (7, 0x10000) if back else (0xFFF8, 16)
    cpu.do("STRING", string(STOS, 1, 1, 4))
    assert (cpu.taken(), cpu.read(cpu[RSP], "II"), cpu[RCX], cpu[RDI]) == (13, (0, 0x7000), left, at)


def test_a_stack_has_a_limit(cpu: Cpu) -> None:
    """PUSHA that would leave the stack segment raises #SS, which finds the stack as it was."""
    cpu.protected()
    cpu.write(GDT + DATA16, "HH", 0x0FFF, 0)
    cpu.call("load_segment", SS, DATA16)
    cpu[RSP] = 0x10
    cpu.do("PUSHA", 4)
    assert (cpu.taken(), cpu[RSP], cpu.read(0x30000, "III")) == (12, 0, (0, 0x7000, CODE0))


@pytest.mark.parametrize(("op", "rsi", "rdi", "fault"), [(CMPS, 1, 0, True), (SCAS, 1, 2, True), (MOVS, 0, 4, False)])
def test_alignment_checks(cpu: Cpu, op: int, rsi: int, rdi: int, fault: bool) -> None:
    """With EFLAGS.AC a misaligned element raises #AC at CPL 3."""
    cpu.long(cpl=3)
    cpu.put("CR0", cpu.get("CR0") | 1 << 18)
    cpu.flags = 1 << 18 | 2
    cpu[RSI], cpu[RDI], cpu[RCX] = 0x100000 + rsi, 0x101000 + rdi, 3
    done = cpu.do("STRING", string(op, 4, 1))
    assert (done == L.H_REDIRECT and cpu.taken() == 17) is fault


def test_alignment_checks_of_stacks(cpu: Cpu) -> None:
    """With EFLAGS.AC PUSHA on a misaligned stack raises #AC at CPL 3; an interrupt's frame is not checked."""
    cpu.protected(cpl=3)
    cpu.put("CR0", cpu.get("CR0") | 1 << 18)
    cpu.flags = 1 << 18 | 2
    cpu[RSP] = 0x40002
    assert cpu.do("PUSHA", 4) == L.H_REDIRECT
    assert cpu.taken() == 17
