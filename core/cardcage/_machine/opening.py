"""A device's side of the host: back ends, and what it may ask for: the concrete :class:`~cardcage.device.HostSide`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from cardcage._config.places import Place, place_of
from cardcage._machine.abilities import BACKENDS, check_backend
from cardcage._machine.granted import BackendGate
from cardcage.abilities import tell_near_misses
from cardcage.config import spec_table
from cardcage.errors import ConfigError, HostError
from cardcage.registry import BackendOffer

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage._machine.asking import Asking
    from cardcage._machine.console import Console
    from cardcage._machine.services import Services
    from cardcage.host import Host
    from cardcage.memory import PhysicalMemory, SharedRange


class DeviceHost:
    """Opens back ends for one device, and closes them.

    Args:
        place: the device's, for values that do not know their own.
        slot: what a back end's factory is given.
    """

    def __init__(
        self,
        asking: Asking,
        host: Host,
        memory: PhysicalMemory,
        services: Services,
        console: Console,
        place: Place,
        slot: Any,
    ) -> None:
        self._asking, self._host, self._memory, self._services = asking, host, memory, services
        self._console = console
        self._place, self._slot = place, slot
        self.sealed: Callable[[str, str], str] = lambda tclass, name: ""
        self.has_console = False
        self.opened: list[Any] = []
        self._provided: list[str] = []

    def ask(self, tclass: str, name: str, permissions: tuple[str, ...], /, *more: Any, **facts: Any) -> Any:
        """See :meth:`cardcage.device.HostSide.ask`. Raises HostError where it is :attr:`sealed`."""
        if tclass != "backend" and (why := self.sealed(tclass, name)):
            raise HostError(f'device "{self._asking.device}" needs {tclass} {name}: {why}')
        return self._asking.ask(tclass, name, permissions, *more, **facts)

    def share(self, key: str, make: Callable[[], Any], /) -> Any:
        """See :meth:`cardcage.host.Host.share`; asks for ``backend open``."""
        asking = self._asking
        if asking.gate is not None or not asking.active:
            self.ask("backend", key, ("open",))  # for a back end that is being opened: the gate before that shuts
            return self._host.share(key, make)
        gate = BackendGate("shared")
        self.ask("backend", key, ("open",), gate.shut(key), gate.open(key))
        return gate.before(self._host.share(key, make))

    def shared_memory(self, revoke: Callable[[], None], restore: Callable[[], None], /) -> list[SharedRange]:
        """The RAM, as another process may be given it. Raises Denied."""
        asking = self._asking
        asking.grant(asking.act(asking.machine_label, "memory", ("share",)), revoke, restore)
        return self._memory.shared()

    def provide(self, name: str, service: Any, /) -> None:
        """Let other cards find *service* as ``machine.services[name]``. Raises ConfigError when there is one."""
        try:
            self._services.provide(name, service)
        except ConfigError as error:
            raise self._place.error(f'device "{self._asking.device}": {error.problem}') from error
        self._provided.append(name)

    def open(self, kind: str, spec: Any, /, *, instead: Any = None, fits: Callable[[Any], object] | None = None) -> Any:
        """See :meth:`cardcage.device.HostSide.open`. Raises ConfigError."""
        place, asking = place_of(spec, self._place), self._asking
        name, rest = self._choose(kind, spec, place)
        outer, asking.gate = asking.gate, BackendGate(kind) if asking.active else None
        try:
            self.ask("backend", f"{kind}:{name}", ("open",))
            opened = self._make(kind, name, rest, place)
            if asking.gate is not None:
                opened = asking.gate.before(opened)
        finally:
            asking.gate = outer
        with ExitStack() as end:
            end.callback(opened.close)
            if fits is not None:
                fits(opened)
            end.pop_all()
        self.opened.append(opened)
        if instead is not None:
            self.opened.remove(instead)
            instead.close()
        return opened

    def _make(self, kind: str, name: str, rest: dict[str, Any] | str, place: Place) -> Any:
        host, id = self._host, self._asking.device
        if kind == "char" and name == "console":
            self.has_console = True
            return self._console.claim(id)
        offer = host.registry.get(BackendOffer, f"{kind}:{name}", file=place.file, key=place.key)
        options = host.options(offer, rest, file=place.file, key=place.key)
        factory, who = offer.load(), f'{kind} back end "{name}" of device "{id}"'
        card = f"{who} (card {offer.card}, {offer.distribution})"

        def make() -> Any:
            try:
                return factory(self._slot, options) if options is not None else factory(self._slot)
            except OSError as error:
                what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror or error)
                raise place.error(f"{who}: {what}") from error

        made = place.blamed(card, make)
        check_backend(kind, made, card)
        tell_near_misses(made, BACKENDS.get(kind, ()), card, self._slot.log)
        return made

    def _choose(self, kind: str, spec: Any, place: Place) -> tuple[str, dict[str, Any] | str]:
        """The back end's name and what is for it; the default one of its kind takes what names none."""
        registry = self._host.registry
        for offer in registry.offers(BackendOffer):
            if not offer.default or not offer.name.startswith(f"{kind}:"):
                continue
            default = offer.name.removeprefix(f"{kind}:")
            if isinstance(spec, dict) and "type" not in spec:
                return default, dict(spec)
            if isinstance(spec, str) and f"{kind}:{spec.partition(':')[0]}" not in registry.names(BackendOffer):
                return default, spec
        return spec_table(spec, file=place.file, key=place.key)

    def close(self) -> None:
        """Close the back ends, all of them. Raises what the last to fail at it raised."""
        while self._provided:
            self._services.pop(self._provided.pop(), None)
        with ExitStack() as end:
            end.callback(self._asking.close)
            while self.opened:
                end.callback(self.opened.pop().close)
