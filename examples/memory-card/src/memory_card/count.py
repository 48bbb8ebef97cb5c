"""An admission policy: it sees the host and each cgroup with a limit, and the machines in them."""

from attrs import frozen
from cardcage.admission import Request, Room
from cardcage.errors import ConfigError


@frozen
class CountOptions:
    most: int = 8


class Count:
    def __init__(self, options: CountOptions) -> None:
        self.options = options

    def admit(self, request: Request, rooms: tuple[Room, ...], /) -> None:
        for room in rooms:
            if room.machines >= self.options.most:
                raise ConfigError(f'"{request.name}": {room.limit.name} has {room.machines} machines already')
