/* Guest work for benchmarks/cpu.py. Each row does a fixed amount of work and prints "name nanoseconds checksum".
 * Built with gcc -O2 -static, so that the same bytes run natively, under QEMU and under cardcage. */
#define _GNU_SOURCE
#include <emmintrin.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + t.tv_nsec;
}

static uint64_t integer(void) {
    uint64_t x = 88172645463325252u, sum = 0;
    for (int i = 0; i < 60000000; i++) {
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        if (x & 64)
            sum += x >> 3;
    }
    return sum;
}

static __attribute__((noinline)) uint64_t fib(unsigned n) {
    __asm__ volatile("" ::: "memory");
    return n < 2 ? n : fib(n - 1) + fib(n - 2);
}

static uint64_t calls(void) { return fib(34); }

enum { COPY = 256 << 10 };
static unsigned char from[COPY] __attribute__((aligned(64))), to[COPY] __attribute__((aligned(64)));

static uint64_t copy_words(void) {
    for (int round = 0; round < 2000; round++) {
        uint64_t *d = (uint64_t *)to, *s = (uint64_t *)from, n = COPY / 8, t;
        __asm__ volatile("1: mov (%1), %3\n mov %3, (%0)\n add $8, %0\n add $8, %1\n dec %2\n jnz 1b"
                         : "+r"(d), "+r"(s), "+r"(n), "=&r"(t)::"memory");
    }
    return to[COPY - 1];
}

static uint64_t copy_sse(void) {
    for (int round = 0; round < 4000; round++) {
        for (int i = 0; i < COPY; i += 32) {
            __m128i a = _mm_load_si128((__m128i *)(from + i)), b = _mm_load_si128((__m128i *)(from + i + 16));
            _mm_store_si128((__m128i *)(to + i), a);
            _mm_store_si128((__m128i *)(to + i + 16), b);
        }
        __asm__ volatile("" ::: "memory");
    }
    return to[COPY - 1];
}

static uint64_t copy_rep(void) {
    for (int round = 0; round < 3000; round++) {
        void *d = to, *s = from;
        size_t n = COPY;
        __asm__ volatile("rep movsb" : "+D"(d), "+S"(s), "+c"(n)::"memory");
    }
    return to[COPY - 1];
}

static uint32_t k[64];

static void sha256_block(uint32_t *h, const unsigned char *p) {
    uint32_t w[64], v[8];
#define ROTR(x, n) ((x) >> (n) | (x) << (32 - (n)))
    for (int i = 0; i < 16; i++)
        w[i] = (uint32_t)p[4 * i] << 24 | p[4 * i + 1] << 16 | p[4 * i + 2] << 8 | p[4 * i + 3];
    for (int i = 16; i < 64; i++)
        w[i] = w[i - 16] + (ROTR(w[i - 15], 7) ^ ROTR(w[i - 15], 18) ^ w[i - 15] >> 3) + w[i - 7] +
               (ROTR(w[i - 2], 17) ^ ROTR(w[i - 2], 19) ^ w[i - 2] >> 10);
    memcpy(v, h, sizeof v);
    for (int i = 0; i < 64; i++) {
        uint32_t a = v[0], e = v[4];
        uint32_t t1 = v[7] + (ROTR(e, 6) ^ ROTR(e, 11) ^ ROTR(e, 25)) + ((e & v[5]) ^ (~e & v[6])) + k[i] + w[i];
        uint32_t t2 = (ROTR(a, 2) ^ ROTR(a, 13) ^ ROTR(a, 22)) + ((a & v[1]) ^ (a & v[2]) ^ (v[1] & v[2]));
        v[7] = v[6], v[6] = v[5], v[5] = e, v[4] = v[3] + t1;
        v[3] = v[2], v[2] = v[1], v[1] = a, v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; i++)
        h[i] += v[i];
}

static uint64_t sha256(void) { /* the rounds of SHA-256 with made-up constants: the work is the same */
    uint32_t h[8] = {1, 2, 3, 4, 5, 6, 7, 8};
    for (int i = 0; i < 64; i++)
        k[i] = 0x9e3779b9u * (i + 1);
    for (int round = 0; round < 60; round++)
        for (int i = 0; i < COPY; i += 64)
            sha256_block(h, from + i);
    return h[0];
}

enum { N = 192 };
static double a[N][N] __attribute__((aligned(16))), b[N][N] __attribute__((aligned(16))),
    c[N][N] __attribute__((aligned(16)));

static uint64_t matmul(void) {
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++)
            a[i][j] = i + j, b[i][j] = i - j;
    for (int round = 0; round < 8; round++)
        for (int i = 0; i < N; i++)
            for (int j = 0; j < N; j += 2) {
                __m128d sum = _mm_setzero_pd();
                for (int m = 0; m < N; m++)
                    sum = _mm_add_pd(sum, _mm_mul_pd(_mm_set1_pd(a[i][m]), _mm_load_pd(&b[m][j])));
                _mm_store_pd(&c[i][j], sum);
            }
    return (uint64_t)(int64_t)c[N - 1][N - 1];
}

static uint64_t system_calls(void) {
    uint64_t sum = 0;
    for (int i = 0; i < 400000; i++)
        sum += syscall(SYS_getppid) > 0;
    return sum;
}

static uint64_t ping_pong(void) {
    int there[2], back[2];
    char byte = 1;
    uint64_t done = 0;
    if (pipe(there) || pipe(back))
        return 0;
    pid_t child = fork();
    if (child == 0) {
        close(there[1]);
        while (read(there[0], &byte, 1) == 1)
            if (write(back[1], &byte, 1) != 1)
                break;
        _exit(0);
    }
    for (int i = 0; i < 20000; i++)
        done += write(there[1], &byte, 1) == 1 && read(back[0], &byte, 1) == 1;
    close(there[1]);
    waitpid(child, NULL, 0);
    return done;
}

static uint64_t forks(void) {
    uint64_t done = 0;
    for (int i = 0; i < 1000; i++) {
        pid_t child = fork();
        if (child == 0)
            _exit(0);
        done += waitpid(child, NULL, 0) == child;
    }
    return done;
}

static uint64_t page_faults(void) {
    enum { SIZE = 32 << 20 };
    uint64_t sum = 0;
    for (int round = 0; round < 4; round++) {
        unsigned char *p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (p == MAP_FAILED)
            return 0;
        madvise(p, SIZE, MADV_NOHUGEPAGE);
        for (size_t i = 0; i < SIZE; i += 4096)
            p[i] = 1, sum++;
        munmap(p, SIZE);
    }
    return sum;
}

static const struct {
    const char *name;
    uint64_t (*work)(void);
} rows[] = {
    {"integer", integer},       {"calls", calls},     {"copy-words", copy_words},     {"copy-sse", copy_sse},
    {"copy-rep", copy_rep},     {"sha256", sha256},   {"sse2-matmul", matmul},        {"system-calls", system_calls},
    {"pipe-ping-pong", ping_pong}, {"fork-exit", forks}, {"page-faults", page_faults},
};

int main(int argc, char **argv) {
    for (int i = 0; i < COPY; i++)
        from[i] = i * 7;
    for (size_t i = 0; i < sizeof rows / sizeof *rows; i++) {
        int wanted = argc < 2;
        for (int j = 1; j < argc; j++)
            wanted |= !strcmp(argv[j], rows[i].name);
        if (!wanted)
            continue;
        uint64_t begin = now(), sum = rows[i].work();
        printf("%s %llu %llu\n", rows[i].name, (unsigned long long)(now() - begin), (unsigned long long)sum);
        fflush(stdout);
    }
    return 0;
}
