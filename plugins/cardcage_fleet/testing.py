"""``check_admission``: the contract of :class:`~cardcage_fleet.admission.Admission`."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

from cardcage.errors import ConfigError

from cardcage_fleet.admission import Room, Starter
from cardcage_fleet.hostmemory import MemoryLimit

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_fleet.admission import Admission

__all__ = ["check_admission"]

GIB = 1 << 30


def check_admission(make: Callable[[], Admission]) -> None:
    """Hold what *make* gives to the contract, over hosts and cgroups of many kinds. Raises AssertionError."""
    answers: dict[tuple[Starter, tuple[Room, ...]], str] = {}
    for turn in range(2):
        policy = make()
        for case in _cases():
            answer = _answer(policy, *case)
            assert answers.setdefault(case, answer) == answer, (
                f"{case}: turn {turn} gave a different answer from before"
            )


def _answer(policy: Admission, request: Starter, rooms: tuple[Room, ...]) -> str:
    """Empty when it is admitted, else why not."""
    try:
        given = policy.admit(request, rooms)  # type: ignore[func-returns-value]  # a stranger may return something
    except ConfigError as error:
        said = str(error)
        assert len(said.splitlines()) == 1, f"{request}: the refusal is not one line: {said!r}"
        assert request.name in said, f"{request}: the refusal does not name the machine: {said!r}"
        return said
    except Exception as error:  # whatever else it raises is what this check is for
        raise AssertionError(f"{request}, {rooms}: raised {error!r}; a refusal is a ConfigError") from error
    assert given is None, f"{request}: admit() returned {given!r}"
    return ""


def _cases() -> list[tuple[Starter, tuple[Room, ...]]]:
    hosts = [Room(MemoryLimit("the host", "", size, free)) for size, free in ((0, 0), (GIB, 0), (24 * GIB, 20 * GIB))]
    hosts += [Room(one.limit, machines, machines * GIB) for one in hosts for machines in (1, 100)]
    group = Room(MemoryLimit("cgroup /a", "/a", 2 * GIB, GIB), 1, GIB)
    places = [(), *((one,) for one in hosts), *((one, group) for one in hosts)]
    requests = [
        Starter("lab", size, priority) for size, priority in ((0, 0), (1 << 20, -100), (GIB, 100), (1 << 60, 0))
    ]
    return list(product(requests, places))
