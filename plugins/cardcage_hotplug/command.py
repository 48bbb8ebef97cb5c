"""``cardcage device``: list, add, remove and resize devices of a machine that runs."""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError, UsageError
from cardcage.pairs import join_pairs, split_pairs
from cardcage.registry import BackendOffer, FlagOffer
from cardcage.units import Duration, Size
from cardcage_fleet import command, find
from cardcage_jail import lend

from cardcage_hotplug.control import TIMEOUT_MAX

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace

    from cardcage.host import Host

__all__ = ["configure", "run"]

WORDS = ("type", "id", "serial", "format", "cache", "name")
"""Keys whose values are no paths, whatever lies in the directory that the command is given in."""
SLACK = 60
"""Seconds that the machine has for its answer, besides the guest's time."""


def configure(parser: ArgumentParser) -> None:
    """The arguments."""
    acts = parser.add_subparsers(dest="act", required=True, metavar="list|add|remove|resize")
    listed = acts.add_parser("list", help="show the devices of a machine")
    listed.add_argument("name", metavar="NAME", help="the machine, by name or pid")
    listed.add_argument("--json", action="store_true", help="a table of JSON")
    added = acts.add_parser("add", help="add a device; prints its id and its place")
    added.add_argument("name", metavar="NAME", help="the machine, by name or pid")
    added.add_argument(
        "device", metavar="TYPE[,KEY=VALUE]...", help="as for --device, such as virtio-blk,drive=a.qcow2"
    )
    removed = acts.add_parser("remove", help="have the guest let go of a device, and remove it")
    removed.add_argument("name", metavar="NAME", help="the machine, by name or pid")
    removed.add_argument("id", metavar="ID", help="the device")
    removed.add_argument("--timeout", metavar="TIME", default="30s", help="how long the guest may take (30s)")
    resized = acts.add_parser("resize", help="make the disk of a device larger")
    resized.add_argument("name", metavar="NAME", help="the machine, by name or pid")
    resized.add_argument("id", metavar="ID", help="the device")
    resized.add_argument("size", metavar="SIZE", help="bytes, or with K, M, G, T; no less than the disk has")


def run(host: Host, arguments: Namespace) -> int:
    """Have the machine do it. Raises what it raised there."""
    if arguments.act == "list":
        devices = command(find(arguments.name), "device-list", {})["devices"]
        if arguments.json:
            print(json.dumps(devices))
            return 0
        rows = [(str(one["id"]), one["type"], one["address"] or "") for one in devices]
        for id, type, address in [("id", "type", "address"), *rows]:
            print(f"{id:20} {type:20} {address}".rstrip())
    elif arguments.act == "add":
        entry, table = find(arguments.name), _table(host, arguments.device)
        with lend(entry.broker, _files(table)):
            added = command(entry, "device-add", table)
        print(f"{added['id']} at {added['address']}")
    elif arguments.act == "resize":
        try:
            size = int(Size(arguments.size))
        except ValueError as error:
            raise UsageError(f"size: {error}") from error
        command(find(arguments.name), "device-resize", {"id": arguments.id, "size": size}, SLACK)
    else:
        seconds = _seconds(arguments.timeout)
        command(find(arguments.name), "device-remove", {"id": arguments.id, "timeout": seconds}, seconds + SLACK)
    return 0


def _table(host: Host, text: str) -> dict[str, Any]:
    try:
        (table,) = host.registry.get(FlagOffer, "--device").load()(text, host)["device"]
    except ValueError as error:
        raise UsageError(f'"{text}": {error}') from error
    kinds = {name.partition(":")[2] for name in host.registry.names(BackendOffer)}
    return {key: _whole(value, kinds, key) for key, value in table.items()}


def _whole(value: Any, kinds: set[str], key: str = "") -> Any:
    """*value* with paths that are there made whole: the machine's process is in another directory.

    A word that is the name of a back end is one, and :data:`WORDS` never name a file.
    """
    if isinstance(value, dict):
        return {name: _whole(one, kinds, name) for name, one in value.items()}
    if isinstance(value, list):
        return [_whole(one, kinds) for one in value]
    if not isinstance(value, str) or value in kinds or key in WORDS:
        return value
    if os.path.lexists(value):
        return os.path.abspath(value)
    parts = [part.rpartition("=") for part in split_pairs(value)]
    if len(parts) == 1:
        return value
    return join_pairs(f"{name}{equals}{_whole(path, kinds, name)}" for name, equals, path in parts)


def _files(table: dict[str, Any]) -> dict[str, bool]:
    """The files that *table* names, and True for those that may be written: a machine in its jail is lent them. Images
    have what they stand on with them, as :func:`cardcage_block.drive.open_image` finds and allows it."""
    found: dict[str, bool] = {}
    for spec in table.values():
        pairs = dict(spec) if isinstance(spec, dict) else {}
        if isinstance(spec, str):
            for part in split_pairs(spec):
                name, _, value = part.rpartition("=")
                pairs[name or "file"] = value
        writable = pairs.get("readonly", table.get("readonly", "false")) in ("false", "off", "no", "0", False)
        for key, path in pairs.items():
            if isinstance(path, str) and key not in WORDS and os.path.isabs(path) and _is_file(path):
                below = (
                    _below(path, pairs.get("format", "auto")) if key == "file" and pairs.get("format") != "raw" else []
                )
                found = {**dict.fromkeys(below, False), **found, path: writable, os.path.realpath(path): writable}
    return found


def _is_file(path: str) -> bool:
    try:
        return stat.S_IFMT(os.stat(path).st_mode) in (stat.S_IFREG, stat.S_IFBLK)
    except OSError:
        return False


def _below(path: str, form: Any) -> list[str]:
    """What an image stands on; nothing where it is none: the machine says what is wrong with it."""
    from cardcage_block.drive import Drive, open_image

    paths: list[str] = []

    def allow(real: str, acts: tuple[str, ...], /, **facts: Any) -> None:
        paths.append(os.path.realpath(real))

    with suppress(CardcageError, OSError, ValueError, TypeError):
        open_image(Drive(path, format=form, readonly=True, locking="off"), warn=lambda text: None, allow=allow).close()
    return paths


def _seconds(text: str) -> float:
    try:
        seconds = float(Duration(text))
    except ValueError as error:
        raise UsageError(f"--timeout: {error}") from error
    if seconds > TIMEOUT_MAX:
        raise UsageError(f"--timeout: expected at most {TIMEOUT_MAX} seconds, got {text}")
    return seconds
