"""The hint spaces and reserved NOPs (0F 0D and 0F 18 to 0F 1F), and flushes of cache lines, on the real processor and
under the translator."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from cardcage_tcg import layout as L
from cardcage_tcg.translate.allowed import decoder_of
from cardcage_tcg.translate.templates import Templates
from tcg_fuzz import STACK, Case, Fuzzer
from tcg_host import CODE, DATA, DATA_SIZE, READONLY, Host, State

AMD = "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
HINTS = (0x0D, *range(0x18, 0x20))
PREFIXES = (b"", b"\x66", b"\xf2", b"\xf3", b"\x66\xf3", b"\x66\xf2", b"\xf2\xf3", b"\x67", b"\x65", b"\xf3\x64\x67")
WIDE = (b"\x48", b"\x4f", b"\xf3\x48", b"\xf3\x4f", b"\x66\x45")


@pytest.fixture
def traced() -> None:
    try:
        Host().close()
    except OSError as error:
        pytest.skip(f"the real processor cannot be asked: {error}")


def _hint(prefix: bytes, opcode: int, modrm: int, bits: int, chooser: random.Random) -> bytes:
    raw = prefix + bytes((0x0F, opcode, modrm)) + chooser.randbytes(8)
    return raw[: decoder_of(bits, raw).decode().len]


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("bits", [64, 32, 16])
def test_every_hint_does_nothing(bits: int) -> None:
    """Each encoding of the hint spaces, at addresses that nobody has mapped, leaves all as it was, as on the host."""
    fuzzer, chooser, found = Fuzzer(bits, bits=bits), random.Random(bits), []
    try:
        for prefix in PREFIXES + (WIDE if bits == 64 else ()):
            for opcode in HINTS:
                # Of 0F 0D processors of AMD know no register form, where Intel's are hints (SDM vol. 2, table A-3).
                forms = range(0xC0 if AMD and opcode == 0x0D else 256)
                hints = [_hint(prefix, opcode, modrm, bits, chooser) for modrm in forms]
                general = [chooser.getrandbits(64) & fuzzer.mask for _ in range(16)]
                start = State(
                    general, 0 if bits == 16 else CODE, 0x202 | chooser.getrandbits(12) & 0x8D5, fuzzer.xstate()
                )
                case = Case(
                    b"".join(hints) + b"\x0f\x0b", start, bytes(DATA_SIZE), bits, f"{prefix.hex()} 0f {opcode:02x}"
                )
                if difference := fuzzer.check(case):
                    found.append(f"{case.text}: {difference}")
        assert not found
        assert fuzzer.ended == {"": fuzzer.runs}
    finally:
        fuzzer.close()


@pytest.mark.parametrize(("bits", "mode"), [(64, L.MODE_64), (32, L.MODE_32), (16, 0), (16, L.MODE_VM86)])
def test_no_hint_is_emitted(bits: int, mode: int) -> None:
    """Nothing is run on the host for a hint, whose meaning there may be another one: ENDBR, RDSSP, MPX, prefetches."""
    maker, chooser = Templates(mode | L.MODE_PE, hidden=frozenset()), random.Random(bits)
    for prefix in PREFIXES + (WIDE if bits == 64 else ()):
        for opcode in HINTS:
            for modrm in range(256):
                raw = _hint(prefix, opcode, modrm, bits, chooser)
                made = maker.get(decoder_of(bits, raw).decode(), raw, False)
                assert (raw.hex(), made.code, made.accesses) == (raw.hex(), b"", ())


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("bits", [64, 32, 16])
def test_locked_hints_are_undefined(bits: int) -> None:
    """LOCK before a hint is #UD, as on the host."""
    fuzzer, chooser, found = Fuzzer(bits, bits=bits), random.Random(bits), []
    try:
        for opcode in HINTS:
            for modrm in (0x05, 0x08, 0xC8, 0xFA):
                start = State([fuzzer.value() for _ in range(16)], 0 if bits == 16 else CODE, 0x202, fuzzer.xstate())
                code = b"\xf0" + _hint(b"", opcode, modrm, bits, chooser)
                if difference := fuzzer.check(Case(code, start, bytes(DATA_SIZE), bits, code.hex())):
                    found.append(f"{code.hex()}: {difference}")
        assert not found
        assert fuzzer.ended == {"SIGILL": fuzzer.runs}
    finally:
        fuzzer.close()


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("bits", [64, 32])
def test_a_flush_faults_as_a_load_of_a_byte(bits: int) -> None:
    """CLFLUSH, where the page can be read, missing, and at no canonical address, ends as on the host."""
    fuzzer, found = Fuzzer(bits, bits=bits), []
    addresses = [DATA + 1, DATA + READONLY, DATA + DATA_SIZE - 1, DATA + DATA_SIZE]
    try:
        for address in [*addresses, 1 << 47, 1 << 62] if bits == 64 else addresses:
            general = [address if number == 3 else STACK for number in range(16)]
            start = State(general, CODE, 0x202 | 0x8D5, fuzzer.xstate())
            case = Case(b"\x0f\xae\x3b\x0f\x0b", start, bytes(DATA_SIZE), bits, f"clflush of {address:#x}")
            if difference := fuzzer.check(case):
                found.append(f"{case.text}: {difference}")
        assert not found
        assert fuzzer.ended["SIGSEGV"] == (3 if bits == 64 else 1)
    finally:
        fuzzer.close()
