"""The translator's Python half: decode guest code and make a template for each instruction that has none yet.

Templates go into a store in native memory, keyed by mode and instruction bytes; ``native/blocks/assemble.c`` joins
them to blocks. The store holds offsets only, so it is kept in a file between runs: later boots begin with it.
"""

from __future__ import annotations

from struct import pack, pack_into
from typing import TYPE_CHECKING

from attrs import evolve
from cardcage.values import frozen
from iced_x86 import (
    Code,
    ConditionCode,
    FlowControl,
    Instruction,
    InstructionInfoFactory,
    Mnemonic,
    OpKind,
    RegisterExt,
    RflagsBits,
)

from cardcage_tcg import MAX_INSTRUCTIONS
from cardcage_tcg import layout as L
from cardcage_tcg.translate.allowed import NAMES, SHIFTS, WRITES, decoder_of, is_foreign
from cardcage_tcg.translate.emit import NUMBER, add, load, store
from cardcage_tcg.translate.operands import Emulate, Template
from cardcage_tcg.translate.system import ends_block
from cardcage_tcg.translate.templates import Templates

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cardcage_tcg.translate.store import TemplateStore

__all__ = ["Translator"]

F, M, K = FlowControl, Mnemonic, OpKind
_INFO = InstructionInfoFactory()
_NONE: Mapping[int, tuple[int, int]] = {}
MODES = 64
"""The most modes whose template makers are kept."""
_CONDITION_NAMES = ["o", "no", "b", "ae", "e", "ne", "be", "a", "s", "ns", "p", "np", "l", "ge", "le", "g"]
CONDITIONS = {
    getattr(ConditionCode, name if hasattr(ConditionCode, name) else name.upper()): i
    for i, name in enumerate(_CONDITION_NAMES)
}
COUNTED = {M.JRCXZ: 0xE3, M.JECXZ: 0xE3, M.JCXZ: 0xE3, M.LOOP: 0xE2, M.LOOPE: 0xE1, M.LOOPNE: 0xE0}
_COUNTER_64 = {
    code
    for code, name in NAMES.items()
    if name == "JRCXZ_REL8_64" or (name.startswith("LOOP") and name.endswith("64_RCX"))
}
_COUNTER_32 = {
    code
    for code, name in NAMES.items()
    if name.startswith("JECXZ_REL8") or (name.startswith("LOOP") and name.endswith("_ECX"))
}
_FLAG_BITS = (RflagsBits.OF, RflagsBits.SF, RflagsBits.ZF, RflagsBits.AF, RflagsBits.CF, RflagsBits.PF)
_DIRECT = (K.NEAR_BRANCH16, K.NEAR_BRANCH32, K.NEAR_BRANCH64)


def _signed(value: int) -> int:
    """A difference of two addresses as 64 bits with sign."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _six(flags: int) -> int:
    return sum(1 << i for i, bit in enumerate(_FLAG_BITS) if flags & bit)


@frozen
class _Part:
    """Fields of ``struct tmpl`` beside the template: how it ends a block, where it goes, a return address's hole, the
    registers that it changes."""

    template: Template
    kind: int = L.K_NORMAL
    relative: int = 0
    aux: int = 0
    flags: int = 0
    hole: tuple[int, int] | None = None
    changes: int = 0


def _fields(maker: Templates, raw: bytes) -> list[tuple[int, int]]:
    """(offset, size) of displacement and immediate."""
    decoder = decoder_of(8 * maker.width, raw)
    where = decoder.get_constant_offsets(decoder.decode())
    found = []
    if where.has_displacement:
        found.append((where.displacement_offset, where.displacement_size))
    if where.has_immediate:
        found.append((where.immediate_offset, where.immediate_size))
    if where.has_immediate2:
        found.append((where.immediate_offset2, where.immediate_size2))
    return found


def _value(raw: bytes, at: int, size: int) -> int:
    return int.from_bytes(raw[at : at + size], "little", signed=True)


def _both(raws: list[bytes], field: tuple[int, int]) -> tuple[int, int]:
    """The field's value in each of two encodings."""
    return _value(raws[0], *field), _value(raws[1], *field)


def _changes(ins: Instruction, t: Template) -> int:
    """A bit for each general register that it writes; not RSP where the template says how far that moves."""
    found = 0
    for used in _INFO.info(ins).used_registers():
        number = NUMBER.get(RegisterExt.full_register(used.register))
        if number is not None and used.access in WRITES:
            found |= 1 << number[0]
    return found & ~(1 << 4) if t.moves else found


def _delta(raw: bytes, at: int, relative: int) -> int:
    return _signed(relative - _value(raw, at, 4))


class Translator:
    """Fills the template store of a VM. Called with the VM's translation lock held.

    Args:
        store: where they are kept.
        head_length: ``tcg_head_length``: bytes, room and mode to the length of an instruction's head.
        hidden: ``iced_x86.CpuidFeature`` of instructions that guests must not have.
        note: told of each instruction that gets a template, by its key and bytes.
    """

    def __init__(
        self,
        store: TemplateStore,
        head_length: Callable[[bytes, int, int], int],
        *,
        hidden: frozenset[int],
        note: Callable[[int, bytes], None] = lambda key, raw: None,
    ) -> None:
        self._hidden, self._head_length, self._store, self._note = hidden, head_length, store, note
        self._templates: dict[tuple[int, bool], Templates] = {}
        self._six: dict[int, int] = {}
        self.made = 0

    def templates(self, mode: int, *, single: bool = False) -> Templates:
        """Return the maker of templates for *mode*."""
        found = self._templates.get((mode, single))
        if found is None:
            if len(self._templates) >= MODES:  # a guest can have any of thousands
                self._templates.clear()
            found = self._templates[mode, single] = Templates(mode, hidden=self._hidden, bounce=single)
        return found

    @staticmethod
    def decode(mode: int, pc: int, data: bytes, limit: int) -> list[tuple[Instruction, bytes]]:
        """Instructions from *pc* up to a branch, the end of *data*, or *limit* of them, or an invalid instruction."""
        bits = 64 if mode & L.MODE_64 else 32 if mode & L.MODE_32 else 16
        decoder = decoder_of(bits, data, pc)
        found: list[tuple[Instruction, bytes]] = []
        at, size = 0, len(data)
        while at < size and len(found) < limit:
            ins = decoder.decode()
            if ins.code == Code.INVALID:
                if not found or size - at >= 15:
                    found.append((ins, data[at : at + 15]))
                break
            length = ins.len
            found.append((ins, data[at : at + length]))
            at += length
            if ins.flow_control != F.NEXT or ends_block(ins):
                break
        return found

    def make(
        self,
        mode: int,
        pc: int,
        data: bytes,
        add: Callable[[bytes, bool], bool],
        has: Callable[[int, bytes], int],
        *,
        single: bool = False,
    ) -> bool:
        """Make the templates that the block at *pc* lacks. False when the store is full."""
        limit = 1 if single or mode & L.MODE_STEP else MAX_INSTRUCTIONS + 1
        mode &= ~L.MODE_STEP
        key = mode | (L.KEY_SINGLE if single else 0)
        maker = self.templates(mode, single=single)
        for ins, raw in self.decode(mode, pc, data, limit):
            known = has(key, raw)
            if known == 1:
                continue
            self.made += 1
            self._note(key, raw)
            if raw[0] == 0xE8 and ins.mnemonic == M.CALL and ins.op0_kind in _DIRECT[1:]:
                # one template serves all direct calls
                made = [self._serialize(maker, key | L.KEY_CALL, ins, raw[:1])]
            else:
                made = self._shape(maker, key, ins, raw, exact=known == 2)
            for plain, restored in made:
                if restored is not None:
                    pack_into("<I", plain, 8, self._store.used)
                    if not add(bytes(restored), False):
                        return False
                if not add(bytes(plain), True):
                    return False
        return True

    def _shape(
        self, maker: Templates, key: int, ins: Instruction, raw: bytes, *, exact: bool
    ) -> list[tuple[bytearray, bytearray | None]]:
        """The template of all instructions with *raw*'s head; or, *exact* or not possible, of this one alone."""
        head = self._head_length(raw, len(raw), key)
        foreign = is_foreign(ins)  # the head alone says so, whatever the rest and its length
        invalid = ins.code == Code.INVALID or foreign
        if head and (not exact or foreign):
            fields = [] if invalid else _fields(maker, raw)
            whole = head + sum(size for _, size in fields) == len(
                raw
            )  # else its last byte names a register (VEX's is4)
            if not fields and (whole or invalid):
                return [self._serialize(maker, key, ins, raw, head=raw[:head])]
            if whole and ins.mnemonic not in SHIFTS:  # a count of zero keeps the flags
                found = self._generalize(maker, key, ins, raw, raw[:head], fields)
                if found is not None:
                    return [found]
        own = self._serialize(maker, key | L.KEY_EXACT, ins, raw)
        if exact or not head:
            return [own]
        marker = self._pack(key, raw[:head], Template(), L.K_NORMAL, flags=L.T_EXACT, total=len(raw))
        return [own, (marker, None)]

    def _generalize(
        self, maker: Templates, key: int, ins: Instruction, raw: bytes, head: bytes, fields: list[tuple[int, int]]
    ) -> tuple[bytearray, bytearray | None] | None:
        """Make the template twice, with other displacements and immediates, and see where those land. None when the two
        differ in more than copies of them."""
        raws = []
        for pattern in (b"\x11\x12\x13\x14\x15\x16\x17\x18", b"\xa1\xa2\xa3\xa4\xa5\xa6\xa7\xa8"):
            changed = bytearray(raw)
            for number, (at, size) in enumerate(fields):
                part = bytes(value + 0x20 * number for value in pattern[8 - size :])
                changed[at : at + size] = part
            raws.append(bytes(changed))
        bits = 64 if key & L.MODE_64 else 32 if key & L.MODE_32 else 16
        pairs = []
        for one in raws:
            again = decoder_of(bits, one, ins.ip).decode()
            if again.code != ins.code or again.len != ins.len:
                return None
            pairs.append(self._parts(maker, again, one))
        done: list[bytearray | None] = []
        for first, second in zip(*pairs, strict=True):
            if first is None or second is None:
                if first is not second:
                    return None
                done.append(None)
                continue
            made = self._merge(key, head, len(raw), raws, fields, first, second)
            if made is None:
                return None
            done.append(made)
        plain, restored = done
        return None if plain is None else (plain, restored)

    def _merge(
        self,
        key: int,
        head: bytes,
        total: int,
        raws: list[bytes],
        fields: list[tuple[int, int]],
        first: _Part,
        second: _Part,
    ) -> bytearray | None:
        """One template out of two that differ only in *fields*, or None."""
        a, b = first.template, second.template
        if (
            len(a.code) != len(b.code) or (a.reads, a.kills, a.payload) != (b.reads, b.kills, b.payload)
            or evolve(first, template=b) != second
            or len(a.accesses) != len(b.accesses) or (a.rip is None) != (b.rip is None)
        ):  # fmt: skip
            return None
        rip_field = immediate_field = immediate_size = 0
        displaced = {}
        rip = a.rip
        if a.rip is not None and b.rip is not None and a.rip != b.rip:
            at = next(
                (
                    at
                    for at, size in fields
                    if size == 4 and _delta(raws[0], at, a.rip[1]) == _delta(raws[1], at, b.rip[1])
                ),
                0,
            )
            if not at or a.rip[0] != b.rip[0]:
                return None
            rip_field, rip = at, (a.rip[0], _delta(raws[0], at, a.rip[1]))
        for number, (one, other) in enumerate(zip(a.accesses, b.accesses, strict=True)):
            if one.form != other.form:
                return None
            if one.disp != other.disp:
                match = [field for field in fields if _both(raws, field) == (one.disp, other.disp)]
                if len(match) != 1:
                    return None
                displaced[number] = match[0]
            if one.immediate != other.immediate:
                wanted = one.immediate, other.immediate
                match = [field for field in fields if field[1] <= 4 and _both(raws, field) == wanted]
                if len(match) != 1:
                    return None
                immediate_field, immediate_size = match[0]
        copies = []
        rebuilt = bytearray(a.code)
        for at, size in fields:
            places = [
                i for i in range(len(a.code) - size + 1)
                if a.code[i : i + size] == raws[0][at : at + size] and b.code[i : i + size] == raws[1][at : at + size]
            ]  # fmt: skip
            if len(places) > 1:
                return None
            if places:
                copies.append((at, size, places[0]))
                rebuilt[places[0] : places[0] + size] = raws[1][at : at + size]
        if bytes(rebuilt) != b.code:
            return None
        a.rip = rip
        return self._pack(
            key, head, a, first.kind, relative=first.relative, flags=first.flags, hole=first.hole, aux=first.aux,
            length=total, total=total, rip_field=rip_field, immediate=(immediate_field, immediate_size), copies=copies,
            displaced=displaced, changes=first.changes,
        )  # fmt: skip

    def _parts(self, maker: Templates, ins: Instruction, raw: bytes) -> tuple[_Part, _Part | None]:
        """Return the parts of a template, and those of its form that puts flags back."""
        flow = ins.flow_control
        try:
            if flow != F.NEXT and not ends_block(ins):
                return self._branch(maker, ins), None
            t = maker.get(ins, raw, False)
            extra = L.T_END if ends_block(ins) else 0
            restored = None
            if t.clobbers and not t.flags_stored and (t.reads or t.kills):
                again = maker.get(ins, raw, True)
                restored = _Part(again, relative=t.written, flags=extra, changes=_changes(ins, again))
            return _Part(t, relative=t.written, flags=extra, changes=_changes(ins, t)), restored
        except Emulate:
            return _Part(Template(), L.K_EMULATE), None

    def _serialize(
        self, maker: Templates, key: int, ins: Instruction, raw: bytes, *, head: bytes = b""
    ) -> tuple[bytearray, bytearray | None]:
        """A template as ``struct tmpl``, kept by *head* (else by all of *raw*), and the form that puts flags back."""
        if ins.code == Code.INVALID or is_foreign(ins):
            own = head or raw
            return self._pack(key, own, Template(), L.K_EMULATE, flags=L.T_INVALID, total=len(own)), None
        packed = [
            None if part is None else self._pack(
                key, head or raw, part.template, part.kind, relative=part.relative, aux=part.aux, flags=part.flags,
                hole=part.hole, length=ins.len, total=ins.len, changes=part.changes,
            )
            for part in self._parts(maker, ins, raw)
        ]  # fmt: skip
        plain, restored = packed
        assert plain is not None
        return plain, restored

    def _branch(self, maker: Templates, ins: Instruction) -> _Part:
        flow = ins.flow_control
        direct = ins.op_count and ins.op0_kind in _DIRECT
        relative = ins.near_branch_target - ins.ip if direct else 0
        if flow == F.CONDITIONAL_BRANCH and ins.mnemonic in COUNTED:
            if ins.code not in _COUNTER_64 and ins.code not in _COUNTER_32:
                raise Emulate("16-bit counter")
            flags = L.T_ADDRESS32 if ins.code in _COUNTER_32 else 0
            return _Part(Template(), L.K_COUNTED, relative, COUNTED[ins.mnemonic], flags)
        if flow == F.CONDITIONAL_BRANCH and direct:
            return _Part(Template(), L.K_JCC, relative, CONDITIONS[ins.condition_code])
        near = {2: K.NEAR_BRANCH16, 4: K.NEAR_BRANCH32, 8: K.NEAR_BRANCH64}[maker.width]
        if flow == F.UNCONDITIONAL_BRANCH and direct and ins.op0_kind == near:
            return _Part(Template(), L.K_JMP, relative)
        return self._near(maker, ins, near, relative)

    def _near(self, maker: Templates, ins: Instruction, near: int, relative: int) -> _Part:
        """Near CALL, RET and indirect JMP: moves the stack and, but for a direct CALL, leaves RSI = target."""
        size, flow, t, out = maker.width, ins.flow_control, Template(), bytearray()
        hole = None
        if flow == F.RETURN:
            if ins.mnemonic != M.RET or maker.operand_width_of_return(ins) != size:
                raise Emulate("return")
            maker.stack_pointer(0, out, t, size, False)
            at = maker.access(out, t, size, False, False, stack=True)
            out += {2: b"\x0f\xb7\x36", 4: b"\x8b\x36", 8: b"\x48\x8b\x36"}[size]
            maker.near(t, at, 0, len(out) - 1, 4, 0)
            relative = size + (ins.immediate16 if ins.op_count else 0)  # of an indirect branch: what a fault takes back
            maker.stack_commit(relative, out)
        elif flow == F.CALL and ins.op_count and ins.op0_kind == near:
            hole = self._push_return(maker, size, out, t)
        elif flow in (F.INDIRECT_BRANCH, F.INDIRECT_CALL) and maker.branch_operand(ins, out, t):
            if flow == F.INDIRECT_CALL:
                out += store(6, L.SCRATCH + 24)
                hole, relative = self._push_return(maker, size, out, t), -size
                out += load(6, L.SCRATCH + 24)
        else:
            raise Emulate("branch")
        t.code = bytes(out)
        kind = L.K_CALL if flow == F.CALL else L.K_INDIRECT
        return _Part(t, kind, relative, hole=hole)

    @staticmethod
    def _push_return(maker: Templates, size: int, out: bytearray, t: Template) -> tuple[int, int]:
        """Push the address after the instruction: ``(offset, size)`` of the hole for it."""
        start = len(out)
        maker.stack_pointer(-size, out, t, size, True)
        at = maker.access(out, t, size, True, False, stack=True)
        out += {2: b"\x66\xc7\x06", 4: b"\xc7\x06", 8: b"\x48\xbf"}[size]
        hole = len(out), size
        out += bytes(size)
        if size == 8:
            if maker.floats:
                out += add(7, L.BASE)
            out += b"\x48\x89\x3e"
            maker.near(t, at, start, len(out) - 1, 4, -size)
        maker.stack_commit(-size, out)
        return hole

    def _pack(
        self,
        key: int,
        raw: bytes,
        t: Template,
        kind: int,
        *,
        relative: int = 0,
        aux: int = 0,
        flags: int = 0,
        hole: tuple[int, int] | None = None,
        length: int = 0,
        total: int = 0,
        rip_field: int = 0,
        immediate: tuple[int, int] = (0, 0),
        copies: Sequence[tuple[int, int, int]] = (),
        displaced: Mapping[int, tuple[int, int]] = _NONE,
        changes: int = 0,
    ) -> bytearray:
        holes = [(*t.rip, 8)] if t.rip is not None else []
        if hole is not None:
            holes.append((hole[0], length, hole[1]))
        holes += [(0, 0, 0)] * (2 - len(holes))
        flags |= (
            (L.T_CLOBBERS if t.clobbers else 0)
            | (L.T_STORED if t.flags_stored else 0)
            | (L.T_SHADOW if t.shadow else 0)
            | (L.T_BORROWED if t.borrowed else 0)
        )
        first, second = (*copies, (0, 0, 0), (0, 0, 0))[:2]
        six = self._six
        for word in (t.reads, t.kills):
            if word not in six:
                six[word] = _six(word)
        out = bytearray(
            pack(
                "<IIIHH16sBBBBBBBBqqqHHBB" "BBBBBBBxHHHb3x",
                0, key, 0, len(t.code), t.payload if t.payload >= 0 else 0xFFFF, raw,
                len(raw), kind, aux, six[t.reads], six[t.kills], flags, len(t.accesses), total, _signed(relative),
                _signed(holes[0][1]), _signed(holes[1][1]), holes[0][0], holes[1][0], holes[0][2], holes[1][2],
                rip_field, *immediate,
                first[0], second[0], first[1], second[1], first[2], second[2], changes, t.moves,
            )
        )  # fmt: skip
        for number, a in enumerate(t.accesses):
            field = displaced.get(number, (0, 0))
            out += pack(
                "<HHHHBB2xiHHBBBBiI",
                a.branch, a.resume, a.size, a.flags, a.source, a.stub, a.immediate,
                a.start, a.operand, a.base & 0xFF, a.index & 0xFF, a.scale, field[0], a.disp, field[1],
            )  # fmt: skip
        return out + t.code
