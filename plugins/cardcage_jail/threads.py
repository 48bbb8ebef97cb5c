"""Acts that Linux has for one thread only, done by all threads of the process.

Landlock's domains, capabilities and ``no_new_privs`` belong to threads. So each thread gets a signal whose handler does
the system calls, as glibc does for ``setuid(2)``. The handler is machine code: Python's own handlers run on the main
thread only, and Python code cannot run wherever a signal may find a thread.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import threading
import time
from struct import pack
from typing import Any

from cardcage.errors import HostError

__all__ = ["Code", "handle", "in_all_threads"]

SIGNAL = 33
"""glibc's own, for the same purpose (SIGSETXID): its ``pthread_sigmask`` lets no thread block it, so a thread that
blocks all signals is reached too. So does musl's."""
PATIENCE = 5.0
"""Seconds that a thread may take to be interrupted."""
SA_SIGINFO, SA_RESTART, SA_ONSTACK, SA_RESTORER = 4, 0x10000000, 0x08000000, 0x04000000
RT_SIGACTION, TGKILL = 13, 234
RETURN = b"\xb8\x0f\x00\x00\x00\x0f\x05"  # mov eax, __NR_rt_sigreturn; syscall


class _SigAction(ctypes.Structure):
    """``struct kernel_sigaction`` on x86-64: glibc's ``sigaction`` refuses the signals that are its own."""

    _fields_ = (
        ("handler", ctypes.c_void_p),
        ("flags", ctypes.c_ulong),
        ("restorer", ctypes.c_void_p),
        ("mask", ctypes.c_uint64),
    )


class Code:
    """A page of machine code, readable and executable, for the life of the process."""

    def __init__(self, code: bytes) -> None:
        self._map = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
        self._map[: len(code)] = code
        self._map[-len(RETURN) :] = RETURN
        export = ctypes.c_char.from_buffer(self._map)
        self.address = ctypes.addressof(export)
        self.restorer = self.address + mmap.PAGESIZE - len(RETURN)
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.mprotect(ctypes.c_void_p(self.address), ctypes.c_size_t(mmap.PAGESIZE), 5):
            raise HostError(f"jail: no page can be made executable: {os.strerror(ctypes.get_errno())}")
        self._export = export
        _codes.append(self)


_codes: list[Code] = []
"""Never freed: a thread may be in it."""


def handle(signum: int, code: Code) -> Any:
    """Make *code* the handler of *signum*; return what undoes that."""
    flags, before = SA_SIGINFO | SA_RESTART | SA_ONSTACK | SA_RESTORER, _SigAction()
    _sigaction(signum, _SigAction(code.address, flags, code.restorer), before)
    return lambda: _sigaction(signum, before, None)


def _sigaction(signum: int, new: _SigAction, old: _SigAction | None) -> None:
    """rt_sigaction(2). Raises HostError when the kernel refuses it."""
    libc = ctypes.CDLL(None, use_errno=True)
    numbers = ctypes.c_long(RT_SIGACTION), ctypes.c_int(signum)
    if libc.syscall(*numbers, ctypes.byref(new), old and ctypes.byref(old), ctypes.c_long(8)):
        raise HostError(f"jail: signal {signum} cannot be handled: {os.strerror(ctypes.get_errno())}")


def in_all_threads(calls: list[tuple[int, tuple[int, ...]]]) -> None:
    """Do system calls, ``(number, arguments)``, in each thread of this process, this one last.

    Raises HostError when one failed, or a thread could not be interrupted in five seconds: the process then is half in.
    """
    counts = (ctypes.c_uint32 * 2)()  # threads that are done, threads where a call failed
    undo = handle(SIGNAL, Code(_handler(calls, ctypes.addressof(counts))))
    own, done = threading.get_native_id(), set[int]()
    try:
        # Again until there is no new thread: one that is not done yet may have made another.
        while others := {int(one) for one in os.listdir("/proc/self/task")} - done - {own}:
            for thread in others:
                _interrupt(thread, counts)
            done |= others
        _interrupt(own, counts)
    finally:
        undo()
    if counts[1]:
        raise HostError("jail: the kernel refused to let a thread give up its rights")


def _interrupt(thread: int, counts: Any) -> None:
    """Let *thread* run the handler; nothing when it has ended."""
    libc, before, limit = ctypes.CDLL(None, use_errno=True), sum(counts), time.monotonic() + PATIENCE
    if libc.syscall(ctypes.c_long(TGKILL), os.getpid(), thread, ctypes.c_int(SIGNAL)):
        return
    while sum(counts) == before and os.path.exists(f"/proc/self/task/{thread}"):
        if time.monotonic() > limit:
            raise HostError(f"jail: thread {thread} did not answer a signal in {PATIENCE:g} s")
        time.sleep(0.0002)


def _handler(calls: list[tuple[int, tuple[int, ...]]], counts: int) -> bytes:
    """Each call, its result or-ed into r12d, then one of the counts is raised. The kernel restores the registers."""
    code = b"\x45\x31\xe4"  # xor r12d, r12d
    loads = (b"\x48\xbf", b"\x48\xbe", b"\x48\xba", b"\x49\xba", b"\x49\xb8", b"\x49\xb9")  # mov rdi rsi rdx r10 r8 r9
    for number, values in calls:
        padded = (*values, *(0,) * (6 - len(values)))
        code += b"".join(load + pack("<Q", value) for load, value in zip(loads, padded, strict=True))
        code += b"\xb8" + pack("<I", number)  # mov eax, number
        code += b"\x0f\x05"  # syscall
        code += b"\x41\x09\xc4"  # or r12d, eax
    code += b"\x48\xbf" + pack("<Q", counts)  # mov rdi, counts
    code += b"\x45\x85\xe4"  # test r12d, r12d
    code += b"\x74\x05"  # jz over the next
    code += b"\xf0\xff\x47\x04"  # lock inc dword [rdi+4]
    code += b"\xc3"  # ret
    return code + b"\xf0\xff\x07\xc3"  # lock inc dword [rdi]; ret
