"""Processor modes and the ways between them."""

from __future__ import annotations

from cardcage.vcpu import Exit

from cardcage_conformance.conformance import Program

PROGRAMS = (
    Program(
        "halt",
        "HLT without a local APIC comes back as an exit, with RIP behind the instruction",
        """
    mov eax, 0x1234
    hlt
    nop
""",
        registers={"rax": 0x1234, "rip": 0x8006},
        exit=Exit.HALTED,
    ),
    Program(
        "real-mode-basics",
        "Real mode adds segments times 16, wraps offsets at 64 KiB and calls interrupts through the table at 0",
        """
    mov ax, 0x1234
    mov ds, ax
    mov byte [0x10], 0x77
    mov ax, 0x1000
    mov es, ax
    mov al, [es:0x2350]     ; the same byte, 0x12350
    movzx ebx, al
    xor ax, ax
    mov ds, ax
    mov word [0x40 * 4], handler
    mov cx, 5
    int 0x40
    mov si, 0xFFFF
    mov byte [si], 0x99
    mov al, [si]
    movzx edx, al
    call far [pointer]
    movzx ecx, cx
    movzx esi, bp
    xor eax, eax
    done
handler:
    add cx, 10
    iret
pointer: dw away - 0x8000, 0x800
away:
    mov bp, cs
    retf
""",
        start="real16",
        registers={"rbx": 0x77, "rcx": 15, "rdx": 0x99, "rsi": 0x800, "rsp": 0x6FF0},
    ),
    Program(
        "real-mode-faults",
        "Real mode raises #DE, #UD and INT3 through the table, with no error code on the stack",
        """
    mov bp, sp
    expect_fault one
at_divide:
    div byte [zero]
one:
    expect_fault two
at_undefined:
    ud2
two:
    int3
at_behind:
    sub bp, sp
    mov ax, [0x7000]
    movzx eax, ax
    movzx ebp, bp
    mov bl, [0x7040]
    mov bh, [0x7080]
    movzx ebx, bx
    movzx ecx, byte [0x70C0]
    movzx edx, word [0x70D0]
    sub dx, at_behind
    mov word [0x7000], 0    ; the record was judged here
    done
zero: db 0
""",
        start="real16",
        registers={"rax": 3, "rbp": 0, "rbx": 0x0600, "rcx": 3, "rdx": 0},
    ),
    Program(
        "real-to-long",
        "A processor goes from real mode through protected mode into 64-bit mode and back to 16-bit code",
        """
    cli
    o32 lgdt [gdtr]
    mov eax, cr0
    or al, 1
    mov cr0, eax
    jmp dword 0x18:protected
    bits 32
protected:
    mov ax, 0x10
    mov ds, ax
    mov es, ax
    mov ss, ax
    mov esp, 0x28000
    mov edi, 0x50000
    xor eax, eax
    mov ecx, 3 * 1024
    rep stosd
    mov dword [0x50000], 0x51003
    mov dword [0x51000], 0x52003
    mov dword [0x52000], 0x83
    mov eax, cr4
    or eax, 0x20
    mov cr4, eax
    mov eax, 0x50000
    mov cr3, eax
    mov ecx, 0xC0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, cr0
    or eax, 0x80000000
    mov cr0, eax
    rdmsr
    mov ebx, eax            ; LME and LMA
    jmp 0x08:sixtyfour
    bits 64
sixtyfour:
    mov r8, 0x123456789ABCDEF0
    mov r9d, cs
    push qword 0x38
    push qword compat
    retfq
    bits 16
compat:                     ; 16-bit compatibility mode
    mov dx, cs
    mov cx, 0xFFFF
    add cx, 2
    movzx ecx, cx
    movzx edx, dx
    and ebx, 0x500
    xor eax, eax
    done
align 8
gdt:
    dq 0, 0x00AF9B000000FFFF, 0x00CF93000000FFFF, 0x00CF9B000000FFFF, 0, 0, 0, 0x00009B000000FFFF
gdtr:
    dw gdtr - gdt - 1
    dd gdt
""",
        start="real16",
        registers={"r8": 0x123456789ABCDEF0, "r9": 8, "rbx": 0x500, "rcx": 1, "rdx": 0x38},
    ),
    Program(
        "protected-to-real",
        "Clearing CR0.PE gives real mode again, with segments that keep their base until they are loaded",
        """
    jmp CS16:sixteen
    bits 16
sixteen:
    mov ax, DS16
    mov ds, ax
    mov ss, ax
    mov sp, 0x6FF0
    lidt [cs:ivt]
    mov eax, cr0
    and al, 0xFE
    mov cr0, eax
    jmp 0:real
real:
    mov bx, cs
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov ax, 0x2000
    mov es, ax
    mov byte [es:5], 0x66
    mov eax, cr0
    and eax, 1
    mov ecx, eax
    movzx ebx, bx
    xor eax, eax
    done
ivt: dw 0x3FF
    dd 0
""",
        start="protected32",
        registers={"rbx": 0, "rcx": 0},
        memory={0x20005: b"\x66"},
    ),
    Program(
        "protected-segments",
        "32-bit segments add their base, expand-down and 16-bit stacks work, and LAR, LSL, VERR, VERW answer",
        """
    mov dword [GDT + 0x58], 0x0000FFFF | (0x0000 << 16)
    mov dword [GDT + 0x5C], 0x00409306      ; base 0x60000, limit 0xFFFF, data, 32-bit
    mov ax, 0x58
    mov es, ax
    mov dword [es:0x10], 0xABCD
    mov ecx, [DATA + 0x10]
    mov fs, ax
    mov gs, ax
    mov edx, [gs:0x10]
    lar esi, eax
    lsl edi, eax
    verw ax
    setz bl
    verr word [DATA + 0x100]                ; null selector
    setz bh
    movzx ebx, bx
    mov ax, DS16
    mov ss, ax
    mov esp, 0x12346FF0
    push ax                                 ; uses SP, keeps the rest of ESP
    mov ebp, esp
    mov ax, DS0
    mov ss, ax
    mov esp, 0x28000
    xor eax, eax
    done
""",
        start="protected32",
        registers={"rcx": 0xABCD, "rdx": 0xABCD, "rsi": 0x409300, "rdi": 0xFFFF, "rbx": 1, "rbp": 0x12346FEE},
    ),
    Program(
        "sixteen-bit-wrap",
        "16-bit addresses and stack pointers wrap at 64 KiB",
        """
    mov ax, 0x2000
    mov ds, ax
    mov bx, 0xFFFF
    mov byte [bx + 2], 0x77             ; offset 1
    mov al, [1]
    movzx ecx, al
    mov si, 0x8000
    mov bp, 0x8004
    mov byte [bp + si], 0x66            ; SS:4, as BP takes the stack segment
    mov ax, 0x3000
    mov ss, ax
    mov byte [bp + si], 0x55            ; 0x30004
    mov sp, 2
    push word 0x1234
    push word 0x5678                    ; at SS:FFFE
    mov dx, sp
    movzx edx, dx
    xor ax, ax
    mov ss, ax
    mov sp, 0x6FF0
    mov ds, ax
    movzx eax, ax
    xor ebx, ebx
    xor esi, esi
    xor ebp, ebp
    done
""",
        start="real16",
        registers={"rcx": 0x77, "rdx": 0xFFFE},
        memory={0x20001: b"\x77", 0x30004: b"\x55", 0x30000: b"\x34\x12", 0x3FFFE: b"\x78\x56"},
    ),
)
