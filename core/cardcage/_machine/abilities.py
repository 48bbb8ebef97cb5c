"""The protocols that the kernel looks for in what cards make (:mod:`cardcage.abilities` says how)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cardcage.abilities import TellsNearMisses, has, near_misses, require
from cardcage.accelerator import Accelerator, Parkable
from cardcage.backends import BlockBackend, BlockInfo, CharBackend, NetBackend, NetFeatures, TryReads, TryWrites
from cardcage.boot import BootContributor
from cardcage.device import (
    DetachingBus,
    DeviceBus,
    Forkable,
    HasState,
    Pausable,
    Pluggable,
    PowerButton,
    Resettable,
    TextOutput,
    Unpluggable,
)
from cardcage.errors import CardError
from cardcage.ram import MemoryBackend
from cardcage.registry import AcceleratorOffer, BackendOffer, DeviceOffer, MemoryOffer, SecurityOffer
from cardcage.security import CHECKER, HasNeeds

if TYPE_CHECKING:
    from cardcage.registry import Offer

ABILITIES: dict[str, Any] = {
    "plug": Pluggable,
    "unplug": Unpluggable,
    "reset": Resettable,
    "state": HasState,
    "boot": BootContributor,
    "bus": DeviceBus,
    "detach": DetachingBus,
    "power-button": PowerButton,
    "text-output": TextOutput,
    "pause": Pausable,
    "park": Parkable,
    "fork": Forkable,
    "needs": HasNeeds,
}
"""A word for each ability of a device, to its protocol."""

BACKENDS: dict[str, tuple[Any, ...]] = {
    "char": (CharBackend, HasNeeds),
    "block": (BlockBackend, TryReads, TryWrites, HasNeeds),
    "net": (NetBackend, HasNeeds),
}
"""Kind of back end to the protocol that it must have, then those that it may have."""

STATED: dict[str, tuple[str, type]] = {"block": ("info", BlockInfo), "net": ("features", NetFeatures)}

KINDS: dict[Any, tuple[Any, ...]] = {
    DeviceOffer: tuple(ABILITIES.values()),
    AcceleratorOffer: (Accelerator,),
    MemoryOffer: (MemoryBackend, HasNeeds),
    SecurityOffer: CHECKER,
}
"""Kind of offer to the protocols of its product, beside back ends."""


def abilities_of(device: Any, who: str) -> frozenset[str]:
    """The abilities of *device* (an instance, or a class for listings).

    Raises CardError for a wrong signature, or one method of a pair.
    """
    return frozenset(word for word, protocol in ABILITIES.items() if has(device, protocol, who))


def near_misses_of(offer: Offer, made: Any) -> list[str]:
    """Near misses in the product of *offer*, as far as *made*, its factory, tells."""
    if not isinstance(made, type):
        return made.near_misses() if has(made, TellsNearMisses, offer.who) else []
    if isinstance(offer, BackendOffer):
        return near_misses(made, BACKENDS.get(offer.name.partition(":")[0], ()))
    return near_misses(made, KINDS.get(type(offer), offer.protocols()))


def check_backend(kind: str, backend: Any, who: str) -> None:
    """Hold a back end just made to its protocol. Raises CardError that names *who* and what is missing."""
    for at, protocol in enumerate(BACKENDS.get(kind, ())):
        if at:
            has(backend, protocol, who)
        else:
            require(backend, protocol, who)
    if kind in STATED:
        name, cls = STATED[kind]
        if not isinstance(stated := getattr(backend, name, None), cls):
            raise CardError(f"{who}: {name}: expected a cardcage.backends.{cls.__name__}, got {stated!r}")
