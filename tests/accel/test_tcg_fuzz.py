"""Instructions on the real processor and under the translator; ``tcg_fuzz.py`` has the long form."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from cardcage_tcg import layout as L
from cardcage_tcg.library import load
from iced_x86 import Code, Decoder
from tcg_fuzz import Fuzzer
from tcg_host import Host

HERE = Path(__file__).parent
WIDE_HOST = " avx2 " in Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else False


@pytest.fixture(scope="module", autouse=True)
def _traced() -> None:
    try:
        Host().close()
    except OSError as error:
        pytest.skip(f"the real processor cannot be asked: {error}")


def corpus(name: str) -> list[bytes]:
    return [bytes.fromhex(line) for line in (HERE / name).read_text().split()]


def differences(raws: list[bytes], seed: int, *, bits: int = 64, avx: bool = False, sequence: int = 1) -> list[str]:
    fuzzer, chooser = Fuzzer(seed, avx=avx, bits=bits), random.Random(seed)
    found = []
    try:
        for raw in raws:
            case = fuzzer.case([raw, *(chooser.choice(raws) for _ in range(sequence - 1))])
            if case is not None and (difference := fuzzer.check(case)):
                found.append(fuzzer.explain(case, difference))
        assert fuzzer.runs > len(raws) // 3
    finally:
        fuzzer.close()
    return found


@pytest.mark.parametrize(
    ("name", "bits"), [("tcg_corpus_64.txt", 64), ("tcg_corpus_32.txt", 32), ("tcg_corpus_16.txt", 16)]
)
def test_instructions(name: str, bits: int) -> None:
    """One instruction from a random state ends as on the real processor: registers, flags, FPU, memory, faults."""
    assert not differences(corpus(name), 1, bits=bits)


@pytest.mark.skipif(not WIDE_HOST, reason="this host has no AVX2")
def test_wide_instructions() -> None:
    """AVX, AVX2 and FMA instructions, gathers and masked moves too, end as on the real processor."""
    assert not differences(corpus("tcg_corpus_avx.txt"), 2, avx=True)


def test_sequences() -> None:
    """Four instructions in one block end as on the real processor: flags kept lazily, faults in the midst."""
    assert not differences(corpus("tcg_corpus_64.txt")[::2], 3, sequence=4)


PREFIXES = (0x66, 0xF2, 0xF3, 0xF0, 0x2E, 0x36, 0x3E, 0x26, 0x64, 0x65, 0x67)


@pytest.mark.parametrize(("bits", "mode"), [(64, L.MODE_64), (32, L.MODE_32), (16, 0)])
def test_heads(bits: int, mode: int) -> None:
    """The native length of a head, and the decoder's displacement and immediate, make up the instruction."""
    native, r = load(), random.Random(bits)
    wrong = []
    for _ in range(30_000):
        raw = bytearray(r.randbytes(15))
        start = r.random()
        if start < 0.5:
            raw[: 1 + (start < 0.3)] = r.choice((b"\x0f\x38", b"\x0f\x3a")) if start < 0.3 else b"\x0f"
        elif start < 0.6:
            raw[0] = r.choice((0xC4, 0xC5))
        if r.random() < 0.4:
            raw.insert(0, 0x40 | r.randrange(16))
        for _ in range(r.choice((0, 0, 1, 2))):
            raw.insert(r.randrange(2), r.choice(PREFIXES))
        decoder = Decoder(bits, bytes(raw[:15]))
        ins = decoder.decode()
        if ins.code == Code.INVALID:
            continue
        where = decoder.get_constant_offsets(ins)
        fields = where.displacement_size + where.immediate_size + where.immediate_size2
        head = native.head_length(bytes(raw[: ins.len]), ins.len, mode)
        if head + fields != ins.len and not _has_suffix(bytes(raw[: ins.len])):
            wrong.append(f"{ins} {raw[: ins.len].hex()}: head {head}, fields {fields}")
    assert not wrong


def _has_suffix(raw: bytes) -> bool:
    """3DNow!'s opcode and VEX's fourth register come last; such instructions share no template."""
    opcode = next(i for i, one in enumerate(raw) if one not in PREFIXES and one & 0xF0 != 0x40)
    return raw[opcode : opcode + 2] == b"\x0f\x0f" or (
        raw[opcode] == 0xC4 and raw[opcode + 3] & 0xF0 in (0x40, 0x50, 0x60, 0x70)
    )
