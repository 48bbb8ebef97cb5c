"""The vCPU seam: what an accelerator gives the machine for each logical processor."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING, Protocol

from cardcage.values import frozen

if TYPE_CHECKING:
    from cardcage.x86 import VCpuState

__all__ = ["Exit", "Ops", "VCpu", "VCpuExit"]


class Exit(Enum):
    """Why :meth:`VCpu.run` came back."""

    HALTED = "halted"
    """HLT with no local APIC in the accelerator (irqchip ``none``); run again once an interrupt is pending."""
    KICKED = "kicked"
    """:meth:`VCpu.kick` was called, or a signal arrived."""
    SHUTDOWN = "shutdown"
    """Triple fault: the registers are those at the fault."""
    RESET = "reset"
    """The processor asked for a machine reset."""
    DEBUG = "debug"
    """A breakpoint or single step that the host asked for."""
    FAILED = "failed"
    """The accelerator cannot go on; ``detail`` says why, with registers and the bytes at RIP."""


@frozen
class VCpuExit:
    """One return of :meth:`VCpu.run`: the reason, and a sentence for a person where there is more to say."""

    reason: Exit
    detail: str = ""


class Ops(Protocol):
    """The machine's services for running guest code, called inside :meth:`VCpu.run` on the vCPU's thread.

    Sizes are 1, 2, 4 or 8 bytes (ports: 1, 2 or 4); values are unsigned. An exception raised here leaves
    ``run`` unchanged, after the vCPU's state was made whole.
    """

    def pio_read(self, port: int, size: int, /) -> int: ...

    def pio_write(self, port: int, size: int, value: int, /) -> None: ...

    def mmio_read(self, address: int, size: int, /) -> int: ...

    def mmio_write(self, address: int, size: int, value: int, /) -> None: ...

    def acknowledge_extint(self) -> int | None:
        """INTA cycle: the vector of the pending external (8259) interrupt, ``None`` when it went away."""

    def end_of_interrupt(self, vector: int, /) -> None:
        """EOI broadcast of a level-triggered vector from a local APIC (irqchip ``split``)."""


class VCpu(Protocol):
    """One logical processor. ``run`` is called on one thread; ``kick`` from any; the rest while it does not run."""

    index: int

    def run(self, ops: Ops, /) -> VCpuExit:
        """Run guest code until something ends the loop. Port and memory-mapped accesses are served through *ops*."""

    def kick(self) -> None:
        """Make the current, or else the next, ``run`` return :attr:`Exit.KICKED` soon."""

    def get_state(self) -> VCpuState:
        """Read all registers."""

    def set_state(self, state: VCpuState, /) -> None:
        """Set all registers. Raises :exc:`~cardcage.errors.UsageError` for what this vCPU cannot hold."""
