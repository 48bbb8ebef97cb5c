"""An admission policy: it sees the host and each cgroup with a limit, and the machines in them."""

from attrs import frozen
from cardcage.errors import ConfigError
from cardcage_fleet.admission import Room, Starter


@frozen
class CountOptions:
    most: int = 8


class Count:
    def __init__(self, options: CountOptions) -> None:
        self.options = options

    def admit(self, request: Starter, rooms: tuple[Room, ...], /) -> None:
        for room in rooms:
            if room.machines >= self.options.most:
                raise ConfigError(f'"{request.name}": {room.limit.name} has {room.machines} machines already')
