%include "start.inc"
; In compatibility mode an instruction whose bytes go on at 0 after 4 GiB does not fetch them from beyond: the last page is mapped to RAM.
    mov rsp, 0x300000
    mov rax, cr3
    mov rbx, [rax]
    and rbx, ~0xfff
    mov rcx, [rbx + 3 * 8]
    and rcx, ~0xfff
    mov qword [rcx + 511 * 8], 0x400083 ; 0xffe00000 shows 0x400000
    mov byte [0x5ffffe], 0xb8           ; mov eax, 'K'
    mov byte [0x5fffff], 'K'
    mov dword [0], 0xba000000           ; mov edx, 0x3f8
    mov dword [4], 0x3f8
    mov dword [8], 0x0b0fee             ; out dx, al; ud2
    compat
    mov eax, 0xfffffffe
    jmp eax
