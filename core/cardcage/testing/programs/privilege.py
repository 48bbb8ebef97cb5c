"""Rings: gates with stack switches, SYSCALL and SYSENTER, I/O permission, what ring 3 may not do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage.testing.conformance import Fault, Program

if TYPE_CHECKING:
    from cardcage.testing.lab import Lab


def _returns_to_label(lab: Lab) -> list[str]:
    return [] if lab.state().registers.r13 == lab.code.labels["at_back"] else ["RCX is not the return address"]


# Ring 3 code ends by the ports that the TSS's bitmap opens: the harness's own.
PROGRAMS = (
    Program(
        "user-mode-fault",
        "A fault in ring 3 switches to RSP0 and pushes the outer stack; error codes say user",
        """
    mov qword [abs PTE(0x66000)], 0x66003       ; supervisor only
    invlpg [abs 0x66000]
    expect_fault one
    enter_user user
user:
at_touch:
    mov al, [abs 0x66000]
one:
    mov qword [abs RESUME], two
at_write:
    mov [abs 0x66008], al
two:
    mov qword [abs RESUME], three
at_cli:
    cli
three:
    mov qword [abs RESUME], four
at_port:
    in al, 0x10
four:
    mov qword [abs RESUME], five
at_hlt:
    hlt
five:
    mov qword [abs RESUME], six
at_cr:
    mov rax, cr0
six:
    mov r8, [abs FAULTS + 64 + 40]
    mov r9, [abs FAULTS + 64 + 48]
    mov r10, rsp
    mov r11w, cs
    movzx r11, r11w
    done
""",
        registers={"r8": 0x2A000, "r9": 0x2B, "r10": 0x2A000, "r11": 0x33},
        faults=(
            Fault(14, 5, rip="at_touch", cr2=0x66000, cs=0x33),
            Fault(14, 7, rip="at_write", cr2=0x66008),
            Fault(13, 0, rip="at_cli"),
            Fault(13, 0, rip="at_port"),
            Fault(13, 0, rip="at_hlt"),
            Fault(13, 0, rip="at_cr"),
        ),
    ),
    Program(
        "interrupt-from-user",
        "INT 0x80 from ring 3 enters ring 0 on RSP0, aligned, and IRETQ comes back; a closed gate gives #GP",
        """
    set_gate 0x80, handler
    enter_user user
user:
    mov ebx, 1
    int 0x80
    mov r12, rsp
    mov r13w, ss
    mov qword [abs RESUME], closed
at_closed:
    int 0x81
closed:
    movzx r13, r13w
    done
handler:
    mov r8, rsp
    mov r9w, cs
    movzx r9, r9w
    mov r10, [rsp + 8]
    mov r11, [rsp + 24]
    inc ebx
    iretq
""",
        registers={
            "rbx": 2,
            "r8": 0x2C000 - 40,
            "r9": 8,
            "r10": 0x33,
            "r11": 0x2A000,
            "r12": 0x2A000,
            "r13": 0x2B,
        },
        faults=(Fault(13, 0x81 << 3 | 2, rip="at_closed", cs=0x33),),
        emulated="its ring 3 runs natively with gates of its own",
    ),
    Program(
        "ist-stack",
        "A gate with an IST number switches stacks even from ring 0, and aligns the frame to 16 bytes",
        """
    mov byte [abs IDT + 0x40 * 16 + 4], 1
    set_gate 0x40, handler
    lea rsp, [rsp - 3]
    mov rbx, rsp
    int 0x40
    mov r10, rsp
    sub r10, rbx
    mov byte [abs IDT + 0x40 * 16 + 4], 0
    int 0x40
    mov r11, r8
    and r11, 0xF
    mov r8, r12
    mov rsp, 0x28000
    done
handler:
    mov r12, r9
    mov r9, r8
    mov r8, rsp
    iretq
""",
        registers={"r10": 0, "r11": 8, "r9": 0x2E000 - 40},
    ),
    Program(
        "syscall-sysret",
        "SYSCALL saves RIP and RFLAGS, masks flags and enters ring 0; SYSRET gives both back in 64- and 32-bit form",
        """
    wrmsr64 0xC0000081, (0x23 - 3) << 48 | 8 << 32
    wrmsr64 0xC0000082, kernel
    wrmsr64 0xC0000083, compat_kernel
    wrmsr64 0xC0000084, 0x401
    enter_user user
user:
    std
    stc
    syscall
at_back:
    flags r8
    mov r9w, cs
    mov r10w, ss
    movzx r9, r9w
    movzx r10, r10w
    mov r14, rsp
    cld
    done
kernel:
    pushfq
    pop r12
    and r12, 0x401
    mov r13, rcx
    mov r15, r11
    and r15, 0x401
    mov bx, cs
    mov dx, ss
    movzx ebx, bx
    movzx edx, dx
    o64 sysret
compat_kernel:
    failed
""",
        registers={
            "r8": 0x401,
            "r9": 0x33,
            "r10": 0x2B,
            "r12": 0,
            "r15": 0x401,
            "rbx": 8,
            "rdx": 0x10,
            "r14": 0x2A000,
        },
        check=_returns_to_label,
        emulated="its SYSCALL in ring 3 shows IF as set",
    ),
    Program(
        "sysret-to-32-bit",
        "SYSRET with a 32-bit operand enters compatibility mode, whose SYSCALL needs EFER.SCE too",
        """
    wrmsr64 0xC0000081, (0x23 - 3) << 48 | 8 << 32
    mov ecx, user32
    mov r11d, 2
    mov rsp, 0x1234567800000000 + USER_STACK
    sysret
    bits 32
user32:
    mov eax, cs
    mov ebx, ss
    mov esp, USER_STACK
    push eax
    pop ecx
    inc edx                     ; FF C2 in all modes
    db 0x40                     ; inc eax here, a REX prefix in 64-bit code
    nop
    mov edx, 7
    done
""",
        registers={"rax": 0x24, "rbx": 0x2B, "rcx": 0x23, "rdx": 7},
        emulated="it returns to 64-bit code",
    ),
    Program(
        "iret-to-user-32",
        "IRETD and INT change rings and stacks in 32-bit code, through the 32-bit TSS",
        """
    set_gate 0x80, handler
    push UDS
    push USER_STACK
    push 2
    push UCS32
    push user
    iretd
user:
    mov ax, UDS
    mov ds, ax
    mov es, ax
    mov ebx, cs
    int 0x80
    mov ecx, esp
    mov dword [RESUME], over
at_cli:
    cli
over:
    mov edx, [FAULTS + 64 + 40]
    xor eax, eax
    done
handler:
    mov esi, esp
    mov edi, ss
    mov ebp, [esp + 12]
    iretd
""",
        start="protected32",
        registers={"rbx": 0x23, "rcx": 0x2A000, "rsi": 0x2C000 - 20, "rdi": 0x10, "rbp": 0x2A000, "rdx": 0x2A000},
        faults=(Fault(13, 0, rip="at_cli", cs=0x23),),
    ),
    Program(
        "call-gate-32",
        "A call gate from ring 3 switches to ESP0, copies its parameters and returns with RET n",
        """
    mov word [GDT + 0x58], gated
    mov word [GDT + 0x5A], CS32
    mov dword [GDT + 0x5C], 0x0000EC02          ; 32-bit call gate, DPL 3, two parameters
    push UDS
    push USER_STACK
    push 2
    push UCS32
    push user
    iretd
user:
    push 0x1111
    push 0x2222
    call 0x58:0
    mov ebx, esp
    mov ecx, cs
    done
gated:
    mov edx, [esp + 8]
    mov esi, [esp + 12]
    mov edi, esp
    mov ebp, cs
    retf 8
""",
        start="protected32",
        registers={
            "rbx": 0x2A000,
            "rcx": 0x23,
            "rdx": 0x2222,
            "rsi": 0x1111,
            "rdi": 0x2C000 - 24,
            "rbp": 0x18,
        },
    ),
    Program(
        "sysenter-sysexit",
        "SYSENTER enters ring 0 at the MSRs' addresses, SYSEXIT leaves to RDX with RCX as stack",
        """
    mov dword [GDT + 0x58], 0x0000FFFF
    mov dword [GDT + 0x5C], 0x00CF9B00          ; 0x58 code
    mov dword [GDT + 0x60], 0x0000FFFF
    mov dword [GDT + 0x64], 0x00CF9300          ; 0x60 data
    mov dword [GDT + 0x68], 0x0000FFFF
    mov dword [GDT + 0x6C], 0x00CFFB00          ; 0x68 user code
    mov dword [GDT + 0x70], 0x0000FFFF
    mov dword [GDT + 0x74], 0x00CFF300          ; 0x70 user data
    xor edx, edx
    mov ecx, 0x174
    mov eax, 0x58
    wrmsr
    inc ecx
    mov eax, 0x2C000
    wrmsr
    inc ecx
    mov eax, kernel
    wrmsr
    push UDS
    push USER_STACK
    push 2
    push UCS32
    push user
    iretd
user:
    sysenter
kernel:
    mov ebx, esp
    mov esi, cs
    mov edi, ss
    mov edx, back
    mov ecx, USER_STACK - 64
    sysexit
back:
    mov ebp, esp
    mov ecx, cs
    mov edx, ss
    done
""",
        start="protected32",
        registers={
            "rbx": 0x2C000,
            "rsi": 0x58,
            "rdi": 0x60,
            "rbp": 0x2A000 - 64,
            "rcx": 0x6B,
            "rdx": 0x73,
        },
        needs=("sep",),
    ),
    Program(
        "smep-smap",
        "Ring 0 may not run user pages with CR4.SMEP, nor touch them with CR4.SMAP unless RFLAGS.AC is set",
        """
    ; make what ring 0 needs supervisor-only: this code, tables, stacks, library
    mov ecx, 0x60
    mov ebx, PTE(0)
next:
    and qword [rbx], ~4
    add rbx, 8
    dec ecx
    jnz next
    mov rax, cr3
    mov cr3, rax
    mov rax, cr4
    bts rax, 20
    bts rax, 21
    mov cr4, rax
    mov byte [abs RESUME], 0
    expect_fault one
at_read:
    mov al, [abs DATA]
one:
    stac
    mov byte [abs DATA], 0xC3
    mov r8b, [abs DATA]
    clac
    expect_fault two
at_write:
    mov byte [abs DATA + 8], 1
two:
    expect_fault three
    mov eax, DATA
    jmp rax
three:
    movzx r8, r8b
    done
""",
        registers={"r8": 0xC3},
        faults=(
            Fault(14, 1, rip="at_read", cr2=0x60000),
            Fault(14, 3, rip="at_write", cr2=0x60008),
            Fault(14, 0x11, cr2=0x60000),
        ),
        needs=("smep", "smap"),
    ),
    Program(
        "privileged-msr-access",
        "MSRs hold what is written, refuse non-canonical addresses, and EFER its reserved bits",
        """
    wrmsr64 0xC0000082, HIGH + 0x1234
    mov ecx, 0xC0000082
    rdmsr
    mov r8d, eax
    mov r9d, edx
    mov edx, 0x80000000
    xor eax, eax
    expect_fault one
at_lstar:
    wrmsr
one:
    mov ecx, 0xC0000080
    rdmsr
    mov r10d, eax
    bts eax, 2
    expect_fault two
at_efer:
    wrmsr
two:
    mov ecx, 0x277
    rdmsr
    mov r11d, eax
    done
""",
        registers={"r8": 0x1234, "r9": 0xFFFF8000, "r10": 0xD01, "r11": 0x00070406},
        faults=(Fault(13, 0, rip="at_lstar"), Fault(13, 0, rip="at_efer")),
    ),
    Program(
        "hypercalls",
        "VMCALL and VMMCALL answer as KVM does, 64 bits wide: -1000 for what there is not, -1 above ring 0",
        """
    mov r15, 0x1122334455667788
    mov rax, 0x12345
    vmmcall
    mov r8, rax
    mov rax, 0x12345
    vmcall
    mov r9, rax
    mov eax, 1                                  ; KVM_HC_VAPIC_POLL_IRQ
    vmmcall
    mov r10, rax
    mov rax, 0x100000001                        ; not that one
    vmmcall
    mov r11, rax
    enter_user user
user:
    mov eax, 1
    vmmcall
    mov r12, rax
    done
""",
        registers={
            "r8": -1000 & 0xFFFFFFFFFFFFFFFF,
            "r9": -1000 & 0xFFFFFFFFFFFFFFFF,
            "r10": 0,
            "r11": -1000 & 0xFFFFFFFFFFFFFFFF,
            "r12": 0xFFFFFFFFFFFFFFFF,
            "r15": 0x1122334455667788,
        },
        emulated="it has one of the two instructions",
    ),
    Program(
        "hypercall-at-the-edge",
        "A hypercall that ends at the last canonical address is answered; going on raises #GP at the next address",
        """
    mov edi, 0x70000
    mov ecx, 0x4000 / 8
    xor eax, eax
    rep stosq
    mov qword [abs 0x50000 + 255 * 8], 0x70007
    mov qword [abs 0x70000 + 511 * 8], 0x71007
    mov qword [abs 0x71000 + 511 * 8], 0x72007
    mov qword [abs 0x72000 + 511 * 8], 0x73007
    mov word [abs 0x73FFD], 0x010F
    mov byte [abs 0x73FFF], 0xD9                ; vmmcall
    mov rax, cr3
    mov cr3, rax
    mov rbx, 0x7FFFFFFFFFFD
    mov eax, 1
    mov qword [abs RESUME], over
    jmp rbx
over:
    mov r8, rax
    mov r9, [abs FAULTS + 64 + 16]
    done
""",
        registers={"r8": 0, "r9": 1 << 47},
        faults=(Fault(13, 0),),
        emulated="it has one of the two instructions",
    ),
    Program(
        "hypercalls-32",
        "In 32-bit code a hypercall's number and answer have 32 bits",
        """
    push CS32
    push compat
    retfq
    bits 32
compat:
    mov eax, 0x12345
    vmmcall
    mov ebx, eax
    jmp CS64:back
    bits 64
back:
    mov r8, rax
    done
""",
        registers={"rbx": 0xFFFFFC18, "r8": 0xFFFFFC18},
        emulated="it has one of the two instructions",
    ),
    Program(
        "smap-follows-ac",
        "CLAC, POPF and IRET that clear AC end ring 0's access to user pages; no AC opens descriptor tables",
        """
    mov ecx, 0x60
    mov ebx, PTE(0)
next:
    and qword [rbx], ~4                         ; all that ring 0 needs is the supervisor's
    add rbx, 8
    dec ecx
    jnz next
    mov rax, cr3
    mov cr3, rax
    mov dword [abs GDT + 0x58], (DATA & 0xFFFF) << 16 | 0xFFF
    mov dword [abs GDT + 0x5C], 0x8200 | DATA >> 16  ; an LDT on a user page
    mov dword [abs GDT + 0x60], 0
    mov dword [abs GDT + 0x64], 0
    mov rax, [abs GDT + 0x10]
    mov [abs DATA + 8], rax
    mov ax, 0x58
    lldt ax
    mov rax, cr4
    bts rax, 21
    mov cr4, rax
    stac
    mov r8, [abs DATA + 8]
    mov [abs DATA], r8
    mov r9, [abs DATA + 0x1000]
    clac
    mov qword [abs RESUME], one
at_clac:
    mov al, [abs DATA]
one:
    mov qword [abs RESUME], two
at_clac_write:
    mov [abs DATA], al
two:
    stac
    mov al, [abs DATA]
    pushfq
    btr dword [rsp], 18
    popfq
    mov qword [abs RESUME], three
at_popf:
    mov al, [abs DATA]
three:
    pushfq
    bts dword [rsp], 18
    popfq
    mov al, [abs DATA]
    mov rax, rsp
    push DS0
    push rax
    push 2
    push CS64
    push back
    iretq
back:
    mov qword [abs RESUME], four
at_iret:
    mov al, [abs DATA]
four:
    stac
    mov al, [abs DATA]
    mov qword [abs RESUME], five
    mov eax, 0x0C
at_table:
    mov es, ax
five:
    mov r10, [abs DATA + 8]                     ; AC came back with the fault's IRET
    clac
    pushfq
    pop r11
    and r11d, 1 << 18
    done
""",
        registers={"r8": 0x00CF93000000FFFF, "r10": 0x00CF93000000FFFF, "r11": 0},
        faults=(
            Fault(14, 1, rip="at_clac", cr2=0x60000),
            Fault(14, 3, rip="at_clac_write", cr2=0x60000),
            Fault(14, 1, rip="at_popf", cr2=0x60000),
            Fault(14, 1, rip="at_iret", cr2=0x60000),
            Fault(14, 1, rip="at_table", cr2=0x60008),
        ),
        needs=("smap",),
    ),
    Program(
        "smap-and-syscall",
        "AC that ring 3 sets opens nothing once SYSCALL has cleared it, and lets an interrupt's handler in until CLAC",
        """
    mov ecx, 0x60
    mov ebx, PTE(0)
next:
    and qword [rbx], ~4                         ; all that ring 0 needs is the supervisor's
    add rbx, 8
    dec ecx
    jnz next
    mov rax, cr3
    mov cr3, rax
    or qword [abs PTE(0x9000)], 4
    mov rax, cr3
    mov cr3, rax
    set_gate 0x80, handler
    wrmsr64 0xC0000081, (0x23 - 3) << 48 | 8 << 32
    wrmsr64 0xC0000082, kernel
    wrmsr64 0xC0000084, 1 << 18
    mov dword [abs GDT + 0x58], (DATA & 0xFFFF) << 16 | 0xFFF
    mov dword [abs GDT + 0x5C], 0x8200 | DATA >> 16  ; an LDT on a user page
    mov dword [abs GDT + 0x60], 0
    mov dword [abs GDT + 0x64], 0
    mov ax, 0x58
    lldt ax
    mov rax, cr4
    bts rax, 21
    mov cr4, rax
    stac
    mov al, [abs DATA]                          ; known, and to be forgotten
    push UDS
    push 0x68000
    push 2 | 1 << 18
    push UCS64
    push user
    iretq
kernel:
    mov rsp, 0x28000
    mov qword [abs RESUME], one
at_syscall:
    mov al, [abs DATA]
one:
    mov qword [abs RESUME], three
    bts r11, 18
    mov rsp, 0x68000
    o64 sysret
handler:
    mov r8, [abs DATA + 0x10]
    clac
    mov qword [abs RESUME], two
at_handler:
    mov al, [abs DATA + 0x10]
two:
    mov r9d, 7
    done
    align 4096
user:
    mov qword [abs DATA + 0x10], 0x99
    syscall
    mov eax, 0x0F
at_table:
    mov es, ax                                  ; ring 3, and yet the supervisor's access
three:
    int 0x80
""",
        registers={"r8": 0x99, "r9": 7},
        faults=(
            Fault(14, 1, rip="at_syscall", cr2=0x60000),
            Fault(14, 1, rip="at_table", cr2=0x60008, cs=0x33),
            Fault(14, 1, rip="at_handler", cr2=0x60010),
        ),
        needs=("smap",),
        emulated="its SYSCALL in ring 3 shows IF as set",
    ),
    Program(
        "protection-keys",
        "PKRU's access and write bits bind data accesses to user pages by their key; CR0.WP frees ring 0's writes",
        """
    mov rax, cr4
    bts rax, 22
    mov cr4, rax
    mov eax, 7
    xor ecx, ecx
    cpuid
    shr ecx, 4
    and ecx, 1
    mov r15d, ecx                               ; OSPKE
    bts qword [abs PTE(0x66000)], 59            ; key 1
    bts qword [abs PTE(0x67000)], 60            ; key 2
    and qword [abs PTE(0x68000)], ~4            ; the supervisor's, key 1
    bts qword [abs PTE(0x68000)], 59
    mov rax, cr3
    mov cr3, rax
    mov dword [abs 0x66000], 0xC3               ; ret
    mov dword [abs 0x67000], 0x77
    xor ecx, ecx
    xor edx, edx
    mov eax, 4                                  ; AD of key 1
    wrpkru
    mov r8d, [abs 0x67000]
    mov [abs 0x68000], r8d
    mov eax, 0x66000
    call rax                                    ; code is free
    mov qword [abs RESUME], one
at_read:
    mov al, [abs 0x66000]
one:
    mov eax, 8                                  ; WD of key 1
    wrpkru
    mov r9b, [abs 0x66000]
    mov qword [abs RESUME], two
at_write:
    mov byte [abs 0x66000], 1
two:
    mov rax, cr0
    btr rax, 16
    mov cr0, rax
    mov byte [abs 0x66004], 2
    bts rax, 16
    mov cr0, rax
    mov eax, 0x10                               ; AD of key 2, none of key 1
    wrpkru
    mov byte [abs 0x66005], 3
    mov qword [abs RESUME], three
at_other:
    mov al, [abs 0x67000]
three:
    xor eax, eax
    rdpkru
    mov r10d, eax
    inc ecx
    mov qword [abs RESUME], four
at_rcx:
    rdpkru
four:
    dec ecx
    inc edx
    mov qword [abs RESUME], five
at_rdx:
    wrpkru
five:
    xor edx, edx
    mov eax, 8
    wrpkru
    btr qword [abs PTE(0x67000)], 1
    invlpg [abs 0x67000]
    enter_user user
user:
    mov r11b, [abs 0x66004]
    mov qword [abs RESUME], six
at_user:
    mov byte [abs 0x66000], 4
six:
    xor ecx, ecx
    xor edx, edx
    mov eax, 0x20                               ; ring 3 may
    wrpkru
    mov byte [abs 0x66006], 5
    mov qword [abs RESUME], seven
at_both:
    mov byte [abs 0x67000], 6                   ; read-only, and WD
seven:
    movzx r9, r9b
    movzx r11, r11b
    done
""",
        registers={"r8": 0x77, "r9": 0xC3, "r10": 0x10, "r11": 2, "r15": 1},
        memory={0x66000: b"\xc3\0\0\0\2\3\5", 0x68000: b"\x77"},
        faults=(
            Fault(14, 0x21, rip="at_read", cr2=0x66000),
            Fault(14, 0x23, rip="at_write", cr2=0x66000),
            Fault(14, 0x21, rip="at_other", cr2=0x67000),
            Fault(13, 0, rip="at_rcx"),
            Fault(13, 0, rip="at_rdx"),
            Fault(14, 0x27, rip="at_user", cr2=0x66000),
            Fault(14, 0x27, rip="at_both", cr2=0x67000),
        ),
        needs=("pku",),
    ),
    Program(
        "protection-keys-in-xsave",
        "PKRU is state component 9: XSAVE, XSAVEC and XRSTOR keep it, and a header without it makes it zero",
        """
    mov rax, cr4
    bts rax, 22
    bts rax, 18
    mov cr4, rax
    xor ecx, ecx
    xor edx, edx
    mov eax, 0x203
    xsetbv
    mov eax, 0xD
    mov ecx, 9
    cpuid
    mov edi, ebx                                ; where
    mov r15d, eax                               ; its size
    xor ecx, ecx
    xor edx, edx
    mov eax, 0x55555550
    wrpkru
    mov rbx, 0x0123456789ABCDEF
    movq xmm5, rbx
    mov eax, -1
    mov edx, eax
    xsave64 [abs DATA + 0x100]
    mov r8d, [abs DATA + 0x300]
    and r8d, 0x202
    mov r9d, [rdi + DATA + 0x100]
    xor eax, eax
    xor edx, edx
    wrpkru
    pxor xmm5, xmm5
    mov eax, 0x203
    xrstor64 [abs DATA + 0x100]
    rdpkru
    mov r10d, eax
    movq r11, xmm5
    mov eax, 0x200
    xsavec64 [abs DATA + 0x1000]
    mov r12, [abs DATA + 0x1208]
    mov r13d, [abs DATA + 0x1240]
    btr dword [abs DATA + 0x300], 9
    mov eax, 0x203
    xrstor64 [abs DATA + 0x100]
    rdpkru
    mov r14d, eax
    mov eax, 0x200
    xrstor64 [abs DATA + 0x1000]
    rdpkru
    mov ebp, eax
    bts dword [abs DATA + 0x300], 2             ; not in XCR0
    mov qword [abs RESUME], over
    mov eax, 0x203
at_refused:
    xrstor64 [abs DATA + 0x100]
over:
    rdpkru
    mov esi, eax
    done
""",
        registers={
            "r8": 0x202,
            "r9": 0x55555550,
            "r10": 0x55555550,
            "r11": 0x0123456789ABCDEF,
            "r12": 1 << 63 | 0x200,
            "r13": 0x55555550,
            "r14": 0,
            "r15": 8,
            "rbp": 0x55555550,
            "rsi": 0x55555550,
        },
        faults=(Fault(13, 0, rip="at_refused"),),
        needs=("pku", "xsave"),
    ),
)
