%include "start.inc"
; As jump_nowhere, by every index of the jump cache, each call with a handler that goes on: 2048 times #GP, and nothing else.
    mov rsp, 0x300000
    lea rax, [rel handler]
    mov [0x200000 + 13 * 16], ax
    mov word [0x200000 + 13 * 16 + 2], cs
    mov word [0x200000 + 13 * 16 + 4], 0x8e00
    shr rax, 16
    mov [0x200000 + 13 * 16 + 6], ax
    mov qword [0x200000 + 13 * 16 + 8], 0
    lidt [rel idtr]
    mov rbx, NONCANONICAL
    mov ecx, 2048
next:
    call rbx
    say 'X'                             ; it went somewhere
after:
    inc rbx
    loop next
    say 'D'
    finish
handler:
    lea rax, [rel after]
    mov [rsp + 8], rax
    add rsp, 8
    iretq
idtr: dw 0xfff
    dq 0x200000
