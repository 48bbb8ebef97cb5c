"""One host of a Debian guest that moves: ``postcopy_guest_side.py URI FOLDER OPTIONS``.

With ``first`` in OPTIONS it makes the machine; else it waits at URI for one. It obeys lines of JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from cardcage.errors import CardcageError
from cardcage.host import Host
from cardcage_agent import Machine as AgentMachine
from cardcage_migrate import Verbs
from cardcage_migrate.wire import LinkLost
from postcopy_kit import gone_over


class Machine(Verbs, AgentMachine):
    """A machine with the verbs of both cards."""


def say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def moved(vm: Machine, told: dict[str, Any]) -> dict[str, Any]:
    """Move it; with ``most`` over a link for pages that breaks, and ``recover``."""
    try:
        if "most" in told:
            try:
                gone_over(vm, told["uri"], told["most"], bandwidth=None)
            except LinkLost as error:
                if "migrate_recover" not in str(error):
                    raise
                return {"cut": True}
            return {"cut": False}
        done = vm.migrate(told["uri"], mode=told["mode"], downtime=60)
        return {"cut": False, **done.table()}
    except CardcageError as error:
        return {"cut": False, "error": str(error)}


def main() -> None:
    uri, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    with Host() as host:
        vm: Any
        if options.pop("first", False):
            drive = {"type": "virtio-blk", "drive": {"file": str(folder / "disk.raw"), "format": "raw"}}
            vm = Machine.debian(devices=[drive], host=host, accel="tcg", **options["machine"])
            vm.start()
            vm.put(options["program"], "/tmp/keeps")
            say(ready=True, port=0)
        else:

            def waiting(door: Any) -> None:
                say(ready=True, port=door.port if uri.startswith("tcp:") else 0)

            vm = Machine.incoming(uri, host=host, waiting=waiting, **options)
            say(done=True, error="")
        for line in sys.stdin:
            told = json.loads(line)
            match told["do"]:
                case "run":
                    done = vm.run(told["command"], text=True, timeout=120)
                    say(output=done.stdout + done.stderr)
                case "move":
                    say(**moved(vm, told))
                case "recover":
                    vm.migrate_recover()
                    say(recovered=True, outcome=str(vm.outcome))
                case "status":
                    say(**vm.migrate_progress().table())
                case _:
                    break
        vm.dismantle()


if __name__ == "__main__":
    main()
