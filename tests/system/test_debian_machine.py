"""Machine.debian(): the kernel of ``cardcage boot`` from Python, with a shell on its console."""

from __future__ import annotations

from pathlib import Path

from cardcage import Machine
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.registry import Registry
from cardcage_boot import GuestProgramOffer
from cardcage_boot.initramfs import programs_of


class Stranger:
    """A card whose program for the guest is a script, with a device of its own."""

    __name__ = "stranger"

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        script = b"#!/bin/busybox sh\necho up > /cardcage/told\n"
        device = {"type": "virtio-rng", "id": "strangers"}
        registry.add(GuestProgramOffer("stranger", lambda: script, devices=(device,)))


def test_a_machine_in_one_call(kernel: Path) -> None:
    """It has what the caller asks for and the devices of cards' programs; init starts these before the shell."""
    host = Host([Stranger()])
    assert "stranger" in programs_of(host.registry)
    with Machine.debian(memory="128M", accel="tcg", cpus=2, name="mine", host=host) as vm:  # type: ignore[attr-defined]
        assert (vm.name, len(vm.vcpus), "strangers" in vm.devices) == ("mine", 2, True)
        vm.start()
        vm.console.expect("# ", timeout=120)
        vm.console.send("cat /cardcage/told; poweroff -f\n")
        vm.console.expect("up\r\n", timeout=60)
        assert str(vm.wait(timeout=60)) == "the guest powered off"
