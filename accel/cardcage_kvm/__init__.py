"""Card cardcage_kvm: the accelerator that uses the processor's own virtualization, Linux KVM."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer what this card has."""
    registry.accelerator("kvm", "cardcage_kvm.accel:Kvm", options="cardcage_kvm.accel:KvmOptions", help="Linux KVM")
    registry.doctor("kvm device", "cardcage_kvm.check:kvm_device", help="permission to open /dev/kvm")
