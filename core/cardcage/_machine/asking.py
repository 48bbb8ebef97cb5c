"""A device's questions to security, and what it was granted: the same for all parts of its slot."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from attrs import evolve

from cardcage.security import Act

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage._machine.granted import BackendGate
    from cardcage.security import Grant, Mediator


def nothing() -> None:
    """There is nothing to do."""


class Asking:
    """Asks in the name of one device.

    Args:
        label: the device's. machine, machine_label: the machine's name and label. device: the device's id.

    Attributes:
        gate: the gate before the back end that is being opened: what it asks for shuts it when it is revoked.
    """

    def __init__(self, mediator: Mediator, machine: str, machine_label: str, device: str, label: str) -> None:
        self.mediator, self.machine, self.machine_label, self.device, self.label = (
            mediator,
            machine,
            machine_label,
            device,
            label,
        )
        self.gate: BackendGate | None = None
        self._grants: dict[Grant, None] = {}

    @property
    def active(self) -> bool:
        """True when there are checkers to ask."""
        return bool(self.mediator.checkers)

    def act(self, target: str, tclass: str, permissions: tuple[str, ...], /, **facts: object) -> Act:
        """An act of the device, with the names of its machine and itself for the audit."""
        told = {"machine": self.machine, "device": self.device, **facts}
        return Act(self.label, target, tclass, permissions, told)

    def ask(
        self,
        tclass: str,
        name: str,
        permissions: tuple[str, ...],
        /,
        revoke: Callable[[], None] | None = None,
        restore: Callable[[], None] | None = None,
        **facts: object,
    ) -> Callable[[], None]:
        """See :meth:`cardcage.device.HostSide.ask`."""
        if not self.active:
            return nothing
        act = self.act(self.machine_label, tclass, permissions, **{"name": name, **facts})
        act = evolve(act, target=self.mediator.label(act, name))
        if self.gate is not None and revoke is None:  # a back end that is being opened: the gate before it shuts
            why = f"{tclass} {permissions} {act.target} {name}"
            return self.grant(act, self.gate.shut(why), self.gate.open(why))
        if revoke is not None:
            return self.grant(act, revoke, restore or nothing)
        self.mediator.check(act)
        return nothing

    def check(self, target: str, tclass: str, permissions: tuple[str, ...], **facts: object) -> None:
        """Ask now. Raises Denied."""
        if self.active:
            self.mediator.check(self.act(target, tclass, permissions, **facts))

    def grant(
        self, act: Act, revoke: Callable[[], None], restore: Callable[[], None], *, must: bool = True
    ) -> Callable[[], None]:
        """Ask now and at each change of policy; the result drops the grant. See :class:`cardcage.security.Mediator`."""
        grant = self.mediator.grant(act, revoke, restore, must=must)
        if grant is None:
            return nothing
        self._grants[grant] = None
        return partial(self._drop, grant)

    def _drop(self, grant: Grant) -> None:
        """Idempotent, on any thread."""
        self._grants.pop(grant, None)
        grant.drop()

    def close(self) -> None:
        """Drop all grants."""
        while self._grants:
            self._grants.popitem()[0].drop()
