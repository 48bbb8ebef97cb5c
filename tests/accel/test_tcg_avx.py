"""The translator with AVX switched on."""

from __future__ import annotations

import struct

import pytest
from attrs import evolve
from cardcage.accelerator import Probe, VmSpec
from cardcage_conformance.accelerator import check_program, programs
from cardcage_conformance.conformance import Program
from cardcage_tcg.accel import Tcg
from cardcage_tcg.vm import TcgVm
from tcg_guest import Guest
from tcg_host import CODE, DATA, DATA_SIZE, Host, State


class _Wide:
    """The translator, with AVX asked for whatever a program asks."""

    name = "tcg"

    def probe(self) -> Probe:
        return Tcg().probe()

    def create_vm(self, spec: VmSpec, /) -> TcgVm:
        return Tcg().create_vm(evolve(spec, features={**spec.features, "avx": True, "avx2": True}))


NAMES = (
    "avx-across-exits",
    "xsave-xrstor",
    "fxsave-fxrstor",
    "sse-moves-across-exits",
    "device-not-available",
    "mxcsr",
)


@pytest.mark.parametrize("program", programs(*NAMES), ids=str)
def test_programs_of_wide_state(program: Program) -> None:
    """XSAVE, AVX and what is kept across exits are right when AVX is switched on."""
    reason = check_program(_Wide(), program)
    if reason:
        pytest.skip(reason)


XSAVE, XSAVEC, XRSTOR = bytes.fromhex("480fae23"), bytes.fromhex("480fc723"), bytes.fromhex("480fae2b")  # [rbx]
ALL = 0xFFFFFFFF


def _image(*, header: int = 7, reserved: int = 0, mxcsr: int = 0x1F80) -> bytes:
    image = bytearray(struct.pack("<H22xI", 0x37F, mxcsr).ljust(832, b"\0"))
    image[160:416], image[576:832] = bytes(range(256)), bytes(range(255, -1, -1))
    image[512:528] = struct.pack("<QQ", header, reserved)
    return bytes(image)


@pytest.mark.parametrize(
    ("code", "offset", "mask", "image"),
    [
        (XSAVE, 0x400, 7, b""),
        (XSAVE, 0x400, 2, b""),
        (XSAVE, 0x400, ALL, b""),
        (XSAVE, 0x420, 7, b""),
        (XSAVE, 0xE00, 7, b""),
        (XSAVE, DATA_SIZE - 64, 7, b""),
        (XSAVEC, 0x400, 7, b""),
        (XSAVEC, 0xF00, 7, b""),
        (XRSTOR, 0x400, 7, bytes(832)),
        (XRSTOR, 0x400, 7, _image()),
        (XRSTOR, 0x400, 4, _image()),
        (XRSTOR, 0x400, ALL, _image(header=3)),
        (XRSTOR, 0xE00, 7, _image()),
        (XRSTOR, 0x400, 7, _image(reserved=1)),
        (XRSTOR, 0x400, 7, _image(mxcsr=ALL)),
        (XRSTOR, 0x400, 1, _image(mxcsr=ALL)),
        (XRSTOR, 0x400, 7, _image(header=15)),
        (XRSTOR, 0x400, 7, _image(header=7, reserved=1 << 63 | 7)),
        (XRSTOR, 0x400, 7, _image(header=7, reserved=1 << 63 | 3)),
        (XRSTOR, 0x400, 7, _image(header=3, reserved=1 << 63 | 3)),
        (XRSTOR, DATA_SIZE - 64, 7, b""),
    ],
)
@pytest.mark.parametrize("pku", [False, True])
def test_xsave_images(code: bytes, offset: int, mask: int, image: bytes, pku: bool) -> None:
    """XSAVE, XSAVEC and XRSTOR store, load and fault as on the real processor, with RAX and RDX kept; keys or not."""
    _images(code, offset, mask, image, _image(), pku=pku)


@pytest.mark.parametrize("pku", [False, True])
@pytest.mark.parametrize("mask", [1, 2, 4, 5, 6, 7])
@pytest.mark.parametrize("header", [0, 1, 2, 4, 7])
@pytest.mark.parametrize("layout", [0, 1 << 63 | 7])
def test_mxcsr_in_images(mask: int, header: int, layout: int, pku: bool) -> None:
    """Which images and masks load MXCSR, reset it or leave it, in the standard and the compact form."""
    image, before = _image(header=header, reserved=layout, mxcsr=0x1FA0), _image(mxcsr=0x3F80)
    # Of a compact image without SSE, processors of AMD do not always reset it, which Intel SDM vol. 1, 13.8.2 asks for.
    reset = 0x1F80 if layout and mask & 2 and not header & 2 else None
    _images(XRSTOR, 0x400, mask, image, before, pku=pku, mxcsr=reset)


def _images(
    code: bytes, offset: int, mask: int, image: bytes, before: bytes, *, pku: bool, mxcsr: int | None = None
) -> None:
    try:
        host = Host()
    except OSError as error:
        pytest.skip(f"the real processor cannot be asked: {error}")
    guest = Guest(avx=True, pku=pku)
    general = [mask | 1 << 60, 2, mask if mask == ALL else 1 << 40, DATA + offset, DATA + 0x4400, *range(11)]
    start = State(general, CODE, 0x202, before)
    memory = bytearray(DATA_SIZE)
    memory[offset : offset + len(image)] = image
    try:
        want = host.run(code + b"\x0f\x0b", start, bytes(memory))
        got = guest.run(code + b"\x0f\x0b", start, bytes(memory))
    finally:
        guest.close()
        host.close()
    assert (got.ended, got.rip, got.general) == (want.ended, want.rip, want.general)
    state = want.xstate if mxcsr is None else want.xstate[:24] + mxcsr.to_bytes(4, "little") + want.xstate[28:]
    assert (got.memory, got.xstate[:512], got.xstate[576:]) == (want.memory, state[:512], state[576:])


@pytest.mark.parametrize(
    ("code", "ended"),
    [
        ("660f38dcc1", "SIGILL"),
        ("c5f058c2", "SIGILL"),
        ("c4e2f0f2c3", "SIGILL"),
        ("f30fbcc1", ""),
        ("660f3810c1", ""),
        ("660fae33", "SIGILL"),
        ("660fae3b", "SIGILL"),
        ("0fae3b", ""),
        ("660faef0", "SIGILL"),
        ("660faef8", "SIGILL"),
    ],
    ids=["aesenc", "vaddps", "andn", "tzcnt", "pblendvb", "clwb", "clflushopt", "clflush", "tpause", "pcommit"],
)
def test_hidden_instructions(code: str, ended: str) -> None:
    """What CPUID does not show raises #UD, whatever the host has; TZCNT is BSF then."""
    guest = Guest(cpu="x86-64-v2")
    start = State([1] * 3 + [DATA, DATA + 0x4400] + [1] * 11, CODE, 0x202, _image(header=3))
    try:
        assert guest.run(bytes.fromhex(code) + b"\x0f\x0b", start, bytes(DATA_SIZE)).ended == ended
    finally:
        guest.close()
