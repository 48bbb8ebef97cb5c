; Exception and interrupt stubs for 32-bit protected mode. A record's rsp and ss are those of the outer ring, or 0.
    bits 32
    org LIBRARY
%assign vector 0
%rep 256
    align 16, nop
  %if vector = 8 || (vector >= 10 && vector <= 14) || vector = 17 || vector = 21 || vector = 29 || vector = 30
  %else
    push 0
  %endif
    push dword vector
    jmp near entry
  %assign vector vector + 1
%endrep

entry:
    push eax
    push ebx
    push ds
    mov ebx, DS0
    mov ds, bx
    mov ebx, [ss:esp + 12]
    cmp ebx, 32
    jae interrupt
    mov eax, [FAULTS]
    cmp eax, 38
    jae fail
    inc dword [FAULTS]
    shl eax, 6
    add eax, FAULTS + 64
    mov [eax], ebx
    mov ebx, [ss:esp + 16]
    mov [eax + 8], ebx
    mov ebx, [ss:esp + 20]
    mov [eax + 16], ebx
    movzx ebx, word [ss:esp + 24]
    mov [eax + 24], ebx
    test bl, 3
    mov ebx, [ss:esp + 28]
    mov [eax + 32], ebx
    jz .same_ring
    mov ebx, [ss:esp + 32]
    mov [eax + 40], ebx
    movzx ebx, word [ss:esp + 36]
    mov [eax + 48], ebx
.same_ring:
    mov ebx, cr2
    mov [eax + 56], ebx
    mov ebx, [RESUME]
    test ebx, ebx
    jz trap
    mov [ss:esp + 20], ebx
    mov dword [RESUME], 0
leave_:
    pop ds
    pop ebx
    pop eax
    add esp, 8
    iretd
trap:
    mov ebx, [ss:esp + 12]
    dec ebx
    cmp ebx, 3
    jbe leave_
fail:
    out 0xF5, al
    jmp fail

interrupt:
    lock inc dword [IRQS + ebx * 4]
    mov eax, 1
    lock xadd [IRQLOG], eax
    cmp eax, 200
    jae .ended
    mov [IRQLOG + 4 + eax], bl
.ended:
    cmp byte [EOI], 1
    jne leave_
    mov dword [0xFEE000B0], 0
    jmp leave_
