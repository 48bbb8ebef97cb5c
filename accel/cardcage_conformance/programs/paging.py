"""Paging: formats, accessed and dirty bits, write protection."""

from __future__ import annotations

from cardcage_conformance.conformance import Fault, Program

PROGRAMS = (
    Program(
        "accessed-dirty",
        "A read sets the accessed bit of every level's entry, a write the dirty bit of the last one",
        """
    mov rax, [abs 0x61000]
    mov r8, [abs PTE(0x61000)]
    and r8, 0x60
    mov qword [abs 0x62000], 1
    mov r9, [abs PTE(0x62000)]
    and r9, 0x60
    mov r10, [abs PTE(0x63000)]
    and r10, 0x60
    mov r11, [abs 0x50000]
    and r11, 0x20
    mov r12, [abs 0x52000 + 8]              ; 2 MiB page, untouched
    and r12, 0x60
    mov rax, [abs 0x200000]
    mov r13, [abs 0x52000 + 8]
    and r13, 0x60
    mov byte [abs 0x200000], 1
    mov r14, [abs 0x52000 + 8]
    and r14, 0x60
    xor eax, eax
    done
""",
        registers={"r8": 0x20, "r9": 0x60, "r10": 0, "r11": 0x20, "r12": 0, "r13": 0x20, "r14": 0x60},
    ),
    Program(
        "remap-page",
        "After INVLPG or a CR3 load, an address shows the page that its entry now names",
        """
    mov dword [abs 0x61000], 0x1111
    mov dword [abs 0x62000], 0x2222
    mov eax, [abs 0x61000]
    mov r8, rax
    mov qword [abs PTE(0x61000)], 0x62007
    invlpg [abs 0x61000]
    mov eax, [abs 0x61000]
    mov r9, rax
    mov dword [abs 0x61004], 0x3333
    mov qword [abs PTE(0x61000)], 0x61007
    mov rax, cr3
    mov cr3, rax
    mov r10d, [abs 0x61000]
    mov r11d, [abs 0x62004]
    mov rbx, HIGH
    mov r12d, [rbx + 0x62004]
    done
""",
        registers={"r8": 0x1111, "r9": 0x2222, "r10": 0x1111, "r11": 0x3333, "r12": 0x3333},
    ),
    Program(
        "write-protect",
        "Ring 0 may write read-only pages while CR0.WP is clear, and not while it is set",
        """
    mov qword [abs PTE(0x66000)], 0x66005
    invlpg [abs 0x66000]
    expect_fault one
at_write:
    mov byte [abs 0x66000], 1
one:
    mov rax, cr0
    btr rax, 16
    mov cr0, rax
    mov byte [abs 0x66000], 2
    bts rax, 16
    mov cr0, rax
    expect_fault two
at_again:
    mov byte [abs 0x66000], 3
two:
    movzx eax, byte [abs 0x66000]
    done
""",
        registers={"rax": 2},
        faults=(Fault(14, 3, rip="at_write", cr2=0x66000), Fault(14, 3, rip="at_again", cr2=0x66000)),
    ),
    Program(
        "page-crossing",
        "Accesses that cross pages take bytes from both, and fault before either changed",
        """
    mov qword [abs PTE(0x62000)], 0x67007      ; the two pages are not neighbours in memory
    invlpg [abs 0x62000]
    mov rax, 0x1122334455667788
    mov [abs 0x61FFD], rax
    mov rbx, [abs 0x61FFD]
    mov ecx, [abs 0x67000]
    movzx edx, word [abs 0x61FFF]
    mov qword [abs PTE(0x62000)], 0
    invlpg [abs 0x62000]
    expect_fault one
at_write:
    mov qword [abs 0x61FFC], -1
one:
    mov r8, [abs 0x61FF8]
    expect_fault two
at_read:
    mov r9, [abs 0x61FF9]
two:
    done
""",
        registers={
            "rbx": 0x1122334455667788,
            "rcx": 0x22334455,
            "rdx": 0x5566,
            "r8": 0x6677880000000000,
        },
        faults=(Fault(14, 2, rip="at_write", cr2=0x62000), Fault(14, 0, rip="at_read", cr2=0x62000)),
        emulated="KVM's emulator writes the first page before it looks at the second",
    ),
    Program(
        "upper-level-rights",
        "Write and user rights are those of all levels together, no-execute of any",
        """
    mov rax, [abs 0x52000 + 8]                  ; 2 to 4 MiB, a large page
    and rax, ~2
    mov [abs 0x52000 + 8], rax
    mov rax, [abs 0x52000 + 16]                 ; 4 to 6 MiB
    bts rax, 63
    mov [abs 0x52000 + 16], rax
    and qword [abs 0x51000 + 24], ~2            ; all of 3 to 4 GiB read-only
    mov qword [abs 0x50000 + 2048], 0x51001     ; HIGH: read-only, supervisor
    mov rax, cr3
    mov cr3, rax
    mov byte [abs 0x100000], 0xC3
    expect_fault one
at_large:
    mov byte [abs 0x200123], 1
one:
    expect_fault two
    mov eax, 0x400000
    jmp rax
two:
    mov ebx, MMIO
    expect_fault three
at_device:
    mov [rbx + 4], eax
three:
    mov rbx, HIGH
    expect_fault four
at_high:
    mov [rbx + DATA], eax
four:
    mov [abs DATA], eax
    mov r8d, [rbx + DATA]
    done
""",
        registers={"r8": 0x400000},
        accesses=(),
        faults=(
            Fault(14, 3, rip="at_large", cr2=0x200123),
            Fault(14, 0x11, cr2=0x400000),
            Fault(14, 3, rip="at_device", cr2=0xD0000004),
            Fault(14, 3, rip="at_high", cr2=0xFFFF800000060000),
        ),
    ),
    Program(
        "reserved-bits",
        "A reserved bit in an entry faults with its own error bit; the NX bit is reserved while EFER.NXE is clear",
        """
    mov rax, [abs 0x52000 + 8]
    bts rax, 13                                 ; reserved in a 2 MiB page
    mov [abs 0x52000 + 8], rax
    mov rax, cr3
    mov cr3, rax
    expect_fault one
at_bit:
    mov al, [abs 0x200000]
one:
    mov ecx, 0xC0000080
    rdmsr
    btr eax, 11
    wrmsr
    bts qword [abs PTE(0x65000)], 63
    mov rax, cr3
    mov cr3, rax
    expect_fault two
at_nx:
    mov [abs 0x65010], al
two:
    done
""",
        faults=(Fault(14, 9, rip="at_bit", cr2=0x200000), Fault(14, 0xB, rip="at_nx", cr2=0x65010)),
    ),
    Program(
        "large-pages-1g",
        "1 GiB pages translate",
        """
    mov qword [abs 0x51000 + 8], 0x83           ; 1 to 2 GiB shows 0 to 1 GiB
    mov rax, cr3
    mov cr3, rax
    mov dword [abs DATA], 0x1234
    mov r8d, [abs 0x40000000 + DATA]
    mov dword [abs 0x40000000 + DATA + 4], 0x77
    mov r9d, [abs DATA + 4]
    mov r10, [abs 0x51000 + 8]
    and r10, 0x60
    done
""",
        registers={"r8": 0x1234, "r9": 0x77, "r10": 0x60},
        needs=("pdpe1gb",),
    ),
    Program(
        "toggle-paging-bits",
        "Clearing CR0.PG in compatibility mode leaves long mode, setting it with PAE in 32-bit mode gives PAE paging",
        """
    push CS32
    push compat
    retfq
    bits 32
compat:
    mov eax, cr0
    btr eax, 31
    mov cr0, eax
    mov ecx, 0xC0000080
    rdmsr
    mov ebx, eax                                ; LMA is gone, LME stays
    btr eax, 8
    wrmsr
    mov dword [0x58000], 0x52001                ; PAE page directory pointers, at an address of their own
    mov dword [0x58004], 0
    mov dword [0x58008], 0
    mov dword [0x58010], 0
    mov dword [0x58018], 0x53001
    mov eax, 0x58000
    mov cr3, eax
    mov eax, cr0
    bts eax, 31
    mov cr0, eax
    mov dword [0x55000 + 0x65 * 8], 0x61007
    invlpg [0x65000]
    mov dword [0x61000], 0x4321
    mov edx, [0x65000]
    mov esi, [MMIO + 0x10]
    and ebx, 0x500
    xor eax, eax
    done
""",
        registers={"rbx": 0x100, "rdx": 0x4321, "rsi": 0x13121110},
        emulated="it has no paging outside long mode",
    ),
    Program(
        "user-pages",
        "The user bit is checked in ring 3 for reads, writes and code, and its accesses set accessed and dirty bits",
        """
    and qword [abs PTE(0x66000)], ~4
    mov rax, cr3
    mov cr3, rax
    enter_user user
user:
    mov byte [abs 0x67000], 1
    mov r8, [abs PTE(0x67000)]
    and r8, 0x60
    mov qword [abs RESUME], one
at_read:
    mov al, [abs 0x66000]
one:
    mov qword [abs RESUME], two
    mov eax, 0x66000
    jmp rax
two:
    mov ebx, MMIO
    mov al, [rbx + 5]
    done
""",
        registers={"r8": 0x60},
        accesses=(("read", 0xD0000005, 1, 5),),
        faults=(Fault(14, 5, rip="at_read", cr2=0x66000), Fault(14, 0x15, cr2=0x66000)),
    ),
    Program(
        "paging-32",
        "32-bit paging translates 4 KiB and 4 MiB pages and sets accessed and dirty bits",
        """
    mov dword [0x61000], 0x1234
    mov dword [PTE(0x62000)], 0x61007
    invlpg [0x62000]
    mov eax, [0x62000]
    mov ebx, [PTE(0x61000)]
    and ebx, 0x60
    mov dword [0x400010], 0x77
    mov ecx, [0x50004]                      ; 4 MiB entry
    and ecx, 0xE7
    mov dword [PTE(0x63000)], 0
    invlpg [0x63000]
    expect_fault over
at_write:
    or dword [0x63004], 1
over:
    mov edx, [0x400010]
    done
""",
        start="paging32",
        registers={"rax": 0x1234, "rbx": 0x60, "rcx": 0xE7, "rdx": 0x77},
        faults=(Fault(14, 2, rip="at_write", cr2=0x63004),),
        emulated="it has no paging outside long mode",
    ),
    Program(
        "reserved-address-bits",
        "Address bits above MAXPHYADDR fault as reserved at every level of the tables; CR3 refuses them",
        """
    mov eax, 0x80000008
    cpuid
    movzx ecx, al
    mov r15d, 1
    shl r15, cl
    mov r14, [abs 0x50000 + 256 * 8]            ; HIGH is unused otherwise
    mov rbx, HIGH + 0x65000
    mov rsi, r15
    or rsi, r14
    mov [abs 0x50000 + 256 * 8], rsi
    mov rax, cr3
    mov cr3, rax
    expect_fault one
at_pml4e:
    mov al, [rbx]
one:
    bts r14, 7                                  ; PS, reserved there
    mov [abs 0x50000 + 256 * 8], r14
    mov rax, cr3
    mov cr3, rax
    expect_fault two
at_ps:
    mov al, [rbx]
two:
    btr r14, 7
    mov [abs 0x50000 + 256 * 8], r14
    mov rsi, [abs 0x51000 + 8]
    or r15, 7
    mov [abs 0x51000 + 8], r15
    mov rax, cr3
    mov cr3, rax
    expect_fault three
at_pdpte:
    mov al, [abs 0x40000000]
three:
    mov [abs 0x51000 + 8], rsi
    mov rsi, [abs 0x52000 + 8]
    or rsi, r15
    mov [abs 0x52000 + 8], rsi
    mov rax, cr3
    mov cr3, rax
    expect_fault four
at_pde:
    mov byte [abs 0x200000], 1
four:
    or [abs PTE(0x65000)], r15
    invlpg [abs 0x65000]
    expect_fault five
at_pte:
    mov al, [abs 0x65000]
five:
    mov rax, 1 << 51
    or [abs PTE(0x66000)], rax
    invlpg [abs 0x66000]
    expect_fault six
at_51:
    mov al, [abs 0x66000]
six:
    mov rax, 1 << 52                            ; not an address bit: ignored
    or [abs PTE(0x67000)], rax
    invlpg [abs 0x67000]
    mov al, [abs 0x67000]
    mov rax, cr3
    btr r15, 0
    btr r15, 1
    btr r15, 2
    or rax, r15
    expect_fault seven
at_cr3:
    mov cr3, rax
seven:
    done
""",
        faults=(
            Fault(14, 9, rip="at_pml4e", cr2=0xFFFF800000065000),
            Fault(14, 9, rip="at_ps", cr2=0xFFFF800000065000),
            Fault(14, 9, rip="at_pdpte", cr2=0x40000000),
            Fault(14, 0xB, rip="at_pde", cr2=0x200000),
            Fault(14, 9, rip="at_pte", cr2=0x65000),
            Fault(14, 9, rip="at_51", cr2=0x66000),
            Fault(13, 0, rip="at_cr3"),
        ),
    ),
    Program(
        "pae-reserved-bits",
        "PAE paging outside long mode reserves bits 52 to 62 of its entries, and pointers with such bits are refused",
        """
    mov edi, 0x58000
    mov ecx, 0xC00
    xor eax, eax
    rep stosd
    mov dword [0x58000], 0x59001                ; pointers, a directory, a table for 2 to 4 MiB
    mov dword [0x59000], 0x83
    mov dword [0x59008], 0x5A007
    mov dword [0x5A000], 0x60007
    mov dword [0x5A008], 0x61007
    mov eax, cr4
    bts eax, 5
    mov cr4, eax
    mov eax, 0x58000
    mov cr3, eax
    mov eax, cr0
    bts eax, 31
    mov cr0, eax
    mov dword [0x60000], 0x1234
    mov ebx, [0x200000]
    mov dword [0x5A004], 1 << 20                ; bit 52
    invlpg [0x200000]
    mov dword [RESUME], one
at_52:
    mov al, [0x200000]
one:
    mov dword [0x5A00C], 1 << 19                ; bit 51
    invlpg [0x201000]
    mov dword [RESUME], two
at_51:
    mov [0x201000], al
two:
    mov dword [0x5900C], 1 << 30                ; bit 62 of the directory's entry
    mov dword [0x5A004], 0
    invlpg [0x200000]
    mov dword [RESUME], three
at_62:
    mov al, [0x200000]
three:
    mov dword [0x58008], 0x59001
    mov dword [0x5800C], 1 << 19
    mov eax, 0x58000
    mov dword [RESUME], four
at_pointer:
    mov cr3, eax
four:
    done
""",
        start="protected32",
        registers={"rbx": 0x1234},
        faults=(
            Fault(14, 9, rip="at_52", cr2=0x200000),
            Fault(14, 0xB, rip="at_51", cr2=0x201000),
            Fault(14, 9, rip="at_62", cr2=0x200000),
            Fault(13, 0, rip="at_pointer"),
        ),
        emulated="it has no paging outside long mode",
    ),
    Program(
        "pse-36",
        "Bits 13 to 20 of a 4 MiB entry are address bits 32 to 39; bit 21 is reserved",
        """
    mov dword [0x5003C], 0x2000 | 0x87          ; 60 MiB shows 4 GiB
    invlpg [0x3C00000]
    mov ebx, [0x3C00010]
    mov dword [0x5003C], 0x200087
    invlpg [0x3C00000]
    mov dword [RESUME], over
at_reserved:
    mov eax, [0x3C00020]
over:
    mov dword [0x5003C], 0x87                   ; and now 0
    invlpg [0x3C00000]
    mov dword [0x61000], 0x1234
    mov ecx, [0x3C61000]
    done
""",
        start="paging32",
        registers={"rbx": 0xFFFFFFFF, "rcx": 0x1234},
        accesses=(("read", 0x100000010, 4, 0xFFFFFFFF),),
        faults=(Fault(14, 9, rip="at_reserved", cr2=0x3C00020),),
        emulated="it has no paging outside long mode",
    ),
)
