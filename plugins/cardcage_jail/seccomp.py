"""seccomp: which system calls a process may still make, by a filter in classic BPF (seccomp(2)).

A call that is not listed is not made: it fails with EPERM, and its number comes out of a pipe, for the log. The kernel
keeps a bitmap of calls that are allowed whatever their arguments, so that these cost nothing.
"""

from __future__ import annotations

import ctypes
import os
from struct import pack, unpack
from typing import TYPE_CHECKING

from cardcage.errors import HostError

from cardcage_jail.calls import ALWAYS, NUMBERS, name_of
from cardcage_jail.threads import Code, handle

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

__all__ = ["Refusals", "confine", "is_offered"]

SECCOMP, SET_MODE_FILTER, GET_ACTION_AVAIL = 317, 1, 2
TSYNC, NEW_LISTENER, TSYNC_ESRCH = 1, 8, 16
"""Flags of a filter: for all threads; whose questions come out of a descriptor; and an error for a thread apart."""
AUDIT_ARCH_X86_64 = 0xC000003E
X32 = 0x40000000
SIGSYS = 31

KILL_PROCESS, TRAP, ERRNO, ASK, ALLOW = 0x80000000, 0x00030000, 0x00050000, 0x7FC00000, 0x7FFF0000
ENOSYS = 38

LD, JEQ, JGE, JSET, RET, AND = 0x20, 0x15, 0x35, 0x45, 0x06, 0x54
NUMBER, ARCH, ARGUMENTS = 0, 4, 16
"""Offsets in ``struct seccomp_data``; of each argument, the low half is looked at."""

FAMILIES = {"unix": (1,), "inet": (2, 10)}
"""Word of :class:`cardcage.security.Needs` to numbers of families (AF_UNIX, AF_INET, AF_INET6)."""
PROT_WRITE, PROT_EXEC = 2, 4
CLONE_FS, CLONE_THREAD = 0x200, 0x10000
FORK = 0x1200011
"""The flags of glibc's fork(3): CLONE_CHILD_SETTID, CLONE_CHILD_CLEARTID, SIGCHLD."""
PRCTL = (15, 16, 29, 0x53564D41)
"""PR_SET_NAME, PR_GET_NAME, PR_SET_TIMERSLACK, PR_SET_VMA."""
TERMINAL = (0x5412, 0x541C, 0x5423)
"""ioctl TIOCSTI and TIOCLINUX, which type into a terminal, and TIOCSETD."""

Instruction = tuple[int, int, int, int]


def _argument(number: int) -> Instruction:
    return LD, 0, 0, ARGUMENTS + 8 * number


def _one_of(argument: int, values: Sequence[int], otherwise: int = TRAP) -> list[Instruction]:
    """Allow when an argument is one of *values*, else trap."""
    left = len(values)
    tests = [(JEQ, left - at, 0, one) for at, one in enumerate(values)]
    return [_argument(argument), *tests, (RET, 0, 0, otherwise), (RET, 0, 0, ALLOW)]


def _none_of(argument: int, values: Sequence[int]) -> list[Instruction]:
    left = len(values)
    tests = [(JEQ, left - at, 0, one) for at, one in enumerate(values)]
    return [_argument(argument), *tests, (RET, 0, 0, ALLOW), (RET, 0, 0, TRAP)]


def program(children: Sequence[int], sockets: Sequence[str], *, forks: bool = False) -> bytes:
    """The filter, as an array of ``struct sock_filter``.

    Args:
        children: processes that may be signalled, besides this one.
        sockets: families of sockets that may be made, :data:`FAMILIES`, and connected, bound and listened at.
        forks: processes may be forked by leave of the broker, which decides about their signals too.
    """
    own, others = os.getpid(), ASK if forks else TRAP
    allowed = {*ALWAYS, *(NUMBERS[name] for name in ("connect", "bind", "listen") if sockets)}
    # writable and executable at once, or executable memory that is no file's: not made
    mmap = [
        _argument(2),
        (JSET, 0, 4, PROT_EXEC),
        (JSET, 2, 0, PROT_WRITE),
        _argument(4),
        (JEQ, 0, 1, 0xFFFFFFFF),
        (RET, 0, 0, TRAP),
        (RET, 0, 0, ALLOW),
    ]
    special: dict[int, list[Instruction]] = {
        NUMBERS["ioctl"]: _none_of(1, TERMINAL),
        NUMBERS["mmap"]: mmap,
        NUMBERS["mprotect"]: [_argument(2), (JSET, 0, 1, PROT_EXEC), (RET, 0, 0, TRAP), (RET, 0, 0, ALLOW)],
        NUMBERS["clone"]: [_argument(0), (JSET, 1, 0, CLONE_THREAD), (RET, 0, 0, TRAP), (RET, 0, 0, ALLOW)],
        NUMBERS["kill"]: _one_of(0, [own, *children], others),
        NUMBERS["mknod"]: _one_of(2, [0]),  # no device but 0:0, the whiteout of overlayfs
        NUMBERS["mknodat"]: _one_of(3, [0]),
        NUMBERS["prctl"]: _one_of(0, PRCTL),
        NUMBERS["tkill"]: [(RET, 0, 0, TRAP)],  # by number alone: it may be anybody's
        NUMBERS["tgkill"]: _one_of(0, [own], others),
        NUMBERS["unshare"]: _one_of(0, [CLONE_FS]),  # a thread's own umask and directory
        NUMBERS["prlimit64"]: _one_of(0, [0, own]),
        NUMBERS["clone3"]: [(RET, 0, 0, ERRNO | ENOSYS)],  # its flags lie in memory; the C library then takes clone
    }
    if forks:
        fork = [(JEQ, 0, 1, FORK), (RET, 0, 0, ASK)]
        special[NUMBERS["clone"]] = [
            _argument(0),
            (JSET, 3, 0, CLONE_THREAD),
            *fork,
            (RET, 0, 0, TRAP),
            (RET, 0, 0, ALLOW),
        ]
        special[NUMBERS["setsid"]] = [(RET, 0, 0, ASK)]  # by which the broker knows a new process
        allowed.add(NUMBERS["pidfd_open"])  # to wait for the end of one
    if sockets:
        special[NUMBERS["socket"]] = _one_of(0, [number for one in sockets for number in FAMILIES.get(one, ())])
    body: list[Instruction] = []
    for number, code in special.items():  # first, since the kernel remembers which of the others are always allowed
        body += [(JEQ, 0, len(code), number), *code]
    for number in sorted(allowed - special.keys()):
        body += [(JEQ, 0, 1, number), (RET, 0, 0, ALLOW)]
    head: list[Instruction] = [
        (LD, 0, 0, ARCH),
        (JEQ, 1, 0, AUDIT_ARCH_X86_64),
        (RET, 0, 0, KILL_PROCESS),
        (LD, 0, 0, NUMBER),
        (JGE, 0, 1, X32),
        (RET, 0, 0, KILL_PROCESS),
    ]
    return b"".join(pack("<HBBI", *one) for one in [*head, *body, (RET, 0, 0, TRAP)])


class Refusals:
    """Refused calls: their numbers come out of :attr:`fd`.

    The handler of SIGSYS is machine code, since a thread may be refused something with the interpreter's lock held.
    """

    def __init__(self) -> None:
        self.fd, self.write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # siginfo: address 16, call 24, architecture 28. ucontext: rax 144.
        code = (
            b"\x48\xc7\x82\x90\x00\x00\x00\xff\xff\xff\xff"  # mov qword [rdx+144], -1  (-EPERM)
            b"\x48\x8d\x76\x10"  # lea rsi, [rsi+16]
            b"\xbf" + pack("<i", self.write) + b"\xba\x10\x00\x00\x00"  # mov edi, fd; mov edx, 16
            b"\xb8\x01\x00\x00\x00\x0f\x05\xc3"  # mov eax, 1 (write); syscall; ret
        )
        handle(SIGSYS, Code(code))

    def renew(self) -> None:
        """This is a forked process: it has a pipe of its own, by the same numbers, which stand in the handler."""
        for old, new in zip((self.fd, self.write), os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC), strict=True):
            os.dup2(new, old, inheritable=False)
            os.close(new)

    def read(self) -> list[str]:
        """The names of the calls that were refused since the last time."""
        try:
            data = os.read(self.fd, 16 * 64)
        except BlockingIOError:
            return []
        return [name_of(unpack("<QII", data[at : at + 16])[1]) for at in range(0, len(data) - 15, 16)]


class _Program(ctypes.Structure):
    """``struct sock_fprog``."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def confine(children: Iterable[int], sockets: Sequence[str], *, forks: bool = False) -> int:
    """Filter the calls of all threads of this process, and of those that it forks, from now on.

    Returns the descriptor that asks about forks, -1 where they are not wanted, or the kernel cannot ask (before Linux
    5.7, or because another filter asks already); then none is made. Raises HostError.
    """
    for asking in (True, False) if forks else (False,):
        code = program(list(children), sockets, forks=asking)
        made = _Program(len(code) // 8, code)
        libc = ctypes.CDLL(None, use_errno=True)
        libc.syscall.restype = ctypes.c_long
        flags = TSYNC | NEW_LISTENER | TSYNC_ESRCH if asking else TSYNC
        found = int(libc.syscall(ctypes.c_long(SECCOMP), SET_MODE_FILTER, flags, ctypes.byref(made)))
        if asking and found >= 0:
            return found
    if found:
        why = os.strerror(ctypes.get_errno()) if found < 0 else f"thread {found} has a filter of its own"
        raise HostError(f"jail: the kernel takes no filter of system calls: {why}")
    return -1


def is_offered() -> bool:
    """True when the kernel has seccomp filters with traps."""
    libc = ctypes.CDLL(None, use_errno=True)
    action = ctypes.c_uint32(TRAP)
    return bool(libc.syscall(ctypes.c_long(SECCOMP), GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0)
