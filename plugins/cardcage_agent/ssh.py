"""OpenSSH into a guest, by its agent in place of a network: the server is run for each connection (``sshd -i``)."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cardcage.errors import HostError, StateError
from cardcage.registry import CommandOffer

if TYPE_CHECKING:
    from cardcage_agent.verbs import Machine

__all__ = ["ssh_config"]

KEYS = "mkdir -p -m 755 /run/sshd && folder=$(mktemp -d /run/cardcage-ssh.XXXXXX) && chmod 755 $folder && echo $folder"
"""Makes the guest's directory of keys; the other is for the server's unprivileged process."""
OPTIONS = (
    "HostKey={}/host",
    "AuthorizedKeysFile={}/authorized",
    "StrictModes=no",  # anybody may write in /run of our initramfs, but not in the keys' directory
    "PasswordAuthentication=no",
    "KbdInteractiveAuthentication=no",
    "PermitRootLogin=prohibit-password",
    "UsePAM=no",
    "Subsystem=sftp internal-sftp",
)
"""Of the server, in place of its own configuration."""
PROGRAM = (sys.executable, "-c", "import sys; from cardcage_cli import main; sys.exit(main())")
QUIETLY = ("env", "--ignore-signal=HUP")
"""ssh sends that to its proxy at the end, whose input ends as well: that is enough."""


def ssh_config(machine: Machine, user: str, server: str) -> Path:
    """See :meth:`cardcage_agent.verbs.Verbs.ssh_config`."""
    if "exec" not in machine.host.registry.names(CommandOffer):
        raise StateError(f'{machine.name}: no card offers the command "exec", which carries the connection')
    if re.fullmatch(r"[\w.-]+", machine.name) is None:
        raise StateError(f'a host "{machine.name}": expected a name of letters, digits, "_", "." and "-"')
    if re.fullmatch(r"[\w.-]+", user) is None:
        raise StateError(f'a user "{user}": expected letters, digits, "_", "." and "-"')
    keygen = shutil.which("ssh-keygen")
    if keygen is None:
        raise HostError("ssh-keygen is missing on this host: it is OpenSSH's (Debian: openssh-client)")
    if not machine.files.exists(server):
        raise StateError(f"{machine.name}: no OpenSSH server at {server} in the guest (Debian: openssh-server)")
    folder = tempfile.mkdtemp(prefix="cardcage-ssh-")
    machine.defer(lambda: shutil.rmtree(folder, ignore_errors=True))
    here = Path(folder)
    for name in ("user", "host"):
        words = [keygen, "-q", "-t", "ed25519", "-N", "", "-C", machine.name, "-f", str(here / name)]
        done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode:
            raise HostError(f"ssh-keygen: {done.stderr.strip()}")
    there = machine.run(["/bin/sh", "-c", KEYS], text=True, check=True).stdout.strip()
    machine.files.write(f"{there}/host", (here / "host").read_bytes(), mode=0o600)
    machine.files.write(f"{there}/authorized", (here / "user.pub").read_bytes(), mode=0o644)
    (here / "known_hosts").write_text(f"{machine.name} {(here / 'host.pub').read_text()}")
    os.unlink(here / "host")
    config = here / "config"
    serve = [server, "-i", "-q", "-f", "/dev/null", *(part for one in OPTIONS for part in ("-o", one.format(there)))]
    config.write_text(_text(machine.name, user, serve, here))
    return config


def _text(name: str, user: str, serve: list[str], here: Path) -> str:
    """The configuration (ssh_config(5)); a per cent sign would be expanded."""
    proxy = shlex.join([*QUIETLY, *PROGRAM, "exec", "--no-tty", name, "--", *serve]).replace("%", "%%")
    return (
        f"Host {name}\n"
        f"  User {user}\n"
        f"  HostKeyAlias {name}\n"
        f"  ProxyCommand {proxy}\n"
        f"  IdentityFile {here}/user\n"
        "  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {here}/known_hosts\n"
        "  StrictHostKeyChecking yes\n"
        "  LogLevel ERROR\n"
    )
