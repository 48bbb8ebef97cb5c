"""Boot protocols, the initramfs builder, the kernel fetcher and ``cardcage boot``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from cardcage.hookspecs import hookimpl
from cardcage.registry import Offer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cardcage.registry import Registry

__all__ = ["GuestProgramOffer"]

WANTED = "cardcage_boot:exec"
"""The key by which a host shares what ``--exec`` said: it is this process's to do, and no part of the configuration."""


class GuestProgramOffer(Offer):
    """A program for the guests of ``cardcage boot`` and ``Machine.debian()``: ``factory()`` gives its bytes.

    It is a static executable for x86-64, and is put into the initramfs. init starts it once ``/proc``, ``/sys`` and
    ``/dev`` are there, before any driver, with no input and no output.

    Attributes:
        devices: tables of the devices that it talks to, such as ``{"type": "virtio-console", ...}``;
            ``Machine.debian()`` adds them.
    """

    kind: ClassVar[str] = "guest program"
    form: ClassVar[str] = "[a-z][a-z0-9-]*"

    def __init__(self, name: str, factory: Any, *, devices: tuple[Mapping[str, Any], ...] = (), **common: Any) -> None:
        super().__init__(name, factory, **common)
        self.devices = devices


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the boot protocols, their back ends and the command."""
    for name, stem, text in (
        ("linux", "Linux", "Linux bzImage by the 64-bit boot protocol"),
        ("pvh", "Pvh", "ELF kernel with a PVH entry note (vmlinux, Xen)"),
        ("multiboot", "Multiboot", "Multiboot 1 kernel, ELF or flat"),
        ("raw", "Raw", "flat binary at a given address, in 16-, 32- or 64-bit mode"),
        ("firmware", "Firmware", "ROM below 4 GiB, entered at the reset vector (SeaBIOS)"),
        ("auto", "Auto", "detects the protocol by the kernel file's magic number"),
    ):
        registry.boot(
            name, f"cardcage_boot.{name}:{stem}Loader", options=f"cardcage_boot.options:{stem}Options", help=text
        )
    registry.backend(
        "char",
        "linux-console",
        "cardcage_boot.channel:open_console",
        options="cardcage_boot.channel:ConsoleOptions",
        help="forwards a Linux console (cardcage boot)",
    )
    registry.backend(
        "char",
        "exec-stream",
        "cardcage_boot.streams:open_stream",
        options="cardcage_boot.streams:ExecOptions",
        help="a stream of the command that init runs: output, errors or input, and its status (cardcage boot --exec)",
    )
    registry.command(
        "boot",
        "cardcage_boot.command:run",
        configure="cardcage_boot.command:configure",
        help="boot a Linux kernel to a shell, or to run a single command",
    )
    registry.command(
        "kernel",
        "cardcage_boot.kernel:run",
        configure="cardcage_boot.kernel:configure",
        help="write the distribution's kernel, and an initramfs that mounts root=, as files to run machines with",
    )
    registry.flag(
        "--exec",
        "cardcage_boot.by_agent:parse_exec_flag",
        metavar="COMMAND",
        asks=True,
        help="command that the guest's agent runs, with its input, output and exit status; then the machine ends",
    )
    registry.doctor("kernel to boot", "cardcage_boot.check:check", help="kernel and busybox for cardcage boot")


@hookimpl
def cardcage_built(machine: Any) -> None:
    """Watch for a kernel's panic where it has a serial console; run the command of ``cardcage run --exec``."""
    from cardcage_boot.panic import watch_consoles

    watch_consoles(machine)
    if (command := machine.host.share(WANTED, dict).pop("command", None)) is not None:
        from cardcage_boot.by_agent import command_for

        command_for(machine, command)
