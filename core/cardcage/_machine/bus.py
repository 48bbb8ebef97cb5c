"""A bus: a sorted map of disjoint address ranges to what answers there.

Access-split rules: an access inside one range goes to it whole, with the offset from the range's start; one that
reaches past a range's end, or starts where nothing answers, is done byte by byte; bytes that nobody claims read as
0xFF and swallow writes (the open bus of a PC).
"""

from __future__ import annotations

from bisect import bisect_right, insort
from typing import TYPE_CHECKING

from attrs import Factory, field

from cardcage.errors import CardError, ConfigError, UsageError
from cardcage.values import frozen

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BITS = tuple(range(0, 72, 8))
MASKS = tuple((1 << 8 * size) - 1 for size in range(9))


class TakenError(ConfigError):
    """A range overlaps another, or leaves the bus: the configuration's fault, or that of the guest, who moves it."""


@frozen(order=False)
class Claim:
    """A range of a bus.

    Attributes:
        base: first address. size: bytes, at least 1.
        read: ``read(offset, size) -> int``; sizes 1, 2, 4, 8.
        write: ``write(offset, size, value)``.
        name: whose it is, for errors and listings.
    """

    base: int
    size: int
    read: Callable[[int, int], int]
    write: Callable[[int, int, int], None]
    name: str = ""
    end: int = field(init=False, default=Factory(lambda self: self.base + self.size, takes_self=True))
    """First address past the range; kept, because every access asks for it."""


class Bus:
    """Ranges of one address space, ``width`` bits wide (16 for ports, up to 64 for memory).

    Lookups are lock-free for readers: the tables are replaced, never changed in place.

    Args:
        misread: told ``(claim, offset, size, value)`` of a value that does not fit, of which the lowest bytes count.
    """

    def __init__(self, name: str, width: int, misread: Callable[..., None] = lambda *_: None) -> None:
        self.name, self.limit, self._misread = name, 1 << width, misread
        self._claims: list[Claim] = []
        self._bases: list[int] = []
        self._cache: dict[int, Claim] = {}

    def __iter__(self) -> Iterator[Claim]:
        return iter(self._claims)

    def add(self, claim: Claim) -> None:
        """Add a range. Raises :exc:`TakenError` when it overlaps one or leaves the bus."""
        if claim.size < 1 or claim.base < 0 or claim.end > self.limit:
            raise TakenError(f"{claim.name}: {self._span(claim)} is outside the {self.name} bus")
        at = bisect_right(self._bases, claim.base)
        for other in self._claims[max(at - 1, 0) : at + 1]:
            if claim.base < other.end and other.base < claim.end:
                raise TakenError(
                    f"{claim.name}: {self.name} {self._span(claim)} overlaps {other.name} at {self._span(other)}"
                )
        claims = self._claims.copy()
        insort(claims, claim, key=lambda one: one.base)
        self._replace(claims)

    def remove(self, claim: Claim) -> None:
        """Take exactly this range away. Raises :exc:`~cardcage.errors.UsageError` when it is not there."""
        if not any(one is claim for one in self._claims):
            raise UsageError(f"{claim.name}: not on the {self.name} bus")
        self._replace([one for one in self._claims if one is not claim])

    def _replace(self, claims: list[Claim]) -> None:
        self._bases, self._claims, self._cache = [one.base for one in claims], claims, {}

    @staticmethod
    def _span(claim: Claim) -> str:
        return f"{claim.base:#x}-{claim.end - 1:#x}"

    def find(self, address: int) -> Claim | None:
        """The range that holds *address*."""
        claims, bases = self._claims, self._bases
        at = bisect_right(bases, address) - 1
        if 0 <= at < len(claims) and claims[at].base <= address < claims[at].end:
            return claims[at]
        return None

    def owner(self, address: int) -> str:
        """The name of the range that holds *address*, or nothing."""
        return claim.name if (claim := self.find(address)) is not None else ""

    def read(self, address: int, size: int) -> int:
        """Read *size* bytes, little-endian."""
        claim = self._cache.get(address)
        if claim is None:
            claim = self.find(address)
            if claim is None:
                return self._split_read(address, size)
            self._remember(address, claim)
        if address + size > claim.end:
            return self._split_read(address, size)
        value = claim.read(address - claim.base, size)
        try:
            if not value >> BITS[size]:
                return value
        except TypeError as error:
            at = f"{claim.name or claim}: read({address - claim.base:#x}, {size})"
            raise CardError(f"{at} gave {value!r}, expected a whole number") from error
        self._misread(claim, address - claim.base, size, value)
        return value & MASKS[size]

    def write(self, address: int, size: int, value: int) -> None:
        """Write *size* bytes, little-endian."""
        claim = self._cache.get(address)
        if claim is None:
            claim = self.find(address)
            if claim is None:
                return self._split_write(address, size, value)
            self._remember(address, claim)
        if address + size > claim.end:
            return self._split_write(address, size, value)
        return claim.write(address - claim.base, size, value)

    def _remember(self, address: int, claim: Claim) -> None:
        if len(self._cache) > 4096:  # a guest that scans must not make us grow
            self._cache = {}
        self._cache[address] = claim

    def _split_read(self, address: int, size: int) -> int:
        if size == 1:
            return 0xFF
        found = (self.read((address + at) % self.limit, 1) << 8 * at for at in range(size))
        return sum(found)

    def _split_write(self, address: int, size: int, value: int) -> None:
        if size > 1:
            for at in range(size):
                self.write((address + at) % self.limit, 1, value >> 8 * at & 0xFF)
