%include "start.inc"
; Pages of code whose immediates are host instructions that end the process with status 77, until all code has been forgotten and made again;
; then a jump that must not find what an entry of the jump cache pointed at before.
    mov rsp, 0x180000
    mov rax, 0x101000
    call rax
    mov r8, 0x1000000
    mov r12, 60000
page:
    lea rdi, [r8 + 0x40]
    mov ebx, 6
copy:
    lea rsi, [rel planted]
    mov ecx, planted_end - planted
    rep movsb
    add rdi, 672 - (planted_end - planted)
    dec ebx
    jnz copy
    lea rbp, [r8 + 0x40]
    mov ebx, 6
run:
    call rbp
    add rbp, 672
    dec ebx
    jnz run
    add r8, 0x1000
    dec r12
    jnz page
    say 'D'
    mov rax, NONCANONICAL
    jmp rax
align 64
planted:
%rep 58
    db 0x48, 0xb8, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xeb, 0x02
%endrep
    db 0x48, 0xb8, 0xbf, 77, 0, 0, 0, 0x90, 0xeb, 0x02          ; host: mov edi, 77
    db 0x48, 0xb8, 0xb8, 231, 0, 0, 0, 0x90, 0xeb, 0x02         ; mov eax, exit_group
    db 0x48, 0xb8, 0x0f, 0x05, 0xcc, 0xcc, 0xcc, 0xcc, 0xeb, 0x02 ; syscall
    ret
planted_end:
    times 0x101000 - 0x100040 - ($ - $$) db 0x90
    ret
