"""Limits: a machine enters the ledger while it is locked, if each limit lets it."""

import os
from functools import partial
from typing import Protocol
from weakref import WeakKeyDictionary

from attrs import field, frozen
from attrs.validators import ge
from cardcage.config import specs_of
from cardcage.errors import ConfigError, HostError
from cardcage.machine import Machine

from ledger_card import LimitOffer
from ledger_card.ledger import Entry, Ledger, Record


class Limit(Protocol):
    """What the factory of a :class:`ledger_card.LimitOffer` gives."""

    def check(self, entry: Entry, others: list[Entry], /) -> None:
        """Raise ConfigError to refuse the machine of *entry*; *others* live already."""


@frozen
class MostOptions:
    """``machines``: how many of them may live at once."""

    machines: int = field(default=8, validator=ge(1))


class Most:
    """At most so many machines of one user."""

    def __init__(self, options: MostOptions) -> None:
        self.options = options

    def check(self, entry: Entry, others: list[Entry], /) -> None:
        if len(others) >= self.options.machines:
            raise ConfigError(f'"{entry.name}" does not start: {len(others)} of {self.options.machines} machines live')


def admit(machine: Machine) -> None:
    """Ask the limits, and enter the machine until it has closed."""
    limits = []
    for spec in specs_of(machine.config.policy.get("ledger", []), machine.config.place("policy.ledger")):
        limit: Limit = machine.host.make(LimitOffer, spec)
        offer = machine.host.registry.get(LimitOffer, spec.name)
        limits.append((partial(spec.place.blamed, offer.who), limit))
    entry = Entry(machine.name, os.getpid(), machine.config.machine.memory)
    try:
        ledger = Ledger()
    except HostError as error:
        if limits:
            raise
        machine.log.warning("not in the ledger", reason=str(error))
        return
    with ledger.locked():
        others, _ = ledger.read()
        for blamed, limit in limits:
            blamed(partial(limit.check, entry, others))
        record = Record(ledger, entry)
    _keep(machine, record)


def _keep(machine: Machine, record: Record) -> None:
    machine.host.share("ledger:records", WeakKeyDictionary)[machine] = record
    machine.defer(record.close)
    machine.observers.add("state", record.update)


def forked(machine: Machine) -> None:
    """Enter a copy of a machine in its own process: the entry that is there is its parent's."""
    known: WeakKeyDictionary[Machine, Record] = machine.host.share("ledger:records", WeakKeyDictionary)
    if (record := known.get(machine)) is not None:
        record.abandon()
        ledger = Ledger()
        with ledger.locked():
            _keep(machine, Record(ledger, Entry(machine.name, os.getpid(), machine.config.machine.memory)))
