"""The process of a template: ``python -m cardcage_sandbox.keeper``, with the template on its standard input.

It boots a machine, sets it up, pauses it, and is a pool of copies of it from then on. Its sandboxes end with it.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from contextlib import contextmanager, suppress
from subprocess import TimeoutExpired
from typing import TYPE_CHECKING, Any

from cardcage.errors import CardcageError, HostError, in_words
from cardcage.host import Host
from cardcage_agent import Machine
from cardcage_fleet.held import hold
from cardcage_fleet.rundir import run_directory
from cardcage_snapshot.manifest import read
from cardcage_snapshot.places import Folder, located
from cardcage_snapshot.tables import ids_of, tables_of

import cardcage_sandbox.guest  # noqa: F401  # loaded here, so that no sandbox loads it for its first command
from cardcage_sandbox import POOL
from cardcage_sandbox.pool import Pool
from cardcage_sandbox.template import FOLDER, Template

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cardcage_fleet.held import HeldFile

__all__ = ["main"]

SETUP = 600.0
"""Seconds for each command of a template's setup."""
PREPARE = """set -e
user={user}
grep -q ^root: /etc/passwd 2>/dev/null || {{
    mkdir -p /etc /root
    echo root:x:0:0::/root:/bin/sh >>/etc/passwd
}}
grep -q "^$user:" /etc/passwd || {{
    echo "$user:x:1000:1000::/home/$user:/bin/sh" >>/etc/passwd
    grep -q "^$user:" /etc/group 2>/dev/null || echo "$user:x:1000:" >>/etc/group
    mkdir -p /home/$user
    chown 1000:1000 /home/$user
}}
[ -e /bin/bash ] || {{ printf '#!/bin/sh\\nexec /bin/sh "$@"\\n' >/bin/bash; chmod 755 /bin/bash; }}
mount -o remount,size=64k /dev 2>/dev/null || :
if grep -q '^rootfs / ' /proc/mounts; then
    umount /tmp
    chmod 1777 /tmp
    mount -o remount,size={space} /
    for place in /run /dev/shm; do mount -o remount,size={small},mode=1777 $place; done
fi
"""
"""Setup of each template: root and its user, a ``bash`` for who asks for one, and the limit of its files."""

NETWORK = """tries=200
until grep -q 198.18.0.1 /etc/resolv.conf 2>/dev/null; do
    [ $((tries -= 1)) -gt 0 ] || { echo "the guest has no address: no driver of its kernel, or no udhcpc" >&2; exit 1; }
    usleep 50000 2>/dev/null || sleep 1
done
"""
"""With a way out: the guest has its address, which it asks for while it boots."""


def main() -> None:
    """Run until nobody has had a sandbox for a while, or somebody stops it."""
    template = Template(**json.load(sys.stdin))
    if os.fork():
        os._exit(0)
    told = Told(os.dup(1))
    os.dup2(2, 1)
    try:
        held = hold(run_directory(FOLDER) / f"{template.key}.pid")
        if held is None:
            raise HostError(f'the template "{template.name}" has a process already')
        os.write(held.fd, str(os.getpid()).encode())
        _keep(template, held, told)
    except (CardcageError, OSError) as error:
        kind = next((one.__name__ for one in type(error).__mro__ if one.__name__ in ("ConfigError", "UsageError")), "")
        told.say(json.dumps([kind, str(error) or in_words(error)]).encode())
        raise SystemExit(f"cardcage: {error}") from error


class Told:
    """The pipe to who started this process, which hears one line, and waits for its end."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def say(self, line: bytes) -> None:
        """Say it, once."""
        if self._fd >= 0:
            with suppress(OSError):  # nobody waits any longer
                os.write(self._fd, line)
            os.close(self._fd)
            self._fd = -1


def _keep(template: Template, held: HeldFile, told: Told) -> None:
    host = Host(owns_process=True)
    host.share(POOL, dict)["file"] = held.path
    made = _restored if template.snapshot else _booted
    with made(template, host) as machine:
        machine.pause()
        own = machine.config.machine
        pool = Pool(machine, template.with_limits(memory=own.memory, cpus=own.cpus), held)
        machine.host.share(POOL, dict)["pool"] = pool
        told.say(b"ready\n")  # before anything is forked, which would have the pipe too
        with pool:
            pool.run()


def _machine(template: Template, host: Host) -> Machine:
    """The template's machine, which was not started."""
    keys: dict[str, Any] = {name: value for name in ("root", "kernel") if (value := getattr(template, name))}
    if template.egress:
        keys["devices"] = [{"type": "virtio-net", "net": {"type": "egress", "allow": list(template.egress)}}]
    keys["fragments"] = [{"policy": {"process": {"cgroup": template.cgroup}} if template.cgroup else {}}]
    name, memory, cpus = f"sandbox.{template.name}", template.memory, template.cpus
    return Machine.debian(name=name, memory=memory, cpus=cpus, accel="tcg", host=host, **keys)


@contextmanager
def _booted(template: Template, host: Host) -> Iterator[Machine]:
    """A machine that has booted, and was set up."""
    with _machine(template, host) as machine:
        machine.start()
        _set_up(machine, template)
        yield machine


@contextmanager
def _restored(template: Template, host: Host) -> Iterator[Machine]:
    """A machine that goes on from a snapshot of a sandbox.

    That has the memory and the devices' state. Whatever names files of this host is the template's word, and not that
    of a sandbox: its process was in a jail, and may have been taken over.
    """
    with Folder(located(template.snapshot)) as folder:
        manifest, _ = read(folder)
    template = template.with_limits(memory=manifest.memory, cpus=manifest.cpus)
    with Host(owns_process=True) as other, _machine(template, other) as machine:
        tables = tables_of(machine.config, ids_of(machine))
    del tables["defaults"]  # which the platform has again
    made: Any = Machine
    with made.restore(located(template.snapshot), name=f"sandbox.{template.name}", config=tables, host=host) as machine:
        yield machine


def _set_up(machine: Machine, template: Template) -> None:
    """Run the setup. Raises HostError with what the guest wrote."""
    prepare = PREPARE.format(user=shlex.quote(template.user), space=template.space, small=template.space // 8)
    network = (NETWORK,) if template.egress else ()
    for text in (*network, prepare, *template.setup):
        try:
            done = machine.run(text, timeout=SETUP, limit=1 << 20)
        except TimeoutExpired as error:
            raise HostError(f'template "{template.name}": setup {text[:40]!r} took more than {SETUP:g} s') from error
        if done.returncode:
            said = (done.stderr or done.stdout)[-400:].decode(errors="replace").strip().replace("\n", "; ")
            raise HostError(f'template "{template.name}": setup {text[:40]!r} ended with {done.returncode}: {said}')


if __name__ == "__main__":
    main()
