"""Small guests for gdb, gdb itself, and a client that sends packets as they are."""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import pytest
from cardcage.machine import Machine
from cardcage.x86 import Segment

TIME = 60
CODE = 0x1000
COUNTS = bytes.fromhex("b80100 40 a30020 8b1e0020 40 40 40 40 ebf2")
"""16-bit: AX = 1; then for ever INC AX (0x1003), [0x2000] = AX (0x1004), BX = [0x2000] (0x1007), INC AX four times
(0x100b to 0x100e), JMP (0x100f)."""
needs_gdb = pytest.mark.skipif(shutil.which("gdb") is None, reason="needs gdb")


@contextmanager
def machine(accel: str, *, code: bytes = COUNTS, cpus: int = 1, start: bool = True, **keys: Any) -> Iterator[Machine]:
    """A machine that runs *code* in real mode on each processor, with a socket for gdb; ``vm.gdb_at`` is its place."""
    with Machine(accel=accel, memory="2M", cpus=cpus, machine={"platform": "none"}, **keys) as vm:
        vm.gdb_at = vm.gdb()
        vm.memory.write(CODE, code)
        for vcpu in vm.vcpus:
            state = vcpu.get_state()
            state.registers.rip, state.system.cs, state.events.startup = CODE, Segment(type=11), "running"
            vcpu.set_state(state)
        if start:
            vm.start(boot=False)
        yield vm


class Client:
    """Sends packets, reads answers."""

    def __init__(self, where: str) -> None:
        if where.startswith("/"):
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.settimeout(TIME)
            self.socket.connect(where)
        else:
            host, _, port = where.rpartition(":")
            self.socket = socket.create_connection((host, int(port)), TIME)
        self._held = b""

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def packet(self, content: bytes) -> None:
        self.send(b"$%b#%02x" % (content, sum(content) & 0xFF))

    def answer(self) -> bytes | None:
        """The next answer, None at the end."""
        while (found := re.search(rb"\$([^#]*)#[0-9a-f]{2}", self._held)) is None:
            try:
                data = self.socket.recv(1 << 16)
            except ConnectionResetError:  # it had not read all that was sent
                data = b""
            if not data:
                return None
            self._held += data
        self._held = self._held[found.end() :]
        with suppress(BrokenPipeError, ConnectionResetError):  # it was the last one
            self.send(b"+")
        return found[1]

    def ask(self, content: bytes) -> bytes | None:
        """The answer to a packet, None where it hung up."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.packet(content)
        return self.answer()

    def register(self, number: int) -> int:
        found = self.ask(b"p%x" % number)
        assert found is not None
        return int.from_bytes(bytes.fromhex(found.decode()), "little")

    @property
    def rip(self) -> int:
        return self.register(16)

    def close(self) -> None:
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def gdb(where: str, *lines: str, timeout: float = TIME) -> str:
    """What gdb says that has connected to *where* and carried out *lines*."""
    words = ["gdb", "-nx", "-batch"]
    for line in ("set architecture i386:x86-64", f"target remote {where}", *lines):
        words += ["-ex", line]
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False, stdin=subprocess.DEVNULL)
    return done.stdout + done.stderr


def values(text: str) -> dict[str, int]:
    """Registers as gdb lists them: the numbers in hexadecimal."""
    return {
        one[1]: int(one[2], 16)
        for one in re.finditer(r"^(\w+) +(?:.*(?:raw |uint128 = ))?(0x[0-9a-f]+)", text, re.MULTILINE)
    }
