"""The host: cards, what they offer, and what spans the machines of a process."""

from __future__ import annotations

import signal
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import pluggy
from attrs import frozen

from cardcage import __version__
from cardcage.discovery import announced
from cardcage.errors import CardcageError, CardError, ConfigError, UsageError, in_words
from cardcage.hookspecs import Hooks
from cardcage.log import Log, LogSink
from cardcage.registry import Offer, Registry
from cardcage.security import HOST, Mediator
from cardcage.structure import structure

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from cardcage.config import Spec
    from cardcage.discovery import Announcement
    from cardcage.machine import Machine

__all__ = ["BrokenCard", "CardInfo", "Host", "Signals"]

GROUP = "cardcage"
MISMATCH = (pluggy.PluginValidationError, AttributeError, ImportError, TypeError)
"""What is raised when a card was written for another version of the interface."""


@frozen
class CardInfo:
    """A card that was loaded: its name, its distribution (``name version``) and its module."""

    name: str
    distribution: str
    module: Any

    @property
    def ours(self) -> bool:
        """Whether it comes with cardcage itself."""
        return self.distribution.partition(" ")[0] == GROUP


@frozen
class BrokenCard:
    """A card that could not be loaded, and left nothing behind."""

    name: str
    distribution: str
    reason: str
    error: BaseException

    def __str__(self) -> str:
        return f'card "{self.name}" ({self.distribution}) is broken and was left out: {self.reason}'


class Signals:
    """The one owner of signal handlers: who wants one claims it, and the last to let go gets the earlier one back.

    Claims of one signal must name the same handler. Other code may replace a handler meanwhile (pytest's faulthandler
    does): :meth:`verify` puts ours back, and machines call it when they start and resume. Handlers can only be set on
    the main thread (a rule of Python): elsewhere :meth:`claim` raises UsageError.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._claims: dict[int, tuple[Callable[[int, Any], Any], Any, int]] = {}

    def claim(self, signum: int, handler: Callable[[int, Any], Any]) -> None:
        """Install *handler*, or count one more user of it."""
        with self._lock:
            mine, before, count = self._claims.get(signum, (handler, None, 0))
            if mine is not handler:
                raise UsageError(f"{signal.Signals(signum).name} already has another handler of this host")
            if not count:
                if threading.current_thread() is not threading.main_thread():
                    raise UsageError("signal handlers can only be set on the main thread")
                before = signal.signal(signum, handler)
            self._claims[signum] = handler, before, count + 1

    def release(self, signum: int) -> None:
        """One user less; the earlier handler comes back with the last."""
        with self._lock:
            if signum not in self._claims:
                raise UsageError(f"{signal.Signals(signum).name} was not claimed")
            handler, before, count = self._claims[signum]
            if count > 1:
                self._claims[signum] = handler, before, count - 1
                return
            del self._claims[signum]
            if signal.getsignal(signum) is handler and threading.current_thread() is threading.main_thread():
                signal.signal(signum, before if before is not None else signal.SIG_DFL)

    def verify(self) -> None:
        """Put our handlers back where something replaced them. Does nothing off the main thread."""
        if threading.current_thread() is not threading.main_thread():
            return
        with self._lock:
            for signum, (handler, _, _) in self._claims.items():
                if signal.getsignal(signum) is not handler:
                    signal.signal(signum, handler)


def _itself(card: Any) -> Any:
    return card


def _nothing() -> None:
    return None


class Host:
    """Owns the plugin manager, the registry and the machines made with it. Nothing is a module global.

    Args:
        cards: modules (or any objects with hooks) to load besides the installed ones.
        installed: load the cards announced by entry points of the group ``cardcage``.
        security: which security cards to load before all others (:meth:`cardcage.config.Draft.security`), each by its
            entry point, which bears its name; they are asked about everything that follows.
        mediator: checkers that the program brings itself.

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
    ) -> None:
        self.registry = Registry()
        self.cards: list[CardInfo] = []
        self.broken: list[BrokenCard] = []
        self.machines: list[Machine] = []
        self.signals = Signals()
        self.log_sink = LogSink()
        self.log = Log(self.log_sink)
        self.mediator = mediator or Mediator()
        self.security = security
        self._shared: dict[str, Any] = {}
        self._shared_lock = threading.Lock()
        self._manager = self._new_manager()
        self.hooks = cast(Hooks, self._manager.hook)
        # Our own first: of two cards that offer the same name, the stranger's is the one left out.
        found = sorted(announced(GROUP), key=lambda one: (one.project != GROUP, one.name)) if installed else []
        found = self._load_security(found)
        for one in found:
            self._load_announced(one)
        for card in cards:
            name = getattr(card, "__name__", type(card).__name__)
            self._load(name, "given to Host", "given to Host", partial(_itself, card), _nothing)

    def share(self, key: str, make: Callable[[], Any]) -> Any:
        """What cards of several machines of this host use together, made by the first who asks. Thread-safe.

        Args:
            key: begins with the name of the card, such as ``net:switch:lan``.
        """
        with self._shared_lock:
            if key not in self._shared:
                self._shared[key] = make()
            return self._shared[key]

    @staticmethod
    def _new_manager() -> pluggy.PluginManager:
        manager = pluggy.PluginManager(GROUP)
        manager.add_hookspecs(Hooks)
        return manager

    def _load_security(self, found: list[Announcement]) -> list[Announcement]:
        """Load the security cards that are wanted; returns the announcements that are left."""
        for spec in self.security:
            for one in [one for one in found if one.name == spec.name]:
                found.remove(one)
                self._load_announced(one)
            for broken in self.broken:  # without it nothing may run
                what = f'security card "{broken.name}" ({broken.distribution}) is broken: {broken.reason}'
                raise CardError(what) from broken.error
            self.mediator.checkers += (self.make("security", spec),)
        return found

    def _load_announced(self, one: Announcement) -> None:
        distribution = f"{one.project} {one.version}".strip()
        self._load(one.name, one.project, distribution, one.load, partial(one.requires, GROUP))

    def _load(
        self, name: str, project: str, distribution: str, load: Callable[[], Any], asks_for: Callable[[], str | None]
    ) -> None:
        try:
            facts = {"card": name, "distribution": distribution}
            label = self.mediator.ask(HOST, HOST, "card", project, ("load",), facts)
            staged = Registry(name, distribution, label)
            if self._manager.has_plugin(name):
                raise CardError("another card has this name already")
            module = load()
            # A manager of its own: one card's mistakes must not reach the next one, nor half of its hooks stay.
            trial = self._new_manager()
            trial.register(module, name)
            trial.check_pending()
            cast(Hooks, trial.hook).cardcage_register(registry=staged)
            self.registry.merge(staged)
        except Exception as error:  # anything that a stranger's import or hook may raise
            reason = str(error) if isinstance(error, CardError) else f"{type(error).__name__}: {error}"
            if isinstance(error, MISMATCH):
                wanted = asks_for() or "no particular cardcage"
                reason += f" (this is cardcage {__version__}; the card asks for {wanted})"
            self.broken.append(BrokenCard(name, distribution, " ".join(reason.split()), error))
            return
        self._manager.register(module, name)
        self.cards.append(CardInfo(name, distribution, module))

    def make(self, kind: str, spec: Spec) -> Any:
        """What a card makes of the options in *spec*: a policy, a checker. Raises ConfigError or CardError."""
        file, key = spec.place.file, spec.place.key
        offer = self.registry.get(kind, spec.name, file=file, key=key)
        options = self.options(offer, spec.options, file=file, key=key)
        factory = offer.load()
        try:
            return factory(options) if options is not None else factory()
        except CardcageError:
            raise
        except Exception as error:  # a stranger's code: whatever it raises is the card's fault, and named so
            raise CardError(f"{offer.who}: {in_words(error)}") from error

    def options(self, offer: Offer, table: Any, *, file: str | None = None, key: str | None = None) -> Any:
        """Structure *table* (or text, where the card has a shorthand) into the offer's options; None if it takes none.

        Raises ConfigError for what does not fit, CardError or MissingExtra when the card cannot be imported.
        """
        shorthand = offer.load_shorthand()
        if isinstance(table, str):
            if shorthand is None:
                raise ConfigError(f'"{offer.name.split(":")[-1]}" takes no text; write a table', file=file, key=key)
            try:
                table = shorthand(table)
            except ValueError as error:
                raise ConfigError(str(error), file=file, key=key) from error
            except CardcageError:
                raise
            except Exception as error:  # a stranger's code: whatever it raises is the card's fault, and named so
                raise CardError(f"{offer.who}: its shorthand: {in_words(error)}") from error
            if not isinstance(table, dict):
                raise CardError(f"{offer.who}: its shorthand gave {table!r}, expected a table")
        cls = offer.load_options()
        if cls is None:
            if table:
                name = min(table)
                raise ConfigError(
                    f'no such key. "{offer.name}" takes no options', file=file, key=f"{key}.{name}" if key else name
                )
            return None
        return structure(table, cls, file=file, key=key)

    def blame(self, error: ConfigError) -> ConfigError:
        """Add the broken cards to an error about a name that nobody offers: one of them may have offered it."""
        if "no card offers" not in error.problem or not self.broken:
            return error
        return ConfigError(
            f"{error.problem} ({'; '.join(str(one) for one in self.broken)})", file=error.file, key=error.key
        )

    def close(self) -> None:
        """Close the machines that are left, and the checkers. Idempotent. Not mediated: neither is a process's end."""
        for machine in list(self.machines):
            machine.dismantle()
        for checker in self.mediator.checkers:
            if callable(end := getattr(checker, "close", None)):
                end()

    def __enter__(self) -> Host:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
