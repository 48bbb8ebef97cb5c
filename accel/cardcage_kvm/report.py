"""Why KVM cannot go on, in words a user understands, with registers and the bytes at RIP."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from cardcage.errors import AcceleratorError

from cardcage_kvm import abi, state

if TYPE_CHECKING:
    from cardcage.x86 import Registers, SystemRegisters

    from cardcage_kvm.vcpu import KvmVCpu

UNION = 32
SUBERRORS = {2: "unexpected simultaneous exceptions", 3: "an exit while an event was delivered", 4: "unexpected exit"}
ORDER = ("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "rsp", *(f"r{one}" for one in range(8, 16)), "rip", "rflags")


def explain(vcpu: KvmVCpu, reason: int) -> str:
    """Say why exit *reason* ends the run."""
    try:
        name = abi.ExitReason(reason).name
    except ValueError:
        name = f"number {reason}"
    if reason == abi.ExitReason.INTERNAL_ERROR:
        return _internal_error(vcpu)
    if reason == abi.ExitReason.FAIL_ENTRY:
        code = int.from_bytes(vcpu.bytes[UNION : UNION + 8], "little")
        return describe(vcpu, f"the processor refused to enter the guest (hardware reason {code:#x})")
    if reason == abi.ExitReason.UNKNOWN:
        code = int.from_bytes(vcpu.bytes[UNION : UNION + 8], "little")
        return describe(vcpu, f"KVM does not know this exit of the processor (hardware reason {code:#x})")
    return describe(vcpu, f"KVM exit {name}, which nothing here asked for")


def _internal_error(vcpu: KvmVCpu) -> str:
    error = abi.EmulationFailure.from_buffer_copy(vcpu.bytes[UNION : UNION + 32])
    if error.suberror != 1:
        return describe(vcpu, f"KVM internal error: {SUBERRORS.get(error.suberror, error.suberror)}")
    system = state.read_system(vcpu.fd)
    code = bytes(error.insn_bytes)[: error.insn_size] if error.ndata >= 3 and error.flags & 1 else b""
    code = code or code_bytes(vcpu, state.read_registers(vcpu.fd), system)
    shown = disassemble(code, system, state.read_registers(vcpu.fd).rip) or code.hex(" ") or "an unreadable instruction"
    return describe(
        vcpu,
        f"this host's KVM emulates instructions and cannot run `{shown}`: try another accelerator (--accel tcg)",
    )


def disassemble(code: bytes, system: SystemRegisters, rip: int) -> str:
    """The first instruction of *code*, or an empty string."""
    from iced_x86 import Decoder, Formatter, FormatterSyntax

    bits = 64 if system.cs.l and system.efer & 1 << 10 else 32 if system.cs.db else 16
    instruction = next(iter(Decoder(bits, code, ip=rip)), None) if code else None
    if instruction is None or instruction.is_invalid:
        return ""
    return Formatter(FormatterSyntax.NASM).format(instruction)


def code_bytes(vcpu: KvmVCpu, registers: Registers, system: SystemRegisters, size: int = 15) -> bytes:
    """Up to *size* bytes at CS:RIP, fewer where guest memory ends or is not mapped."""
    long_mode = system.cs.l and system.efer & 1 << 10
    start = registers.rip if long_mode else (system.cs.base + registers.rip) & 0xFFFFFFFF
    found = bytearray()
    while len(found) < size:
        linear = start + len(found)
        translation = abi.Translation(linear_address=linear & 0xFFFFFFFFFFFFFFFF)
        try:
            abi.ioctl(vcpu.fd, abi.TRANSLATE, translation)
        except AcceleratorError:
            break
        take = min(size - len(found), abi.PAGE - linear % abi.PAGE)
        piece = vcpu.vm.slots.peek(translation.physical_address, take) if translation.valid else b""
        found += piece
        if len(piece) < take:
            break
    return bytes(found)


def describe(vcpu: KvmVCpu, what: str) -> str:
    """*what*, followed by the registers and the bytes at RIP."""
    try:
        registers, system = state.read_registers(vcpu.fd), state.read_system(vcpu.fd)
    except AcceleratorError as error:
        return f"vCPU {vcpu.index}: {what} (its registers cannot be read: {error})"
    values = [f"{name}={getattr(registers, name):#x}" for name in ORDER]
    lines = ["  " + " ".join(values[at : at + 6]) for at in range(0, len(values), 6)]
    segments = " ".join(f"{name}={getattr(system, name).selector:#x}" for name in ("cs", "ss", "ds", "es", "fs", "gs"))
    lines.append(f"  {segments} cs.base={system.cs.base:#x}")
    lines.append(
        f"  cr0={system.cr0:#x} cr2={system.cr2:#x} cr3={system.cr3:#x} cr4={system.cr4:#x} efer={system.efer:#x}"
    )
    lines.append(f"  bytes at RIP: {code_bytes(vcpu, registers, system).hex(' ') or 'not readable'}")
    return f"vCPU {vcpu.index}: {what}\n" + "\n".join(lines)


def read_host(address: int, size: int) -> bytes:
    """Bytes of this process at *address*: a mapped slot's memory."""
    return ctypes.string_at(address, size)
