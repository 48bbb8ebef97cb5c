"""The accelerator kvm: doorbells, irqfds, messages, the irqchip in the kernel."""

from __future__ import annotations

import os

import pytest
from attrs import evolve
from cardcage.errors import StateError, UsageError
from cardcage.vcpu import Exit
from cardcage_kvm.vcpu import KvmVCpu
from kvm_bench import CODE, Bench, MakeBench, Ops


def test_doorbell_takes_the_write_and_signals(kvm_bench: MakeBench) -> None:
    """A doorbell's write signals its eventfd and never reaches the machine; others do; removed, it reaches it again."""
    machine = kvm_bench()
    assert "doorbells" in machine.vm.capabilities
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    code = "b0 07 e6 10 b0 08 e6 10 f4"  # out 0x10: 7, then 8
    try:
        machine.vm.add_doorbell(fd, 0x10, 1, pio=True, value=7)
        ops = Ops()
        machine.load(code).run(ops)
        assert ops.seen == [("out", 0x10, 1, 8)]
        assert os.eventfd_read(fd) == 1
        machine.vm.remove_doorbell(fd, 0x10, 1, pio=True, value=7)
        machine.load(code).run(ops)
        assert ops.seen[1:] == [("out", 0x10, 1, 7), ("out", 0x10, 1, 8)]
        machine.vm.add_doorbell(fd, 0xD0000000, 4, pio=False, value=None)
        machine.load("a3 00 00 00 d0 f4").run(ops)  # mov [0xD0000000], eax
        assert os.eventfd_read(fd) == 1
        with pytest.raises(UsageError, match="3 bytes"):
            machine.vm.add_doorbell(fd, 0x10, 3, pio=True, value=None)
    finally:
        os.close(fd)


def enable_apic_and_wait(machine: Bench, vector: int) -> KvmVCpu:
    """A program that enables the xAPIC, waits for *vector* halted, and writes port 0x10 from its handler."""
    gate = 0x2000 + vector * 8
    handler = 0x1800
    machine.page[gate : gate + 8] = (handler & 0xFFFF | 8 << 16 | 0x8E00 << 32).to_bytes(8, "little")
    machine.page[0x3000:0x3018] = bytes.fromhex("0000000000000000 ffff0000009bcf00 ffff00000093cf00")
    machine.page[handler : handler + 3] = bytes.fromhex("e610f4")  # out 0x10, al; hlt
    vcpu = machine.load("c7 05 f0 00 e0 fe ff 01 00 00 e6 11 fb f4 eb fd")  # SVR = 0x1FF; out 0x11; sti; l: hlt; jmp l
    state = vcpu.get_state()
    state.system.idt = evolve(state.system.idt, base=0x2000, limit=0x7FF)
    state.system.gdt = evolve(state.system.gdt, base=0x3000, limit=0x17)
    vcpu.set_state(state)
    return vcpu


def test_irqfd_interrupts_the_guest(kvm_bench: MakeBench) -> None:
    """Signalling a routed eventfd delivers its MSI; after the route is removed it does not."""
    machine = kvm_bench(irqchip="split")
    assert "irqfds" in machine.vm.capabilities
    fd = os.eventfd(0)
    try:
        route = machine.vm.add_irqfd(fd, 0xFEE00000, 0x41)
        vcpu = enable_apic_and_wait(machine, 0x41)

        def act(port: int, value: int) -> None:
            if port == 0x11:
                os.eventfd_write(fd, 1)
            else:
                vcpu.kick()

        ops = Ops(act)
        assert vcpu.run(ops).reason is Exit.KICKED
        assert [one[1] for one in ops.seen] == [0x11, 0x10]
        machine.vm.remove_irqfd(fd, route)
        with pytest.raises(UsageError, match="no interrupt route"):
            machine.vm.remove_irqfd(fd, route)
    finally:
        os.close(fd)


def test_messages_to_nobody_go_nowhere(kvm_bench: MakeBench) -> None:
    """Messages whose address or data the guest made up neither raise nor stop the VM, as message or as route."""
    for irqchip in ("none", "split"):
        vm = kvm_bench(irqchip=irqchip).vm
        for address in (0xFEE55000, 0, 0xFFFFFFFFFFFFFFFF, 0xFEE00000FEE00000):
            for data in (0x41, 0xC041, 0xFFFFFFFF, 0):
                vm.signal_msi(address, data)
    fd = os.eventfd(0)
    try:
        vm.remove_irqfd(fd, vm.add_irqfd(fd, 0xFFFFFFFFFFFFFFFF, 0xFFFFFFFF))
    finally:
        os.close(fd)


def test_full_irqchip_takes_lines(kvm_bench: MakeBench) -> None:
    """With irqchip full, a line programmed in the in-kernel IOAPIC interrupts; ExtINT and bad lines are refused."""
    machine = kvm_bench(irqchip="full")
    vm = machine.vm
    assert "irqchip-full" in vm.capabilities
    with pytest.raises(StateError, match="8259"):
        vm.set_extint(True)
    with pytest.raises(UsageError, match="0 to 23"):
        vm.set_irq(24, True)
    vcpu = enable_apic_and_wait(machine, 0x42)
    ioapic = "b0 ff e6 21 c7 05 00 00 c0 fe 18 00 00 00 c7 05 10 00 c0 fe 42 00 00 00"  # PIC masked, pin 4: vector 0x42
    start = bytes.fromhex(ioapic + "c7 05 f0 00 e0 fe ff 01 00 00 e6 11 fb f4 eb fd")
    machine.page[CODE : CODE + len(start)] = start

    def act(port: int, value: int) -> None:
        if port == 0x11:
            vm.set_irq(4, True)
            vm.set_irq(4, False)
        else:
            vcpu.kick()

    ops = Ops(act)
    assert vcpu.run(ops).reason is Exit.KICKED
    assert [one[1] for one in ops.seen] == [0x11, 0x10]


def test_full_irqchip_has_a_timer(kvm_bench: MakeBench) -> None:
    """With irqchip full, the in-kernel 8254 interrupts through the in-kernel 8259."""
    machine = kvm_bench(irqchip="full")
    vcpu = enable_apic_and_wait(machine, 0x20)
    pic = "b0 11 e6 20 b0 20 e6 21 b0 04 e6 21 b0 01 e6 21 b0 fe e6 21"  # ICW1-4, only IRQ 0
    pit = "b0 30 e6 43 b0 ff e6 40 b0 10 e6 40"  # channel 0, mode 0, 0x10FF
    lint0 = "c7 05 50 03 e0 fe 00 07 00 00"  # ExtINT
    start = bytes.fromhex(f"c7 05 f0 00 e0 fe ff 01 00 00 {lint0} {pic} {pit} fb f4 eb fd")
    machine.page[CODE : CODE + len(start)] = start
    ops = Ops(lambda port, value: vcpu.kick())
    assert vcpu.run(ops).reason is Exit.KICKED
    assert [one[1] for one in ops.seen] == [0x10]
