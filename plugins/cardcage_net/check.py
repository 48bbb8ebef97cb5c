"""``cardcage doctor``: the device of tap interfaces."""

from __future__ import annotations

import os

__all__ = ["tap"]


def tap() -> tuple[bool, str, str]:
    """Can ``/dev/net/tun`` be opened?"""
    if not os.path.exists("/dev/net/tun"):
        return False, "/dev/net/tun does not exist", "sudo modprobe tun"
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return False, "/dev/net/tun: permission denied", "sudo chmod 666 /dev/net/tun"
    return True, "/dev/net/tun can be opened (creating a tap needs CAP_NET_ADMIN)", ""
