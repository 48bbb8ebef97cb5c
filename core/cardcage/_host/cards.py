"""Cards found and loaded, each staged on its own: taken whole, or left out and named."""

from __future__ import annotations

from functools import partial
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any, cast

import pluggy

from cardcage import __version__
from cardcage._host.discovery import announced
from cardcage._host.owners import GROUP, CardInfo, card_of, module_of
from cardcage.errors import FAULTS, CardcageError, CardError, Denied, in_words, near, place_of_error
from cardcage.hookspecs import Hooks
from cardcage.registry import Registry
from cardcage.security import HOST, Act
from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage._host.discovery import Announcement
    from cardcage.security import Mediator

DEFAULTS = "cardcage.defaults"
"""Entry point group that says which card is meant by ``default``: ``security = "module of the card"``."""
MARK = f"{GROUP}_impl"
"""The attribute of a function in which ``hookimpl`` leaves its options."""
MISMATCH = (pluggy.PluginValidationError, AttributeError, ImportError, TypeError)
"""What is raised when a card was written for another version of the interface."""


@frozen
class BrokenCard:
    """A card that could not be loaded, and left nothing behind."""

    name: str
    distribution: str
    reason: str
    error: BaseException

    def __str__(self) -> str:
        return f'card "{self.name}" ({self.distribution}) is broken and was left out: {self.reason}'


def default_name(kind: str) -> str | None:
    """The name of the card that is the default of *kind* (``security``), as its distribution says; None without one."""
    wanted = next((one.value for one in announced(DEFAULTS) if one.name == kind), None)
    return next((one.name for one in announced(GROUP) if one.value == wanted), None)


def _nothing() -> None:
    return None


class Cards:
    """The plugin manager, and the cards that it took.

    Args:
        registry: where offers go. mediator: asked about each card before it is imported.
    """

    def __init__(self, registry: Registry, mediator: Mediator) -> None:
        self.manager = new_manager()
        self._trial = new_manager()
        self.loaded: list[CardInfo] = []
        self.broken: list[BrokenCard] = []
        self._registry, self._mediator = registry, mediator

    def announced(self) -> list[Announcement]:
        """The installed cards, our own first: of two that offer the same name, the stranger's is the one left out."""
        return sorted(announced(GROUP), key=lambda one: (one.project != GROUP, one.name))

    def load_announced(self, one: Announcement) -> None:
        """Load an installed card."""
        distribution = f"{one.project} {one.version}".strip()
        self._load(one.name, one.project, distribution, one.load, partial(one.requires, GROUP))

    def load(self, card: Any) -> None:
        """Load a module, or any object with hooks."""
        name = getattr(card, "__name__", type(card).__name__)
        self._load(name, "given to Host", "given to Host", lambda: card, _nothing)

    def _load(
        self, name: str, project: str, distribution: str, load: Callable[[], Any], asks_for: Callable[[], str | None]
    ) -> None:
        try:
            facts = {"card": name, "distribution": distribution}
            self._refuse_taken(name)
            label = self._mediator.ask(Act(HOST, HOST, "card", ("load",), facts), project)
            staged = Registry(name, distribution, label)
            module = load()
            check_marks(module)
            self._try(module, name, staged)
            self._registry.merge(staged)
        except FAULTS as error:  # anything that a stranger's import or hook may raise
            if isinstance(error, Denied) and not isinstance(error.__cause__, Denied | None):
                raise self._unasked(error) from error
            reason = (
                f"{error}{place_of_error(error, outside=True)}" if isinstance(error, CardcageError) else in_words(error)
            )
            if isinstance(error, MISMATCH):
                wanted = asks_for() or "no particular cardcage"
                reason += f" (this is cardcage {__version__}; the card asks for {wanted})"
            self.broken.append(BrokenCard(name, distribution, " ".join(reason.split()), error))
            return
        self.manager.register(module, name)
        self.loaded.append(CardInfo(name, distribution, module))

    def _try(self, module: Any, name: str, staged: Registry) -> None:
        """Let the card register, alone: its mistakes must not reach the next one, nor half of its hooks stay."""
        trial = self._trial
        try:
            trial.register(module, name)
            if not trial.get_hookcallers(module):
                file = getattr(module, "__file__", None) or type(module).__name__
                raise CardError(f"no hook in it: expected cardcage_register, marked by @hookimpl ({file})")
            trial.check_pending()
            cast(Hooks, trial.hook).cardcage_register(registry=staged)
        except BaseException:
            self._trial = new_manager()
            raise
        trial.unregister(name=name)

    def _unasked(self, error: Denied) -> CardError:
        """For a security card that breaks when it is asked: nothing may be loaded then, and nobody else is to blame."""
        cause = error.__cause__ or error
        card = card_of(cause, self.loaded)
        return CardError(f"{f'security card {card.name} ({card.distribution}): ' if card else ''}{in_words(cause)}")

    def _refuse_taken(self, name: str) -> None:
        there = next((one.distribution for one in self.loaded if one.name == name), None)
        if there is not None:
            raise CardError(f'another card has the name "{name}" already ({there}): expected one of its own')


def check_marks(card: Any) -> None:
    """Find hooks that pluggy would pass over in silence. Raises CardError that says what was expected, and where."""
    for name in dir(card):
        if name.startswith(f"{GROUP}_") and not hasattr(hook := getattr(card, name), MARK):
            code = getattr(hook, "__code__", None)
            if code is not None and (hasattr(Hooks, name) or hook.__module__ == module_of(card)):
                hint = "" if hasattr(Hooks, name) else near(name, vars(Hooks))
                what = f"{name} is called by nobody: expected @cardcage.hookspecs.hookimpl above it"
                raise CardError(f"{what} ({code.co_filename}:{code.co_firstlineno}){hint}")


class Manager(pluggy.PluginManager):
    """Looks at names that may be hooks only: pluggy's own look at each name of each card is a part of start-up."""

    def parse_hookimpl_opts(self, plugin: Any, name: str) -> Any:
        """The marks of a card's function, None for what has none."""
        if isinstance(plugin, ModuleType):
            found = vars(plugin).get(name)
            if isinstance(found, FunctionType):
                return vars(found).get(MARK)
            if MARK not in getattr(found, "__dict__", ()):
                return None  # hasattr() would have a class Machine that is imported there look for makers
        return super().parse_hookimpl_opts(plugin, name)

    def parse_hookspec_opts(self, module_or_class: Any, name: str) -> Any:
        """The marks of a hook that we know."""
        return super().parse_hookspec_opts(module_or_class, name) if name.startswith(f"{GROUP}_") else None


def new_manager() -> pluggy.PluginManager:
    """A manager that knows our hooks."""
    manager = Manager(GROUP)
    manager.add_hookspecs(Hooks)
    return manager
