"""The access-vector cache: the one place that is asked about each act, and that writes the audit records."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from attrs import evolve
from cardcage.errors import Denied

from cardcage_selinux.errors import ContextError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cardcage.security import Act

    from cardcage_selinux.server.policy import AccessVector, Policy

    Asked = tuple[str, str, str, tuple[str, ...]]

__all__ = ["Avc"]

K = TypeVar("K")
V = TypeVar("V")

LABELS = 1024
"""Labels whose context is kept; the oldest goes first."""

ENTRIES = 4096
"""Pairs of contexts with a class whose decision is kept; the oldest goes first."""


class _Entry:
    """A decision and the denials of it that were logged already, as bits; unknown permissions by name."""

    __slots__ = ("known", "logged", "logged_unknown", "problem", "vector")

    def __init__(self, vector: AccessVector | None, known: Mapping[str, int], problem: str = "") -> None:
        self.vector, self.known, self.problem = vector, known, problem
        self.logged = 0
        self.logged_unknown: set[str] = set()


class _State:
    """What holds until the policy, a boolean or the mode changes.

    Attributes:
        granted: questions to pass without a look, by labels as they are asked with.
        contexts: of labels. entries: decisions, by two contexts and a class.
    """

    __slots__ = ("contexts", "enforcing", "entries", "granted", "policy")

    def __init__(self, policy: Policy, enforcing: bool) -> None:
        self.policy, self.enforcing = policy, enforcing
        self.granted: dict[Asked, None] = {}
        self.contexts: dict[str, str] = {}
        self.entries: dict[tuple[str, str, str], _Entry] = {}


class Avc:
    """Asks a policy, and keeps its answers.

    A question whose answer is yes, with nothing to log, is one look-up without a lock the next time. Any thread.

    Args:
        policy: the policy to ask.
        enforcing: refuse what is denied; otherwise log it, and let it pass.
        audit: called with each audit line. Its exceptions go to the caller that asked.
        entries: how many decisions are kept.
    """

    def __init__(
        self, policy: Policy, *, enforcing: bool = True, audit: Callable[[str], None], entries: int = ENTRIES
    ) -> None:
        self._audit, self._size = audit, entries
        self._lock = threading.RLock()
        self._serial = itertools.count(1)
        self._callbacks: list[Callable[[], None]] = []
        self._comm = Path("/proc/self/comm").read_text().rstrip("\n")
        self._changes = 0
        self._state = _State(policy, enforcing)
        self._granted = self._state.granted

    def check(self, act: Act, /) -> None:
        """Return when the source may have all permissions on the target. Raises Denied.

        A label that is no valid context is denied whatever the mode: no policy says anything about it. The act's facts
        are fields of the audit record; ``pid`` and ``comm`` are filled in.
        """
        if (act.source, act.target, act.tclass, act.permissions) not in self._granted:
            self._look(act)

    def context(self, label: str) -> str:
        """The context of *label*: itself, or that of the policy's sid of this name. Raises ContextError."""
        with self._lock:
            state = self._state
            found = state.contexts.get(label)
            if found is None:
                found = state.policy.tables.sids.get(label) or state.policy.canonical(label)
                _keep(state.contexts, label, found, LABELS)
            return found

    @property
    def policy(self) -> Policy:
        """The policy in force."""
        return self._state.policy

    @property
    def sequence(self) -> int:
        """Counts the changes of policy, booleans and mode: what was decided under another number may not hold."""
        return self._changes

    @property
    def enforcing(self) -> bool:
        """True if denials are refused; setting it forgets all decisions."""
        return self._state.enforcing

    @enforcing.setter
    def enforcing(self, value: bool) -> None:
        with self._lock:
            if value is self._state.enforcing:
                return
            self._change(_State(self._state.policy, value))
        self._tell()

    def reload(self, policy: Policy) -> None:
        """Put another policy in force; what was decided is forgotten."""
        with self._lock:
            self._change(_State(policy, self._state.enforcing))
        self._tell()

    def set_booleans(self, changes: Mapping[str, bool]) -> None:
        """Give booleans values. Raises UsageError for a name that is no boolean, and then nothing changed."""
        with self._lock:
            self._change(_State(self._state.policy.with_booleans(changes), self._state.enforcing))
        self._tell()

    def on_change(self, callback: Callable[[], None]) -> None:
        """Have *callback* called after each change of policy, booleans or mode, on the thread that made it."""
        with self._lock:
            self._callbacks.append(callback)

    def _change(self, state: _State) -> None:
        self._state, self._granted = state, state.granted
        self._changes += 1

    def _tell(self) -> None:
        """Without the lock: a machine reviews its grants under its own, which one who asks here may hold."""
        for callback in tuple(self._callbacks):
            callback()

    def _look(self, asked: Act) -> None:
        with self._lock:
            state = self._state
            act = evolve(asked, source=self._named(asked.source), target=self._named(asked.target))
            entry = self._entry(state, act)
            vector = entry.vector
            if vector is None:
                lines, refused = [], act.permissions
                if not entry.logged:
                    entry.logged = 1
                    lines.append(self._line(act))
            else:
                refused, lines = self._decide(state, entry, vector, act)
                if not lines and not refused and not self._grants_logged(entry, vector, act.permissions):
                    key = asked.source, asked.target, asked.tclass, asked.permissions
                    _keep(state.granted, key, None, self._size * 4)
        for line in lines:
            self._audit(line)
        if refused:
            what = str(evolve(act, permissions=refused))
            raise Denied(f"{what}: {entry.problem}" if entry.problem else what)

    def _named(self, label: str) -> str:
        try:
            return self.context(label)
        except ContextError:  # the decision says so
            return label

    def _entry(self, state: _State, act: Act) -> _Entry:
        key = act.source, act.target, act.tclass
        entry = state.entries.get(key)
        if entry is None:
            class_ = state.policy.class_of(act.tclass)
            known = class_.permissions if class_ else {}
            try:
                entry = _Entry(state.policy.compute_av(*key), known)
            except ContextError as error:
                entry = _Entry(None, known, str(error))
            _keep(state.entries, key, entry, self._size)
        return entry

    def _decide(
        self, state: _State, entry: _Entry, vector: AccessVector, act: Act
    ) -> tuple[tuple[str, ...], list[str]]:
        """Return the refused permissions, and the lines to write. Under the lock."""
        unknown_passes = state.policy.tables.handle_unknown == "allow"
        denied = tuple(
            word
            for word in act.permissions
            if (not unknown_passes if word not in entry.known else not vector.allowed >> entry.known[word] & 1)
        )
        passes = vector.permissive or not state.enforcing
        lines = []
        fresh = tuple(word for word in denied if _first(entry, vector, word))
        if fresh:
            lines.append(self._line(evolve(act, permissions=fresh), permissive=passes))
        granted = tuple(
            word
            for word in act.permissions
            if word in entry.known and word not in denied and vector.auditallow >> entry.known[word] & 1
        )
        if granted and not (denied and not passes):
            lines.append(self._line(evolve(act, permissions=granted), denied=False))
        return () if passes else denied, lines

    def _grants_logged(self, entry: _Entry, vector: AccessVector, words: tuple[str, ...]) -> bool:
        return any(word in entry.known and vector.auditallow >> entry.known[word] & 1 for word in words)

    def _line(self, act: Act, *, denied: bool = True, permissive: bool = False) -> str:
        from cardcage_selinux.server.audit import avc_line  # a start without a denial does not need it

        act = evolve(act, facts={"pid": os.getpid(), "comm": self._comm, **act.facts})
        return avc_line(act, denied=denied, permissive=permissive, time=time.time(), serial=next(self._serial))


def _first(entry: _Entry, vector: AccessVector, word: str) -> bool:
    """True if this denial is to be logged: the first of its kind, and no ``dontaudit`` about it."""
    bit = entry.known.get(word)
    if bit is None:
        new = word not in entry.logged_unknown
        entry.logged_unknown.add(word)
        return new
    if not vector.auditdeny >> bit & 1 or entry.logged >> bit & 1:
        return False
    entry.logged |= 1 << bit
    return True


def _keep(kept: dict[K, V], key: K, value: V, size: int) -> None:
    """Add to a bounded dictionary; the oldest leaves. Under the lock; readers without it see a whole dictionary."""
    while len(kept) >= size:
        del kept[next(iter(kept))]
    kept[key] = value
