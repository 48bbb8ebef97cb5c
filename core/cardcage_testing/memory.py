"""``check_memory``: the contract of :class:`~cardcage.memory.GuestMemory`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.memory import GuestMemoryError

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.memory import GuestMemory

__all__ = ["check_memory"]


def check_memory(memory: GuestMemory, address: int, size: int) -> None:
    """Hold *memory* to the contract, on the *size* bytes (at least 64) of RAM from *address*, after which none follows.

    Raises AssertionError with what it broke. The bytes there are overwritten.
    """
    data = bytes(range(64))
    memory.write(address, data)
    assert memory.read(address, 64) == data, "read does not return what was written"
    assert bytes(memory.view(address + 1, 62)) == data[1:63], "a view does not show what was written"
    memory.view(address, 4)[:] = b"view"
    memory.written(address, 4)
    memory.written_many([(address, 1), (address + 8, 2)])
    memory.written_many([])
    assert memory.read(address, 5) == b"view\x04", "writing through a view does not show, or spills"
    assert memory.read(address, 0) == b"", "an empty read returns data"
    assert memory.contains(address, size), "contains() denies RAM"
    end = address + size
    memory.write(end - 4, b"\xff" * 4)
    assert not memory.contains(end - 1, 2), "contains() claims what is past the end"
    acts: tuple[tuple[str, Callable[[], object]], ...] = (
        ("read past the end", lambda: memory.read(end - 2, 4)),
        ("read at the end", lambda: memory.read(end, 1)),
        ("write past the end", lambda: memory.write(end - 2, b"1234")),
        ("view past the end", lambda: memory.view(end - 2, 4)),
        ("view of a size below 0", lambda: memory.view(address, -1)),
        ("read of a size below 0", lambda: memory.read(address, -1)),
        ("read far away", lambda: memory.read(1 << 60, 8)),
        ("read below 0", lambda: memory.read(-1, 1)),
    )
    for what, act in acts:
        try:
            act()
        except GuestMemoryError:
            continue
        raise AssertionError(f"{what}: expected GuestMemoryError")
    assert memory.read(end - 4, 4) == b"\xff" * 4, "a write that was refused changed memory"
