"""The process that :class:`tcg_host.Host` traces: code and data of the file at a descriptor, at fixed addresses.

    python tcg_host_child.py FD CODE CODE_SIZE DATA DATA_SIZE READONLY

A program of its own: where a copy of the tests' process has its heap is chance, behind the data among other places,
where nothing must be.
"""

import ctypes
import mmap
import os
import signal
import struct
import sys

FIXED_NOREPLACE, MODIFY_LDT, TRACEME = 0x100000, 154, 0


def main() -> None:
    """Map, and stop for the tracer."""
    fd, code, code_size, data, data_size, readonly = map(int, sys.argv[1:])
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *(ctypes.c_int,) * 3, ctypes.c_long)
    libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    flags = mmap.MAP_SHARED | FIXED_NOREPLACE
    for address, size, offset, protection in ((code, code_size, 0, 5), (data, data_size, code_size, 3)):
        if libc.mmap(address, size, protection, flags, fd, offset) != address:
            sys.exit(1)
    libc.mprotect(data + readonly, 0x1000, 1)
    for entry, (base, limit, kind) in enumerate(((code, 0xFFFF, 0x44), (data, data_size - 1, 0x40))):
        about = struct.pack("<IIII", entry, base, limit, kind)  # struct user_desc: 16-bit code, 16-bit data
        libc.syscall(MODIFY_LDT, 1, about, 16)
    if libc.ptrace(TRACEME, 0, None, None) < 0:
        sys.exit(1)
    os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    main()
