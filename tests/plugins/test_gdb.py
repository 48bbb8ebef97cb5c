"""gdb's stub: what gdb sees and does on each accelerator, who may come, and what no peer can do."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from cardcage.accelerator import Probe
from cardcage.errors import ConfigError, Denied, StateError
from cardcage.hookspecs import hookimpl
from cardcage.host import Host
from cardcage.machine import Machine, State
from cardcage.outcome import Stopped
from cardcage.registry import AcceleratorOffer, Registry
from cardcage.security import Act
from cardcage.x86 import EFER_LMA, Segment, reset_state
from cardcage_gdb.registers import REGISTERS, read, write
from cardcage_gdb.server import parse_gdb, place
from cardcage_gdb.wire import INTERRUPT
from cardcage_qemu import translate
from gdb_kit import Client, gdb, machine, needs_gdb, values
from hypothesis import given
from hypothesis import strategies as st
from installed import PROGRAM
from listens import listens
from scripted import Scripted

pytestmark = pytest.mark.once
STOP = re.compile(rb"T05thread:(?:p01\.)?01;.*")


def emulated(accel: str) -> bool:
    """True where it knows no watchpoints."""
    probe: Probe = Host().registry.get(AcceleratorOffer, accel).load()().probe()
    return probe.speed == "emulated"


@given(st.integers(0, len(REGISTERS) - 1), st.binary(min_size=16, max_size=16))
def test_registers_are_read_as_they_were_written(number: int, data: bytes) -> None:
    """A register has the bits that were written to it, in 64-bit mode and for those that have no fixed bits."""
    state, register = reset_state(), REGISTERS[number]
    state.system.cs, state.system.efer = Segment.flat(8, code=True, bits=64), EFER_LMA
    data = data[: register.size]
    write(state, register, data, lambda address, size: bytes(size))
    found = read(state, register)
    if register.name in ("fctrl", "fstat", "fop") or (register.size == 4 and register.type == "int32"):
        data = data[:2] + bytes(2)
    elif register.name == "eflags":
        data = bytes([data[0] | 2]) + data[1:]
    elif register.name == "ftag":
        empty = [one for one in range(8) if int.from_bytes(data[:2], "little") >> 2 * one & 3 == 3]
        word = int.from_bytes(found, "little")
        assert [one for one in range(8) if word >> 2 * one & 3 == 3] == empty
        return
    elif register.name in ("efer", "cr0"):
        return  # they say which mode it is
    assert found == data


def test_selectors_bring_their_descriptors() -> None:
    """A selector that is written takes base, limit and rights from its descriptor; one beyond the table is refused."""
    state = reset_state()
    state.system.cr0 |= 1
    state.system.gdt = type(state.system.gdt)(0x5000, 0x17)
    table = bytes(16) + bytes.fromhex("ffff34120092cf00")
    ds = next(one for one in REGISTERS if one.name == "ds")
    write(state, ds, b"\x13\0\0\0", lambda address, size: table[address - 0x5000 :][:size])
    found = state.system.ds
    assert (found.selector, found.base, found.limit, found.type, found.db) == (0x13, 0x1234, 0xFFFFFFFF, 2, 1)
    with pytest.raises(ValueError, match="beyond"):
        write(state, ds, b"\x18\0\0\0", lambda address, size: bytes(size))


# on each accelerator


def test_steps_and_breakpoints(accel: str) -> None:
    """Steps go from instruction to instruction, breakpoints stop before theirs, and the guest's memory shows none."""
    with machine(accel) as vm, Client(vm.gdb_at) as client:
        assert STOP.fullmatch(client.ask(b"?") or b"")
        assert vm.state is State.PAUSED
        assert client.ask(b"Z0,1003,1") == b"OK"
        assert STOP.fullmatch(client.ask(b"vCont;c") or b"")
        assert client.rip == 0x1003
        assert client.ask(b"m1000,10") == b"b80100 40 a30020 8b1e0020 40 40 40 40 eb".replace(b" ", b"")
        assert client.ask(b"z0,1003,1") == b"OK"
        places = []
        for _ in range(9):
            assert STOP.fullmatch(client.ask(b"s") or b"")
            places.append(client.rip)
        assert places == [0x1004, 0x1007, 0x100B, 0x100C, 0x100D, 0x100E, 0x100F, 0x1003, 0x1004]
        before = client.register(0)
        assert client.ask(b"Z1,100d,1") == b"OK"
        for _ in range(3):
            assert STOP.fullmatch(client.ask(b"c") or b"")
            assert client.rip == 0x100D
            assert client.ask(b"z1,100d,1") == b"OK"
            client.ask(b"s")
            assert client.ask(b"Z1,100d,1") == b"OK"
        assert client.register(0) == before + 3 + 5 + 5


def test_a_stop_says_what_is_asked_next(accel: str) -> None:
    """Once gdb has the registers' numbers, a stop tells the stack's registers and the instruction's address of the
    processor that stopped, as ``g`` does; whoever has not asked for them hears none."""
    with machine(accel, cpus=2) as vm, Client(vm.gdb_at) as client:
        assert client.ask(b"Z0,1003,1") == b"OK"
        assert (client.ask(b"c") or b"").count(b":") == 1
        assert client.ask(b"z0,1003,1") == b"OK"
        assert (client.ask(b"s") or b"").count(b":") == 1
        assert (client.ask(b"qXfer:features:read:target.xml:0,10") or b"").startswith(b"m")
        for cpu in (b"1", b"2"):
            said = re.findall(rb"([0-9a-f]+):([0-9a-f]+);", (client.ask(b"vCont;s:" + cpu) or b"").partition(b";")[2])
            assert [number for number, _ in said] == [b"6", b"7", b"10"]
            assert [value for _, value in said] == [client.ask(b"p" + number) for number, _ in said]
            assert client.ask(b"Hg" + cpu) == b"OK"
            assert client.rip == int.from_bytes(bytes.fromhex(said[2][1].decode()), "little")


def test_watchpoints(accel: str) -> None:
    """A write, read or access is told behind it, with the address; where the host's KVM has none, gdb is told so."""
    with machine(accel) as vm, Client(vm.gdb_at) as client:
        if emulated(accel):
            assert client.ask(b"Z2,2000,2") == b"E1c"
            return
        for kind, word, stops in (
            (2, b"watch", (0x1007,)),
            (3, b"rwatch", (0x100B,)),
            (4, b"awatch", (0x1007, 0x100B)),
        ):
            assert client.ask(b"Z%d,2000,2" % kind) == b"OK"
            client.ask(b"c")  # in the midst of the loop
            for _ in range(4):
                assert (client.ask(b"c") or b"").endswith(b";%b:2000;" % word)
                assert client.rip in stops
            assert client.ask(b"z%d,2000,2" % kind) == b"OK"


def test_registers_and_memory_are_written(accel: str) -> None:
    """Registers and memory that gdb writes are the guest's: it goes on with them."""
    with machine(accel) as vm, Client(vm.gdb_at) as client:
        assert client.ask(b"Z0,1003,1") == b"OK"
        client.ask(b"c")
        assert client.ask(b"P0=3412000000000000") == b"OK"
        assert client.ask(b"M3000,2:7856") == b"OK"
        assert client.ask(b"X3002,2:\x01}\x03") == b"OK"
        assert client.ask(b"m3000,4") == b"78560123"
        client.ask(b"z0,1003,1")
        client.ask(b"s")
        client.ask(b"s")
        assert client.ask(b"m2000,2") == b"3512"
        whole = client.ask(b"g") or b""
        assert client.ask(b"G" + whole) == b"OK"
        assert client.ask(b"g") == whole
        assert client.ask(b"m200000,4") == b"E0e"  # no RAM
        assert client.ask(b"m1ffffe,4") == b"0000"
        assert client.ask(b"M1ffffe,4:01020304") == b"E0e"


def test_several_processors(accel: str) -> None:
    """Threads are processors: each has registers of its own, one steps while the others are held, all stop at once."""
    with machine(accel, cpus=2) as vm, Client(vm.gdb_at) as client:
        assert b"multiprocess+" in (client.ask(b"qSupported:multiprocess+;swbreak+;hwbreak+") or b"")
        assert client.ask(b"qfThreadInfo") == b"mp01.01,p01.02"
        assert client.ask(b"Z0,1003,1") == b"OK"
        assert re.fullmatch(rb"T05thread:p01.0[12];swbreak:;", client.ask(b"vCont;c") or b"")
        client.ask(b"z0,1003,1")
        assert client.ask(b"Hgp1.2") == b"OK"
        other = client.ask(b"g")
        assert client.ask(b"Hgp1.1") == b"OK"
        for _ in range(20):
            before = client.rip
            assert (client.ask(b"vCont;s:p1.1") or b"").startswith(b"T05thread:p01.01;")
            assert client.rip != before
        assert client.ask(b"Hgp1.2") == b"OK"
        assert client.ask(b"g") == other
        assert (client.ask(b"vCont;s:p1.2") or b"").startswith(b"T05thread:p01.02;")
        assert client.ask(b"T3") == b"E16"
        client.packet(b"vCont;c")
        client.send(INTERRUPT)
        assert (client.answer() or b"").startswith(b"T02thread:")


@needs_gdb
def test_gdb_itself(accel: str) -> None:
    """gdb connects, reads, steps, breaks, watches, writes, asks the monitor and detaches, and the guest runs again."""
    watch = [] if emulated(accel) else ["watch *(short*)0x2000", "continue", "continue", "delete"]
    with machine(accel, cpus=2) as vm:
        said = gdb(
            vm.gdb_at,
            *("info threads", "hbreak *0x1004", "break *0x100c", "continue", "delete", "stepi", *watch, "thread 2"),
            *("set $rax=0x1234", "p/x $rax", "set $xmm1.uint128=5", "p $xmm1.uint128", "set {int}0x3000=0x55667788"),
            *("x/xw 0x3000", "monitor help", "monitor info registers", "monitor phys on", "info registers cr0 efer"),
            *("maintenance packet qqemu.PhyMemMode", "detach"),
        )
        for text in ("Thread 1.2 (CPU#1 [running])", "Breakpoint", "$1 = 0x1234", "$2 = 5", "0x3000:\t0x55667788"):
            assert text in said, said
        assert "RAX=0000000000001234" in said
        assert "[ ET NW CD ]" in said
        assert 'received: "1"' in said
        assert emulated(accel) or said.count("New value") == 2, said
        assert "detached" in said
        assert vm.state is State.RUNNING


ROM = bytes.fromhex(
    "fab834128ed8b800f08ec031c08ed08ed8bc0070bf00108ec0b9000c6631c0f366ab66c70600100320000066c70600200330000066c7060820"
    "0330000066c7060030830000002e660f0116000166b8200600000f22e066b8001000000f22d866b9800000c066b8000900006631d20f3066b8"
    "330001800f22c066ea81000f000800b8100000008ed88ed048b888776655443322114989c149f7d149bf010000000000008066480f6ed8664d"
    "0f6ef9410f16dfd9e8d9ebb9020100c0b800500000ba010000000f30b9000100c00f30bc00600000bb00400040c7030000000031f6ffc68933"
    "8b3bebf80000000000000000ffff0000009aaf00ffff00000092cf001700e8000f00"
).ljust(0xFFF0, b"\x90") + bytes.fromhex("ea000000f0").ljust(16, b"\0")
"""A BIOS that fills registers: real mode; then page tables (linear 1 GiB is physical 0), long mode, values for general,
SSE and x87 registers, FS base and kernel GS base; then ESI is counted up in linear 0x40004000, from 0xf00e0 on."""
LOOP = 0xF00E0
OURS = {"st0", "st1", "st6", "st7", "ftag"}
"""QEMU's stub does not turn the x87 stack by its top, and has no tags."""


@needs_gdb
@pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs QEMU")
def test_registers_are_those_of_qemus_stub(tmp_path: Path) -> None:
    """At reset and in long mode, gdb finds under cardcage what it finds under QEMU, in memory and after steps too."""
    program = [sys.executable, "-c", "import sys; from cardcage_qemu import main; sys.exit(main())"]
    found = []
    for name, words in (("ours", program), ("theirs", ["qemu-system-x86_64"])):
        path = tmp_path / name
        path.mkdir()
        (path / "rom").write_bytes(ROM)
        socket_on = f"unix:{path}/gdb,server=on,wait=off"
        options = ["-machine", "pc,accel=tcg", "-bios", str(path / "rom"), *"-m 16 -display none -S -gdb".split()]
        with subprocess.Popen([*words, *options, socket_on], stderr=subprocess.DEVNULL) as process:
            limit = threading.Timer(120, process.kill)
            limit.start()
            try:
                while not listens(path / "gdb"):
                    assert process.poll() is None
                lines = (
                    "info registers",
                    f"hbreak *{LOOP:#x}",
                    "continue",
                    'printf "long mode\\n"',
                    "info all-registers",
                )
                more = (
                    "x/2xw $rbx",
                    "stepi 3",
                    "info registers rip rsi rdi",
                    "delete",
                    "watch *(int*)$rbx",
                    "continue",
                )
                said = gdb(f"{path}/gdb", *lines, *more, "info registers rip rsi", "kill")
            finally:
                limit.cancel()
                process.kill()
        found.append(said)
    parts = [one.partition("long mode") for one in found]
    reset, theirs = values(parts[0][0]), values(parts[1][0])
    assert {**reset, "rdx": 0} == {**theirs, "rdx": 0}  # in which the processor's model is
    ours, theirs = values(parts[0][2]), values(parts[1][2])
    assert len(ours) > 60
    assert {name: value for name, value in ours.items() if name not in OURS} == {
        name: value for name, value in theirs.items() if name not in OURS
    }
    assert (ours["st0"], ours["st1"], ours["ftag"]) == (0x4000C90FDAA22168C235, 0x3FFF8000000000000000, 0x0FFF)
    shown = [re.findall(r"^0x40004000:.*|^(?:Old|New) value.*", one, re.MULTILINE) for one in found]
    assert shown[0] == shown[1]
    assert len(shown[0]) == 3


@needs_gdb
def test_virtual_and_physical_addresses(tmp_path: Path) -> None:
    """Memory is read by the guest's page tables, or by physical addresses once gdb says so."""
    (tmp_path / "rom").write_bytes(ROM)
    keys = {"boot": {"firmware": str(tmp_path / "rom")}, "machine": {"accel": "tcg", "memory": "16M"}}
    with Machine(fragments=[keys]) as vm:
        where = vm.gdb()
        vm.start()
        with Client(where) as client:
            assert client.ask(b"Z1,%x,1" % LOOP) == b"OK"
            assert STOP.fullmatch(client.ask(b"c") or b"")
            assert client.ask(b"M40004000,4:efbeadde") == b"OK"
            assert client.ask(b"m4000,4") == b"efbeadde"
            assert client.ask(b"m80004000,4") == b"E0e"
            assert client.ask(b"Qqemu.PhyMemMode:1") == b"OK"
            assert client.ask(b"m40004000,4") == b"E0e"
            assert client.ask(b"m4000,4") == b"efbeadde"


# coming and going


def test_gdb_comes_and_goes(accel: str) -> None:
    """gdb stops the machine by connecting; detached or lost, its breakpoints are gone and the guest runs; the next one
    is let in then."""
    with machine(accel) as vm:
        states: list[str] = []
        changed = threading.Condition()

        def heard(state: str) -> None:
            with changed:
                states.append(str(state))
                changed.notify_all()

        def until(state: str) -> None:
            with changed:
                assert changed.wait_for(lambda: states and states[-1] == state, 60), states

        vm.observers.add("state", heard)
        for way in ("detach", "lost", "lost while it runs"):
            with Client(vm.gdb_at) as client:
                assert STOP.fullmatch(client.ask(b"?") or b"")
                assert states[-1] == "paused"
                assert client.ask(b"Z0,1003,1") == b"OK"
                if way == "detach":
                    assert client.ask(b"D") == b"OK"
                elif way == "lost while it runs":
                    assert client.ask(b"z0,1003,1") == b"OK"
                    client.packet(b"vCont;c")
            until("running")
        with Client(vm.gdb_at) as first, Client(vm.gdb_at) as second:
            assert first.ask(b"?")
            second.packet(b"?")
            assert first.ask(b"D") == b"OK"
            assert STOP.fullmatch(second.answer() or b"")


def test_the_end_is_told() -> None:
    """gdb hears how the machine ended while it ran, and ``kill`` ends it."""
    with machine("tcg") as vm, Client(vm.gdb_at) as client:
        client.ask(b"?")
        client.packet(b"c")
        vm.stop()
        assert client.answer() == b"W00"
        assert client.ask(b"c") == b"W00"
    with machine("tcg") as vm, Client(vm.gdb_at) as client:
        client.ask(b"?")
        client.packet(b"k")
        assert client.answer() is None
        assert isinstance(vm.wait(60), Stopped)


def test_monitor_words() -> None:
    """``monitor`` resets, lists registers and help, leaves going on to gdb, and says what it does not know."""
    with machine("tcg") as vm, Client(vm.gdb_at) as client:

        def monitor(line: str) -> str:
            return bytes.fromhex((client.ask(b"qRcmd," + line.encode().hex().encode()) or b"").decode()).decode()

        assert "reset" in monitor("help")
        assert "RIP=" in monitor("info registers")
        assert "continue" in monitor("cont")
        assert "unknown command" in monitor("frobnicate")
        assert client.ask(b"qRcmd," + b"reset".hex().encode()) == b"OK"
        assert client.rip == 0xFFF0
        assert vm.state is State.PAUSED


@pytest.mark.parametrize("wait", [True, False])
def test_a_machine_waits_for_gdb(tmp_path: Path, wait: bool) -> None:
    """With ``wait``, or where gdb is there already, nothing runs before gdb says continue, and a step is the first
    instruction."""
    keys = {"boot": {"firmware": str(tmp_path / "rom")}, "machine": {"accel": "tcg", "memory": "16M"}}
    (tmp_path / "rom").write_bytes(ROM)
    with Machine(fragments=[keys]) as vm:
        where = vm.gdb(f"unix:{tmp_path}/gdb", wait=wait)
        starter = threading.Thread(target=vm.start)
        try:
            with Client(where) as client:
                assert STOP.fullmatch(client.ask(b"?") or b"")
                starter.start()
                assert vm.state is State.BUILT
                assert client.rip == 0xFFF0
                assert STOP.fullmatch(client.ask(b"vCont;s:1;c") or b"")
                assert client.rip == 0
                assert client.ask(b"D") == b"OK"
        finally:
            starter.join()


@needs_gdb
@pytest.mark.parametrize("way", ["flag", "file"])
def test_the_command_line(tmp_path: Path, way: str) -> None:
    """``cardcage run`` waits for gdb and is debugged in its jail, from the flag or from a file beside its socket; its
    end leaves no socket."""
    (tmp_path / "rom").write_bytes(ROM)
    (tmp_path / "vm.toml").write_text(
        '[machine]\naccel = ["tcg"]\nmemory = "16M"\n[boot]\nfirmware = "rom"\n[security]\njail = "on"\n'
        + ('[[device]]\ntype = "gdb"\nsocket = "unix:socket"\nwait = true\n' if way == "file" else "")
    )
    flag = [] if way == "file" else ["--gdb", f"unix:{tmp_path}/socket,wait=on"]
    with subprocess.Popen([*PROGRAM, "run", str(tmp_path / "vm.toml"), *flag], stderr=subprocess.PIPE) as process:
        limit = threading.Timer(120, process.kill)
        limit.start()
        try:
            while not listens(tmp_path / "socket"):
                assert process.poll() is None, process.stderr.read() if process.stderr else ""
            lines = (f"hbreak *{LOOP:#x}", "continue", "watch *(int*)$rbx", "continue", "x/i $pc", "kill")
            said = gdb(f"{tmp_path}/socket", *lines)
            assert "New value = 1" in said, said
            assert process.stderr is not None
            heard = process.stderr.read().decode()
            assert process.wait() == 0, heard
            assert "outcome: stopped by the host" in heard
        finally:
            limit.cancel()
            process.kill()
    assert not (tmp_path / "socket").exists()


# who may


class Guard:
    """Refuses gdb."""

    @hookimpl
    def cardcage_register(self, registry: Registry) -> None:
        registry.security("guard", lambda: self)

    def check(self, act: Act, /) -> None:
        if act.permissions == ("reach",) and act.facts.get("name") == "gdb":
            raise Denied("no gdb here")


def test_a_checker_refuses_gdb() -> None:
    """gdb is hung up on before it stops or sees anything, where security does not let it reach the machine."""
    host = Host([Guard()])
    with (
        machine("tcg", host=host, fragments=[{"security": {"checkers": ["guard"]}}]) as vm,
        Client(vm.gdb_at) as client,
    ):
        assert client.ask(b"?") is None
        assert vm.state is State.RUNNING


def test_an_accelerator_without_guest_debug() -> None:
    """A stranger's accelerator that cannot debug refuses the device in one line; one that runs, or has a debugger,
    takes none."""
    with pytest.raises(ConfigError, match="cannot debug guests: it has no guest-debug"):
        Machine(
            host=Host([Scripted(), __import__("cardcage_gdb"), __import__("cardcage_qmp")], installed=False),
            machine={"platform": "none", "memory": "2M", "accel": "scripted"},
            devices=[{"type": "gdb", "socket": "tcp:127.0.0.1:0"}],
        )
    with machine("tcg", start=False) as vm, pytest.raises(ConfigError, match="has a guest-debug already"):
        vm.gdb()
    with machine("tcg") as vm, pytest.raises(StateError, match="before the machine starts"):
        vm.gdb()


def test_the_flag() -> None:
    """A port alone is one of the loopback's; the forms are QEMU's; what is wrong is told with the key."""
    assert parse_gdb("1234") == {"device": [{"type": "gdb", "socket": "1234"}]}
    assert parse_gdb("unix:a,wait=on") == {"device": [{"type": "gdb", "socket": "unix:a", "wait": True}]}
    assert [place(one) for one in ("1234", "tcp::1234", "tcp:10.0.0.1:1", "unix:x")] == [
        *("tcp:127.0.0.1:1234", "tcp:127.0.0.1:1234", "tcp:10.0.0.1:1", "unix:x")
    ]
    for words, where in ((["-s"], "tcp:127.0.0.1:1234"), (["-gdb", "unix:x,server=on,wait=off"], "unix:x")):
        assert {"type": "gdb", "socket": where} in translate(["-bios", "rom", *words]).config()["device"]
    with pytest.raises(ConfigError, match="cardcage has none, unix:PATH and tcp:HOST:PORT"):
        translate(["-gdb", "stdio"])
    with pytest.raises(ValueError, match="expected a port"):
        parse_gdb("")
    for wrong in ("nothing", "tcp:127.0.0.1:x", "tcp:127.0.0.1:70000"):
        with pytest.raises(ConfigError, match="socket"):
            Machine(machine={"platform": "none", "memory": "2M"}, devices=[{"type": "gdb", "socket": wrong}])
