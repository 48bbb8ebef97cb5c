/* A system call under TF: the trap is the program's, not one inside the kernel, which would warn. Prints how many traps it took. */
#include <signal.h>
#include <stdio.h>

static volatile int traps;

static void count(int signal)
{
    (void)signal;
    traps++;
}

int main(void)
{
    unsigned long result;
    signal(SIGTRAP, count);
    __asm__ volatile("pushfq; orq $0x100, (%%rsp); popfq; nop; nop; mov $39, %%eax; syscall; nop; pushfq; andq $~0x100, (%%rsp); popfq; nop"
                     : "=a"(result) : : "rcx", "r11", "memory", "cc");
    printf("traps %d\n", traps);
    return 0;
}
