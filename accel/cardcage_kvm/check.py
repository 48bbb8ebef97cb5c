"""``cardcage doctor``: the device of Linux KVM."""

from __future__ import annotations

import os

__all__ = ["kvm_device"]


def kvm_device() -> tuple[bool, str, str]:
    """Can ``/dev/kvm`` be opened?"""
    if not os.path.exists("/dev/kvm"):
        return False, "/dev/kvm does not exist", "modprobe kvm_intel || modprobe kvm_amd  (or nested virtualization)"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False, "/dev/kvm: permission denied", f"sudo usermod -aG kvm {os.environ.get('USER', '$USER')}"
    return True, "/dev/kvm can be opened", ""
