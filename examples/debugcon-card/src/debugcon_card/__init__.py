"""A card of one device: a debug console, as Bochs has at port 0xE9."""

from cardcage.device import Pio
from cardcage.hookspecs import hookimpl


@hookimpl
def cardcage_register(registry):
    registry.device(
        "debug-console",
        "debugcon_card.device:DebugConsole",
        options="debugcon_card.device:Options",
        regions=(Pio(1, base=0xE9),),
        help="bytes written to its port go to a char back end; reading gives 0xE9",
    )
