"""How a machine ended: what :meth:`cardcage.Machine.wait` returns and the command line's exit status.

A debug exit's status is always odd, all others are even: they cannot be mistaken for one another.
"""

from __future__ import annotations

from attrs import field
from attrs.validators import ge, le

from cardcage.values import frozen

__all__ = ["Crashed", "DebugExit", "Outcome", "Panicked", "PoweredOff", "Reset", "Stopped", "TimedOut"]


@frozen
class PoweredOff:
    """The guest powered itself off. Status 0."""

    status = 0

    def __str__(self) -> str:
        return "the guest powered off"


@frozen
class Panicked:
    """The guest said that it panicked. Status 10."""

    message: str = ""
    status = 10

    def __str__(self) -> str:
        return f"the guest panicked: {self.message}" if self.message else "the guest panicked"


@frozen
class DebugExit:
    """The guest ended with a code, 0 to 255, through a debug exit device. Status: QEMU's ``code << 1 | 1``, 8 bits."""

    code: int = field(validator=[ge(0), le(255)])

    @property
    def status(self) -> int:
        return (self.code << 1 | 1) & 0xFF

    def __str__(self) -> str:
        return f"debug exit with code {self.code}"


@frozen
class Crashed:
    """A triple fault of the guest, and ``[machine] on_triple_fault = "stop"``. Status 12.

    Attributes:
        cpu: the processor's number. detail: its registers at the fault, several lines.
    """

    cpu: int
    detail: str
    status = 12

    def __str__(self) -> str:
        return f"the guest crashed: triple fault on cpu {self.cpu}"


@frozen
class Reset:
    """The guest asked for a reset, and ``[machine] on_reset = "stop"``. Status 0."""

    why: str = ""
    status = 0

    def __str__(self) -> str:
        return f"the guest asked for a reset ({self.why})" if self.why else "the guest asked for a reset"


@frozen
class Stopped:
    """The host stopped the machine (:meth:`cardcage.Machine.stop`, ``close``). Status 0."""

    why: str = ""
    status = 0

    def __str__(self) -> str:
        return f"stopped by the host ({self.why})" if self.why else "stopped by the host"


@frozen
class TimedOut:
    """``wait`` gave up; the machine goes on until it is closed. Status 124."""

    seconds: float
    status = 124

    def __str__(self) -> str:
        return f"timed out after {self.seconds:g} s"


Outcome = PoweredOff | Panicked | DebugExit | Crashed | Reset | Stopped | TimedOut
