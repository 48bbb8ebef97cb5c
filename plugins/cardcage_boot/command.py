"""``cardcage boot``: a kernel, an initramfs and a terminal, from one command."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import tempfile
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field
from cardcage.errors import ConfigError, GuestError
from cardcage.machine import Machine
from cardcage.registry import DeviceOffer
from cardcage.units import Size
from cardcage_cli import EXIT, SWITCH_INTERVAL, add_machine_arguments, draft_of, run_machine, timeout_of

from cardcage_boot import cpio
from cardcage_boot.cache import cache_root
from cardcage_boot.fetch import Kernel, Shelf
from cardcage_boot.files import open_file
from cardcage_boot.linux import is_bzimage, read_header

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from cardcage.config import Draft
    from cardcage.host import Host

__all__ = ["COMMAND_LINE", "configure", "run"]

COMMAND_LINE = "console=ttyS0 panic=-1 no_timer_check cryptomgr.notests"
"""Serial console; a panic ends the machine; no probing for broken timers; no self-tests of ciphers nobody will use."""
SECOND_PORT, SECOND_IRQ = 0x2F8, 3


def configure(parser: ArgumentParser) -> None:
    """Add the arguments."""
    group = parser.add_argument_group("boot")
    group.add_argument(
        "--kernel",
        "-k",
        metavar="FILE",
        help="Linux bzImage, PVH or Multiboot kernel; by default the distribution's kernel",
    )
    group.add_argument("--initrd", "-i", metavar="FILE", help='initramfs; by default busybox with drivers; "" for none')
    group.add_argument("--append", "-a", metavar="TEXT", default="", help="text to append to the kernel's command line")
    group.add_argument(
        "--exec", "-e", metavar="COMMAND", help="command to run in the guest; cardcage exits with its status"
    )
    group.add_argument("--firmware", metavar="FILE", help="ROM image such as SeaBIOS, to boot instead of a kernel")
    group.add_argument(
        "--refresh", action="store_true", help="fetch the distribution's newest kernel even if another is cached"
    )
    add_machine_arguments(parser)


class Report:
    """Progress before the guest starts: on standard error, with a progress bar on a terminal."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._cleanup = ExitStack()
        self._bar: Any = None
        self._tasks: dict[str, Any] = {}

    def line(self, name: str, text: str) -> None:
        """One line of the header."""
        self.close()
        print(f"  {name:<12} {text}", file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line about what takes time."""
        self.line("", text)

    def progress(self, what: str, percent: float) -> None:
        """A download's progress."""
        if not self._terminal:
            if what not in self._tasks:
                self._tasks[what] = None
                self.line("fetching", what)
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn

            columns = (
                TextColumn("  fetching     {task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:>3.0f}%"),
            )
            bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._bar, self._tasks = self._cleanup.enter_context(bar), {}
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(what, total=100)
        self._bar.update(self._tasks[what], completed=percent)

    def close(self) -> None:
        """Take the bar away."""
        self._cleanup.close()
        self._bar = None


@define
class Plan:
    """The plan of this run: the ``[boot]`` table, a name for the machine, and lines about the kernel."""

    boot: dict[str, Any]
    name: str
    kernel: str
    token: str = field(factory=lambda: os.urandom(8).hex())
    own_init: bool = False


def run(host: Host, arguments: Namespace) -> int:
    """Boot, attach the terminal, and return the exit status."""
    sys.setswitchinterval(SWITCH_INTERVAL)
    timeout = timeout_of(arguments)
    draft = draft_of(arguments)
    report = Report()
    with ExitStack() as cleanup:
        cleanup.callback(report.close)
        with host.signals.held():  # or it is left behind
            scratch = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="cardcage-")))
        plan = _plan(arguments, scratch, report, _shares(draft, host))
        reader, writer = os.pipe()  # the status of --exec
        told, tells = cleanup.enter_context(os.fdopen(reader)), cleanup.enter_context(os.fdopen(writer, "w"))
        _wire(draft, plan, arguments, writer)
        machine = Machine.from_config(draft.config(), host=host)
        cleanup.callback(machine.close)
        _header(machine, plan, arguments, report)
        if plan.own_init and arguments.exec is None and not _has_terminal():
            threading.Thread(target=_feed, args=(machine, plan.token), name="stdin", daemon=True).start()
        status = run_machine(machine, timeout=timeout)
        tells.close()
        if arguments.exec is None:
            return status
        word = told.read()
        if word and not status:
            return int(word)
        _show_tail(machine)
        if status:
            return status
        print("cardcage: the guest ended before the command did", file=sys.stderr)
        return EXIT["failure"]


def _shares(draft: Draft, host: Host) -> str:
    """The shared directories that init mounts: ``TYPE:TAG``, in a line of words."""
    found = []
    forms = {one.name: one.mounts for one in host.registry.offers(DeviceOffer)}
    for device in draft.config().devices:
        form = forms.get(device.type)
        tag = device.options.get("tag", "share")
        if form and re.fullmatch(r"[\w.-]+", str(tag)):  # others are for who made them up to mount
            found.append(f"{form}:{tag}")
    return " ".join(found)


def _plan(arguments: Namespace, scratch: Path, report: Report, shares: str) -> Plan:
    """Find or fetch what to boot. Raises ConfigError or HostError."""
    if arguments.firmware is not None:
        if arguments.kernel is not None or arguments.exec is not None:
            raise ConfigError("boots from disks: omit --kernel and --exec", file="--firmware")
        return Plan({"firmware": arguments.firmware}, "firmware", f"{arguments.firmware} (firmware)")
    if arguments.exec is not None and arguments.initrd is not None:
        raise ConfigError("needs the init of cardcage's own initramfs: omit --initrd", file="--exec")
    shelf = Shelf(cache_root(), report.progress, report.say)
    kernel = (
        _given_kernel(arguments.kernel) if arguments.kernel is not None else shelf.kernel(refresh=arguments.refresh)
    )
    plan = Plan({"kernel": str(kernel.path)}, kernel.path.name, f"{kernel.release or kernel.path}   {kernel.source}")
    if arguments.kernel is None:
        plan.name = kernel.source.rpartition(" ")[2].lower()
    linux = bool(kernel.release) or arguments.kernel is None
    if not linux:
        if arguments.exec is not None:
            raise ConfigError("not a Linux bzImage, which --exec needs", file=str(kernel.path))
        plan.boot |= {"append": arguments.append, "initrd": arguments.initrd or ""}
        return plan
    plan.boot["append"] = " ".join(
        part for part in (COMMAND_LINE, "quiet" if arguments.exec is not None else "", arguments.append) if part
    )
    if arguments.initrd is not None:
        plan.boot["initrd"] = arguments.initrd
        return plan
    plan.own_init = True
    more = scratch / "settings.cpio"
    more.write_bytes(cpio.pack(_settings(arguments, plan, shares)))
    plan.boot["initrd"] = [str(shelf.initramfs(kernel)), str(more)]
    return plan


def _given_kernel(path: str) -> Kernel:
    """The kernel file a person gave; its modules are where this host keeps those of the same release."""
    file = open_file(path, "kernel")
    if not is_bzimage(file.data):
        return Kernel(Path(path), "", None, "")
    release = read_header(file).release
    modules = Path("/lib/modules", release)
    return Kernel(Path(path), release, modules if release and modules.is_dir() else None, path)


def _settings(arguments: Namespace, plan: Plan, shares: str) -> list[cpio.Entry]:
    """Files that tell init what this run is about."""
    size = shutil.get_terminal_size()
    lines = {
        "token": plan.token,
        "TERM": os.environ.get("TERM", "dumb"),
        "rows": str(size.lines),
        "cols": str(size.columns),
        "interactive": "1" if _has_terminal() else "0",
        "shares": shares,
    }
    text = "".join(f"{name}={shlex.quote(value)}\n" for name, value in lines.items())
    entries = [cpio.file("cardcage/settings", text.encode())]
    if arguments.exec is not None:
        entries.append(cpio.file("cardcage/exec", arguments.exec.encode("utf-8", "surrogateescape") + b"\n"))
    return entries


def _has_terminal() -> bool:
    return os.isatty(0) and os.isatty(1)


def _wire(draft: Draft, plan: Plan, arguments: Namespace, status: int) -> None:
    """Add kernel, console and the command's channel to the configuration, under what the person said.

    *status* is the descriptor that will be told the command's status.
    """
    said = draft.config().origins
    boot = {key: value for key, value in plan.boot.items() if f"boot.{key}" not in said}
    machine: dict[str, Any] = {} if "machine.name" in said else {"name": plan.name}
    console: dict[str, Any] = {"type": "linux-console"}
    if arguments.exec is not None:
        console |= {"token": plan.token, "fd": 2}
        channel = {"type": "exec-output", "token": plan.token, "status": status}
        draft.add(
            {"device": [{"type": "isa-serial", "port": SECOND_PORT, "irq": SECOND_IRQ, "id": "exec", "char": channel}]}
        )
    elif plan.own_init and not _has_terminal():
        console |= {"token": plan.token, "fd": 1}
    if "machine.console" not in said:
        machine["console"] = console
    if "machine.on_reset" not in said and (arguments.exec is not None or not _has_terminal()):
        machine["on_reset"] = "stop"  # a kernel that panics early must not boot again and again with nobody there
    draft.add({"machine": machine, "boot": boot})


def _header(machine: Machine, plan: Plan, arguments: Namespace, report: Report) -> None:
    """Say what runs, on what, and why."""
    from cardcage import __version__

    config = machine.config.machine
    report.close()
    cpus = f"{config.cpus} vCPU{'s' if config.cpus > 1 else ''}"
    print(
        f'cardcage {__version__}  machine "{config.name}" · {cpus} · {Size(config.memory)}', file=sys.stderr, flush=True
    )
    choice = machine.accelerator
    reason = choice.why.removeprefix(f"{choice.name}: ")
    report.line("accelerator", f"{choice.name:<10} {reason}")
    report.line("kernel", plan.kernel)
    if arguments.exec is not None:
        report.line("command", arguments.exec)
    else:
        report.line("console", "ttyS0 here, Ctrl-] to leave" if os.isatty(0) else "ttyS0 here; no terminal")


def _feed(machine: Machine, token: str) -> None:
    """Type standard input, which is no terminal, on the console once init reads it, then the end-of-file character."""
    try:
        machine.console.expect(f"cardcage-begin {token}", timeout=None)
    except GuestError:
        return  # the machine ended before
    try:
        while data := os.read(0, 4096):
            machine.console.send(data)
    except OSError:
        pass  # closed: the same as its end
    machine.console.send(b"\x04")


def _show_tail(machine: Machine) -> None:
    """The console's last lines, which a command's run does not show."""
    lines = machine.console.output.replace("\r", "").splitlines()[-12:]
    if lines:
        print("the console's last lines:", *lines, sep="\n  ", file=sys.stderr)
