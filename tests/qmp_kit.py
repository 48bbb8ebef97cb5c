"""A machine with a monitor, and a client that sends bytes as they are."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cardcage_qmp
from cardcage.host import Host
from cardcage.machine import Machine
from scripted import Scripted

TIME = 60


class Client:
    """Sends bytes, reads answers line by line."""

    def __init__(self, path: Path | str, *, ready: bool = True) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(TIME)
        self.socket.connect(str(path))
        self.file = self.socket.makefile("rb")
        self.greeting = self.line()
        self.events: list[dict[str, Any]] = []
        if ready:
            assert self.ask("qmp_capabilities") == {"return": {}}

    def line(self) -> Any:
        """The next line; None at the end."""
        text = self.file.readline()
        return json.loads(text) if text else None

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def answer(self) -> Any:
        """The next answer; events before it are kept."""
        while (found := self.line()) is not None and "event" in found:
            self.events.append(found)
        return found

    def ask(self, name: str, /, **arguments: Any) -> Any:
        """The answer to a command."""
        request: dict[str, Any] = {"execute": name}
        if arguments:
            request["arguments"] = {key.replace("_", "-"): value for key, value in arguments.items()}
        self.send(json.dumps(request).encode())
        return self.answer()

    def event(self, name: str) -> dict[str, Any]:
        """The next event of this name, kept or to come."""
        while True:
            for one in self.events:
                if one["event"] == name:
                    self.events.remove(one)
                    return one
            found = self.line()
            assert found is not None, f"no {name} before the end"
            assert "event" in found, found
            self.events.append(found)

    def close(self) -> None:
        self.file.close()
        self.socket.close()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def machines(folder: Path, *cards: Any, checkers: tuple[str, ...] = ()) -> Iterator[Callable[..., Machine]]:
    """Makes machines whose monitor is at ``folder/qmp``, and closes them. A generator for a fixture."""
    made: list[Machine] = []

    def make(*devices: dict[str, Any], scripts: tuple[Any, ...] = (), **options: Any) -> Machine:
        host = Host([Scripted(scripts), cardcage_qmp, *cards], installed=False)
        monitor = {"type": "qmp", "socket": f"unix:{folder}/qmp", **options}
        fragments = [{"security": {"checkers": list(checkers)}}] if checkers else []
        keys = {"platform": "none", "memory": "2M", "accel": "scripted", "name": "vm"}
        made.append(Machine(host=host, machine=keys, devices=[monitor, *devices], fragments=fragments))
        return made[-1]

    yield make
    for one in made:
        one.close()
