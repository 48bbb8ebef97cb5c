"""The verbs of a machine whose guest has our agent, and the class that has them for type checkers."""

from __future__ import annotations

import os
import re
import time
from subprocess import PIPE, CalledProcessError, CompletedProcess, TimeoutExpired
from typing import TYPE_CHECKING, Any, Literal, overload

from cardcage.errors import UsageError
from cardcage.machine import Machine as PlainMachine

from cardcage_agent.errors import AgentError
from cardcage_agent.files import SILENCE, Files
from cardcage_agent.frames import Verb
from cardcage_agent.link import nobody as _nobody
from cardcage_agent.process import LIMIT, PATIENCE, REQUEST, Popen, guest_error, strings
from cardcage_agent.reach import nanoseconds, reach
from cardcage_agent.trees import get_file, get_tree, put_file, put_tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path
    from typing import Self

    from cardcage.host import Host

    from cardcage_agent.aio import Aio
    from cardcage_agent.link import Link
    from cardcage_agent.process import Command
    from cardcage_agent.qga import Qga

__all__ = ["Agent", "Machine", "Verbs", "link_of"]

SEED = 256
"""Bytes of new randomness."""


def link_of(machine: PlainMachine, verb: str, timeout: float | None, most: float = PATIENCE) -> Link:
    """The link to the agent of *machine*, once that has greeted.

    Raises StateError for a machine that has no port for it, or is not running; NoAgent after *timeout* seconds, by
    default and at most *most*; Denied; what ended the machine.
    """
    missing = (
        "an agent: Machine.debian() makes a machine that has one, Machine.image() too, "
        'and so does a virtio-console port named "org.cardcage.agent.0" with char = "agent"'
    )
    link: Link = reach(machine, "agent", verb, missing)
    link.await_agent(most if timeout is None else min(timeout, most))
    return link


class Agent:
    """The agent itself: whether it answers, and what it sets in its guest."""

    def __init__(self, machine: PlainMachine) -> None:
        self._machine = machine

    def wait(self, timeout: float = PATIENCE) -> None:
        """Wait until the guest is up as far as its agent. Raises NoAgent after *timeout* seconds."""
        link_of(self._machine, "wait", timeout, timeout)

    def ping(self, timeout: float | None = SILENCE) -> float:
        """Seconds that an answer takes. Raises AgentTimeout."""
        link = link_of(self._machine, "ping", timeout)
        began = time.monotonic()
        self._ask(link, Verb.PING, b"", 0, timeout)
        return time.monotonic() - began

    def set_time(self, seconds: float | None = None, timeout: float | None = SILENCE) -> None:
        """Set the guest's clock: seconds since 1970, from 0; by default this host's time."""
        link = link_of(self._machine, "set_time", timeout)
        self._ask(link, Verb.TIME, b"", nanoseconds(seconds), timeout)

    def reseed(self, data: bytes | None = None, timeout: float | None = SILENCE) -> None:
        """Give the guest's kernel new randomness: *data*, 1 to 512 bytes, by default 256 of this host's.

        It is credited as entropy, and the generator takes it at once (random(4): RNDADDENTROPY, RNDRESEEDCRNG).
        """
        seed = os.urandom(SEED) if data is None else data
        if not 0 < len(seed) <= 512:
            raise UsageError(f"{len(seed)} bytes of randomness: expected 1 to 512")
        self._ask(link_of(self._machine, "reseed", timeout), Verb.SEED, seed, 0, timeout)

    def freeze(self, paths: Iterable[str] | None = None, timeout: float | None = SILENCE) -> list[str]:
        """Write out the guest's file systems and hold back whatever changes them, until :meth:`thaw`. Returns which.

        Args:
            paths: where they are mounted; by default all that are on a block device.

        One that cannot be frozen is an OSError (EOPNOTSUPP), after which none is. ``run`` and what writes to them hang.
        """
        files = Files(link_of(self._machine, "freeze", timeout))
        wanted = self._mounted(files) if paths is None else list(paths)
        done: list[str] = []
        try:
            for path in wanted:
                self._at(Verb.FREEZE, path, timeout)
                done.append(path)
        except BaseException:
            self.thaw(done, timeout)
            raise
        return done

    def thaw(self, paths: Iterable[str] | None = None, timeout: float | None = SILENCE) -> None:
        """Let file systems go on that were frozen; by default all that are on a block device. Others are no error."""
        files = Files(link_of(self._machine, "thaw", timeout))
        for path in reversed(self._mounted(files) if paths is None else list(paths)):
            self._at(Verb.THAW, path, timeout)

    def _at(self, verb: Verb, path: str, timeout: float | None) -> None:
        link = link_of(self._machine, verb.name.lower(), timeout)
        error, _ = link.answer(verb, REQUEST.pack(0, 0, 0) + strings(path), timeout)
        if error:
            raise guest_error(error, self._machine.name, path)

    @staticmethod
    def _mounted(files: Files) -> list[str]:
        """Where block devices are mounted, by proc(5), each once."""
        found: dict[str, str] = {}
        for line in files.read("/proc/mounts", limit=1 << 20).decode("latin-1").splitlines():
            device, _, rest = line.partition(" ")
            if device.startswith("/dev/"):
                path = re.sub(r"\\([0-3][0-7]{2})", lambda byte: chr(int(byte[1], 8)), rest.partition(" ")[0])
                found.setdefault(device, os.fsdecode(path.encode("latin-1")))
        return list(found.values())

    def _ask(self, link: Link, verb: Verb, data: bytes, value: int, timeout: float | None) -> None:
        error, _ = link.answer(verb, REQUEST.pack(0, 0, value) + data, timeout)
        if error:
            raise guest_error(error, self._machine.name)


class Verbs:
    """The verbs of a machine whose guest has our agent: mixed into :class:`Machine`, and offered to any other.

    Each waits for the agent first, up to 60 seconds, or its own *timeout* where that is less. Raises NoAgent when none
    has answered by then, and StateError for a machine that has no port for one.
    """

    @property
    def agent(self: Any) -> Agent:
        """The agent itself."""
        return Agent(self)

    @property
    def aio(self: Any) -> Aio:
        """The calls that wait, for ``await`` under asyncio and trio."""
        from cardcage_agent.aio import Aio

        return Aio(self)

    @property
    def qga(self: Any) -> Qga:
        """QEMU's guest agent, in a guest that runs that in place of ours, or besides."""
        from cardcage_agent.qga import Qga

        return Qga(self)

    @property
    def files(self: Any) -> Files:
        """The guest's files."""
        return Files(link_of(self, "files", None))

    @overload
    def run(
        self,
        args: Command,
        *,
        input: bytes | None = None,
        stdout: int | None = PIPE,
        stderr: int | None = PIPE,
        check: bool = False,
        timeout: float | None = None,
        text: Literal[False] | None = None,
        encoding: None = None,
        errors: None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        user: str | int | None = None,
        limit: int = LIMIT,
    ) -> CompletedProcess[bytes]: ...

    @overload
    def run(
        self,
        args: Command,
        *,
        input: str | None = None,
        stdout: int | None = PIPE,
        stderr: int | None = PIPE,
        check: bool = False,
        timeout: float | None = None,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        user: str | int | None = None,
        limit: int = LIMIT,
    ) -> CompletedProcess[str]: ...

    def run(
        self: Any,
        args: Command,
        *,
        input: bytes | str | None = None,
        stdout: int | None = PIPE,
        stderr: int | None = PIPE,
        check: bool = False,
        timeout: float | None = None,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        user: str | int | None = None,
        limit: int = LIMIT,
        _started: Callable[[Popen], object] = _nobody,
    ) -> CompletedProcess[Any]:
        """Run a command in the guest and wait for its end, as :func:`subprocess.run`; both outputs are captured.

        Args:
            args: a list of the program and its arguments, or text for the guest's ``/bin/sh -c``.
            input: for its standard input, which is ``/dev/null`` without.
            stdout, stderr: ``PIPE``, ``DEVNULL``; for *stderr* also ``STDOUT``.
            check: raise CalledProcessError for another return code than 0.
            timeout: seconds for all of it; then it is killed, with its session, and TimeoutExpired raised.
            text, encoding, errors, env, cwd, user: as :class:`~cardcage_agent.process.Popen` has them.
            limit: bytes of each output; a command with more is killed, and AgentError raised.
        """
        __tracebackhide__ = True  # pytest shows the caller's line, not these functions
        began, link = time.monotonic(), link_of(self, "run", timeout)
        try:
            done = _ran(
                link,
                args,
                input,
                check,
                timeout,
                began,
                limit,
                _started,
                stdout=stdout,
                stderr=stderr,
                text=text,
                encoding=encoding,
                errors=errors,
                env=env,
                cwd=cwd,
                user=user,
            )
        except BaseException as error:
            link.on_run(args, error)
            raise
        link.on_run(args, done)
        return done

    def popen(
        self: Any,
        args: Command,
        *,
        stdin: int | None = None,
        stdout: int | None = PIPE,
        stderr: int | None = PIPE,
        text: bool | None = None,
        encoding: str | None = None,
        errors: str | None = None,
        env: Mapping[str, str] | None = None,
        cwd: str | os.PathLike[str] | None = None,
        user: str | int | None = None,
        pty: tuple[int, int] | None = None,
        timeout: float | None = None,
    ) -> Popen:
        """Start a command in the guest: a :class:`~cardcage_agent.process.Popen`, with its arguments."""
        return Popen(
            link_of(self, "popen", timeout),
            args,
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            text=text,
            encoding=encoding,
            errors=errors,
            env=env,
            cwd=cwd,
            user=user,
            pty=pty,
            timeout=timeout,
        )

    def put(
        self: Any,
        source: str | os.PathLike[str],
        target: str | os.PathLike[str],
        *,
        timeout: float | None = SILENCE,
    ) -> None:
        """Copy a file or a directory of this host into the guest, with permission bits, as root's.

        What is in a directory comes into *target*, which is made where it is not there. Symbolic links are copied as
        they are; devices, sockets and FIFOs are left out. Raises OSErrors of either side, and AgentTimeout when nothing
        went for *timeout* seconds.
        """
        path, files = os.fspath(source), Files(link_of(self, "put", timeout))
        (put_tree if os.path.isdir(path) else put_file)(files, path, os.fspath(target), timeout)

    def get(
        self: Any,
        source: str | os.PathLike[str],
        target: str | os.PathLike[str],
        *,
        limit: int | None = None,
        timeout: float | None = SILENCE,
    ) -> None:
        """Copy a file or a directory of the guest to this host: *target* is there once it is whole.

        A file is new or replaced, a directory must be new; what is in one has its permission bits, as far as the umask
        lets it. Symbolic links are copied as they are, and none is followed; devices, sockets and FIFOs are left out.

        Args:
            limit: bytes of all files, names and links; AgentError is raised for more. By default what the disk holds.
            timeout: seconds without a byte.
        """
        path, files = os.fspath(source), Files(link_of(self, "get", timeout))
        copy = get_tree if files.stat(path, timeout=timeout).is_dir else get_file
        copy(files, path, os.fspath(target), limit, timeout)

    def ssh_config(self: Any, *, user: str = "root", server: str = "/usr/sbin/sshd") -> Path:
        """The path of a configuration for ``ssh -F``, ``scp -F`` and what runs them; the host is the machine's name.

        The connection is a command of the agent's (``cardcage exec``): the guest needs no network, and its OpenSSH
        server is run for each, with keys of their own for both sides. They are there until the machine is closed.

        Args:
            user: who to be in the guest.
            server: the guest's ``sshd``.

        Raises StateError where the guest has none; HostError where this host has no ``ssh-keygen``; what
        :meth:`run` raises.
        """
        from cardcage_agent.ssh import ssh_config

        return ssh_config(self, user, server)


def _ran(
    link: Link,
    args: Command,
    input: bytes | str | None,
    check: bool,
    timeout: float | None,
    began: float,
    limit: int,
    started: Callable[[Popen], object],
    **keys: Any,
) -> CompletedProcess[Any]:
    """Run a command; *keys* are those of :class:`~cardcage_agent.process.Popen`."""
    __tracebackhide__ = True
    process = Popen(link, args, stdin=PIPE if input is not None else None, timeout=_left(timeout, began), **keys)
    started(process)
    try:
        out, err = process.communicate(input, _left(timeout, began), limit=limit)
    except TimeoutExpired as late:
        raise TimeoutExpired(args, timeout or 0, late.output, late.stderr) from None
    finally:
        process.close()
    code = process.poll()
    if code is None:
        raise AgentError(f"{process.args!r}: the agent gave the process up")
    if check and code:
        raise CalledProcessError(code, args, out, err)
    return CompletedProcess(args, code, out, err)


def _left(timeout: float | None, began: float) -> float | None:
    return None if timeout is None else max(timeout - (time.monotonic() - began), 0.0)


class Machine(Verbs, PlainMachine):
    """:class:`cardcage.Machine` with the agent's verbs as methods, so that type checkers know them."""

    @classmethod
    def debian(
        cls,
        *,
        memory: int | str = "512M",
        kernel: str | os.PathLike[str] | None = None,
        append: str = "",
        root: str | os.PathLike[str] | None = None,
        share: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        devices: Iterable[Mapping[str, Any]] = (),
        fragments: Iterable[Mapping[str, Any]] = (),
        host: Host | None = None,
        **keys: Any,
    ) -> Self:
        """See :func:`cardcage_boot.debian.debian`, which makes it."""
        from cardcage_boot.debian import debian as make

        return make(
            cls,
            memory=memory,
            kernel=kernel,
            append=append,
            root=root,
            share=share,
            devices=devices,
            fragments=fragments,
            host=host,
            **keys,
        )

    @classmethod
    def host_root(cls, **keys: Any) -> Self:
        """See :func:`cardcage_boot.debian.host_root`, which makes it."""
        from cardcage_boot.debian import host_root as make

        return make(cls, **keys)

    @classmethod
    def image(
        cls,
        image: str | os.PathLike[str] | Mapping[str, Any],
        *,
        memory: int | str = "1G",
        write: bool = False,
        ssh_key: str | os.PathLike[str] | Iterable[str | os.PathLike[str]] = (),
        user_data: str | os.PathLike[str] | Mapping[str, Any] | None = None,
        firmware: str | os.PathLike[str] | None = None,
        devices: Iterable[Mapping[str, Any]] = (),
        fragments: Iterable[Mapping[str, Any]] = (),
        host: Host | None = None,
        **keys: Any,
    ) -> Self:
        """See :func:`cardcage_cloudinit.image.image`, which makes it."""
        from cardcage_cloudinit.image import image as make

        return make(
            cls,
            image,
            memory=memory,
            write=write,
            ssh_key=ssh_key,
            user_data=user_data,
            firmware=firmware,
            devices=devices,
            fragments=fragments,
            host=host,
            **keys,
        )
