"""Mediation: before each act between labelled objects, the core asks the security checkers.

An :class:`Act` is who does what to whom, as in SELinux, whose words these are: the core is an *object manager*, a
security card the *security server*. Checkers stack restrictively: each may refuse by raising
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

from attrs import evolve, field

from cardcage.abilities import has, require, tell_near_misses
from cardcage.errors import FAULTS, CardcageError, Denied, in_words
from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

__all__ = [
    "CLASSES",
    "HOST",
    "OPERATOR",
    "Act",
    "Checker",
    "Closable",
    "Grant",
    "HasNeeds",
    "LabelKeeper",
    "Labeller",
    "Mediator",
    "Needs",
    "PolicySource",
    "check_checker",
]

OPERATOR = "operator"
"""The label of who uses the command line or the Python API, before a checker translates it."""

HOST = "host"
"""The label of the host program itself."""

CLASSES = {
    "machine": (*"create start pause resume reset stop destroy add save load fork migrate_out migrate_in".split(),),
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
"""Questions of the kernel and our own cards. Other cards may ask about more, through the same doors."""


@frozen
class Act:
    """Something that is asked about: *source* does *permissions* to *target*, all of them or none.

    Attributes:
        source, target: labels.
        tclass: the target's class, such as ``image``.
        permissions: names, such as ``("open", "read")``.
        facts: for the audit, such as ``path``, ``machine`` and ``device`` (their names): plain values. Two acts that
            differ in these only are equal.
    """

    source: str
    target: str
    tclass: str
    permissions: tuple[str, ...]
    facts: Mapping[str, object] = field(factory=dict, eq=False)

    def __str__(self) -> str:
        """The words of a refusal: ``disk_t may not open read image /a``."""
        return f"{self.source} may not {' '.join(self.permissions)} {self.tclass} {self.target}"


@frozen
class Needs:
    """The host's things that a card, device or back end still asks for once the guest runs; a jail leaves it these.

    Open files go on working, and a socket that listens goes on accepting: they need nothing.

    Attributes:
        read, write: paths that are opened later: files, or directories with all that is below them.
        remove: directories in which it removes a file of its own at the end.
        sockets: families, ``unix`` and ``inet``, of sockets that it makes later.
        capabilities: names out of capabilities(7) in lower case, such as ``chown``; kept where the process has them.
        scratch: directories in which it makes files without a name (``cardcage_jail.open_file`` with ``O_TMPFILE``).
        processes: as many may be forked and alive at once. They run no other program, and have these same needs.
        programs: command lines that it starts again (``cardcage_jail.start_program``): ``{fd}`` is a socket's number.
    """

    read: tuple[str, ...] = ()
    write: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()
    sockets: tuple[str, ...] = ()
    capabilities: tuple[str, ...] = ()
    scratch: tuple[str, ...] = ()
    processes: int = 0
    programs: tuple[tuple[str, ...], ...] = ()


class HasNeeds(Protocol):
    """A device, back end, memory back end or checker that needs something of the host once the guest runs."""

    def needs(self) -> Needs:
        """Asked once, before the first instruction."""


class Checker(Protocol):
    """A security card's factory product."""

    def check(self, act: Act, /) -> None:
        """Return to allow, raise :exc:`~cardcage.errors.Denied` to refuse all of it. Any thread."""


class Labeller(Protocol):
    """A checker that also names things."""

    def label(self, act: Act, name: str, /) -> str | None:
        """The label of the object *name* of class ``act.tclass``; None to pass.

        *act* is what is about to be asked, with the label of what the source makes or meets the object in for its
        target. Raises Denied when it must not be labelled.
        """


class LabelKeeper(Protocol):
    """A checker that keeps account of the labels it gave."""

    def release(self, label: str, tclass: str, /) -> None:
        """The object with this label is gone. Asked for machines."""


class PolicySource(Protocol):
    """A checker whose answers may change."""

    def subscribe(self, changed: Callable[[], None], /) -> Callable[[], None]:
        """Call *changed* after each change of policy, on any thread, holding no lock. Returns what ends this."""


class Closable(Protocol):
    """Holds something to give back."""

    def close(self) -> None:
        """The host or machine that it serves has ended."""


CHECKER: tuple[Any, ...] = (Checker, Labeller, LabelKeeper, PolicySource, Closable, HasNeeds)
"""Protocols that are looked for in a security card's product; the first it must have."""


def check_checker(checker: Any, who: str, log: Any) -> None:
    """Hold a security card's product to its protocols. Raises CardError for what is missing or cannot be called so."""
    require(checker, Checker, who)
    for protocol in CHECKER:
        has(checker, protocol, who)
    tell_near_misses(checker, CHECKER, who, log)


def _unasked(act: Act, /) -> None:
    """Nothing is asked without checkers."""


class Grant:
    """An act that is allowed for as long as policy says so. *revoke* and *restore* run under the machine's lock."""

    __slots__ = ("_mediator", "act", "held", "restore", "revoke")

    def __init__(self, mediator: Mediator, act: Act, revoke: Callable[[], None], restore: Callable[[], None]) -> None:
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

    __slots__ = ("_checkers", "_deliver", "_ends", "_grants", "_keepers", "_labellers", "_lock", "_log", "check")

    check: Callable[[Act], None]
    """Ask all checkers now. Raises Denied when one refuses or breaks. Without checkers, this is an empty function, and
    who asks often looks at :attr:`checkers` before it makes the act."""

    def __init__(
        self,
        checkers: Iterable[Checker] = (),
        *,
        deliver: Callable[[Callable[[], None]], None] = lambda review: review(),
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
        self._labellers = [one for one in checkers if has(one, Labeller)]
        self._keepers = [one for one in checkers if has(one, LabelKeeper)]
        self.check = self._ask if checkers else _unasked

    def _ask(self, act: Act, /) -> None:
        for checker in self._checkers:
            try:
                checker.check(act)
            except FAULTS as error:  # a checker that breaks must not let anything pass
                raise _refusal(error, str(act)) from error

    def label(self, act: Act, name: str) -> str:
        """The label of *name*, which is made or met in the act's target: *name* itself when no checker has one."""
        for checker in self._labellers:
            try:
                found = checker.label(act, name)
            except FAULTS as error:  # an object without its label must not come to be
                raise _refusal(error, f"{act.tclass} {name} has no label") from error
            if found is not None:
                return found
        return name

    def release(self, label: str, tclass: str) -> None:
        """The object with *label* is gone."""
        for checker in self._keepers:
            self._at_end(checker.release, label, tclass)

    def ask(self, act: Act, name: str) -> str:
        """Label the object *name*, which is made or met in the act's target, and ask about it; returns its label.

        The act's facts gain the name. Raises Denied.
        """
        if not self.checkers:
            return name
        act = evolve(act, facts={"name": name, **act.facts})
        found = self.label(act, name)
        self._ask(evolve(act, target=found))
        return found

    # grants

    def grant(
        self, act: Act, revoke: Callable[[], None], restore: Callable[[], None], *, must: bool = True
    ) -> Grant | None:
        """Ask now, and again at each change of policy, until the grant is dropped. None when there are no checkers.

        Args:
            must: a refusal now raises Denied; else the grant begins revoked (*revoke* is called).
        """
        if not self.checkers:
            return None
        grant = Grant(self, act, revoke, restore)
        with self._lock:
            self._grants[grant] = None  # first: a change of policy in between must not be missed
        try:
            self._ask(grant.act)
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
            if has(checker, PolicySource):
                try:
                    end: object = checker.subscribe(self.changed)
                    if not callable(end):
                        raise TypeError("subscribe() gave nothing to call at the end")
                    self._ends.append(end)
                except FAULTS as error:  # a policy that could change unheard
                    raise _refusal(error, "security cannot be followed") from error

    def changed(self) -> None:
        """Ask about every grant again: what is refused now is revoked, what is allowed again restored."""
        self._deliver(self._review)

    def _review(self) -> None:
        with self._lock:
            grants = list(self._grants)
        for grant in grants:
            try:
                self._ask(grant.act)
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
            act = grant.act
            words = {"source": act.source, "target": act.target, act.tclass: " ".join(act.permissions)}
            self._log.warning(event, **{**act.facts, **words})

    def _at_end(self, last: Callable[..., None], *values: str) -> None:
        try:
            last(*values)
        except FAULTS as error:  # one checker's fault must not keep the others, or the machine, from ending
            if self._log is not None:
                self._log.error("security: a checker failed at the end", error=in_words(error))

    def close(self) -> None:
        """Follow no longer, and forget the grants. Idempotent."""
        while self._ends:
            self._at_end(self._ends.pop())
        with self._lock:
            self._grants.clear()


def _refusal(error: BaseException, what: str) -> Denied:
    """Turn *error*, raised by a checker, into a refusal; *what* says what is refused."""
    if isinstance(error, Denied):
        return Denied(str(error) or what)
    return Denied(f"{what}: a checker failed: {error if isinstance(error, CardcageError) else in_words(error)}")
