"""Conformance programs: a short guest program and all that must be seen when it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import in_
from cardcage.vcpu import Exit

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_conformance.lab import Lab

__all__ = ["STARTS", "Access", "Fault", "Program"]

STARTS = ("real16", "protected32", "paging32", "long64")
Access = tuple[str, int, int, int]
"""One access that reached the machine: ``"in"``, ``"out"``, ``"read"`` or ``"write"``, address, size, value."""


@frozen
class Fault:
    """A record that the exception library must have made.

    Attributes:
        vector: exception vector. error: its error code, 0 for those that push none.
        rip: name of the program's label at the saved instruction pointer (labels start with ``at_``), ``None``: any.
        cr2: the faulting address of a page fault, ``None``: any.
        cs: the saved selector, ``None``: any.
    """

    vector: int
    error: int = 0
    rip: str | None = None
    cr2: int | None = None
    cs: int | None = None


@frozen(eq=False)
class Program:
    """A guest program with expectations; values are unsigned.

    Attributes:
        name: unique, lower case with hyphens.
        claim: one sentence: what an accelerator that passes does right.
        source: NASM text, assembled at 0x8000 behind ``common.inc`` and the start mode's include file.
        start: one of :data:`STARTS`: the state in which it is entered.
        irqchip, cpus: as in :class:`cardcage.accelerator.VmSpec`; the further processors run too, with their number
            in RDI where there is no local APIC, else they wait for a SIPI.
        registers: general-purpose registers of processor 0 at the end, by name; all 64 bits.
        memory: bytes at guest-physical addresses at the end.
        accesses: all accesses that the harness saw, in order; ``None``: not compared.
        faults: the exception library's records.
        interrupts: vectors in the order in which the library took them; ``None``: not compared.
        eois: vectors whose EOI was broadcast to the machine (irqchip ``split``).
        exit: how the run ends. ``KICKED``: by the program's ``done``.
        answers: values that port reads give, instead of the remembered bytes.
        on_host: ``on_host(lab, value)`` for each ``host value`` of the program.
        on_halt: ``on_halt(lab)`` when processor 0 halts without a local APIC; true to run on.
        prepare: ``prepare(lab)`` before the start.
        check: ``check(lab)`` at the end: further problems, a sentence each.
        needs: CPU features, by their names in Linux's /proc/cpuinfo, that the guest's CPUID must show.
        capabilities: of the VM that the program needs (:class:`cardcage.accelerator.AcceleratedVm`).
        emulated: why a host whose KVM emulates instructions (speed class ``emulated``) cannot pass it.
    """

    name: str
    claim: str
    source: str
    start: str = field(default="long64", validator=in_(STARTS))
    irqchip: str = "none"
    cpus: int = 1
    registers: dict[str, int] = field(factory=dict)
    memory: dict[int, bytes] = field(factory=dict)
    accesses: tuple[Access, ...] | None = None
    faults: tuple[Fault, ...] = ()
    interrupts: tuple[int, ...] | None = None
    eois: tuple[int, ...] = ()
    exit: Exit = Exit.KICKED
    answers: dict[int, int] = field(factory=dict)
    on_host: Callable[[Lab, int], None] | None = None
    on_halt: Callable[[Lab], bool] | None = None
    prepare: Callable[[Lab], None] | None = None
    check: Callable[[Lab], list[str]] | None = None
    needs: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    emulated: str = ""

    def __str__(self) -> str:
        return self.name
