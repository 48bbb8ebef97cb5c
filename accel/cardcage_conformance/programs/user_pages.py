"""Rights to the user's pages: SMEP, SMAP, protection keys."""

from __future__ import annotations

from cardcage_conformance.conformance import Fault, Program

PROGRAMS = (
    Program(
        "smep-smap",
        "Ring 0 may not run user pages with CR4.SMEP, nor touch them with CR4.SMAP unless RFLAGS.AC is set",
        """
    supervisor_pages
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
        "smap-follows-ac",
        "CLAC, POPF and IRET that clear AC end ring 0's access to user pages; no AC opens descriptor tables",
        """
    supervisor_pages
    ldt_on_data
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
    supervisor_pages
    or qword [abs PTE(0x9000)], 4
    mov rax, cr3
    mov cr3, rax
    set_gate 0x80, handler
    wrmsr64 0xC0000081, (0x23 - 3) << 48 | 8 << 32
    wrmsr64 0xC0000082, kernel
    wrmsr64 0xC0000084, 1 << 18
    ldt_on_data
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
