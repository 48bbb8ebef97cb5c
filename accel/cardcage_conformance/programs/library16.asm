; Interrupt stubs for real mode: records hold vector, 0, IP, CS and FLAGS.
    bits 16
    org LIBRARY
%assign vector 0
%rep 256
    align 16, nop
    push word vector
    jmp near entry
  %assign vector vector + 1
%endrep

entry:
    push bp
    mov bp, sp
    push ax
    push bx
    push ds
    xor ax, ax
    mov ds, ax
    mov bx, [bp + 2]
    cmp bx, 32
    jae interrupt
    mov ax, [FAULTS]
    cmp ax, 38
    jae fail
    inc word [FAULTS]
    shl ax, 6
    add ax, FAULTS + 64
    xchg ax, bx
    mov [bx], ax
    mov ax, [bp + 4]
    mov [bx + 16], ax
    mov ax, [bp + 6]
    mov [bx + 24], ax
    mov ax, [bp + 8]
    mov [bx + 32], ax
    mov ax, [RESUME]
    test ax, ax
    jz trap
    mov [bp + 4], ax
    mov word [RESUME], 0
leave_:
    pop ds
    pop bx
    pop ax
    pop bp
    add sp, 2
    iret
trap:
    mov ax, [bp + 2]
    dec ax
    cmp ax, 3
    jbe leave_
fail:
    out 0xF5, al
    jmp fail

interrupt:
    mov ax, bx
    shl bx, 2
    inc word [IRQS + bx]
    mov bx, [IRQLOG]
    inc word [IRQLOG]
    cmp bx, 200
    jae leave_
    mov [IRQLOG + 4 + bx], al
    jmp leave_
