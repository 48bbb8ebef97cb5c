"""Running a machine to its outcome, and what the outcome means to the shell."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

from cardcage._host.owners import card_of, owners_of
from cardcage._machine.plugged import able
from cardcage.errors import (
    CardcageError,
    CardError,
    ConfigError,
    Denied,
    GuestError,
    HostError,
    StateError,
    UsageError,
    in_words,
)
from cardcage.outcome import TimedOut

from cardcage_cli.ending import Terminated
from cardcage_cli.leaving import detaching

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cardcage.host import CardInfo
    from cardcage.machine import Machine
    from cardcage.outcome import Outcome

__all__ = ["EXIT", "EXIT_STATUS", "SWITCH_INTERVAL", "ExitStatus", "Terminated", "blamed_for", "report", "run_machine"]

EXIT = {
    "done": 0,
    "bad configuration": 2,
    "guest panic": 10,
    "guest triple fault": 12,
    "failure": 70,
    "timeout": 124,
    "interrupted": 130,
}
"""Exit statuses by name; a debug exit is ``code << 1 | 1``, a signal 128 plus its number."""


EXIT_STATUS = "exit-status"
"""The service of a machine, an :class:`ExitStatus`, by which a card says what this process exits with."""
LONGEST = 2000
"""Letters of an outcome: a value in it may be as long as its author liked."""
SWITCH_INTERVAL = 1e-4
"""Seconds that a thread coming back from guest code waits for the interpreter at most; Python's default is 5 ms."""


class ExitStatus(Protocol):
    """The service of a card that runs a command in the guest, whose status is then the process's."""

    def exit_status(self, status: int, /) -> int:
        """The status, once the machine has ended with *status*, which has been told."""


def _terminate(signum: int, _: Any) -> None:
    raise Terminated(signum)


@contextmanager
def ending_signals(machine: Machine) -> Iterator[None]:
    """SIGTERM and SIGHUP end the machine in an orderly way while the block runs."""
    main = threading.current_thread() is threading.main_thread()
    if not main or machine.host.signals.ending is not None:  # the command line has them from the first moment on
        yield
        return
    signals = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is not signal.SIG_IGN]
    for signum in signals:
        machine.host.signals.claim(signum, _terminate)
    try:
        yield
    finally:
        for signum in signals:
            machine.host.signals.release(signum)


STRAYS = "cardcage_cli:strays"
"""The key by which a host shares what :func:`threads_watched` found before its machine could hear of it."""


@contextmanager
def threads_watched(strays: list[BaseException], machine: Machine | None = None) -> Iterator[None]:
    """While the block runs, an exception in a card's own thread goes to *strays*, and ends *machine*."""

    def ended(what: threading.ExceptHookArgs) -> None:
        from cardcage.memory import GuestMemoryError

        if what.exc_value is None or isinstance(what.exc_value, SystemExit):
            return
        if machine is not None:
            machine.fail(what.exc_value)
        if machine is None or not isinstance(what.exc_value, GuestMemoryError):  # that is a guest's doing
            strays.append(what.exc_value)

    before, threading.excepthook = threading.excepthook, ended
    try:
        yield
    finally:
        threading.excepthook = before


@contextmanager
def undisturbed() -> Iterator[None]:
    """No second signal while the terminal, files and the machine's threads are put back: timeout(1) sends two."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [(one, signal.signal(one, signal.SIG_IGN)) for one in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)]
    try:
        yield
    finally:
        for signum, handler in before:
            signal.signal(signum, handler)


def run_machine(machine: Machine, *, timeout: float | None = None, console: str | None = "stdio") -> int:
    """Start *machine* (unless it runs), wait for its outcome, close it, print ``outcome: ...``, return the exit status.

    Args:
        timeout: seconds, None for ever.
        console: char back end that the console is connected to, unless the configuration names one; None for none. A
            machine that is left running (``--detach``) has none.

    Raises what the machine's cards raised, KeyboardInterrupt, :exc:`Terminated`; the machine is closed then too.
    """
    strays: list[BaseException] = machine.host.share(STRAYS, list)
    with ending_signals(machine), threads_watched(strays, machine):
        try:
            if strays:  # while the machine was built
                raise strays[0]
            leaving = detaching(machine.host)
            wanted = "machine.console" not in machine.config.origins and not leaving.asked
            if console is not None and wanted and machine.console.claimed:
                machine.open_console(console)
            try:
                if machine.state == "built":
                    machine.start()
            except StateError:
                if not strays:  # else wait() raises it
                    raise
            leaving.running(machine)
            outcome = ended(machine, timeout)
            says: ExitStatus | None = machine.services.get(EXIT_STATUS)
        finally:
            with undisturbed():
                machine.close()
    return tell(outcome) if says is None else says.exit_status(tell(outcome))


def ended(machine: Machine, timeout: float | None) -> Outcome:
    """Wait for the end. At SIGTERM a guest that hears its power button has time to power off: ``machine.stop_timeout``.

    Raises Terminated where it did not, and at once for one that does not hear, or is paused.
    """
    try:
        return machine.wait(timeout)
    except Terminated as asked:
        heard = any(getattr(one, "button_enabled", True) for one in able(machine.devices, "power-button"))
        if asked.signum != signal.SIGTERM or not heard or machine.state != "running":
            raise
        with suppress(StateError):  # it has just ended
            machine.shutdown()
        outcome = machine.wait(machine.config.machine.stop_timeout)
        if isinstance(outcome, TimedOut):
            raise
        return outcome


def tell(outcome: Outcome) -> int:
    """Print the outcome, with the registers of a crash, and return its status."""
    if detail := getattr(outcome, "detail", ""):
        print(detail, file=sys.stderr)
    print(f"outcome: {outcome}", file=sys.stderr, flush=True)
    return outcome.status


def report(error: BaseException, *, traceback: bool = False, cards: Iterable[CardInfo] = ()) -> int:
    """Print an error as one ``outcome:`` line (after its traceback, when asked for) and return the exit status.

    Args:
        cards: one of which an error may come from; that one is then named.
    """
    cards = tuple(cards)
    if traceback:
        from traceback import print_exception

        print_exception(error)
    if isinstance(error, Denied) and not isinstance(error.__cause__, CardcageError | None):
        error = error.__cause__  # a checker that broke: the act was refused, but by nobody's rule
    misused = isinstance(error, UsageError) and by_a_card(error, cards)
    words, status = ("card failure", EXIT["failure"]) if misused else blamed_for(error)
    text = str(error) if isinstance(error, CardcageError) and not misused else describe(error, cards)
    text, *more = text.splitlines() or [""]
    for line in more:  # registers and the like come first, so that the outcome is the last line
        print(line, file=sys.stderr)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST * 3 // 4]} ... {text[-LONGEST // 4 :]}"
    print(f"outcome: {words}{': ' if text else ''}{text}", file=sys.stderr, flush=True)
    return status


def by_a_card(error: UsageError, cards: Iterable[CardInfo]) -> bool:
    """True when a card broke the rule, and not who typed the command: blame follows the frames.

    A card did where the kernel raised it in what the card called, or where the kernel called the card that raised it. A
    card's command that raises it itself, or by a card that it called, tells its user.
    """
    owners = owners_of(error, cards)
    if not owners or all(isinstance(one, str) for one in owners):
        return False
    if isinstance(owners[-1], str):
        return True
    caller = next((one for one in reversed(owners) if isinstance(one, str)), "")
    return caller == "cardcage"


def blamed_for(error: BaseException) -> tuple[str, int]:
    """Who is to blame, in words, and the exit status."""
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", EXIT["interrupted"]
    if isinstance(error, Terminated):
        return "ended by", 128 + error.signum
    for kind, words, name in (
        (ConfigError, "bad configuration", "bad configuration"),
        (StateError, "wrong use", "bad configuration"),
        (UsageError, "wrong use", "bad configuration"),
        (Denied, "denied", "bad configuration"),
        (CardError, "card failure", "failure"),
        (HostError, "host or accelerator failure", "failure"),
        (GuestError, "guest failure", "failure"),
    ):
        if isinstance(error, kind):
            return words, EXIT[name]
    return "card failure", EXIT["failure"]


def describe(error: BaseException, cards: Iterable[CardInfo] = ()) -> str:
    """One line about an exception that is not ours: its type, text, the card and the place it came from."""
    if isinstance(error, KeyboardInterrupt):
        return ""
    if isinstance(error, Terminated):
        return str(error)
    text = f"{in_words(error)[:-1]}; --traceback shows more)" if error.__traceback__ else in_words(error)
    named = card_of(error, cards)
    return text if named is None else f"card {named.name} ({named.distribution}): {text}"
