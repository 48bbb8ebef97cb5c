"""``cardcage doctor``: what this host supports, with a command that would enable the rest."""

from __future__ import annotations

import platform
import sys
from typing import TYPE_CHECKING

from cardcage._machine.building import probe_of
from cardcage.errors import FAULTS, in_words
from cardcage.registry import AcceleratorOffer, DoctorOffer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cardcage.host import Host

__all__ = ["CHECKS", "examine"]

Finding = tuple[bool, str, str]
"""(whether it works, what was found, what would enable it)."""


def examine(host: Host) -> int:
    """Print each check. Returns 0 when a machine can run here, else 70."""
    rows = list(findings(host))
    wide = max(len(name) for name, _ in rows)
    for name, (works, found, enable) in rows:
        print(f"{'yes' if works else 'no ':3}  {name:{wide}}  {found}")
        if not works and enable:
            print(f"     {'':{wide}}  enable: {enable}")
    usable = any(works for name, (works, _, _) in rows if name.startswith("accelerator "))
    return 0 if usable and rows[0][1][0] else 70


def findings(host: Host) -> Iterator[tuple[str, Finding]]:
    """The platform, each accelerator's probe, and the checks of cards."""
    yield "platform", CHECKS["platform"]()
    for name in host.registry.names(AcceleratorOffer):
        _, probe = probe_of(host.registry.get(AcceleratorOffer, name))
        text = f"{probe.speed}{': ' + probe.reason if probe.reason else ''}" if probe.usable else probe.reason
        yield f"accelerator {name}", (probe.usable, text, "")
    for name in host.registry.names(DoctorOffer):
        offer = host.registry.get(DoctorOffer, name)
        try:
            yield name, offer.load()()
        except FAULTS as error:  # a card's check that breaks is itself a finding
            yield name, (False, f"the check failed: {offer.who}: {in_words(error)}", "")


def _platform() -> Finding:
    right = sys.platform == "linux" and platform.machine() == "x86_64"
    text = f"{platform.system()} {platform.release()} {platform.machine()}, Python {platform.python_version()}"
    return right, text, "run cardcage on Linux on x86-64"


CHECKS: dict[str, Callable[[], Finding]] = {"platform": _platform}
"""The command line's own checks; all others are cards'."""
