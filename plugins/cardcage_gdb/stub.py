"""A conversation with gdb: packets in, answers out (GDB manual, appendix E). It knows no socket."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.errors import CardcageError, StateError
from cardcage.machine import State

from cardcage_gdb.data import BAD, CUT, Data, numbers, unhex
from cardcage_gdb.registers import target_xml
from cardcage_gdb.stops import SIGTRAP
from cardcage_gdb.wire import INTERRUPT, MOST, hexadecimal
from cardcage_gdb.words import carried_out

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Stub"]


class Stub(Data):
    """A machine as gdb knows it."""

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
        self._described = True
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
