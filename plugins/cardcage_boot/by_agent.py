"""A command for a guest that is not ours from its first process on: by the verbs of an agent, where a card has them.

``--exec`` of ``cardcage run``, and of ``cardcage boot`` with firmware.
"""

from __future__ import annotations

import os
import sys
import threading
from contextlib import suppress
from subprocess import PIPE, TimeoutExpired
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError, ConfigError, StateError
from cardcage.machine import State
from cardcage_cli import EXIT, EXIT_STATUS, detaching

from cardcage_boot import WANTED
from cardcage_boot.initramfs import add_devices
from cardcage_boot.streams import BROKEN_PIPE, in_background

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.host import Host
    from cardcage.machine import Machine

__all__ = ["AgentCommand", "command_for", "exit_status", "parse_exec_flag"]


PATIENCE = 300.0
"""Seconds that the guest may take until its agent answers: a cloud image's starts late."""
PIECE = 1 << 16


class AgentCommand:
    """Runs *command* by the guest's shell once *machine* runs and its agent answers, then ends the machine.

    Args:
        status: an open descriptor, to which ``status N`` or ``fail TEXT`` is written, once; nothing when the machine
            ended before.
        streams: descriptors of standard input, output and error output. They stay the caller's.
    """

    def __init__(self, machine: Machine, command: str, status: int, streams: tuple[int, int, int] = (0, 1, 2)) -> None:
        self._machine, self._command, self._status, self._streams = machine, command, status, streams
        self._unread = False
        self._thread = threading.Thread(target=self._live, name="exec-agent", daemon=True)
        machine.observers.add("state", self._changed)

    def join(self) -> None:
        """Wait for its end, which comes with the machine's."""
        if self._thread.ident is not None:
            self._thread.join()

    def _changed(self, state: str) -> None:
        if state == State.RUNNING:
            self._machine.observers.remove("state", self._changed)
            self._thread.start()

    def _live(self) -> None:
        try:
            code = self._run()
            word = f"status {BROKEN_PIPE if self._unread else code if code >= 0 else 128 - code}"
        except (CardcageError, OSError, TimeoutExpired) as error:
            if self._machine.state == State.STOPPED:  # its outcome says more
                return
            word = f"fail {' '.join(str(error).split())}"
        os.write(self._status, f"{word}\n".encode())
        with suppress(CardcageError):  # it has ended meanwhile
            self._machine.shutdown(self._machine.config.machine.stop_timeout)

    def _run(self) -> int:
        verbs: Any = self._machine  # those of a card
        if getattr(verbs, "popen", None) is None:
            raise StateError("no card offers an agent that runs commands")
        verbs.agent.wait(PATIENCE)
        with verbs.popen(self._command, stdin=PIPE) as process:
            threading.Thread(target=self._feed, args=(process.stdin,), name="exec-input", daemon=True).start()
            pairs = zip((process.stdout, process.stderr), self._streams[1:], strict=True)
            pumps = [threading.Thread(target=self._pump, args=(process, *one), name="exec-output") for one in pairs]
            for one in pumps:
                one.start()
            for one in pumps:
                one.join()
            code: int = process.wait()
            return code

    def _feed(self, stream: Any) -> None:
        """Standard input, to its end; one that waits for it when the command has ended is left to itself."""
        try:
            if not in_background(self._streams[0]):
                while data := os.read(self._streams[0], PIECE):
                    stream.write(data)
                    stream.flush()
            stream.close()
        except (OSError, ValueError, CardcageError):  # closed by who started us, or nobody reads it in the guest
            with suppress(OSError, ValueError, CardcageError):
                stream.close()

    def _pump(self, process: Any, stream: Any, target: int) -> None:
        """One output, until its end; a reader that has gone ends the command."""
        try:
            while data := stream.read1(PIECE):
                rest = memoryview(data)
                try:
                    while rest:
                        rest = rest[os.write(target, rest) :]
                except OSError:
                    self._unread = True
                    process.kill()
                    return
        except CardcageError:  # the machine ended: wait() says so
            return


def parse_exec_flag(text: str, host: Host) -> dict[str, Any]:
    """``--exec COMMAND``: the console is not shown, and a guest that resets ends. Raises ConfigError."""
    if detaching(host).asked:
        raise ConfigError("omit --detach, or run the command by cardcage exec")
    host.share(WANTED, dict)["command"] = text
    return {"machine": {"console": {"type": "null"}, "on_reset": "stop"}}


def command_for(machine: Machine, command: str) -> None:
    """Run *command* in *machine* by the agent, whose device is added where it has none: its status is the process's."""
    if any(getattr(one.device, "bus_type", None) == "pci" for one in machine.devices.values()):
        add_devices(machine)
    machine.services.provide(EXIT_STATUS, _Told(machine, command))


class _Told:
    """The status of a command, as :class:`cardcage_cli.ExitStatus` has it."""

    def __init__(self, machine: Machine, command: str) -> None:
        self._reader, self._writer = os.pipe()
        self._running = AgentCommand(machine, command, self._writer)

    def exit_status(self, status: int, /) -> int:
        """The command's, else the machine's or a failure's."""
        self._running.join()
        os.close(self._writer)
        with os.fdopen(self._reader) as told:
            return exit_status(told.readline(), status, lambda: None)


def exit_status(word: str, status: int, untold: Callable[[], None]) -> int:
    """The exit status after a command's run: its own where *word* tells it, else the machine's or a failure's.

    Args:
        untold: called before that is said, where the machine ended and nothing was told.
    """
    kind, _, text = word.strip().partition(" ")
    if kind == "status":
        return int(text)
    if kind == "fail":  # a guest's text: nothing in it reaches a terminal but letters
        print(f"cardcage: {''.join(one if one.isprintable() else '?' for one in text)}", file=sys.stderr)
        return EXIT["failure"]
    untold()
    if status:
        return status
    print("cardcage: the guest ended before the command did", file=sys.stderr)
    return EXIT["failure"]
