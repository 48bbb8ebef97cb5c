"""The table of conformance programs itself."""

from __future__ import annotations

import shutil

import pytest
from cardcage.errors import ConfigError
from cardcage_conformance import assemble
from cardcage_conformance.accelerator import check_accelerator, check_program, programs
from cardcage_conformance.lab import assembled
from cardcage_kvm.accel import Kvm


@pytest.fixture
def kvm() -> Kvm:
    accelerator = Kvm()
    found = accelerator.probe()
    if not found.usable:
        pytest.skip(found.reason)
    return accelerator


def test_at_least_sixty_programs_with_unique_names_and_claims() -> None:
    """The table has at least 60 programs, each with a name and a claim of its own, and machine code that is shipped."""
    table = programs()
    assert len(table) >= 60
    assert len({one.name for one in table}) == len(table)
    assert len({one.claim for one in table}) == len(table)
    assert all(one.name in assembled() for one in table)


def test_labels_that_faults_name_exist() -> None:
    """Every label that an expected fault names is one of its program's."""
    for program in programs():
        for fault in program.faults:
            assert fault.rip is None or fault.rip in assembled()[program.name].labels, (program.name, fault.rip)


def test_shipped_bytes_are_what_nasm_makes() -> None:
    """Assembling the sources again gives exactly the committed file."""
    if shutil.which("nasm") is None:
        pytest.skip("nasm is not installed")
    assert assemble.OUTPUT.read_text() == assemble.build()


def test_unknown_name_is_refused_with_a_hint() -> None:
    """A mistyped program name gives one clear line with the near match."""
    with pytest.raises(ConfigError, match=r'Did you mean "halt"'):
        programs("hallt")


def test_a_wrong_expectation_is_reported(kvm: Kvm) -> None:
    """A program that ends otherwise than its table says fails with register, value and claim."""
    from attrs import evolve

    wrong = evolve(programs("halt")[0], registers={"rax": 0x4321})
    with pytest.raises(AssertionError, match=r"rax is 0x1234, expected 0x4321"):
        check_program(kvm, wrong)


def test_check_accelerator_reports_passed_and_skipped(kvm: Kvm) -> None:
    """check_accelerator runs what it is given and names what passed and what was skipped, with reasons."""
    from attrs import evolve

    needy = evolve(programs("halt")[0], needs=("no-such-feature",))
    report = check_accelerator(kvm, [programs("port-sizes")[0], needy])
    assert report.passed == ("port-sizes",)
    assert report.skipped == {"halt": "the guest's CPUID lacks no-such-feature"}
