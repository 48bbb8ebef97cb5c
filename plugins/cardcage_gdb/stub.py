"""A conversation with gdb: packets in, answers out (GDB manual, appendix E). It knows no socket.

All stops, always: while gdb has the machine stopped it is paused, and all its processors with it.
"""

from __future__ import annotations

import binascii
from typing import TYPE_CHECKING

from cardcage.errors import CardcageError, StateError, UsageError
from cardcage.machine import State
from cardcage.security import HOST, OPERATOR, Act
from cardcage_qmp import Session

from cardcage_gdb.memory import Memory
from cardcage_gdb.points import Points
from cardcage_gdb.registers import REGISTERS, SIZE, read, read_all, target_xml, write
from cardcage_gdb.wire import INTERRUPT, MOST, hexadecimal, unescape
from cardcage_gdb.words import carried_out

if TYPE_CHECKING:
    from collections.abc import Callable

    from cardcage.machine import Machine
    from cardcage.x86 import VCpuState
    from cardcage_qmp import Control

__all__ = ["Stub"]

SIGINT, SIGTRAP, SIGABRT = 2, 5, 6
BAD, FAULT, NO_SPACE = b"E16", b"E0e", b"E1c"
"""EINVAL, EFAULT, ENOSPC, in hexadecimal as gdb shows them: gdb itself knows no numbers."""
CUT = MOST // 2 - 8
"""Bytes of memory in an answer."""
WATCHES = {"write": b"watch", "read": b"rwatch", "access": b"awatch"}


class Stub:
    """A machine as gdb knows it.

    Args:
        control: the machine's monitor. go: lets a machine start that waits for gdb.

    Attributes:
        running: gdb waits to hear of a stop. ended: it wants no more. quiet: it wants no acknowledgements from now on.
    """

    def __init__(self, control: Control, go: Callable[[], None]) -> None:
        self._control, self._go = control, go
        self._session = Session(control)
        self._session.ready = True
        machine = control.machine
        self.running = self.ended = self.quiet = False
        self._mine = False
        self._early = machine.state is State.BUILT
        self._points = Points(machine)
        self._memory = Memory(machine)
        self._states: dict[int, VCpuState] = {}
        self._stopped: list[int] = []
        self._cpu = self._resumed = 0
        self._multi = self._says_why = False
        self._how = ["run"] * len(machine.vcpus)

    @property
    def machine(self) -> Machine:
        """The machine. Raises StateError once it is gone."""
        return self._control.machine

    def met(self, cpu: int) -> None:
        """*cpu* came out at a breakpoint or step; the machine is about to pause. On its thread."""
        self._stopped.append(cpu)

    # gdb comes and goes

    def attach(self) -> None:
        """gdb has come: the machine stops. Raises Denied."""
        machine = self.machine
        facts = {"machine": machine.name, "name": "gdb"}
        machine.mediator.check(Act(OPERATOR, machine.label, "management", ("reach",), facts))
        machine.mediator.ask(Act(OPERATOR, HOST, "management", ("command",), facts), "gdb")
        self._pause()

    def leave(self, *, resume: bool) -> None:
        """gdb has gone: nothing of it stays. A machine that it stopped goes on."""
        machine = self.machine
        if machine.state is State.RUNNING and (self._points.set or "run" not in self._how):
            self._pause()
            self._mine = True
        try:
            self._points.clear()
            self._direct(["run"] * len(self._how))
            if machine.state is State.PAUSED and (resume or self._mine):
                machine.resume()
        except CardcageError as error:
            machine.log.warning("what gdb left behind stays", error=str(error))

    def slipped(self) -> bool:
        """True when the machine has started since gdb came, and not because gdb said so."""
        found = self._early and not self.running and self.machine.state is State.RUNNING
        self._early = self._early and not found
        return found

    def catch(self) -> None:
        """Stop the machine that slipped away."""
        self._states.clear()
        self._pause()

    def _pause(self) -> None:
        machine = self.machine
        if machine.state is State.RUNNING:
            try:
                machine.pause()
                self._mine = True
            except StateError:  # it paused or ended meanwhile
                pass

    # stops

    def news(self) -> bytes | None:
        """The stop or the end that gdb waits for, once it has come."""
        if not self.running:
            return None
        machine = self.machine
        if machine.state is State.STOPPED:
            self.running = False
            return self._end()
        if machine.state is not State.PAUSED:
            return None
        self.running, self._mine = False, True
        self._states.clear()
        return self._stop()

    def _end(self) -> bytes:
        outcome = self.machine.outcome
        return b"W%02x" % (outcome.status & 0xFF) if outcome is not None else b"X%02x" % SIGABRT

    def _stop(self) -> bytes:
        """The stop that is told: of the first processor that met something."""
        stopped, self._stopped[:] = list(dict.fromkeys(self._stopped)), []
        if not stopped:
            return self._said(SIGINT)
        cpu = self._cpu = self._resumed = stopped[0]
        # A code breakpoint is met again by those that are not told of; what was watched would be missed.
        self._stopped += [one for one in stopped[1:] if self._points.watched(one)]
        return self._said(SIGTRAP, self._why(cpu))

    def _why(self, cpu: int) -> bytes:
        point = self._points.stop_of(cpu)
        if point is None:
            return b""
        if point[0] in WATCHES:
            return b"%b:%x;" % (WATCHES[point[0]], point[1])
        return self._points.word(point[1]) + b":;" if self._says_why else b""

    def _said(self, signal: int, why: bytes = b"") -> bytes:
        return b"T%02xthread:%b;%b" % (signal, self._thread(self._cpu), why)

    def _thread(self, cpu: int) -> bytes:
        return b"p01.%02x" % (cpu + 1) if self._multi else b"%02x" % (cpu + 1)

    def _cpu_of(self, text: bytes) -> int | None:
        """The processor of a thread's id; -1 for all, None for none."""
        process, dot, thread = text.rpartition(b".")
        if dot and process not in (b"p1", b"p01", b"p-1", b"p0"):
            return None
        if not dot and text[:1] == b"p":
            return -1 if text in (b"p1", b"p01", b"p-1", b"p0") else None
        if thread == b"-1":
            return -1
        number = hexadecimal(thread)
        if number is None or number > len(self._how):
            return None
        return number - 1 if number else self._cpu

    # packets

    def answer(self, packet: bytes) -> bytes | None:
        """The answer to a packet; None while there is none yet, or none at all."""
        if packet == INTERRUPT:
            if self.running:
                self._pause()
            return None
        if not packet:
            return b""
        try:
            handler = HANDLERS.get(packet[:1])
            return handler(self, packet[1:]) if handler is not None else b""
        except StateError as error:
            return self._end() if self.machine.state is State.STOPPED else self._refused(error)
        except CardcageError as error:
            return self._refused(error)

    def _refused(self, error: CardcageError) -> bytes:
        self.machine.log.warning("gdb was refused something", error=str(error))
        return BAD

    def _why_stopped(self, _: bytes) -> bytes:
        if self.machine.state is State.STOPPED:
            return self._end()
        return self._said(SIGTRAP)

    def _state(self, cpu: int) -> VCpuState:
        """Its registers. Raises StateError while it runs."""
        if self.machine.state is State.RUNNING:
            raise StateError("registers can be read while the machine is paused")
        if cpu not in self._states:
            self._states[cpu] = self.machine.vcpus[cpu].get_state()
        return self._states[cpu]

    def _set_state(self, cpu: int, state: VCpuState) -> None:
        self._states.clear()
        self.machine.vcpus[cpu].set_state(state)

    def _read_all(self, _: bytes) -> bytes:
        return read_all(self._state(self._cpu)).hex().encode()

    def _write_all(self, text: bytes) -> bytes:
        data, at = unhex(text), 0
        if data is None or len(data) != SIZE:
            return BAD
        for one in REGISTERS:
            if (found := self._written(one.name, data[at : at + one.size])) != b"OK":
                return found
            at += one.size
        return b"OK"

    def _read_one(self, text: bytes) -> bytes:
        number = hexadecimal(text)
        if number is None or number >= len(REGISTERS):
            return BAD
        return read(self._state(self._cpu), REGISTERS[number]).hex().encode()

    def _write_one(self, text: bytes) -> bytes:
        head, _, value = text.partition(b"=")
        number, data = hexadecimal(head), unhex(value)
        if number is None or number >= len(REGISTERS) or data is None or len(data) != REGISTERS[number].size:
            return BAD
        return self._written(REGISTERS[number].name, data)

    def _written(self, name: str, data: bytes) -> bytes:
        cpu, register = self._cpu, next(one for one in REGISTERS if one.name == name)
        state = self._state(cpu)
        if read(state, register) == data:
            return b"OK"
        try:
            write(state, register, data, lambda address, size: self._memory.read(state, address, size, whole=True))
            self._set_state(cpu, state)
        except (ValueError, UsageError) as error:
            self._states.clear()
            self.machine.log.warning("gdb cannot set a register", register=name, error=str(error))
            return BAD
        return b"OK"

    def _read_memory(self, text: bytes) -> bytes:
        where = numbers(text)
        if where is None:
            return BAD
        found = self._memory.read(self._state(self._cpu), where[0], min(where[1], CUT))
        return found.hex().encode() if found or not where[1] else FAULT

    def _write_memory(self, text: bytes) -> bytes:
        head, _, body = text.partition(b":")
        return self._put(head, unhex(body))

    def _write_binary(self, text: bytes) -> bytes:
        head, _, body = text.partition(b":")
        return self._put(head, unescape(body))

    def _put(self, head: bytes, data: bytes | None) -> bytes:
        where = numbers(head)
        if where is None or data is None or len(data) != where[1]:
            return BAD
        return b"OK" if self._memory.write(self._state(self._cpu), where[0], data) else FAULT

    def _insert(self, text: bytes) -> bytes:
        return self._point(text, self._points.add)

    def _remove(self, text: bytes) -> bytes:
        return self._point(text, self._points.remove)

    def _point(self, text: bytes, act: Callable[[int, int, int], None]) -> bytes:
        kind, _, rest = text.partition(b",")
        where = numbers(rest.partition(b";")[0])
        if kind not in (b"0", b"1", b"2", b"3", b"4") or where is None:
            return b"" if kind > b"4" else BAD
        if self.machine.state is State.RUNNING:
            return BAD
        try:
            act(int(kind), where[0], where[1])
        except CardcageError as error:
            self.machine.log.warning("gdb cannot have a breakpoint", error=str(error))
            return NO_SPACE
        return b"OK"

    # going on

    def _continue(self, text: bytes) -> bytes | None:
        return self._from(text, ["run"] * len(self._how))

    def _step(self, text: bytes) -> bytes | None:
        how = ["run"] * len(self._how)
        how[self._resumed] = "step"
        return self._from(text, how)

    def _from(self, text: bytes, how: list[str]) -> bytes | None:
        if text:
            if (address := hexadecimal(text)) is None:
                return BAD
            state = self._state(self._resumed)
            state.registers.rip = address
            self._set_state(self._resumed, state)
        return self._resume(how)

    def _signal(self, text: bytes) -> bytes | None:
        return self._continue(text.partition(b";")[2])

    def _step_signal(self, text: bytes) -> bytes | None:
        return self._step(text.partition(b";")[2])

    def _many(self, text: bytes) -> bytes | None:
        """``vCont``: the first action that names a thread is its, without one it is held."""
        how = [""] * len(self._how)
        for one in text.split(b";")[1:]:
            action, _, thread = one.partition(b":")
            word = {b"c": "run", b"C": "run", b"s": "step", b"S": "step"}.get(action[:1])
            cpu = self._cpu_of(thread) if thread else -1
            if word is None or cpu is None:
                return BAD
            for at in range(len(how)) if cpu < 0 else (cpu,):
                how[at] = how[at] or word
        if not any(how):
            return BAD
        return self._resume([one or "hold" for one in how])

    def _resume(self, how: list[str]) -> bytes | None:
        machine = self.machine
        if machine.state is State.STOPPED:
            return self._end()
        if machine.state is State.RUNNING:
            raise StateError("the machine runs")
        self._states.clear()
        if self._stopped:  # what another processor met at the same time
            return self._stop()
        self._points.apply()
        self._direct(how)
        self.running, self._mine, self._early = True, False, False
        if machine.state is State.BUILT:
            self._start()
        else:
            machine.resume()
        return None

    def _start(self) -> None:
        """Have who waits for it start the machine."""
        self._go()
        if self._control.held:
            self._control.held = False
            self._control.began.set()

    def _direct(self, how: list[str]) -> None:
        for cpu, (old, new) in enumerate(zip(self._how, how, strict=True)):
            if old != new:
                self._points.vm.set_stepping(cpu, new)
        self._how = how

    def _detach(self, _: bytes) -> bytes:
        self.leave(resume=True)
        if self.machine.state is State.BUILT:
            self._start()
        self.ended = True
        return b"OK"

    def _kill(self, _: bytes) -> bytes | None:
        self._session.run("quit", {})
        self.ended = True
        return None

    # threads

    def _choose(self, text: bytes) -> bytes:
        cpu = self._cpu_of(text[1:])
        if cpu is None or text[:1] not in (b"g", b"c"):
            return BAD
        if cpu >= 0 and text[:1] == b"g":
            self._cpu = cpu
        elif cpu >= 0:
            self._resumed = cpu
        return b"OK"

    def _alive(self, text: bytes) -> bytes:
        return BAD if self._cpu_of(text) in (None, -1) else b"OK"

    # v, q and Q

    def _verbose(self, text: bytes) -> bytes | None:
        if text == b"Cont?":
            return b"vCont;c;C;s;S"
        if text.startswith(b"Cont;"):
            return self._many(text)
        if text.startswith(b"Kill;"):
            self._kill(b"")
            return b"OK"
        return b""

    def _query(self, text: bytes) -> bytes | None:
        name, _, rest = text.partition(b":")
        if name == b"Supported":
            return self._supported(rest.split(b";"))
        if text == b"fThreadInfo":
            return b"m" + b",".join(map(self._thread, range(len(self._how))))
        if text == b"sThreadInfo":
            return b"l"
        if text == b"C":
            return b"QC" + self._thread(self._cpu)
        if name == b"Attached":
            return b"1"
        if text.startswith(b"ThreadExtraInfo,"):
            return self._about(text.partition(b",")[2])
        if text.startswith(b"Xfer:features:read:"):
            return self._features(text.removeprefix(b"Xfer:features:read:"))
        if text.startswith(b"Rcmd,"):
            return self._monitor(unhex(text.removeprefix(b"Rcmd,")))
        if text == b"qemu.PhyMemMode":
            return b"%d" % self._memory.physical
        return b""

    def _supported(self, said: list[bytes]) -> bytes:
        self._multi = b"multiprocess+" in said
        self._says_why = b"swbreak+" in said and b"hwbreak+" in said
        words = [b"PacketSize=%x" % MOST, b"qXfer:features:read+", b"vContSupported+", b"QStartNoAckMode+"]
        if self._multi:
            words.append(b"multiprocess+")
        if self._says_why:
            words += [b"swbreak+", b"hwbreak+"]
        return b";".join(words)

    def _about(self, thread: bytes) -> bytes:
        cpu = self._cpu_of(thread)
        if cpu is None or cpu < 0:
            return BAD
        events = self._state(cpu).events
        state = "halted" if events.halted else events.startup
        return f"CPU#{cpu} [{state}]".encode().hex().encode()

    def _features(self, text: bytes) -> bytes:
        name, _, where = text.partition(b":")
        place = numbers(where)
        if name != b"target.xml" or place is None:
            return b"E00"
        whole, (at, size) = target_xml(), place
        part = whole[at : at + min(size, MOST // 2)]
        return (b"l" if at + len(part) >= len(whole) else b"m") + part

    def _monitor(self, line: bytes | None) -> bytes:
        if line is None:
            return BAD
        before = self.machine.state
        said = carried_out(self._session, self._memory, line.decode("utf-8", "replace"), self._cpu)
        if self.machine.state is not before or before is not State.RUNNING:
            self._states.clear()
        text = said.encode("utf-8", "replace")[:CUT]
        return text.hex().encode() if text else b"OK"

    def _set(self, text: bytes) -> bytes:
        if text == b"StartNoAckMode":
            self.quiet = True
            return b"OK"
        name, _, value = text.partition(b":")
        if name == b"qemu.PhyMemMode" and value in (b"0", b"1"):
            self._memory.physical = value == b"1"
            return b"OK"
        return b""


def unhex(text: bytes) -> bytes | None:
    """Bytes in hexadecimal; None for anything else."""
    try:
        return binascii.unhexlify(text)
    except ValueError:
        return None


def numbers(text: bytes) -> tuple[int, int] | None:
    """``ADDRESS,LENGTH``, whose end is an address too; None for anything else."""
    first, _, second = text.partition(b",")
    address, length = hexadecimal(first), hexadecimal(second)
    if address is None or length is None or address + length > 1 << 64:
        return None
    return address, length


HANDLERS: dict[bytes, Callable[[Stub, bytes], bytes | None]] = {
    b"?": Stub._why_stopped,
    b"g": Stub._read_all,
    b"G": Stub._write_all,
    b"p": Stub._read_one,
    b"P": Stub._write_one,
    b"m": Stub._read_memory,
    b"M": Stub._write_memory,
    b"X": Stub._write_binary,
    b"Z": Stub._insert,
    b"z": Stub._remove,
    b"c": Stub._continue,
    b"C": Stub._signal,
    b"s": Stub._step,
    b"S": Stub._step_signal,
    b"D": Stub._detach,
    b"k": Stub._kill,
    b"H": Stub._choose,
    b"T": Stub._alive,
    b"v": Stub._verbose,
    b"q": Stub._query,
    b"Q": Stub._set,
}
"""By a packet's first letter."""
