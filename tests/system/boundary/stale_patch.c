/* One processor changes a number in the other's code, then says so; whoever has heard of it, and serializes, must not run the number that was
 * there before. The other keeps rewriting its own first byte, so that the code is translated all the time. Prints how many were stale. */
#include <pthread.h>
#include <stdio.h>
#include <sys/mman.h>
#include <time.h>

static volatile unsigned char *code;
static volatile unsigned said;
static volatile int stop;

static void *patch(void *unused)
{
    for (unsigned n = 1; !stop; n++) {
        struct timespec pause = { 0, 100000 + n * 7919 % 97 * 1000 };
        *(volatile unsigned *)(code + 2) = n;
        said = n;
        nanosleep(&pause, 0);
    }
    return unused;
}

int main(void)
{
    unsigned (*run)(void);
    unsigned long rounds = 0, stale = 0;
    struct timespec start, now;
    pthread_t other;
    int at = 0;
    code = mmap(0, 8192, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    run = (unsigned (*)(void))code;
    code[at++] = 0x90;
    code[at++] = 0xb8; /* mov eax, number */
    for (at += 4; at < 256; at += 5)
        code[at] = 0xba; /* mov edx, 0: a long block takes longer to make */
    code[at] = 0xc3;
    code[2048] = 0xc3; /* the page holds other code, too */
    ((void (*)(void))(code + 2048))();
    pthread_create(&other, 0, patch, 0);
    clock_gettime(CLOCK_MONOTONIC, &start);
    do {
        unsigned a = 0, c = 0;
        code[0] = 0x90;
        run();
        unsigned heard = said;
        __asm__ volatile("cpuid" : "+a"(a), "+c"(c) : : "rbx", "rdx", "memory");
        stale += run() < heard;
        rounds++;
        clock_gettime(CLOCK_MONOTONIC, &now);
    } while (now.tv_sec - start.tv_sec < 8);
    stop = 1;
    pthread_join(other, 0);
    printf("rounds %lu patches %u stale %lu\n", rounds, said, stale);
    return stale || rounds < 1000;
}
