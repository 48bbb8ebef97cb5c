"""``cardcage snapshot``: create, list, show, restore, rm, check."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import asdict
from cardcage.errors import ConfigError
from cardcage.units import say_size
from cardcage_cli import SWITCH_INTERVAL, run_machine, timeout_of
from cardcage_fleet import find

from cardcage_snapshot.manifest import MANIFEST, read
from cardcage_snapshot.places import Folder, located, printable, snapshot_root
from cardcage_snapshot.running import create

if TYPE_CHECKING:
    from argparse import ArgumentParser, Namespace
    from collections.abc import Callable

    from cardcage.host import Host

    from cardcage_snapshot.manifest import Manifest

__all__ = ["configure", "run"]

SNAPSHOT = "name of a snapshot, or a path with a slash"


def configure(parser: ArgumentParser) -> None:
    """Add the arguments of ``cardcage snapshot``."""
    acts = parser.add_subparsers(dest="act", required=True, metavar="ACT")
    create = acts.add_parser("create", help="save a running machine; it goes on")
    create.add_argument("machine", help="name of the machine, its pid or its number")
    create.add_argument("snapshot", nargs="?", help=f"{SNAPSHOT}; by default the machine's name")
    create.add_argument(
        "--compress", action="store_true", help="compress RAM with zstd; a restore then unpacks all of it"
    )
    create.add_argument("--replace", action="store_true", help="replace a snapshot that is there, in one step")
    create.add_argument(
        "--parent", metavar="SNAPSHOT", help="one that lies beside it: of RAM, only what is other there is kept"
    )
    create.add_argument("--json", action="store_true", help="print JSON")
    listing = acts.add_parser("list", help="list snapshots")
    listing.add_argument("--directory", metavar="DIR", type=Path, help="where to look, instead of this account's own")
    listing.add_argument("--json", action="store_true", help="print JSON, sizes in bytes")
    show = acts.add_parser("show", help="show what a snapshot is of, and the configuration that it restores")
    show.add_argument("snapshot", help=SNAPSHOT)
    show.add_argument("--json", action="store_true", help="print JSON")
    restore = acts.add_parser("restore", help="run a machine from where it was saved")
    restore.add_argument("snapshot", help=SNAPSHOT)
    restore.add_argument("--name", help="name of the machine; by default that of the saved one")
    restore.add_argument("--accel", action="append", metavar="NAME", help="accelerator to try; may be given again")
    restore.add_argument("--config", metavar="VM.toml", help="the machine's configuration, instead of the saved one")
    restore.add_argument("--trust", action="store_true", help="take the configuration of a snapshot of somebody else's")
    restore.add_argument("--verify", action="store_true", help="read all of it first, and compare sums")
    restore.add_argument("--disks", metavar="DIR", help="keep what the guest writes to its disks there")
    restore.add_argument("--any-cpu", action="store_true", help="go on where the processor lacks features it had")
    restore.add_argument("--timeout", metavar="TIME", help="end the machine after this time (60s, 5m)")
    remove = acts.add_parser("rm", help="remove snapshots")
    remove.add_argument("snapshot", nargs="+", help=SNAPSHOT)
    check = acts.add_parser("check", help="read all of a snapshot and compare sums (status 2 when it is damaged)")
    check.add_argument("snapshot", nargs="+", help=SNAPSHOT)


def run(host: Host, arguments: Namespace) -> int:
    """Carry out ``cardcage snapshot``; the process's status. Raises the project's errors."""
    acts: dict[str, Callable[[Host, Namespace], int]] = {
        "create": _create,
        "list": _list,
        "show": _show,
        "restore": _restore,
        "rm": _remove,
        "check": _check,
    }
    return acts[arguments.act](host, arguments)


def _create(host: Host, arguments: Namespace) -> int:
    entry = find(arguments.machine)
    path = located(arguments.snapshot or entry.name)
    made = create(entry, path, compress=arguments.compress, replace=arguments.replace, parent=arguments.parent)
    if arguments.json:
        print(json.dumps({**asdict(made), "path": str(path)}))
    else:
        print(f"{path}: {say_size(made.stored)}; the guest stood still for {made.stood * 1000:.1f} ms")
    return 0


def _found(path: Path) -> tuple[Manifest, bool]:
    with Folder(path) as folder:
        return read(folder)


def _stored(path: Path) -> int:
    return sum(one.lstat().st_blocks * 512 for one in path.iterdir())


def _parent(manifest: Manifest) -> str | None:
    return manifest.ram.parent.name if manifest.ram.parent is not None else None


def _row(path: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"name": path.name, "path": str(path)}
    try:
        manifest, ours = _found(path)
        row |= {key: getattr(manifest, key) for key in ("machine", "made", "memory", "cpus", "accelerator", "cardcage")}
        row |= {"stored": _stored(path), "disks": len(manifest.disks), "ours": ours, "parent": _parent(manifest)}
    except (ConfigError, OSError) as error:
        row["error"] = printable(str(error))
    return row


def _list(host: Host, arguments: Namespace) -> int:
    root = arguments.directory if arguments.directory is not None else snapshot_root()
    try:
        paths = sorted(one for one in root.iterdir() if (one / MANIFEST).exists() and not one.name.startswith("."))
    except FileNotFoundError:
        paths = []
        if arguments.directory is not None:
            raise ConfigError("there is no such directory", file=str(root)) from None
    except OSError as error:
        raise ConfigError(f"cannot be listed: {error.strerror}", file=str(root)) from error
    rows = [_row(one) for one in paths]
    if arguments.json:
        print(json.dumps(rows))
        return 0
    table = [("NAME", "MACHINE", "MADE", "MEMORY", "STORED", "DISKS")]
    for row in rows:
        if "error" in row:
            table.append((row["name"], row["error"], "", "", "", ""))
        else:
            sizes = say_size(row["memory"]), say_size(row["stored"])
            table.append((row["name"], printable(row["machine"]), _when(row["made"]), *sizes, str(row["disks"])))
    widths = [max(len(row[at]) for row in table if row[2]) for at in range(6)]
    for one in table:
        print("  ".join(text.ljust(width) for text, width in zip(one, widths, strict=True)).rstrip())
    return 0


def _when(seconds: float) -> str:
    try:
        return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")
    except (ValueError, OverflowError, OSError):
        return "?"


def _show(host: Host, arguments: Namespace) -> int:
    path = located(arguments.snapshot)
    manifest, ours = _found(path)
    if arguments.json:
        print(json.dumps({"path": str(path), "ours": ours, **asdict(manifest)}))
        return 0
    cards = sorted({f"{one.card} ({one.distribution} {one.release})" for one in manifest.devices})
    rows = [
        ("machine", manifest.machine),
        ("made", f"{_when(manifest.made)} by cardcage {manifest.cardcage}" + ("" if ours else ", not by this account")),
        ("label", manifest.label),
        ("memory", say_size(manifest.memory)),
        ("processors", str(manifest.cpus)),
        ("accelerator", f"{manifest.accelerator} on {manifest.processor or '?'}, Linux {manifest.kernel or '?'}"),
        ("stored", f"{say_size(_stored(path))}, RAM {manifest.ram.compression.replace('none', 'not compressed')}"),
        *([("parent", parent)] if (parent := _parent(manifest)) is not None else []),
        ("agent", "answered" if manifest.agent else "none"),
        *(("disk", f"{one.device}: {say_size(one.size)}, {one.file or one.path}") for one in manifest.disks),
        ("cards", ", ".join(cards)),
        ("configuration", json.dumps(manifest.config)),
    ]
    for key, value in rows:
        print(f"{key:14} {printable(value)}")
    return 0


def _restore(host: Host, arguments: Namespace) -> int:
    from cardcage.machine import Machine

    from cardcage_snapshot.restoring import restore, settle

    timeout = timeout_of(arguments)
    sys.setswitchinterval(SWITCH_INTERVAL)
    path = located(arguments.snapshot)
    agent = _found(path)[0].agent
    machine = restore(
        Machine,
        path,
        name=arguments.name,
        accel=arguments.accel,
        config=arguments.config,
        trust=arguments.trust,
        verify=arguments.verify,
        disks=arguments.disks,
        any_cpu=arguments.any_cpu,
        start=False,
        host=host,
    )
    try:
        print(f"name: {machine.name}\naccelerator: {machine.accelerator.why}", file=sys.stderr, flush=True)
        if machine.console.claimed:
            machine.open_console("stdio")
        machine.start(boot=False)
        settle(machine, agent)
    except BaseException:
        machine.dismantle()
        raise
    return run_machine(machine, timeout=timeout, console=None)


def _remove(host: Host, arguments: Namespace) -> int:
    from cardcage_snapshot.creating import remove

    for one in arguments.snapshot:
        remove(host, located(one))
    return 0


def _check(host: Host, arguments: Namespace) -> int:
    from cardcage_snapshot.restoring import check_files

    wrong: list[ConfigError] = []
    for one in arguments.snapshot:
        path = located(one)
        try:
            with Folder(path) as folder:
                check_files(folder, read(folder)[0])
            print(f"{path}: no damage found")
        except ConfigError as error:
            wrong.append(error)
    for problem in wrong[1:]:
        print(printable(str(problem)), file=sys.stderr)
    if wrong:
        raise wrong[0]
    return 0
