%include "start.inc"
; 65,536 aliases of one page with code, each called at two places; then a store into that code, and one at the end of a full page list.
    mov rsp, 0x300000
    mov byte [0x400000], 0xc3
    mov byte [0x400800], 0xc3
    mov rdi, 0x600000                   ; page tables of 4 GiB and up: all entries show 0x400000
    mov ecx, 512 * 512
    mov rax, 0x400003
    rep stosq
    mov rdi, 0x500000
    mov ecx, 512
    mov rax, 0x600003
directory:
    mov [rdi], rax
    add rax, 0x1000
    add rdi, 8
    loop directory
    mov rax, cr3
    mov rbx, [rax]
    and rbx, ~0xfff
    mov qword [rbx + 32], 0x500003
    mov rbx, 0x100000800
    mov r8d, 65536
upper:
    call rbx
    add rbx, 0x1000
    dec r8d
    jnz upper
    mov rbx, 0x100000000
    mov r8d, 65536
lower:
    call rbx
    add rbx, 0x1000
    dec r8d
    jnz lower
    mov byte [0x400800], 0x90           ; nop: the calls run on to the end of the page, where a RET is
    mov byte [0x400fff], 0xc3
    mov rbx, 0x100000800
    call rbx
    say 'D'
    finish
