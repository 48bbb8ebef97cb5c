"""Words of gdb's ``monitor``: some of its own, and those of QEMU's human monitor."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage_qmp.hmp import said

if TYPE_CHECKING:
    from cardcage_qmp import Session

    from cardcage_gdb.memory import Memory

__all__ = ["carried_out"]

HELP = """help                     this
reset                    reset the machine; it stays stopped ("maintenance flush register-cache" afterwards)
phys on|off              addresses are guest-physical, or the processor's again
info registers           all registers of the thread's processor, segments and debug registers with them
info status|cpus|name|uuid|version|block|chardev|balloon|kvm
system_powerdown, nmi    press the power button; an NMI to each processor
quit                     end the machine
"""
GDBS = {"c", "cont", "s", "stop"}
"""Words for gdb's own: behind its back the machine would go on."""


def carried_out(session: Session, memory: Memory, line: str, cpu: int) -> str:
    """Carry *line* out; return what it prints."""
    words = line.split()
    if not words or words in (["help"], ["?"]):
        return HELP
    if words == ["reset"]:
        words = ["system_reset"]
    if words[0] == "phys":
        if words[1:] in (["on"], ["off"]):
            memory.physical = words[1] == "on"
        return f"addresses are {'guest-physical' if memory.physical else 'virtual'}\n"
    if words[0] in GDBS:
        return 'gdb has its own words for that: "continue", and Ctrl-C\n'
    return said(session, " ".join(words), cpu).replace("\r\n", "\n")
