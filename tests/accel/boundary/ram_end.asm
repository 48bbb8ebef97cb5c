%include "start.inc"
; An instruction across the end of RAM (16 MiB): its last bytes are an open bus, ones; what comes after it is #UD.
    mov word [0xfffffa], 0xb848         ; mov rax, imm64
    mov dword [0xfffffc], 0x11223344
    mov rax, 0xfffffa
    jmp rax
