"""SYSCALL, SYSENTER and their returns; hypercalls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cardcage_conformance.conformance import Fault, Program

if TYPE_CHECKING:
    from cardcage_conformance.lab import Lab


def _returns_to_label(lab: Lab) -> list[str]:
    return [] if lab.state().registers.r13 == lab.code.labels["at_back"] else ["RCX is not the return address"]


PROGRAMS = (
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
        "sysenter-sysexit",
        "SYSENTER enters ring 0 at the MSRs' addresses, SYSEXIT leaves to RDX with RCX as stack",
        """
    flat_segments_at_58
    mov dword [GDT + 0x68], 0x0000FFFF
    mov dword [GDT + 0x6C], 0x00CFFB00          ; 0x68 user code
    mov dword [GDT + 0x70], 0x0000FFFF
    mov dword [GDT + 0x74], 0x00CFF300          ; 0x70 user data
    sysenter_to kernel
    enter_user user
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
)
