"""A guest that does what a test asks, on the accelerators, and what it finds of them."""

from __future__ import annotations

import pytest
from cardcage_conformance import RemoteGuest
from cardcage_conformance.accelerator import find


def skip_unless_usable(accel: str) -> None:
    found = find(accel).probe()
    if not found.usable:
        pytest.skip(found.reason)


@pytest.mark.parametrize("accel", ["tcg", "kvm"])
def test_accesses_of_each_size(accel: str) -> None:
    """Loads, stores, IN and OUT of each size are the guest's own, with just the bytes that were asked for."""
    skip_unless_usable(accel)
    with RemoteGuest(accel) as guest:
        guest.start()
        for size in (1, 2, 4, 8):
            value = 0x1122334455667788 & (1 << 8 * size) - 1
            guest.memory.write(0x100000, bytes(16))
            guest.store(0x100000, size, 0x1122334455667788)
            assert guest.memory.read(0x100000, 16) == value.to_bytes(16, "little")
            assert guest.load(0x100000, size) == value
        guest.output(0xCF8, 4, 1 << 31)
        assert guest.input(0xCF8, 4) == 1 << 31
        assert [guest.input(0xCFC, size) for size in (1, 2, 4)] == [0x86, 0x8086, 0x12378086]
        guest.output(0xCF8, 4, 1 << 31 | 0x3C)
        guest.output(0xCFC, 1, 7)
        assert guest.input(0xCFC, 2) & 0xFF == 7


@pytest.mark.parametrize("accel", ["tcg", "kvm"])
def test_a_reset_leaves_nothing_pending_and_msrs_as_after_power_up(accel: str) -> None:
    """An interrupt that waits in the local APIC, its timer, and what MSRs hold do not outlive a reset."""
    skip_unless_usable(accel)
    with RemoteGuest(accel, machine={"platform": "none", "irqchip": "split"}) as guest:
        machine = guest.machine
        guest.start()
        fresh = machine.vcpus[0]
        machine.pause()
        before = fresh.get_state().msrs[0x174]
        state = fresh.get_state()
        state.msrs[0x174] = before + 8
        fresh.set_state(state)
        machine.resume()
        guest.store(0xFEE00320, 4, 0x00020055)  # LVT timer: periodic, vector 0x55
        guest.store(0xFEE00380, 4, 0x10000)
        guest.until(lambda: guest.interrupts(0x55) > 1, "the timer does not tick")
        machine.pause()
        machine.vm.signal_msi(0xFEE00000, 0x41)
        machine.reset()
        machine.resume()
        guest.wait_ready()
        assert guest.load(0xFEE00320, 4) == 0x10000
        assert (guest.interrupts(0x41), guest.interrupts(0x55)) == (0, 0)
        machine.pause()
        assert fresh.get_state().msrs[0x174] == before
