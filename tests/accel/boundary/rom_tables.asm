%include "start.inc"
; Page tables in the ROM below 1 MiB, as PAM leaves it: a walk sets no accessed bit there, and goes on.
    mov rsp, 0x300000
    mov eax, 0x80000058                 ; PAM: 0xc0000-0xc3fff reads and writes RAM
    call config
    mov eax, 0x33
    call data
    mov rdi, 0xc0000                    ; a table of 2 MiB pages, and a directory table to it
    mov ecx, 512
    mov rax, 0x83
entry:
    mov [rdi], rax
    add rax, 0x200000
    add rdi, 8
    loop entry
    mov eax, 0x80000058                 ; now it only reads
    call config
    mov eax, 0x11
    call data
    mov rax, cr3
    mov rbx, [rax]
    and rbx, ~0xfff
    mov qword [rbx + 8 * 4], 0xc0003    ; 4 GiB and up
    mov rcx, 0x100400000
    mov dword [rcx], 'ABCD'
    cmp dword [0x400000], 'ABCD'
    jne bad
    test byte [0xc0000 + 2 * 8], 0x60
    jnz bad
    say 'D'
bad:
    finish
config:
    mov dx, 0xcf8
    out dx, eax
    ret
data:
    mov dx, 0xcfe
    out dx, al
    mov dx, 0xcff
    out dx, al
    ret
