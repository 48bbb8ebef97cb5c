"""``cardcage-qemu``: what QEMU does with its process, and a machine as QEMU would run it."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

from cardcage_cli import main as cardcage

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from cardcage.host import Host

__all__ = ["configure", "main", "run"]

READY = "CARDCAGE_QEMU_READY"
"""The environment's word for the descriptor that a process in the background tells of its start by."""


def main() -> int:
    """The console script ``cardcage-qemu``: QEMU's words in, its exit status out."""
    words = sys.argv[1:]
    os.environ.pop(READY, None)
    if "-daemonize" in words or "--daemonize" in words:
        status = _in_the_background()
        if status is not None:
            return status
    sys.argv = [sys.argv[0], "qemu", "--", *words]
    return cardcage()


def _in_the_background() -> int | None:
    """Fork, before there are threads. Returns the status of the process that was called, None in the other one."""
    told, tells = os.pipe()
    if pid := os.fork():
        os.close(tells)
        ready = os.read(told, 1)
        if ready:
            return 0
        _, status = os.waitpid(pid, 0)
        return os.waitstatus_to_exitcode(status) or 1
    os.close(told)
    os.setsid()
    os.environ[READY] = str(tells)
    return None


def configure(parser: ArgumentParser) -> None:
    """Add the arguments."""
    parser.add_argument(
        "--dump-toml", action="store_true", help="print the configuration that the words come to, and run nothing"
    )
    parser.add_argument("words", metavar="-- OPTION", nargs="*", help="options as qemu-system-x86_64 has them")


def run(host: Host, arguments: Namespace) -> int:
    """Translate, build, run. Raises ConfigError."""
    from cardcage_qemu.line import translate
    from cardcage_qemu.listing import answer
    from cardcage_qemu.toml import dump

    words = [word for word in arguments.words if word not in ("-dump-toml", "--dump-toml")]
    if (said := answer(words, host)) is not None:
        print(said)
        return 0
    line = translate(words)
    if line.bare:
        line.accelerators = _first_usable(host, line.accelerators)
    tables = line.config()
    for one in line.warnings:
        print(f"warning: {one}", file=sys.stderr, flush=True)
    if arguments.dump_toml or len(words) < len(arguments.words):
        print(dump(tables, line.notes()), end="")
        return 0
    if kernel := line.boot.get("kernel"):
        _kernel_is_there(kernel)
    return _run(host, line, tables)


def _kernel_is_there(path: str) -> None:
    """Say in QEMU's words, which runners of test kernels look for, that it is not. Raises ConfigError."""
    from cardcage.errors import ConfigError

    try:
        os.stat(path)
    except OSError as error:
        raise ConfigError(f"could not load kernel '{path}': {error.strerror}", file="-kernel") from error


def _first_usable(host: Host, names: list[str]) -> list[str]:
    """The accelerator that QEMU would take, however slow it is: who asks a bare machine wants to know of that one."""
    from cardcage.registry import AcceleratorOffer

    registry = host.registry
    there = registry.names(AcceleratorOffer)
    usable = (one for one in names if one in there and registry.get(AcceleratorOffer, one).load()().probe().usable)
    return [found] if (found := next(usable, None)) else names


def _run(host: Host, line: Any, tables: dict[str, Any]) -> int:
    from cardcage.config import Draft
    from cardcage.errors import StateError
    from cardcage.machine import Machine
    from cardcage.outcome import DebugExit
    from cardcage_cli import SWITCH_INTERVAL, run_machine
    from cardcage_cli.running import STRAYS, threads_watched
    from cardcage_migrate import MEANT as COMING
    from cardcage_qmp.control import MEANT, control_of

    from cardcage_qemu import coming

    sys.setswitchinterval(SWITCH_INTERVAL)
    draft = Draft()
    draft.add(tables, origin="QEMU's words")
    with ExitStack() as end:
        host.share(coming.MEANT, dict)["line"] = line
        host.share(MEANT, dict).update(held=line.freeze or line.bare, lingers=line.linger)
        read = {id: one["credentials"] for id, one in line.objects.items() if "credentials" in one}
        host.share(COMING, dict).update(incoming=bool(line.incoming), credentials=read)
        machine = Machine.from_config(draft.config(), host=host)
        end.callback(machine.close)
        control = control_of(machine)
        if line.pidfile:
            end.callback(_pidfile(line.pidfile))
        strays: list[BaseException] = host.share(STRAYS, list)
        end.enter_context(threads_watched(strays, machine))
        machine.observers.add("state", lambda state: control.began.set() if state == "stopped" else None)
        if line.loadvm:
            _loaded(machine, line.loadvm)
        what = _expected(machine, line.incoming)
        if line.daemonize:
            _detach()
        if what is not None:
            _become(machine, control, what, frozen=line.freeze)
        elif line.freeze or line.bare:
            control.began.wait()
        if not line.bare and machine.state == "built" and not control.quitted.is_set():
            try:
                machine.start(boot=not line.loadvm)
            except StateError:
                if (
                    not strays and not control.quitted.is_set()
                ):  # else it has ended meanwhile, and run_machine() says how
                    raise
        if machine.state == "running" or machine.state == "paused":
            outcome = machine.wait()
            if control.lingers and outcome.status == 0 and not control.quitted.is_set():
                control.linger()
            if isinstance(outcome, DebugExit) and not strays:
                return outcome.status  # without a word, as QEMU: suites take one on standard error for our failure
        return run_machine(machine, console=None)


def _loaded(machine: Any, tag: str) -> None:
    """Put the machine where its snapshot is. Raises ConfigError that names the option, and what loading raises."""
    from cardcage.errors import CardcageError, ConfigError
    from cardcage_snapshot.loading import load
    from cardcage_snapshot.qmp import place

    try:
        load(machine, place(machine, tag))
    except CardcageError as error:
        raise ConfigError(str(error), file=f"-loadvm {tag}") from error


def _expected(machine: Any, uri: str) -> Any:
    """The machine that is to come from *uri*, which is listened to; None where there is no such word."""
    if not uri:
        return None
    from cardcage_migrate.expecting import expected

    what = expected(machine)
    if what is not None and uri != "defer":
        what.listen(uri)
    return what


def _become(machine: Any, control: Any, what: Any, *, frozen: bool) -> None:
    """Wait for the machine that comes, and let it go on, or not if it was ended before. Raises why it did not come."""
    if not what.wait():
        return
    if frozen or what.paused:
        control.began.wait()
    if machine.state == "built" and not control.quitted.is_set():
        machine.start(boot=False)
        control.elsewhere.starts()
        what.started()


def _pidfile(path: str) -> Any:
    """Write the process's number; returns what removes the file. Raises ConfigError."""
    from cardcage.errors import ConfigError

    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        os.ftruncate(fd, 0)
        os.write(fd, f"{os.getpid()}\n".encode())
        os.close(fd)
    except OSError as error:
        raise ConfigError(f"cannot be written: {error.strerror}", file=f"-pidfile {path}") from error

    def remove() -> None:
        with suppress(OSError):  # in its jail, the process may not
            os.unlink(path)

    return remove


def _detach() -> None:
    """The process that was called may end: what is here is ready."""
    tells = os.environ.pop(READY, None)
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
    if tells is not None:
        os.write(int(tells), b"1")
        os.close(int(tells))
