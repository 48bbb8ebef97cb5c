; Exception and interrupt stubs for long mode.
    bits 64
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
    push rax
    push rbx
    mov rbx, [rsp + 16]
    cmp ebx, 32
    jae interrupt
    mov eax, [abs FAULTS]
    cmp eax, 38
    jae fail
    inc dword [abs FAULTS]
    shl eax, 6
    add eax, FAULTS + 64
    mov [rax], rbx
  %assign at 1
  %rep 6
    mov rbx, [rsp + 16 + at * 8]
    mov [rax + at * 8], rbx
    %assign at at + 1
  %endrep
    mov rbx, cr2
    mov [rax + 56], rbx
    mov rbx, [abs RESUME]
    test rbx, rbx
    jz trap
    mov [rsp + 32], rbx
    mov qword [abs RESUME], 0
leave_:
    pop rbx
    pop rax
    add rsp, 16
    iretq
trap:
    mov rbx, [rsp + 16]
    dec ebx
    cmp ebx, 3                  ; vectors 1 to 4: #DB, NMI, #BP, #OF
    jbe leave_
fail:
    out 0xF5, al
    jmp fail

interrupt:
    lock inc dword [abs IRQS + rbx * 4]
    mov eax, 1
    lock xadd [abs IRQLOG], eax
    cmp eax, 200
    jae .ended
    mov [abs IRQLOG + 4 + rax], bl
.ended:
    mov al, [abs EOI]
    cmp al, 1
    jb leave_
    jne x2apic
    mov eax, 0xFEE000B0
    mov dword [rax], 0
    jmp leave_
x2apic:
    push rcx
    push rdx
    mov ecx, 0x80B
    xor eax, eax
    xor edx, edx
    wrmsr
    pop rdx
    pop rcx
    jmp leave_
