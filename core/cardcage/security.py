"""Mediation: before each act between labelled objects, the core asks the security checkers.

An act is (source label, target label, class, permissions, facts), as in SELinux, whose words these are: the core is an
*object manager*, a security card the *security server*. Checkers stack restrictively: each may refuse by raising
:exc:`~cardcage.errors.Denied`; an error in one refuses too; with none, a question is an empty function.
docs/security.md says for every class and permission who is asked about what, and when.

A decision is either asked for now (:meth:`Mediator.check`), or taken when something is wired up and asked for again
when a checker says that its policy changed (:meth:`Mediator.grant`): what is then refused is revoked, what is allowed
again is restored, and until then no access pays for it.

Labels are text that only checkers understand. What nobody labels is called by its own name: a machine by its name, a
device by its type, an image by its path.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol

from cardcage.errors import CardcageError, Denied, in_words

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = ["CLASSES", "HOST", "OPERATOR", "Checker", "Grant", "Labeller", "Mediator", "PolicySource"]

OPERATOR = "operator"
"""The label of who uses the command line or the Python API, before a checker translates it."""

HOST = "host"
"""The label of the host program itself."""

CLASSES = {
    "machine": ("create", "start", "pause", "resume", "reset", "stop", "destroy", "add", "save", "load"),
    "card": ("load",),
    "device": ("attach", "configure", "detach"),
    "memory": ("map", "share", "merge", "reclaim", "execmem", "dma_read", "dma_write"),
    "interrupt": ("raise", "route"),
    "bus": ("claim", "move"),
    "backend": ("open",),
    "image": ("open", "read", "write", "create"),
    "socket": ("connect", "listen"),
    "tap": ("open",),
    "program": ("start",),
    "management": ("reach", "command"),
}
"""What the core and our own cards ask about. Other cards may ask about more, through the same doors."""

NO_FACTS: Mapping[str, object] = {}


class Checker(Protocol):
    """A security card's factory product. ``close()``, where it has one, is called at the end of what it serves."""

    def check(
        self, source: str, target: str, tclass: str, permissions: tuple[str, ...], facts: Mapping[str, object], /
    ) -> None:
        """Return to allow, raise :exc:`~cardcage.errors.Denied` to refuse all of it. Any thread.

        Args:
            facts: for the audit, such as ``path``, ``machine`` and ``device`` (their names): plain values.
        """
        ...


class Labeller(Protocol):
    """A checker that also names things."""

    def label(
        self,
        source: str,
        target: str,
        tclass: str,
        name: str,
        permissions: tuple[str, ...],
        facts: Mapping[str, object],
        /,
    ) -> str | None:
        """The label of the object *name* of class *tclass* that *source* makes or meets in *target*; None to pass.

        *permissions* are what is about to be asked. Raises Denied when it must not be labelled.
        """
        ...

    def release(self, label: str, tclass: str, /) -> None:
        """The object with this label is gone. Asked for machines."""
        ...


class PolicySource(Protocol):
    """A checker whose answers may change."""

    def subscribe(self, changed: Callable[[], None], /) -> Callable[[], None]:
        """Call *changed* after each change of policy, on any thread, holding no lock. Returns what ends this."""
        ...


class Ask(Protocol):
    """A question to all checkers."""

    def __call__(
        self,
        source: str,
        target: str,
        tclass: str,
        permissions: tuple[str, ...],
        facts: Mapping[str, object] = ...,
    ) -> None:
        """Return when it is allowed. Raises Denied."""
        ...


def _unasked(
    source: str, target: str, tclass: str, permissions: tuple[str, ...], facts: Mapping[str, object] = NO_FACTS
) -> None:
    """What there is to ask without checkers."""


class Grant:
    """An act that is allowed for as long as policy says so. *revoke* and *restore* run under the machine's lock."""

    __slots__ = ("_mediator", "act", "held", "restore", "revoke")

    def __init__(
        self,
        mediator: Mediator,
        act: tuple[str, str, str, tuple[str, ...], Mapping[str, object]],
        revoke: Callable[[], None],
        restore: Callable[[], None],
    ) -> None:
        self._mediator, self.act, self.revoke, self.restore = mediator, act, revoke, restore
        self.held = True

    def drop(self) -> None:
        """It is no longer needed. Idempotent."""
        self._mediator.drop(self)


class Mediator:
    """The checkers of a host or machine, and what they granted there.

    Args:
        checkers: asked in this order; the first that has a label for something names it.
        deliver: carries out a revocation or restoration: a machine does it under its lock.
        log: hears of both.
    """

    __slots__ = ("_checkers", "_deliver", "_ends", "_grants", "_lock", "_log", "check")

    check: Ask
    """Ask all checkers now. Raises Denied when one refuses or breaks. Without checkers, this is an empty function."""

    def __init__(
        self,
        checkers: Iterable[Checker] = (),
        *,
        deliver: Callable[[Callable[[], None]], None] = lambda act: act(),
        log: Any = None,
    ) -> None:
        self.checkers = tuple(checkers)
        self._deliver, self._log = deliver, log
        self._grants: dict[Grant, None] = {}
        self._lock = threading.Lock()
        self._ends: list[Callable[[], None]] = []

    @property
    def checkers(self) -> tuple[Checker, ...]:
        """Those that are asked, in this order."""
        return self._checkers

    @checkers.setter
    def checkers(self, checkers: tuple[Checker, ...]) -> None:
        self._checkers = checkers
        self.check = self._ask if checkers else _unasked

    def _ask(
        self,
        source: str,
        target: str,
        tclass: str,
        permissions: tuple[str, ...],
        facts: Mapping[str, object] = NO_FACTS,
    ) -> None:
        for checker in self._checkers:
            try:
                checker.check(source, target, tclass, permissions, facts)
            except Exception as error:  # a checker that breaks must not let anything pass
                raise refusal(error, f"{source} may not {' '.join(permissions)} {tclass} {target}") from error

    def label(
        self,
        source: str,
        target: str,
        tclass: str,
        name: str,
        permissions: tuple[str, ...],
        facts: Mapping[str, object] = NO_FACTS,
    ) -> str:
        """The label of *name*, which *source* makes or meets in *target*: *name* itself when no checker has one."""
        for checker in self.checkers:
            ask: Any = getattr(checker, "label", None)
            if ask is None:
                continue
            try:
                found: str | None = ask(source, target, tclass, name, permissions, facts)
            except Exception as error:  # an object without its label must not come to be
                raise refusal(error, f"{tclass} {name} has no label") from error
            if found is not None:
                return found
        return name

    def release(self, label: str, tclass: str) -> None:
        """The object with *label* is gone."""
        for checker in self.checkers:
            if callable(release := getattr(checker, "release", None)):
                self._at_end(release, label, tclass)

    def ask(
        self,
        source: str,
        target: str,
        tclass: str,
        name: str,
        permissions: tuple[str, ...],
        facts: Mapping[str, object] = NO_FACTS,
    ) -> str:
        """Label the object *name* and ask about it now; returns its label. Raises Denied."""
        if not self.checkers:
            return name
        told = {"name": name, **facts}
        found = self.label(source, target, tclass, name, permissions, told)
        self._ask(source, found, tclass, permissions, told)
        return found

    # grants

    def grant(
        self,
        source: str,
        target: str,
        tclass: str,
        permissions: tuple[str, ...],
        facts: Mapping[str, object],
        revoke: Callable[[], None],
        restore: Callable[[], None],
        *,
        must: bool = True,
    ) -> Grant | None:
        """Ask now, and again at each change of policy, until the grant is dropped. None when there are no checkers.

        Args:
            must: a refusal now raises Denied; else the grant begins revoked (*revoke* is called).
        """
        if not self.checkers:
            return None
        grant = Grant(self, (source, target, tclass, permissions, facts), revoke, restore)
        with self._lock:
            self._grants[grant] = None  # first: a change of policy in between must not be missed
        try:
            self._ask(*grant.act)
        except Denied:
            if must:
                self.drop(grant)
                raise
            self._take(grant)
        return grant

    def drop(self, grant: Grant) -> None:
        """Forget *grant*."""
        with self._lock:
            self._grants.pop(grant, None)

    def follow(self) -> None:
        """Hear of changes of policy from now on. Raises Denied when a checker breaks at it."""
        for checker in self.checkers:
            if callable(subscribe := getattr(checker, "subscribe", None)):
                try:
                    end = subscribe(self.changed)
                    if not callable(end):
                        raise TypeError("subscribe() gave nothing to call at the end")
                    self._ends.append(end)
                except Exception as error:  # a policy that could change unheard
                    raise refusal(error, "security cannot be followed") from error

    def changed(self) -> None:
        """Ask about every grant again: what is refused now is revoked, what is allowed again restored."""
        self._deliver(self._review)

    def _review(self) -> None:
        with self._lock:
            grants = list(self._grants)
        for grant in grants:
            try:
                self._ask(*grant.act)
            except Denied:
                if grant.held:
                    self._take(grant)
            else:
                if not grant.held:
                    grant.held = True
                    grant.restore()
                    self._tell("security: restored", grant)

    def _take(self, grant: Grant) -> None:
        grant.held = False
        grant.revoke()
        self._tell("security: revoked", grant)

    def _tell(self, event: str, grant: Grant) -> None:
        if self._log is not None:
            source, target, tclass, permissions, facts = grant.act
            self._log.warning(event, **{**facts, "source": source, "target": target, tclass: " ".join(permissions)})

    def _at_end(self, act: Callable[..., None], *values: str) -> None:
        try:
            act(*values)
        except Exception as error:  # one checker's fault must not keep the others, or the machine, from ending
            if self._log is not None:
                self._log.error("security: a checker failed at the end", error=repr(error))

    def close(self) -> None:
        """Follow no longer, and forget the grants. Idempotent."""
        while self._ends:
            self._at_end(self._ends.pop())
        with self._lock:
            self._grants.clear()


def refusal(error: Exception, act: str) -> Denied:
    """What *error*, raised by a checker that was asked about *act*, becomes."""
    if isinstance(error, Denied):
        return Denied(str(error) or act)
    return Denied(f"{act}: a checker failed: {error if isinstance(error, CardcageError) else in_words(error)}")
