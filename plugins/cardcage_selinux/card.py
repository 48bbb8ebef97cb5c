"""The security card ``selinux``: a policy, its cache and its log as a checker of the core, which can be reloaded."""

from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from attrs import evolve, field, frozen
from cardcage.config import HostPath, beside
from cardcage.errors import ConfigError, UsageError
from cardcage.security import CLASSES, HOST, OPERATOR, Act, Needs

from cardcage_selinux.errors import ContextError
from cardcage_selinux.server.avc import Avc
from cardcage_selinux.server.kept import kept
from cardcage_selinux.svirt.hostlabels import enter, running
from cardcage_selinux.svirt.labels import Svirt

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage_selinux.server.policy import Policy

__all__ = ["DEFAULT", "Selinux", "SelinuxOptions"]

DEFAULT = Path(__file__).with_name("default.cil")
"""The policy that ships; the word ``default`` in a list of policies."""

NAMED = (OPERATOR, HOST, "policy")
"""Words that are labels from the beginning: initial sids that each policy has to have."""


@frozen
class SelinuxOptions:
    """Options of ``{ type = "selinux" }``.

    Attributes:
        policy: CIL files that make one policy; ``default`` is the policy that ships.
        enforcing: refuse what is denied; else (permissive) log it and let it pass.
        booleans: values that differ from the policy's own.
        audit: where denials are written: ``stderr``, ``none``, or a file, which is appended to.
        labels: ``dynamic`` gives each machine a pair of categories of its own, unless its ``label`` is given;
            ``static`` gives none. Either labels images and sockets; ``none`` leaves files alone.
        confine: where the host runs SELinux: this process, which has one machine, takes the machine's label for real.
        state: directory of the records of labelled files; by default ``/var/lib/cardcage/svirt``, for other users
            than root ``$XDG_STATE_HOME/cardcage/svirt``.
    """

    policy: list[str] = field(factory=lambda: ["default"])
    enforcing: bool = True
    booleans: dict[str, bool] = field(factory=dict)
    audit: str = "stderr"
    labels: Literal["dynamic", "static", "none"] = "dynamic"
    confine: bool = False
    state: HostPath | None = None


class Selinux:
    """A checker (:class:`cardcage.security.Checker`) that labels and can change.

    Raises :exc:`~cardcage.errors.ConfigError` (such as the policy's errors, with file, line and column).
    """

    def __init__(self, options: SelinuxOptions) -> None:
        self.options = options
        self._lock = threading.Lock()
        self._subscribers: list[Callable[[], None]] = []
        self._fd = -1
        policy = self._load()
        if options.audit not in ("stderr", "none"):
            audit = beside(options.audit)
            try:
                self._fd = os.open(audit, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            except OSError as error:
                raise ConfigError(f"the audit log cannot be written: {error.strerror}", file=audit) from error
        self.avc = Avc(policy, enforcing=options.enforcing, audit=self._write)
        self.avc.on_change(self._changed)
        self.svirt = Svirt(self, options.labels, options.state)

    def _load(self) -> Policy:
        policy = kept(self._files())
        policy.require(CLASSES)
        for name in NAMED:
            if name not in policy.tables.sids:
                raise ConfigError(f'the policy has no (sidcontext {name} ...), the label of the "{name}"')
        try:
            return policy.with_booleans(self.options.booleans)
        except UsageError as error:
            raise ConfigError(str(error), key="booleans") from error

    def _files(self) -> list[Path]:
        return [DEFAULT if one == "default" else Path(beside(one)) for one in self.options.policy]

    def _write(self, line: str) -> None:
        if self._fd >= 0:
            os.write(self._fd, f"{line}\n".encode())
        elif self.options.audit == "stderr":
            print(line, file=sys.stderr, flush=True)

    # what the core asks

    def check(self, act: Act, /) -> None:
        """See :class:`cardcage.security.Checker`."""
        self.avc.check(act)

    def needs(self) -> Needs:
        """The policy's files, which can be loaded again, and the records of labels."""
        return evolve(self.svirt.needs(), read=tuple(os.path.abspath(one) for one in self._files()))

    def context(self, label: str) -> str:
        """The context of *label*: itself, or that of the policy's sid of this name. Raises ContextError."""
        return self.avc.context(label)

    def sid(self, name: str) -> str | None:
        """The context of the policy's sid *name*, ``None`` when it has none."""
        found: str | None = self.avc.policy.tables.sids.get(name)
        return found

    def label(self, act: Act, name: str, /) -> str:
        """See :class:`cardcage.security.Labeller`."""
        source, target, tclass = self.context(act.source), self.context(act.target), act.tclass
        if tclass == "machine":
            made = self.svirt.machine(self.create(source, target, tclass, name))
            if self.options.confine and running() is not None:
                enter(made)
            return made
        if tclass in ("image", "socket"):
            return self.svirt.file(evolve(act, source=source, target=target), name)
        if tclass == "backend":  # "char:stdio": a rule for this one, else the rule for its kind
            kind, bare = name.partition(":")[0], self.create(source, target, tclass)
            exact = self.create(source, target, tclass, name)
            return exact if exact != bare else self.create(source, target, tclass, kind)
        return self.create(source, target, tclass, name)

    def create(self, source: str, target: str, tclass: str, name: str | None = None) -> str:
        """The policy's context of a new object."""
        return self.avc.policy.compute_create(source, target, tclass, name)

    def may(self, act: Act) -> bool:
        """True if the policy (or its permissive mode) lets it pass; nothing is logged."""
        policy = self.avc.policy
        try:
            vector = policy.compute_av(act.source, act.target, act.tclass)
        except ContextError:
            return False
        mask = policy.mask(act.tclass, act.permissions)
        return vector.allowed & mask == mask or vector.permissive or not self.avc.enforcing

    def release(self, label: str, tclass: str, /) -> None:
        """A machine has ended: its categories are free, its files have their old labels again."""
        self.svirt.release(label)

    def subscribe(self, changed: Callable[[], None], /) -> Callable[[], None]:
        """See :class:`cardcage.security.PolicySource`."""
        with self._lock:
            self._subscribers.append(changed)

        def end() -> None:
            with self._lock:
                self._subscribers.remove(changed)

        return end

    def _changed(self) -> None:
        with self._lock:
            subscribers = list(self._subscribers)
        for changed in subscribers:
            changed()

    def close(self) -> None:
        """Idempotent."""
        self.svirt.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    # what an operator changes at run time

    def reload(self) -> None:
        """Read the policy's files anew and put them in force. Raises ConfigError or Denied; then nothing changed."""
        self._allow("load")
        self.avc.reload(self._load())

    def set_booleans(self, **values: bool) -> None:
        """Give booleans values. Raises UsageError for a name that is none, or Denied."""
        self._allow("setbool")
        self.avc.set_booleans(values)

    def set_enforcing(self, on: bool) -> None:
        """Enforcing, or permissive. Raises Denied."""
        self._allow("setenforce")
        self.avc.enforcing = on

    def _allow(self, permission: str) -> None:
        self.check(Act(OPERATOR, "policy", "policy", (permission,)))
