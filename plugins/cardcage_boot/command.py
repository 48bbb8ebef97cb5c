"""``cardcage boot``: a kernel, an initramfs and a terminal, from one command."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import define, field
from cardcage.errors import ConfigError
from cardcage.machine import Machine
from cardcage.registry import DeviceOffer, PolicyKeyOffer
from cardcage.units import Size
from cardcage_cli import SWITCH_INTERVAL, add_machine_arguments, detach, draft_of, run_machine, timeout_of

from cardcage_boot import cpio
from cardcage_boot.by_agent import AgentCommand, exit_status
from cardcage_boot.cache import cache_root
from cardcage_boot.fetch import Kernel, Shelf
from cardcage_boot.files import open_file, unpacked
from cardcage_boot.initramfs import add_devices, programs_of
from cardcage_boot.linux import linux_release
from cardcage_boot.report import Report
from cardcage_boot.streams import port_options

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from cardcage.config import Draft
    from cardcage.host import Host

__all__ = ["COMMAND_LINE", "configure", "given_kernel", "run"]

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
        "--exec", "-e", metavar="COMMAND", help="command to run in the guest, with its input, output and exit status"
    )
    group.add_argument("--firmware", metavar="FILE", help="ROM image such as SeaBIOS, to boot instead of a kernel")
    group.add_argument(
        "--refresh", action="store_true", help="fetch the distribution's newest kernel even if another is cached"
    )
    add_machine_arguments(parser)


@define
class Plan:
    """The plan of this run: the ``[boot]`` table, a name for the machine, and lines about the kernel.

    Attributes:
        command: what our init runs in place of a shell on the console; None for that shell, or another's init.
        by_agent: the same for an agent, in a guest whose first process is not ours.
        token: what marks in the command's streams hold.
    """

    boot: dict[str, Any]
    name: str
    kernel: str
    command: str | None = None
    by_agent: str | None = None
    token: str = field(factory=lambda: os.urandom(8).hex())


def run(host: Host, arguments: Namespace) -> int:
    """Boot, attach the terminal, and return the exit status."""
    if arguments.detach and arguments.exec is not None:
        raise ConfigError("omit --exec: run a command in the machine by cardcage exec", file="--detach")
    if (left := detach(host, arguments)) is not None:
        return left
    sys.setswitchinterval(SWITCH_INTERVAL)
    timeout = timeout_of(arguments)
    draft = draft_of(arguments)
    report = Report()
    with ExitStack() as cleanup:
        cleanup.callback(report.close)
        with host.signals.held():  # or it is left behind
            scratch = tempfile.TemporaryDirectory(prefix="cardcage-")
            cleanup.enter_context(scratch)
        plan = _plan(host, arguments, Path(scratch.name), report, _shares(draft, host, report))
        reader, writer = os.pipe()  # the status of the command
        told, tells = cleanup.enter_context(os.fdopen(reader)), cleanup.enter_context(os.fdopen(writer, "w"))
        _wire(host, draft, plan, arguments, writer)
        machine = Machine.from_config(draft.config(), host=host)
        cleanup.callback(machine.close)
        scratch.cleanup()  # all of it was read; in its jail, the process could not remove it any more
        _add_ports(machine, plan, writer)
        running = None if plan.by_agent is None else AgentCommand(machine, plan.by_agent, writer)
        _header(machine, plan, arguments, report)
        status = run_machine(machine, timeout=timeout)
        if running is not None:
            running.join()
        tells.close()
        if plan.command is plan.by_agent is None:
            return status
        return exit_status(told.readline(), status, lambda: _show_tail(machine))


def _shares(draft: Draft, host: Host, report: Report) -> str:
    """The shared directories that init mounts: ``TYPE:TAG``, in a line of words."""
    found = []
    forms = {one.name: one.mounts for one in host.registry.offers(DeviceOffer)}
    for device in draft.config().devices:
        form = forms.get(device.type)
        tag = device.options.get("tag", "share")
        if not form:  # for who made it up to mount
            continue
        if re.fullmatch(r"[\w.-]+", str(tag)):
            found.append(f"{form}:{tag}")
        else:
            report.line("share", f'"{tag}" is not mounted: a tag of letters, digits, "_", "." and "-" would be')
    return " ".join(found)


def _plan(host: Host, arguments: Namespace, scratch: Path, report: Report, shares: str) -> Plan:
    """Find or fetch what to boot. Raises ConfigError or HostError."""
    if arguments.firmware is not None:
        if arguments.kernel is not None:
            raise ConfigError("boots from disks: omit --kernel", file="--firmware")
        name = f"{arguments.firmware} (firmware)"
        return Plan({"firmware": arguments.firmware}, "firmware", name, by_agent=arguments.exec)
    if arguments.exec is not None and arguments.initrd is not None:
        raise ConfigError("needs the init of cardcage's own initramfs: omit --initrd", file="--exec")
    shelf = Shelf(cache_root(), report.progress, report.say)
    kernel = given_kernel(arguments.kernel) if arguments.kernel is not None else shelf.kernel(refresh=arguments.refresh)
    plan = Plan({"kernel": str(kernel.path)}, kernel.path.name, f"{kernel.release or kernel.path}   {kernel.source}")
    if arguments.kernel is None:
        plan.name = kernel.source.rpartition(" ")[2].lower()
    linux = bool(kernel.release) or arguments.kernel is None
    if not linux:
        if arguments.exec is not None:
            raise ConfigError("not a Linux kernel, which --exec needs", file=str(kernel.path))
        plan.boot |= {"append": arguments.append, "initrd": arguments.initrd or ""}
        return plan
    if arguments.initrd is None:
        shell = arguments.detach or _has_terminal()
        plan.command = arguments.exec if arguments.exec is not None or shell else "exec sh"
    plan.boot["append"] = " ".join(
        part for part in (COMMAND_LINE, "quiet" if plan.command is not None else "", arguments.append) if part
    )
    if arguments.initrd is not None:
        plan.boot["initrd"] = arguments.initrd
        return plan
    more = scratch / "settings.cpio"
    more.write_bytes(cpio.pack(_settings(arguments, plan, shares)))
    plan.boot["initrd"] = [str(shelf.initramfs(kernel, programs=programs_of(host.registry))), str(more)]
    return plan


def given_kernel(path: str) -> Kernel:
    """The kernel file a person gave; its modules are where its own tree, else this host, keeps those of its release."""
    release = linux_release(unpacked(open_file(path, "kernel")))
    if not release:
        return Kernel(Path(path), "", None, "")
    tops = (*Path(path).absolute().parents[1:2], Path("/"))
    modules = [top / lib / "modules" / release for top in tops for lib in ("lib", "usr/lib")]
    return Kernel(Path(path), release, next((one for one in modules if one.is_dir()), None), path)


def _settings(arguments: Namespace, plan: Plan, shares: str) -> list[cpio.Entry]:
    """Files that tell init what this run is about."""
    size = shutil.get_terminal_size()
    lines = {
        "token": plan.token,
        "TERM": os.environ.get("TERM", "dumb"),
        "rows": str(size.lines),
        "cols": str(size.columns),
        "shares": shares,
    }
    text = "".join(f"{name}={shlex.quote(value)}\n" for name, value in lines.items())
    entries = [cpio.file("cardcage/settings", text.encode())]
    if plan.command is not None:
        entries.append(cpio.file("cardcage/exec", plan.command.encode("utf-8", "surrogateescape") + b"\n"))
    return entries


def _has_terminal() -> bool:
    return os.isatty(0) and os.isatty(1)


def _wire(host: Host, draft: Draft, plan: Plan, arguments: Namespace, status: int) -> None:
    """Add kernel, console and the command's channel to the configuration, under what the person said.

    *status* is the descriptor that will be told the command's status.
    """
    said = draft.config().origins
    boot = {key: value for key, value in plan.boot.items() if f"boot.{key}" not in said}
    machine: dict[str, Any] = {} if "machine.name" in said else {"name": plan.name}
    console: dict[str, Any] = {"type": "linux-console"}
    if plan.command is not None:
        if "machine.stop_timeout" not in said:
            machine["stop_timeout"] = 0  # a command is ended, not asked to shut its guest down
        console |= {"token": plan.token, "fd": 2}
        channel = {"type": "exec-stream", "token": plan.token, "status": status}
        draft.add(
            {"device": [{"type": "isa-serial", "port": SECOND_PORT, "irq": SECOND_IRQ, "id": "exec", "char": channel}]}
        )
    if plan.by_agent is not None:
        console = {"type": "null"}
        if "cloud_init" in host.registry.names(PolicyKeyOffer):  # which brings the agent, where the image takes a seed
            seed = draft.config().policy.get("cloud_init")
            draft.add({"policy": {"cloud_init": {"programs": True, **(seed if isinstance(seed, dict) else {})}}})
    if "machine.console" not in said and not arguments.detach:
        machine["console"] = console
    if "machine.on_reset" not in said and (arguments.exec is not None or not _has_terminal()):
        machine["on_reset"] = "stop"  # a kernel that panics early must not boot again and again with nobody there
    draft.add({"machine": machine, "boot": boot})


def _add_ports(machine: Machine, plan: Plan, status: int) -> None:
    """Give the programs in our initramfs their devices, and the command ports of a virtio console, which carry
    megabytes where a UART carries kilobytes.

    init uses them where its kernel has the driver. A machine without PCI or the card has the serial port alone.
    """
    buses = {getattr(one.device, "bus_type", None) for one in machine.devices.values()}
    offered = machine.host.registry.names(DeviceOffer)
    if "pci" not in buses:
        return
    if plan.command is not None and "virtio-console" in offered:
        machine.add("virtio-console", id="exec-ports", char="null", ports=port_options(plan.token, status))
    if isinstance(plan.boot.get("initrd"), list) or plan.by_agent is not None:
        add_devices(machine)


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
    if plan.command is not None or plan.by_agent is not None:
        report.line("command", arguments.exec if arguments.exec is not None else "sh, which reads standard input")
    elif arguments.detach:
        report.line("console", f"cardcage console {config.name}")
    else:
        report.line("console", "ttyS0 here, Ctrl-] to leave" if os.isatty(0) else "ttyS0 here; no terminal")


def _show_tail(machine: Machine) -> None:
    """The console's last lines, which a command's run does not show: the kernel's, not what passes between us and init.

    What follows the mark where a command's errors begin was shown already.
    """
    text = machine.console.output.partition("\0cardcage-")[0].replace("\r", "")
    lines = [line for line in text.splitlines() if line != "cardcage: init"][-12:]
    if lines:
        print("the console's last lines:", *lines, sep="\n  ", file=sys.stderr)
