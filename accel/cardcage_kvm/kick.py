"""The signal that brings a thread out of KVM_RUN.

KVM_RUN only notices ``immediate_exit`` when it is entered; a thread that is inside needs a signal, and a signal needs a
handler, or it ends the process. Python's own handlers would run on the main thread under the GIL for each kick and can
only be set there, so the handler is a C function of the C library that takes an int and touches nothing: ``abs``.
It is installed on the first real-time signal that nobody uses, from whichever thread, and stays: a kick may still be on
its way.
"""

from __future__ import annotations

import ctypes
import signal

from cardcage.errors import AcceleratorError

SA_RESTART = 0x10000000


class _SigAction(ctypes.Structure):
    """``struct sigaction`` of the C library on x86-64 Linux."""

    _fields_ = [
        ("handler", ctypes.c_void_p),
        ("mask", ctypes.c_uint8 * 128),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    ]


def kick_signal() -> int:
    """Return a signal number whose delivery does nothing but interrupt, installing its handler when needed.

    Raises :exc:`~cardcage.errors.AcceleratorError` when every real-time signal is taken.
    """
    library = ctypes.CDLL(None, use_errno=True)
    nothing = ctypes.cast(library.abs, ctypes.c_void_p).value
    for number in range(signal.SIGRTMIN, signal.SIGRTMAX + 1):
        now = _SigAction()
        library.sigaction(number, None, ctypes.byref(now))
        if now.handler == nothing:
            return number
        if not now.handler:  # SIG_DFL
            new = _SigAction(handler=nothing, flags=SA_RESTART)
            if library.sigaction(number, ctypes.byref(new), None) == 0:
                return number
    raise AcceleratorError("every real-time signal of this process is taken: none is left to interrupt KVM_RUN")
