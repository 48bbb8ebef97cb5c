"""The programs that cards offer for guests, such as the agent, in an image that knows nothing of them: by its seed.

They are vendor data, as a boothook: cloud-init runs it at each boot, before its user data, and whatever these say.
"""

from __future__ import annotations

import base64
import textwrap
from typing import TYPE_CHECKING

from cardcage.errors import CardError
from cardcage_boot.initramfs import add_devices, programs_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cardcage.machine import Machine

__all__ = ["add_programs", "boothook"]

MOST = 1 << 20
"""Bytes of the script."""
FOLDER = "/usr/local/libexec"
"""Where programs may be run: ``/run`` and ``/tmp`` may forbid it, and SELinux elsewhere."""
START = """
begin() {
    if [ -d /run/systemd/system ]; then  # a service now: by default one waits for a target that waits for cloud-init
        systemd-run --quiet --collect --no-block -p DefaultDependencies=no --unit="cardcage-$1" "$2" && return
    fi
    setsid "$2" < /dev/null > /dev/null 2>&1 &
}
"""


def add_programs(machine: Machine) -> str:
    """Add the devices of the programs to *machine*, and return the vendor data. Raises CardError."""
    add_devices(machine)
    return boothook(programs_of(machine.host.registry))


def boothook(programs: Mapping[str, bytes]) -> str:
    """A boothook that writes *programs*, by name, and starts each. Raises CardError for more than a MiB."""
    lines = ["#cloud-boothook", "#!/bin/sh", f"mkdir -p {FOLDER}", START.strip()]
    for name, data in sorted(programs.items()):
        path = f"{FOLDER}/cardcage-{name}"
        # a file of its own, put in place by rename: one that runs cannot be written
        lines += [f"base64 -d > {path}.new << 'end'", *textwrap.wrap(base64.b64encode(data).decode(), 76), "end"]
        lines += [f"chmod 755 {path}.new && mv -f {path}.new {path} && begin {name} {path}"]
    text = "\n".join([*lines, ""])
    if len(text) > MOST:
        raise CardError(f"programs for the guest: {len(text)} bytes of a script: expected at most {MOST}")
    return text
