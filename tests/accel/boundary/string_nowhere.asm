%include "start.inc"
; A string instruction there: native code looks into the same table.
    mov rsi, NONCANONICAL | 8
    lodsb
    say al
    finish
