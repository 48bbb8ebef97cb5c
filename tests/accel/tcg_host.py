"""The real processor under ptrace: a child process whose registers, memory and code are set from here."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import sys
from pathlib import Path

from attrs import define, field

__all__ = ["CODE", "CODE_SIZE", "DATA", "DATA_SIZE", "GENERAL", "READONLY", "XSTATE_SIZE", "Host", "State"]

CODE, CODE_SIZE = 0x10000000, 0x2000
DATA, DATA_SIZE = 0x20000000, 0x6000
"""Where code and data lie in the child and in the guest; both below 4 GiB for 32-bit code, unmapped behind."""
READONLY = 0x3000
"""Offset of a page in the data that can only be read."""
XSTATE_SIZE = 832
"""Bytes of an XSAVE image up to AVX's state."""
GENERAL = "rax rcx rdx rbx rsp rbp rsi rdi r8 r9 r10 r11 r12 r13 r14 r15".split()
_USER_REGS = (
    "r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base"
    " ds es fs gs"
).split()
_AT = {name: i for i, name in enumerate(_USER_REGS)}
_GENERAL_AT = [_AT[name] for name in GENERAL]
CONT, GETREGS, SETREGS, GETSIGINFO, GETREGSET, SETREGSET = 7, 12, 13, 0x4202, 0x4204, 0x4205
NT_X86_XSTATE = 0x202
CHILD = str(Path(__file__).with_name("tcg_host_child.py"))


@define
class State:
    """What a case starts from and ends in: registers by number, RIP, flags, and an XSAVE image of 832 bytes.

    ``address`` is what a page fault reports, None after any other end.
    """

    general: list[int]
    rip: int
    flags: int
    xstate: bytes
    fs: int = 0
    gs: int = 0
    ended: str = ""
    memory: bytes = field(default=b"", repr=False)
    address: int | None = None


class Host:
    """The child. Raises OSError where the system lets no process be traced."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.ptrace.restype = ctypes.c_long
        self._libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
        fd = os.memfd_create("fuzz")
        os.ftruncate(fd, CODE_SIZE + DATA_SIZE)
        self.memory = mmap.mmap(fd, CODE_SIZE + DATA_SIZE)
        os.set_inheritable(fd, True)
        places = map(str, (fd, CODE, CODE_SIZE, DATA, DATA_SIZE, READONLY))
        self.pid = os.posix_spawn(sys.executable, [sys.executable, "-I", "-S", CHILD, *places], os.environ)
        os.close(fd)
        _, status = os.waitpid(self.pid, 0)
        if not os.WIFSTOPPED(status):
            raise OSError("this system lets no process be traced")
        self._regs = (ctypes.c_uint64 * 27)()
        self._area = (ctypes.c_uint8 * 16384)()
        self._info = (ctypes.c_uint8 * 128)()
        self._vector = (ctypes.c_uint64 * 2)(ctypes.addressof(self._area), 16384)
        self._request(GETREGS, None, ctypes.addressof(self._regs))
        self._request(GETREGSET, NT_X86_XSTATE, ctypes.addressof(self._vector))
        self._size = self._vector[1]
        self._fresh = list(self._regs)

    def _request(self, request: int, address: int | None, data: int) -> None:
        if self._libc.ptrace(request, self.pid, address, data) < 0:
            raise OSError(ctypes.get_errno(), f"ptrace request {request:#x}")

    def run(self, code: bytes, start: State, memory: bytes, *, bits: int = 64) -> State:
        """Run *code* (it ends in UD2) from *start* with *memory* as data; ``ended`` names the signal, or is empty.

        In 16 bits RIP and addresses are offsets in segments that hold the code and the data.
        """
        base = 0 if bits == 16 else CODE
        self.memory[start.rip - base : start.rip - base + len(code)] = code
        self.memory[CODE_SIZE:] = memory
        regs = self._regs
        regs[:] = self._fresh
        for at, value in zip(_GENERAL_AT, start.general, strict=True):
            regs[at] = value
        regs[_AT["orig_rax"]] = 0xFFFFFFFFFFFFFFFF
        regs[_AT["rip"]], regs[_AT["eflags"]] = start.rip, start.flags
        if bits == 16:
            regs[_AT["cs"]] = 0x07
            regs[_AT["ds"]] = regs[_AT["es"]] = regs[_AT["ss"]] = 0x0F
            regs[_AT["fs_base"]] = regs[_AT["gs_base"]] = 0
        elif bits == 32:
            regs[_AT["cs"]], regs[_AT["ds"]], regs[_AT["es"]], regs[_AT["ss"]] = 0x23, 0x2B, 0x2B, 0x2B
            regs[_AT["fs_base"]] = regs[_AT["gs_base"]] = 0
        else:
            regs[_AT["cs"]], regs[_AT["ds"]], regs[_AT["es"]], regs[_AT["ss"]] = 0x33, 0, 0, 0x2B
            regs[_AT["fs_base"]], regs[_AT["gs_base"]] = start.fs, start.gs
        self._request(SETREGS, None, ctypes.addressof(regs))
        area = self._area
        ctypes.memset(area, 0, self._size)
        ctypes.memmove(area, start.xstate, XSTATE_SIZE)
        self._vector[1] = self._size
        self._request(SETREGSET, NT_X86_XSTATE, ctypes.addressof(self._vector))
        self._request(CONT, None, 0)
        _, status = os.waitpid(self.pid, 0)
        if not os.WIFSTOPPED(status):
            raise OSError(f"the child ended: {status:#x}")
        self._request(GETREGS, None, ctypes.addressof(regs))
        self._vector[1] = self._size
        self._request(GETREGSET, NT_X86_XSTATE, ctypes.addressof(self._vector))
        self._request(GETSIGINFO, None, ctypes.addressof(self._info))
        code, address = struct.unpack_from("<i4xQ", self._info, 8)
        rip = regs[_AT["rip"]]
        name = signal.Signals(os.WSTOPSIG(status)).name
        offset = rip - base
        at_end = name == "SIGILL" and 0 <= offset < CODE_SIZE and self.memory[offset : offset + 2] == b"\x0f\x0b"
        image = bytearray(self._area[:XSTATE_SIZE])
        normalize(image)
        return State(
            [regs[at] for at in _GENERAL_AT], rip, regs[_AT["eflags"]], bytes(image),
            ended="" if at_end else name, memory=self.memory[CODE_SIZE:],
            address=address if name == "SIGSEGV" and code in (1, 2) else None,
        )  # fmt: skip

    def close(self) -> None:
        """End the child."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.memory.close()


def normalize(image: bytearray) -> None:
    """Clear what is the host's or nobody's in an XSAVE image; write out states that the header says are initial."""
    (present,) = struct.unpack_from("<Q", image, 512)
    if not present & 1:
        image[0:24] = struct.pack("<HHBxHQQ", 0x37F, 0, 0, 0, 0, 0)
        image[32:160] = bytes(128)
    if not present & 2:
        image[160:416] = bytes(256)
    if not present & 4:
        image[576:832] = bytes(256)
    image[6:24] = bytes(18)  # FOP, FIP, FDP
    image[28:32] = bytes(4)  # MXCSR_MASK
    for register in range(8):
        image[42 + 16 * register : 48 + 16 * register] = bytes(6)
    image[416:576] = bytes(160)
