"""The destination of a post-copy in a process of its own: ``postcopy_side.py URI FOLDER OPTIONS``, these in JSON.

It says what became of the machine in lines of JSON, and obeys lines of JSON, ``{"do": ...}``.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from cardcage.errors import CardcageError
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage_migrate.incoming import incoming
from cardcage_migrate.paging import Paging
from cardcage_migrate.wire import LinkLost
from cardcage_snapshot.creating import snapshot
from snapshot_kit import count


def say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def read(vm: Machine, at: int, size: int) -> str:
    """The sum of RAM; a thread of Python waits for pages that are missing, with all that it holds."""
    return hashlib.blake2b(vm.memory.read(at, size)).hexdigest()


def acted(vm: Any, told: dict[str, Any], folder: Path) -> dict[str, Any]:
    match told["do"]:
        case "state":
            progress = vm.migrate_progress()
            return {"state": str(vm.state), "count": count(vm), "outcome": str(vm.outcome), **progress.table()}
        case "sum":
            return {"sum": read(vm, told["at"], told["size"])}
        case "status":
            return vm.migrate_progress().table()  # type: ignore[no-any-return]  # a verb's
        case "try":
            acts = {
                "snapshot": lambda: snapshot(vm, folder / "saved"),
                "fork": lambda: vm.fork(1),
                "checkpoint": lambda: vm.checkpoint(),
                "migrate": lambda: vm.migrate(f"unix:{folder}/other"),
                "recover": lambda: vm.migrate_recover(),
                "stop": lambda: vm.stop(),
            }
            try:
                acts[told["what"]]()
                return {"error": ""}
            except CardcageError as error:
                return {"error": str(error)}
        case "pager":
            (found,) = [one for one in threading.enumerate() if one.name.endswith("-paging")]
            paging: Paging = found._target.__self__  # type: ignore[attr-defined]  # a bound method
            os.kill(paging._pager.process.pid, signal.SIGKILL)
            return {}
        case "wait":
            try:
                return {"ended": str(vm.wait(60))}
            except CardcageError as error:
                return {"ended": str(error)}
    raise AssertionError(told)


def main() -> None:
    uri, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
    with Host() as host:

        def waiting(door: Any) -> None:
            say(ready=True, port=door.port if uri.startswith("tcp:") else 0)

        vm: Any = None
        try:
            vm = incoming(Machine, uri, host=host, waiting=waiting, **options)
            say(done=True, error="")
        except LinkLost as error:
            vm = getattr(error, "machine", None)
            say(done=True, error=str(error))
        except CardcageError as error:
            say(done=True, error=str(error))
        for line in sys.stdin:
            told = json.loads(line)
            if told["do"] == "quit":
                break
            say(**acted(vm, told, folder))
        if vm is not None:
            with suppress(CardcageError):
                vm.dismantle()
    say(closed=True)


if __name__ == "__main__":
    main()
