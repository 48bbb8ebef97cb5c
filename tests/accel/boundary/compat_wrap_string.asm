%include "start.inc"
; As compat_wrap, a string instruction.
    mov rsp, 0x300000
    compat
    mov esi, 0xfffffffe
    mov edi, 0x200000
    movsd
    say 'X'
    hlt
