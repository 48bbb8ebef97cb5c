"""A command for a guest that is not ours from its first process on: by the verbs of an agent, where a card has them."""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from subprocess import PIPE, TimeoutExpired
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError, StateError
from cardcage.machine import State

from cardcage_boot.streams import BROKEN_PIPE, in_background

if TYPE_CHECKING:
    from cardcage.machine import Machine

__all__ = ["AgentCommand"]

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
