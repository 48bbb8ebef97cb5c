"""How often guest code comes by addresses, counted with breakpoints that the guest does not see."""

from cardcage.hookspecs import hookimpl
from cardcage.machine import Machine
from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    registry.device("hits", "hits_card.hits:Hits", options="hits_card.hits:HitsOptions", help="count passages of code")
    registry.flag(
        "--hits", "hits_card.hits:parse_hits", metavar="ADDRESS,...", help="count how often code comes by there"
    )


@hookimpl
def cardcage_built(machine: Machine) -> None:
    for one in machine.devices.values():
        if one.type == "hits":
            one.device.count(machine)
