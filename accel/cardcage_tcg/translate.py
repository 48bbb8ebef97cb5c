"""Guest code to a block: decode up to a branch, find which flags live, and join the templates.

A block is position independent but for its pc: it may be installed wherever its bytes are found again.
"""

from __future__ import annotations

from struct import pack, pack_into
from typing import TYPE_CHECKING

from attrs import define, frozen
from iced_x86 import Code, ConditionCode, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register

from cardcage_tcg import layout as L
from cardcage_tcg.emit import (
    HOST,
    NUMBER,
    SPILLED,
    call_state,
    flags_load,
    flags_save,
    jmp_state,
    load,
    mov,
    payload_nop,
    store,
)
from cardcage_tcg.system import ends_block
from cardcage_tcg.templates import ALL_FLAGS, Access, Emulate, Template, Templates

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MAX_INSTRUCTIONS", "Block", "FaultSite", "Translator"]

F, M, R, K = FlowControl, Mnemonic, Register, OpKind
MAX_INSTRUCTIONS = 64
CONDITIONS = {
    getattr(ConditionCode, name): number
    for number, name in enumerate("O NO B AE E NE BE A S NS P NP L GE LE G".split())
    if hasattr(ConditionCode, name)
} | {ConditionCode.S: 8, ConditionCode.NS: 9, ConditionCode.P: 10, ConditionCode.NP: 11, ConditionCode.O: 0, ConditionCode.NO: 1}
COUNTED = {M.JRCXZ, M.JECXZ, M.JCXZ, M.LOOP, M.LOOPE, M.LOOPNE}
HEADER = L.SIZEOF_BLOCK


@frozen
class FaultSite:
    """An instruction out of which a host signal can come: host and guest offsets in the block; flags in ``cpu.fl``."""

    start: int
    end: int
    guest: int
    stored: bool


@define
class Block:
    """A translated block, ready to be installed.

    Attributes:
        image: ``struct block`` and its code.
        length: guest bytes.
        relocations: offsets in the image of 64-bit fields that hold pc + what is there.
        sites: host signal sites, only when asked for.
    """

    image: bytearray
    length: int
    instructions: int
    relocations: list[tuple[int, int]]
    sites: list[FaultSite]


class Translator:
    """Makes blocks. One for each VM; called with the VM's translation lock held."""

    def __init__(self, *, avx: bool = False) -> None:
        self.avx = avx
        self._templates: dict[tuple[int, bool], Templates] = {}
        self.instructions = 0

    def templates(self, mode: int, *, bounce: bool = False) -> Templates:
        """The templates of *mode*."""
        found = self._templates.get((mode, bounce))
        if found is None:
            found = self._templates[mode, bounce] = Templates(mode, avx=self.avx, bounce=bounce)
        return found

    def decode(self, mode: int, pc: int, data: bytes, limit: int) -> list[tuple[Instruction, bytes]]:
        """Instructions from *pc* up to the end of a block: a branch, a page's end (*data*'s end), *limit* of them."""
        bits = 64 if mode & L.MODE_64 else 32 if mode & L.MODE_32 else 16
        decoder = Decoder(bits, data, DecoderOptions.NONE, ip=pc)
        found: list[tuple[Instruction, bytes]] = []
        at, size = 0, len(data)
        while at < size and len(found) < limit:
            ins = decoder.decode()
            if ins.code == Code.INVALID:
                if not found:
                    found.append((ins, data[at : at + 15]))
                break
            length = ins.len
            found.append((ins, data[at : at + length]))
            at += length
            if ins.flow_control != F.NEXT or ends_block(ins):
                break
        return found

    def translate(self, mode: int, pc: int, cs_base: int, phys: int, phys2: int, data: bytes, *, single: bool = False,
                  limit: int = MAX_INSTRUCTIONS, sites: bool = False) -> Block:
        """Translate the block at *pc*; *data* are the bytes from there to the end of what may be used."""
        if mode & L.MODE_TF or single:
            limit = 1
        return _Assembly(self, mode, pc, self.decode(mode, pc, data, limit + 1), single, sites, limit).finish(
            mode, pc, cs_base, phys, phys2
        )


class _Assembly:
    """The making of one block."""

    def __init__(self, translator: Translator, mode: int, pc: int, code: list[tuple[Instruction, bytes]], single: bool,
                 sites: bool, limit: int) -> None:
        self.mode, self.pc, self.single = mode, pc, single
        self.long = bool(mode & L.MODE_64)
        self.maker = translator.templates(mode, bounce=single)
        self.out = bytearray()
        self.slow: list[tuple[Access, int, int, int, int]] = []  # access, template's start, guest offset, length, back
        self.polls: list[tuple[int, int, bytes]] = []  # branch field, guest offset, what to call
        self.chains: list[tuple[int, int]] = []  # rel32 field, target
        self.misses: list[int] = []
        self.relocations: list[tuple[int, int]] = []
        self.payloads: list[tuple[int, int]] = []
        self.sites: list[FaultSite] | None = [] if sites else None
        self.stored = False  # the guest's flags are in cpu.fl, the host's may be junk
        self.emulated = False
        self.body: list[tuple[Instruction, Template]] = []
        self.raws: list[bytes] = []
        self.terminator: Instruction | None = None
        self._collect(code, limit)
        translator.instructions += len(self.body) + 1

    def _collect(self, code: list[tuple[Instruction, bytes]], limit: int) -> None:
        shadow = False
        for number, (ins, raw) in enumerate(code):
            if number >= limit and not shadow:
                self.next = ins.ip
                break
            if ins.code == Code.INVALID or (ins.flow_control != F.NEXT and not self._system(ins)):
                self.terminator = ins
                break
            try:
                t = self.maker.get(ins, raw, False)
            except Emulate:
                self.terminator, self.emulated = ins, True
                break
            self.body.append((ins, t))
            self.raws.append(raw)
            self.next = ins.next_ip
            if ends_block(ins):
                break
            if shadow:  # the instruction after STI or a load of SS: look for interrupts after it
                break
            shadow = t.shadow
        last = self.terminator if self.terminator is not None else self.body[-1][0]
        self.length = (last.next_ip - self.pc) if last.code != Code.INVALID else max(last.ip - self.pc + 1, 1)

    @staticmethod
    def _system(ins: Instruction) -> bool:
        return ends_block(ins)

    # ---- liveness ----

    def _liveness(self) -> list[tuple[int, int]]:
        live = ALL_FLAGS
        found = []
        for _, t in reversed(self.body):
            after = live
            live = live & ~t.kills | t.reads
            found.append((live, after))
        found.reverse()
        return found

    # ---- assembly ----

    def finish(self, mode: int, pc: int, cs_base: int, phys: int, phys2: int) -> Block:
        out = self.out
        lives = self._liveness()
        entry_live = lives[0][0] if lives else ALL_FLAGS
        if entry_live:
            out += flags_load
        entry = len(out)
        poll = not self.single and self._wants_poll()
        if poll and any(t.shadow for _, t in self.body):  # never between STI and the instruction after it
            if entry_live:
                self._save()
            self._poll(pc)
            poll = False
        for i, (ins, t) in enumerate(self.body):
            before, after = lives[i]
            if poll and not before:
                self._poll(ins.ip)
                poll = False
                self.stored = False
            if t.clobbers:
                if before or t.flags_stored:
                    self._save()
                    if t.flags_stored:
                        pass
                    elif t.reads or (t.kills and after & ~t.kills):
                        t = self.maker.get(ins, self.raws[i], True)
                        self.stored = False
                    elif t.kills:
                        self.stored = False
                elif t.kills:
                    self.stored = False
            elif self.stored and (t.reads or (t.kills and after & ~t.kills)):
                self._restore()
            elif t.kills:
                self.stored = False
            self._place(ins, t)
        if poll:
            self._save()
            self._poll(self.terminator.ip if self.terminator is not None else self.next)
        self._end()
        self._cold()
        image = bytearray(HEADER) + out
        pack_into("<QQQQIHHII", image, 0, pc, cs_base, phys, phys2, mode, self.length, 0, len(out), entry)
        return Block(
            image,
            self.length,
            len(self.body) + (self.terminator is not None),
            [(HEADER + at, relative) for at, relative in self.relocations],
            self.sites or [],
        )

    def _save(self) -> None:
        if not self.stored:
            self.out += flags_save
            self.stored = True

    def _restore(self) -> None:
        if self.stored:
            self.out += flags_load
            self.stored = False

    def _place(self, ins: Instruction, t: Template) -> None:
        out = self.out
        start = len(out)
        stored = self.stored
        out += t.code
        guest = ins.ip - self.pc
        if t.rip is not None:
            self._relocate(start + t.rip[0], guest + t.rip[1])
        for access in t.accesses:
            self.slow.append((access, start, guest, ins.len, len(out)))
        if t.payload >= 0:
            self.payloads.append((start + t.payload, guest))
        if t.flags_stored:
            self.stored = True
        if self.sites is not None:
            self.sites.append(FaultSite(HEADER + start, HEADER + len(out), guest, stored))

    def _relocate(self, at: int, relative: int) -> None:
        """The 64-bit field at *at* is pc + *relative*."""
        self.relocations.append((at, relative))
        pack_into("<Q", self.out, at, (self.pc + relative) % (1 << 64))

    def _wants_poll(self) -> bool:
        """Every loop has a block that ends in a backward, indirect or unknown transfer: those look for events."""
        ins = self.terminator
        if ins is None or self.emulated:
            return False
        if ins.flow_control in (F.UNCONDITIONAL_BRANCH, F.CONDITIONAL_BRANCH) and ins.mnemonic not in COUNTED:
            return bool(ins.near_branch_target <= ins.ip)
        return ins.code != Code.INVALID

    def _poll(self, ip: int) -> None:
        self.out += b"\x83\xbc\x24" + pack("<iB", L.POLL, 0) + b"\x0f\x85\0\0\0\0"
        self.polls.append((len(self.out) - 4, ip - self.pc, call_state(L.STUBS + 8 * L.STUB_POLL)))

    # ---- ends ----

    def _end(self) -> None:
        ins = self.terminator
        if ins is None:
            last, t = self.body[-1]
            if self.single:
                self._save()
                self._helper(L.HLP_SINGLE, last.ip, last.len)
            elif self.mode & L.MODE_TF:
                self._save()
                self._helper(L.HLP_STEP, last.next_ip, 0)
            elif len(self.body) > 1 and self.body[-2][1].shadow:
                self._save()
                self._poll_now(self.next)
                self._restore()
                self._chain(self.next)
            else:
                self._restore()
                self._chain(self.next)
            return
        if ins.code == Code.INVALID or self.emulated or self.single:
            self._save()
            self._helper(L.HLP_EMULATE, ins.ip, ins.len if ins.code != Code.INVALID else 0)
            return
        flow = ins.flow_control
        if self.mode & L.MODE_TF:  # rare: Python does the branch and then the trap
            self._save()
            self._helper(L.HLP_EMULATE, ins.ip, ins.len)
        elif flow == F.CONDITIONAL_BRANCH and ins.mnemonic in COUNTED:
            self._counted(ins)
        elif flow == F.CONDITIONAL_BRANCH:
            self._restore()
            self._jcc(CONDITIONS[ins.condition_code], ins.near_branch_target)
            self._chain(ins.next_ip)
        elif flow == F.UNCONDITIONAL_BRANCH and ins.op0_kind in (K.NEAR_BRANCH16, K.NEAR_BRANCH32, K.NEAR_BRANCH64):
            self._restore()
            self._chain(ins.near_branch_target)
        elif flow in (F.CALL, F.INDIRECT_CALL, F.INDIRECT_BRANCH, F.RETURN) and self._near(ins):
            pass
        else:
            self._save()
            self._helper(L.HLP_EMULATE, ins.ip, ins.len)

    def _near(self, ins: Instruction) -> bool:
        size = self.maker.width
        near = {
            2: (K.NEAR_BRANCH16,),
            4: (K.NEAR_BRANCH32,),
            8: (K.NEAR_BRANCH64,),
        }[size]
        start = len(self.out)
        t = Template()
        out = bytearray()
        flow = ins.flow_control
        target_direct = -1
        if flow == F.RETURN:
            if ins.mnemonic != M.RET or self.maker.operand_width_of_return(ins) != size:
                return False
            self.maker.stack_pointer(0, out)
            self.maker.access(out, t, size, False, False)
            out += {2: b"\x0f\xb7\x36", 4: b"\x8b\x36", 8: b"\x48\x8b\x36"}[size]
            extra = ins.immediate16 if ins.op_count else 0
            self.maker.stack_commit(size + extra, out)
        else:
            if flow == F.CALL:
                if ins.op0_kind not in near:
                    return False
                target_direct = ins.near_branch_target
            elif not self.maker.branch_operand(ins, out, t):
                return False
            if flow in (F.CALL, F.INDIRECT_CALL):
                if flow == F.INDIRECT_CALL:
                    out += store(6, L.SCRATCH + 24)
                self.maker.stack_pointer(-size, out)
                self.maker.access(out, t, size, True, False)
                if size == 8:
                    out += b"\x48\xbf"
                    t.payload = len(out)  # the return address: filled in below
                    out += bytes(8) + b"\x48\x89\x3e"
                elif size == 4:
                    out += b"\xc7\x06" + pack("<I", ins.next_ip & 0xFFFFFFFF)
                else:
                    out += b"\x66\xc7\x06" + pack("<H", ins.next_ip & 0xFFFF)
                self.maker.stack_commit(-size, out)
                if flow == F.INDIRECT_CALL:
                    out += load(6, L.SCRATCH + 24)
        self._save()
        start = len(self.out)
        self.out += out
        if t.payload >= 0:
            self._relocate(start + t.payload, ins.next_ip - self.pc)
        guest = ins.ip - self.pc
        if t.rip is not None:
            self._relocate(start + t.rip[0], guest + t.rip[1])
        for access in t.accesses:
            self.slow.append((access, start, guest, ins.len, len(self.out)))
        if target_direct >= 0:
            self._restore()
            self._chain(target_direct)
        else:
            self._indirect()
        return True

    def _indirect(self) -> None:
        """Go to RSI through the jump cache; flags are in cpu.fl."""
        table = L.JC + (L.JC_SIZE * 16 if self.mode & L.MODE_CPL3 else 0)
        self.out += b"\x89\xf7\xc1\xe7\x04\x81\xe7" + pack("<I", (L.JC_SIZE - 1) << 4)
        self.out += b"\x48\x3b\xb4\x3c" + pack("<i", table) + b"\x0f\x85\0\0\0\0"
        self.misses.append(len(self.out) - 4)
        self.out += b"\xff\xa4\x3c" + pack("<i", table + 8)

    def _counted(self, ins: Instruction) -> None:
        """LOOPcc, JRCXZ: the host's own, over a taken jump."""
        self._restore()
        out = self.out
        address = ins.code
        name_64 = {Code.JRCXZ_REL8_64, Code.LOOP_REL8_64_RCX, Code.LOOPE_REL8_64_RCX, Code.LOOPNE_REL8_64_RCX}
        wide32 = {
            Code.JECXZ_REL8_64, Code.LOOP_REL8_64_ECX, Code.LOOPE_REL8_64_ECX, Code.LOOPNE_REL8_64_ECX,
            Code.JECXZ_REL8_32, Code.LOOP_REL8_32_ECX, Code.LOOPE_REL8_32_ECX, Code.LOOPNE_REL8_32_ECX,
            Code.JECXZ_REL8_16, Code.LOOP_REL8_16_ECX, Code.LOOPE_REL8_16_ECX, Code.LOOPNE_REL8_16_ECX,
        }
        opcode = {M.LOOPNE: 0xE0, M.LOOPE: 0xE1, M.LOOP: 0xE2}.get(ins.mnemonic, 0xE3)
        if address in name_64:
            prefix = b""
        elif address in wide32:
            prefix = b"\x67"
        else:
            self._save()
            self._helper(L.HLP_EMULATE, ins.ip, ins.len)
            return
        out += prefix + bytes((opcode, 0))
        branch = len(out)
        self._chain(ins.next_ip)
        out[branch - 1] = len(out) - branch
        self._chain(ins.near_branch_target)

    def _align(self, before: int) -> None:
        """A rel32 field that is patched while others run it must lie in one aligned word: pad with NOPs."""
        pad = -(len(self.out) + before) % 4
        self.out += {0: b"", 1: b"\x90", 2: b"\x66\x90", 3: b"\x0f\x1f\x00"}[pad]

    def _jcc(self, condition: int, target: int) -> None:
        self._align(2)
        self.out += bytes((0x0F, 0x80 | condition, 0, 0, 0, 0))
        self.chains.append((len(self.out) - 4, target))

    def _chain(self, target: int) -> None:
        self._align(1)
        self.out += b"\xe9\0\0\0\0"
        self.chains.append((len(self.out) - 4, target))

    def _poll_now(self, ip: int) -> None:
        """Look for events before the instruction at *ip*; flags are stored."""
        self._poll(ip)

    def _helper(self, number: int, ip: int, length: int) -> None:
        """Call a helper as the block's end; flags are in cpu.fl."""
        self.out += b"\xbf" + pack("<I", number | length << 8) + call_state(L.STUBS + 8 * L.STUB_HELPER)
        self.payloads.append((len(self.out) + 4, ip - self.pc))
        self.out += payload_nop

    # ---- the cold part ----

    def _cold(self) -> None:
        out = self.out
        for access, start, guest, length, _ in self.slow:
            self._patch(start + access.branch, len(out))
            out += call_state(access.stub) + b"\xe9"
            out += pack("<i", start + access.resume - len(out) - 4)
            out += pack("<IHHBBHi", HEADER + len(out), guest, access.size, access.source, length, 0, access.immediate)
        for branch, guest, call in self.polls:
            self._patch(branch, len(out))
            out += call
            self.payloads.append((len(out) + 4, guest))
            out += payload_nop
        if self.misses:
            for branch in self.misses:
                self._patch(branch, len(out))
            out += jmp_state(L.STUBS + 8 * L.STUB_JUMP)
        wrap = 0 if self.long else 1 if self.mode & L.MODE_32 else 2
        for field, target in self.chains:
            while (len(out) + 7) % 8:  # struct site holds a u64
                out += b"\x90"
            self._patch(field, len(out))
            out += call_state(L.STUBS + 8 * L.STUB_CHAIN)
            here = len(out)
            delta = (target - self.pc + (1 << 31)) % (1 << 64) - (1 << 31)
            if not -(1 << 31) <= delta < 1 << 31:
                delta = (delta + (1 << 31)) % (1 << 32) - (1 << 31)
            out += pack("<IIiIQ", HEADER + here, here - field, delta, wrap, 0)
        for at, guest in self.payloads:
            # the stub's return address is where the NOP begins
            pack_into("<I", out, at, (HEADER + at - 4) << 12 | guest)

    def _patch(self, field: int, to: int) -> None:
        pack_into("<i", self.out, field, to - field - 4)


