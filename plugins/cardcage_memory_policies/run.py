"""The drive of policies: which machines each is for, its thread, and what ``[policy] memory`` names."""

from __future__ import annotations

import threading
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from attrs import frozen
from cardcage.abilities import has, require, tell_near_misses
from cardcage.config import specs_of
from cardcage.security import HasNeeds, Needs
from cardcage.waiting import Event

from cardcage_memory_policies import PolicyOffer
from cardcage_memory_policies.memory import MachineMemory
from cardcage_memory_policies.policy import POLICY, Detachable, Policy, Stepping

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.config import Spec
    from cardcage.host import Host
    from cardcage.machine import Machine

__all__ = ["AttachedPolicy", "PolicyRun", "attach_policies", "detach_policies", "policies_of"]


class PolicyRun:
    """Drives one policy: attaches machines, and calls its ``step`` on a thread of its own while there are any.

    The policy hears one call at a time. Raises CardError for wrong signatures.

    Args:
        policy: the card's object. name: the configuration's word for it. who: it, its card and distribution.

    Attributes:
        stepping: set it to False before the first machine, and call ``step`` yourself.
        told: what it can do nothing about on this host, as far as that was said.
    """

    def __init__(self, policy: Any, name: str, who: str) -> None:
        self.policy, self.name = require(policy, Policy, who), name
        self._detach = policy.detach if has(policy, Detachable, who) else None
        self._step = policy.step if has(policy, Stepping, who) else None
        self.stepping = self._step is not None
        self.told: set[str] = set()
        self._machines: list[MachineMemory] = []
        self._lock = threading.Lock()  # one attach or detach at a time
        self._calling = threading.Lock()  # the policy hears one call at a time
        self._thread: threading.Thread | None = None
        self._stop = Event()

    def attach(self, memory: MachineMemory) -> None:
        """Give the policy one more machine. What the policy raises, it refuses with."""
        with self._lock:
            with self._calling:
                self.policy.attach(memory)
            self._machines = [*self._machines, memory]
            if self.stepping and self._step is not None and self._thread is None:
                self._stop = Event()
                main = partial(self._main, self._step, self._stop)
                self._thread = threading.Thread(target=main, name=f"policy-{self.name}", daemon=True)
                self._thread.start()

    def detach(self, memory: MachineMemory) -> None:
        """Take a machine from the policy; its thread ends with the last. Nothing when it is not there."""
        with self._lock:
            if not any(one is memory for one in self._machines):
                return
            self._machines = [one for one in self._machines if one is not memory]
            if not self._machines and self._thread is not None:
                self._stop.set()
                self._thread.join()
                self._thread = None
            if self._detach is not None:
                with self._calling:
                    self._detach(memory)

    def _main(self, step: Callable[[], None], stop: Event) -> None:
        while not stop.wait(float(getattr(self.policy, "interval", 1.0))):
            try:
                with self._calling:
                    step()
            except BaseException as error:  # a card's exception ends its machines, and is raised by wait()
                for memory in self._machines:
                    memory.fail(error)
                return


@frozen(eq=False)
class AttachedPolicy:
    """A policy's drive, and the machine's memory as it sees it."""

    run: PolicyRun
    memory: MachineMemory

    @property
    def policy(self) -> Any:
        """The card's object."""
        return self.run.policy


def _attached(host: Host) -> WeakKeyDictionary[Machine, list[AttachedPolicy]]:
    found: WeakKeyDictionary[Machine, list[AttachedPolicy]]
    found = host.share("memory_policies:attached", WeakKeyDictionary)
    return found


def policies_of(machine: Machine) -> list[AttachedPolicy]:
    """The policies that *machine* has, in the order of its configuration; none once it is closed."""
    return list(_attached(machine.host).get(machine, ()))


def attach_policies(machine: Machine) -> None:
    """Attach what ``policy.memory`` names. Raises ConfigError, CardError, or what a policy refuses with."""
    attached: list[AttachedPolicy] = _attached(machine.host).setdefault(machine, [])
    for spec in specs_of(machine.config.policy.get("memory", []), machine.config.place("policy.memory")):
        run, who = _run(machine.host, spec)
        tell_near_misses(run.policy, POLICY, who, machine.log)
        memory = MachineMemory(machine, run.name, run.told)
        spec.place.blamed(who, partial(run.attach, memory))
        attached.append(AttachedPolicy(run, memory))


def _run(host: Host, spec: Spec) -> tuple[PolicyRun, str]:
    """Return the policy's drive; where it is shared, one for all machines that name it with equal options."""
    place = spec.place
    offer = host.registry.get(PolicyOffer, spec.name, file=place.file, key=place.key)
    who = offer.who
    if not offer.shared:
        return PolicyRun(host.make(PolicyOffer, spec), spec.name, who), who
    options = host.options(offer, spec.options, file=place.file, key=place.key)
    run: PolicyRun = host.share(
        f"policy:{spec.name}:{options!r}", lambda: PolicyRun(host.make(PolicyOffer, spec), spec.name, who)
    )
    return run, who


def needs(machine: Machine) -> Needs:
    """See :func:`cardcage_memory_policies.cardcage_needs`."""
    read = ["/sys/fs/cgroup", "/sys/kernel/mm"]
    write: list[str] = []
    for one in policies_of(machine):
        if has(one.policy, HasNeeds):
            asked = one.policy.needs()
            read += asked.read
            write += asked.write
    return Needs(tuple(read), tuple(write))


def detach_policies(machine: Machine) -> None:
    """Take the machine from its policies, the last first. Idempotent."""
    for one in reversed(_attached(machine.host).pop(machine, [])):
        try:
            one.run.detach(one.memory)
        except Exception as error:  # one card's fault must not keep the machine from giving back what it holds
            machine.log.error("detach failed", policy=one.run.name, error=repr(error))
        one.memory.release()
