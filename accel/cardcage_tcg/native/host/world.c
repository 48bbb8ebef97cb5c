/* Time, sleeping, stopping the world, the timer thread and the signal handler. */
#include "cpu.h"
#include "internal.h"
#include "helpers.h"

static long syscall6(long n, long a, long b, long c, long d, long e, long f)
{
    register long r10 __asm__("r10") = d;
    register long r8 __asm__("r8") = e;
    register long r9 __asm__("r9") = f;
    long ret;
    __asm__ volatile("syscall" : "=a"(ret) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
    return ret;
}

enum { PAUSES = 64 }; /* some microseconds, as KVM's window for such loops */
enum { SYS_write = 1, SYS_sched_yield = 24, SYS_madvise = 28, MADV_DONTNEED = 4, SYS_futex = 202, SYS_clock_gettime = 228 };
enum { FUTEX_WAIT_PRIVATE = 128, FUTEX_WAKE_PRIVATE = 129 };
struct timespec { s64 sec, nsec; };

long sys_futex(u32 *word, int op, u32 value, const void *timeout)
{
    return syscall6(SYS_futex, (long)word, op, value, (long)timeout, 0, 0);
}

void zero_pages(void *at, u64 size)
{
    if (syscall6(SYS_madvise, (long)at, (long)size, MADV_DONTNEED, 0, 0, 0))
        memset(at, 0, size);
}

u64 rdtsc(void)
{
    u32 lo, hi;
    __asm__ volatile("rdtsc" : "=a"(lo), "=d"(hi));
    return (u64)hi << 32 | lo;
}

u64 now_ns(void)
{
    struct timespec t;
    syscall6(SYS_clock_gettime, 1, (long)&t, 0, 0, 0, 0);
    return (u64)t.sec * 1000000000ul + (u64)t.nsec;
}

void futex_wait(u32 *word, u32 value, u64 deadline)
{
    struct timespec t, *to = 0;
    if (deadline != ~0ul) {
        u64 now = now_ns(), left = deadline > now ? deadline - now : 0;
        t.sec = (s64)(left / 1000000000ul), t.nsec = (s64)(left % 1000000000ul), to = &t;
    }
    sys_futex(word, FUTEX_WAIT_PRIVATE, value, to);
}

void futex_wake(u32 *word) { sys_futex(word, FUTEX_WAKE_PRIVATE, 0x7fffffff, 0); }

void spin_lock(u32 *lock)
{
    u32 spins = 0;
    while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE))
        while (__atomic_load_n(lock, __ATOMIC_RELAXED)) {
            __builtin_ia32_pause();
            if (++spins % 256 == 0) /* the holder may have lost its processor */
                syscall6(SYS_sched_yield, 0, 0, 0, 0, 0, 0);
        }
}

void spin_unlock(u32 *lock) { __atomic_store_n(lock, 0, __ATOMIC_RELEASE); }

/* Who spins waits for another vCPU, which may have lost its processor to this one. */
int h_pause(struct cpu *c, u32 arg)
{
    (void)arg;
    __builtin_ia32_pause();
    if (++c->pauses % PAUSES == 0 && c->vm->ncpus > 1)
        syscall6(SYS_sched_yield, 0, 0, 0, 0, 0, 0);
    return H_CONTINUE;
}

void wake_idler(struct vm *vm)
{
    u64 one = 1;
    syscall6(SYS_write, vm->idle_fd, (long)&one, 8, 0, 0, 0);
}

void wake_cpu(struct cpu *c)
{
    __atomic_store_n(&c->poll, 1, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&c->wake, 1, __ATOMIC_SEQ_CST);
    u32 sleeping = __atomic_load_n(&c->sleeping, __ATOMIC_SEQ_CST);
    if (sleeping == 1)
        futex_wake(&c->wake);
    else if (sleeping)
        wake_idler(c->vm);
}

/* A vCPU announces itself before it looks at `stopping`, and a stopper sets `stopping` before it looks at the vCPUs:
 * both orders are sequentially consistent, so at least one of the two sees the other. */
void world_enter(struct cpu *c)
{
    struct vm *vm = c->vm;
    for (;;) {
        __atomic_store_n(&c->in_native, 1, __ATOMIC_SEQ_CST);
        u32 stopping = __atomic_load_n(&vm->stopping, __ATOMIC_SEQ_CST);
        if (likely(!stopping))
            return;
        world_leave(c);
        futex_wait(&vm->stopping, stopping, ~0ul);
    }
}

void world_leave(struct cpu *c)
{
    __atomic_store_n(&c->rmw, 0, __ATOMIC_SEQ_CST); /* what it was let into is done */
    __atomic_store_n(&c->in_native, 0, __ATOMIC_SEQ_CST);
    if (unlikely(__atomic_load_n(&c->vm->stopping, __ATOMIC_SEQ_CST)))
        futex_wake(&c->in_native);
}

/* Stop the others, from outside native code, also on a vCPU's own thread. One stops at a time: what it changes (slots, which pages are
 * watched) nobody else does meanwhile. */
EXPORTED void tcg_stop_world(struct vm *vm)
{
    while (__atomic_exchange_n(&vm->stopper, 1, __ATOMIC_SEQ_CST))
        futex_wait(&vm->stopper, 1, ~0ul);
    __atomic_store_n(&vm->stopping, 1, __ATOMIC_SEQ_CST);
    for (u32 i = 0; i < vm->ncpus; i++) {
        struct cpu *c = vm->cpus[i];
        if (!c)
            continue;
        for (u32 spins = 0; __atomic_load_n(&c->in_native, __ATOMIC_SEQ_CST); spins++) {
            __atomic_store_n(&c->poll, 1, __ATOMIC_SEQ_CST);
            if (spins < 200)
                __builtin_ia32_pause();
            else
                futex_wait(&c->in_native, 1, now_ns() + 1000000);
        }
    }
}

EXPORTED void tcg_start_world(struct vm *vm)
{
    __atomic_store_n(&vm->stopping, 0, __ATOMIC_SEQ_CST);
    futex_wake(&vm->stopping);
    __atomic_store_n(&vm->stopper, 0, __ATOMIC_SEQ_CST);
    futex_wake(&vm->stopper);
}

EXPORTED void tcg_kick(struct cpu *c)
{
    __atomic_store_n(&c->kicked, 1, __ATOMIC_SEQ_CST);
    wake_cpu(c);
}

/* ---- vCPUs that stand still, out of native code with all of their state in `struct cpu` ---- */

/* The thread of *c* is, or stays, between two instructions. It looks at `holding` after it has said so, and who holds looks after that. */
EXPORTED void tcg_still(struct cpu *c)
{
    __atomic_store_n(&c->still, 1, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&c->vm->holding, __ATOMIC_SEQ_CST))
        futex_wake(&c->still);
}

void tcg_enter(struct cpu *c); /* entry.S */

EXPORTED void tcg_run(struct cpu *c)
{
    tcg_enter(c);
    if (c->reason == R_POLL)
        tcg_still(c);
}

/* Get all vCPUs out, and wait up to *ns* until they are still; returns whether they are. */
EXPORTED int tcg_hold(struct vm *vm, u64 ns)
{
    u64 end = now_ns() + ns;
    int still = 1;
    __atomic_store_n(&vm->holding, 1, __ATOMIC_SEQ_CST);
    for (u32 i = 0; i < vm->ncpus; i++)
        if (vm->cpus[i] && !__atomic_load_n(&vm->cpus[i]->still, __ATOMIC_SEQ_CST))
            tcg_kick(vm->cpus[i]);
    for (u32 i = 0; i < vm->ncpus && still; i++) {
        struct cpu *c = vm->cpus[i];
        for (u32 spins = 0; c && !__atomic_load_n(&c->still, __ATOMIC_SEQ_CST); spins++)
            if (spins < 100)
                __builtin_ia32_pause();
            else if (now_ns() < end)
                futex_wait(&c->still, 0, end);
            else {
                still = 0;
                break;
            }
    }
    __atomic_store_n(&vm->holding, 0, __ATOMIC_SEQ_CST);
    return still;
}

/* The same for who keeps the GIL, and so waits for a moment only. */
EXPORTED int tcg_hold_briefly(struct vm *vm, u64 ns) { return tcg_hold(vm, ns); }

/* ---- the timer thread: one for each VM, never in need of the GIL ---- */

void ticker_kick(struct vm *vm, u64 deadline)
{
    if (deadline < __atomic_load_n(&vm->ticker_deadline, __ATOMIC_SEQ_CST)) {
        __atomic_fetch_add(&vm->ticker_seq, 1, __ATOMIC_SEQ_CST);
        futex_wake(&vm->ticker_seq);
    }
}

/* This thread's sleeps end when they should: 1 ns of timer slack (PR_SET_TIMERSLACK) instead of 50 us. */
EXPORTED void tcg_precise_timers(void) { syscall6(157, 29, 1, 0, 0, 0, 0); }

EXPORTED void tcg_ticker(struct vm *vm)
{
    tcg_precise_timers();
    while (!__atomic_load_n(&vm->closing, __ATOMIC_SEQ_CST)) {
        __atomic_store_n(&vm->ticker_deadline, 0, __ATOMIC_SEQ_CST);
        u32 seq = __atomic_load_n(&vm->ticker_seq, __ATOMIC_SEQ_CST);
        u64 now = now_ns(), next = ~0ul;
        __atomic_store_n(&vm->ticker_deadline, ~0ul, __ATOMIC_SEQ_CST);
        for (u32 i = 0; i < vm->ncpus; i++) {
            struct cpu *c = vm->cpus[i];
            if (!c)
                continue;
            u64 deadline = apic_next_deadline(c);
            if (deadline <= now) {
                apic_timer_expire(c, now);
                deadline = apic_next_deadline(c);
            }
            if (deadline < next)
                next = deadline;
        }
        __atomic_store_n(&vm->ticker_deadline, next, __ATOMIC_SEQ_CST);
        if (!__atomic_load_n(&vm->closing, __ATOMIC_SEQ_CST))
            futex_wait(&vm->ticker_seq, seq, next);
    }
}

EXPORTED void tcg_close(struct vm *vm)
{
    __atomic_store_n(&vm->closing, 1, __ATOMIC_SEQ_CST);
    __atomic_fetch_add(&vm->ticker_seq, 1, __ATOMIC_SEQ_CST);
    futex_wake(&vm->ticker_seq);
}

/* ---- host faults in translated code: #DE, misaligned SSE, unmasked floating point ---- */

struct range { u64 low, high; };
static struct range ranges[256];        /* code buffers of this process; slots are claimed by exchange of `low` */
struct sigaction { void (*handler)(int, void *, void *); u64 flags; void *restorer; u64 mask; };
static struct sigaction previous[32];

static void handler(int sig, void *info, void *context)
{
    if (sig == 11 && frozen_fault(((u64 *)info)[2]))
        return;
    u64 *gregs = (u64 *)((char *)context + 40); /* ucontext.uc_mcontext.gregs: R8..R15 RDI RSI RBP RBX RDX RAX RCX RSP RIP EFL CSGSFS ERR TRAPNO */
    u64 rip = gregs[16];
    /* SIGBUS is the guest's only for alignment (BUS_ADRALN): else the host has no page, which is the core's to handle. */
    int guest = sig != 7 || *(int *)((char *)info + 8) == 1;
    for (u32 i = 0; guest && i < 256; i++)
        if (ranges[i].low && rip >= ranges[i].low && rip < ranges[i].high) {
            struct cpu *c = (struct cpu *)gregs[15];
#ifdef TCG_CHECK
            check_signal(sig, ((int *)info)[2], ((u64 *)info)[2], rip);
#endif
            c->info[0] = (u64)sig, c->info[1] = rip, c->info[2] = gregs[20];
            gregs[16] = (u64)stub_signal;
            return;
        }
#ifdef TCG_CHECK
    check_died(sig, ((u64 *)info)[2], rip, (u64)handler);
#endif
    struct sigaction *old = &previous[sig];
    if ((u64)old->handler > 1) {
        old->handler(sig, info, context);
        return;
    }
    if ((u64)old->handler == 1)
        return;
    struct sigaction dfl = { 0, 0x04000000, (void *)stub_sigreturn, 0 };
    syscall6(13, sig, (long)&dfl, 0, 8, 0, 0);  /* the fault repeats with the default action */
}

/* Install the handlers, or install them again when somebody replaced them; returns how many were replaced. */
EXPORTED int tcg_signals(void)
{
    static const int signals[] = { 4, 7, 8, 11 };
    int changed = 0;
    for (u32 i = 0; i < 4; i++) {
        struct sigaction now, mine = { handler, 4 | 0x04000000 | 0x40000000 | 0x08000000, (void *)stub_sigreturn, 0 };
        syscall6(13, signals[i], 0, (long)&now, 8, 0, 0);
        if (now.handler == handler)
            continue;
        previous[signals[i]] = now;
        syscall6(13, signals[i], (long)&mine, 0, 8, 0, 0);
        changed++;
    }
    return changed;
}

EXPORTED int tcg_add_range(u64 low, u64 high)
{
    for (u32 i = 0; i < 256; i++) {
        u64 zero = 0;
        if (__atomic_compare_exchange_n(&ranges[i].low, &zero, ~0ul, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) {
            ranges[i].high = high;
            __atomic_store_n(&ranges[i].low, low, __ATOMIC_SEQ_CST);
            return (int)i;
        }
    }
    return -1;
}

EXPORTED void tcg_remove_range(int i) { __atomic_store_n(&ranges[i].low, 0, __ATOMIC_SEQ_CST); }

#ifdef TCG_CHECK
static void check_range(const void *at, unsigned long n) /* what instrumented code would look at */
{
    for (unsigned long i = 0; i < n; i++)
        (void)((const volatile u8 *)at)[i];
}
#endif

/* gcc may call these even in freestanding code */
void *memcpy(void *to, const void *from, unsigned long n)
{
    void *d = to;
#ifdef TCG_CHECK
    check_range(from, n);
    check_range(to, n);
#endif
    if (n <= 64) { /* which takes some 30 cycles to begin; volatile, or a compiler makes this a call of itself */
        volatile u8 *byte = d;
        const volatile u8 *source = from;
        for (; n >= 8; n -= 8, byte += 8, source += 8)
            *(volatile u64 *)byte = *(const volatile u64 *)source;
        while (n--)
            *byte++ = *source++;
        return to;
    }
    __asm__ volatile("rep movsb" : "+D"(d), "+S"(from), "+c"(n) : : "memory");
    return to;
}

void *memset(void *to, int v, unsigned long n)
{
    void *d = to;
#ifdef TCG_CHECK
    check_range(to, n);
#endif
    __asm__ volatile("rep stosb" : "+D"(d), "+c"(n) : "a"(v) : "memory");
    return to;
}
