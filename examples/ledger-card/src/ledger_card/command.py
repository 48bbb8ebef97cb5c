"""``cardcage ledger``: a line for each machine, and for each whose process died."""

from argparse import ArgumentParser, Namespace

from cardcage.host import Host
from cardcage.units import say_size

from ledger_card.ledger import Ledger


def configure(parser: ArgumentParser) -> None:
    """The arguments."""
    parser.add_argument("--forget", action="store_true", help="take the machines whose process died off the ledger")


def run(host: Host, arguments: Namespace) -> int:
    """Print the ledger."""
    ledger = Ledger()
    with ledger.locked():
        alive, dead = ledger.read()
        for _, path in dead if arguments.forget else ():
            path.unlink()
    rows = [(one.name, str(one.pid), one.state, say_size(one.memory)) for one in alive]
    rows += [(one.name, str(one.pid), "died", say_size(one.memory)) for one, _ in dead]
    for name, pid, state, memory in [("name", "pid", "state", "memory"), *rows]:
        print(f"{name:20} {pid:>8}  {state:8} {memory:>10}")
    return 0
