"""The native half, loaded through ctypes. Calls drop the GIL, but for the shortest."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from weakref import WeakSet

from cardcage.errors import AcceleratorError

from cardcage_tcg import CODE_MEMORY, NOT_BUILT
from cardcage_tcg.native.build import digest

__all__ = ["Area", "CodeBuffer", "Native", "advise_areas", "load"]

MAP_FIXED, MAP_NORESERVE = 0x10, 0x4000
"""As Linux has them; Python's :mod:`mmap` does not."""

_U64, _U32, _INT, _PTR = ctypes.c_uint64, ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p
_Pair = _U64 * 2
_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "tcg_run": (None, (_PTR,)),
    "tcg_still": (None, (_PTR,)),
    "tcg_hold": (_INT, (_PTR, _U64)),
    "tcg_hold_briefly": (_INT, (_PTR, _U64)),
    "tcg_ticker": (None, (_PTR,)),
    "tcg_close": (None, (_PTR,)),
    "tcg_kick": (None, (_PTR,)),
    "tcg_stop_world": (None, (_PTR,)),
    "tcg_start_world": (None, (_PTR,)),
    "tcg_signals": (_INT, ()),
    "tcg_add_range": (_INT, (_U64, _U64)),
    "tcg_remove_range": (None, (_INT,)),
    "tcg_vread": (_INT, (_PTR, _U64, _PTR, _U32, _INT)),
    "tcg_vwrite": (_INT, (_PTR, _U64, _PTR, _U32, _INT)),
    "tcg_fetch": (_INT, (_PTR, _U64, _PTR, _U32)),
    "tcg_walk": (_INT, (_PTR, _U64, _INT, _INT, _PTR)),
    "tcg_tlb_flush": (None, (_PTR,)),
    "tcg_memory_written": (None, (_PTR, _U64, _U64)),
    "tcg_memory_written_many": (None, (_PTR, _PTR, _U64)),
    "tcg_once": (_U64, (_PTR, _U64, _U64, _U32, _PTR, _U32)),
    "tcg_add_template": (_U32, (_PTR, _PTR, _U32, _U32)),
    "tcg_head_length": (_U32, (_PTR, _U32, _U32)),
    "tcg_has_template": (_INT, (_PTR, _U32, _PTR, _U32)),
    "tcg_flush_blocks": (None, (_PTR,)),
    "tcg_reset": (None, (_PTR,)),
    "tcg_raise": (_INT, (_PTR, _U32, _U32, _U32)),
    "tcg_deliver_interrupt": (_INT, (_PTR, _U32)),
    "tcg_update_mode": (None, (_PTR,)),
    "tcg_helper_again": (_INT, (_PTR,)),
    "tcg_debug_port": (None, (_PTR, _U32, _U32)),
    "tcg_get_eflags": (_U64, (_PTR,)),
    "tcg_set_eflags": (None, (_PTR, _U64)),
    "tcg_apic_message": (None, (_PTR, _U64, _U32)),
    "tcg_apic_reset": (None, (_PTR,)),
    "tcg_apic_init": (None, (_PTR,)),
    "tcg_apic_save": (None, (_PTR, _PTR)),
    "tcg_apic_load": (None, (_PTR, _PTR)),
    "tcg_apic_read": (_INT, (_PTR, _U32, _PTR)),
    "tcg_apic_write": (_INT, (_PTR, _U32, _U32)),
    "tcg_apic_msr": (_INT, (_PTR, _U32, _INT, _PTR)),
    "tcg_precise_timers": (None, ()),
    "tcg_inject_nmi": (None, (_PTR,)),
    "tcg_load_pdptes": (None, (_PTR,)),
    "tcg_set_extint": (None, (_PTR, _U32)),
    "tcg_keep_leaf": (None, (_PTR, _U32, _U32)),
    "tcg_cpuid": (None, (_U32, _U32, _PTR)),
    "tcg_tsc": (_U64, ()),
    "tcg_rdtsc_pair": (None, (_PTR,)),
    "tcg_ring_bell": (_INT, (_PTR, _U32, _U64, _U32, _U64)),
    "tcg_irqfds": (None, (_PTR,)),
    "tcg_set_route": (None, (_PTR, _U32, _PTR)),
    "tcg_points_changed": (None, (_PTR,)),
    "tcg_unlink_pages": (None, (_PTR,)),
    "tcg_watch_eventfd": (_INT, (_INT, _INT, _U64)),
    "tcg_look": (None, (_PTR, _U32)),
    "tcg_stub": (_U64, (_INT,)),
    "tcg_freeze": (ctypes.c_long, (_INT, _PTR, _U64)),
    "tcg_dirty_log": (None, (_PTR, _U64)),
    "tcg_dirty_take": (_U64, (_PTR, _U64, _U64, _PTR)),
    "tcg_dirty_revert": (_U64, (_PTR,)),
}

_SHORT = frozenset(
    f"tcg_{name}"
    for name in (
        "memory_written memory_written_many apic_message kick set_extint ring_bell vread vwrite fetch walk once raise "
        "deliver_interrupt single_step load_pdptes look still hold_briefly dirty_log dirty_take dirty_revert reset tsc "
        "get_eflags set_eflags apic_reset apic_save apic_load apic_msr rdtsc_pair update_mode"
    ).split()
)
"""Calls of less than some microseconds, which wait for no thread that may want the GIL: they keep it, since getting it
back from others takes up to the switch interval. All that look at memory slots from outside native code must be here:
slots change in one step with the GIL held, so that nobody sees half a table, or memory that is gone. So must all that
change the dirty log: other threads tell it of writes."""


class Native:
    """The functions of ``_native.so``; ``struct`` pointers are plain integers.

    Attributes:
        loaded: :meth:`now` when it was loaded, where the clock's frequency is measured from.
    """

    def __init__(self) -> None:
        path = Path(__file__).with_name("_native.so")
        _check_built(path)
        try:
            library, keeping = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        except OSError as error:
            raise AcceleratorError(f"tcg: {path}: {error}; expected an x86-64 Linux host") from error
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(keeping if name in _SHORT else library, name)
            function.restype, function.argtypes = result, arguments
            setattr(self, {"tcg_raise": "raise_"}.get(name, name.removeprefix("tcg_")), function)

        self.loaded = self.now()

    def now(self) -> tuple[int, int]:
        """(host TSC, CLOCK_MONOTONIC in nanoseconds) at one moment."""
        pair = _Pair()
        self.rdtsc_pair(pair)
        return pair[0], pair[1]

    def __getattr__(self, name: str) -> Any:  # for the type checker: all are set above
        raise AttributeError(name)


def _check_built(path: Path) -> None:
    """Refuse what was not built from the sources beside it: structures that moved would be read at the wrong places."""
    try:
        from cardcage_tcg import layout
    except ImportError as error:
        raise AcceleratorError(f"tcg: {error}") from error
    if not path.exists():
        raise AcceleratorError(f"tcg: {NOT_BUILT}")
    if digest() != layout.SOURCES:
        raise AcceleratorError(
            f"tcg: {path} was built from other sources; to build it again: python -m cardcage_tcg.native.build"
        )


@cache
def load() -> Native:
    """The library, loaded once a process (it holds no state but the signal handlers, which a process has once)."""
    return Native()


@cache
def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype, libc.mmap.argtypes = _PTR, (_PTR, ctypes.c_size_t, _INT, _INT, _INT, ctypes.c_long)
    libc.munmap.argtypes = (_PTR, ctypes.c_size_t)
    libc.madvise.argtypes = (_PTR, ctypes.c_size_t, _INT)
    return libc


def _mapped(address: int | None, size: int, protection: int, flags: int, fd: int) -> int | None:
    """Address of a new mapping of *fd* that no fork has; None with ctypes' errno."""
    found: int | None = _libc().mmap(address, size, protection, flags, fd, 0)
    if found in (None, ctypes.c_void_p(-1).value):
        return None
    _libc().madvise(found, size, mmap.MADV_DONTFORK)
    return found


def is_ours(*packages: str) -> bool:
    """True when these packages, and all folders on the way there, belong to this user or root."""
    for one in packages:
        found = find_spec(one)
        if found is None or found.origin is None:
            return False
        path = Path(found.origin).resolve()
        if any(part.stat().st_uid not in (0, os.geteuid()) for part in (path, *path.parents)):
            return False
    return True


_areas: WeakSet[Area] = WeakSet()
"""All that there are. One that nobody has closed goes with its object, and its addresses may then be anybody's."""


def advise_areas(advice: int) -> None:
    """Give the kernel *advice* about all areas of this process: MADV_DOFORK around a fork whose child goes on."""
    for one in list(_areas):
        _libc().madvise(one.address, one.size, advice)


class Area:
    """Zeroed anonymous memory at a fixed address, kept out of forks but for those of the machine."""

    def __init__(self, size: int) -> None:
        self.map = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE)
        self.map.madvise(mmap.MADV_DONTFORK)
        self._export = ctypes.c_char.from_buffer(self.map)
        self.address, self.size = ctypes.addressof(self._export), size
        self.view = memoryview(self.map)
        _areas.add(self)

    def begin_with(self, fd: int, size: int) -> None:
        """Map the first *size* bytes of file *fd* over its beginning, copied on write."""
        flags = mmap.MAP_PRIVATE | MAP_FIXED
        if _mapped(self.address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd) is None:
            raise AcceleratorError(f"tcg: cannot map {size >> 20} MiB of a file: {os.strerror(ctypes.get_errno())}")

    def close(self) -> None:
        """Unmap it; casts of its view must have been released."""
        _areas.discard(self)
        self.view.release()
        del self._export
        self.map.close()


class CodeBuffer:
    """A code buffer, mapped twice: writable, and executable (W^X)."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._own: tuple[int, Area] | None = None
        fd = self.new_file()
        try:
            self.rw = self._map(fd, mmap.PROT_READ | mmap.PROT_WRITE)
            self.rx = self._map(fd, mmap.PROT_READ | mmap.PROT_EXEC)
        finally:
            os.close(fd)

    def new_file(self) -> int:
        """A descriptor of an empty file for as much code. Raises AcceleratorError."""
        fd = os.memfd_create(CODE_MEMORY, os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, self.size)
        except OSError as error:
            os.close(fd)
            what = f"tcg: cannot make {self.size >> 20} MiB of executable memory: {error.strerror}"
            hint = " (a limit of file sizes, ulimit -f)" if error.errno == errno.EFBIG else ""
            raise AcceleratorError(f"{what}{hint}") from error
        return fd

    def own(self, fd: int, state: Area) -> None:
        """Copies of frozen code go to file *fd* from now on, as native *state* says (:mod:`cardcage_tcg.forking`)."""
        self._disown()
        self._own = fd, state

    def _disown(self) -> None:
        if self._own is not None:
            os.close(self._own[0])
            self._own[1].close()
            self._own = None

    def advise(self, advice: int) -> None:
        """Give the kernel *advice* about both views."""
        for address in (self.rw, self.rx):
            _libc().madvise(address, self.size, advice)

    def _map(self, fd: int, protection: int) -> int:
        address = _mapped(None, self.size, protection, mmap.MAP_SHARED, fd)
        if address is None:
            reason = os.strerror(ctypes.get_errno())
            raise AcceleratorError(f"tcg: cannot map {self.size >> 20} MiB of executable memory: {reason}")
        return address

    def close(self) -> None:
        """Unmap both views."""
        self._disown()
        for address in (self.rw, self.rx):
            _libc().munmap(address, self.size)
