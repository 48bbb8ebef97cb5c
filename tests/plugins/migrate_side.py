"""One side of a migration in a process of its own, which may end in the middle: ``migrate_side.py ROLE FOLDER MOMENT``.

MOMENT is a kind of frame with ``<`` or ``>`` (killed right before it is sent, or after), or ``-``. It says what became
of the machine in lines of JSON, and obeys ``state``, ``recover`` and ``quit``, a line each.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from cardcage.errors import CardcageError
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage_migrate.incoming import Arrival, Incomplete
from cardcage_migrate.outgoing import Limits, Outgoing
from cardcage_migrate.reach import connect, parse
from cardcage_migrate.wire import Kind
from migrate_kit import Cut
from snapshot_kit import count, counting, counts_on


def say(**told: Any) -> None:
    print(json.dumps(told), flush=True)


def killed(peer: Any) -> None:
    """As by the kernel when memory is short."""
    os.kill(os.getpid(), signal.SIGKILL)


def cut(peer: Any, moment: str) -> Any:
    return peer if moment == "-" else Cut(peer, Kind[moment[:-1]], moment[-1] == ">", killed)


def source(folder: Path, host: Host, moment: str) -> Machine:
    drive = {"type": "virtio-blk", "drive": {"file": str(folder / "disk.raw"), "format": "raw"}}
    vm = counting(folder, host, platform="pc", memory="8M", devices=[drive])
    vm.start()
    counts_on(vm, 10)
    say(ready=True)
    sys.stdin.readline()
    peer = cut(connect(parse(f"unix:{folder}/door"))[0], moment)
    try:
        Outgoing(vm, "there", Limits(downtime=5)).over(lambda: (peer, False))
    except CardcageError as error:
        say(error=str(error))
    return vm


def destination(folder: Path, host: Host, moment: str) -> Machine | None:
    arrival: Arrival[Machine] = Arrival(Machine, f"unix:{folder}/door", host=host)
    arrival.wait(waiting=lambda door: say(ready=True))
    channel = arrival._channel
    channel.peer = cut(channel.peer, moment)
    try:
        return arrival.machine()
    except Incomplete as error:
        say(error=str(error))
        vm: Machine = error.machine
        return vm
    except CardcageError as error:
        say(error=str(error))
        return None


def main() -> None:
    role, folder, moment = sys.argv[1:]
    with Host() as host:
        vm: Any = (source if role == "source" else destination)(Path(folder), host, moment)
        say(done=True)
        for line in sys.stdin:
            match line.strip():
                case "recover":
                    try:
                        vm.migrate_recover()
                        say(recovered=True)
                    except CardcageError as error:
                        say(recovered=False, error=str(error))
                case "state":
                    say(state="gone" if vm is None else str(vm.state), count=0 if vm is None else count(vm))
                case _:
                    break
        if vm is not None:
            vm.dismantle()


if __name__ == "__main__":
    main()
