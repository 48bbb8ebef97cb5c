"""Memory that is never swapped out (``type = "locked"``), and at most so many machines (``admission = "count"``)."""

from cardcage.hookspecs import hookimpl
from cardcage.registry import Registry
from cardcage_fleet import AdmissionOffer


@hookimpl
def cardcage_register(registry: Registry) -> None:
    registry.memory("locked", "memory_card.locked:Locked", help="anonymous memory that is never swapped out (mlock)")
    registry.add(AdmissionOffer("count", "memory_card.count:Count", options="memory_card.count:CountOptions"))
