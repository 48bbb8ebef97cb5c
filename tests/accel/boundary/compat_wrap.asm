%include "start.inc"
; In compatibility mode a read-modify-write that ends beyond 4 GiB: past its segment's limit, so #GP, which has no handler.
    mov rsp, 0x300000
    compat
    add dword [0xfffffffe], 1
    say 'X'
    hlt
