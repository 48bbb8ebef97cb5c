%include "start.inc"
; An operand that ends where canonical addresses end: its second page is not the first of the upper half, which is mapped.
    mov rax, cr3
    mov rbx, [rax]
    mov [rax + 255 * 8], rbx            ; 0x7f8000000000 and 0xffff800000000000 show the same
    mov [rax + 256 * 8], rbx
    mov rbx, 0x7fffffffffff
    and rbx, [rel mask]
    mov rcx, [rax]
    and rcx, ~0xfff
    mov rdx, [rcx]
    mov [rcx + 511 * 8], rdx            ; its last GiB too
    mov rcx, 0x7ffffffffffc
    mov dword [rcx], 1
    say 'M'                             ; mapped up to the end
    add qword [rcx], 1
    say 'X'
    finish
mask: dq -1
