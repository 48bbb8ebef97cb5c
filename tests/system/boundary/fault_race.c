/* A division by zero whose code another processor rewrites at the same time: each one ends in SIGFPE, or in a signal that the bytes of a
 * moment's mixture raise; the program goes on. Prints how many signals it took. */
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

enum { ROUNDS = 100000, PATCH = 9, END = 32 };
static volatile unsigned char *code;
static volatile int stop;
static volatile long taken;

static void skip(int signal, siginfo_t *info, void *context)
{
    (void)signal, (void)info;
    taken++;
    ((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP] = (long)code + END;
}

static void *patch(void *unused)
{
    while (!stop) {
        code[PATCH + 2] = 0x90;
        *(volatile unsigned short *)(code + PATCH + 1) = 0xc031; /* xor eax, eax */
        code[PATCH] = 0x66;                                      /* xor ax, ax */
        code[PATCH] = 0x90;
        *(volatile unsigned short *)(code + PATCH + 1) = 0x9090;
    }
    return unused;
}

int main(void)
{
    static const unsigned char divide[] = { 0x31, 0xd2, 0x31, 0xc9, 0xb8, 1, 0, 0, 0, 0x90, 0x90, 0x90, 0x90, 0x90, 0x90, 0xf7, 0xf1 };
    static const int signals[] = { SIGFPE, SIGILL, SIGSEGV, SIGTRAP };
    struct sigaction action = { .sa_sigaction = skip, .sa_flags = SA_SIGINFO | SA_NODEFER };
    pthread_t other;
    code = mmap(0, 8192, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset((void *)code, 0x90, END);
    memcpy((void *)code, divide, sizeof divide);
    code[END] = 0xc3;
    for (int i = 0; i < 4; i++)
        sigaction(signals[i], &action, 0);
    pthread_create(&other, 0, patch, 0);
    for (long i = 0; i < ROUNDS; i++)
        ((void (*)(void))code)();
    stop = 1;
    pthread_join(other, 0);
    printf("signals %ld\n", taken);
    return taken == ROUNDS ? 0 : 1;
}
