"""How an instruction accesses the memory operand that it writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from iced_x86 import (
    Instruction,
    InstructionInfoFactory,
    MemorySizeInfo,
    Mnemonic,
    OpAccess,
    OpKind,
)

if TYPE_CHECKING:
    pass

__all__ = ["pushes_memory", "reads_memory", "writes_memory"]

_INFO = InstructionInfoFactory()


def _memory_access(ins: Instruction) -> int:
    """The access of the explicit memory operand, or of the stack for PUSH."""
    info = _INFO.info(ins)
    for i in range(ins.op_count):
        if ins.op_kind(i) == OpKind.MEMORY:
            access = info.op_access(i)
            if access not in (OpAccess.READ, OpAccess.COND_READ, OpAccess.NONE, OpAccess.NO_MEM_ACCESS):
                return access
    if ins.is_stack_instruction and ins.stack_pointer_increment < 0:
        return OpAccess.WRITE
    return OpAccess.NONE


def writes_memory(ins: Instruction) -> bool:
    return not ins.is_string_instruction and _memory_access(ins) != OpAccess.NONE


def pushes_memory(ins: Instruction) -> bool:
    """True for PUSH and POP of memory, which have read what they write."""
    return ins.mnemonic in (Mnemonic.PUSH, Mnemonic.POP) and ins.op0_kind == OpKind.MEMORY


def reads_memory(ins: Instruction) -> bool:
    """True when the bounce buffer must begin with what is there, also where not all bytes are written."""
    if ins.is_stack_instruction:
        return False
    partly = MemorySizeInfo(ins.memory_size).size in (0, 512)
    return partly or _memory_access(ins) not in (OpAccess.WRITE, OpAccess.NONE)
