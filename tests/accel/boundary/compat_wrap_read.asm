%include "start.inc"
; As compat_wrap, a read.
    mov rsp, 0x300000
    compat
    mov ecx, [0xfffffffe]
    say 'X'
    hlt
