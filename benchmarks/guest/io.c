/* Guest work for benchmarks/io.py on /dev/vda, without the page cache. Each row prints "name operations microseconds".
 * Built with gcc -O2 -static, so that the same bytes run under QEMU and under cardcage. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <linux/aio_abi.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, SPAN = 48 << 20, DEPTH = 32, LARGE = 1 << 20 };
static unsigned char *memory;
static uint64_t state = 88172645463325252u;

static uint64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000u + t.tv_nsec / 1000;
}

static uint64_t place(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state % (SPAN / PAGE) * PAGE;
}

static void row(const char *name, long count, uint64_t began) {
    printf("%s %ld %lu\n", name, count, (unsigned long)(now() - began));
    fflush(stdout);
}

static void die(const char *what) {
    perror(what);
    exit(1);
}

static void single(int fd, int write, long count) {
    uint64_t began = now();
    for (long i = 0; i < count; i++)
        if ((write ? pwrite(fd, memory, PAGE, place()) : pread(fd, memory, PAGE, place())) != PAGE)
            die("single");
    row(write ? "write-4k-depth-1" : "read-4k-depth-1", count, began);
}

static void deep(int fd, int write, long count) {
    aio_context_t context = 0;
    struct iocb blocks[DEPTH], *list[DEPTH];
    struct io_event events[DEPTH];
    if (syscall(SYS_io_setup, DEPTH, &context))
        die("io_setup");
    memset(blocks, 0, sizeof blocks);
    uint64_t began = now();
    long issued = 0, done = 0;
    int ready = DEPTH;
    for (int i = 0; i < DEPTH; i++)
        list[i] = &blocks[i];
    while (done < count) {
        for (int i = 0; i < ready; i++) {
            struct iocb *b = list[i];
            b->aio_fildes = fd;
            b->aio_lio_opcode = write ? IOCB_CMD_PWRITE : IOCB_CMD_PREAD;
            b->aio_buf = (uintptr_t)(memory + (b - blocks) * PAGE);
            b->aio_nbytes = PAGE;
            b->aio_offset = place();
        }
        if (ready && issued < count) {
            if (syscall(SYS_io_submit, context, ready, list) != ready)
                die("io_submit");
            issued += ready;
        }
        ready = syscall(SYS_io_getevents, context, 1, DEPTH, events, 0);
        if (ready < 1)
            die("io_getevents");
        for (int i = 0; i < ready; i++) {
            list[i] = (struct iocb *)(uintptr_t)events[i].obj;
            if (events[i].res != PAGE)
                die("event");
        }
        done += ready;
    }
    row(write ? "write-4k-depth-32" : "read-4k-depth-32", done, began);
    syscall(SYS_io_destroy, context);
}

static void sequential(int fd, int write, long count) {
    uint64_t began = now();
    for (long i = 0; i < count; i++) {
        off_t at = (off_t)(i % (SPAN / LARGE)) * LARGE;
        if ((write ? pwrite(fd, memory, LARGE, at) : pread(fd, memory, LARGE, at)) != LARGE)
            die("sequential");
    }
    row(write ? "write-1m" : "read-1m", count, began);
}

int main(int argc, char **argv) {
    long scale = argc > 1 ? atol(argv[1]) : 1;
    int fd = open("/dev/vda", O_RDWR | O_DIRECT);
    if (fd < 0 || posix_memalign((void **)&memory, PAGE, LARGE))
        die("/dev/vda");
    memset(memory, 0x5a, LARGE);
    sequential(fd, 1, 48);
    for (int write = 0; write < 2; write++) {
        single(fd, write, 1000 * scale);
        deep(fd, write, 4000 * scale);
        sequential(fd, write, 96 * scale);
    }
    return 0;
}
