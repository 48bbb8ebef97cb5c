"""One hostile guest at work: memory, vCPU threads, and what the machine does beside them."""

from __future__ import annotations

import random
import struct
import threading
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from attrs import define
from cardcage.accelerator import VmSpec
from cardcage.memory import PhysicalMemory, RamBlock, RamRange
from cardcage.vcpu import Exit
from cardcage_tcg import layout as L
from cardcage_tcg.accel import Tcg
from cardcage_tcg.vm import TcgOptions

from hostile.grammar import Grammar
from hostile.oracles import FOLLOWS, ROLES, Role, must_fault
from hostile.pages import write_maps
from hostile.places import (
    BIG,
    CODE,
    CODE_SIZE,
    DATA,
    DATA_SIZE,
    FRAMES,
    ORACLE_PORT,
    PAM,
    PAM_SIZE,
    REAL_FRAMES,
    ROM,
    ROM_SIZE,
    SEGMENT,
    TSS,
    stack_of,
    write_tables,
)  # fmt: skip
from hostile.starts import BITS, start

if TYPE_CHECKING:
    from cardcage.vcpu import Ops, VCpuExit
    from cardcage_tcg.cpu.vcpu import TcgVCpu

    from hostile.case import Case

__all__ = ["Finding", "World"]

SLOT = 0x100
RANDOM_THEMES = ("roam", "tags")
DEAF_CPU, DEAF_WALL = 1.5, 60.0
"""A kicked vCPU comes back within so many seconds of its own processor time; or else of idle waiting."""
LIVELOCK = 150  # below TRIES of cardcage_tcg.translate.blocks, whose #UD would hide what is translated for ever
"""Translations of one place by one vCPU with nothing between them."""


def _processor_time(thread: threading.Thread) -> float:
    """Seconds of processor time that a thread has used; 0 once it has ended."""
    try:
        return (
            time.clock_gettime(time.pthread_getcpuclockid(thread.ident)) if thread.ident and thread.is_alive() else 0.0
        )
    except OSError:
        return 0.0


@define
class Finding(Exception):
    """Something that no guest may bring about."""

    kind: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}"


class HostileOps:
    """A machine that answers with anything, and looks at what oracles say. It raises nothing."""

    def __init__(self, world: World, cpu: TcgVCpu, r: random.Random) -> None:
        self._world, self._cpu, self._random = world, cpu, r

    def pio_read(self, port: int, size: int, /) -> int:
        return self._random.getrandbits(8 * size)

    def pio_write(self, port: int, size: int, value: int, /) -> None:
        if port == ORACLE_PORT:
            self._world.oracle(self._cpu, value)
        elif port == 0xE0:
            self._world.act(self._random, on_vcpu=True)

    def mmio_read(self, address: int, size: int, /) -> int:
        return self._random.getrandbits(8 * size)

    def mmio_write(self, address: int, size: int, value: int, /) -> None:
        pass

    def acknowledge_extint(self) -> int | None:
        return self._random.choice((None, 0x21 + 2 * self._random.randrange(100)))

    def end_of_interrupt(self, vector: int, /) -> None:
        pass


class World:
    """The guest of a case. :meth:`run` raises :class:`Finding`; :meth:`close` gives all back."""

    def __init__(self, case: Case, templates: str) -> None:
        self.case = case
        self.random = random.Random(case.seed * 2 + 1)
        self.counts: Counter[str] = Counter()
        self.memory = PhysicalMemory()
        self.ram, self.rom, self.high = RamBlock(case.ram), RamBlock(ROM_SIZE), RamBlock(0x20000)
        self.rom.view[:] = self.random.randbytes(ROM_SIZE)
        self.memory.add(
            RamRange(0, case.ram, self.ram), RamRange(ROM, ROM_SIZE, self.rom, readonly=True, priority=1),
            RamRange(0xFFFF0000, 0x10000, self.high), RamRange(1 << 32, 0x10000, self.high, offset=0x10000),
        )  # fmt: skip
        self._flip = RamRange(PAM, PAM_SIZE, self.rom if PAM_SIZE <= ROM_SIZE else self.ram, readonly=True, priority=2)
        self._flipped = False
        options = TcgOptions(code_cache=case.code_cache, block_size=case.block_size, templates=templates)
        self.avx = case.avx and " avx2 " in Path("/proc/cpuinfo").read_text()
        features = dict.fromkeys(("avx", "avx2", "fma", "f16c"), True) if self.avx else {}
        self.vm = Tcg().create_vm(VmSpec(case.cpus, case.irqchip, features=features, options=options))
        self.memory.attach(self.vm)
        self.memory.report_to(self.vm)
        self.cpus: list[TcgVCpu] = [self.vm.create_vcpu(index) for index in range(case.cpus)]
        self.maps = write_maps(self.memory, self.random, case.ram)
        write_tables(self.memory, self.random)
        self._rom_bytes = bytes(self.rom.view)
        kinds = [one for one in case.kinds if one != "oracle"] or ["load"]
        self.grammar = Grammar(self.random, self.maps, kinds, avx=self.avx)
        self.oracles: dict[int, tuple[int, bytes]] = {}
        self.roles: list[Role] = []
        self.findings: list[Finding] = []
        self.stopping = False
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._reset: set[int] = set()
        self._write_programs()
        self._watch_translations()

    # ---- what the guest runs ----

    def _write_programs(self) -> None:
        r, case = self.random, self.case
        self.memory.write(DATA, r.randbytes(DATA_SIZE))
        self.memory.write(CODE + 0x800, b"\xc3")
        entries = []
        for at in range(CODE, CODE + CODE_SIZE, SLOT):
            entries.append((at, self._write_snippet(at)))
        self.memory.write(case.ram - 0x1000, r.randbytes(0x1000))
        self._write_ends()
        if case.theme not in RANDOM_THEMES:
            self._write_roles()
            entries = [(self.roles[0].start, 64)]
        self._write_frames(entries)

    def _write_snippet(self, at: int) -> int:
        """Fill a place; the width of its code."""
        r, case = self.random, self.case
        bits = BITS[r.choice(case.modes)]
        if bits == 64 and "oracle" in case.kinds and r.random() < max(0.15, 1 / len(case.kinds)) and at != CODE + 0x800:
            token = r.getrandbits(31)
            code = must_fault(r, at, token)
            self.oracles[token] = at, code
        else:
            code = self.grammar.snippet(bits, at - (CODE if bits == 16 else 0))
            code += r.choice(
                (b"\xf4", b"\x0f\x0b", b"\x0f\x0b", b"\x0f\x0b", b"\xeb\xfe", b"", b"\xcc", b"\xc3", b"\xcd\x80")
            )
        if at != CODE + 0x800:
            self.memory.write(at, code[:SLOT])
        return bits

    def _write_ends(self) -> None:
        """Instructions that reach over the ends of RAM, of ROM and of 4 GiB, and over each page of code."""
        r = self.random
        for end in (self.case.ram, ROM + ROM_SIZE, 1 << 32, (1 << 32) + 0x10000):
            cut = r.choice(
                (b"\x48\xb8\x44\x33\x22\x11", b"\x81\x05\x00", b"\xe9", b"\x66\x2e", b"\xf0", b"\xff\x25", b"\x0f")
            )
            if end != ROM + ROM_SIZE:
                self.memory.write(end - len(cut), cut)
        for page in range(CODE + 0x1000, CODE + CODE_SIZE, 0x1000):
            if r.random() < 0.5:
                self.memory.write(
                    page - 3, r.choice((b"\x48\xb8\x44", b"\x90\xe9\x00", b"\x81\xc1\x01", b"\xf0\x48\x01"))
                )

    def _write_roles(self) -> None:
        r, name, token = self.random, self.case.theme, self.random.getrandbits(31)
        for cpu in range(self.case.cpus):
            role = ROLES[name](r, cpu, token + cpu)
            self.roles.append(role)
            if role.user:  # an NMI comes back
                self.memory.write(TSS + 0x400 * cpu + 4, struct.pack("<Q", stack_of(cpu)))
            for at, code in role.code.items():
                self.memory.write(at, code)
                if at == role.start:
                    self.oracles[token + cpu] = at, code
            name = FOLLOWS.get(name, name if name in ("selfpatch", "reader", "doubler", "sprayer") else "sprayer")
            if self.case.theme == "reader" and cpu == 0:
                name = "sprayer"

    def _write_frames(self, entries: list[tuple[int, int]]) -> None:
        """Where the dispatchers go on: mostly snippets in their own mode, at both privileges, sometimes nonsense."""
        r, role = self.random, bool(self.roles)
        frames = bytearray()
        for width, layout in ((64, "<5Q"), (32, "<9I")):
            for _ in range(64):
                at, bits = r.choice(entries)
                if role:
                    user = self.roles[0].user
                    cs, ss = (SEGMENT["user64"], SEGMENT["userdata"]) if user else (SEGMENT["code64"], SEGMENT["data"])
                    flags, rsp = 0x3002, DATA + 0x8000
                else:
                    cs, ss, flags, rsp = self._frame(bits)
                    if r.random() < 0.05:
                        at = r.choice(
                            (self.case.ram - r.randrange(1, 8), 1 << 62, (1 << 47) - 1, at + r.randrange(256))
                        )
                    if bits == 16:
                        at -= CODE
                values = [at, cs, flags, rsp, ss] if width == 64 else [at, cs, flags, rsp, ss, 0x6000, 0x6000, 0, 0]
                mask = (1 << width) - 1
                frames += struct.pack(layout, *(value & mask for value in values))
        self.memory.write(FRAMES, bytes(frames))
        for i in range(32):
            frame = struct.pack(
                "<HHH", r.randrange(CODE_SIZE // 2) & ~0xFF & 0xFFFF, CODE >> 4, r.choice((2, 0x202, 0x302))
            )
            self.memory.write(REAL_FRAMES + 6 * i, frame)

    def _frame(self, bits: int) -> tuple[int, int, int, int]:
        r = self.random
        user = r.random() < 0.4
        cs = SEGMENT[{64: "user64" if user else "code64", 32: "user32" if user else "code32", 16: "code16"}[bits]]
        ss = SEGMENT["userdata" if user and bits != 16 else "data"]
        flags = 0x3002 | r.choice((0, 0, 0x200, 0x200, 0x100, 0x40000, 0x4000, 0x400))
        if r.random() < 0.05:
            cs, ss, flags = r.choice(list(SEGMENT.values())), r.choice(list(SEGMENT.values())), r.getrandbits(22)
        return cs, ss, flags, DATA + 0x8000 + 0x100 * r.randrange(16)

    def _place(self, cpu: TcgVCpu, r: random.Random) -> None:
        """Give a vCPU a new start."""
        self.counts["starts"] += 1
        if self.roles:
            role = self.roles[cpu.index]
            mode = "long_user" if role.user else "long"
            state = start(cpu.get_state(), mode, role.start, cpu.index, self.maps, random.Random(1))
            state.system.cr3, state.system.cr0, state.system.cr4 = self.maps.long[0], 0x80010033, 0x6A0
            state.system.efer, state.registers.rflags = 0xD01, 0x3202
            # its own: an NMI may come before the role's first instruction
            state.registers.rsp = DATA + 0x8000 + 0x100 * cpu.index
        else:
            mode = r.choice(self.case.modes)
            self.counts[mode] += 1
            entry = CODE + r.randrange(CODE_SIZE if BITS[mode] != 16 else 0x10000) // SLOT * SLOT
            if r.random() < 0.03:
                entry = r.choice((self.case.ram, 1 << 32, ROM + ROM_SIZE, CODE + 0x3000)) - r.randrange(1, 7)
                if BITS[mode] == 16:
                    entry = CODE
            state = start(cpu.get_state(), mode, entry, cpu.index, self.maps, r, avx=self.avx)
        cpu.set_state(state)

    # ---- running ----

    def _watch_translations(self) -> None:
        """Count translations that lead nowhere: the seam's exits show none of them."""
        make, last = self.vm.blocks.translate, {}

        def translate(cpu: TcgVCpu, *where: int) -> None:
            key = (
                cpu.registers.rip,
                cpu.registers.mode,
                cpu.registers.field(L.CR3),
                cpu.registers.field(L.CR2),
                cpu.registers.field(L.GPR + 32),
            )
            before, count = last.get(cpu.index, (None, 0))
            last[cpu.index] = key, count + 1 if before == key else 0
            if count > LIVELOCK:  # a block of 64 instructions may need one for each
                last[cpu.index] = None, 0
                raise Finding("livelock", f"{count} translations at {cpu.registers.rip:#x}: {cpu.describe()}")
            make(cpu, *where)
            if (
                cpu.registers.rip != key[0]
            ):  # an exception was delivered, as always for code outside RAM: that is going on
                last[cpu.index] = None, 0

        self.vm.blocks.translate = translate  # type: ignore[method-assign]  # counts tries before it translates

    def oracle(self, cpu: TcgVCpu, value: int) -> None:
        """An OUT that no processor gets to; unless the code before it was changed."""
        found = self.oracles.get(value)
        if found is None or not cpu.registers.mode & L.MODE_64:
            return
        at, code = found
        if not self.roles and cpu.registers.gpr(3) >> 47 in (0, 0x1FFFF):
            return  # it came from elsewhere: RBX is canonical
        if self.memory.read(at, len(code)) == code:
            what = f"role {self.case.theme}" if self.roles else "must fault"
            text = f"{what}, code at {at:#x} {code.hex()}: {cpu.describe()}"
            self.findings.append(Finding("oracle", text))
            self.stopping = True

    def _drive(self, cpu: TcgVCpu) -> None:
        r = random.Random(self.case.seed << 8 | cpu.index)
        ops: Ops = HostileOps(self, cpu, r)
        try:
            self._place(cpu, r)
            while not self.stopping:
                ended: VCpuExit = cpu.run(ops)
                self.counts[ended.reason.value] += 1
                if ended.reason is Exit.FAILED:
                    raise Finding("failed", ended.detail)
                if self.roles:
                    if ended.reason is Exit.SHUTDOWN:
                        return
                elif ended.reason is Exit.SHUTDOWN or cpu.index in self._reset or r.random() < 0.5:
                    self._reset.discard(cpu.index)
                    self._place(cpu, r)
        except Finding as finding:
            self.findings.append(finding)
        except BaseException as error:  # nothing may leave run()
            at = " < ".join(
                f"{one.name}:{one.lineno}" for one in reversed(traceback.extract_tb(error.__traceback__)[-4:])
            )
            self.findings.append(Finding("exception", f"{type(error).__name__} in {at}: {error}; {cpu.describe()}"))
        finally:
            if self.findings:
                self.stopping = True

    def act(self, r: random.Random, *, on_vcpu: bool = False) -> None:
        """One thing that a machine does: a device's write, a slot's change, an interrupt, a kick."""
        acts = (
            [one for one in self.case.acts if not (on_vcpu and one in ("kick", "reset"))] if not on_vcpu else ["flip"]
        )
        if not acts:
            return
        act = r.choice(acts)
        self.counts[act] += 1
        cpu = r.choice(self.cpus)
        if act == "flip":
            with self.vm.quiesce(), self._lock:
                self._change_slots(r)
        elif act == "dma" and not self.roles:
            at = r.choice((CODE, DATA, BIG)) + r.randrange(0xF000)
            with self._lock:
                self.memory.write(at, r.choice((b"\x90", b"\xcc", b"\xc3\xf4", r.randbytes(r.randrange(1, 70)))))
        elif act == "kick":
            cpu.kick()
        elif act == "msi" and self.case.irqchip == "split":
            vector = 33 + 2 * r.randrange(100) if self.roles else r.randrange(256)
            mode = 0 if self.roles else r.choice((0, 0, 1, 2, 4, 5, 6, 7))
            self.vm.signal_msi(0xFEE00000 | cpu.index << 12, vector | mode << 8 | r.randrange(2) << 15)
        elif act == "nmi":
            self.vm.inject_nmi(cpu.index)
        elif act == "extint":
            self.vm.set_extint(r.random() < 0.5 and not self.roles)
        elif act == "reset" and not self.roles:
            self._reset.add(cpu.index)
            cpu.kick()

    def _change_slots(self, r: random.Random) -> None:
        """As a chipset's PAM registers: a range of RAM becomes read-only, a hole of it, or RAM again."""
        if self._flipped:
            self.memory.change(remove=(self._flip,))
        else:
            low = PAM + (r.randrange(PAM_SIZE >> 14) << 14)
            self._flip = RamRange(low, 0x4000, self.rom, readonly=True, priority=2)
            self.memory.change(add=(self._flip,))
        self._flipped = not self._flipped

    def run(self) -> None:
        """Let it work for its time. Raises the first :class:`Finding`."""
        self._threads = [threading.Thread(target=self._drive, args=(cpu,), daemon=True) for cpu in self.cpus]
        beside = threading.Thread(target=self._beside, daemon=True)
        for thread in (*self._threads, beside):
            thread.start()
        begun, pause, seconds = time.monotonic(), threading.Event(), self.case.seconds
        while not self.stopping and any(one.is_alive() for one in self._threads):
            used = time.monotonic() - begun
            if self.case.theme == "storm":  # its work counts, on however busy a host
                used = max(_processor_time(self._threads[0]), used / 8)
            if used > seconds:
                break
            pause.wait(0.03)
            if not self.roles:
                for cpu in self.cpus:  # whatever it waits for
                    cpu.kick()
        self.stopping = True
        self._stop(beside)
        self._end_checks()
        if self.findings:
            raise self.findings[0]

    def _beside(self) -> None:
        """The machine: acts until the case ends. It waits for the world to stop, too, which a deaf vCPU never does."""
        r, pause = random.Random(self.case.seed + 7), threading.Event()
        try:
            while not self.stopping and self.case.acts:
                self.act(r)
                pause.wait(r.choice((0.0001, 0.001, 0.005)))
        except BaseException as error:  # handed to run()
            self.findings.append(Finding("exception", f"in an act: {type(error).__name__}: {error}"))
            self.stopping = True

    def _stop(self, beside: threading.Thread) -> None:
        threads = [*self._threads, beside]
        begun: dict[int, float] = {}
        start_wall, start_all = time.monotonic(), time.process_time()
        while any(one.is_alive() for one in threads):
            for i, thread in enumerate(threads):
                if i < len(self.cpus):
                    self.cpus[i].kick()
                thread.join(0.02)
                used = _processor_time(thread)
                if used - begun.setdefault(i, used) > DEAF_CPU:
                    who = f"vCPU {i}" if i < len(self.cpus) else "the machine"
                    raise Finding("deaf", f"{who} took no kick within {DEAF_CPU} s of its processor time")
            waited = time.monotonic() - start_wall
            if waited > DEAF_WALL and time.process_time() - start_all < waited / 20:
                raise Finding("deadlock", f"threads did not come back within {DEAF_WALL} s, and nothing runs")

    def _end_checks(self) -> None:
        if bytes(self.rom.view) != self._rom_bytes:
            at = next(i for i, (a, b) in enumerate(zip(self.rom.view, self._rom_bytes, strict=True)) if a != b)
            self.findings.append(
                Finding("rom written", f"the guest changed byte {at:#x} of memory that it can only read")
            )
        for i, name in enumerate(("killed", "blocks", "flushes")):
            self.counts[name] += int(self.vm._q[L.VM_STAT // 8 + i])

    def close(self) -> None:
        """Close the VM; its threads must have ended."""
        self.vm.close()
        self.memory.close()
