%include "start.inc"
; A jump to an address that no table may hold: what empty entries were once tagged with.
    mov rax, NONCANONICAL
    jmp rax
