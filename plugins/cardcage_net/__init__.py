"""Networks: tap, user mode, switch, sockets and none as net back ends, and the ``--net`` shorthand."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.hookspecs import hookimpl

if TYPE_CHECKING:
    from cardcage.registry import Registry


@hookimpl
def cardcage_register(registry: Registry) -> None:
    """Offer the back ends of kind ``net``, ``--net``, and a line of ``cardcage doctor``."""
    offers = {
        "null": ("null", "Null", "no network: frames are dropped"),
        "tap": ("tap", "Tap", "a tap interface of the host, optionally on a bridge"),
        "user": ("user", "User", "user-mode networking without root (passt), with port forwarding"),
        "switch": ("switch", "SwitchPort", "a switch between machines of this process, and of others through a socket"),
        "stream": ("sockets", "Stream", "a TCP or Unix stream socket, compatible with QEMU's -netdev stream"),
        "dgram": ("sockets", "Dgram", "UDP, multicast or Unix datagrams, compatible with QEMU's -netdev dgram"),
    }
    for name, (module, options, help) in offers.items():
        registry.backend(
            "net",
            name,
            f"cardcage_net.{module}:open_{name}",
            options=f"cardcage_net.{module}:{options}",
            shorthand=f"cardcage_net.parse:parse_{name}",
            help=help,
        )
    registry.flag(
        "--net",
        "cardcage_net.parse:parse_net_flag",
        asks=True,
        help="add a network card: user,hostfwd=tcp::2222-:22 or tap,ifname=tap0 or switch,name=lan, ...",
    )
    registry.doctor("user networking", "cardcage_net.user:check_passt", help="passt, for networking without root")
    registry.doctor("tap", "cardcage_net.check:tap", help="/dev/net/tun, for tap interfaces")
