"""A function in many sandboxes, wherever a cluster has room: Ray places, tries again, and brings results."""

from __future__ import annotations

import os
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from cardcage.errors import HostError, MissingExtra
from cardcage_sandbox import Sandbox
from cardcage_sandbox.template import load_template

try:
    import ray
    from ray.experimental import tqdm_ray
except ImportError as error:
    raise MissingExtra(f"cardcage_ray needs {error.name}: pip install 'cardcage[ray]'") from error

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from cardcage_sandbox import Template

__all__ = ["map"]

T = TypeVar("T")
R = TypeVar("R")


def map(
    function: Callable[[Sandbox, T], R],
    guests: Iterable[T],
    *,
    template: str | os.PathLike[str] | Template = "base",
    retries: int = 3,
    timeout: float = 3600,
    most: int = 1000,
    progress: bool = False,
    **limits: Any,
) -> Iterator[tuple[T, R]]:
    """Call *function* with a sandbox of its own for each of *guests*; pairs of a guest and its result, as they come.

    The same program runs on a laptop and on a cluster, whichever ``ray.init`` joined. Each call asks Ray for the
    template's memory and processors, and is made anew where its node, or its sandbox's host, failed.

    Args:
        function: of a sandbox and a guest. It and its results are sent by Ray (cloudpickle).
        guests: anything, one for each call.
        template: as :meth:`Sandbox.create` has it; a file is read here, what it names has to be there on each node.
        retries: how often a call is made anew. What *function* itself raises is raised here.
        timeout: seconds that a sandbox lives: of a node that is lost, its sandboxes end by that.
        most: calls that Ray has at once. progress: show a bar (``ray.experimental.tqdm_ray``).
        limits: memory, disk, cpus, egress, in place of the template's.

    Raises ConfigError for a wrong template, and what a call raised (``ray.exceptions.RayTaskError``).
    """
    chosen = load_template(template).with_limits(**limits)
    call = ray.remote(_call).options(
        num_cpus=chosen.cpus, memory=int(chosen.memory), max_retries=retries, retry_exceptions=[HostError]
    )
    waiting: dict[Any, T] = {}
    left = iter(guests)
    bar = tqdm_ray.tqdm(desc=chosen.name, unit="guest") if progress else None
    try:
        while True:
            for guest in islice(left, most - len(waiting)):
                waiting[call.remote(function, guest, chosen, timeout)] = guest
            if not waiting:
                return
            (done, *_), _ = ray.wait(list(waiting))
            guest = waiting.pop(done)
            if bar is not None:
                bar.update(1)
            yield guest, ray.get(done)
    finally:
        for one in waiting:
            ray.cancel(one)
        if bar is not None:
            bar.close()


def _call(function: Callable[[Sandbox, T], R], guest: T, template: Template, timeout: float) -> R:
    """One call, on whichever node."""
    with Sandbox.create(template, timeout=timeout) as sandbox:
        return function(sandbox, guest)
