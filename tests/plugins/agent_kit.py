"""The guest agent on this host, behind a pty in place of a virtio port, and a machine with its verbs alone."""

from __future__ import annotations

import os
import subprocess
import threading
import tty
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

from cardcage.machine import State
from cardcage.security import Mediator
from cardcage_agent.link import Link
from cardcage_agent.program import program
from cardcage_agent.verbs import Verbs
from cardcage_testing import TestSlot

CREDIT, DATA, END, STARTED, EXITED, RESULT = 10, 8, 9, 18, 19, 20
GREETING = b"cardcage\1\0\0\0" + b"nonce..."


class Slot:
    """As much of a slot as a link uses; what it wants done soon is done at once.

    Args:
        loop: a thread does it, in order, as a machine's does.
    """

    machine = "vm"

    def __init__(self, *, loop: bool = False) -> None:
        self.log = TestSlot().log
        self._soon: SimpleQueue[Any] = SimpleQueue()
        self.loop = SimpleNamespace(call_soon=self._soon.put if loop else lambda callback: callback())
        self.services: dict[str, Any] = {}
        self.host = SimpleNamespace(provide=self.services.__setitem__)
        if loop:
            threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while (callback := self._soon.get()) is not None:
            callback()

    def close(self) -> None:
        """End the thread."""
        self._soon.put(None)


class AgentMachine(Verbs):
    """A machine without anything but verbs."""

    name = label = "vm"
    state = State.RUNNING

    def __init__(self, link: Link | None) -> None:
        self.services = {"agent": link} if link is not None else {}
        self.mediator = Mediator()


class HostAgent:
    """The agent as a process of this host, and a link to it.

    Args:
        stale: what it finds in its port, from before it began.

    Attributes:
        vm: has the verbs. process: the agent's.
    """

    def __init__(self, folder: Path, stale: bytes = b"") -> None:
        path = folder / "guest-agent"
        path.write_bytes(program())
        path.chmod(0o755)
        self.master, slave = os.openpty()
        tty.setraw(slave)
        self.process = subprocess.Popen([path, os.ttyname(slave)], stdin=subprocess.DEVNULL)
        self._typed(stale)
        self.attach()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.vm.agent.wait()
        os.close(slave)

    def attach(self) -> None:
        """Give it a new link, as a machine has that goes on from a snapshot."""
        self.slot = Slot(loop=True)
        self.link = Link(self.slot)  # type: ignore[arg-type]  # as much of one as it uses
        self.link.start(self._typed)
        self.vm = AgentMachine(self.link)

    def _typed(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self.master, left) :]

    def _read(self) -> None:
        try:
            while data := os.read(self.master, 65536):
                self.link.write(data)
        except OSError:  # the agent has ended
            pass

    def open_files(self) -> int:
        """Descriptors that the agent has."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def close(self) -> None:
        """End the agent."""
        self.link.close()
        self.process.kill()
        self.process.wait()
        self._reader.join()
        self.slot.close()
        os.close(self.master)


class Guest:
    """A guest that the test plays: what it sends, and what it was sent."""

    def __init__(self) -> None:
        self.slot = Slot()
        self.link = Link(self.slot)  # type: ignore[arg-type]  # as much of one as it uses
        self.sent = bytearray()
        self.link.start(self.sent.extend)
        self.vm = AgentMachine(self.link)
