%include "start.inc"
; cpus 2. One processor reads a device again and again; the other changes memory slots, which forgets all code, and has other code made where
; the first is to go on: blocks whose immediates would end the process with status 77. Runs for as long as it is let.
    mov rsp, 0x300000
    lea rsi, [rel other]
    mov edi, 0x8000
    mov ecx, other_end - other
    rep movsb
    mov edi, 0x9000
    mov edx, 90
spray:
    lea rsi, [rel planted]
    mov rbx, rdi
    mov ecx, planted_end - planted
    rep movsb
    lea rdi, [rbx + 0x200]
    dec edx
    jnz spray
    mov eax, 0xfee00000
    mov dword [rax + 0xf0], 0x1ff
    mov dword [rax + 0x310], 0x1000000
    mov dword [rax + 0x300], 0x4500     ; INIT, SIPI
    mov ecx, 1000000
settle:
    dec ecx
    jnz settle
    mov dword [rax + 0x300], 0x4608
    mov ecx, 0xfed000f0                 ; HPET's main counter
    mov r12, 0x123456
again:
    mov rbx, rcx
%rep 4
    mov eax, [rbx]
%endrep
    cmp r12, 0x123456
    je again
    say 'X'
    finish
align 16
planted:
%rep 50
    db 0x66, 0xb8, 0x90, 0x90, 0xeb, 0x01
%endrep
    db 0x66, 0xb8, 0x6a, 77, 0xeb, 0x01         ; host: push 77
    db 0x66, 0xb8, 0x5f, 0x90, 0xeb, 0x01       ; pop rdi
    db 0x66, 0xb8, 0x31, 0xc0, 0xeb, 0x01       ; xor eax, eax
    db 0x66, 0xb8, 0xb0, 231, 0xeb, 0x01        ; mov al, exit_group
    db 0x66, 0xb8, 0x0f, 0x05, 0xeb, 0x01       ; syscall
    ret
planted_end:
align 16
bits 16
other:
    cli
    xor ax, ax
    mov ds, ax
    mov ss, ax
    mov sp, 0x8000
    mov ebp, 0x11
turn:
    mov eax, 0x80000058
    mov dx, 0xcf8
    out dx, eax
    mov eax, ebp
    xor ebp, 0x11
    mov dx, 0xcfe
    out dx, al
    mov bx, 0x1000
    mov cx, 60
call_all:
    call bx
    add bx, 0x200
    loop call_all
    inc si
    test si, 0x3ff
    jnz turn
    say '.'
    jmp turn
other_end:
