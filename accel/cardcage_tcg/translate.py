"""The translator's Python half: decode guest code and make a template for each instruction that has none yet.

Templates go into a store in native memory, keyed by mode and instruction bytes; ``native/assemble.c`` joins them to
blocks. The store holds offsets only, so it is kept in a file between runs: later boots begin with it.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from pathlib import Path
from struct import pack, pack_into, unpack_from
from typing import TYPE_CHECKING

from iced_x86 import (
    Code,
    ConditionCode,
    Decoder,
    DecoderOptions,
    FlowControl,
    Instruction,
    Mnemonic,
    OpKind,
    RflagsBits,
)

from cardcage_tcg import layout as L
from cardcage_tcg.emit import flags_load, flags_save, load, store
from cardcage_tcg.library import Area
from cardcage_tcg.system import ends_block
from cardcage_tcg.templates import Emulate, Template, Templates

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["MAX_INSTRUCTIONS", "STORE_SIZE", "Translator"]

F, M, K = FlowControl, Mnemonic, OpKind
MAX_INSTRUCTIONS = 64
STORE_SIZE = 96 << 20
_CONDITION_NAMES = "o no b ae e ne be a s ns p np l ge le g".split()
CONDITIONS = {
    getattr(ConditionCode, name if hasattr(ConditionCode, name) else name.upper()): i
    for i, name in enumerate(_CONDITION_NAMES)
}
COUNTED = {M.JRCXZ: 0xE3, M.JECXZ: 0xE3, M.JCXZ: 0xE3, M.LOOP: 0xE2, M.LOOPE: 0xE1, M.LOOPNE: 0xE0}
_NAMES = {getattr(Code, name): name for name in dir(Code) if not name.startswith("_")}
_COUNTER_64 = {
    code
    for code, name in _NAMES.items()
    if name == "JRCXZ_REL8_64" or name.startswith("LOOP") and name.endswith("64_RCX")
}
_COUNTER_32 = {
    code
    for code, name in _NAMES.items()
    if name.startswith("JECXZ_REL8") or name.startswith("LOOP") and name.endswith("_ECX")
}
_FLAG_BITS = (RflagsBits.OF, RflagsBits.SF, RflagsBits.ZF, RflagsBits.AF, RflagsBits.CF, RflagsBits.PF)
_DIRECT = (K.NEAR_BRANCH16, K.NEAR_BRANCH32, K.NEAR_BRANCH64)


def _signed(value: int) -> int:
    """A difference of two addresses as 64 bits with sign."""
    return (value + (1 << 63)) % (1 << 64) - (1 << 63)


def _six(flags: int) -> int:
    return sum(1 << i for i, bit in enumerate(_FLAG_BITS) if flags & bit)


class Translator:
    """The template store of one VM, and what fills it. Called with the VM's translation lock held.

    Args:
        add: ``tcg_add_template`` bound to the VM: takes bytes, size and whether a look-up shall find it.
        has: ``tcg_has_template`` bound to the VM.
        avx: AVX may be emitted.
        keep: a file to begin with and to keep the store in, or None.
    """

    def __init__(self, rip_displacement: Callable[[bytes, int], int], *, avx: bool = False, keep: Path | None = None) -> None:
        self.avx, self._rip_displacement = avx, rip_displacement
        self.area = Area(STORE_SIZE)
        self._keep = keep
        self._templates: dict[tuple[int, bool], Templates] = {}
        self._six: dict[int, int] = {}
        self.made = 0
        if keep is None or not self._load(keep):
            self._fresh()
        self._loaded = self.used

    @property
    def used(self) -> int:
        """Bytes of the store in use."""
        found: int = unpack_from("<I", self.area.view, L.STORE_USED)[0]
        return found

    def _fresh(self) -> None:
        view = self.area.view
        pack_into("<IIII", view, 0, L.STORE_MAGIC, STORE_SIZE, L.SIZEOF_STORE + 7 & ~7, 0)
        for at, length, code in (
            (L.STORE_SAVE, L.STORE_SAVE_LENGTH, flags_save),
            (L.STORE_LOAD, L.STORE_LOAD_LENGTH, flags_load),
        ):
            view[at : at + len(code)] = code
            pack_into("<I", view, length, len(code))

    def templates(self, mode: int, *, single: bool = False) -> Templates:
        """What makes templates for *mode*."""
        found = self._templates.get((mode, single))
        if found is None:
            found = self._templates[mode, single] = Templates(mode, avx=self.avx, bounce=single)
        return found

    @staticmethod
    def decode(mode: int, pc: int, data: bytes, limit: int) -> list[tuple[Instruction, bytes]]:
        """Instructions from *pc* up to a branch, the end of *data*, or *limit* of them, or an invalid one."""
        bits = 64 if mode & L.MODE_64 else 32 if mode & L.MODE_32 else 16
        decoder = Decoder(bits, data, DecoderOptions.NONE, ip=pc)
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
        has: Callable[[int, bytes], bool],
        *,
        single: bool = False,
    ) -> bool:
        """Make the templates that the block at *pc* lacks. False when the store is full."""
        key = mode | (L.KEY_SINGLE if single else 0)
        maker = self.templates(mode, single=single)
        for ins, raw in self.decode(mode, pc, data, 1 if single or mode & L.MODE_TF else MAX_INSTRUCTIONS + 1):
            if has(key, raw):
                continue
            self.made += 1
            if raw[0] == 0xE8 and ins.mnemonic == M.CALL and ins.op0_kind in _DIRECT[1:]:
                plain, _ = self._serialize(maker, key | L.KEY_CALL, ins, raw[:1])  # one template serves all direct calls
                if not add(bytes(plain), True):
                    return False
                continue
            if mode & L.MODE_64 and ins.is_ip_rel_memory_operand:
                ins, raw = self._without_displacement(ins, raw)
            plain, restored = self._serialize(maker, key, ins, raw)
            restore_at = 0
            if restored is not None:
                restore_at = self.used
                if not add(restored, False):
                    return False
            if restore_at:
                pack_into("<I", plain, 8, restore_at)
            if not add(bytes(plain), True):
                return False
        return True

    def _without_displacement(self, ins: Instruction, raw: bytes) -> tuple[Instruction, bytes]:
        """The same instruction with a RIP-relative displacement of 0: one template serves all."""
        at = self._rip_displacement(raw, len(raw))
        if not at:
            return ins, raw
        raw = raw[:at] + bytes(4) + raw[at + 4 :]
        return Decoder(64, raw, ip=ins.ip).decode(), raw

    def _serialize(self, maker: Templates, key: int, ins: Instruction, raw: bytes) -> tuple[bytearray, bytes | None]:
        """A template as ``struct tmpl``, and the form that puts flags back where there is one."""
        if ins.code == Code.INVALID:
            return self._pack(key, raw, Template(), L.K_EMULATE, flags=L.T_INVALID), None
        flow = ins.flow_control
        try:
            if flow != F.NEXT and not ends_block(ins):
                return self._branch(maker, key, ins, raw), None
            t = maker.get(ins, raw, False)
            extra = L.T_END if ends_block(ins) else 0
            restored = None
            if t.clobbers and not t.flags_stored and (t.reads or t.kills):
                restored = bytes(self._pack(key, raw, maker.get(ins, raw, True), L.K_NORMAL, flags=extra))
            return self._pack(key, raw, t, L.K_NORMAL, flags=extra), restored
        except Emulate:
            return self._pack(key, raw, Template(), L.K_EMULATE), None

    def _branch(self, maker: Templates, key: int, ins: Instruction, raw: bytes) -> bytearray:
        flow = ins.flow_control
        direct = ins.op_count and ins.op0_kind in _DIRECT
        relative = ins.near_branch_target - ins.ip if direct else 0
        if flow == F.CONDITIONAL_BRANCH and ins.mnemonic in COUNTED:
            if ins.code not in _COUNTER_64 and ins.code not in _COUNTER_32:
                raise Emulate("16-bit counter")
            flags = L.T_ADDRESS32 if ins.code in _COUNTER_32 else 0
            return self._pack(
                key, raw, Template(), L.K_COUNTED, relative=relative, aux=COUNTED[ins.mnemonic], flags=flags
            )
        if flow == F.CONDITIONAL_BRANCH and direct:
            return self._pack(key, raw, Template(), L.K_JCC, relative=relative, aux=CONDITIONS[ins.condition_code])
        near = {2: K.NEAR_BRANCH16, 4: K.NEAR_BRANCH32, 8: K.NEAR_BRANCH64}[maker.width]
        if flow == F.UNCONDITIONAL_BRANCH and direct and ins.op0_kind == near:
            return self._pack(key, raw, Template(), L.K_JMP, relative=relative)
        return self._near(maker, key, ins, raw, near, relative)

    def _near(self, maker: Templates, key: int, ins: Instruction, raw: bytes, near: int, relative: int) -> bytearray:
        """Near CALL, RET and indirect JMP: code that moves the stack and, but for a direct CALL, leaves RSI = target."""
        size, flow, t, out = maker.width, ins.flow_control, Template(), bytearray()
        hole = None
        if flow == F.RETURN:
            if ins.mnemonic != M.RET or maker.operand_width_of_return(ins) != size:
                raise Emulate("return")
            maker.stack_pointer(0, out, t, size, False)
            maker.access(out, t, size, False, False, stack=True)
            out += {2: b"\x0f\xb7\x36", 4: b"\x8b\x36", 8: b"\x48\x8b\x36"}[size]
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
        return self._pack(key, raw, t, kind, relative=relative, hole=hole, length=ins.len)

    @staticmethod
    def _push_return(maker: Templates, size: int, out: bytearray, t: Template) -> tuple[int, int]:
        """Push the address after the instruction: ``(offset, size)`` of the hole for it."""
        maker.stack_pointer(-size, out, t, size, True)
        maker.access(out, t, size, True, False, stack=True)
        out += {2: b"\x66\xc7\x06", 4: b"\xc7\x06", 8: b"\x48\xbf"}[size]
        hole = len(out), size
        out += bytes(size)
        if size == 8:
            out += b"\x48\x89\x3e"
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
    ) -> bytearray:
        holes = [(*t.rip, 8)] if t.rip is not None else []
        if hole is not None:
            holes.append((hole[0], length, hole[1]))
        holes += [(0, 0, 0)] * (2 - len(holes))
        flags |= (
            (L.T_CLOBBERS if t.clobbers else 0)
            | (L.T_STORED if t.flags_stored else 0)
            | (L.T_SHADOW if t.shadow else 0)
        )
        six = self._six
        for word in (t.reads, t.kills):
            if word not in six:
                six[word] = _six(word)
        out = bytearray(
            pack(
                "<IIIHHqqqHHBBBBBBBBB3x",
                0, key, 0, len(t.code), t.payload if t.payload >= 0 else 0xFFFF, _signed(relative),
                _signed(holes[0][1]), _signed(holes[1][1]), holes[0][0], holes[1][0], holes[0][2], holes[1][2],
                len(raw), kind, aux, six[t.reads], six[t.kills], flags, len(t.accesses),
            )
        )  # fmt: skip
        for a in t.accesses:
            out += pack("<HHHHBB2xi", a.branch, a.resume, a.size, a.flags, a.source, a.stub, a.immediate)
        out += raw.ljust(16, b"\0") + t.code
        return out

    # ---- the file ----

    def _load(self, path: Path) -> bool:
        """Take a kept store. It is code that will run: only a file of ours that nobody else can write will do."""
        try:
            with path.open("rb") as file:
                about = os.fstat(file.fileno())
                if about.st_uid != os.geteuid() or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                    return False
                data = file.read(STORE_SIZE + 1)
        except OSError:
            return False
        if len(data) < L.SIZEOF_STORE or len(data) > STORE_SIZE:
            return False
        digest, data = data[-32:], data[:-32]
        magic, size, used, _ = unpack_from("<IIII", data, 0)
        if magic != L.STORE_MAGIC or size != STORE_SIZE or used != len(data) or hashlib.sha256(data).digest() != digest:
            return False
        self.area.view[: len(data)] = data
        return True

    def save(self) -> None:
        """Keep the store for the next run, when it has grown by a tenth; a failure to write costs only time later."""
        used = self.used
        if self._keep is None or used - self._loaded < max(65536, self._loaded // 10):
            return
        data = bytes(self.area.view[:used])
        try:
            self._keep.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self._keep.parent, delete=False) as file:
                file.write(data + hashlib.sha256(data).digest())
            os.replace(file.name, self._keep)
        except OSError:
            return
        self._loaded = used

    def close(self) -> None:
        """Keep the store, and give its memory back."""
        self.save()
        self.area.close()


def store_path(directory: str, avx: bool) -> Path | None:
    """Where templates of exactly this translator are kept: below *directory*, or the user's cache (empty: nowhere)."""
    if directory == "none":
        return None
    here = Path(__file__).parent
    sources = sorted(one for one in here.iterdir() if one.suffix in (".py", ".so"))
    digest = hashlib.sha256()
    for one in sources:
        digest.update(one.read_bytes())
    import iced_x86

    digest.update(f"{iced_x86.__version__ if hasattr(iced_x86, '__version__') else ''} {avx}".encode())
    cache = directory or os.path.join(
        os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"), "cardcage", "tcg"
    )
    return Path(cache) / f"templates-{digest.hexdigest()[:24]}"
