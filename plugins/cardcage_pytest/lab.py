"""The guests of one run of pytest: made from markers, kept booted, watched, and shown when a test fails."""

from __future__ import annotations

import os
import tempfile
from collections import OrderedDict, deque
from contextlib import suppress
from pathlib import Path
from subprocess import CompletedProcess
from typing import TYPE_CHECKING, Any

import pytest
from attrs import define, field
from cardcage.errors import CardcageError
from cardcage.machine import State
from cardcage_agent import AgentError, AgentTimeout, Machine

from cardcage_pytest.spec import Spec, spec_of
from cardcage_pytest.watch import Watch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Guest", "Lab", "MachineFactory"]

Guest = Machine
"""The guests that fixtures give."""
LINES = 100
"""Lines of a console that a report shows."""
COMMANDS = 20
"""Commands that a report shows, the last ones."""
TEXT = 2000
"""Characters of one output that a report shows."""
FOREVER = 1e9


@define(eq=False)
class Seen:
    """A machine that a test may see: what a report says of it.

    Attributes:
        fixture, node: of the test that it was made for. commands: what its agent was asked for, and what came of it.
    """

    machine: Guest
    fixture: str
    node: Any
    commands: deque[str] = field(factory=lambda: deque(maxlen=COMMANDS))

    def note(self, args: Any, done: CompletedProcess[Any] | BaseException) -> None:
        """Keep a command for a report."""
        text = args if isinstance(args, str) else " ".join(os.fsdecode(one) for one in args)
        lines = [f"$ {text}"]
        if isinstance(done, CompletedProcess):
            lines += [_text(one) for one in (done.stdout, done.stderr) if one]
            lines += [f"[{done.returncode}]"] if done.returncode else []
        else:
            lines.append(f"[{type(done).__name__}: {done}]")
        self.commands.append("\n".join(line.rstrip("\n") for line in lines))


class MachineFactory:
    """Makes machines for one test: see the fixture ``machine_factory``."""

    def __init__(self, lab: Lab, request: pytest.FixtureRequest) -> None:
        self._lab, self._request = lab, request

    def __call__(self, **keys: Any) -> Guest:
        """A machine that was not started."""
        return self._lab.make(spec_of(self._request, keys), self._request)

    def boot(self, **keys: Any) -> Guest:
        """A machine whose agent has answered. Raises NoAgent when it has not within ``boot_timeout``."""
        __tracebackhide__ = True
        spec = spec_of(self._request, keys)
        machine = self._lab.make(spec, self._request)
        self._lab.boot(machine, spec)
        return machine


class Lab:
    """All guests of one process.

    Those of the fixture ``guest`` that can go back to when they had booted are kept, a few at a time.
    """

    def __init__(self, config: pytest.Config) -> None:
        self._keep = bool(config.option.cardcage_keep)
        self._kept: list[Guest] = []
        self._most = int(config.getini("cardcage_booted"))
        self._booted: OrderedDict[str, tuple[Guest, Callable[[], object]]] = OrderedDict()
        self._seen: list[Seen] = []
        self._watch = Watch()

    # fixtures

    def guest(self, request: pytest.FixtureRequest) -> Guest:
        """A guest for the scope of *request*."""
        __tracebackhide__ = True
        spec, single = spec_of(request, {}), request.scope == "function"
        machine = self._again(spec.key, request) if single else None
        if machine is None:
            machine = self.make(spec, request)
            self.boot(machine, spec)
            back = checkpoint(machine) if single else None
            if back is not None:
                while len(self._booted) >= self._most:
                    self._booted.popitem(last=False)[1][0].close()
                self._booted[spec.key] = machine, back
        return machine

    def _again(self, key: str, request: pytest.FixtureRequest) -> Guest | None:
        """The guest that is kept for *key*, as it was when it had booted; None when it cannot be had again."""
        if key not in self._booted:
            return None
        machine, back = self._booted[key]
        try:
            with self._watch.aside():
                revert(machine, back)
        except CardcageError:  # it cannot go back any more: another is booted
            del self._booted[key]
            machine.close()
            return None
        self._booted.move_to_end(key)
        self._see(machine, request)
        return machine

    # machines

    def make(self, spec: Spec, request: pytest.FixtureRequest) -> Guest:
        """A machine, not started, that is closed at the end of the scope of *request*."""
        machine = spec.make(Guest)
        self._see(machine, request)
        return machine

    def boot(self, machine: Guest, spec: Spec) -> None:
        """Start *machine* and wait for its agent. Raises NoAgent that names the phase."""
        __tracebackhide__ = True
        limit = spec.limit("boot_timeout") or FOREVER
        with self._watch.aside():
            machine.start()
            link = machine.services.get("agent")
            try:
                if link is None:
                    machine.agent.wait()  # which says what is missing
                else:
                    link.await_agent(limit)
            except AgentError as error:
                raise type(error)(f"boot: {error}") from None

    def _see(self, machine: Guest, request: pytest.FixtureRequest) -> None:
        seen = Seen(machine, request.fixturename or "", request.node)
        self._seen = [one for one in self._seen if one.node in request.node.listchain()]
        self._seen.append(seen)
        link = machine.services.get("agent")
        if link is not None:
            link.on_run = seen.note
        request.addfinalizer(lambda: self._leave(machine))

    def _leave(self, machine: Guest) -> None:
        """The end of a scope. Raises the exception of a card that nobody was told of."""
        kept = machine.state is not State.STOPPED and any(machine is one for one, _ in self._booted.values())
        if not kept and machine not in self._kept:
            self._booted = OrderedDict((key, one) for key, one in self._booted.items() if one[0] is not machine)
            machine.__exit__(None, None, None)

    def _of(self, item: pytest.Item) -> list[Seen]:
        """What a test sees."""
        names, nodes = getattr(item, "fixturenames", ()), item.listchain()
        return [one for one in self._seen if one.fixture in names and one.node in nodes]

    # limits

    def limited(self, item: pytest.Item, phase: str) -> Iterator[None]:
        """Hold a phase to its limit: what waits for a guest then is ended, and the test has failed."""
        spec = spec_of(item, {})
        limit = spec.limit(f"{phase}_timeout")

        def late() -> None:
            why = f"{phase}: the limit of {limit:g} s is over"
            for one in self._of(item):
                if self._keep and "agent" in one.machine.services:
                    one.machine.services["agent"].fail(AgentTimeout(f"{one.machine.name}: {why}"))
                else:
                    one.machine.stop(why)

        expired = self._watch.begin(limit, late)
        outcome: Any = yield
        self._watch.end()
        if expired.is_set() and outcome.excinfo is None:
            outcome.force_exception(pytest.fail.Exception(f"{phase}: the limit of {limit:g} s is over", pytrace=False))

    # reports

    def report(self, item: pytest.Item, report: pytest.TestReport) -> None:
        """Add what guests said to the report of a failure."""
        if not report.failed:
            return
        for one in self._of(item):
            name = one.machine.name
            if one.commands:
                report.sections.append((f"Guest commands: {name}", "\n".join(one.commands)))
            lines = _text(one.machine.console.output, 1 << 20).splitlines()
            text = "\n".join(lines[-LINES:]) or "(nothing)"
            report.sections.append((f"Guest console: {name} ({one.machine.outcome or one.machine.state})", text))
            alive = one.machine.state in (State.RUNNING, State.PAUSED)
            if self._keep and alive and one.machine not in self._kept:
                self._kept.append(one.machine)
                item.session.shouldstop = "a guest is kept (--cardcage-keep)"

    # the end

    def close(self) -> None:
        """Wait while guests are kept, then close all."""
        self._watch.close()
        try:
            if self._kept:
                self._show()
        finally:
            for machine in {*self._kept, *(one for one, _ in self._booted.values())}:
                machine.close()

    def _show(self) -> None:
        """Say how to reach the guests that are kept, and wait until they have ended or for Ctrl-C."""
        with tempfile.TemporaryDirectory(prefix="cardcage-") as folder, suppress(KeyboardInterrupt):
            for number, machine in enumerate(self._kept):
                path = Path(folder, f"{machine.name}-{number}")  # two may have one name
                machine.open_console({"type": "socket", "path": str(path)})
                print(f"\n{machine.name} is kept. Its console: socat -,raw,echo=0,escape=0x1d UNIX-CONNECT:{path}")
            print("Ctrl-C here ends it, and so does poweroff there.", flush=True)
            try:
                for machine in self._kept:
                    with suppress(CardcageError):
                        machine.wait()
            finally:
                for machine in self._kept:  # while their sockets' folder is there
                    machine.close()


def checkpoint(machine: Guest) -> Callable[[], object] | None:
    """A point of *machine*, and what goes back to it; None where it has no such verbs, or cannot."""
    take, back = getattr(machine, "checkpoint", None), getattr(machine, "revert", None)
    if take is None or back is None:
        return None
    try:
        take()
    except CardcageError:
        return None
    found: Callable[[], object] = back
    return found


def revert(machine: Guest, back: Callable[[], object]) -> None:
    """Go *back*, and see that the guest runs and answers."""
    back()
    if machine.state is State.PAUSED:
        machine.resume()
    machine.agent.set_time()
    machine.agent.reseed()


def _text(data: bytes | str, most: int = TEXT) -> str:
    """What a guest wrote, for a terminal: nothing in it controls one."""
    text = data.decode(errors="replace") if isinstance(data, bytes) else data
    text = text.replace("\r\n", "\n")
    cut = text[-most:] if len(text) > most else text
    shown = "".join(one if one.isprintable() or one in "\n\t" else "\N{REPLACEMENT CHARACTER}" for one in cut)
    return f"... ({len(text) - most} characters more)\n{shown}" if len(text) > most else shown
