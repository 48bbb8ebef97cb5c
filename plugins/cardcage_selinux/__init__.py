"""Mandatory access control between a machine's own objects, in the style of SELinux; ``cardcage policy``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the security card ``selinux``, the command ``policy``, and a line of ``cardcage doctor``."""
    registry.security(
        "selinux",
        "cardcage_selinux.card:Selinux",
        options="cardcage_selinux.card:SelinuxOptions",
        help='mandatory access control by a policy in CIL; security = "default" is this one with its own policy',
    )
    registry.check("SELinux of the host", "cardcage_selinux.hostlabels:check", help="real labels on processes")
    for name, help in (
        ("policy-reload", "read the security policy's files anew"),
        ("policy-set", "give booleans values, or change the mode: {booleans: {NAME: true}, enforcing: false}"),
        ("policy-show", "the mode and the booleans"),
    ):
        registry.control(name, f"cardcage_selinux.running:{name.replace('-', '_')}", help=help)
    registry.command(
        "policy",
        "cardcage_selinux.tool:run",
        configure="cardcage_selinux.tool:configure",
        help="check, explain, diff or query a security policy, write rules from a log, change that of running machines",
    )
