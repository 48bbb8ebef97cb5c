"""``pytest --cardcage-card DISTRIBUTION``: the contracts for each offer of a distribution, as tests of their own."""

from __future__ import annotations

import re
import threading
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from cardcage.config import Place, specs_of
from cardcage.device import Pio
from cardcage.errors import CardcageError, ConfigError, near
from cardcage.host import Host
from cardcage.machine import Machine
from cardcage.registry import (
    AcceleratorOffer,
    BackendOffer,
    DeviceOffer,
    DoctorOffer,
    MemoryOffer,
    Offer,
    PolicyKeyOffer,
    SecurityOffer,
)
from cardcage_testing import TestSlot, check_block_backend, check_device, check_memory_backend

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cardcage.host import BrokenCard

__all__ = ["Suite", "collected"]

MEMORY = "16M"
"""Of the machines that devices are plugged into."""
PORT, ADDRESS, IRQ = 0x2A0, 0xD0000000, 10
"""Where a device is that has no place of its own."""


def collected(session: pytest.Session, distribution: str) -> list[pytest.Item]:
    """The tests of *distribution*. Raises UsageError where none of the installed cards is of it."""
    host = Host()
    session.config.add_cleanup(host.close)
    offers = [one for one in host.registry if _plain(one.distribution) == _plain(distribution)]
    broken = [one for one in host.broken if _plain(one.distribution) == _plain(distribution)]
    if not offers and not broken:
        named = [one.distribution for one in host.cards] + [one.distribution for one in host.broken]
        known = {one.partition(" ")[0] for one in named}
        hint = near(distribution, known) or f" Installed: {', '.join(sorted(known))}."
        raise pytest.UsageError(f'--cardcage-card: no card of a distribution "{distribution}" is installed.{hint}')
    suite: Suite = Suite.from_parent(session, name=distribution, nodeid=f"card:{distribution}")
    suite.fill(host, offers, broken, _options(session.config))
    return list(suite.collect())


def _plain(distribution: str) -> str:
    """A distribution's name as PyPI compares it, without the version that a registry puts behind it."""
    return re.sub(r"[-_.]+", "-", distribution.partition(" ")[0]).lower()


def _options(config: pytest.Config) -> dict[str, str]:
    """Options by the name of an offer, from the ini-file."""
    found = {}
    for line in config.getini("cardcage_options"):
        name, colon, text = line.rpartition(": ")
        if not colon:
            raise pytest.UsageError(f'cardcage_options: expected "NAME: key=value,...", got "{line}"')
        found[name.strip()] = text.strip()
    return found


class Contract(pytest.Item):
    """One contract of one offer."""

    check: Callable[[], object]
    offer: Offer | None = None

    def runtest(self) -> None:
        """Hold it to the contract."""
        self.check()

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The reason of a failure, in the kit's own words; a traceback for anything else."""
        if isinstance(excinfo.value, AssertionError | CardcageError):
            where = f"\n{self.offer.where}: offered here" if self.offer is not None and self.offer.where else ""
            return f"{excinfo.value}{where}"
        return super().repr_failure(excinfo, style)

    def reportinfo(self) -> tuple[Any, int | None, str]:
        """The line that offered it."""
        file, _, line = self.offer.where.rpartition(":") if self.offer is not None else ("", "", "")
        return file or self.path, int(line) - 1 if line.isdigit() else None, self.nodeid


class Suite(pytest.Collector):
    """All contracts of one distribution."""

    def fill(self, host: Host, offers: list[Offer], broken: list[BrokenCard], options: dict[str, str]) -> None:
        """Say what it is about."""
        self._host, self._offers, self._broken, self._options = host, offers, broken, options

    def collect(self) -> Iterator[pytest.Item]:
        """A test for each offer's import, and one for each contract that there is for its kind."""
        for one in self._broken:
            yield self._item(f"card {one.name}-loads", partial(_broken, one), None)
        for offer in self._offers:
            if isinstance(offer, DoctorOffer | PolicyKeyOffer):
                continue
            name = offer.name if offer.name.startswith(f"{offer.kind}:") else f"{offer.kind} {offer.name}"
            yield self._item(f"{name}-loads", partial(_loads, offer), offer)
            for part, check in self._contracts(offer):
                yield self._item(f"{name}-{part}", check, offer)

    def _item(self, name: str, check: Callable[[], object], offer: Offer | None) -> pytest.Item:
        item: Contract = Contract.from_parent(self, name=name)
        item.check, item.offer = check, offer
        return item

    def _contracts(self, offer: Offer) -> Iterator[tuple[str, Callable[[], object]]]:
        """Names and checks for an offer of its kind."""
        make = partial(self._make, offer)
        if isinstance(offer, DeviceOffer):
            if offer.bus == "system":
                yield "contract", lambda: check_device(make, *offer.regions)
            yield "machine", lambda: self._plugged(offer)
        elif isinstance(offer, BackendOffer) and offer.name.startswith("block:"):
            yield "contract", lambda: check_block_backend(lambda: self._opened(offer))
        elif isinstance(offer, MemoryOffer):
            yield "contract", lambda: check_memory_backend(make)
        elif isinstance(offer, AcceleratorOffer):
            yield from _programs(offer)
        elif isinstance(offer, SecurityOffer):
            yield "contract", lambda: self._checker(offer)
        else:
            yield from _more(offer, make)

    def _options_of(self, offer: Offer) -> Any:
        """Its options: those of the ini-file. Skips the test where it needs some and has none."""
        text = self._options.get(offer.name)
        try:
            return self._host.options(offer, text or {}, file="cardcage_options", key=offer.name)
        except ConfigError as error:
            if text is not None:
                raise
            pytest.skip(f'give options by cardcage_options = ["{offer.name}: key=value,..."] ({error.problem})')

    def _make(self, offer: Offer) -> Any:
        options = self._options_of(offer)
        factory = offer.load()
        return factory() if options is None else factory(options)

    def _opened(self, offer: Offer) -> Any:
        options, slot = self._options_of(offer), TestSlot()
        return offer.load()(slot, options) if options is not None else offer.load()(slot)

    def _plugged(self, offer: DeviceOffer) -> None:
        """A machine is built with it, and closed, and no thread is left."""
        self._options_of(offer)
        text = self._options.get(offer.name)
        table = self._host.expand(offer, text) if text else {}
        for region in offer.regions:
            if region.base is None:
                place = ("port", PORT) if isinstance(region, Pio) else ("address", ADDRESS)
                table = {place[0]: place[1], "irq": IRQ, **table}
        threads = set(threading.enumerate())
        with Machine(memory=MEMORY, devices=[{"type": offer.name, "id": "checked", **table}], host=self._host) as vm:
            assert "checked" in vm.devices
        left = sorted(one.name for one in set(threading.enumerate()) - threads)
        assert not left, f"{offer.who}: threads are left when its machine is closed: {', '.join(left)}"

    def _checker(self, offer: Offer) -> None:
        self._options_of(offer)
        spec = {"type": offer.name, **self._host.expand(offer, self._options.get(offer.name, ""))}
        self._host.make_checker(specs_of(spec, Place())[0])


def _broken(card: BrokenCard) -> None:
    raise AssertionError(str(card))


def _loads(offer: Offer) -> None:
    """What it names can be imported and called, and its options have a class."""
    found = offer.load()
    assert callable(found) or isinstance(found, property), f"{offer.who}: {found!r} cannot be called"
    offer.load_options()
    offer.load_shorthand()


def _programs(offer: Offer) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each conformance program is a test."""
    from cardcage_conformance.accelerator import check_program, programs

    def run(program: Any) -> None:
        accelerator = offer.load()()
        probe = accelerator.probe()
        if not probe.usable:
            pytest.skip(probe.reason)
        if skipped := check_program(accelerator, program):
            pytest.skip(skipped)

    for one in programs():
        yield one.name, partial(run, one)


def _more(offer: Offer, make: Callable[[], Any]) -> Iterator[tuple[str, Callable[[], object]]]:
    """Kinds of cards that have their contract with them."""
    from cardcage_boot import GuestProgramOffer
    from cardcage_fleet import AdmissionOffer
    from cardcage_memory_policies import PolicyOffer

    if isinstance(offer, PolicyOffer):
        from cardcage_memory_policies.testing import check_policy

        yield "contract", lambda: check_policy(make)
    elif isinstance(offer, AdmissionOffer):
        from cardcage_fleet.testing import check_admission

        yield "contract", lambda: check_admission(make)
    elif isinstance(offer, GuestProgramOffer):
        yield "program", lambda: _static(offer, make())


def _static(offer: Offer, data: Any) -> None:
    """A static executable for x86-64."""
    from cardcage_boot.elf import EM_X86_64, read_elf
    from cardcage_boot.files import BootFile

    assert isinstance(data, bytes), f"{offer.who}: gave {type(data).__name__}, expected bytes"
    file = BootFile(offer.name, data, "program")
    found = read_elf(file)
    assert file.u16(18, "the ELF machine") == EM_X86_64, f"{offer.who}: no program for x86-64"
    assert not found.interpreter, f"{offer.who}: needs {found.interpreter!r}: expected a static executable"
