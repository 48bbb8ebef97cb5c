"""Admission policies: what of the host's memory may be promised to machines."""

from __future__ import annotations

from typing import TYPE_CHECKING

from attrs import field, frozen
from attrs.validators import ge
from cardcage.errors import ConfigError
from cardcage.units import Size, say_size

if TYPE_CHECKING:
    from cardcage_fleet.admission import Room, Starter

__all__ = ["Open", "Ratio", "RatioOptions", "Strict", "StrictOptions"]


@frozen
class StrictOptions:
    """Options of admission ``strict``.

    Attributes:
        reserve: what the host, and each cgroup with a limit, keeps for others. overhead: what a machine's VMM itself
            may take, counted for each machine.
    """

    reserve: Size = field(default=Size("256M"))
    overhead: Size = field(default=Size("64M"))


@frozen
class RatioOptions:
    """Options of admission ``ratio``.

    Attributes:
        ratio: how often what there is may be promised. reserve, overhead: as for ``strict``.
        free: what must be free at the start, besides the VMM's overhead: a machine that cannot get that is refused now
            instead of being ended later.
    """

    ratio: float = field(default=1.5, validator=ge(0.01))
    reserve: Size = field(default=Size("256M"))
    overhead: Size = field(default=Size("64M"))
    free: Size = field(default=Size("256M"))


class Strict:
    """The sizes of all machines, and their VMMs, fit into what there is: no guest can ever want for memory."""

    def __init__(self, options: StrictOptions) -> None:
        self.options = options

    def admit(self, request: Starter, rooms: tuple[Room, ...], /) -> None:
        for room in rooms:
            within(request, room, 1.0, self.options.reserve, self.options.overhead)


class Ratio:
    """The sizes add up to at most a multiple of what there is, and the machine finds room to begin in."""

    def __init__(self, options: RatioOptions) -> None:
        self.options = options

    def admit(self, request: Starter, rooms: tuple[Room, ...], /) -> None:
        options = self.options
        for room in rooms:
            within(request, room, options.ratio, options.reserve, options.overhead)
            wanted = min(options.free, request.size) + options.overhead
            if room.limit.available < wanted:
                raise ConfigError(
                    f'"{request.name}" does not start: {room.limit.name} has {say_size(room.limit.available)} of '
                    f"{say_size(room.limit.size)} free, and {say_size(wanted)} are asked for"
                )


class Open:
    """Each machine may start. Its size is counted for those that ask more."""

    def admit(self, request: Starter, rooms: tuple[Room, ...], /) -> None:
        return


def within(request: Starter, room: Room, ratio: float, reserve: int, overhead: int) -> None:
    """Refuse what makes the promises in *room* more than *ratio* times what it has beyond *reserve*, with numbers."""
    promised = room.promised + room.machines * overhead
    most = int(max(0, room.limit.size - reserve) * ratio)
    if promised + request.size + overhead <= most:
        return
    raise ConfigError(
        f'"{request.name}" does not start: it wants {say_size(request.size)} and {say_size(overhead)} for its VMM; '
        f"{room.limit.name} has {say_size(room.limit.size)}, keeps {say_size(reserve)}, and may promise "
        f"{say_size(most)}, of which {room.machines} machine{'s' * (room.machines != 1)} took {say_size(promised)}: "
        f"{say_size(max(0, most - promised))} are left"
    )
