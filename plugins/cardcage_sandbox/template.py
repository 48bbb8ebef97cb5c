"""Templates: what a sandbox is made of, and the process that keeps one ready."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import subprocess
import sys
import tomllib
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import asdict, evolve, field
from attrs.validators import ge, le, matches_re
from cardcage.config import HostPath
from cardcage.errors import ConfigError, HostError, UsageError
from cardcage.files import read_file
from cardcage.units import Duration, Size
from cardcage.values import frozen
from cardcage_egress import Policy
from cardcage_fleet.control import command, find
from cardcage_fleet.held import is_held
from cardcage_fleet.rundir import run_directory

from cardcage_sandbox import TemplateOffer

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from cardcage_fleet.roster import RosterEntry

__all__ = ["Template", "keepers", "load_template", "stop_templates"]

FOLDER = "sandboxes"
FILE_MOST = 1 << 16
"""Bytes of a template's file."""
NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,30}")


def _entries(given: Iterable[str]) -> tuple[str, ...]:
    """Entries of a way out in an order of their own: in another one they say the same."""
    return tuple(sorted({str(one).lower() for one in ((given,) if isinstance(given, str) else given)}))


@frozen
class Template:
    """A recipe for sandboxes. One process for each, which starts with its first sandbox, has it booted and paused.

    Attributes:
        name: lower-case letters, digits, ``_``, ``.`` and ``-``, at most 31.
        memory: bytes of RAM, or text such as ``"256M"``. cpus: number of virtual processors, 1 to 64.
        disk: bytes that files may take, which lie in the RAM; 0 for half of it, as it always is with ``root``. The
            guest's root could lift this limit, up to the RAM; ``user`` cannot.
        root: the guest's root: a directory, of which all sandboxes read what this user may, and what they write lies in
            the RAM; or a tar archive or an OCI image layout, which lies there whole; without, an initramfs with
            busybox. kernel: a bzImage or vmlinux in place of the distribution's.
        snapshot: what a sandbox of this template was kept as, by its name or directory (:meth:`Sandbox.snapshot`), from
            which its sandboxes go on: memory, processors and what ``setup`` has made are the snapshot's.
        cgroup: a control group's directory, such as ``/sys/fs/cgroup/sandboxes``, made where only it is missing: all
            sandboxes of the template are in it, and share what it is given of processors, memory and processes.
        user: whose commands and files are meant when nobody is named; made where the guest has none of that name.
        setup: commands of a shell that root runs, once, before the first sandbox.
        envs: variables of each command.
        egress: names and addresses that its sandboxes may reach, such as ``"pypi.org"``, ``"*.pythonhosted.org"``,
            ``"github.com:22/tcp"`` and ``"10.1.0.0/16:5432"`` (:class:`cardcage_egress.Policy`); without, there is no
            network card.
        spare: sandboxes that are made before somebody asks for them, 0 to 16. most: sandboxes at once, 1 to 1000.
        linger: seconds that the process stays without a sandbox.
    """

    name: str = field(default="base", validator=matches_re(NAME))
    memory: Size = field(default=Size("256M"), converter=Size, validator=ge(Size("64M")))
    cpus: int = field(default=1, validator=[ge(1), le(64)])
    disk: Size = field(default=Size(0), converter=Size)
    root: HostPath = ""
    kernel: HostPath = ""
    snapshot: str = ""
    cgroup: HostPath = ""
    user: str = field(default="user", validator=matches_re(r"[a-z_][a-z0-9_-]{0,30}"))
    setup: tuple[str, ...] = field(default=(), converter=tuple)
    envs: dict[str, str] = field(factory=dict)
    egress: tuple[str, ...] = field(default=(), converter=_entries)
    spare: int = field(default=1, validator=[ge(0), le(16)])
    most: int = field(default=100, validator=[ge(1), le(1000)])
    linger: Duration = field(default=Duration("10m"), converter=Duration)

    def __attrs_post_init__(self) -> None:
        if self.root and self.disk:
            raise ValueError("disk: the files of a root of one's own take half of the RAM at most")
        try:
            Policy(self.egress)
        except ValueError as error:
            raise ValueError(f"egress: {error}") from error

    @property
    def space(self) -> int:
        """Bytes that files may take."""
        return int(self.disk) or int(self.memory) // 2

    @property
    def key(self) -> str:
        """The name of its process: another for each other value of its keys."""
        return f"{self.name}-{hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]}"

    def with_limits(self, **limits: Any) -> Template:
        """The same with other keys, those that are None aside. Raises UsageError."""
        try:
            return evolve(self, **{name: value for name, value in limits.items() if value is not None})
        except (TypeError, ValueError) as error:
            raise UsageError(f"a sandbox's limits: {error.args[0]}") from error


def load_template(source: str | os.PathLike[str] | Template) -> Template:
    """``"base"``, a TOML file, or a template. Raises ConfigError for a wrong file, UsageError for a wrong name."""
    if isinstance(source, Template):
        return source
    if source == "base":
        return Template()
    path = Path(source)
    if path.suffix != ".toml":
        raise UsageError(f'no template "{source}": expected "base" or a file whose name ends with .toml')
    from cardcage.host import Host

    try:
        table = tomllib.loads(read_file(path, FILE_MOST, "template").decode())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"not TOML: {error}", file=str(path)) from error
    table.setdefault("name", path.stem)
    with Host() as host:
        found: Template = host.options(host.registry.get(TemplateOffer, "template"), table, file=str(path))
    for name in ("root", "kernel"):  # beside the file
        if value := getattr(found, name):
            found = found.with_limits(**{name: str(path.resolve().parent / value)})
    if "/" in found.snapshot:  # else it is a name
        found = found.with_limits(snapshot=str(path.resolve().parent / found.snapshot))
    return found


def keepers() -> list[RosterEntry]:
    """The templates' processes of this user that run."""
    found = []
    for path in sorted(run_directory(FOLDER).glob("*.pid")):
        with suppress(OSError, ValueError, UsageError):  # it ends, or its file is none
            if is_held(path):
                found.append(find(str(int(path.read_text()[:20]))))
    return found


def keeper_of(template: Template) -> RosterEntry:
    """The process of *template*, started where it does not run. Raises what starting it raises."""
    folder = run_directory(FOLDER)
    path = folder / f"{template.key}.pid"
    with _locked(folder / f"{template.key}.lock"):
        if not is_held(path):
            _start(template)
        return find(str(int(path.read_text()[:20])))


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _start(template: Template) -> None:
    """Start the process, which says a line when it is ready, or why it is not."""
    log = run_directory(FOLDER) / f"{template.key}.log"
    with log.open("wb") as errors:
        started = subprocess.Popen(
            [sys.executable, "-m", "cardcage_sandbox.keeper"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            start_new_session=True,
        )
    with started:  # it goes on as another process, and the first one ends
        said, _ = started.communicate(json.dumps(asdict(template)).encode())
    if said != b"ready\n":
        try:
            why = json.loads(said)
        except ValueError:
            why = ["HostError", f'the process of template "{template.name}" ended before it was ready: see {log}']
        kind = {"ConfigError": ConfigError, "UsageError": UsageError}.get(why[0], HostError)
        raise kind(why[1])


def stop_templates() -> None:
    """End all templates' processes of this user, with their sandboxes."""
    for one in keepers():
        with suppress(HostError, UsageError):  # it ended first
            command(one, "sandbox-pool", {"do": "stop"})
            _gone(one.pid)


def _gone(pid: int) -> None:
    """Wait for the end of a process."""
    from cardcage_fork.process import await_readable

    with suppress(ProcessLookupError):
        fd = os.pidfd_open(pid)
        try:
            await_readable(fd, 30)
        finally:
            os.close(fd)
