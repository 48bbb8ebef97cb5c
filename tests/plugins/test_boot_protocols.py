"""The boot protocols: what they write, how small hand-made guests find it, and how damaged files end."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field
from cardcage.accelerator import VmSpec
from cardcage.boot import carve
from cardcage.device import BootImage, E820Entry
from cardcage.errors import ConfigError
from cardcage.host import Host
from cardcage.memory import PhysicalMemory, RamBlock, RamRange, split_ram
from cardcage.vcpu import Exit
from cardcage.x86 import VCpuState
from cardcage_boot.auto import AutoLoader
from cardcage_boot.elf import read_elf, section
from cardcage_boot.files import BootFile
from cardcage_boot.firmware import FirmwareLoader, open_firmware
from cardcage_boot.layout import Room
from cardcage_boot.linux import LinuxLoader, open_linux, read_header
from cardcage_boot.multiboot import MultibootLoader, open_multiboot
from cardcage_boot.options import (
    AutoOptions,
    FirmwareOptions,
    LinuxOptions,
    MultibootOptions,
    PvhOptions,
    RawOptions,
)
from cardcage_boot.pvh import PvhLoader, open_pvh
from cardcage_boot.raw import RawLoader
from hypothesis import given, settings
from hypothesis import strategies as st

MIB = 1 << 20


@define
class Context:
    """A machine's memory map, as far as booting sees it."""

    size: int
    memory: Any = field(factory=PhysicalMemory)
    cpus: int = 1
    rsdp: int | None = 0xE1234
    e820: list[E820Entry] = field(factory=list)
    ram_below_4g: int = 0
    ram_above_4g: int = 0
    firmware: bool = False
    msrs: dict[int, int] = field(factory=dict)

    def __attrs_post_init__(self) -> None:
        self.ram_below_4g, self.ram_above_4g = split_ram(self.size)
        self.e820 = [E820Entry(0, self.ram_below_4g)]
        block = RamBlock(self.size)
        self.memory.add(RamRange(0, self.ram_below_4g, block))
        if self.ram_above_4g:
            self.memory.add(RamRange(1 << 32, self.ram_above_4g, block, self.ram_below_4g))
            self.e820.append(E820Entry(1 << 32, self.ram_above_4g))
        self.reserve(0xA0000, 0x60000)

    def reserve(self, address: int, size: int, type: int = 2, /) -> None:
        self.e820 = carve(self.e820, address, size, type)


@pytest.fixture
def machine() -> Iterator[Callable[..., Context]]:
    made: list[Context] = []

    def make(size: int = 16 * MIB) -> Context:
        made.append(Context(size))
        return made[-1]

    yield make
    for one in made:
        one.memory.close()


@define
class DebugConsole:
    """Ops of a machine with a debug console at port 0xE9 and nothing else."""

    output: bytearray = field(factory=bytearray)

    def pio_read(self, port: int, size: int, /) -> int:
        return (1 << 8 * size) - 1

    def pio_write(self, port: int, size: int, value: int, /) -> None:
        if port == 0xE9:
            self.output += value.to_bytes(size, "little")

    def mmio_read(self, address: int, size: int, /) -> int:
        return (1 << 8 * size) - 1

    def mmio_write(self, address: int, size: int, value: int, /) -> None:
        pass

    def acknowledge_extint(self) -> int | None:
        return None

    def end_of_interrupt(self, vector: int, /) -> None:
        pass


def accelerators() -> list[str]:
    return Host().registry.names("accelerator")


@pytest.fixture(params=accelerators())
def run(request: pytest.FixtureRequest) -> Callable[[Context, VCpuState], bytes]:
    """Runs a guest until HLT on each accelerator; returns what it wrote to port 0xE9."""
    accelerator = Host().registry.get("accelerator", request.param).load()()
    probe = accelerator.probe()
    if not probe.usable:
        pytest.skip(f"{request.param}: {probe.reason}")

    def go(context: Context, state: VCpuState) -> bytes:
        vm = accelerator.create_vm(VmSpec(irqchip="none"))
        try:
            context.memory.attach(vm)
            vcpu = vm.create_vcpu(0)
            vcpu.set_state(state)
            console = DebugConsole()
            ended = vcpu.run(console)
            assert ended.reason is Exit.HALTED, (ended, bytes(console.output))
            return bytes(console.output)
        finally:
            context.memory.listener = None
            vm.close()

    return go


def elf32(code: bytes, address: int, *, bss: int = 0, notes: bytes = b"", machine: int = 3, entry: int = 0) -> bytes:
    """An ELF32 executable with one segment at *address* whose first byte is the entry point."""
    headers = 2 if notes else 1
    start = 52 + 32 * headers
    body = notes + code
    out = b"\x7fELF\x01\x01\x01" + bytes(9)
    out += struct.pack("<HHIIIIIHHHHHH", 2, machine, 1, entry or address, 52, 0, 0, 52, 32, headers, 40, 0, 0)
    out += struct.pack("<8I", 1, start + len(notes), address, address, len(code), len(code) + bss, 7, 4)
    if notes:
        out += struct.pack("<8I", 4, start, 0, 0, len(notes), len(notes), 4, 4)
    return out + body


def elf64(code: bytes, address: int, notes: bytes) -> bytes:
    """The same as ELF64, as Linux's vmlinux is."""
    start = 64 + 2 * 56
    out = b"\x7fELF\x02\x01\x01" + bytes(9)
    out += struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, address, 64, 0, 0, 64, 56, 2, 64, 0, 0)
    out += struct.pack("<IIQQQQQQ", 1, 7, start + len(notes), address, address, len(code), len(code), 8)
    out += struct.pack("<IIQQQQQQ", 4, 4, start, 0, 0, len(notes), len(notes), 4)
    return out + notes + code


def pvh_note(entry: int) -> bytes:
    return struct.pack("<III4sI", 4, 4, 18, b"Xen\0", entry)


def multiboot_header(flags: int, *addresses: int) -> bytes:
    return struct.pack("<III", 0x1BADB002, flags, -(0x1BADB002 + flags) & 0xFFFFFFFF) + struct.pack(
        f"<{len(addresses)}I", *addresses
    )


# Prints the command line with its NUL, each module's string and contents, and mem_upper; '!' without the magic.
MULTIBOOT_CODE = bytes.fromhex(
    "66bae9003d02b0ad2b753bbc009000008b7310e8270000008b4b148b6b18e31a8b7508e817000000518b75008b4d0429f1f36e5983c51049ebe48b43"
    "08eff4acee84c075fac3b021eef4"
)
# Prints the command line with its NUL, the first module, the low half of rsdp_paddr, and the number of map entries.
PVH_CODE = bytes.fromhex("66bae900813b78c56e33751d8b7318acee84c075fa8b6b108b75008b4d08f36e8b4320ef8b4330eef4b021eef4")
# 64-bit; prints the command line, the initrd, the low half of acpi_rsdp_addr, the setup_data type and e820_entries.
LINUX_CODE = bytes.fromhex(
    "66bae9004889f38bb328020000acee84c075fa8bb3180200008b83c000000048c1e0204809c68b8b1c020000f36e8b4370ef488bb3500200008b4608"
    "ee8a83e8010000eef4"
)
RAW_CODE = {
    16: bytes.fromhex("8cc8bae900ef5258ee0f20c0eef4"),  # prints CS, the low byte of 0xE9 through the stack, CR0
    32: bytes.fromhex("b83031323366bae900ef0f20c0eff4"),  # prints "0123" and CR0
    64: bytes.fromhex("48b8303132333435363766bae900ef48c1e820ef0f20c0eff4"),  # prints "01234567" and CR0
}


def bzimage(
    code: bytes = LINUX_CODE,
    *,
    preferred: int = MIB,
    relocatable: int = 1,
    init_size: int = 0x10000,
    initrd_max: int = 0x7FFFFFFF,
    xloadflags: int = 3,
    version: int = 0x20F,
) -> bytes:
    """A bzImage of one setup sector whose 64-bit entry point is *code*."""
    head = bytearray(1024)
    payload = bytes(0x200) + code
    payload += bytes(-len(payload) % 16)
    head[0x1F1] = 1
    struct.pack_into("<I", head, 0x1F4, len(payload) // 16)
    head[0x1FE:0x202] = b"\x55\xaa\xeb\x6a"
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, version)
    struct.pack_into("<H", head, 0x20E, 0x100)
    head[0x300:0x30C] = b"6.1.0-t (x)\0"
    struct.pack_into("<IIBBHI", head, 0x22C, initrd_max, 0x1000, relocatable, 12, xloadflags, 255)
    struct.pack_into("<QI", head, 0x258, preferred, init_size)
    return bytes(head) + payload


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, bytes], str]:
    def put(name: str, data: bytes) -> str:
        path = tmp_path / name
        path.write_bytes(data)
        return str(path)

    return put


Machine = Callable[..., Context]
Write = Callable[[str, bytes], str]
Run = Callable[[Context, VCpuState], bytes]


def test_linux_guest_finds_what_the_protocol_promises(machine: Machine, write: Write, run: Run) -> None:
    """A bzImage is entered in 64-bit mode and finds command line, initrd, RSDP, seed and memory map; twice."""
    context = machine()
    options = LinuxOptions(write("k", bzimage()), write("i", b"initrd-1"), "console=ttyS0")
    image = LinuxLoader(options).open()
    entries = len(context.e820)
    expected = b"console=ttyS0\0initrd-1" + struct.pack("<IBB", 0xE1234, 9, entries)
    for _ in range(2):
        assert run(context, image.load(context)) == expected


def test_linux_joins_initrds_on_word_bounds(write: Write) -> None:
    """Several initrds follow each other, each padded to 4 bytes, as the kernel expects of joined archives."""
    image = LinuxLoader(LinuxOptions(write("k", bzimage()), [write("a", b"abcde"), write("b", b"fg")])).open()
    assert image.initrd == b"abcde\0\0\0fg\0\0"  # type: ignore[attr-defined]


def load_linux(context: Context, kernel: bytes, initrd: bytes = b"") -> tuple[VCpuState, bytes]:
    image = open_linux(BootFile("k", kernel), [], "")
    image.initrd, image.initrd_path = initrd, "i"
    state = image.load(context)
    return state, context.memory.read(state.registers.rsi, 4096)


def test_linux_prefers_its_address_and_moves_when_it_must(machine: Machine) -> None:
    """The kernel lies at pref_address where that is free, else, if relocatable, at the first aligned free address."""
    context = machine()
    assert load_linux(context, bzimage(preferred=2 * MIB))[0].registers.rip == 2 * MIB + 0x200
    context.reserve(2 * MIB, 4096)
    assert load_linux(context, bzimage(preferred=2 * MIB))[0].registers.rip == MIB + 0x200
    with pytest.raises(ConfigError, match="0x200000"):
        load_linux(context, bzimage(preferred=2 * MIB, relocatable=0))


def test_linux_initrd_obeys_its_limit(machine: Machine) -> None:
    """The initrd lies as high as initrd_addr_max and the memory map allow."""
    context = machine()
    _, page = load_linux(context, bzimage(), bytes(5000))
    assert struct.unpack_from("<II", page, 0x218) == (16 * MIB - 8192, 5000)
    _, page = load_linux(context, bzimage(initrd_max=8 * MIB - 1), bytes(5000))
    assert struct.unpack_from("<I", page, 0x218)[0] == 8 * MIB - 8192
    context.reserve(14 * MIB, 2 * MIB, 3)
    _, page = load_linux(context, bzimage(), bytes(5000))
    assert struct.unpack_from("<I", page, 0x218)[0] == 14 * MIB - 8192


def test_linux_initrd_above_4g_where_the_kernel_allows_it(machine: Machine) -> None:
    """An initrd that fits nowhere below its limit goes above 4 GiB with the extended fields, or is refused."""
    context = machine(3 * 1024 * MIB + 1024 * MIB)
    context.reserve(3 * MIB, context.ram_below_4g - 3 * MIB)
    _, page = load_linux(context, bzimage(), bytes(4 * MIB))
    low, size = struct.unpack_from("<II", page, 0x218)
    high, size_high = struct.unpack_from("<II", page, 0x0C0)
    assert (high << 32 | low, size_high << 32 | size) == ((5 << 30) - 4 * MIB, 4 * MIB)
    with pytest.raises(ConfigError, match=r"i: the initrd of 4\.0 MiB does not fit"):
        load_linux(context, bzimage(xloadflags=1), bytes(4 * MIB))


def test_linux_zero_page_is_the_memory_map(machine: Machine) -> None:
    """The e820 table of the zero page is the context's, sorted, with the reserved ranges."""
    context = machine()
    context.reserve(15 * MIB, 0x1000, 4)
    _, page = load_linux(context, bzimage())
    found = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * at) for at in range(page[0x1E8])]
    assert found == sorted((one.address, one.size, one.type) for one in context.e820)
    assert (15 * MIB, 0x1000, 4) in found


def test_linux_header_names_the_release() -> None:
    """The kernel's release is read from the setup header."""
    assert read_header(BootFile("k", bzimage())).release == "6.1.0-t"


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (b"x" * 100, "truncated bzImage"),
        (b"x" * 4096, "not a Linux kernel"),
        (bzimage()[:1200], "truncated file: expected the protected-mode kernel"),
        (bzimage(version=0x20B), "boot protocol 2.11"),
        (bzimage(xloadflags=2), "32-bit kernel"),
    ],
)
def test_linux_wrong_kernel_is_one_clear_error(kernel: bytes, expected: str) -> None:
    """A truncated, foreign, old or 32-bit kernel is named with what was expected."""
    with pytest.raises(ConfigError, match=r"^vmlinuz: ") as caught:
        read_header(BootFile("vmlinuz", kernel))
    assert expected in str(caught.value)


def test_too_little_memory_for_the_kernel(machine: Machine) -> None:
    """A kernel that does not fit in RAM is refused with a hint, before anything is written."""
    with pytest.raises(ConfigError, match="give more memory"):
        load_linux(machine(), bzimage(init_size=64 * MIB))


def test_command_line_too_long(write: Write) -> None:
    """A command line that the kernel cannot take is refused with the limit."""
    with pytest.raises(ConfigError, match="at most 255"):
        LinuxLoader(LinuxOptions(write("k", bzimage()), append="x" * 256)).open()


@pytest.mark.parametrize("build", [elf32, elf64])
def test_pvh_guest_finds_what_the_protocol_promises(
    machine: Machine, write: Write, run: Run, build: Callable[..., bytes]
) -> None:
    """An ELF kernel is entered at its note's address and finds command line, initrd, RSDP and memory map."""
    kernel = build(PVH_CODE, 2 * MIB, notes=pvh_note(2 * MIB))
    context = machine()
    image = PvhLoader(PvhOptions(write("k", kernel), write("i", b"module"), "a=b")).open()
    expected = b"a=b\0module" + struct.pack("<IB", 0xE1234, len(context.e820))
    for _ in range(2):
        assert run(context, image.load(context)) == expected


@pytest.mark.parametrize("flat", [False, True])
def test_multiboot_guest_finds_what_the_protocol_promises(machine: Machine, write: Write, run: Run, flat: bool) -> None:
    """A Multiboot kernel, ELF or flat, finds magic, command line, modules with their strings, and upper memory."""
    if flat:
        header = multiboot_header(0x10003, 2 * MIB, 2 * MIB, 0, 0, 2 * MIB + 32)
        kernel = header + MULTIBOOT_CODE
    else:
        kernel = elf32(multiboot_header(3) + MULTIBOOT_CODE, 2 * MIB, bss=100, entry=2 * MIB + 12)
    path = write("k", kernel)
    modules = [f"{write('m', b'first')} x=1", write("n", b"second")]
    context = machine()
    image = MultibootLoader(MultibootOptions(path, modules, "arg")).open()
    expected = f"{path} arg\0{modules[0]}\0first{modules[1]}\0second".encode() + struct.pack("<I", 15 << 10)
    for _ in range(2):
        assert run(context, image.load(context)) == expected


def test_multiboot_entry_of_a_kernel_that_is_linked_high_is_translated(
    machine: Machine, write: Write, run: Run
) -> None:
    """A kernel linked at 3 GiB and loaded at 2 MiB is entered where its entry point lies in memory."""
    kernel = bytearray(elf32(multiboot_header(3) + MULTIBOOT_CODE, 2 * MIB, entry=0xC0000000 + 2 * MIB + 12))
    struct.pack_into("<I", kernel, 52 + 8, 0xC0000000 + 2 * MIB)  # p_vaddr
    context = machine()
    image = MultibootLoader(MultibootOptions(path := write("k", bytes(kernel)), [], "arg")).open()
    assert run(context, image.load(context)).startswith(path.encode() + b" arg\0")


def test_multiboot_takes_elf64(machine: Machine, write: Write, run: Run) -> None:
    """A Multiboot header in an ELF64 file is honoured as in ELF32: entered in 32-bit mode at its entry point."""
    code = MULTIBOOT_CODE.ljust(4096, b"\0")  # the header lies behind, aligned
    kernel = elf64(code + multiboot_header(3), 2 * MIB, b"")
    context = machine()
    image = MultibootLoader(MultibootOptions(path := write("k", kernel), [], "arg")).open()
    assert run(context, image.load(context)).startswith(path.encode() + b" arg\0")


def test_gzipped_kernel_is_unpacked(write: Write) -> None:
    """Multiboot and auto take a kernel that gzip packed, as Debian packages Xen and GNU Mach."""
    kernel = elf32(multiboot_header(3) + MULTIBOOT_CODE, 2 * MIB)
    path = write("k.gz", gzip.compress(kernel))
    plain = MultibootLoader(MultibootOptions(write("k", kernel))).open()
    for loader in (MultibootLoader(MultibootOptions(path)), AutoLoader(AutoOptions(path))):
        assert loader.open().elf == plain.elf  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (lambda data: data[:-9], "truncated gzip file"),
        (lambda data: data[:30] + bytes(20) + data[50:], "damaged gzip file"),
    ],
)
def test_damaged_gzip_is_one_clear_error(write: Write, damage: Callable[[bytes], bytes], expected: str) -> None:
    """What gzip cannot unpack is refused, naming the file."""
    path = write("k.gz", damage(gzip.compress(bytes(range(256)) * 9)))
    with pytest.raises(ConfigError, match=expected) as caught:
        AutoLoader(AutoOptions(path)).open()
    assert caught.value.file == path


def test_gzip_bomb_is_refused(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file does not unpack into more than the limit of a boot file."""
    monkeypatch.setattr("cardcage_boot.files.MAX_FILE", 1 << 20)
    with pytest.raises(ConfigError, match="unpacks to more than"):
        AutoLoader(AutoOptions(write("k.gz", gzip.compress(bytes(2 << 20))))).open()


def test_multiboot_zeroes_bss_and_loads_modules_behind_it(machine: Machine, write: Write) -> None:
    """Memory past the file's bytes is zero after each load, and modules are page aligned behind the kernel."""
    context = machine()
    kernel = elf32(multiboot_header(1) + b"code", 2 * MIB, bss=9000)
    image = MultibootLoader(MultibootOptions(write("k", kernel), [write("m", b"mod")])).open()
    context.memory.write(2 * MIB, b"\xff" * 20000)
    state = image.load(context)
    assert context.memory.read(2 * MIB + 16, 9000) == bytes(9000)
    info = struct.unpack("<22I", context.memory.read(state.registers.rbx, 88))
    start, end, _, _ = struct.unpack("<4I", context.memory.read(info[6], 16))
    assert (start, end) == (2 * MIB + 3 * 4096, 2 * MIB + 3 * 4096 + 3)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        (b"x" * 9000, "not a Multiboot kernel"),
        (multiboot_header(8), "bits 3 to 15"),
        (multiboot_header(3), "neither ELF"),
        (multiboot_header(0x10000, 0), "truncated"),
        (multiboot_header(0x10000, MIB, 2 * MIB, 0, 0, MIB), "do not fit the file"),
        (multiboot_header(0x10000, MIB, MIB, MIB + 999, 0, MIB), "truncated"),
    ],
)
def test_multiboot_wrong_kernel_is_one_clear_error(kernel: bytes, expected: str) -> None:
    """A kernel without a header, or with one that cannot be honoured, is named with what was expected."""
    with pytest.raises(ConfigError, match=r"^k: ") as caught:
        open_multiboot(BootFile("k", kernel), [], "")
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("mode", "entry", "expected"),
    [
        (16, 0x7C00, b"\0\0\xe9\x10"),
        (16, 0x27C00, b"\0\x20\xe9\x10"),
        (32, 0x200000, b"0123" + struct.pack("<I", 0x11)),
        (64, 0x200000, b"01234567" + struct.pack("<I", 0x80000011)),
    ],
)
def test_raw_image_runs_in_its_mode(
    machine: Machine, write: Write, run: Run, mode: int, entry: int, expected: bytes
) -> None:
    """A flat binary runs at its address in 16-, 32- or 64-bit mode."""
    image = RawLoader(RawOptions(write("r", RAW_CODE[mode]), entry, mode=mode)).open()
    context = machine()
    for _ in range(2):
        assert run(context, image.load(context)) == expected


def test_raw_image_outside_ram_or_over_the_tables(machine: Machine, write: Write) -> None:
    """An image that lies outside RAM, or over the tables of 64-bit mode, or an entry out of reach, is refused."""
    path = write("r", b"\xf4" * 10)
    with pytest.raises(ConfigError, match="not inside the guest's RAM"):
        RawLoader(RawOptions(path, 16 * MIB - 5, mode=32)).open().load(machine())
    with pytest.raises(ConfigError, match="tables"):
        RawLoader(RawOptions(path, 0x2000, mode=64)).open()
    with pytest.raises(ConfigError, match=r"boot\.entry"):
        RawLoader(RawOptions(path, 0x7C00, MIB, 16)).open()


def test_firmware_is_read_only_and_mirrored(machine: Machine, write: Write) -> None:
    """A ROM ends at 4 GiB, its last 128 KiB show at 0xE0000, it is mapped once, and entered at the reset vector."""
    rom = b"".join(struct.pack("<I", at) for at in range(0, 256 << 10, 4))[:-16] + b"\xea" * 16
    image = FirmwareLoader(FirmwareOptions(write("f", rom))).open()
    context = machine()
    for _ in range(2):
        state = image.load(context)
    assert context.memory.read((1 << 32) - len(rom), len(rom)) == rom
    assert context.memory.read(0xE0000, 128 << 10) == rom[128 << 10 :]
    roms = [(slot.address, slot.size) for slot in context.memory.slots if slot.readonly]
    assert roms == [(0xE0000, 128 << 10), ((1 << 32) - len(rom), len(rom))]
    assert (state.system.cs.base, state.registers.rip) == (0xFFFF0000, 0xFFF0)


def test_firmware_runs_from_its_reset_vector(machine: Machine, write: Write, run: Run) -> None:
    """The processor starts in the ROM below 4 GiB, and the mirror below 1 MiB holds the same code."""
    code = bytes.fromhex("ba e9 00 b0 52 ee ea 20 ff 00 f0".replace(" ", ""))  # 'R', then jmp f000:ff20 (the mirror)
    rom = bytearray(b"\xf4" * (64 << 10))
    rom[-16 : -16 + len(code)] = code
    rom[0xFF20 : 0xFF20 + 4] = bytes.fromhex("b04deef4")  # 'M', hlt
    image = FirmwareLoader(FirmwareOptions(write("f", bytes(rom)))).open()
    context = machine()
    assert run(context, image.load(context)) == b"RM"


@pytest.mark.parametrize("rom", [bytes(4096), bytes(100), b"\xff" * (64 << 10), bytes(64 << 10)])
def test_wrong_firmware_is_one_clear_error(rom: bytes) -> None:
    """A ROM of a wrong size, or without code at its reset vector, is refused."""
    with pytest.raises(ConfigError, match=r"^f: .*firmware ROM"):
        open_firmware(BootFile("f", rom))


def test_auto_decides_by_magic(write: Write) -> None:
    """Protocol auto opens each kind of file by its own protocol, and says so when it knows none."""
    note = pvh_note(2 * MIB)
    kinds = {
        "LinuxImage": bzimage(),
        "PvhImage": elf64(PVH_CODE, 2 * MIB, note),
        "MultibootImage": multiboot_header(0x10003, MIB, MIB, 0, 0, MIB),
    }
    for name, data in kinds.items():
        assert type(AutoLoader(AutoOptions(write("k", data))).open()).__name__ == name
    rom = AutoLoader(AutoOptions(firmware=write("f", bytes((64 << 10) - 16) + b"\xea" * 16))).open()
    assert type(rom).__name__ == "FirmwareImage"
    with pytest.raises(ConfigError, match="no kernel that any boot protocol here knows"):
        AutoLoader(AutoOptions(write("k", b"#!/bin/sh\n"))).open()
    with pytest.raises(ConfigError, match="nothing to boot"):
        AutoLoader(AutoOptions()).open()


@pytest.mark.parametrize("path", ["/nonexistent/vmlinuz", "/", "a\0b"])
def test_unreadable_file_is_one_clear_error(path: str) -> None:
    """A missing file, a directory or an impossible name is a ConfigError that names it."""
    with pytest.raises(ConfigError, match="cannot be read"):
        AutoLoader(AutoOptions(path)).open()


def attempts(data: bytes) -> Iterator[Callable[[], Any]]:
    file = BootFile("f", data)
    yield lambda: open_linux(file, [], "")
    yield lambda: open_pvh(file, [], "")
    yield lambda: open_multiboot(file, [], "")
    yield lambda: open_firmware(file)
    yield lambda: read_elf(file)
    yield lambda: section(file, ".modinfo")


SEEDS = [
    bzimage(),
    elf32(multiboot_header(3) + MULTIBOOT_CODE, 2 * MIB, notes=pvh_note(2 * MIB)),
    elf64(PVH_CODE, 2 * MIB, pvh_note(2 * MIB)),
    multiboot_header(0x10003, MIB, MIB, 0, 0, MIB) + MULTIBOOT_CODE,
]
damage = st.lists(st.tuples(st.integers(0, 700), st.binary(min_size=1, max_size=8)), max_size=6)


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(SEEDS), damage, st.integers(0, 2000))
def test_damaged_files_only_raise_config_error(seed: bytes, changes: list[tuple[int, bytes]], length: int) -> None:
    """Whatever bytes a file holds and wherever it ends, opening and loading it works or is a ConfigError."""
    data = bytearray(seed)
    for at, patch in changes:
        data[at : at + len(patch)] = patch
    context = Context(4 * MIB)
    try:
        for attempt in attempts(bytes(data[:length] if length else data)):
            try:
                found = attempt()
                if hasattr(found, "load"):
                    image: BootImage = found
                    image.load(context)
            except ConfigError:
                continue
    finally:
        context.memory.close()


@given(
    st.lists(st.tuples(st.integers(0, 64), st.integers(1, 16), st.sampled_from([1, 1, 1, 2, 3])), max_size=6),
    st.lists(st.tuples(st.integers(1, 8 * 4096), st.sampled_from([1, 4096, 16384]), st.booleans()), max_size=8),
)
def test_room_gives_only_free_disjoint_ram(
    entries: list[tuple[int, int, int]], asks: list[tuple[int, int, bool]]
) -> None:
    """Ranges taken are aligned, inside RAM that nothing else covers, and never overlap each other or page 0."""
    table = [E820Entry(at * 4096, size * 4096, kind) for at, size, kind in entries]
    room = Room(table)
    taken: list[tuple[int, int]] = []
    for size, align, top in asks:
        at = room.find(size, align=align, top=top, low=4096)
        if at is None:
            continue
        assert at % align == 0
        assert at >= 4096
        for page in {at // 4096, (at + size - 1) // 4096}:
            kinds = {one.type for one in table if one.address <= page * 4096 < one.address + one.size}
            assert kinds == {1}
        assert all(at + size <= low or low + length <= at for low, length in taken)
        taken.append((at, size))
