%include "start.inc"
; A load by an address that no table may hold, after the page that its entry had was dropped: nothing of it is seen.
    mov rsp, 0x300000
    mov dword [0x200000], 'LEAK'
    mov rcx, [0x200000]
    mov rax, cr3
    mov cr3, rax
    mov rax, NONCANONICAL
    mov ecx, [rax]
    say cl
    finish
