"""A machine whose guest does what a test asks of it: real accesses by guest code, chosen in Python.

    with RemoteGuest("tcg", devices=[{"type": "virtio-rng"}]) as guest:
        guest.output(0xCF8, 4, 1 << 31 | 2 << 11)
        assert guest.input(0xCFC, 4) == 0x1044_1AF4

The guest (``programs/remote64.asm``) runs in long mode with interrupts on, all memory below 1 GiB and from 3 to 4 GiB
mapped to itself, and looks for its next act in a mailbox at 0x60000: what to do (0 when done), size, address, value.
RAM from 0x61000 to 0x8FFFF and from 1 MiB on is the test's.
"""

from __future__ import annotations

import struct
import threading
import time
from typing import TYPE_CHECKING, Any

from cardcage.device import Pio
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.x86 import reset_state

from cardcage_conformance.lab import HOST_PORT, assembled
from cardcage_conformance.startmodes import LIBRARY, LOAD, enter, write_tables

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from cardcage.boot import BootContext
    from cardcage.registry import Registry
    from cardcage.x86 import VCpuState

__all__ = ["PATIENCE", "RemoteGuest"]

RECORDS, IRQS, MAILBOX = 0x7000, 0x7A00, 0x60000
STORE, LOAD_, OUTPUT, INPUT, ASK = range(1, 6)
PATIENCE = 60.0
"""Seconds after which a guest that does not answer has failed."""


class _Port:
    """Where the guest says that it has started, and that an act is done."""

    def __init__(self, told: threading.Semaphore) -> None:
        self._told = told

    def read(self, offset: int, size: int, /) -> int:
        return 0xFF

    def write(self, offset: int, size: int, value: int, /) -> None:
        self._told.release()


class _Boot:
    """The boot protocol: nothing to open, and the program in memory at each boot."""

    def __init__(self, told: threading.Semaphore) -> None:
        self._told = told

    def open(self) -> _Boot:
        return self

    def load(self, context: BootContext, /) -> VCpuState:
        memory = context.memory
        write_tables(memory, "long64")
        memory.write(LIBRARY, assembled()["library64"].code)
        memory.write(RECORDS, bytes(0x1000))
        memory.write(MAILBOX, bytes(0x1000))
        memory.write(LOAD, assembled()["remote64"].code)
        while self._told.acquire(blocking=False):
            pass  # what the guest said before a reset
        return enter(reset_state(), "long64", 0)


class _RemoteCard:
    """Offers the port and the boot protocol to the machine's host."""

    def __init__(self, told: threading.Semaphore) -> None:
        self._told = told

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.boot("remote-guest", lambda: _Boot(self._told))
        registry.device("remote-guest", lambda: _Port(self._told), regions=(Pio(1, HOST_PORT),))


class RemoteGuest:
    """A machine with that guest, not started yet; use it as a context manager, which closes it.

    Args:
        accel: name of the accelerator. devices: tables, as of :class:`~cardcage.Machine`. cards: whatever offers
            devices that are not installed. keys: further arguments of :class:`~cardcage.Machine`.

    Attributes:
        machine: the machine. memory: its memory.

    What waits for the guest raises TimeoutError when it has not answered after :data:`PATIENCE` seconds.
    """

    def __init__(
        self,
        accel: str,
        *,
        devices: Iterable[Mapping[str, Any]] = (),
        cards: Iterable[Any] = (),
        machine: Mapping[str, Any] | None = None,
        **keys: Any,
    ) -> None:
        self._told = threading.Semaphore(0)
        keys = {"memory": "8M", **keys}
        self.machine = Machine(
            accel=accel,
            host=Host((_RemoteCard(self._told), *cards)),
            boot={"protocol": "remote-guest"},
            devices=({"type": "remote-guest"}, *devices),
            machine=machine,
            **keys,
        )
        self.memory = self.machine.memory
        self._mailbox = self.memory.view(MAILBOX, 64)
        self._words = self._mailbox.cast("I")
        self._counters = self.memory.view(IRQS, 4 * 256).cast("I")

    def __enter__(self) -> RemoteGuest:
        return self

    def __exit__(self, *error: Any) -> None:
        self.machine.__exit__(*error)

    # life

    def start(self, *, boot: bool = True) -> None:
        """Start the machine, and wait until the guest is ready, where it boots (and does not go on from a state)."""
        self.machine.start(boot=boot)
        if boot:
            self.wait_ready()

    def wait_ready(self) -> None:
        """Wait until the guest has done one thing more: it started, or did what :meth:`begin` asked for."""
        if not self._told.acquire(timeout=PATIENCE):
            raise TimeoutError(f"the guest does not answer; the machine is {self.machine.state}")

    def reset(self) -> None:
        """Reset the machine, and wait until the guest is ready again."""
        self.machine.reset()
        self.wait_ready()

    # acts

    def begin(self, what: int, size: int, address: int, value: int = 0) -> None:
        """Ask for one act, and do not wait for its end."""
        struct.pack_into("<QQ", self._mailbox, 8, address, value)
        self._words[1] = size
        self._words[0] = what  # last: now the guest begins

    def _act(self, what: int, size: int, address: int, value: int = 0) -> int:
        self.begin(what, size, address, value)
        self.wait_ready()
        found: int = struct.unpack_from("<Q", self._mailbox, 16)[0]
        return found

    def store(self, address: int, size: int, value: int) -> None:
        """The guest stores 1, 2, 4 or 8 bytes."""
        self._act(STORE, size, address, value)

    def load(self, address: int, size: int) -> int:
        """The guest loads 1, 2, 4 or 8 bytes."""
        return self._act(LOAD_, size, address)

    def output(self, port: int, size: int, value: int) -> None:
        """The guest executes OUT of 1, 2 or 4 bytes."""
        self._act(OUTPUT, size, port, value)

    def input(self, port: int, size: int) -> int:
        """The guest executes IN of 1, 2 or 4 bytes."""
        return self._act(INPUT, size, port)

    # questions: the guest rings until somebody answers

    def ask_forever(self, bell: int) -> None:
        """Have the guest count :attr:`asked` up, store it at *bell* (2 bytes), and HLT until it is :meth:`answer`-ed,
        again and again, until :meth:`ask_no_more`."""
        self._words[10] = 1
        self.begin(ASK, 2, bell)

    def ask_no_more(self) -> None:
        """Wait until the last question is answered."""
        self._words[10] = 0
        self.wait_ready()

    @property
    def asked(self) -> int:
        """How many questions there were since the guest booted."""
        return self._words[8]

    def answer(self) -> None:
        """Answer what was asked; somebody has to interrupt the guest after this. Any thread."""
        self._words[9] = self._words[8]

    # interrupts

    def interrupts(self, vector: int) -> int:
        """How often the guest took *vector* since it booted."""
        return self._counters[vector]

    def until(self, true: Callable[[], bool], what: str) -> None:
        """Wait for *true()*; raises TimeoutError that says *what* did not come, or what stopped the machine."""
        end = time.monotonic() + PATIENCE
        while not true():
            if self.machine.state == "stopped":
                self.machine.wait(0)
            if self.machine.state == "stopped" or time.monotonic() > end:
                raise TimeoutError(f"{what}; the machine is {self.machine.state}")
            time.sleep(0)
