"""The calls of a machine for ``await``, under asyncio and trio.

Each runs in a thread of its own, so that any number of them wait at once. A task that is cancelled goes on at once:
its command is killed, any other call is left to its own end, which comes with its timeout or the machine's.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from contextlib import suppress
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from cardcage.machine import Machine as PlainMachine
from cardcage.waiting import Event

from cardcage_agent.files import Files
from cardcage_agent.verbs import Agent, Verbs

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

    from cardcage_agent.process import Popen

__all__ = ["Aio", "AioAgent", "AioFiles"]

P = ParamSpec("P")
T = TypeVar("T")


async def in_thread(call: Callable[[], T]) -> T:
    """The result of *call*, from a thread of its own; when this is cancelled, the thread is left to itself."""
    sniffio: Any = sys.modules.get("sniffio")  # which trio brings
    if sniffio is not None and sniffio.current_async_library() == "trio":
        trio: Any = sys.modules["trio"]
        result: T = await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=trio.CapacityLimiter(1))
        return result
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(result: Any, error: BaseException | None) -> None:
        if not future.done():
            future.set_exception(error) if error is not None else future.set_result(result)

    def work() -> None:
        result: Any = None
        error: BaseException | None = None
        try:
            result = call()
        except BaseException as problem:  # whatever it is, it is for who awaits it
            error = problem
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name="cardcage-aio", daemon=True).start()
    return await future


def _awaited(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """The same for ``await``, as a method of a class whose ``_of`` is what *method* belongs to."""

    @wraps(method)
    async def wait(self: Any, /, *values: P.args, **keys: P.kwargs) -> T:
        return await in_thread(lambda: getattr(self._of(), method.__name__)(*values, **keys))

    return wait


def _run(method: Callable[Concatenate[Any, P], T]) -> Callable[Concatenate[Any, P], Coroutine[Any, Any, T]]:
    """The same for ``run``, whose command is killed when its task is cancelled."""
    act: Callable[..., T] = method  # which has a keyword that its callers do not see

    @wraps(method)
    async def wait(self: Any, /, *values: P.args, **keys: P.kwargs) -> T:
        given_up = Event()
        begun: list[Popen] = []

        def started(process: Popen) -> None:
            begun.append(process)
            if given_up.is_set():
                process.close()

        try:
            return await in_thread(partial(act, self._of(), *values, **keys, _started=started))
        except BaseException:
            given_up.set()
            for one in begun:
                one.close()
            raise

    return wait


class _Awaited:
    """Calls of what *of* gives, which is asked for in their threads: it may have to wait for the agent."""

    def __init__(self, of: Callable[[], Any]) -> None:
        self._of = of


class AioFiles(_Awaited):
    """:class:`~cardcage_agent.files.Files` for ``await``."""

    read = _awaited(Files.read)
    read_text = _awaited(Files.read_text)
    write = _awaited(Files.write)
    list = _awaited(Files.list)
    stat = _awaited(Files.stat)
    exists = _awaited(Files.exists)
    rename = _awaited(Files.rename)
    symlink = _awaited(Files.symlink)
    readlink = _awaited(Files.readlink)
    mkdir = _awaited(Files.mkdir)
    remove = _awaited(Files.remove)


class AioAgent(_Awaited):
    """:class:`~cardcage_agent.verbs.Agent` for ``await``."""

    wait = _awaited(Agent.wait)
    ping = _awaited(Agent.ping)
    set_time = _awaited(Agent.set_time)
    reseed = _awaited(Agent.reseed)
    freeze = _awaited(Agent.freeze)
    thaw = _awaited(Agent.thaw)


class Aio(_Awaited):
    """The calls of a machine that wait, for ``await``: the same names, arguments, results and errors."""

    def __init__(self, machine: Any) -> None:
        super().__init__(lambda: machine)
        self.files, self.agent = AioFiles(lambda: machine.files), AioAgent(lambda: machine.agent)

    run = _run(Verbs.run)
    popen = _awaited(Verbs.popen)
    put = _awaited(Verbs.put)
    get = _awaited(Verbs.get)
    start = _awaited(PlainMachine.start)
    pause = _awaited(PlainMachine.pause)
    resume = _awaited(PlainMachine.resume)
    reset = _awaited(PlainMachine.reset)
    stop = _awaited(PlainMachine.stop)
    wait = _awaited(PlainMachine.wait)
    close = _awaited(PlainMachine.close)

    async def call(self, function: Callable[P, T], /, *values: P.args, **keys: P.kwargs) -> T:
        """The result of *function*, such as ``process.wait`` or ``vm.console.expect``, from a thread of its own."""
        return await in_thread(partial(function, *values, **keys))
