"""Small guests that rely on what a BIOS leaves, as real mode and Multiboot kernels do, and end by port 0xF4."""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from cardcage import Machine
from cardcage.outcome import DebugExit
from installed import PROGRAM

if TYPE_CHECKING:
    from collections.abc import Callable

QEMU = [sys.executable, "-c", "import sys; from cardcage_qemu import main; sys.exit(main())"]
EXIT = [{"type": "isa-debug-exit"}]

# Waits for a tick at 0x46C with the vectors, the 8259s and the 8254 as they are, then asks services that are not there.
REAL_MODE = """
bits 16
org 0x7c00
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x7c00
    mov bx, [0x46c]
    sti
tick:
    hlt
    cmp [0x46c], bx
    je tick
    mov dx, 1
    int 0x10            ; comes back
    clc
    mov ax, 0x0201
    int 0x13
    jnc fail
    inc dx
    cmp ah, 1
    jne fail
    inc dx
    clc
    mov eax, 0xe820
    int 0x15
    jnc fail
    inc dx
    cmp ah, 0x86
    jne fail
    pushf
    pop ax
    inc dx
    test ax, 0x200      ; interrupts are still on
    jz fail
    mov dx, 0x31
fail:
    mov ax, dx
    out 0xf4, al
"""

# Keeps what it was entered with at 0x110000, brings up the other processors by fw_cfg's count, then waits for three
# ticks at vector 8 of a table of its own: both chips are as they were left.
MULTIBOOT = """
bits 32
org 0x100000
header:
    dd 0x1badb002, 0x10003, -(0x1badb002 + 0x10003), header, header, 0, end, start
start:
    mov esp, end
    mov byte [0x9000], 1
    mov edi, 0x110000
    stosd
    mov eax, ebx
    stosd
    mov eax, cr0
    stosd
    pushf
    pop eax
    stosd
    mov esi, trampoline
    mov edi, 0x8000
    mov ecx, trampoline.end - trampoline
    rep movsb
    mov esi, 0xfee00000
    mov dword [esi + 0xf0], 0x1ff
    mov dword [esi + 0x300], 0xc4500
    mov dword [esi + 0x300], 0xc4608
    mov dx, 0x510
    mov ax, 5
    out dx, ax
    inc dx
    in al, dx
others:
    pause
    cmp [0x9000], al
    jne others
    mov eax, tick
    mov [idt + 8 * 8], ax
    shr eax, 16
    mov [idt + 8 * 8 + 6], ax
    mov [idt + 8 * 8 + 2], cs
    lgdt [gdtr]
    jmp 8:.here
.here:
    mov ax, 16
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov word [idt + 8 * 8 + 2], 8
    lidt [idtr]
wait_for_tick:
    sti
    hlt
    jmp wait_for_tick
tick:                   ; not left by IRET, which not every host's KVM can run
    mov al, 0x20
    out 0x20, al
    mov esp, end
    inc dword [ticks]
    cmp dword [ticks], 3
    jb wait_for_tick
    mov eax, 0x31
    out 0xf4, eax
bits 16
trampoline:
    lock inc byte [cs:0x1000]
    cli
    hlt
.end:
align 8
gdt: dq 0, 0x00cf9b000000ffff, 0x00cf93000000ffff
gdtr: dw 23
    dd gdt
idtr: dw 16 * 8 - 1
    dd idt
ticks: dd 0
align 8
idt: times 16 dw 0, 0, 0x8e00, 0
times 4096 db 0
end:
"""

# Asks the other processor 200 times for its time-stamp counter: 0x31 if each answer lies between two of its own. RDTSC
# alone is carried out before what stands before it (SDM vol. 2).
IN_STEP = """
bits 32
org 0x100000
header:
    dd 0x1badb002, 0x10003, -(0x1badb002 + 0x10003), header, header, 0, end, start
start:
    mov esp, end
    cld
    mov esi, trampoline
    mov edi, 0x8000
    mov ecx, trampoline.end - trampoline
    rep movsb
    mov dword [0x9000], 0
    mov dword [0xfee000f0], 0x1ff
    mov dword [0xfee00300], 0xc4500
    mov dword [0xfee00300], 0xc4608
    mov ebp, 200
again:
    lfence
    rdtsc
    lfence
    mov esi, eax
    mov edi, edx
    mov byte [0x9000], 1
answer:
    pause
    cmp byte [0x9000], 2
    jne answer
    lfence
    rdtsc
    lfence
    sub eax, [0x9008]
    sbb edx, [0x900c]
    jc fail
    mov eax, [0x9008]
    mov edx, [0x900c]
    sub eax, esi
    sbb edx, edi
    jc fail
    dec ebp
    jnz again
    mov eax, 0x31
    out 0xf4, eax
fail:
    mov eax, 2
    out 0xf4, eax
bits 16
trampoline:
    pause
    cmp byte [cs:0x1000], 1
    jne trampoline
    lfence
    rdtsc
    lfence
    mov [cs:0x1008], eax
    mov [cs:0x100c], edx
    mov byte [cs:0x1000], 2
    jmp trampoline
.end:
times 4096 db 0
end:
"""


# Goes back to real mode below 1 MiB and waits for a tick by the vectors that it was entered with.
REAL_AGAIN = """
bits 32
org 0x8000
header:
    dd 0x1badb002, 0x10003, -(0x1badb002 + 0x10003), header, header, 0, end, start
start:
    lgdt [gdtr]
    jmp 8:narrow
bits 16
narrow:
    mov eax, cr0
    and al, 0xfe
    mov cr0, eax
    jmp 0:real
real:
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, end
    mov bx, [0x46c]
    int 0x11
    sti
wait_:
    hlt
    cmp [0x46c], bx
    je wait_
    mov al, 0x31
    out 0xf4, al
align 8
gdt: dq 0, 0x00009b000000ffff, 0x000093000000ffff
gdtr: dw 23
    dd gdt
times 1024 db 0
end:
"""


# As suites of test kernels are made: 64-bit code in an ELF32 file. Prints its arguments, first module and the number
# of processors that fw_cfg tells, and ends with 0.
FLAT = """
bits 32
section .text
    dd 0x1badb002, 0, -0x1badb002
global start
start:
    mov esp, stack
    mov [info], ebx
    lgdt [gdtr]
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov eax, pml4
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    jmp 8:wide
bits 64
wide:
    mov ebx, [info]
    mov edx, 0x3f8
    mov esi, [rbx + 16]
text:
    lodsb
    out dx, al
    test al, al
    jnz text
    mov edi, [rbx + 24]
    mov esi, [rdi]
    mov ecx, [rdi + 4]
    sub ecx, esi
    rep outsb
    mov edx, 0x510
    mov eax, 5
    out dx, ax
    inc edx
    in al, dx
    add al, '0'
    mov edx, 0x3f8
    out dx, al
    xor eax, eax
    out 0xf4, eax
section .data
gdt: dq 0, 0x00af9b000000ffff
gdtr: dw 15
    dq gdt
align 4096
pml4: dq pdpt + 3
    times 511 dq 0
pdpt: dq 0x83
    times 511 dq 0
section .bss
info: resd 1
    resb 4096
stack:
"""


@pytest.fixture
def assemble(tmp_path: Path) -> Callable[[str], str]:
    """Makes a flat binary of a source text; returns its path."""
    if shutil.which("nasm") is None:
        pytest.skip("needs nasm")

    def make(source: str) -> str:
        (tmp_path / "source.asm").write_text(source)
        subprocess.run(["nasm", "-f", "bin", "-o", tmp_path / "image", tmp_path / "source.asm"], check=True)
        return str(tmp_path / "image")

    return make


def test_real_mode_guest_has_ticks_and_hears_that_there_are_no_services(
    accel: str, assemble: Callable[[str], str]
) -> None:
    """The tick count rises without a word to any chip; disk and system services say no."""
    boot = {"protocol": "raw", "image": assemble(REAL_MODE)}
    with Machine(memory="2M", accel=accel, boot=boot, devices=EXIT) as machine:
        machine.start()
        assert machine.wait(60) == DebugExit(0x31)


@pytest.mark.parametrize("cpus", [1, 3])
def test_multiboot_guest_finds_a_pc_as_a_bios_leaves_it(accel: str, assemble: Callable[[str], str], cpus: int) -> None:
    """Registers, information, memory map and data areas agree; the timer ticks at vector 8; all processors come."""
    path = assemble(MULTIBOOT)
    boot = {"kernel": path, "append": "one  two", "modules": [f"{path} m"]}
    with Machine(memory="32M", cpus=cpus, accel=accel, boot=boot, devices=EXIT) as machine:
        machine.start()
        assert machine.wait(60) == DebugExit(0x31)
        read = machine.memory.read
        magic, info, cr0, flags = struct.unpack("<4I", read(0x110000, 16))
        assert (magic, cr0 & 0x80000001, flags & 0x20200) == (0x2BADB002, 1, 0)
        head = struct.unpack("<22I", read(info, 88))
        assert head[0] == 0x1 | 0x4 | 0x8 | 0x40 | 0x200  # sizes, command line, modules, memory map, loader's name
        (segment,), (base,) = struct.unpack("<H", read(0x40E, 2)), struct.unpack("<H", read(0x413, 2))
        assert head[1] == base == segment >> 6 == 639
        assert head[2] == 31 << 10
        assert read(head[4], len(path) + 10) == path.encode() + b" one  two\0"
        start, end, text, _ = struct.unpack("<4I", read(head[6], 16))
        assert (start % 4096, read(text, len(path) + 3)) == (0, path.encode() + b" m\0")
        assert read(start, end - start) == Path(path).read_bytes()
        entries = [struct.unpack("<IQQI", read(head[12] + 24 * at, 24)) for at in range(head[11] // 24)]
        assert (20, 0, segment << 4, 1) in entries
        assert all(one[0] == 20 for one in entries)
        assert next(one[3] for one in entries if one[1] <= segment << 4 < one[1] + one[2]) == 2
        assert bytes(read(segment << 4, 1)) == b"\x01"
        assert struct.unpack("<H", read(0x400, 2)) == (0x3F8,)


def test_multiboot_guest_that_goes_back_to_real_mode(accel: str, assemble: Callable[[str], str]) -> None:
    """IDTR is a BIOS's, so that software interrupts and the timer's work there without more ado."""
    with Machine(memory="32M", accel=accel, boot={"kernel": assemble(REAL_AGAIN)}, devices=EXIT) as machine:
        machine.start()
        assert machine.wait(60) == DebugExit(0x31)


def test_processors_count_time_in_step(assemble: Callable[[str], str]) -> None:
    """What another processor reads of its time-stamp counter lies between two readings of the one that asked."""
    with Machine(memory="32M", cpus=2, accel="tcg", boot={"kernel": assemble(IN_STEP)}, devices=EXIT) as machine:
        machine.start()
        assert machine.wait(60) == DebugExit(0x31)


def test_a_kernel_takes_one_line_and_gives_its_status(assemble: Callable[[str], str]) -> None:
    """``cardcage run --kernel`` without a file needs what QEMU needs, and its status is QEMU's: value * 2 + 1."""
    options = ["--append", "x", "--cpus", "2", "--timeout", "60", "--device", "isa-debug-exit,iobase=0xf4,iosize=4"]
    command = [*PROGRAM, "run", "--accel", "tcg", "--kernel", assemble(MULTIBOOT), *options]
    done = subprocess.run(command, capture_output=True, check=False)
    assert done.returncode == 0x31 * 2 + 1, done.stderr.decode()
    assert done.stderr.endswith(b"outcome: debug exit with code 49\n")


def test_a_suite_of_kernels_is_run_by_one_line_each(tmp_path: Path) -> None:
    """64-bit code in an ELF32 file finds arguments, environment and processors, and success is status 1, as QEMU's."""
    if any(shutil.which(tool) is None for tool in ("nasm", "ld", "objcopy")):
        pytest.skip("needs nasm and binutils")
    (tmp_path / "env").write_bytes(b"NR_CPUS=3\n")
    (tmp_path / "test.asm").write_text(FLAT)
    for command in (
        "nasm -f elf64 -o test.o test.asm",
        "ld -m elf_x86_64 -N -e start -Ttext=0x400000 -o test.elf test.o",
        "objcopy -O elf32-i386 test.elf test.flat",
    ):
        subprocess.run(command.split(), cwd=tmp_path, check=True)
    options = "--append args --initrd env --cpus 3 --timeout 60 --device isa-debug-exit,iobase=0xf4,iosize=4"
    command = [*PROGRAM, "run", "--accel", "tcg", "--kernel", "test.flat", *options.split()]
    done = subprocess.run(command, cwd=tmp_path, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    assert (done.returncode, done.stdout) == (1, b"test.flat args\0NR_CPUS=3\n3"), done.stderr.decode()


def test_a_suite_that_calls_qemu_takes_cardcage_qemu(assemble: Callable[[str], str]) -> None:
    """Its options are taken; the status tells the guest's code, with nothing on standard error; a kernel that is not
    there is told in the words that its runner looks for."""
    words = "-nodefaults -device pc-testdev -device isa-debug-exit,iobase=0xf4,iosize=0x4 -vnc none -serial stdio"
    command = [*QEMU, *words.split(), "-machine", "accel=tcg", "-kernel"]
    for kernel, status, said in (
        (assemble(IN_STEP), 0x31 * 2 + 1, b""),
        ("_NO_FILE_4Uhere_", 2, b"could not load kernel '_NO_FILE_4Uhere_'"),
    ):
        done = subprocess.run([*command, kernel, "-smp", "2"], capture_output=True, check=False)
        assert (done.returncode, said in done.stderr, bool(done.stderr)) == (status, True, bool(said))
