"""A VM in a forked process: what of its memory the child has, and its translated code, which both go on with."""

from __future__ import annotations

import mmap
import os
from struct import pack
from typing import TYPE_CHECKING

from cardcage.errors import AcceleratorError

from cardcage_tcg import layout as L
from cardcage_tcg.library import Area, advise_areas

if TYPE_CHECKING:
    from cardcage_tcg.eventfds import EventFds
    from cardcage_tcg.library import CodeBuffer, Native

__all__ = ["Forks"]

PIECE = 12
"""Bits of the piece of code that is copied when it is written; more where that would be too many pieces: the kernel
joins no two mappings of different files, and has a limit (vm.max_map_count)."""
MOST = 1024
HEAD = 40
"""Bytes of ``struct frozen`` before its flags."""


class Forks:
    """A :class:`~cardcage_tcg.vm.TcgVm` in two processes. It is parked in all of this."""

    native: Native
    code: CodeBuffer
    range: int
    events: EventFds
    _q: memoryview

    def may_fork(self) -> str:
        """Why it cannot be in a forked process as well, empty when it can."""
        return "eventfds of the host are joined to it" if self.events.joined else ""

    def before_fork(self) -> None:
        """The process is about to fork: freeze the code, and let all memory be in the child."""
        self._freeze()
        self._advise(mmap.MADV_DOFORK)

    def after_fork(self, *, child: bool) -> None:
        """It has forked."""
        if child:
            self._freeze()
            self.events.renew()
        self._advise(mmap.MADV_DONTFORK)

    def _advise(self, advice: int) -> None:
        advise_areas(advice)
        self.code.advise(advice)

    def _freeze(self) -> None:
        """Whatever code there is may be another process's as well from now on; what this one writes is its own."""
        code, used, shift = self.code, self._q[L.VM_CODE_USED // 8], PIECE
        while used >> shift > MOST:
            shift += 1
        piece = 1 << shift
        size = min(-(-used // piece) * piece, code.size)
        fd = code.new_file()
        try:
            state = Area(HEAD + (size >> shift) + 1)
            state.view[:HEAD] = pack("<QQQiIII", code.rw, code.rx, size, fd, 0, shift, 0).ljust(HEAD, b"\0")
            error = self.native.freeze(self.range, state.address, code.size)
        except BaseException:
            os.close(fd)
            raise
        code.own(fd, state)
        if error:
            raise AcceleratorError(f"tcg: translated code cannot be shared with a fork: {os.strerror(error)}")
