"""Mandatory access control between a machine's own objects, in the style of SELinux; ``cardcage policy``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl
from cardcage_fleet import ControlOffer

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the security card ``selinux``, the command ``policy``, and a line of ``cardcage doctor``."""
    registry.security(
        "selinux",
        "cardcage_selinux.card:Selinux",
        options="cardcage_selinux.card:SelinuxOptions",
        help='mandatory access control by a policy in CIL; security = "default" is this card with the policy it ships',
    )
    registry.doctor(
        "SELinux of the host", "cardcage_selinux.svirt.hostlabels:check", help="SELinux labels on host processes"
    )
    for name, help in (
        ("policy-reload", "reload the security policy from its files"),
        ("policy-set", "set booleans or the mode: {booleans: {NAME: true}, enforcing: false}"),
        ("policy-show", "show the mode and the booleans"),
    ):
        registry.add(ControlOffer(name, f"cardcage_selinux.tool.running:{name.replace('-', '_')}", help=help))
    registry.command(
        "policy",
        "cardcage_selinux.tool.commands:run",
        configure="cardcage_selinux.tool.commands:configure",
        help="check, explain, diff or query a security policy, derive rules from a log, change the policy of a machine",
    )
