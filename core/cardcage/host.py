"""The host: cards, what they offer, and what spans the machines of a process."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from weakref import ReferenceType, ref

from cardcage._config.places import Place, place_of, placed
from cardcage._config.structure import structure
from cardcage._host.cards import BrokenCard, Cards, default_name
from cardcage._host.log import Log, LogSink
from cardcage._host.owners import CardInfo, card_of
from cardcage._host.phases import Phases
from cardcage._host.signals import Signals
from cardcage.abilities import has
from cardcage.errors import FAULTS, CardcageError, CardError, ConfigError, NotOffered, in_words
from cardcage.pairs import parse_repeated, typed_pairs
from cardcage.registry import Offer, Registry, SecurityOffer
from cardcage.security import Closable, Mediator, check_checker

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cardcage._config.places import Spec
    from cardcage._host.discovery import Announcement

__all__ = ["BrokenCard", "CardInfo", "Dismantled", "Host", "Log", "Signals"]

O = TypeVar("O", bound=Offer)  # noqa: E741  an offer


class Dismantled(Protocol):
    """As much of a machine as its host has to know: it is closed with it."""

    def dismantle(self) -> None:
        """Stop, and give everything back, without asking security."""


class Host:
    """Owns the plugin manager and the registry, and closes the machines made with it. Nothing is a module global.

    Attributes:
        sealed: tells by class and name of an object (a file, a socket) why a device that is added late may not open it;
            empty where it may. Set by who shuts the process in.

    Args:
        cards: modules (or any objects with hooks) to load besides the installed cards.
        installed: load the cards announced by entry points of the group ``cardcage``.
        security: the security cards to load before all others (:meth:`cardcage.config.Draft.security`), each by its
            entry point, which bears its name; they are asked about everything that follows. ``default`` is the card
            that an entry point ``security`` of the group ``cardcage.defaults`` names.
        mediator: checkers that the program brings itself.
        owns_process: the process exists for its machines, as the command line's does: a card may change what holds for
            all of it, such as what it may ask of the kernel.

    Each card registers into a staging area of its own, which is taken whole or thrown away: a broken card is in
    ``broken``, by name and distribution, and nothing of it is left. A broken security card raises CardError instead.
    """

    def __init__(
        self,
        cards: Iterable[Any] = (),
        *,
        installed: bool = True,
        security: tuple[Spec, ...] = (),
        mediator: Mediator | None = None,
        owns_process: bool = False,
    ) -> None:
        self.registry = Registry()
        self._machines: list[ReferenceType[Dismantled]] = []
        self.signals = Signals()
        self.log_sink = LogSink()
        self.log = Log(self.log_sink)
        self.mediator = mediator or Mediator()
        self.security, self.owns_process = security, owns_process
        self.sealed: Callable[[str, str], str] = lambda tclass, name: ""
        self._shared: dict[str, Any] = {}
        self._told = 0
        self._shared_lock = threading.Lock()
        loader = Cards(self.registry, self.mediator)
        self.cards, self.broken = loader.loaded, loader.broken
        self.phases = Phases(loader.manager, self.cards)
        found = self._load_security(loader, loader.announced() if installed else [])
        for one in found:
            loader.load_announced(one)
        for card in cards:
            loader.load(card)

    @property
    def machines(self) -> list[Dismantled]:
        """The open machines made with it, in their order. It does not keep them: one that nobody holds is closed."""
        return [machine for one in self._machines if (machine := one()) is not None]

    def add(self, machine: Dismantled) -> None:
        """Close *machine* with the host."""
        self._machines.append(ref(machine))

    def forget(self, machine: Dismantled) -> None:
        """*machine* is closed."""
        self._machines = [one for one in self._machines if one() not in (None, machine)]

    def _load_security(self, loader: Cards, found: list[Announcement]) -> list[Announcement]:
        """Load the security cards that are wanted; return the announcements that are left."""
        for spec in self.security:
            name = self._security_name(spec)
            for one in [one for one in found if one.name == name]:
                found.remove(one)
                loader.load_announced(one)
            for broken in self.broken:  # without it nothing may run
                what = f'security card "{broken.name}" ({broken.distribution}) is broken: {broken.reason}'
                raise CardError(what) from broken.error
            self.mediator.checkers += (self.make_checker(spec),)
        return found

    def _security_name(self, spec: Spec) -> str:
        if spec.name != "default":
            return spec.name
        if (name := default_name("security")) is None:
            raise spec.place.error("no installed distribution names a default security card")
        return name

    def make_checker(self, spec: Spec) -> Any:
        """Make the checker that *spec* names, and hold it to its protocols. Raises ConfigError or CardError."""
        checker = self.make(SecurityOffer, spec)
        check_checker(checker, self.registry.get(SecurityOffer, self._security_name(spec)).who, self.log)
        return checker

    def share(self, key: str, make: Callable[[], Any]) -> Any:
        """Return what cards of several machines of this host use together, made by the first that asks. Thread-safe.

        Args:
            key: begins with the name of the card, such as ``net:switch:lan``.
        """
        with self._shared_lock:
            if key not in self._shared:
                self._shared[key] = make()
            return self._shared[key]

    def make(self, kind: type[O], spec: Spec) -> Any:
        """Make what a card offers of *kind*, with the options in *spec*: a policy, a checker.

        Raises ConfigError with the place of *spec*, or CardError that names the card.
        """
        name = self._security_name(spec) if kind is SecurityOffer else spec.name
        place = spec.place
        offer = self.registry.get(kind, name, file=place.file, key=place.key)
        options = self.options(offer, spec.options, file=place.file, key=place.key)
        factory = offer.load()
        return place.blamed(offer.who, lambda: factory(options) if options is not None else factory())

    def options(self, offer: Offer, table: Any, *, file: str | None = None, key: str | None = None) -> Any:
        """Structure *table* (or text, where the card has a shorthand) into the offer's options; None if it takes none.

        Raises ConfigError for what does not fit, CardError or MissingExtra when the card cannot be imported.
        """
        place = place_of(table, Place(file, key)) if isinstance(table, str) else Place(file, key)
        if isinstance(table, str):
            table = self.expand(offer, table, file=place.file, key=place.key)
        cls = offer.load_options()
        if cls is None:
            if table:
                raise place.below(min(table)).error(f'no such key. "{offer.name}" takes no options')
            return None
        return structure(placed(table, place), cls, file=file, key=key, who=f"{offer.who}: options")

    def expand(self, offer: Offer, text: str, *, file: str | None = None, key: str | None = None) -> dict[str, Any]:
        """The table of options that *text* stands for: by the offer's shorthand, else as ``key=value,...`` pairs.

        Raises ConfigError with the place, or CardError for a shorthand that breaks.
        """
        shorthand = offer.load_shorthand()
        if shorthand is None:
            cls = offer.load_options()

            def shorthand(text: str) -> dict[str, Any]:
                return typed_pairs(parse_repeated(text), cls) if text else {}

        return _expanded(offer, shorthand, text, Place(file, key))

    def blame(self, error: ConfigError) -> ConfigError:
        """Add the broken cards to an error about a name that nobody offers: one of them may have offered it."""
        if not isinstance(error, NotOffered) or not self.broken:
            return error
        return NotOffered(
            f"{error.problem} ({'; '.join(str(one) for one in self.broken)})", file=error.file, key=error.key
        )

    def tell_broken(self) -> None:
        """Say in the log which cards are broken, each once: who boots a machine may miss what one of them offers."""
        for one in self.broken[self._told :]:
            self.log.warning("a card is broken and was left out", card=one.name, of=one.distribution, why=one.reason)
        self._told = len(self.broken)

    def card_of(self, error: BaseException) -> CardInfo | None:
        """The card that an exception came from, by its traceback; None when it came from none."""
        return card_of(error, self.cards)

    def close(self) -> None:
        """Close the machines that are left, and the checkers. Idempotent. Not mediated: neither is a process's end.

        Raises the first error of a machine, once all are closed.
        """
        errors = []
        for machine in self.machines:
            try:
                machine.dismantle()
            except Exception as error:  # the other machines are to be closed all the same
                errors.append(error)
        for checker in self.mediator.checkers:
            if has(checker, Closable):
                checker.close()
        if errors:
            raise errors[0]

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _expanded(offer: Offer, shorthand: Callable[[str], dict[str, Any]], text: str, place: Place) -> dict[str, Any]:
    """The table that *text* stands for."""
    try:
        table = shorthand(text)
    except ValueError as error:
        raise place.error(str(error)) from error
    except CardcageError:
        raise
    except FAULTS as error:  # a stranger's code: whatever it raises is the card's fault, and named so
        raise CardError(f"{offer.who}: its shorthand: {in_words(error)}") from error
    if not isinstance(table, dict):
        raise CardError(f"{offer.who}: its shorthand gave {table!r}, expected a table")
    return table
