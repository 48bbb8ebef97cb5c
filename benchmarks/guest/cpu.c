/* Guest work for benchmarks/cpu.py. Each row does a fixed amount of work and prints "name nanoseconds checksum".
 * Built with gcc -O2 -static, so that the same bytes run natively, under QEMU and under cardcage; a second time with
 * -static-pie, as NAME-pie, which the row exec-aslr starts: it has other addresses in each process. */
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

static const char *self;

static uint64_t exec_aslr(void) {
    char program[256];
    uint64_t done = 0;
    snprintf(program, sizeof program, "%s-pie", self);
    for (int i = 0; i < 400; i++) {
        int status = 1;
        pid_t child = fork();
        if (child == 0) {
            execl(program, program, "exit", (char *)NULL);
            _exit(1);
        }
        done += waitpid(child, &status, 0) == child && status == 0;
    }
    return done;
}

static uint64_t aliases(void) { /* as libraries are, in as many processes */
    enum { PLACES = 2000 };
    static void (*places[PLACES])(void);
    int file = memfd_create("code", 0);
    uint64_t done = 0;
    if (file < 0 || write(file, "\xc3", 1) != 1 || ftruncate(file, 4096))
        return 0;
    for (int i = 0; i < PLACES; i++)
        *(void **)&places[i] = mmap(NULL, 4096, PROT_READ | PROT_EXEC, MAP_SHARED, file, 0);
    for (int round = 0; round < 100; round++)
        for (int i = 0; i < PLACES; i++)
            places[i](), done++;
    return done;
}

enum { APART = 4096, PAGES = 64 };
static unsigned char pages[APART * (PAGES + 1)] __attribute__((aligned(4096)));

static uint64_t cross_store(void) {
    for (int round = 0; round < 1000; round++) {
        __m128i value = _mm_set1_epi32(round);
        for (int i = 1; i <= PAGES; i++)
            _mm_storeu_si128((__m128i *)(pages + i * APART - 7), value);
    }
    return pages[APART];
}

static uint64_t cross_add(void) {
    for (int round = 0; round < 1000; round++)
        for (int i = 1; i <= PAGES; i++)
            __asm__ volatile("addq $3, (%0)" ::"r"(pages + i * APART - 3) : "memory");
    return pages[APART];
}

static uint64_t stream_unaligned(void) {
    for (int round = 0; round < 400; round++) {
        for (int i = 0; i < PAGES * APART; i += 16)
            _mm_storeu_si128((__m128i *)(pages + 8 + i), _mm_loadu_si128((__m128i *)(from + i % COPY)));
        __asm__ volatile("" ::: "memory");
    }
    return pages[APART];
}

static uint64_t pop_memory(void) {
    for (int i = 0; i < 200000; i++)
        __asm__ volatile("sub $128, %%rsp\n push %0\n popq (%1)\n add $128, %%rsp" ::"r"((uint64_t)i), "r"(pages) : "memory");
    return pages[0];
}

static uint64_t identify(void) {
    uint32_t sum = 0;
    for (int i = 0; i < 100000; i++) {
        uint32_t eax = 7, ebx, ecx = 0, edx;
        __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
        sum += eax;
    }
    return sum;
}

static uint64_t large_set(void) { /* a read in each of 8 MiB's pages in turn, as tables that no cache of translations holds */
    enum { SIZE = 8 << 20 };
    unsigned char *p = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t sum = 0;
    if (p == MAP_FAILED)
        return 0;
    memset(p, 1, SIZE);
    for (int round = 0; round < 2000; round++)
        for (size_t i = 0; i < SIZE; i += 4096)
            sum += p[i + (i >> 6 & 0xfc0)];
    return sum;
}

static uint64_t indirect_calls(void) { /* functions whose addresses agree in the low bits */
    enum { FUNCTIONS = 600, STEP = 2048 };
    unsigned char *p = mmap(NULL, FUNCTIONS * STEP, PROT_READ | PROT_WRITE | PROT_EXEC, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t done = 0;
    if (p == MAP_FAILED)
        return 0;
    for (int i = 0; i < FUNCTIONS; i++)
        p[i * STEP] = 0xc3;
    for (int round = 0; round < 4000; round++)
        for (int i = 0; i < FUNCTIONS; i++) {
            void (*one)(void);
            *(void **)&one = p + i * STEP;
            one(), done++;
        }
    return done;
}

static const struct {
    const char *name;
    uint64_t (*work)(void);
} rows[] = {
    {"integer", integer},       {"calls", calls},     {"copy-words", copy_words},     {"copy-sse", copy_sse},
    {"copy-rep", copy_rep},     {"sha256", sha256},   {"sse2-matmul", matmul},        {"system-calls", system_calls},
    {"pipe-ping-pong", ping_pong}, {"fork-exit", forks}, {"page-faults", page_faults},   {"exec-aslr", exec_aslr},
    {"aliases", aliases},       {"cross-store", cross_store}, {"cross-add", cross_add}, {"stream-unaligned", stream_unaligned},
    {"pop-memory", pop_memory}, {"cpuid", identify},  {"large-set", large_set},       {"indirect-calls", indirect_calls},
};

int main(int argc, char **argv) {
    self = argv[0];
    if (argc > 1 && !strcmp(argv[1], "exit"))
        return 0;
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
