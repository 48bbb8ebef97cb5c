; A guest that does what it is asked: see cardcage_conformance/remote.py for the mailbox at DATA.
%define WHAT   r15
%define SIZE   r15 + 4
%define WHERE  r15 + 8
%define VALUE  r15 + 16
%define ASKED  r15 + 32
%define ANSWER r15 + 36
%define GO_ON  r15 + 40

    apic_on
    mov r15d, DATA
    mov al, 0xFF                    ; the 8259s are as a BIOS leaves them: a timer among others
    out 0x21, al
    out 0xA1, al
    sti
    host 1
again:
    pause
    mov ebx, [WHAT]
    test ebx, ebx
    jz again
    mov ecx, [SIZE]
    mov rdi, [WHERE]
    mov rax, [VALUE]
    mov edx, edi
    cmp ebx, 2
    jb store
    je load
    cmp ebx, 4
    jb output
    je input
ask:                            ; ring WHERE with the next number until it is answered, again and again
    inc dword [ASKED]
    mov eax, [ASKED]
    mov [rdi], ax
wait_:
    cli
    cmp [ANSWER], eax
    je answered
    sti
    hlt
    jmp wait_
answered:
    sti
    cmp dword [GO_ON], 0
    jne ask
    jmp ended
store:
    cmp ecx, 2
    jb .1
    je .2
    cmp ecx, 4
    je .4
    mov [rdi], rax
    jmp ended
.1: mov [rdi], al
    jmp ended
.2: mov [rdi], ax
    jmp ended
.4: mov [rdi], eax
    jmp ended
load:
    xor eax, eax
    cmp ecx, 2
    jb .1
    je .2
    cmp ecx, 4
    je .4
    mov rax, [rdi]
    jmp ended
.1: mov al, [rdi]
    jmp ended
.2: mov ax, [rdi]
    jmp ended
.4: mov eax, [rdi]
    jmp ended
output:
    cmp ecx, 2
    jb .1
    je .2
    out dx, eax
    jmp ended
.1: out dx, al
    jmp ended
.2: out dx, ax
    jmp ended
input:
    xor eax, eax
    cmp ecx, 2
    jb .1
    je .2
    in eax, dx
    jmp ended
.1: in al, dx
    jmp ended
.2: in ax, dx
ended:
    mov [VALUE], rax
    mov dword [WHAT], 0
    host 2
    jmp again
