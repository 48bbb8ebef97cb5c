"""The machine's life: states, outcomes, failures, reset, interrupts, console."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest
from cardcage import GuestFailed
from cardcage.boot import E820Entry
from cardcage.errors import AcceleratorError, ConsoleTimeout, GuestError, StateError
from cardcage.outcome import Crashed, DebugExit, Panicked, PoweredOff, Reset, Stopped, TimedOut
from cardcage.vcpu import Exit
from machine_kit import Steps, out, panel
from scripted import ScriptedVCpu


@pytest.mark.parametrize(
    ("offset", "outcome", "status"),
    [(0, PoweredOff(), 0), (2, Panicked("oops"), 10), (3, DebugExit(7), 15)],
)
def test_the_guest_ends_the_machine(make_machine: Any, offset: int, outcome: Any, status: int) -> None:
    """Power-off, panic and debug exit are distinct outcomes with the documented statuses."""
    machine = make_machine(out(offset, 7))
    assert machine.start().wait(20) == outcome
    assert outcome.status == status
    assert machine.state == "stopped"
    if status:
        with pytest.raises(GuestFailed) as failed:
            machine.wait(check=True)
        assert (failed.value.outcome, str(failed.value)) == (outcome, f"{machine.name}: {outcome}")
    else:
        assert machine.wait(check=True) == outcome


def test_a_failure_before_the_start(make_machine: Any) -> None:
    """A machine that a card fails between its building and its start ends with that, and does not say "stopped"."""
    machine = make_machine()
    machine.fail(ZeroDivisionError("a card's mistake"))
    with pytest.raises(ZeroDivisionError, match="a card's mistake"):
        machine.start()
    with pytest.raises(StateError, match="cannot pause"):
        machine.pause()


def test_a_debug_exit_with_code_0_is_no_failure(make_machine: Any) -> None:
    """``check`` is about what the guest says, not about the odd status of the command line."""
    assert make_machine(out(3, 0)).start().wait(20, check=True) == DebugExit(0)


def test_a_cards_exception_is_raised_by_wait_and_with(make_machine: Any) -> None:
    """An exception in a device's write stops the machine and is raised with the device's own traceback."""
    machine = make_machine(out(4))
    with pytest.raises(ZeroDivisionError, match="a card's bug") as caught:
        machine.start().wait(20)
    assert any(entry.name == "write" for entry in caught.traceback)
    assert machine.state == "stopped"
    machine.__exit__(None, None, None)  # wait() has told: nothing more to raise
    untold = make_machine(out(4))
    ended = threading.Event()
    untold.observers.add("state", lambda state: ended.set() if state == "stopped" else None)

    def leave() -> None:
        with untold:
            untold.start()
            assert ended.wait(20)

    with pytest.raises(ZeroDivisionError):
        leave()


def test_an_exception_on_the_loop_thread_stops_the_machine(make_machine: Any) -> None:
    """A timer callback that raises is as good as a write that raises."""
    machine = make_machine()
    with machine.lock:
        machine.clock.timer(lambda: 1 / 0).arm(1)
    with pytest.raises(ZeroDivisionError):
        machine.start().wait(20)


def test_accelerator_exits_have_their_meaning(make_machine: Any) -> None:
    """A triple fault crashes with its detail, a failed accelerator raises, a processor's reset resets."""

    def shutdown(_: ScriptedVCpu) -> Steps:
        yield ("exit", Exit.SHUTDOWN, "rip=0x7")

    def failed(_: ScriptedVCpu) -> Steps:
        yield ("exit", Exit.FAILED, "cannot emulate 0f 0b")

    def reset(_: ScriptedVCpu) -> Steps:
        yield ("exit", Exit.RESET, "")

    crashed = make_machine(shutdown).start().wait(20)
    assert crashed == Crashed(0, "rip=0x7")
    assert crashed.status == 12
    with pytest.raises(AcceleratorError, match="cannot emulate 0f 0b"):
        make_machine(failed).start().wait(20)
    assert isinstance(make_machine(reset, machine={"on_reset": "stop"}).start().wait(20), Reset)


def test_reset_replays_the_boot_after_the_access(make_machine: Any) -> None:
    """A reset that the guest asks for resets devices and replays the boot image; all vCPUs start as at first."""

    def script(cpu: ScriptedVCpu) -> Steps:
        calls = yield ("in", 0x80, 1)
        if calls < 4:
            yield ("out", 0x81, 1, 1)
            raise AssertionError("an instruction ran after the reset was asked for")
        yield ("out", 0x80, 1, 1)

    machine = make_machine(script, boot={"protocol": "fill", "fill": 7}, cpus=2)
    resets: list[str] = []
    machine.observers.add("reset", resets.append)
    assert machine.start().wait(20) == PoweredOff()
    assert panel(machine).calls == ["contribute", "reset", "contribute", "reset", "contribute"]
    assert machine.memory.read(0x1000, 2) == bytes([7, 3])
    assert resets == ["asked", "asked"]
    assert machine.vcpus[0].get_state().registers.rip == 0x1000
    assert machine.vcpus[1].get_state().events.startup == "wait-for-sipi"


def test_on_reset_and_on_triple_fault_choose(make_machine: Any) -> None:
    """``on_reset = "stop"`` ends with Reset; ``on_triple_fault = "reset"`` boots again."""
    assert make_machine(out(1), machine={"on_reset": "stop"}).start().wait(20) == Reset("asked")

    def script(_: ScriptedVCpu) -> Steps:
        if (yield ("in", 0x80, 1)) < 2:
            yield ("exit", Exit.SHUTDOWN, "")
        yield ("out", 0x80, 1, 1)

    machine = make_machine(script, machine={"on_triple_fault": "reset"}, boot={"protocol": "fill"})
    assert machine.start().wait(20) == PoweredOff()


def test_a_panic_that_is_not_over_decides_the_end(make_machine: Any) -> None:
    """After a panic's first words a reset, a power-off, a triple fault and pvpanic end the machine as that panic."""

    def crash(_: ScriptedVCpu) -> Steps:
        yield ("out", 0x87, 1, 0)
        yield ("exit", Exit.SHUTDOWN, "")

    def then(offset: int) -> Any:
        def script(_: ScriptedVCpu) -> Steps:
            yield ("out", 0x87, 1, 0)
            yield ("out", 0x80 + offset, 1, 0)

        return script

    for script in (then(0), then(1), then(2), crash):
        machine = make_machine(script, machine={"on_triple_fault": "reset"}, boot={"protocol": "fill"})
        assert machine.start().wait(20) == Panicked("why")
    quiet = make_machine(then(2), machine={"on_panic": "ignore"}, boot={"protocol": "fill"})
    quiet.start()
    assert quiet.wait(0.2) == TimedOut(0.2)
    quiet.reset()


def test_the_hosts_own_end_and_reset_are_no_panic(make_machine: Any) -> None:
    """A machine that the host stops while it panics is Stopped; one that it resets has not panicked."""

    def script(_: ScriptedVCpu) -> Steps:
        if (yield ("in", 0x80, 1)) < 2:
            yield ("out", 0x87, 1, 0)
            yield ("out", 0x85, 1, ord("x"))
        else:
            yield ("out", 0x80, 1, 0)

    for act, outcome in ((lambda it: it.stop("enough"), Stopped("enough")), (lambda it: it.reset(), PoweredOff())):
        machine = make_machine(script, boot={"protocol": "fill"})
        machine.start()
        machine.console.expect("x")
        act(machine)
        assert machine.wait(20) == outcome


def test_the_boot_context_describes_ram(make_machine: Any) -> None:
    """The memory map of a bare machine has all RAM but what contributors carved out."""
    machine = make_machine(out(0), boot={"protocol": "fill"}, memory="2M")
    machine.start().wait(20)
    assert machine._board._image.e820 == [
        E820Entry(0, 0x9000),
        E820Entry(0x9000, 0x1000, 4),
        E820Entry(0xA000, 0x1F6000),
    ]


def test_pause_stops_guest_and_time(make_machine: Any) -> None:
    """While paused no vCPU makes a step and guest time stands still; resume goes on; wrong states raise StateError."""

    def script(_: ScriptedVCpu) -> Steps:
        while True:
            yield ("out", 0x86, 1, 1)

    machine = make_machine(script, cpus=2)
    with pytest.raises(StateError, match="cannot pause: the machine is built"):
        machine.pause()
    states: list[str] = []
    machine.observers.add("state", states.append)
    machine.start()
    machine.pause()
    with pytest.raises(StateError, match="cannot pause: the machine is paused"):
        machine.pause()
    then = len(panel(machine).calls), machine.clock.now()
    assert (len(panel(machine).calls), machine.clock.now()) == then
    machine.reset()
    assert panel(machine).calls[-1] == "contribute" or panel(machine).calls[-1] == "reset"
    machine.resume()
    machine.shutdown()
    assert machine.wait(20) == PoweredOff()
    assert states == ["running", "paused", "running", "stopped"]
    for act in (machine.start, machine.pause, machine.resume, machine.reset, machine.shutdown):
        with pytest.raises(StateError):
            act()


def test_stop_timeout_and_close(make_machine: Any) -> None:
    """wait() gives TimedOut and lets the machine run; stop() ends it with Stopped; close() is idempotent and joins."""
    machine = make_machine()
    with pytest.raises(StateError, match="not started"):
        machine.wait()
    machine.start()
    assert machine.wait(0.01) == TimedOut(0.01)
    with pytest.raises(GuestFailed, match=r"timed out after 0\.01 s") as late:
        machine.wait(0.01, check=True)
    assert late.value.outcome == TimedOut(0.01)
    assert machine.state == "running"
    machine.stop("enough")
    assert machine.wait(20) == Stopped("enough")
    threads = {thread.name for thread in threading.enumerate()}
    assert "machine-loop" in threads
    machine.close()
    machine.close()
    assert not {thread.name for thread in threading.enumerate()} & {"machine-loop", "machine-cpu0"}
    assert panel(machine).calls[-1] == "unplug"
    assert machine.scripted.vms[0].closed


def test_close_without_start(make_machine: Any) -> None:
    """A machine that never started gives everything back too, and leaves its host."""
    machine = make_machine()
    host = machine.host
    assert host.machines == [machine]
    with machine:
        pass
    assert host.machines == []
    assert machine.scripted.vms[0].closed
    with pytest.raises(StateError, match="closed"):
        machine.start()


def test_the_first_end_counts(make_machine: Any) -> None:
    """What comes after the first outcome changes nothing."""
    machine = make_machine()
    machine.start()
    machine._life.end(PoweredOff())
    machine._life.end(Panicked("late"))
    machine.fail(RuntimeError("later"))
    assert machine.wait(20) == PoweredOff()


def test_several_machines_in_a_process(make_machine: Any) -> None:
    """Machines share nothing: each has its own outcome and memory."""
    first, second = make_machine(out(3, 1)), make_machine(out(3, 2))
    first.memory.write(0, b"1")
    assert [one.start().wait(20) for one in (first, second)] == [DebugExit(1), DebugExit(2)]
    assert second.memory.read(0, 1) == b"\0"


def test_lines_reach_controllers_or_the_accelerator(make_machine: Any) -> None:
    """Lines reach the cards' controllers, or with a full irqchip the accelerator; INTA and EOI come back."""

    class Pic:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        def set_irq(self, gsi: int, level: bool, /) -> None:
            self.seen.append((gsi, level))

        def acknowledge(self) -> int | None:
            return 0x30

    pic = Pic()

    def script(_: ScriptedVCpu) -> Steps:
        pic.seen.append((yield ("inta",)))
        yield ("eoi", 0x31)
        yield ("out", 0x80, 1, 1)

    machine = make_machine(script)
    machine._board.wiring.add_controller(pic.set_irq)
    machine._board.wiring.set_extint_source(pic.acknowledge)
    machine._board.wiring.add_eoi_listener(pic.seen.append)
    source, other = machine.lines[5].source(), machine.lines[5].source()
    source.set(True)
    other.set(True)
    source.set(False)
    other.set(False)
    machine.start().wait(20)
    assert pic.seen == [(5, True), (5, False), 0x30, 0x31]
    full = make_machine(machine={"irqchip": "full"})
    full._board.wiring.add_controller(pic.set_irq)
    full.lines[3].source().set(True)
    assert full.scripted.log[-1] == ("irq", 3, True)
    assert len(pic.seen) == 4


def test_hlt_outside_the_accelerator_waits_for_extint(make_machine: Any) -> None:
    """After HALTED the vCPU runs again once the PIC drives INTR, and not before."""
    halted = threading.Event()

    def script(_: ScriptedVCpu) -> Steps:
        halted.set()
        yield ("exit", Exit.HALTED, "")
        yield ("out", 0x80, 1, 1)

    machine = make_machine(script, machine={"irqchip": "none"})
    machine.start()
    assert halted.wait(20)
    machine.pause()
    machine.resume()
    assert machine.outcome is None
    with machine.lock:
        machine._board.wiring.set_extint(True)
    assert machine.wait(20) == PoweredOff()


def test_observers_are_told_and_bad_ones_removed(make_machine: Any) -> None:
    """Accesses are observed only while someone does; an observer that raises is removed and the guest goes on."""

    def script(_: ScriptedVCpu) -> Steps:
        yield ("in", 0x80, 1)
        yield ("out", 0x86, 1, 9)
        yield ("store", 1 << 40, 4, 5)
        yield ("load", 1 << 40, 4)
        yield ("out", 0x80, 1, 1)

    machine = make_machine(script)
    seen: list[Any] = []
    machine.observers.add("pio", lambda *values: 1 / 0)
    machine.observers.add("pio", lambda *values: seen.append(values))
    machine.observers.add("mmio", lambda *values: seen.append(values))
    machine.observers.add("outcome", seen.append)
    assert machine.start().wait(20) == PoweredOff()
    assert seen == [
        (0x80, 1, 0, False),
        (0x86, 1, 9, True),
        (1 << 40, 4, 5, True),
        (1 << 40, 4, 0xFFFFFFFF, False),
        (0x80, 1, 1, True),
        PoweredOff(),
    ]


def test_the_console_expects_and_types(make_machine: Any) -> None:
    """expect() returns text up to its match, goes on after it, and says what came when nothing matches."""
    text = "login: \N{SNOWMAN}\nlogin: done"

    def script(_: ScriptedVCpu) -> Steps:
        for byte in text.encode():
            yield ("out", 0x85, 1, byte)

    machine = make_machine(script)
    machine.console.send("early\n")
    machine.start()
    assert machine.console.expect("login:", 20) == "login:"
    assert machine.console.expect(re.compile("l.gin"), 20) == " \N{SNOWMAN}\nlogin"
    assert machine.console.expect("done", 20) == ": done"
    with pytest.raises(ConsoleTimeout, match=r"(?s)'never' did not come within 0.01 s; .*login: done"):
        machine.console.expect("never", 0.01)
    waiting = threading.Thread(target=machine.stop)
    waiting.start()
    with pytest.raises(GuestError, match="the machine ended"):
        machine.console.expect("never", 20)
    waiting.join()
    assert b"early\n" in panel(machine).calls
    assert machine.console.output == text


def test_expect_shows_what_led_to_a_panic(make_machine: Any) -> None:
    """Its error ends with the panic's own line, not with the five after it, and hides its source from pytest."""

    def script(_: ScriptedVCpu) -> Steps:
        for byte in b"loading\nwhy\n" + b"registers\n" * 9:
            yield ("out", 0x85, 1, byte)
        yield ("out", 0x87, 1, 0)
        yield ("out", 0x80, 1, 0)

    machine = make_machine(script, boot={"protocol": "fill"})
    machine.start()
    with pytest.raises(GuestError) as raised:
        machine.console.expect("login:")
    assert str(raised.value) == (
        "the machine ended (the guest panicked: why) before 'login:' came; the console's last lines:\nloading\nwhy"
    )
    assert [one.name for one in raised.traceback.filter(raised)][1:] == []
