"""``check_accelerator``: one table of guest programs that every accelerator must run alike.

In a test of an accelerator::

    @pytest.mark.parametrize("program", programs(), ids=str)
    def test_program(program):
        reason = check_program(MyAccelerator(), program)
        if reason:
            pytest.skip(reason)

On the command line, ``python -m cardcage_conformance.accelerator [--accel kvm,tcg] [NAME ...]`` runs programs on
installed accelerators and prints where their final states differ.
"""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING

from attrs import asdict, define, evolve, field, frozen
from cardcage.errors import CardcageError, ConfigError, near
from cardcage.registry import AcceleratorOffer
from cardcage.vcpu import Exit, VCpuExit

from cardcage_conformance.lab import Lab
from cardcage_conformance.programs import all_programs

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cardcage.accelerator import Accelerator
    from cardcage.x86 import VCpuState

    from cardcage_conformance.conformance import Program

__all__ = ["Outcome", "Report", "check_accelerator", "check_program", "programs", "run_program"]

# Where CPUID shows a feature: leaf, register, bit; the program "cpuid-dump" leaves the registers in memory.
FEATURE_LEAVES = (1, 7, 0x80000001, 0xD)
FEATURES = {
    "avx": (1, "ecx", 28),
    "xsave": (1, "ecx", 26),
    "x2apic": (1, "ecx", 21),
    "tsc_deadline_timer": (1, "ecx", 24),
    "cx16": (1, "ecx", 13),
    "sep": (1, "edx", 11),
    "pdpe1gb": (0x80000001, "edx", 26),
    "rdtscp": (0x80000001, "edx", 27),
    "avx2": (7, "ebx", 5),
    "smep": (7, "ebx", 7),
    "smap": (7, "ebx", 20),
    "fsgsbase": (7, "ebx", 0),
    "umip": (7, "ecx", 2),
    "pku": (7, "ecx", 3),
    "sse4_2": (1, "ecx", 20),
    "popcnt": (1, "ecx", 23),
    "rdrand": (1, "ecx", 30),
    "lahf_lm": (0x80000001, "ecx", 0),
    "ssse3": (1, "ecx", 9),
}


@define
class Outcome:
    """The state when a program ended."""

    ended: VCpuExit
    state: VCpuState
    problems: list[str] = field(factory=list)
    skipped: str = ""


@frozen
class Report:
    """The result of :func:`check_accelerator`: names that passed, and those skipped with the reason."""

    passed: tuple[str, ...]
    skipped: dict[str, str]


def programs(*names: str) -> list[Program]:
    """The conformance programs, all or by name. Raises :exc:`~cardcage.errors.ConfigError` for an unknown name."""
    table = {program.name: program for program in all_programs()}
    for name in names:
        if name not in table:
            raise ConfigError(f"no conformance program {name!r}.{near(name, table)}")
    return [table[name] for name in names] if names else list(table.values())


def check_accelerator(accelerator: Accelerator, chosen: Iterable[Program] | None = None) -> Report:
    """Run conformance programs on *accelerator*. Raises AssertionError that lists every program that failed and how."""
    passed, skipped, wrong = [], {}, []
    features: dict[str, frozenset[str]] = {}
    for program in programs() if chosen is None else chosen:
        if program.irqchip not in features:
            features[program.irqchip] = guest_features(accelerator, program.irqchip)
        outcome = run_program(accelerator, program, features[program.irqchip])
        if outcome.problems:
            wrong.append(f"{program.name} ({program.claim})\n    " + "\n    ".join(outcome.problems))
        elif outcome.skipped:
            skipped[program.name] = outcome.skipped
        else:
            passed.append(program.name)
    if wrong:
        raise AssertionError(f"{accelerator.name}: {len(wrong)} programs went wrong\n" + "\n".join(wrong))
    return Report(tuple(passed), skipped)


def check_program(accelerator: Accelerator, program: Program) -> str:
    """Run one program. Returns why it had to be skipped, or an empty string; raises AssertionError when it failed."""
    outcome = run_program(accelerator, program)
    if outcome.problems:
        raise AssertionError(f"{accelerator.name}: {program.name}: {program.claim}\n  " + "\n  ".join(outcome.problems))
    return outcome.skipped


def guest_features(accelerator: Accelerator, irqchip: str) -> frozenset[str]:
    """Return the CPUID features of a guest on this accelerator, as far as programs ask for them."""
    dump = evolve(programs("cpuid-dump")[0], irqchip=irqchip)
    with Lab(accelerator, dump) as lab:
        lab.run()
        answers = {
            leaf: {
                name: lab.word(0x60000 + at * 16 + place * 4, 4)
                for place, name in enumerate(("eax", "ebx", "ecx", "edx"))
            }
            for at, leaf in enumerate(FEATURE_LEAVES)
        }
    return frozenset(name for name, (leaf, register, bit) in FEATURES.items() if answers[leaf][register] >> bit & 1)


def run_program(accelerator: Accelerator, program: Program, features: frozenset[str] | None = None) -> Outcome:
    """Run one program and compare. *features* is what :func:`guest_features` found; ``None``: ask now."""
    known = features or frozenset()
    if features is None and program.needs:
        known = guest_features(accelerator, program.irqchip)
    missing = sorted(set(program.needs) - known)
    emulated = accelerator.probe().speed == "emulated"
    with Lab(accelerator, program) as lab:
        skipped = f"the guest's CPUID lacks {', '.join(missing)}" if missing else ""
        lacks = sorted(set(program.capabilities) - lab.vm.capabilities)
        if lacks:
            skipped = f"the accelerator has no {', '.join(lacks)}"
        if emulated and program.emulated:
            skipped = f"this host emulates instructions: {program.emulated}"
        if skipped:
            return Outcome(VCpuExit(Exit.KICKED), lab.state(), skipped=skipped)
        ended = lab.run()
        outcome = Outcome(ended, lab.state())
        if ended.reason is Exit.FAILED and emulated:
            outcome.skipped = ended.detail.splitlines()[0]
            return outcome
        outcome.problems = _problems(lab, program, outcome)
        return outcome


def _problems(lab: Lab, program: Program, outcome: Outcome) -> list[str]:
    found = []
    if lab.timed_out:
        found.append("did not end in time")
    if lab.failed:
        found.append("met an exception that it did not expect, or saw itself fail")
    if outcome.ended.reason is not program.exit:
        found.append(f"ended with {outcome.ended.reason.name}, expected {program.exit.name}: {outcome.ended.detail}")
    for index, ended in sorted(lab.exits.items()):
        if index and ended.reason is not Exit.KICKED:
            found.append(f"processor {index} ended with {ended.reason.name}: {ended.detail}")
    for name, value in program.registers.items():
        have = getattr(outcome.state.registers, name)
        if have != value:
            found.append(f"{name} is {have:#x}, expected {value:#x}")
    for address, data in program.memory.items():
        have = lab.read(address, len(data))
        if have != data:
            found.append(f"memory at {address:#x} is {have.hex(' ')}, expected {data.hex(' ')}")
    if program.accesses is not None and lab.accesses != list(program.accesses):
        found.append(f"accesses are {_accesses(lab.accesses)}; expected {_accesses(program.accesses)}")
    found += _fault_problems(lab, program)
    if program.interrupts is not None and lab.interrupts() != program.interrupts:
        found.append(f"interrupts taken are {lab.interrupts()}, expected {program.interrupts}")
    if tuple(lab.eois) != program.eois:
        found.append(f"EOIs broadcast are {tuple(lab.eois)}, expected {program.eois}")
    if program.check is not None:
        found += program.check(lab)
    if found:
        registers = asdict(outcome.state.registers)
        found.append("registers: " + " ".join(f"{name}={value:#x}" for name, value in registers.items()))
    return found


def _accesses(accesses: Iterable[tuple[str, int, int, int]]) -> str:
    return "[" + ", ".join(f"{kind} {at:#x}/{size}={value:#x}" for kind, at, size, value in accesses) + "]"


def _fault_problems(lab: Lab, program: Program) -> list[str]:
    records, found = lab.faults(), []
    if len(records) != len(program.faults):
        shown = ", ".join(f"vector {one[0]} error {one[1]:#x} at {one[2]:#x} cr2 {one[7]:#x}" for one in records)
        return [f"{len(records)} faults, expected {len(program.faults)}: {shown}"]
    for at, (record, fault) in enumerate(zip(records, program.faults, strict=True)):
        vector, error, rip, cs, _, _, _, cr2 = record
        wanted = None if fault.rip is None else lab.code.labels[fault.rip]
        for what, have, want in (
            ("vector", vector, fault.vector),
            ("error code", error, fault.error),
            ("RIP", rip, wanted),
            ("CR2", cr2, fault.cr2),
            ("CS", cs & 0xFFFF, fault.cs),
        ):
            if want is not None and have != want:
                found.append(f"fault {at}: {what} is {have:#x}, expected {want:#x}")
    return found


def find(name: str) -> Accelerator:
    from importlib.metadata import entry_points

    from cardcage.registry import Registry

    registry = Registry()
    for point in entry_points(group="cardcage"):
        if point.name == name:
            point.load().cardcage_register(registry)
    accelerator: Accelerator = registry.get(AcceleratorOffer, name).load()()
    return accelerator


def main(arguments: list[str] | None = None) -> int:
    """Run programs from the command line; returns the process's status."""
    parser = argparse.ArgumentParser(
        prog="python -m cardcage_conformance.accelerator", description="run conformance programs"
    )
    parser.add_argument("--accel", default="kvm,tcg", help="accelerator cards, comma separated (default: %(default)s)")
    parser.add_argument("--quiet", action="store_true", help="report only programs with problems")
    parser.add_argument("names", nargs="*", metavar="NAME", help="programs to run; by default all")
    given = parser.parse_args(arguments)
    try:
        accelerators = [find(name) for name in given.accel.split(",")]
        chosen = programs(*given.names)
    except CardcageError as error:
        print(error, file=sys.stderr)
        return 2
    wrong = [program.name for program in chosen if _compare(accelerators, program, quiet=given.quiet)]
    return int(bool(wrong))


def _compare(accelerators: list[Accelerator], program: Program, *, quiet: bool) -> bool:
    outcomes, wrong = [], False
    for accelerator in accelerators:
        outcome = run_program(accelerator, program)
        wrong = wrong or bool(outcome.problems)
        if outcome.problems or not quiet:
            word = "FAILED" if outcome.problems else f"skipped: {outcome.skipped}" if outcome.skipped else "ok"
            print(f"{accelerator.name:5} {program.name:32} {word}")
        for problem in outcome.problems:
            print(f"      {problem}")
        if not outcome.skipped:
            outcomes.append((accelerator.name, outcome))
    lines = []
    for name, outcome in outcomes[1:]:
        base_name, base = outcomes[0]
        if outcome.ended.reason is not base.ended.reason:
            lines.append(f"exit: {base_name} {base.ended.reason.name}, {name} {outcome.ended.reason.name}")
        for part in ("registers", "system"):
            here, there = asdict(getattr(base.state, part)), asdict(getattr(outcome.state, part))
            for key in here:
                if here[key] != there[key]:
                    lines.append(f"{key}: {base_name} {_shown(here[key])}, {name} {_shown(there[key])}")
    if lines and (wrong or not quiet):
        print(f"      {program.name}: final states differ (as those of clocks and random numbers may):")
        print("\n".join(f"        {line}" for line in lines))
    return wrong


def _shown(value: object) -> str:
    if isinstance(value, dict):
        return "{" + " ".join(f"{key}={_shown(one)}" for key, one in value.items()) + "}"
    return f"{value:#x}" if isinstance(value, int) else repr(value)


if __name__ == "__main__":
    sys.exit(main())
