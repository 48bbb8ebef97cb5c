"""What cards offer, by kind and name. A card's ``cardcage_register`` fills it; nothing here imports a card."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from attrs import define, field

from cardcage.errors import CardError, ConfigError, MissingExtra, near

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cardcage.device import Region

__all__ = ["KINDS", "Offer", "Registry", "resolve"]

KINDS = (
    "accelerator",
    "device",
    "platform",
    "boot",
    "backend",
    "memory",
    "admission",
    "policy",
    "security",
    "flag",
    "command",
    "control",
    "check",
)


def resolve(reference: Any) -> Any:
    """Turn ``"module:attribute"`` into the object; anything else is returned as it is."""
    if not isinstance(reference, str):
        return reference
    module, _, attribute = reference.partition(":")
    found: Any = import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


@define(eq=False)
class Offer:
    """One thing that a card offers.

    Attributes:
        kind: one of :data:`KINDS`; back ends are ``backend`` with a name such as ``char:stdio``.
        name: the word that configurations use.
        factory: a callable or ``"module:attribute"``.
        options: attrs class of its options (or a reference to one), ``None`` when it takes none.
        regions: the ranges a device answers at.
        bus: the bus type a device sits on, ``"system"`` or what a :class:`~cardcage.device.DeviceBus` carries.
        needs: extra of this distribution that it imports, for the hint ``pip install 'cardcage[needs]'``.
        help: one line for ``cardcage cards -v`` and ``--help``.
        shorthand: turns a string into a table of options, where a string may stand for one.
        card, distribution, label: who offers it, and the card's security label (set by the registry).
    """

    kind: str
    name: str
    factory: Any
    options: Any = None
    regions: tuple[Region, ...] = ()
    bus: str = "system"
    needs: str = ""
    help: str = ""
    shorthand: Any = None
    card: str = ""
    distribution: str = ""
    label: str = ""
    extra: dict[str, Any] = field(factory=dict)

    @property
    def who(self) -> str:
        """For errors: what it is, its card and distribution."""
        kind, _, name = self.name.rpartition(":")
        return f"{kind or self.kind} {name} (card {self.card}, {self.distribution})"

    def load(self) -> Any:
        """Import the factory. Raises MissingExtra or CardError, naming card and distribution."""
        return self._load(self.factory)

    def load_options(self) -> Any:
        """Import the options class, ``None`` when it takes none."""
        return self._load(self.options)

    def load_shorthand(self) -> Callable[[str], dict[str, Any]] | None:
        """Import the shorthand parser, ``None`` without one."""
        found: Callable[[str], dict[str, Any]] | None = self._load(self.shorthand)
        return found

    def _load(self, reference: Any) -> Any:
        try:
            return resolve(reference)
        except ImportError as error:
            if self.needs:
                raise MissingExtra(f"{self.name}: needs: pip install 'cardcage[{self.needs}]' ({error})") from error
            raise CardError(
                f"{self.name} (card {self.card}, {self.distribution}): cannot be imported: {error}"
            ) from error
        except Exception as error:  # a stranger's module may raise anything while it is imported
            raise CardError(f"{self.name} (card {self.card}, {self.distribution}): {error}") from error


class Registry:
    """Offers by (kind, name). Names are unique inside a kind; a second offer of one is an error of its card."""

    def __init__(self, card: str = "", distribution: str = "", label: str = "") -> None:
        self._offers: dict[tuple[str, str], Offer] = {}
        self._card, self._distribution, self._label = card, distribution, label

    def __iter__(self) -> Iterator[Offer]:
        return iter(self._offers.values())

    def add(self, offer: Offer) -> None:
        """Add an offer. Raises CardError for a name that is taken or a kind that does not exist."""
        if offer.kind not in KINDS:
            raise CardError(f"{offer.name}: no kind {offer.kind!r};{near(offer.kind, KINDS) or f' one of {KINDS}'}")
        offer.card, offer.distribution = offer.card or self._card, offer.distribution or self._distribution
        offer.label = self._label
        there = self._offers.get((offer.kind, offer.name))
        if there is not None:
            raise CardError(f"{offer.kind} {offer.name!r}: already offered by card {there.card} ({there.distribution})")
        self._offers[offer.kind, offer.name] = offer

    def merge(self, staged: Registry) -> None:
        """Take all offers of *staged*, or none: checks before it changes anything."""
        for offer in staged:
            there = self._offers.get((offer.kind, offer.name))
            if there is not None:
                raise CardError(
                    f"{offer.kind} {offer.name!r}: already offered by card {there.card} ({there.distribution})"
                )
        self._offers.update(staged._offers)

    def names(self, kind: str) -> list[str]:
        """Names offered of *kind*, sorted."""
        return sorted(name for known, name in self._offers if known == kind)

    def get(self, kind: str, name: str, *, file: str | None = None, key: str | None = None) -> Offer:
        """The offer. Raises ConfigError that names near matches and where they come from."""
        offer = self._offers.get((kind, name))
        if offer is None:
            hint = near(name, self.names(kind))
            known = "" if hint else f" Known: {', '.join(self.names(kind)) or 'none'}."
            raise ConfigError(f'no card offers {kind} "{name}".{hint}{known}', file=file, key=key)
        return offer

    # what a card calls, one verb a kind

    def device(
        self,
        name: str,
        factory: Any,
        *,
        options: Any = None,
        regions: tuple[Region, ...] = (),
        bus: str = "system",
        needs: str = "",
        help: str = "",
        shorthand: Any = None,
    ) -> None:
        """Offer a device: ``factory(options)``, or ``factory()`` when *options* is None."""
        self.add(Offer("device", name, factory, options, regions, bus, needs, help, shorthand))

    def accelerator(self, name: str, factory: Any, *, options: Any = None, needs: str = "", help: str = "") -> None:
        """Offer an accelerator: ``factory()`` gives an :class:`~cardcage.accelerator.Accelerator`."""
        self.add(Offer("accelerator", name, factory, options, needs=needs, help=help))

    def platform(self, name: str, expand: Any, *, help: str = "") -> None:
        """Offer a platform: ``expand(config) -> list[dict]`` gives the device tables of a machine of this kind."""
        self.add(Offer("platform", name, expand, help=help))

    def boot(self, name: str, factory: Any, *, options: Any = None, help: str = "") -> None:
        """Offer a boot protocol: ``factory(options)`` gives a :class:`~cardcage.device.BootLoader`."""
        self.add(Offer("boot", name, factory, options, help=help))

    def backend(
        self,
        kind: str,
        name: str,
        factory: Any,
        *,
        options: Any = None,
        needs: str = "",
        help: str = "",
        shorthand: Any = None,
        default: bool = False,
    ) -> None:
        """Offer a back end of *kind* ``char``, ``block`` or ``net``: ``factory(slot, options)``.

        Args:
            default: take the specs of this kind that name no back end: text that begins with no known name, which then
                goes whole to *shorthand* (the path of a disk image), and tables without ``type``.
        """
        extra = {"default": True} if default else {}
        self.add(
            Offer(
                "backend", f"{kind}:{name}", factory, options, needs=needs, help=help, shorthand=shorthand, extra=extra
            )
        )

    def memory(self, name: str, factory: Any, *, options: Any = None, help: str = "") -> None:
        """Offer a memory back end: ``factory(options)`` gives a :class:`~cardcage.ram.MemoryBackend`."""
        self.add(Offer("memory", name, factory, options, help=help))

    def admission(self, name: str, factory: Any, *, options: Any = None, help: str = "") -> None:
        """Offer an admission policy: ``factory(options)`` gives an :class:`~cardcage.admission.Admission`."""
        self.add(Offer("admission", name, factory, options, help=help))

    def policy(self, name: str, factory: Any, *, options: Any = None, shared: bool = False, help: str = "") -> None:
        """Offer a policy: ``factory(options)`` gives a :class:`~cardcage.policy.Policy`.

        Args:
            shared: one for all machines of a host that name it with equal options, instead of one for each machine.
        """
        self.add(Offer("policy", name, factory, options, help=help, extra={"shared": True} if shared else {}))

    def security(self, name: str, factory: Any, *, options: Any = None, help: str = "") -> None:
        """Offer a security checker (:class:`~cardcage.security.Checker`): ``factory(options)``.

        So that it can be loaded before all other cards, the card's entry point is called *name* too.
        """
        self.add(Offer("security", name, factory, options, help=help))

    def flag(self, name: str, parse: Any, *, help: str = "", metavar: str = "SPEC") -> None:
        """Offer a command line shorthand: ``parse(text) -> dict``, a fragment that is merged before validation."""
        self.add(Offer("flag", name, parse, help=help, extra={"metavar": metavar}))

    def command(self, name: str, run: Any, *, configure: Any = None, help: str = "") -> None:
        """Offer a subcommand: ``configure(parser)`` adds its arguments, ``run(host, arguments) -> int`` does it."""
        self.add(Offer("command", name, run, configure, help=help))

    def control(self, name: str, run: Any, *, help: str = "") -> None:
        """Offer a command to running machines (:mod:`cardcage.control`): ``run(machine, arguments) -> dict``.

        Both are tables of JSON. It runs on a thread of its own, without the machine's lock.
        """
        self.add(Offer("control", name, run, help=help))

    def check(self, name: str, check: Any, *, help: str = "") -> None:
        """Offer a line of ``cardcage doctor``: ``check() -> (ok, what was found, what would enable it)``."""
        self.add(Offer("check", name, check, help=help))
