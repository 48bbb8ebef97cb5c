"""A machine's monitor: who listens, what happened, and what the machine is in QEMU's words."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Any, Literal, NotRequired, Protocol, TypedDict
from weakref import WeakKeyDictionary, ref

from cardcage.errors import StateError, UsageError
from cardcage.outcome import Crashed, DebugExit, Panicked, PoweredOff, Reset
from cardcage.registry import AcceleratorOffer
from cardcage.waiting import Event

from cardcage_qmp.removals import Removals
from cardcage_qmp.schema import table_of

if TYPE_CHECKING:
    from cardcage.machine import Machine, PluggedDevice
    from cardcage.outcome import Outcome

    from cardcage_qmp.server import Peer, Qmp

__all__ = [
    "BlockIoError",
    "Control",
    "DeviceGone",
    "Elsewhere",
    "Expiry",
    "GuestPanicked",
    "RunState",
    "Shutdown",
    "control_of",
    "serve",
]

RunState = Literal[
    "prelaunch",
    "running",
    "paused",
    "io-error",
    "watchdog",
    "shutdown",
    "guest-panicked",
    "internal-error",
    "inmigrate",
    "postmigrate",
]
Cause = Literal[
    "host-error",
    "host-qmp-quit",
    "host-qmp-system-reset",
    "host-signal",
    "guest-shutdown",
    "guest-reset",
    "guest-panic",
]


class Shutdown(TypedDict):
    """Its origin, the guest or not, and its reason."""

    guest: bool
    reason: Cause


class GuestPanicked(TypedDict):
    """The action that is taken."""

    action: Literal["pause", "poweroff", "run"]


BlockIoError = TypedDict(
    "BlockIoError",
    {
        "device": str,
        "qom-path": str,
        "operation": Literal["read", "write"],
        "action": Literal["ignore", "report", "stop"],
        "nospace": NotRequired[bool],
        "reason": str,
    },
)


Expiry = Literal["reset", "shutdown", "poweroff", "pause", "debug", "none"]


class Watchdog(TypedDict):
    """The action that is taken."""

    action: Expiry


class DeviceGone(TypedDict):
    """A device by its id, and its path in the tree of objects."""

    device: NotRequired[str]
    path: str


class Elsewhere(Protocol):
    """A machine's way here, or away: who carries it says so here, and does what ``cont`` asks for.

    Attributes:
        run_state: in QEMU's words.
    """

    run_state: RunState

    def cont(self) -> None:
        """Let the machine go on, or once it can. Raises this project's errors."""


MEANT = "qmp:meant"
"""The key by which a host shares what its next machine's monitor begins with: ``held`` and ``lingers``."""


class Control:
    """A machine's monitor, which its ``qmp`` devices and all their peers share.

    Attributes:
        machine: the machine; raises StateError once it is gone.
        began: set once a peer has had the machine continue (``cont``) or quit.
        quitted: set once a peer has said ``quit``.
        held: the machine is started by ``cont`` (QEMU's -S). lingers: it is kept after its guest has powered it off,
            until ``quit`` (-no-shutdown).
        fdsets: descriptors by set, of all peers.
        names: what a peer called what stands behind a device that came later, by the device's id.
        elsewhere: who brings the machine here, or has taken it away; None for one that is here.
    """

    def __init__(self, machine: Machine) -> None:
        # Not the machine: the peers' threads would keep one that nobody else holds.
        self._machine = ref(machine)
        self.name, self.log = machine.name, machine.log
        self.table = table_of(machine.host)
        self.lock = threading.Lock()
        self.peers: list[Peer] = []
        self.began, self.quitted, self.ran = Event(), Event(), Event()
        meant: dict[str, bool] = machine.host.share(MEANT, dict)  # before a peer can ask for anything
        self.held, self.lingers = meant.get("held", False), meant.get("lingers", False)
        self.elsewhere: Elsewhere | None = None
        self.has_kvm = _has_kvm(machine)  # now: in its jail, the process could not find out
        self.fdsets: dict[int, list[tuple[int, str]]] = {}
        self.names: dict[str, str] = {}
        self.removals = Removals(self)
        self._why: Cause | None = None
        self._started = self._told_off = False
        machine.observers.add("state", self._state)
        machine.observers.add("outcome", self._outcome)
        machine.observers.add("reset", self._reset)
        machine.observers.add("waiting", self._waiting)
        machine.observers.add("device", self._device)
        self._expiry: Expiry | None = None
        self._watchdog: Any = None

    @property
    def machine(self) -> Machine:
        """The machine. Raises StateError once it is gone."""
        found = self._machine()
        if found is None:
            raise StateError(f'machine "{self.name}" is gone')
        return found

    def because(self, why: Cause) -> None:
        """Note the reason of what is about to happen: a peer asked for it."""
        self._why = why

    @property
    def run_state(self) -> RunState:
        """The machine's state in QEMU's words."""
        machine = self.machine
        if self.elsewhere is not None and machine.state in ("built", "paused"):
            return self.elsewhere.run_state
        if machine.state == "running":
            return "running"
        if machine.state == "built":
            return "prelaunch"
        if machine.state == "paused":
            if self.kept() is not None:
                return "shutdown"
            waiting = [inner(one.device) for one in present(machine) if one.id in machine.waiting]
            if any(one is self._watchdog for one in waiting):
                return "watchdog"
            return "io-error" if any(not hasattr(one, "keeps") for one in waiting) else "paused"
        if isinstance(machine.outcome, Panicked):
            return "guest-panicked"
        return "internal-error" if machine.outcome is None else "shutdown"

    def keep(self, on: bool) -> None:
        """Keep the machine once its guest has powered it off, or do not: it can be reset then, and go on."""
        self.lingers = on
        for one in present(self.machine):
            if hasattr(one.device, "keeps"):
                one.device.keeps = on

    def kept(self) -> Any:
        """The device by which the guest has powered off a machine that is kept; None for one that is on."""
        waiting = self.machine.waiting
        found = (one.device for one in present(self.machine) if one.id in waiting)
        return next((one for one in found if getattr(one, "is_off", False)), None)

    def linger(self) -> None:
        """Wait until a peer has said ``quit``."""
        self.quitted.wait()

    # events

    def emit(self, name: str, data: dict[str, Any] | None = None) -> None:
        """Tell all peers of an event. Any thread. Raises UsageError for one that no card offers."""
        if name not in self.table.events:
            raise UsageError(f'no card offers a QMP event "{name}"')
        seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
        event: dict[str, Any] = {
            "timestamp": {"seconds": seconds, "microseconds": nanoseconds // 1000},
            "event": name,
        }
        if data is not None:
            event["data"] = data
        with self.lock:
            peers = list(self.peers)
        for one in peers:
            one.tell(event)

    def _state(self, state: str) -> None:
        self.ran.set()
        if state == "running":
            self.emit("RESUME")
        elif state == "paused":
            if self.kept() is not None and not self._told_off:
                self._told_off = True
                self.emit("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})
            self.emit("STOP")
        elif state == "stopped" and self.machine.outcome is None:
            self.emit("SHUTDOWN", {"guest": False, "reason": "host-error"})

    def _outcome(self, outcome: Outcome) -> None:
        guest, reason = self._reason(outcome)
        if isinstance(outcome, Panicked):
            self.emit("GUEST_PANICKED", {"action": "poweroff"})
        self.emit("SHUTDOWN", {"guest": guest, "reason": reason})

    def _reason(self, outcome: Outcome) -> tuple[bool, Cause]:
        if isinstance(outcome, PoweredOff | DebugExit) and not self._told_off:
            return True, "guest-shutdown"
        if isinstance(outcome, Reset | Crashed):
            return True, "guest-reset"
        if isinstance(outcome, Panicked):
            return True, "guest-panic"
        return False, "host-qmp-quit" if self.quitted.is_set() else "host-signal"

    def _reset(self, _: str) -> None:
        why, self._why = self._why, None
        self._told_off = False
        self.emit("RESET", {"guest": why is None, "reason": why or "guest-reset"})

    def _waiting(self, device: str, why: str) -> None:
        plugged = self.machine.devices[device]
        if getattr(plugged.device, "is_off", False):
            return  # told once it is paused
        options = getattr(inner(plugged.device), "options", None)
        if getattr(options, "rerror", "stop") == "stop":
            return  # it is no disk, or nobody knows which it was, and a guess would be believed
        self.emit(
            "BLOCK_IO_ERROR",
            {
                "device": device,
                "qom-path": f"/machine/peripheral/{device}",
                "operation": "write",
                "action": "stop",
                "nospace": getattr(options, "werror", "") == "enospc",
                "reason": why,
            },
        )

    # the watchdog

    def watch(self) -> None:
        """Listen to the machine's watchdog, if it has one. Under the machine's lock."""
        found = self.machine.services.get("watchdog")
        if found is not None and found is not self._watchdog:
            found.listeners.append(lambda action: self.emit("WATCHDOG", {"action": action}))
            if self._expiry is not None:
                found.set_action(self._expiry)
        self._watchdog = found

    def set_expiry(self, action: Expiry) -> None:
        """Set the watchdog's action, of one that comes later too."""
        with self.machine.lock:
            self._expiry = action
            if self._watchdog is not None:
                self._watchdog.set_action(action)

    def _device(self, id: str, there: bool) -> None:
        self.watch()
        if not there:
            self.removals.gone(id)
            self.names.pop(id, None)
            self.emit("DEVICE_DELETED", {"device": id, "path": f"/machine/peripheral/{id}"})

    def close(self) -> None:
        """Close the descriptors in sets, and wait for no guest. After the last peer has gone."""
        self.removals.close()
        with self.lock:
            sets, self.fdsets = self.fdsets, {}
        for fd, _ in (one for there in sets.values() for one in there):
            os.close(fd)

    # peers

    def join(self, peer: Peer) -> None:
        """*peer* hears of events from now on."""
        with self.lock:
            self.peers.append(peer)

    def leave(self, peer: Peer) -> None:
        """*peer* has gone."""
        with self.lock:
            if peer in self.peers:
                self.peers.remove(peer)


def present(machine: Machine) -> list[PluggedDevice]:
    """The devices of this moment. One may come or go while a command looks at them."""
    return list(machine.devices.values())


def inner(device: Any) -> Any:
    """The card's own object, where *device* is the transport before it."""
    return getattr(device, "device", device)


def _has_kvm(machine: Machine) -> bool:
    """Whether this host can run a machine under KVM."""
    if machine.accelerator.name == "kvm":
        return True
    offers = [one for one in machine.host.registry.offers(AcceleratorOffer) if one.name == "kvm"]
    return any(one.load()().probe().usable for one in offers)


def controls(machine: Machine) -> WeakKeyDictionary[Machine, Control]:
    found: WeakKeyDictionary[Machine, Control] = machine.host.share("qmp:controls", WeakKeyDictionary)
    return found


def control_of(machine: Machine) -> Control:
    """The monitor of *machine*, made when first asked for: a card emits its events there."""
    found = controls(machine)
    if machine not in found:
        found[machine] = Control(machine)
    return found[machine]


def serve(machine: Machine) -> None:
    """Let the machine's devices serve, until its end."""
    control = control_of(machine)
    with machine.lock:
        control.watch()
    control.keep(control.lingers)
    machine.defer(control.close)  # deferred first, called last
    servers: list[Qmp] = [one.device for one in machine.devices.values() if one.type == "qmp"]
    for one in servers:
        machine.defer(one.hang_up)
        one.serve(control)
