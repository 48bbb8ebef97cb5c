"""The access-vector cache: the one place that is asked about each act, and that writes the audit records."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from cardcage.errors import Denied

from cardcage_selinux.errors import ContextError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cardcage_selinux.policy import AccessVector, Policy

    Asked = tuple[str, str, str, str | tuple[str, ...]]

__all__ = ["Avc"]

K = TypeVar("K")
V = TypeVar("V")

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
    """What holds until the policy, a boolean or the mode changes. ``granted`` are questions to pass without a look."""

    __slots__ = ("enforcing", "entries", "granted", "policy")

    def __init__(self, policy: Policy, enforcing: bool) -> None:
        self.policy, self.enforcing = policy, enforcing
        self.granted: dict[Asked, None] = {}
        self.entries: dict[tuple[str, str, str], _Entry] = {}


class Avc:
    """Asks a policy, and keeps its answers.

    A question whose answer is yes, with nothing to log, is one look-up without a lock the next time. Any thread.

    Args:
        policy: the policy to ask.
        enforcing: refuse what is denied; otherwise log it, and let it pass.
        audit: called with each audit line. What it raises goes to the one who asked.
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

    def check(
        self,
        scontext: str,
        tcontext: str,
        tclass: str,
        permissions: str | tuple[str, ...],
        audit: Mapping[str, object] | None = None,
    ) -> None:
        """Return when the source may have all *permissions* on the target. Raises Denied.

        A context that is not valid is denied whatever the mode: no policy says anything about it.

        Args:
            audit: fields of the audit record; ``pid`` and ``comm`` are filled in.
        """
        if (scontext, tcontext, tclass, permissions) not in self._granted:
            self._look((scontext, tcontext, tclass, permissions), audit)

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
        """Whether denials are refused; setting it forgets what was decided."""
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

    def _look(self, asked: Asked, audit: Mapping[str, object] | None) -> None:
        scontext, tcontext, tclass, permissions = asked
        words = (permissions,) if isinstance(permissions, str) else permissions
        with self._lock:
            state = self._state
            entry = self._entry(state, scontext, tcontext, tclass)
            vector = entry.vector
            if vector is None:
                lines, refused = [], words
                if not entry.logged:
                    entry.logged = 1
                    lines.append(self._line(asked, words, audit, permissive=False))
            else:
                refused, lines = self._decide(state, entry, vector, asked, words, audit)
                if not lines and not refused and not self._grants_logged(entry, vector, words):
                    _keep(state.granted, asked, None, self._size * 4)
        for line in lines:
            self._audit(line)
        if refused:
            what = f"{scontext} may not {' '.join(refused)} {tclass} {tcontext}"
            raise Denied(f"{what}: {entry.problem}" if entry.problem else what)

    def _entry(self, state: _State, scontext: str, tcontext: str, tclass: str) -> _Entry:
        key = scontext, tcontext, tclass
        entry = state.entries.get(key)
        if entry is None:
            class_ = state.policy.class_of(tclass)
            known = class_.permissions if class_ else {}
            try:
                entry = _Entry(state.policy.compute_av(scontext, tcontext, tclass), known)
            except ContextError as error:
                entry = _Entry(None, known, str(error))
            _keep(state.entries, key, entry, self._size)
        return entry

    def _decide(
        self,
        state: _State,
        entry: _Entry,
        vector: AccessVector,
        asked: Asked,
        words: tuple[str, ...],
        audit: Mapping[str, object] | None,
    ) -> tuple[tuple[str, ...], list[str]]:
        """What is refused, and the lines to write. Under the lock."""
        unknown_passes = state.policy.tables.handle_unknown == "allow"
        denied = tuple(
            word
            for word in words
            if (not unknown_passes if word not in entry.known else not vector.allowed >> entry.known[word] & 1)
        )
        passes = vector.permissive or not state.enforcing
        lines = []
        fresh = tuple(word for word in denied if _first(entry, vector, word))
        if fresh:
            lines.append(self._line(asked, fresh, audit, permissive=passes))
        granted = tuple(
            word
            for word in words
            if word in entry.known and word not in denied and vector.auditallow >> entry.known[word] & 1
        )
        if granted and not (denied and not passes):
            lines.append(self._line(asked, granted, audit, denied=False))
        return () if passes else denied, lines

    def _grants_logged(self, entry: _Entry, vector: AccessVector, words: tuple[str, ...]) -> bool:
        return any(word in entry.known and vector.auditallow >> entry.known[word] & 1 for word in words)

    def _line(
        self,
        asked: Asked,
        words: tuple[str, ...],
        audit: Mapping[str, object] | None,
        *,
        denied: bool = True,
        permissive: bool = False,
    ) -> str:
        from cardcage_selinux.audit import avc_line  # a start without a denial does not need it

        return avc_line(
            denied=denied,
            permissions=words,
            scontext=asked[0],
            tcontext=asked[1],
            tclass=asked[2],
            permissive=permissive,
            fields={"pid": os.getpid(), "comm": self._comm, **(audit or {})},
            time=time.time(),
            serial=next(self._serial),
        )


def _first(entry: _Entry, vector: AccessVector, word: str) -> bool:
    """Whether this denial is to be logged: the first of its kind, and no ``dontaudit`` about it."""
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
