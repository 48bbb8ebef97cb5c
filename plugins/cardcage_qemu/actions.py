"""Options about what happens: at a reset, a power-off, a panic, a watchdog's end, and to a waiting gdb."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.errors import ConfigError, UsageError

from cardcage_qemu.devices import add_device

if TYPE_CHECKING:
    from cardcage_qemu.keyval import Options
    from cardcage_qemu.line import Line

__all__ = ["on_action", "on_gdb", "on_incoming", "on_loadvm", "on_s", "on_watchdog", "on_watchdog_action"]

WATCHDOG = ("reset", "shutdown", "poweroff", "pause", "debug", "none")
"""A watchdog's actions, of QEMU's words."""


def on_gdb(line: Line, options: Options) -> None:
    if options.text == "none":
        return
    head, _, rest = options.text.partition(":")
    if head not in ("unix", "tcp") or not rest:
        raise options.error("cardcage has none, unix:PATH and tcp:HOST:PORT, at which it listens")
    socket = options.first()
    options.harmless(server="on", wait="off", nodelay="", ipv4="", ipv6="", delay="")
    options.end()
    line.devices.append({"type": "gdb", "socket": socket})


def on_incoming(line: Line, options: Options) -> None:
    if options.text != "defer":
        from cardcage_migrate.reach import parse

        try:
            parse(options.text)
        except UsageError as error:
            raise ConfigError(f"{error}, or defer", file="-incoming") from error
    line.incoming = options.text


def on_loadvm(line: Line, options: Options) -> None:
    line.loadvm = options.text


def on_s(line: Line, options: Options) -> None:
    line.devices.append({"type": "gdb", "socket": "tcp:127.0.0.1:1234"})


def on_action(line: Line, options: Options) -> None:
    reboot, shutdown, panic = (options.take(key) for key in ("reboot", "shutdown", "panic"))
    expiry = options.take("watchdog")
    options.end()
    for name, value, known in (
        ("reboot", reboot, ("reset", "shutdown")),
        ("shutdown", shutdown, ("poweroff", "pause")),
        ("panic", panic, ("shutdown", "exit-failure", "none")),
    ):
        if value not in (None, *known):
            raise options.error(f"{name}={value}: cardcage has {', '.join(known)}")
    if reboot is not None:
        line.machine["on_reset"] = "stop" if reboot == "shutdown" else "reset"
    if shutdown is not None:
        line.linger = shutdown == "pause"
    if panic is not None:
        line.machine["on_panic"] = "ignore" if panic == "none" else "stop"
    if expiry is not None:
        _expiry(line, options, expiry)


def on_watchdog_action(line: Line, options: Options) -> None:
    _expiry(line, options, options.text)


def _expiry(line: Line, options: Options, action: str) -> None:
    if action not in WATCHDOG:
        raise options.error(f"{action}: cardcage's watchdog has {', '.join(WATCHDOG)}")
    line.expiry = action


def on_watchdog(line: Line, options: Options) -> None:
    options.pairs = [("driver", options.text)]
    add_device(line, options)
