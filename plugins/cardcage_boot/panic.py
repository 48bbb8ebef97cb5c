"""A Linux kernel's panic, noticed by its message on a serial console: long before a driver could tell the machine.

The kernel prints ``Kernel panic - not syncing: WHY`` first, then its trace, and at last that it reboots or that this is
the end (Linux, kernel/panic.c). The machine ends with the last of these, so that the trace can be read.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cardcage.device import Slot

__all__ = ["PanicWatch", "watch_consoles"]

LINE_MAX = 1024
"""Bytes of a line that are kept until its end comes."""
GRACE = 2_000_000_000
"""Nanoseconds of guest time that a kernel has for its trace."""
BEGIN = re.compile(
    # At a line's begin, or where a time stamp tells a message of the kernel from what a program left unfinished.
    rb"(?:^|\[ *\d+\.\d+\](?:\[ *[CT]\d+\])? )Kernel panic - not syncing: ?([^\r\n]*)"
    rb"|---\[ end Kernel panic - not syncing: ?([^\r\n]*?) ?\]---",
    re.MULTILINE,
)
END = re.compile(rb"---\[ end Kernel panic - not syncing|Rebooting in \d+ seconds")
PORTS = {0x3F8: 0, 0x2F8: 1, 0x3E8: 2, 0x2E8: 3}
"""Addresses of the serial ports that Linux calls ``ttyS0`` to ``ttyS3``."""


class PanicWatch:
    """Reads along on one serial port and reports a panic to the machine.

    It trusts nothing that it reads: all that such a text does is to end the guest's own machine.
    """

    def __init__(self, slot: Slot) -> None:
        self._power, self._clock = slot.power, slot.clock
        self._timer = slot.clock.timer(self._overdue)
        self._line = b""
        self._message: str | None = None

    def feed(self, data: bytes) -> None:
        """The next bytes of the console."""
        text, newline, rest = (self._line + data).rpartition(b"\n")
        self._line = rest[-LINE_MAX:]
        if not newline:
            return
        if self._message is None and b"Kernel panic - not syncing" in text and (found := BEGIN.search(text)):
            words = (found[1] if found[1] is not None else found[2])[:LINE_MAX].decode("utf-8", "replace")
            # It goes to terminals and logs that the guest has no business to control.
            self._message = "".join(one if one.isprintable() else "\N{REPLACEMENT CHARACTER}" for one in words).strip()
            self._power.panic(self._message, soon=True)
            self._timer.arm(self._clock.now() + GRACE)
            text = text[found.start() :]
        if self._message is not None and END.search(text):
            self._power.panic(self._message)

    def _overdue(self) -> None:
        if self._message is not None:
            self._power.panic(self._message)

    def reset(self, why: str = "") -> None:
        """The machine was reset: what was read is of no account any more."""
        self._line, self._message = b"", None
        self._timer.cancel()


def watch_consoles(machine: Any) -> None:
    """Watch the serial ports of *machine* that may be a Linux console, unless ``[machine] on_panic`` is ``ignore``.

    These are the machine's console, ``ttyS0``, and those that the kernel's command line names.
    """
    if machine.config.machine.on_panic == "ignore":
        return
    named = re.findall(r"console=ttyS(\d+)", str((machine.config.boot or {}).get("append", "")))
    for one in machine.devices.values():
        if "text-output" not in one.abilities:
            continue
        ranges = one.slot.ranges.mappings
        number = PORTS.get(ranges[0].address or 0) if ranges else None
        if one.slot.host.has_console or number == 0 or str(number) in named:
            watch = PanicWatch(one.slot)
            one.device.add_output_listener(watch.feed)
            machine.observers.add("reset", watch.reset)
