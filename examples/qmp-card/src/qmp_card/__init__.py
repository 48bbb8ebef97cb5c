"""QMP commands of a stranger's: guest memory is searched for a text, and an event says where it is."""

from cardcage.hookspecs import hookimpl
from cardcage.registry import Registry
from cardcage_qmp import HmpCommand, QmpCommand, QmpEvent


@hookimpl
def cardcage_register(registry: Registry) -> None:
    registry.add(QmpCommand("x-search-memory", "qmp_card.search:search_memory", help="find a text in guest memory"))
    registry.add(HmpCommand("x_search", "qmp_card.search:x_search", help="x_search TEXT"))
    registry.add(QmpEvent("X_SEARCH_FOUND", "qmp_card.search:Where"))
