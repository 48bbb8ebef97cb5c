"""Offers of cards: an :class:`Offer` class for each kind, found by kind and name.

A card's ``cardcage_register`` fills the registry, with a verb for each of the kernel's kinds. A kind of a card's own is
a subclass of :class:`Offer` with a ``kind``, which other cards that import it :meth:`~Registry.add`; nothing here
imports a card.
"""

from __future__ import annotations

import re
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec, TypeVar

from cardcage._config.structure import check_options
from cardcage.errors import FAULTS, CardError, MissingExtra, NotOffered, in_words, near

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import CodeType

    from cardcage.device import Region

__all__ = [
    "AcceleratorOffer",
    "BackendOffer",
    "BootOffer",
    "CommandOffer",
    "DeviceOffer",
    "DoctorOffer",
    "FlagOffer",
    "MemoryOffer",
    "Offer",
    "PlatformOffer",
    "PolicyKeyOffer",
    "Registry",
    "SecurityOffer",
    "VerbOffer",
    "resolve",
]


MOST = 16
"""Names in an error: what comes after more of them is not read."""


def resolve(reference: Any) -> Any:
    """Turn ``"module:attribute"`` into the object; return anything else as it is."""
    if not isinstance(reference, str):
        return reference
    module, _, attribute = reference.partition(":")
    found: Any = import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


class Offer:
    """One thing that a card offers. Each kind is a subclass.

    Attributes:
        kind: the word for this kind in listings and errors.
        name: the word that configurations use.
        factory: a callable or ``"module:attribute"``.
        options: attrs class of its options (or a reference to one), ``None`` when it takes none.
        shorthand: turns a string into a table of options, where a string may stand for the table; by default, a string
            is ``key=value,...`` (:func:`cardcage.pairs.typed_pairs`).
        form: a regular expression for its names; empty for any.
        ours: names that no card can have, because the command line has them of itself.
        keys: of a table, those that are not the card's, so that no option can have their names.
        needs: extra of this distribution that it imports, for the hint ``pip install 'cardcage[needs]'``.
        help: one line for ``cardcage cards -v`` and ``--help``.
        card, distribution, label: the card that offers it, and that card's security label (set by the registry).
    """

    kind: ClassVar[str] = ""
    keys: ClassVar[frozenset[str]] = frozenset({"type"})
    ours: ClassVar[frozenset[str]] = frozenset()
    form: ClassVar[str] = ""

    # Written out, as in the subclasses: attrs would make each class at every start of the program.
    def __init__(
        self,
        name: str,
        factory: Any,
        *,
        options: Any = None,
        shorthand: Any = None,
        needs: str = "",
        help: str = "",
    ) -> None:
        self.name, self.factory, self.options, self.shorthand = name, factory, options, shorthand
        self.needs, self.help = needs, help
        self.card = self.distribution = self.label = ""
        self._at: tuple[CodeType, int] | None = None

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.name!r} of card {self.card!r}>"

    @property
    def where(self) -> str:
        """FILE:LINE of the code that offered it; empty before."""
        if self._at is None:
            return ""
        code, at = self._at
        line = next((line for start, end, line in code.co_lines() if start <= at < end), code.co_firstlineno)
        return f"{code.co_filename}:{line}"

    @property
    def who(self) -> str:
        """For errors: what it is, its card and distribution."""
        kind, _, name = self.name.rpartition(":")
        return f'{kind or self.kind} "{name}" (card {self.card}, {self.distribution})'

    def load(self) -> Any:
        """Import the factory. Raises MissingExtra or CardError, naming card and distribution."""
        return self.imported(self.factory)

    def load_options(self) -> Any:
        """Import the options class, ``None`` when it takes none. Raises CardError also for one that cannot be used."""
        found = self.imported(self.options)
        if found is not None:
            check_options(found, self.keys, self.who)
        return found

    def protocols(self) -> tuple[Any, ...]:
        """The protocols that are looked for in its product, for listings; a kind of a card's own may name some."""
        return ()

    def load_shorthand(self) -> Callable[[str], dict[str, Any]] | None:
        """Import the shorthand parser, ``None`` without one."""
        found: Callable[[str], dict[str, Any]] | None = self.imported(self.shorthand)
        return found

    def imported(self, reference: Any) -> Any:
        """Resolve *reference* for this offer. Raises MissingExtra or CardError, naming card and distribution."""
        try:
            return resolve(reference)
        except ImportError as error:
            if self.needs:
                raise MissingExtra(f"{self.name}: needs: pip install 'cardcage[{self.needs}]' ({error})") from error
            raise CardError(f"{self.who}: cannot be imported: {in_words(error)}") from error
        except FAULTS as error:  # a stranger's module may raise anything while it is imported
            raise CardError(f"{self.who}: {in_words(error)}") from error


class AcceleratorOffer(Offer):
    """An accelerator: ``factory()`` gives an :class:`~cardcage.accelerator.Accelerator`."""

    kind: ClassVar[str] = "accelerator"


class DeviceOffer(Offer):
    """A device: ``factory(options)``, or ``factory()`` when it takes no options.

    Attributes:
        regions: the ranges it answers at.
        bus: the bus type that it sits on: ``"system"``, or what a :class:`~cardcage.device.DeviceBus` carries.
        mounts: the file system by which a Linux guest mounts what it shares, under its option ``tag``; empty for none.
    """

    kind: ClassVar[str] = "device"
    keys: ClassVar[frozenset[str]] = frozenset({"type", "id", "port", "address", "irq", "bus", "label"})

    def __init__(
        self,
        name: str,
        factory: Any,
        *,
        regions: tuple[Region, ...] = (),
        bus: str = "system",
        mounts: str = "",
        **common: Any,
    ) -> None:
        super().__init__(name, factory, **common)
        self.regions, self.bus, self.mounts = regions, bus, mounts


class PlatformOffer(Offer):
    """A platform: ``factory()`` gives a :class:`~cardcage.device.Platform`."""

    kind: ClassVar[str] = "platform"


class BootOffer(Offer):
    """A boot protocol: ``factory(options)`` gives a :class:`~cardcage.boot.BootLoader`."""

    kind: ClassVar[str] = "boot"
    keys: ClassVar[frozenset[str]] = frozenset({"protocol"})


class BackendOffer(Offer):
    """A back end, named ``char:stdio``: ``factory(slot, options)``.

    Attributes:
        default: it takes the specs of its kind that name no back end: text that begins with no known name, which then
            goes whole to ``shorthand`` (the path of a disk image), and tables without ``type``.
    """

    kind: ClassVar[str] = "backend"

    def __init__(self, name: str, factory: Any, *, default: bool = False, **common: Any) -> None:
        super().__init__(name, factory, **common)
        self.default = default


class MemoryOffer(Offer):
    """A memory back end: ``factory(options)`` gives a :class:`~cardcage.ram.MemoryBackend`."""

    kind: ClassVar[str] = "memory"
    keys: ClassVar[frozenset[str]] = frozenset({"type", "preallocate", "huge_pages", "nodes", "numa"})


class SecurityOffer(Offer):
    """A security checker: ``factory(options)`` gives a :class:`~cardcage.security.Checker`.

    So that it can be loaded before all other cards, the card's entry point has the same name.
    """

    kind: ClassVar[str] = "security"


class PolicyKeyOffer(Offer):
    """A key that its card reads: ``memory`` of ``[policy]``, ``security.jail`` of ``[security]``.

    A machine is refused for a key that no card reads.
    """

    kind: ClassVar[str] = "policy key"

    def __init__(self, name: str, *, help: str = "") -> None:
        super().__init__(name, None, help=help)


class FlagOffer(Offer):
    """A command line shorthand: ``factory(text) -> dict``, a fragment that is merged before validation.

    Attributes:
        metavar: the word for its value in ``--help``.
        asks: it is ``factory(text, host)``, and asks the host what cards offer.
    """

    kind: ClassVar[str] = "flag"
    form: ClassVar[str] = "--[a-z][a-z0-9-]*"
    ours: ClassVar[frozenset[str]] = frozenset(
        "--accel --append --cpus --detach --help --initrd --kernel --log-json --log-level --memory --name --security "
        "--set --timeout --traceback --version".split()
    )

    def __init__(self, name: str, parse: Any, *, metavar: str = "SPEC", asks: bool = False, help: str = "") -> None:
        super().__init__(name, parse, help=help)
        self.metavar, self.asks = metavar, asks


class CommandOffer(Offer):
    """A subcommand: ``factory(host, arguments) -> int``.

    Attributes:
        configure: ``configure(parser)`` adds its arguments; ``None`` when it has none.
    """

    kind: ClassVar[str] = "command"
    form: ClassVar[str] = "[a-z][a-z0-9_-]*"
    ours: ClassVar[frozenset[str]] = frozenset({"cards", "doctor", "run"})

    def __init__(self, name: str, run: Any, *, configure: Any = None, help: str = "") -> None:
        super().__init__(name, run, help=help)
        self.configure = configure


class DoctorOffer(Offer):
    """A line of ``cardcage doctor``: ``factory() -> (ok, what was found, what would enable it)``."""

    kind: ClassVar[str] = "doctor"


class VerbOffer(Offer):
    """An attribute of :class:`~cardcage.machine.Machine`, found when the class has none of that name.

    ``factory`` is what would stand in the class: a function whose first argument is the machine, or a property.
    """

    kind: ClassVar[str] = "verb"
    form: ClassVar[str] = "[a-z][a-z0-9_]*"


def _caller() -> tuple[CodeType, int]:
    """Code and instruction of who called into this module: the line is found when it is wanted, which takes time."""
    frame = sys._getframe(1)
    while frame.f_globals is globals() and frame.f_back is not None:
        frame = frame.f_back
    return frame.f_code, frame.f_lasti


O = TypeVar("O", bound=Offer)  # noqa: E741  an offer
P = ParamSpec("P")


def _verb(kind: Callable[P, Offer]) -> Callable[Concatenate[Registry, P], None]:
    """A method of :class:`Registry` that adds an offer of *kind*, and takes what that takes."""

    def offer(self: Registry, /, *values: P.args, **keys: P.kwargs) -> None:
        self.add(kind(*values, **keys))

    offer.__doc__ = kind.__doc__
    return offer


class Registry:
    """Offers by kind and name. Names are unique inside a kind; a second offer of one is an error of its card."""

    def __init__(self, card: str = "", distribution: str = "", label: str = "") -> None:
        self._offers: dict[tuple[str, str], Offer] = {}
        self._card, self._distribution, self._label = card, distribution, label

    def __iter__(self) -> Iterator[Offer]:
        return iter(self._offers.values())

    def add(self, offer: Offer) -> None:
        """Add an offer. Raises CardError for a name that is taken, or an offer without a kind."""
        if not offer.kind:
            raise CardError(f"{offer.name}: {type(offer).__name__} has no kind; a subclass of Offer states one")
        offer.card, offer.distribution = offer.card or self._card, offer.distribution or self._distribution
        offer.label, offer._at = self._label, _caller()
        if offer.name in offer.ours or (offer.form and not re.fullmatch(offer.form, offer.name)):
            wanted = (
                "another name: the command line has it" if offer.name in offer.ours else f"a name like {offer.form}"
            )
            raise CardError(f'{offer.kind} "{offer.name}": expected {wanted}')
        self._refuse_taken(offer)
        self._offers[offer.kind, offer.name] = offer

    def _refuse_taken(self, offer: Offer) -> None:
        there = self._offers.get((offer.kind, offer.name))
        if there is not None:
            owner = f"already offered by card {there.card} ({there.distribution}), expected a name of its own"
            raise CardError(f"{offer.kind} {offer.name!r}: {owner} ({offer.where})")

    def merge(self, staged: Registry) -> None:
        """Take all offers of *staged*, or none: checks before it changes anything."""
        for offer in staged:
            self._refuse_taken(offer)
        self._offers.update(staged._offers)

    def offers(self, kind: type[O]) -> list[O]:
        """The offers of *kind* in the order in which they came: ours first, then by the names of the cards."""
        return [offer for offer in self if isinstance(offer, kind)]

    def names(self, kind: type[Offer]) -> list[str]:
        """Names offered of *kind*, sorted."""
        return sorted(offer.name for offer in self.offers(kind))

    def get(self, kind: type[O], name: str, *, file: str | None = None, key: str | None = None) -> O:
        """The offer. Raises NotOffered, a ConfigError that names near matches and where they come from."""
        offer = self._offers.get((kind.kind, name))
        if not isinstance(offer, kind):
            names = self.names(kind)
            hint = near(name, names)
            listed = (
                ", ".join(names) or "none"
                if len(names) <= MOST
                else f'{len(names)} names, which "cardcage cards" lists'
            )
            known = "" if hint else f" Known: {listed}."
            raise NotOffered(f'no card offers {kind.kind} "{name}".{hint}{known}', file=file, key=key)
        return offer

    # the kernel's kinds: a verb each, with the arguments of its offer

    device = _verb(DeviceOffer)
    accelerator = _verb(AcceleratorOffer)
    platform = _verb(PlatformOffer)
    boot = _verb(BootOffer)
    memory = _verb(MemoryOffer)
    security = _verb(SecurityOffer)
    policy_key = _verb(PolicyKeyOffer)
    flag = _verb(FlagOffer)
    command = _verb(CommandOffer)
    doctor = _verb(DoctorOffer)
    verb = _verb(VerbOffer)

    def backend(self, kind: str, name: str, factory: Any, **keys: Any) -> None:
        """Offer a back end of *kind* ``char``, ``block`` or ``net``; *keys* are those of :class:`BackendOffer`."""
        self.add(BackendOffer(f"{kind}:{name}", factory, **keys))
