/* Single steps and debug registers through ptrace. The output is the same on every processor that is right: run it on the host, and
 * in a guest, and compare. gcc -O1 -static. */
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

static volatile int traps;
static volatile struct { unsigned char b[64]; } data __attribute__((aligned(64)));
static pid_t child;

static void count(int signal) { (void)signal; traps++; }

extern char work[], in_loop[], behind_store[], work_end[];

__asm__(".globl work, in_loop, behind_store, work_end\n"
        "work: push %rbx\n xor %eax, %eax\n mov $3, %ecx\n"
        "1: test $1, %cl\n jz 2f\n inc %eax\n"
        "2:\nin_loop: loop 1b\n"
        "mov %eax, (%rdi)\n"
        "behind_store: mov 4(%rdi), %ebx\n mov 8(%rdi), %bl\n addl $5, 16(%rdi)\n"
        "lea 32(%rdi), %rsi\n mov $4, %ecx\n xchg %rsi, %rdi\n rep movsb\n"
        "mov $39, %eax\n syscall\n call 3f\n pop %rbx\n ret\n"
        "3: ret\n"
        "work_end:\n");

static void work_on_it(void)
{
    unsigned long where = (unsigned long)&data;
    __asm__ volatile("sub $128, %%rsp; call work; add $128, %%rsp" : "+D"(where) : : "rax", "rcx", "rsi", "r11", "memory", "cc");
}

static void set_register(int n, unsigned long value)
{
    if (ptrace(PTRACE_POKEUSER, child, offsetof(struct user, u_debugreg) + 8 * n, value))
        printf("DR%d: %s\n", n, strerror(errno));
}

/* Run the child to its end, with these debug registers; print each trap's place and DR6. */
static void follow(const char *what, unsigned long dr7, unsigned long dr0, unsigned long dr1, int step)
{
    int status, steps = 0, inside = 0;
    struct user_regs_struct regs;
    memset((void *)&data, 0, sizeof data);
    printf("%s:", what);
    fflush(stdout);
    child = fork();
    if (!child) {
        ptrace(PTRACE_TRACEME, 0, 0, 0);
        raise(SIGSTOP);
        work_on_it();
        _exit(data.b[0] + data.b[16]);
    }
    waitpid(child, &status, 0);
    if (dr7) {
        set_register(0, dr0);
        set_register(1, dr1);
        set_register(7, dr7);
    }
    for (;;) {
        ptrace(step ? PTRACE_SINGLESTEP : PTRACE_CONT, child, 0, 0);
        waitpid(child, &status, 0);
        if (!WIFSTOPPED(status))
            break;
        ptrace(PTRACE_GETREGS, child, 0, &regs);
        inside = regs.rip >= (unsigned long)work && regs.rip < (unsigned long)work_end;
        steps += inside;
        if (!step)
            printf(" %lld/%ld", (long long)(regs.rip - (unsigned long)work),
                   ptrace(PTRACE_PEEKUSER, child, offsetof(struct user, u_debugreg) + 48, 0) & 15);
        if (WSTOPSIG(status) != SIGTRAP)
            printf(" signal %d", WSTOPSIG(status));
        set_register(6, 0);
    }
    printf(" %d steps, ended %d\n", steps, WEXITSTATUS(status));
}

#define EXECUTE(n) (1ul << (2 * (n)))
#define WATCH(n, type, length) (EXECUTE(n) | (unsigned long)((type) | (length) << 2) << (16 + 4 * (n)))

int main(void)
{
    struct sigaction action;
    unsigned long at = (unsigned long)&data, result;
    memset(&action, 0, sizeof action);
    action.sa_handler = count;
    sigaction(SIGTRAP, &action, 0);
    __asm__ volatile("pushfq; orq $0x100,(%%rsp); popfq; nop; nop; mov $39,%%eax; syscall; nop; jc 1f; jnc 1f; nop;"
                     "1: pushfq; andq $~0x100,(%%rsp); popfq; nop" : "=a"(result) : : "rcx", "r11", "memory", "cc");
    printf("TF: %d traps\n", traps);
    follow("steps", 0, 0, 0, 1);
    follow("execute", EXECUTE(0) | EXECUTE(1), (unsigned long)in_loop, (unsigned long)behind_store, 0);
    follow("write", WATCH(0, 1, 3) | WATCH(1, 1, 0), at, at + 17, 0);
    follow("access", WATCH(0, 3, 0) | WATCH(1, 3, 1), at + 8, at + 34, 0);
    follow("wide", WATCH(0, 1, 2) | WATCH(1, 3, 2), at, at, 0);
    follow("both", EXECUTE(0) | WATCH(1, 1, 3), (unsigned long)in_loop, at, 1);
    return 0;
}
