"""The sandboxes of one template: copies of its machine, each with a time after which it is ended."""

from __future__ import annotations

import json
import os
import re
import secrets
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from attrs import field
from cardcage.abilities import has
from cardcage.device import Forkable
from cardcage.errors import CardcageError, StateError, UsageError
from cardcage.machine import State
from cardcage.values import define
from cardcage.waiting import Condition
from cardcage_fork import fork
from cardcage_fork.process import kill_process

from cardcage_sandbox import POOL

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

    from cardcage.machine import Machine
    from cardcage_fleet.held import HeldFile
    from cardcage_fork import Copy

    from cardcage_sandbox.template import Template

__all__ = ["Pool", "answer"]

DAY = 86400.0
"""Seconds that a sandbox may live from the last time that somebody said so, and that one may stay paused."""
DEFAULT = 300.0
LOOK = 5.0
"""Seconds between two looks at sandboxes whose guests may have ended, and between two tries to make one in advance."""
PATIENCE = 5.0
"""Seconds that a sandbox may take to end."""
METADATA, ENVS = 4096, 8192
"""Bytes of JSON."""
FORKS = 100
"""Copies of a sandbox at once."""
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")


@define(eq=False)
class Kept:
    """A sandbox.

    Attributes:
        id: its name. copy: its machine. started: seconds since 1970. until: of CLOCK_MONOTONIC.
        metadata, envs: its maker's. paused: nobody runs it. on_timeout: ``kill`` or ``pause``.
    """

    id: str
    copy: Copy
    started: float
    until: float
    metadata: dict[str, str]
    envs: dict[str, str]
    on_timeout: str = "kill"
    paused: bool = False
    lock: Any = field(factory=threading.Lock)


class Pool:
    """All sandboxes of a template. Thread-safe; :meth:`run` is the life of the process."""

    def __init__(self, machine: Machine, template: Template, held: HeldFile) -> None:
        self._machine, self._template, self._held = machine, template, held
        self._changed = Condition()
        self._forking = threading.Lock()
        self._kept: dict[str, Kept] = {}
        self._spare: list[Copy] = []
        self._making = 0  # copies that are neither kept nor spare yet
        self._stopped = False
        self._idle = time.monotonic()
        self._looked = 0.0

    def __enter__(self) -> Self:
        threading.Thread(target=self._refill, name="sandbox-spare", daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
            copies = [*self._spare, *(one.copy for one in self._kept.values())]
            self._spare.clear()
            self._kept.clear()
        with self._forking:  # who was making one has ended it
            pass
        if copies:
            _each(copies, _end)
        self._held.close()

    def abandon(self) -> None:
        """This is a copy: the lock on the template's file is the parent's alone."""
        os.close(self._held.fd)
        self._held.fd = -1

    def run(self) -> None:
        """End what has lived long enough, until nobody has had a sandbox for a while, or somebody stops it."""
        while True:
            with self._changed:
                now = time.monotonic()
                due = [one for one in self._kept.values() if one.until <= now]
                if self._kept or self._making:
                    self._idle = now
                if self._stopped or now - self._idle > self._template.linger:
                    return
                if not due:
                    ends = [one.until for one in self._kept.values()] or [self._idle + self._template.linger + 0.01]
                    self._changed.wait(min(max(min(ends) - now, 0.001), LOOK))
            for one in due:
                self._expire(one)
            if self._look() and (why := self._lost()):
                self._give_spare_up()
                with self._changed:
                    if not self._kept and not self._making:  # whoever asks next has a template that is made anew
                        self._machine.log.warning("the template ends", why=why)
                        self._stopped = True

    def stop(self) -> None:
        """End the process, and all sandboxes with it."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    # what is asked for

    def create(
        self, timeout: float, metadata: dict[str, str], envs: dict[str, str], on_timeout: str = "kill"
    ) -> dict[str, Any]:
        """Make a sandbox; what there is to know of it."""
        until = time.monotonic() + timeout
        if why := self._lost():
            self._give_spare_up()
            raise StateError(f'template "{self._template.name}" makes no more: {why} (cardcage sandbox stop ends it)')
        with self._changed:
            self._room(1)
            copy = self._spare.pop() if self._spare else None
            self._making += 1
            self._changed.notify_all()
        try:
            if copy is not None and not _runs(copy):
                _end(copy)
                copy = None
            (copy,) = (copy,) if copy is not None else self._forked()
            return self._keep([copy], until, metadata, {**self._template.envs, **envs}, on_timeout)[0]
        finally:
            self._made(1)

    def fork(self, id: str, count: int, timeout: float) -> list[dict[str, Any]]:
        """Copies of a sandbox as it is, with its metadata."""
        kept = self._find(id)
        until = time.monotonic() + timeout
        with self._changed:
            self._room(count)
            self._making += count
        try:
            with kept.lock:
                copies = kept.copy.fork(count)
                try:
                    # before anybody has a command run: what forks has its parent's random numbers
                    _each(copies, _wake if kept.paused else lambda one: one.agent.reseed())
                except BaseException:
                    _each(copies, _end)
                    raise
            return self._keep(copies, until, dict(kept.metadata), dict(kept.envs), kept.on_timeout)
        finally:
            self._made(count)

    def rows(self) -> list[dict[str, Any]]:
        """All that live."""
        self._look(now=True)
        with self._changed:
            kept = list(self._kept.values())
        return [self._told(one) for one in kept]

    def get(self, id: str) -> dict[str, Any]:
        """Facts of one, with its variables."""
        kept = self._find(id)
        return {**self._told(kept), "envs": kept.envs}

    def kill(self, id: str) -> None:
        """End one."""
        with self._changed:
            kept = self._find(id)
            del self._kept[id]
            self._changed.notify_all()
        _end(kept.copy)

    def extend(self, id: str, timeout: float, *, longer: bool = False) -> None:
        """Let it live *timeout* seconds from now; with *longer* only where that is later."""
        kept = self._find(id)
        with self._changed:
            until = time.monotonic() + timeout
            if not kept.paused:
                kept.until = max(kept.until, until) if longer else until
            self._changed.notify_all()

    def pause(self, id: str) -> bool:
        """Bring it to a stand; False where it stands. It is ended after a day."""
        kept = self._find(id)
        with kept.lock:
            if kept.paused:
                return False
            kept.copy.pause()
            with self._changed:
                kept.paused, kept.until = True, time.monotonic() + DAY
        return True

    def resume(self, id: str, timeout: float) -> bool:
        """Let it go on, with this host's time, and live *timeout* seconds; False where it runs."""
        kept = self._find(id)
        with kept.lock:
            if not kept.paused:
                return False
            _wake(kept.copy)
            with self._changed:
                kept.paused, kept.until = False, time.monotonic() + timeout
                self._changed.notify_all()
        return True

    # inside

    def _room(self, count: int) -> None:
        if self._stopped:
            raise StateError(f'template "{self._template.name}" is ending')
        if len(self._kept) + self._making + count > self._template.most:
            raise UsageError(
                f'template "{self._template.name}" has {len(self._kept)} sandboxes: '
                f"expected {self._template.most} at most (most)"
            )

    def _forked(self) -> list[Copy]:
        """A copy of the template's machine that runs, with time and randomness of its own."""
        with self._forking:
            if self._stopped:
                raise StateError(f'template "{self._template.name}" is ending')
            copies = fork(self._machine)
        try:
            _each(copies, _wake)
        except BaseException:
            _end(copies[0])
            raise
        return copies

    def _lost(self) -> str:
        """Why copies of the template's machine would lack something by now, such as their way out; empty where not.

        Those that were made in advance lack the same: they share it with the machine.
        """
        holders = (one for plugged in self._machine.devices.values() for one in plugged.slot.host.opened)
        return next((why for one in holders if has(one, Forkable) and (why := one.may_fork())), "")

    def _give_spare_up(self) -> None:
        """End those that nobody has asked for yet."""
        with self._changed:
            spare, self._spare = self._spare, []
        if spare:
            _each(spare, _end)

    def _refill(self) -> None:
        """Make sandboxes that nobody has asked for yet. One that cannot be made is tried again."""
        failed = False
        while True:
            with self._changed:
                if failed:
                    self._changed.wait_for(lambda: self._stopped, LOOK)
                self._changed.wait_for(lambda: self._stopped or len(self._spare) < self._template.spare)
                if self._stopped:
                    return
            try:
                (copy,) = self._forked()
            except (CardcageError, OSError) as error:
                if not failed:
                    self._machine.log.warning("no sandbox can be made in advance", why=str(error))
                failed = True
                continue
            failed = False
            with self._changed:
                if not self._stopped:
                    self._spare.append(copy)
                    continue
            _end(copy)

    def _keep(
        self, copies: list[Copy], until: float, metadata: dict[str, str], envs: dict[str, str], on_timeout: str
    ) -> list[dict[str, Any]]:
        made = [Kept(secrets.token_hex(10), one, time.time(), until, metadata, envs, on_timeout) for one in copies]
        with self._changed:
            if self._stopped:
                _each(copies, _end)
                raise StateError(f'template "{self._template.name}" is ending')
            self._kept.update({one.id: one for one in made})
            self._changed.notify_all()
        return [{**self._told(one), "envs": one.envs} for one in made]

    def _made(self, count: int) -> None:
        with self._changed:
            self._making -= count
            self._idle = time.monotonic()

    def _find(self, id: str) -> Kept:
        with self._changed:
            kept = self._kept.get(id)
        if kept is None:
            raise UsageError(f'no sandbox "{id}" was found')
        return kept

    def _told(self, one: Kept) -> dict[str, Any]:
        template = self._template
        return {
            "id": one.id,
            "template": template.name,
            "pid": one.copy.pid,
            "state": "paused" if one.paused else "running",
            "started": one.started,
            "ends": time.time() + max(one.until - time.monotonic(), 0),
            "metadata": one.metadata,
            "cpus": template.cpus,
            "memory": int(template.memory),
            "disk": template.space,
            "user": template.user,
        }

    def _expire(self, one: Kept) -> None:
        with suppress(CardcageError):  # it ended meanwhile, or its guest hangs, and it is ended the next time
            if one.on_timeout == "pause" and not one.paused:
                self.pause(one.id)
            else:
                self.kill(one.id)

    def _look(self, *, now: bool = False) -> bool:
        """Forget those whose guests, or processes, have ended; False where that was done a moment ago."""
        if not now and time.monotonic() - self._looked < LOOK:
            return False
        self._looked = time.monotonic()
        with self._changed:
            kept = list(self._kept.values())
        for one in kept:
            try:
                over = one.copy.state == State.STOPPED
            except CardcageError:
                over = True
            if over:
                with suppress(UsageError):  # somebody killed it meanwhile
                    self.kill(one.id)
        return True


def _wake(copy: Copy) -> None:
    """Let a copy of a paused machine go on: by then it has another time, and randomness of its own."""
    copy.resume()
    copy.agent.reseed()
    copy.agent.set_time()


def _runs(copy: Copy) -> bool:
    """True while its guest runs."""
    try:
        return copy.state == State.RUNNING
    except CardcageError:
        return False


def _end(copy: Copy) -> None:
    """End a copy, which takes itself off the roster; one that does not within seconds is killed."""
    try:
        fd = os.pidfd_open(copy.pid)
    except ProcessLookupError:  # it has ended
        copy.close()
        return

    def kill() -> None:
        with suppress(ProcessLookupError):
            kill_process(copy.pid, fd)

    timer = threading.Timer(PATIENCE, kill)
    timer.start()
    try:
        copy.close()
    finally:
        timer.cancel()
        timer.join()
        os.close(fd)


def _each(copies: list[Copy], act: Callable[[Copy], object]) -> None:
    """Do *act* with all at once. Raises the first error, once all have ended."""
    errors: list[BaseException] = []

    def acting(one: Copy) -> None:
        try:
            act(one)
        except BaseException as error:  # it is raised where somebody waits
            errors.append(error)

    threads = [threading.Thread(target=acting, args=(one,), name="sandbox-each") for one in copies[1:]]
    for one in threads:
        one.start()
    acting(copies[0])
    for one in threads:
        one.join()
    if errors:
        raise errors[0]


# commands to the process

KEYS: dict[str, dict[str, tuple[type, ...]]] = {
    "create": {"timeout": (int, float), "metadata": (dict,), "envs": (dict,), "on_timeout": (str,)},
    "fork": {"id": (str,), "count": (int,), "timeout": (int, float)},
    "list": {},
    "get": {"id": (str,)},
    "kill": {"id": (str,)},
    "extend": {"id": (str,), "timeout": (int, float), "longer": (bool,)},
    "pause": {"id": (str,)},
    "resume": {"id": (str,), "timeout": (int, float)},
    "stop": {},
}
"""Acts, and the types of their keys."""


def answer(machine: Machine, arguments: dict[str, Any]) -> dict[str, Any]:
    """The command ``sandbox-pool`` in a template's process: ``{"do": ..., keys}``. Raises UsageError."""
    pool: Pool | None = machine.host.share(POOL, dict).get("pool")
    if pool is None:
        raise UsageError(f"{machine.name} is no template of sandboxes")
    given = dict(arguments)
    do = given.pop("do", None)
    if not isinstance(do, str) or do not in KEYS:
        raise UsageError(f"do: expected one of {', '.join(KEYS)}")
    if wrong := given.keys() - KEYS[do].keys():
        raise UsageError(f"{do}: no key {min(wrong)}")
    for name, kinds in KEYS[do].items():
        if name in given and type(given[name]) not in kinds:
            raise UsageError(f"{do}: {name}: expected {kinds[-1].__name__}")
    if "id" in KEYS[do] and "id" not in given:
        raise UsageError(f"{do}: expected an id")
    found = getattr(pool, "rows" if do == "list" else do)(**_checked(do, given))
    return {"found": found}


def _checked(do: str, given: dict[str, Any]) -> dict[str, Any]:
    if "timeout" in KEYS[do]:
        given.setdefault("timeout", DEFAULT)
        if not 0 < given["timeout"] <= DAY:
            raise UsageError(f"timeout: {given['timeout']} s: expected more than 0, and {DAY:g} at most")
    if do == "fork" and not 0 < given.setdefault("count", 1) <= FORKS:
        raise UsageError(f"count: {given['count']}: expected 1 to {FORKS}")
    if do == "create":
        if given.setdefault("on_timeout", "kill") not in ("kill", "pause"):
            raise UsageError(f'on_timeout: {given["on_timeout"]!r}: expected "kill" or "pause"')
        for name, most in (("metadata", METADATA), ("envs", ENVS)):
            table = given.setdefault(name, {})
            if not all(isinstance(one, str) for one in table.values()) or len(json.dumps(table)) > most:
                raise UsageError(f"{name}: expected a table of text, of {most} bytes at most")
        if wrong := [one for one in given["envs"] if not NAME.fullmatch(one)]:
            raise UsageError(f"envs: {wrong[0]!r:.60}: expected the name of a variable")
    return given
