"""Templates, and the code for an instruction's memory operands: address, segment, limit, soft TLB."""

from __future__ import annotations

from struct import pack
from typing import TYPE_CHECKING

from iced_x86 import (
    Code,
    CpuidFeature,
    Encoder,
    Instruction,
    InstructionInfoFactory,
    MemoryOperand,
    MemorySizeInfo,
    Mnemonic,
    OpKind,
    Register,
)

from cardcage_tcg import layout as L
from cardcage_tcg.translate.emit import (
    HOST,
    NUMBER,
    SPILLED,
    flags_load,
    load,
    load32,
    mov,
    mov32,
    named,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
from cardcage_tcg.translate.allowed import (
    ALIGNED,
)

__all__ = ["Access", "Emulate", "Operands", "Template"]

M, R, K = Mnemonic, Register, OpKind


class Emulate(Exception):
    """The instruction is Python's to do."""


class Access:
    """One memory access inside a template: where its slow path is entered and where that goes on.

    Attributes:
        base: the guest register that its address is made of, with *index* times *scale* (index -1: none) and *disp*;
            -1 where it is made in another way. Such an access can do without a look-up of its own, where one before it
            had the same registers: the code from *start* to the operation is left out then, and the ModRM byte at
            *operand*, whose memory operand is ``[rsi]``, gets a displacement.
    """

    __slots__ = (
        *("base", "branch", "disp", "flags", "immediate", "index", "operand", "resume", "scale", "size", "source"),
        *("start", "stub"),
    )

    def __init__(
        self, branch: int, resume: int, stub: int, size: int, source: int = 0, immediate: int = 0, flags: int = 0
    ) -> None:
        self.branch, self.resume, self.stub, self.size = branch, resume, stub, size
        self.source, self.immediate, self.flags = source, immediate, flags
        self.base = self.index = -1
        self.scale, self.disp, self.start, self.operand = 1, 0, 0, 0

    @property
    def form(self) -> tuple[int, ...]:
        """All but what displacement and immediate decide."""
        address = self.base, self.index, self.scale, self.start, self.operand
        return (self.branch, self.resume, self.stub, self.size, self.source, self.flags, *address)


class Template:
    """Host code of one instruction.

    Attributes:
        code: the bytes, holes zero.
        reads, kills: arithmetic flags it needs, and those it surely replaces.
        clobbers: its code destroys the host's flags before the operation, so live flags must be in ``cpu.fl``.
        flags_stored: afterwards the guest's flags are in ``cpu.fl``, not in the host's.
        rip: ``(offset, relative)`` of a 64-bit hole for a RIP-relative address, or None.
        payload: offset of a payload NOP's displacement, or -1.
        accesses: its memory accesses.
        shadow: interrupts are held back until after the next instruction.
        written: of a single, the bytes that it writes at ``cpu.write_ptr``.
        borrowed: guest RAX and RDX are in ``cpu.scratch`` during the operation; a fault puts them back.
        moves: how far it moves the stack pointer, where that is all that it does to it.
    """

    __slots__ = (
        *("accesses", "borrowed", "clobbers", "code", "flags_stored"),
        *("kills", "moves", "payload", "reads", "rip", "shadow", "written"),
    )

    def __init__(self) -> None:
        self.code = b""
        self.reads = self.kills = 0
        self.clobbers = self.flags_stored = self.shadow = self.borrowed = False
        self.rip: tuple[int, int] | None = None
        self.payload = -1
        self.written = self.moves = 0
        self.accesses: Sequence[Access] = ()


class Operands:
    """Makes templates for one mode (``MODE_*`` bits); *bounce* for singles, whose writes go to ``cpu.bounce``."""

    def __init__(self, mode: int, *, hidden: frozenset[int] = frozenset(), bounce: bool = False) -> None:
        self.mode, self.hidden, self.bounce = mode, hidden, bounce
        self.avx = CpuidFeature.AVX not in hidden
        self.pku = CpuidFeature.PKU not in hidden
        self.long = bool(mode & L.MODE_64)
        self.width = 8 if self.long else 4 if mode & L.MODE_32 else 2
        self.user = mode & L.MODE_CPL3
        self.floats = self.long and bool(self.user)
        """The code does not hold its address: ``floats()`` in internal.h."""
        self.tlb_read = L.TLB_R + (L.SIZEOF_TLB if self.user else 0)
        self.tlb_write = L.TLB_W + (L.SIZEOF_TLB if self.user else 0)
        self._encoder = Encoder(64)
        self._info = InstructionInfoFactory()
        self._sizes: dict[int, int] = {}
        self._looked = 0  # ACCESS_LOOKED: the address that was last made was compared with its segment's limit

    # ---- pieces ----

    def encode(self, ins: Instruction) -> bytes:
        try:
            self._encoder.encode(ins, 0)
        except ValueError as error:
            raise Emulate(str(error)) from error
        return bytes(self._encoder.take_buffer())

    def size_of(self, ins: Instruction) -> int:
        size = self._sizes.get(ins.memory_size)
        if size is None:
            size = self._sizes[ins.memory_size] = MemorySizeInfo(ins.memory_size).size
        return size

    def address(self, ins: Instruction, out: bytearray, t: Template, size: int, write: bool) -> None:
        """Code for RSI = linear address of a memory operand of *size* bytes; RDI is clobbered.

        Flags are kept, except where the segment has a limit to look at; *size* 0 looks at none.
        """
        self._offset(ins, out, t)
        self._segment(ins, out, t, size, write)

    def _offset(self, ins: Instruction, out: bytearray, t: Template) -> int:
        """Code for RSI = effective address of the memory operand (RDI clobbered, flags kept); its width in bytes."""
        base, index, scale, disp = ins.memory_base, ins.memory_index, ins.memory_index_scale, ins.memory_displacement
        if base in (R.RIP, R.EIP):
            t.rip = len(out) + 2, disp - ins.ip
            out += b"\x48\xbe" + bytes(8)
            if self.floats:  # from the page that the block runs in
                out += load(7, L.BASE) + b"\x48\x8d\x34\x3e"
            if base == R.EIP:
                out += mov32(6, 6)
            return 8 if base == R.RIP else 4
        b, x = NUMBER.get(base), NUMBER.get(index)
        if b is None and x is None:
            width = (
                ins.memory_displ_size
                if ins.memory_displ_size in (2, 4) and not self.long
                else self.width
                if not self.long
                else 8
            )
            disp &= (1 << width * 8) - 1
            if width == 8 and (disp < 1 << 31 or disp >= (1 << 64) - (1 << 31)):
                out += b"\x48\xc7\xc6" + pack("<I", disp & 0xFFFFFFFF)
            else:
                out += b"\x48\xbe" + pack("<Q", disp) if width == 8 else b"\xbe" + pack("<I", disp)
            return width
        if (b or x)[1] == 2:
            self._address16(b, x, disp, out)
            return 2
        wide = (b or x)[1]
        host_base = self._host(b, 6, out)
        host_index = self._host(x, 7, out)
        if host_base is None and scale == 1:
            host_base, host_index = host_index, None
        disp -= 1 << 64 if disp >> 63 else 0
        if wide == 4 and disp >= 1 << 31:
            disp -= 1 << 32
        if not disp and host_index is None and host_base is not None:
            if host_base != 6 or wide == 4:
                out += mov(6, host_base) if wide == 8 else mov32(6, host_base)
        else:
            shape = 0 if disp == 0 else 1 if -128 <= disp < 128 else 8
            operand = MemoryOperand(
                R.NONE if host_base is None else named[host_base, 8],
                R.NONE if host_index is None else named[host_index, 8],
                1 if host_index is None else scale,
                disp,
                shape or int(host_base in (5, 13)),
            )
            code, target = (Code.LEA_R64_M, R.RSI) if wide == 8 else (Code.LEA_R32_M, R.ESI)
            out += self.encode(Instruction.create_reg_mem(code, target, operand))
        return wide

    def _host(self, register: tuple[int, int] | None, scratch: int, out: bytearray) -> int | None:
        if register is None:
            return None
        number = register[0]
        if number in SPILLED:
            out += load(scratch, L.GPR + 8 * number)
            return scratch
        return HOST.get(number, number)

    def _address16(self, b: tuple[int, int] | None, x: tuple[int, int] | None, disp: int, out: bytearray) -> None:
        for register, scratch in ((b, 6), (x, 7)):
            if register is None:
                out += pack("<Bi", 0xB8 | scratch, 0)
            else:
                host = HOST.get(register[0], register[0])
                rex = 0x40 | host >> 3
                out += (bytes((rex,)) if rex != 0x40 else b"") + bytes((0x0F, 0xB7, 0xC0 | scratch << 3 | (host & 7)))
        out += b"\x8d\xb4\x3e" + pack("<i", disp & 0xFFFF)  # lea esi, [rsi+rdi+disp]
        out += b"\x0f\xb7\xf6"  # movzx esi, si

    def _segment(self, ins: Instruction, out: bytearray, t: Template, size: int, write: bool) -> None:
        segment, self._looked = ins.memory_segment, 0
        if self.long:
            if segment in (R.FS, R.GS):
                out += load(7, L.FSBASE if segment == R.FS else L.GSBASE) + b"\x48\x8d\x34\x3e"
        elif segment in (R.CS, R.FS, R.GS) or not self.mode & L.MODE_FLAT:  # CS: not to be written
            self._limit(out, t, segment - R.ES, size, write)
            out += load32(7, L.SEGBASE + 8 * (segment - R.ES)) + b"\x8d\x34\x3e"

    def stack_segment(self, out: bytearray, t: Template, size: int, write: bool) -> None:
        """RSI, an offset in the stack segment, becomes a linear address."""
        self._looked = 0
        if not self.long and not self.mode & L.MODE_FLAT:
            self._limit(out, t, 2, size, write)
            out += load32(7, L.SEGBASE + 16) + b"\x8d\x34\x3e"

    def _limit(self, out: bytearray, t: Template, segment: int, size: int, write: bool) -> None:
        """Protected mode: #GP or #SS unless RSI to RSI + *size* lie in the segment (``struct limit``)."""
        if not size or not self.mode & L.MODE_PE:
            return
        self._looked = L.ACCESS_LOOKED
        at = L.LIMITS + L.SIZEOF_LIMIT * segment
        out += b"\x89\xf7\x2b\xbc\x24" + pack("<i", at + L.LIMIT_LOW)  # mov edi, esi; sub edi, [low]
        out += b"\x48\x8d\xbf" + pack("<i", size)  # lea rdi, [rdi + size]
        out += b"\x48\x3b\xbc\x24" + pack("<i", at + (L.LIMIT_WRITE if write else L.LIMIT_READ))
        self._unless(out, t, b"\x0f\x87", size, 1 if segment == 2 else 0)

    def near(self, t: Template, at: int, start: int, operand: int, base: int, disp: int) -> None:
        """The address of access *at* is a register's value and a displacement: see :class:`Access`."""
        if self.long and not self.bounce and not self.mode & L.MODE_AC and t.accesses:
            one = t.accesses[at]
            one.base, one.disp, one.start, one.operand = base, disp, start, operand

    def near_operand(self, ins: Instruction, t: Template, at: int, start: int, operand: int) -> None:
        """Likewise for the explicit memory operand, if it is of that kind."""
        base, index = NUMBER.get(ins.memory_base, (-1, 0)), NUMBER.get(ins.memory_index, (-1, 8))
        if base[1] != 8 or index[1] != 8 or ins.memory_segment in (R.FS, R.GS):
            return
        disp = ins.memory_displacement
        self.near(t, at, start, operand, base[0], disp - (1 << 64) if disp >> 63 else disp)
        t.accesses[at].index, t.accesses[at].scale = index[0], ins.memory_index_scale

    def modrm_of(self, plain: Instruction) -> int:
        """Offset of the ModRM byte in the encoding of *plain*, whose memory operand is ``[rsi]``; -1: it has none."""
        far = plain.copy()
        far.memory_displacement, far.memory_displ_size = 0x11, 1
        one, other = self.encode(plain), self.encode(far)
        at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), -1)
        is_it = at >= 0 and other == one[:at] + bytes((one[at] | 0x40, 0x11)) + one[at + 1 :]
        return at if is_it and one[at] & 0xC7 == 6 else -1

    def _unless(self, out: bytearray, t: Template, branch: bytes, size: int, flags: int) -> None:
        """The conditional *branch* goes to what raises the exception that *flags* (``ACCESS_*``) say."""
        out += branch + bytes(4)
        t.clobbers = True
        t.accesses = (*t.accesses, Access(len(out) - 4, len(out), L.STUB_LIMIT, size, flags=flags))

    def access(
        self,
        out: bytearray,
        t: Template,
        size: int,
        write: bool,
        restore: bool,
        *,
        store_source: int = -1,
        immediate: int = 0,
        stack: bool = False,
        alignment: int = 0,
        more: int = 0,
    ) -> int:
        """Code for RSI = host address of *size* bytes at linear RSI; index of the :class:`Access` it adds.

        *alignment* is for #AC, where it is not the size's; *more*: further ``ACCESS_*`` flags.
        """
        t.clobbers = True
        aligned = alignment or ALIGNED.get(size, 1)
        if self.mode & L.MODE_AC and aligned > 1:  # test esi, alignment - 1
            out += b"\xf7\xc6" + pack("<I", aligned - 1)
            self._unless(out, t, b"\x0f\x85", size, L.ACCESS_AC)
        if write and self.bounce:
            t.written = size
            out += load(6, L.WRITE_PTR)
            branch = -1
        else:
            table = self.tlb_write if write else self.tlb_read
            out += b"\x89\xf7\xc1\xef\x08\x81\xe7" + pack("<I", (L.TLB_SIZE - 1) << 4)
            out += b"\x48\x33\xb4\x3c" + pack("<i", table) + b"\x48\x81\xfe" + pack("<I", 4096 - size)
            out += b"\x0f\x87\0\0\0\0"
            branch = len(out) - 4
            out += b"\x48\x03\xb4\x3c" + pack("<i", table + 8)
        stub = (L.STUB_STORE_K if store_source >= 0 else L.STUB_WRITE_K if write else L.STUB_READ_K) + bool(self.user)
        flags = int(stack) | self._looked | more
        one = Access(branch, len(out), stub, size, max(store_source, 0), immediate, flags)
        if branch >= 0:
            t.accesses = (*t.accesses, one)
        if restore:
            out += flags_load
        return len(t.accesses) - 1
