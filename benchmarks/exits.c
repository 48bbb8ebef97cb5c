/* The loop of exits.py in C on /dev/kvm: nanoseconds of each round trip of a port write, one a line.
   usage: exits ROUNDS SPIN(0|1) */
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>

static const unsigned char writer[] = {0xE6, 0x10, 0xEB, 0xFC}; /* l: out 0x10, al; jmp l */
static const unsigned char spinner[] = {0xEB, 0xFE};            /* l: jmp l */
static int kvm, vm;

static void need(int ok, const char *what) {
    if (!ok) { perror(what); exit(1); }
}

static int cpu(int index, uint64_t rip, struct kvm_run **run) {
    int fd = ioctl(vm, KVM_CREATE_VCPU, index);
    need(fd >= 0, "KVM_CREATE_VCPU");
    struct kvm_sregs s;
    struct kvm_regs r = {.rip = rip, .rflags = 2};
    need(!ioctl(fd, KVM_GET_SREGS, &s), "KVM_GET_SREGS");
    struct kvm_segment code = {.limit = ~0u, .selector = 8, .type = 11, .present = 1, .s = 1, .db = 1, .g = 1};
    struct kvm_segment data = code;
    data.selector = 16, data.type = 3;
    s.cr0 = 0x11, s.cs = code, s.ds = s.es = s.fs = s.gs = s.ss = data;
    need(!ioctl(fd, KVM_SET_SREGS, &s) && !ioctl(fd, KVM_SET_REGS, &r), "KVM_SET_REGS");
    *run = mmap(0, ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0), PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    need(*run != MAP_FAILED, "mmap");
    return fd;
}

static void *spin(void *fd) {
    for (;;) ioctl((int)(intptr_t)fd, KVM_RUN, 0);
    return 0;
}

static int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

int main(int argc, char **argv) {
    int rounds = atoi(argv[1]), contended = argc > 2 && atoi(argv[2]);
    need((kvm = open("/dev/kvm", O_RDWR)) >= 0, "/dev/kvm");
    need((vm = ioctl(kvm, KVM_CREATE_VM, 0)) >= 0, "KVM_CREATE_VM");
    ioctl(vm, KVM_SET_TSS_ADDR, 0xFEFFD000);
    unsigned char *memory = mmap(0, 4096, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    memcpy(memory, writer, sizeof writer), memcpy(memory + 0x800, spinner, sizeof spinner);
    struct kvm_userspace_memory_region slot = {0, 0, 0x1000, 4096, (uint64_t)memory};
    need(!ioctl(vm, KVM_SET_USER_MEMORY_REGION, &slot), "KVM_SET_USER_MEMORY_REGION");
    struct kvm_run *run, *other;
    int fd = cpu(0, 0x1000, &run);
    if (contended) {
        pthread_t thread;
        pthread_create(&thread, 0, spin, (void *)(intptr_t)cpu(1, 0x1800, &other));
    }
    int64_t *times = malloc((rounds + 1) * sizeof *times);
    for (int at = 0; at <= rounds;) {
        need(!ioctl(fd, KVM_RUN, 0), "KVM_RUN");
        if (run->exit_reason == KVM_EXIT_IO && run->io.port == 0x10) times[at++] = now();
    }
    for (int at = 0; at < rounds; at++) printf("%lld\n", (long long)(times[at + 1] - times[at]));
    return 0;
}
