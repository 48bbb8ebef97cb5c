"""Card ``egress``: a network that leads to named servers and addresses, and nowhere else.

``net = { type = "egress", allow = ["pypi.org", "10.1.2.0/24"] }``. What the guest sends is taken apart in the machine's
process, in its jail; connections are made by another process, the gate, which checks each against *allow*, and reads
along that what is said in it is meant for the server of that name (:mod:`cardcage_egress.gate`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl
from cardcage.lazy import lazy_names

if TYPE_CHECKING:
    from cardcage.registry import Registry

    from cardcage_egress.policy import Policy

__all__ = ["Policy"]


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the back end ``net:egress``."""
    registry.backend(
        "net",
        "egress",
        "cardcage_egress.net:open_egress",
        options="cardcage_egress.net:Egress",
        shorthand="cardcage_egress.net:parse_egress",
        help="connections to named servers and addresses only, by a process that checks each",
    )


__getattr__ = lazy_names("cardcage_egress", policy="Policy")
