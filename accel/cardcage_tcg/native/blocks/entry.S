/* The way into translated code and the stubs it calls. RSP is struct cpu in translated code.
 *
 * Guest registers: RAX RCX RDX RBX RBP R8 R12-R15 in the host's own, RSP in R9, RSI in R10, RDI in R11; guest R9-R11 in
 * cpu.gpr. Host RSI and RDI are scratch. Host DF is always clear.
 */
#include "offsets.h"
.intel_syntax noprefix
.text

.macro SAVE_REGS at
    mov [rsp+\at+GPR], rax
    mov [rsp+\at+GPR+8], rcx
    mov [rsp+\at+GPR+16], rdx
    mov [rsp+\at+GPR+24], rbx
    mov [rsp+\at+GPR+32], r9
    mov [rsp+\at+GPR+40], rbp
    mov [rsp+\at+GPR+48], r10
    mov [rsp+\at+GPR+56], r11
    mov [rsp+\at+GPR+64], r8
    mov [rsp+\at+GPR+96], r12
    mov [rsp+\at+GPR+104], r13
    mov [rsp+\at+GPR+112], r14
    mov [rsp+\at+GPR+120], r15
.endm
.macro LOAD_REGS at
    mov rax, [rsp+\at+GPR]
    mov rcx, [rsp+\at+GPR+8]
    mov rdx, [rsp+\at+GPR+16]
    mov rbx, [rsp+\at+GPR+24]
    mov r9, [rsp+\at+GPR+32]
    mov rbp, [rsp+\at+GPR+40]
    mov r10, [rsp+\at+GPR+48]
    mov r11, [rsp+\at+GPR+56]
    mov r8, [rsp+\at+GPR+64]
    mov r12, [rsp+\at+GPR+96]
    mov r13, [rsp+\at+GPR+104]
    mov r14, [rsp+\at+GPR+112]
    mov r15, [rsp+\at+GPR+120]
.endm
.macro EXPORT name
    .globl \name
    .type \name, @function
\name:
.endm

/* void tcg_enter(struct cpu *): run until something needs Python; cpu.reason says what. */
EXPORT tcg_enter
    push rbx
    push rbp
    push r12
    push r13
    push r14
    push r15
    mov [rdi+HOST_RSP], rsp
    stmxcsr [rdi+HOST_MXCSR]
    mov rsp, rdi
    test dword ptr [rsp+GUEST_XCR0], 4
    jnz 1f
    fxrstor64 [rsp+FX]
    jmp 2f
1:  mov eax, [rsp+GUEST_XCR0]
    and eax, 7      /* PKRU is not in the processor */
    xor edx, edx
    xrstor64 [rsp+FX]
2:  mov rdi, rsp
    call world_enter
#ifdef TCG_CHECK
    mov rdi, rsp
    call check_tables
#endif
    mov rdi, rsp
    call native_resume
    test rax, rax
    jz leave
#ifdef TCG_CHECK
    mov rdi, rsp
    mov rsi, rax
    call check_target
#endif
    mov [rsp+SCRATCH], rax
    LOAD_REGS 0
    mov rsi, [rsp+BOUNCE_PTR]
    jmp [rsp+SCRATCH]
dispatch:
    mov rdi, rsp
    call native_dispatch
    test rax, rax
    jz leave
#ifdef TCG_CHECK
    mov rdi, rsp
    mov rsi, rax
    call check_target
#endif
    mov [rsp+SCRATCH], rax
    LOAD_REGS 0
    jmp [rsp+SCRATCH]

/* All guest registers are saved: back to Python. */
leave:
#ifdef TCG_CHECK
    mov rdi, rsp
    call check_tables
#endif
    mov rdi, rsp
    call world_leave
    test dword ptr [rsp+GUEST_XCR0], 4
    jnz 1f
    fxsave64 [rsp+FX]
    jmp 2f
1:  mov eax, [rsp+GUEST_XCR0]
    and eax, 7      /* PKRU is not in the processor */
    xor edx, edx
    xsave64 [rsp+FX]
    vzeroupper
2:  cld
    fninit
    ldmxcsr [rsp+HOST_MXCSR]
    mov rsp, [rsp+HOST_RSP]
    pop r15
    pop r14
    pop r13
    pop r12
    pop rbp
    pop rbx
    ret

/* Called with EDI = helper argument; the next instruction is the payload NOP. Arithmetic flags are in cpu.fl. */
EXPORT stub_helper
    SAVE_REGS 8
    mov esi, edi
    mov rdx, [rsp]
    lea rdi, [rsp+8]
    sub rsp, 8
    call native_helper
    add rsp, 8
    test eax, eax
    jnz 1f
    LOAD_REGS 8
    ret
1:  add rsp, 8
    cmp eax, 1
    je dispatch
    jmp leave

/* Slow path of a load or read-modify-write: RSI = linear ^ tag, RDI = index; gives RSI = host address. */
.macro LOOK_UP table, function
    xor rsi, [rsp+8+rdi+\table]
    push rax
    push rcx
    push rdx
    push r8
    push r9
    push r10
    push r11
    lea rdi, [rsp+64]
    mov rdx, [rsp+56]
    call \function
    mov rsi, rax
    pop r11
    pop r10
    pop r9
    pop r8
    pop rdx
    pop rcx
    pop rax
    test rsi, rsi
.endm
.macro SLOW name, table, function
EXPORT \name
    LOOK_UP \table, \function
    jz abort
    ret
.endm
SLOW stub_read_k, TLB_R, native_slow_read
SLOW stub_read_u, TLB_R+SIZEOF_TLB, native_slow_read
SLOW stub_write_k, TLB_W, native_slow_write
SLOW stub_write_u, TLB_W+SIZEOF_TLB, native_slow_write

/* Likewise for what several accesses share. Where they cannot, it returns five bytes behind. */
.macro SHARE name, table, function
EXPORT \name
    LOOK_UP \table, \function
    jz 1f
    ret
1:  add qword ptr [rsp], 5
    ret
.endm
SHARE stub_share_read_k, TLB_R, native_share_read
SHARE stub_share_read_u, TLB_R+SIZEOF_TLB, native_share_read
SHARE stub_share_write_k, TLB_W, native_share_write
SHARE stub_share_write_u, TLB_W+SIZEOF_TLB, native_share_write

abort:
    add rsp, 8
    SAVE_REGS 0
    mov rdi, rsp
    call native_abort
    cmp eax, 1
    je dispatch
    cmp eax, 3
    jne leave
#ifdef TCG_CHECK
    mov rdi, rsp
    mov rsi, [rsp+SCRATCH]
    call check_target
#endif
    LOAD_REGS 0
    jmp [rsp+SCRATCH]

/* Slow path of a plain store: the whole store is done, and RIP goes on after it. */
.macro STORE name, table
EXPORT \name
    xor rsi, [rsp+8+rdi+\table]
    SAVE_REGS 8
    lea rdi, [rsp+8]
    mov rdx, [rsp]
    sub rsp, 8
    call native_slow_store
    add rsp, 8
    test eax, eax
    jnz 1f
    LOAD_REGS 8
    ret
1:  add rsp, 8
    cmp eax, 1
    je dispatch
    jmp leave
.endm
STORE stub_store_k, TLB_W
STORE stub_store_u, TLB_W+SIZEOF_TLB

/* An access that its segment or its alignment forbids: nothing was done, flags are dead or in cpu.fl. */
EXPORT stub_limit
    SAVE_REGS 8
    pop rsi
    mov rdi, rsp
    call native_limit
    cmp eax, 1
    je dispatch
    jmp leave

/* Called by a chain site with guest flags live in the host's. */
EXPORT stub_chain
    mov rdi, rax
    lahf
    seto al
    mov [rsp+8+FL], rax
    mov rax, rdi
    SAVE_REGS 8
    pop rsi
    mov rdi, rsp
    call native_chain
    test rax, rax
    jz leave
    mov [rsp+SCRATCH], rax
    LOAD_REGS 0
    jmp [rsp+SCRATCH]

/* Called with RSI = target, EDI = how far the branch moved the stack pointer; the payload NOP follows, flags are in cpu.fl. */
EXPORT stub_jump
    SAVE_REGS 8
    mov ecx, edi
    pop rdx
    mov rdi, rsp
    call native_jump
    cmp eax, 1
    je dispatch
    jmp leave

/* A poll that fired: flags are dead or in cpu.fl; the payload NOP follows the call. */
EXPORT stub_poll
    SAVE_REGS 8
    pop rsi
    mov rdi, rsp
    call native_poll
    cmp eax, 1
    je dispatch
    jmp leave

/* Where the signal handler sends a thread whose translated code faulted. */
EXPORT stub_signal
    mov [rsp+SCRATCH+8], rax
    lahf
    seto al
    mov [rsp+SCRATCH], rax
    mov rax, [rsp+SCRATCH+8]
    SAVE_REGS 0
    mov rdi, rsp
    call native_signal
    cmp eax, 1
    je dispatch
    jmp leave

/* The kernel's way back from a signal handler. */
EXPORT stub_sigreturn
    mov eax, 15
    syscall
.section .note.GNU-stack,"",@progbits
