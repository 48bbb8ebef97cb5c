/* The local APIC (Intel SDM vol. 3, chapter 11): registers, timer, and messages between processors.
 *
 * Only its own vCPU reads and writes the registers. IRR, ISR, TMR, NMI, INIT and SIPI are posted by any thread with atomics; then
 * wake_cpu() makes the target look. */
#include "sys.h"

/* Registers by offset >> 4. */
enum {
    A_ID = 2, A_VERSION = 3, A_TPR = 8, A_APR, A_PPR, A_EOI, A_RRD, A_LDR, A_DFR, A_SVR, A_ISR = 0x10, A_TMR = 0x18, A_IRR = 0x20,
    A_ESR = 0x28, A_CMCI = 0x2f, A_ICR = 0x30, A_ICR2, A_TIMER, A_THERMAL, A_PERF, A_LINT0, A_LINT1, A_ERROR, A_TICR, A_TCCR,
    A_DCR = 0x3e, A_SELF = 0x3f
};
enum { ESR_SEND_VECTOR = 0x20, ESR_RECEIVE_VECTOR = 0x40, ESR_REGISTER = 0x80 };
enum { LVT_MASKED = 1 << 16, SVR_ENABLED = 1 << 8, SVR_NO_BROADCAST = 1 << 12 };
enum { MODE_FIXED, MODE_LOWEST, MODE_SMI, MODE_REMOTE, MODE_NMI, MODE_INIT, MODE_SIPI, MODE_EXTINT };
enum { TIMER_ONESHOT, TIMER_PERIODIC, TIMER_DEADLINE };
#define VERSION 0x50014u        /* version 0x14, six LVT entries */
#define BASE_ENABLED 0x800ul
#define BASE_X2 0x400ul
#define BASE_BSP 0x100ul
#define SHORTEST_PERIOD 20000ul /* ns: a shorter periodic timer would only keep the host busy */
#define NEVER (~0ul)

/* a * b / c with a 128-bit product, at most NEVER - 1. */
static u64 muldiv(u64 a, u64 b, u64 c)
{
    u64 low, high, rest;
    __asm__("mulq %3" : "=a"(low), "=d"(high) : "0"(a), "r"(b) : "cc");
    if (high >= c)
        return NEVER - 1;
    __asm__("divq %4" : "=a"(low), "=d"(rest) : "0"(low), "1"(high), "r"(c) : "cc");
    return low == NEVER ? NEVER - 1 : low;
}

/* ---- bitmaps of vectors ---- */

static int highest(const u32 *map)
{
    for (int i = 7; i >= 0; i--) {
        u32 w = __atomic_load_n(&map[i], __ATOMIC_SEQ_CST);
        if (w)
            return i * 32 + 31 - __builtin_clz(w);
    }
    return -1;
}

static u32 set_bit(u32 *map, u32 v) { return __atomic_fetch_or(&map[v / 32], 1u << v % 32, __ATOMIC_SEQ_CST) >> v % 32 & 1; }
static u32 clear_bit(u32 *map, u32 v) { return __atomic_fetch_and(&map[v / 32], ~(1u << v % 32), __ATOMIC_SEQ_CST) >> v % 32 & 1; }

static u32 ppr(const struct lapic *l)
{
    int isr = highest(l->isr);
    u32 tpr = l->regs[A_TPR] & 0xff, in_service = isr < 0 ? 0 : (u32)isr & 0xf0;
    return tpr >> 4 >= in_service >> 4 ? tpr : in_service;
}

int apic_pending(struct cpu *c)
{
    int irr = highest(c->lapic.irr);
    return irr >= 0 && (u32)irr >> 4 > ppr(&c->lapic) >> 4 ? irr : -1;
}

int apic_accept(struct cpu *c)
{
    struct lapic *l = &c->lapic;
    int v = apic_pending(c);
    if (v < 0) /* only its own vCPU takes from IRR and moves the priority: what check_events() saw is still there */
        return (int)(l->regs[A_SVR] & 0xff);
    clear_bit(l->irr, (u32)v);
    set_bit(l->isr, (u32)v);
    return v;
}

/* Look at interrupts again at the next poll. */
static void recheck(struct cpu *c)
{
    if (apic_pending(c) >= 0)
        c->poll = 1;
}

/* ---- accepting ---- */

static void error(struct cpu *c, u32 bit)
{
    u32 lvt = c->lapic.regs[A_ERROR], old = __atomic_fetch_or(&c->lapic.esr, bit, __ATOMIC_SEQ_CST);
    if (!(old & bit) && !(lvt & LVT_MASKED) && (lvt & 0xff) >= 16)
        apic_post(c, lvt & 0xff, 0);
}

void apic_post(struct cpu *t, u32 vector, u32 level)
{
    struct lapic *l = &t->lapic;
    vector &= 0xff;
    if (!l->enabled || !(l->regs[A_SVR] & SVR_ENABLED))
        return;
    if (vector < 16) {
        error(t, ESR_RECEIVE_VECTOR);
        return;
    }
    if (level)
        set_bit(l->tmr, vector);
    else
        clear_bit(l->tmr, vector);
    if (!set_bit(l->irr, vector))
        wake_cpu(t);
}

static void post_mode(struct cpu *t, u32 mode, u32 vector, u32 level)
{
    struct lapic *l = &t->lapic;
    switch (mode) {
    case MODE_FIXED:
    case MODE_LOWEST:
        apic_post(t, vector, level);
        return;
    case MODE_NMI:
        __atomic_store_n(&l->nmi, 1, __ATOMIC_SEQ_CST);
        break;
    case MODE_INIT:
        __atomic_store_n(&l->sipi, 0, __ATOMIC_SEQ_CST);
        __atomic_store_n(&l->init, 1, __ATOMIC_SEQ_CST);
        break;
    case MODE_SIPI:
        __atomic_store_n(&l->sipi, vector | 0x100, __ATOMIC_SEQ_CST);
        break;
    case MODE_EXTINT: /* as the 8259's line, until it is acknowledged: see events() */
        __atomic_fetch_or(&t->extint, 2, __ATOMIC_SEQ_CST);
        break;
    default: /* SMI, remote read: there is no SMM, and no such message */
        return;
    }
    wake_cpu(t);
}

/* Is the APIC addressed? Eight-bit destinations reach x2APICs by their low IDs; 0xff is a broadcast. */
static int matches(const struct cpu *t, u32 dest, int logical)
{
    const struct lapic *l = &t->lapic;
    u32 ldr = l->regs[A_LDR];
    if (!l->enabled)
        return 0;
    if (dest == 0xffffffff || (dest == 0xff && !l->x2))
        return 1;
    if (!logical)
        return dest == l->id || dest == 0xff;
    if (l->x2)
        return ldr >> 16 == dest >> 16 && (ldr & dest & 0xffff);
    if (dest > 0xff)
        return 0;
    ldr >>= 24;
    if (l->regs[A_DFR] >> 28 == 15)
        return (ldr & dest) != 0;
    return (ldr >> 4 == dest >> 4 || dest >> 4 == 15) && (ldr & dest & 15);
}

enum { TO_DEST, TO_SELF, TO_ALL, TO_OTHERS };

static void send(struct vm *vm, struct cpu *from, u32 to, u32 dest, int logical, u32 mode, u32 vector, u32 level, int lowest)
{
    struct cpu *best = 0;
    for (u32 i = 0; i < vm->ncpus && i < MAX_CPUS; i++) {
        struct cpu *t = vm->cpus[i];
        if (!t || (to == TO_SELF && t != from) || (to == TO_OTHERS && t == from) || (to == TO_DEST && !matches(t, dest, logical)))
            continue;
        if (to != TO_DEST && !t->lapic.enabled)
            continue;
        if (!lowest)
            post_mode(t, mode, vector, level);
        else if (t->lapic.regs[A_SVR] & SVR_ENABLED && (!best || ppr(&t->lapic) < ppr(&best->lapic)))
            best = t;
    }
    if (best)
        post_mode(best, MODE_FIXED, vector, level);
}

void apic_message(struct vm *vm, u64 address, u32 data)
{
    u32 mode = data >> 8 & 7, dest = address >> 12 & 0xff;
    int logical = address >> 2 & 1, hint = address >> 3 & 1;
    if (mode == MODE_SIPI || mode == MODE_REMOTE)
        return; /* not valid in messages */
    send(vm, 0, TO_DEST, dest, logical, mode, data & 0xff, data >> 15 & 1, mode == MODE_LOWEST || (mode == MODE_FIXED && hint && logical));
}

static void command(struct cpu *c, u32 low, u32 dest)
{
    u32 mode = low >> 8 & 7, vector = low & 0xff, level = low >> 15 & 1;
    if (mode == MODE_INIT && level && !(low >> 14 & 1))
        return; /* INIT level de-assert: nothing to do since the Pentium 4 */
    if (mode == MODE_REMOTE || mode == MODE_EXTINT)
        return;
    if (mode <= MODE_LOWEST && vector < 16) {
        error(c, ESR_SEND_VECTOR);
        return;
    }
    send(c->vm, c, low >> 18 & 3, dest, low >> 11 & 1, mode, vector, mode <= MODE_LOWEST ? level && (low >> 14 & 1) : 0, mode == MODE_LOWEST);
}

int apic_extint_enabled(struct cpu *c)
{
    const struct lapic *l = &c->lapic;
    if (!l->enabled || c->extint & 2)
        return 1;
    return (l->regs[A_LINT0] & (LVT_MASKED | 0x700)) == MODE_EXTINT << 8;
}

/* ---- timer ---- */

static u32 divisor(const struct lapic *l)
{
    u32 d = l->regs[A_DCR], v = (d & 3) | (d >> 1 & 4);
    return v == 7 ? 1 : 2u << v;
}

static u32 timer_mode(const struct lapic *l) { return l->regs[A_TIMER] >> 17 & 3; }
static u64 ticks_to_ns(struct cpu *c, u64 count) { return muldiv(count * divisor(&c->lapic), 1000000000, c->vm->apic_bus_hz); }

static void disarm(struct lapic *l) { __atomic_store_n(&l->timer_next, NEVER, __ATOMIC_SEQ_CST); }

static void arm(struct cpu *c, u64 next)
{
    __atomic_store_n(&c->lapic.timer_next, next, __ATOMIC_SEQ_CST);
    if (next != NEVER)
        ticker_kick(c->vm, next);
}

/* Start counting down from *count*. */
static void start_timer(struct cpu *c, u32 count)
{
    struct lapic *l = &c->lapic;
    disarm(l);
    l->timer_period = ticks_to_ns(c, count);
    l->timer_start = now_ns();
    if (!count)
        l->timer_period = 0;
    else if (l->timer_period == 0)
        l->timer_period = 1;
    if (count)
        arm(c, l->timer_start + l->timer_period);
}

static u32 current_count(struct cpu *c)
{
    struct lapic *l = &c->lapic;
    u64 elapsed, left;
    if (!l->timer_period || timer_mode(l) == TIMER_DEADLINE)
        return 0;
    elapsed = now_ns() - l->timer_start;
    if (timer_mode(l) == TIMER_PERIODIC)
        elapsed %= l->timer_period;
    else if (elapsed >= l->timer_period)
        return 0;
    left = muldiv(l->timer_period - elapsed, c->vm->apic_bus_hz, 1000000000) / divisor(l);
    return left > 0xffffffff ? 0xffffffff : (u32)left;
}

static void set_deadline(struct cpu *c, u64 value)
{
    struct lapic *l = &c->lapic;
    u64 tsc, now;
    disarm(l);
    l->tsc_deadline = value;
    if (!value)
        return;
    now = now_ns();
    tsc = rdtsc() + c->tsc_offset;
    if (value > tsc) {
        u64 wait = muldiv(value - tsc, 1000000, c->vm->tsc_khz);
        now = wait >= NEVER - 1 - now ? NEVER - 1 : now + wait + 1; /* never before the guest's TSC is there */
    }
    arm(c, now);
    if (value <= tsc)
        apic_timer_expire(c, now);
}

u64 apic_next_deadline(struct cpu *c)
{
    u64 next = __atomic_load_n(&c->lapic.timer_next, __ATOMIC_SEQ_CST);
    return next ? next : NEVER;
}

/* The vCPU's own thread or the ticker's: whoever exchanges timer_next posts the interrupt. */
void apic_timer_expire(struct cpu *c, u64 now)
{
    struct lapic *l = &c->lapic;
    u64 due = __atomic_load_n(&l->timer_next, __ATOMIC_SEQ_CST), next = NEVER;
    u32 lvt = l->regs[A_TIMER];
    if (!due || due == NEVER || now < due)
        return;
    if (timer_mode(l) == TIMER_PERIODIC && l->timer_period) {
        u64 period = l->timer_period < SHORTEST_PERIOD ? SHORTEST_PERIOD : l->timer_period;
        next = due + ((now - due) / period + 1) * period;
    }
    if (!__atomic_compare_exchange_n(&l->timer_next, &due, next, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        return;
    if (timer_mode(l) == TIMER_DEADLINE)
        l->tsc_deadline = 0;
    if (!(lvt & LVT_MASKED))
        apic_post(c, lvt & 0xff, 0);
}

/* ---- registers ---- */

static u32 lvt_bits(u32 index)
{
    switch (index) {
    case A_TIMER: return 0x700ff;
    case A_LINT0:
    case A_LINT1: return 0x1a7ff;
    case A_ERROR: return 0x100ff;
    default: return 0x107ff;
    }
}

static void write_lvt(struct cpu *c, u32 index, u32 value)
{
    struct lapic *l = &c->lapic;
    u32 old = timer_mode(l);
    value &= lvt_bits(index);
    if (!(l->regs[A_SVR] & SVR_ENABLED))
        value |= LVT_MASKED;
    l->regs[index] = value;
    if (index == A_TIMER && old != timer_mode(l)) {
        if (old == TIMER_DEADLINE || timer_mode(l) >= TIMER_DEADLINE) {
            disarm(l);
            l->tsc_deadline = 0;
            l->timer_period = 0;
        } else if (timer_mode(l) == TIMER_PERIODIC && l->timer_period && apic_next_deadline(c) == NEVER) {
            start_timer(c, l->regs[A_TICR]);
        }
    }
    if (index == A_LINT0 && c->extint)
        c->poll = 1;
}

static int end_of_interrupt(struct cpu *c)
{
    struct lapic *l = &c->lapic;
    int v = highest(l->isr);
    if (v < 0)
        return H_CONTINUE;
    clear_bit(l->isr, (u32)v);
    recheck(c);
    if (!(l->tmr[v / 32] >> v % 32 & 1) || l->regs[A_SVR] & SVR_NO_BROADCAST)
        return H_CONTINUE;
    return exit_to(c, R_EOI, (u64)v);
}

static int read_register(struct cpu *c, u32 index, u32 *value)
{
    struct lapic *l = &c->lapic;
    switch (index) {
    case A_ID: *value = l->x2 ? l->id : l->id << 24; return 0;
    case A_VERSION: *value = VERSION; return 0;
    case A_PPR: *value = ppr(l); return 0;
    case A_TCCR: *value = current_count(c); return 0;
    case A_EOI: *value = 0; return 0;
    case A_TPR: case A_LDR: case A_DFR: case A_SVR: case A_ESR: case A_ICR: case A_ICR2: case A_TIMER: case A_THERMAL: case A_PERF:
    case A_LINT0: case A_LINT1: case A_ERROR: case A_TICR: case A_DCR:
        *value = l->regs[index];
        return 0;
    case A_APR: case A_RRD: *value = 0; return 0;
    default: break;
    }
    *value = 0;
    if (index >= A_ISR && index < A_ISR + 8)
        *value = l->isr[index - A_ISR];
    else if (index >= A_TMR && index < A_TMR + 8)
        *value = l->tmr[index - A_TMR];
    else if (index >= A_IRR && index < A_IRR + 8)
        *value = __atomic_load_n(&l->irr[index - A_IRR], __ATOMIC_SEQ_CST);
    else
        return -1;
    return 0;
}

/* H_CONTINUE, H_EXIT with R_EOI, or -1: no such register. */
static int write_register(struct cpu *c, u32 index, u32 value)
{
    struct lapic *l = &c->lapic;
    u32 left;
    switch (index) {
    case A_TPR:
        l->regs[A_TPR] = value & 0xff;
        c->cr8 = (value & 0xff) >> 4;
        recheck(c);
        break;
    case A_EOI:
        return end_of_interrupt(c);
    case A_LDR:
        l->regs[A_LDR] = value & 0xff000000;
        break;
    case A_DFR:
        l->regs[A_DFR] = value | 0x0fffffff;
        break;
    case A_SVR:
        l->regs[A_SVR] = value & 0x13ff;
        if (!(value & SVR_ENABLED))
            for (u32 i = A_TIMER; i <= A_ERROR; i++)
                l->regs[i] |= LVT_MASKED;
        break;
    case A_ESR:
        l->regs[A_ESR] = __atomic_exchange_n(&l->esr, 0, __ATOMIC_SEQ_CST);
        break;
    case A_ICR:
        l->regs[A_ICR] = value & 0xccfff & ~0x1000u;
        command(c, value, l->regs[A_ICR2] >> 24);
        break;
    case A_ICR2:
        l->regs[A_ICR2] = value & 0xff000000;
        break;
    case A_TIMER: case A_THERMAL: case A_PERF: case A_LINT0: case A_LINT1: case A_ERROR:
        write_lvt(c, index, value);
        break;
    case A_TICR:
        if (timer_mode(l) == TIMER_DEADLINE)
            break;
        l->regs[A_TICR] = value;
        start_timer(c, value);
        break;
    case A_DCR:
        left = current_count(c);
        l->regs[A_DCR] = value & 11;
        if (left) { /* what is left counts on at the new speed */
            u64 period = ticks_to_ns(c, l->regs[A_TICR]), rest = ticks_to_ns(c, left);
            disarm(l);
            l->timer_period = period ? period : 1;
            l->timer_start = now_ns() + rest - l->timer_period;
            arm(c, l->timer_start + l->timer_period);
        }
        break;
    case A_ID: case A_VERSION: case A_PPR: case A_TCCR: /* read only */
        break;
    default:
        return index >= A_ISR && index < A_IRR + 8 ? H_CONTINUE : -1;
    }
    return H_CONTINUE;
}

int apic_read(struct cpu *c, u32 offset, u32 *value)
{
    if (read_register(c, offset >> 4 & 0xff, value))
        error(c, ESR_REGISTER);
    return 0;
}

int apic_write(struct cpu *c, u32 offset, u32 value)
{
    int r = write_register(c, offset >> 4 & 0xff, value);
    if (r >= 0)
        return r;
    error(c, ESR_REGISTER);
    return H_CONTINUE;
}

/* ---- MSRs ---- */

static void reset_registers(struct cpu *c)
{
    struct lapic *l = &c->lapic;
    for (u32 i = 0; i < 256; i++)
        l->regs[i] = 0;
    for (u32 i = 0; i < 8; i++)
        l->irr[i] = l->isr[i] = l->tmr[i] = 0;
    l->regs[A_DFR] = 0xffffffff;
    l->regs[A_SVR] = 0xff;
    for (u32 i = A_TIMER; i <= A_ERROR; i++)
        l->regs[i] = LVT_MASKED;
    if (c->index == 0) /* as firmware leaves it, and as KVM has it: the 8259 reaches the boot processor */
        l->regs[A_LINT0] = MODE_EXTINT << 8;
    if (l->x2)
        l->regs[A_LDR] = l->id >> 4 << 16 | 1u << (l->id & 15);
    l->esr = 0;
    l->timer_start = l->timer_period = l->tsc_deadline = 0;
    disarm(l);
    c->cr8 = 0;
}

/* State after power-up, RESET or INIT; the ID is the vCPU's number. The APIC base MSR decides whether it is enabled. */
void apic_reset(struct cpu *c)
{
    struct lapic *l = &c->lapic;
    l->id = c->index;
    l->enabled = (c->apic_base & BASE_ENABLED) != 0;
    l->x2 = l->enabled && c->apic_base & BASE_X2;
    l->nmi = l->init = l->sipi = 0;
    reset_registers(c);
    c->poll = 1; /* it may have to wait for SIPI */
}

static int write_base(struct cpu *c, u64 value)
{
    struct lapic *l = &c->lapic;
    u64 old = c->apic_base, mode = value & (BASE_ENABLED | BASE_X2), was = old & (BASE_ENABLED | BASE_X2);
    if (value >> 52 || value & 0x2ff)
        return EX_GP;
    if (mode == BASE_X2 || (was == (BASE_ENABLED | BASE_X2) && mode == BASE_ENABLED) || (was == 0 && mode == (BASE_ENABLED | BASE_X2)))
        return EX_GP;
    c->apic_base = value;
    l->enabled = (mode & BASE_ENABLED) != 0;
    l->x2 = mode == (BASE_ENABLED | BASE_X2);
    if (mode != was) {
        if (!mode)
            reset_registers(c);
        else if (l->x2)
            l->regs[A_LDR] = l->id >> 4 << 16 | 1u << (l->id & 15);
    }
    if ((old ^ value) & ~0xffful || mode != was)
        tlb_flush(c, 1); /* where the register page is, or whether */
    c->poll = 1;
    return 0;
}

/* Bits of x2APIC registers that may be written. */
static u64 x2_writable(u32 index)
{
    switch (index) {
    case A_TPR: return 0xff;
    case A_EOI: case A_ESR: return 0;
    case A_SVR: return 0x13ff;
    case A_ICR: return 0xffffffff000ccffful;
    case A_TIMER: case A_LINT0: case A_LINT1: case A_ERROR: case A_THERMAL: case A_PERF: return lvt_bits(index) | 0x5000;
    case A_TICR: return 0xffffffff;
    case A_DCR: return 11;
    default: return 0xff; /* A_SELF */
    }
}

static int x2_read(struct cpu *c, u32 index, u64 *value)
{
    u32 low;
    if (index == A_EOI || index == A_DFR || index == A_ICR2 || index == A_APR || index == A_RRD || read_register(c, index, &low))
        return EX_GP;
    *value = low;
    if (index == A_ICR)
        *value |= (u64)c->lapic.regs[A_ICR2] << 32;
    return 0;
}

static int x2_write(struct cpu *c, u32 index, u64 value)
{
    struct lapic *l = &c->lapic;
    int r;
    switch (index) {
    case A_TPR: case A_EOI: case A_SVR: case A_ESR: case A_ICR: case A_TIMER: case A_THERMAL: case A_PERF: case A_LINT0: case A_LINT1:
    case A_ERROR: case A_TICR: case A_DCR: case A_SELF:
        break;
    default:
        return EX_GP;
    }
    if (value & ~x2_writable(index))
        return EX_GP;
    if (index == A_ICR) {
        l->regs[A_ICR] = (u32)value & ~0x1000u;
        l->regs[A_ICR2] = (u32)(value >> 32);
        command(c, (u32)value, (u32)(value >> 32));
        return 0;
    }
    if (index == A_SELF) {
        if (value < 16)
            error(c, ESR_SEND_VECTOR);
        else
            apic_post(c, (u32)value, 0);
        return 0;
    }
    r = write_register(c, index, (u32)value);
    return r < 0 ? EX_GP : r;
}

int apic_msr(struct cpu *c, u32 msr, int write, u64 *value)
{
    struct lapic *l = &c->lapic;
    if (msr == 0x1b) {
        if (write)
            return write_base(c, *value);
        *value = c->apic_base;
        return 0;
    }
    if (msr == 0x6e0) {
        if (!write)
            *value = timer_mode(l) == TIMER_DEADLINE ? l->tsc_deadline : 0;
        else if (timer_mode(l) == TIMER_DEADLINE && l->enabled)
            set_deadline(c, *value);
        return 0;
    }
    if (!l->x2 || msr < 0x800 || msr > 0x83f)
        return EX_GP;
    return write ? x2_write(c, msr - 0x800, *value) : x2_read(c, msr - 0x800, value);
}

/* ---- for Python ---- */

EXPORT void tcg_apic_reset(struct cpu *c) { apic_reset(c); }
EXPORT void tcg_apic_message(struct vm *vm, u64 address, u32 data) { apic_message(vm, address, data); }
EXPORT void tcg_apic_post(struct cpu *c, u32 vector, u32 level) { apic_post(c, vector, level); }
EXPORT int tcg_apic_read(struct cpu *c, u32 offset, u32 *value) { return apic_read(c, offset, value); }
EXPORT int tcg_apic_write(struct cpu *c, u32 offset, u32 value) { return apic_write(c, offset, value); }
EXPORT int tcg_apic_msr(struct cpu *c, u32 msr, int write, u64 *value) { return apic_msr(c, msr, write, value); }

EXPORT void tcg_inject_nmi(struct cpu *c) { post_mode(c, MODE_NMI, 0, 0); }

/* The 1024-byte register page as KVM_GET_LAPIC gives it: 64 registers 16 bytes apart. */
EXPORT void tcg_apic_save(struct cpu *c, u32 page[256])
{
    for (u32 i = 0; i < 64; i++) {
        page[i * 4 + 1] = page[i * 4 + 2] = page[i * 4 + 3] = 0;
        if (read_register(c, i, &page[i * 4]))
            page[i * 4] = 0;
    }
}

/* Restore it, the timer with what was left of its count. cpu.apic_base must be set. */
EXPORT void tcg_apic_load(struct cpu *c, const u32 page[256])
{
    struct lapic *l = &c->lapic;
    l->enabled = (c->apic_base & BASE_ENABLED) != 0;
    l->x2 = l->enabled && c->apic_base & BASE_X2;
    l->id = l->x2 ? page[A_ID * 4] : page[A_ID * 4] >> 24;
    disarm(l);
    for (u32 i = 0; i < 64; i++)
        l->regs[i] = page[i * 4];
    for (u32 i = 0; i < 8; i++) {
        l->isr[i] = page[(A_ISR + i) * 4];
        l->tmr[i] = page[(A_TMR + i) * 4];
        l->irr[i] = page[(A_IRR + i) * 4];
    }
    c->cr8 = (l->regs[A_TPR] & 0xff) >> 4;
    l->timer_period = l->timer_start = 0;
    if (timer_mode(l) == TIMER_DEADLINE) {
        set_deadline(c, l->tsc_deadline);
    } else if (l->regs[A_TICR] && (timer_mode(l) == TIMER_PERIODIC || page[A_TCCR * 4])) {
        u64 rest = ticks_to_ns(c, page[A_TCCR * 4]);
        l->timer_period = ticks_to_ns(c, l->regs[A_TICR]);
        if (!l->timer_period)
            l->timer_period = 1;
        l->timer_start = now_ns() + rest - l->timer_period;
        arm(c, l->timer_start + l->timer_period);
    }
    c->poll = 1;
}
