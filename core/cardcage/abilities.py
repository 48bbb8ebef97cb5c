"""What a device can do beyond ``read`` and ``write``: found once, by method names *and* signatures, with reasons."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from cardcage.backends import BlockInfo, NetFeatures
from cardcage.errors import CardError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cardcage.slot import PluggedDevice

__all__ = ["ABILITIES", "BACKENDS", "abilities_of", "able", "check_backend", "check_signature"]

ABILITIES: dict[str, dict[str, int]] = {
    "plug": {"plug": 1},
    "unplug": {"unplug": 0},
    "reset": {"reset": 0},
    "state": {"save": 0, "load": 1},
    "boot": {"contribute": 1},
    "bus": {"attach": 3},
    "power-button": {"power_button": 0},
    "pause": {"pause": 0, "resume": 0},
}
"""Ability to the methods it takes, each with its number of positional arguments."""

BACKENDS: dict[str, dict[str, int]] = {
    "char": {"start": 1, "write": 1, "close": 0},
    "block": {"readv": 2, "writev": 2, "flush": 0, "discard": 2, "write_zeroes": 2, "close": 0},
    "net": {"start": 1, "send": 2, "resume": 1, "set_offloads": 2, "close": 0},
}
"""Kind of back end to the methods that it must have, as above (:mod:`cardcage.backends`)."""

STATED: dict[str, tuple[str, type]] = {"block": ("info", BlockInfo), "net": ("features", NetFeatures)}
OPTIONAL = {"block": {"try_readv": 2, "try_writev": 2}}
KEYWORDS = {"write_zeroes": ("unmap",)}


def check_signature(owner: Any, method: str, arguments: int, who: str, keywords: tuple[str, ...] = ()) -> Any:
    """Return ``getattr(owner, method)``. Raises CardError, naming *who*, when it is missing or cannot be called so."""
    found = getattr(owner, method, None)
    if not callable(found):
        raise CardError(f"{who}: has no method {method!r}")
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):  # written in C: there is nothing to look at
        return found
    try:
        signature.bind(*[None] * (arguments + isinstance(owner, type)), **dict.fromkeys(keywords))
    except TypeError as error:
        raise CardError(
            f"{who}: {method}{signature} does not take {arguments} positional argument{'s' * (arguments != 1)}"
            f"{''.join(f' and {one}=' for one in keywords)}: {error}"
        ) from error
    return found


def abilities_of(device: Any, who: str) -> frozenset[str]:
    """The abilities of *device* (an instance, or a class for listings).

    Raises CardError for a wrong signature, or one method of a pair.
    """
    found = set()
    for ability, methods in ABILITIES.items():
        present = [name for name in methods if callable(getattr(device, name, None))]
        if ability == "bus" and not isinstance(getattr(device, "bus_type", None), str):
            continue  # "attach" alone is a word that other things use too
        if not present:
            continue
        if len(present) < len(methods):
            missing = next(name for name in methods if name not in present)
            raise CardError(f"{who}: has {present[0]!r} but no {missing!r}")
        for name, arguments in methods.items():
            check_signature(device, name, arguments, who)
        found.add(ability)
    return frozenset(found)


def check_backend(kind: str, backend: Any, who: str) -> None:
    """Hold a back end just made to its protocol's methods. Raises CardError that names *who* and what is missing."""
    for method, arguments in BACKENDS.get(kind, {}).items():
        check_signature(backend, method, arguments, who, KEYWORDS.get(method, ()))
    for method, arguments in OPTIONAL.get(kind, {}).items():
        if hasattr(backend, method):
            check_signature(backend, method, arguments, who)
    if kind in STATED:
        name, cls = STATED[kind]
        if not isinstance(stated := getattr(backend, name, None), cls):
            raise CardError(f"{who}: {name}: expected a cardcage.backends.{cls.__name__}, got {stated!r}")


def able(devices: Mapping[str, PluggedDevice], ability: str) -> list[Any]:
    """The devices of a machine that have *ability*, in the order in which they were plugged in."""
    return [one.device for one in devices.values() if ability in one.abilities]
