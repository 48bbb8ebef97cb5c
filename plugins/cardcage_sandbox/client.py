"""Sandboxes, as those who use them have them: from any process of the user."""

from __future__ import annotations

import builtins
import os
from typing import TYPE_CHECKING, Any

from attrs import frozen
from cardcage.errors import HostError, UsageError
from cardcage_fleet.control import command, find

from cardcage_sandbox.commands import Commands, Pty, seconds
from cardcage_sandbox.files import Files
from cardcage_sandbox.template import Template, keeper_of, keepers, load_template

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path
    from typing import Self

    from cardcage_fleet.roster import RosterEntry
    from cardcage_snapshot import Snapshot

__all__ = ["Sandbox", "SandboxInfo"]

NO_NETWORK = (
    "network: a sandbox has no network card that leads everywhere: "
    "name what it may reach, as egress=[...] (network.allow_out of e2b's SDK)"
)


@frozen
class SandboxInfo:
    """Facts of a sandbox.

    Attributes:
        id: its name. template: its template's. pid: of its process. state: ``running`` or ``paused``.
        started, ends: seconds since 1970. metadata: its maker's. cpus: virtual processors. memory, disk: bytes.
        user: whose commands and files are meant when nobody is named.
    """

    id: str
    template: str
    pid: int
    state: str
    started: float
    ends: float
    metadata: dict[str, str]
    cpus: int
    memory: int
    disk: int
    user: str


class Sandbox:
    """A guest of one's own, without a network unless one is opened.

    Leaving a ``with`` ends it; else its time does, or :meth:`kill`.

    Attributes:
        id: its name. made: what there was to know of it at first. commands, files, pty: what is in it.
    """

    def __init__(self, keeper: RosterEntry, told: dict[str, Any]) -> None:
        self._keeper, self._envs = keeper, {str(name): str(value) for name, value in told.pop("envs", {}).items()}
        self.made = SandboxInfo(**told)
        self.id = self.made.id
        entry = find(str(self.made.pid))
        self.commands = Commands(entry, self.id, self.made.user, self._envs)
        self.files = Files(entry, self.id, self.made.user)
        self.pty = Pty(entry, self.id, self.made.user, self._envs)

    @classmethod
    def create(
        cls,
        template: str | os.PathLike[str] | Template = "base",
        *,
        timeout: float | str = 300,
        metadata: Mapping[str, str] | None = None,
        envs: Mapping[str, str] | None = None,
        on_timeout: str = "kill",
        memory: int | str | None = None,
        disk: int | str | None = None,
        cpus: int | None = None,
        root: str | os.PathLike[str] | None = None,
        egress: Iterable[str] | None = None,
        snapshot: str | os.PathLike[str] | None = None,
        network: object = None,
    ) -> Self:
        """A new sandbox: a copy of the template's machine, which boots for the first one.

        Args:
            template: ``"base"``, a file of TOML, or a :class:`Template`.
            timeout: seconds that it lives, up to a day; whoever made it may have ended by then.
            metadata: text by name, 4 KiB at most. envs: variables of each command, 8 KiB at most.
            on_timeout: ``"kill"``, or ``"pause"``.
            memory, disk, cpus: limits in place of the template's; others have a template's process of their own.
            root: a directory, a tar archive or an OCI image layout that is the guest's root, likewise.
            egress: names and addresses that it may reach, and no others: ``["pypi.org", "10.1.0.0/16:5432"]``
                (:attr:`Template.egress`), likewise in place of the template's.
            snapshot: what a sandbox of this template was kept as (:meth:`snapshot`), from which it goes on, with its
                memory and cpus; root and egress are given anew, where they were.
            network: None. Anything else is refused: there is no way out but that of *egress*.

        Raises UsageError, ConfigError for a wrong template, HostError where the host or the guest is in the way.
        """
        if network not in (None, False):
            raise UsageError(NO_NETWORK)
        limits = {"memory": memory, "disk": disk, "cpus": cpus, "egress": egress}
        limits["root"] = None if root is None else os.path.abspath(os.fspath(root))
        if snapshot is not None:
            if given := [name for name in ("memory", "disk", "cpus") if limits[name] is not None]:
                raise UsageError(f"{given[0]}: a snapshot has its own")
            limits["snapshot"] = str(_located(snapshot))
        chosen = load_template(template).with_limits(**limits)
        asked = {
            "timeout": seconds(timeout),
            "metadata": dict(metadata or {}),
            "envs": dict(envs or {}),
            "on_timeout": on_timeout,
        }
        keeper = keeper_of(chosen)
        return cls(keeper, _asked(keeper, "create", **asked))

    @classmethod
    def connect(cls, id: str) -> Self:
        """A sandbox that somebody made, by its name. Raises UsageError where there is none."""
        for keeper in keepers():
            try:
                return cls(keeper, _asked(keeper, "get", id=id))
            except (UsageError, HostError):  # not this one's, or it ended
                continue
        raise UsageError(f'no sandbox "{id}" was found')

    @classmethod
    def list(cls) -> list[SandboxInfo]:
        """The sandboxes of this user, by when they started."""
        found: list[SandboxInfo] = []
        for keeper in keepers():
            try:
                found += [SandboxInfo(**one) for one in _asked(keeper, "list")]
            except (UsageError, HostError):  # it ended
                continue
        return sorted(found, key=lambda one: one.started)

    def info(self) -> SandboxInfo:
        """Facts of it now. Raises UsageError when it has ended."""
        told = _asked(self._keeper, "get", id=self.id)
        del told["envs"]
        return SandboxInfo(**told)

    @property
    def is_running(self) -> bool:
        """It has not ended, and is not paused."""
        try:
            return self.info().state == "running"
        except (UsageError, HostError):
            return False

    def set_timeout(self, timeout: float | str, *, longer: bool = False) -> None:
        """Let it live *timeout* seconds from now, up to a day; with *longer*, only where that is later."""
        _asked(self._keeper, "extend", id=self.id, timeout=seconds(timeout), longer=longer)

    def pause(self) -> bool:
        """Bring it to a stand, in memory, for a day at most; False where it stands."""
        return bool(_asked(self._keeper, "pause", id=self.id))

    def resume(self, timeout: float | str = 300) -> bool:
        """Let it go on, for *timeout* seconds, with this host's time; False where it runs."""
        return bool(_asked(self._keeper, "resume", id=self.id, timeout=seconds(timeout)))

    def fork(self, n: int = 1, *, timeout: float | str = 300) -> builtins.list[Sandbox]:
        """*n* copies of it as it is, 1 to 100, which live *timeout* seconds.

        Commands that run under :attr:`commands` are ended in the copies; what they left in the background goes on.
        """
        found = _asked(self._keeper, "fork", id=self.id, count=n, timeout=seconds(timeout))
        return [Sandbox(self._keeper, one) for one in found]

    def snapshot(self, where: str | os.PathLike[str], *, replace: bool = False) -> Snapshot:
        """Keep it as it is on the disk, for any later time: ``Sandbox.create(snapshot=...)`` makes sandboxes of that.

        It goes on, or stays paused. Commands that run under :attr:`commands` are ended in those that are made of it;
        what they left in the background goes on. ``cardcage snapshot`` lists, checks and removes what is kept.

        Args:
            where: a name, or the path of a directory, which is made (:func:`cardcage_snapshot.creating.snapshot`).
            replace: one that is there.

        Raises ConfigError for one that is there, HostError where the disk is in the way.
        """
        from cardcage_snapshot.running import create

        self.info()  # it has not ended
        return create(find(str(self.made.pid)), _located(where), compress=False, replace=replace)

    def kill(self) -> bool:
        """End it; False where it has ended."""
        try:
            _asked(self._keeper, "kill", id=self.id)
        except (UsageError, HostError):
            return False
        return True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def __repr__(self) -> str:
        return f"<Sandbox {self.id} of {self.made.template}>"


def _asked(keeper: RosterEntry, do: str, **keys: Any) -> Any:
    return command(keeper, "sandbox-pool", {"do": do, **keys}, timeout=120).get("found")


def _located(where: str | os.PathLike[str]) -> Path:
    from cardcage_snapshot.places import located  # which most who use sandboxes do without

    return located(where)
