/* The local APIC's timer: one-shot, periodic, TSC deadline (Intel SDM vol. 3, 11.5.4). */
#include "apic.h"

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

static u32 divisor(const struct lapic *l)
{
    u32 d = l->regs[A_DCR], v = (d & 3) | (d >> 1 & 4);
    return v == 7 ? 1 : 2u << v;
}

u32 timer_mode(const struct lapic *l) { return l->regs[A_TIMER] >> 17 & 3; }
u64 timer_ns(struct cpu *c, u64 count) { return muldiv(count * divisor(&c->lapic), 1000000000, c->vm->apic_bus_hz); }

void timer_disarm(struct lapic *l) { __atomic_store_n(&l->timer_next, NEVER, __ATOMIC_SEQ_CST); }

void timer_arm(struct cpu *c, u64 next)
{
    __atomic_store_n(&c->lapic.timer_next, next, __ATOMIC_SEQ_CST);
    if (next != NEVER)
        ticker_kick(c->vm, next);
}

/* Start counting down from *count*. */
void timer_start(struct cpu *c, u32 count)
{
    struct lapic *l = &c->lapic;
    spin_lock(&l->timer_lock);
    timer_disarm(l);
    l->timer_period = timer_ns(c, count);
    l->timer_start = now_ns();
    if (!count)
        l->timer_period = 0;
    else if (l->timer_period == 0)
        l->timer_period = 1;
    if (count)
        timer_arm(c, l->timer_start + l->timer_period);
    spin_unlock(&l->timer_lock);
}

u32 timer_count(struct cpu *c)
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

static void expire(struct cpu *c, u64 now)
{
    struct lapic *l = &c->lapic;
    u64 due = l->timer_next, next = NEVER;
    u32 lvt = l->regs[A_TIMER];
    if (!due || due == NEVER || now < due)
        return;
    if (timer_mode(l) == TIMER_PERIODIC && l->timer_period) {
        u64 period = l->timer_period < SHORTEST_PERIOD ? SHORTEST_PERIOD : l->timer_period;
        next = due + ((now - due) / period + 1) * period;
    }
    __atomic_store_n(&l->timer_next, next, __ATOMIC_SEQ_CST);
    if (timer_mode(l) == TIMER_DEADLINE)
        l->tsc_deadline = 0;
    if (!(lvt & LVT_MASKED))
        apic_post(c, lvt & 0xff, 0);
}

void timer_change(struct cpu *c, int periodic)
{
    struct lapic *l = &c->lapic;
    u64 now = now_ns(), elapsed = now - l->timer_start;
    if (!l->timer_period || elapsed < l->timer_period)
        return;
    if (periodic) { /* the rest of this period */
        expire(c, now);
        l->timer_start = now - elapsed % l->timer_period;
        timer_arm(c, l->timer_start + l->timer_period);
    } else {
        l->timer_period = 0;
    }
}

void timer_deadline(struct cpu *c, u64 value)
{
    struct lapic *l = &c->lapic;
    u64 tsc, now;
    spin_lock(&l->timer_lock);
    timer_disarm(l);
    l->tsc_deadline = value;
    if (!value) {
        spin_unlock(&l->timer_lock);
        return;
    }
    now = now_ns();
    tsc = rdtsc() + c->tsc_offset;
    if (value > tsc) {
        u64 wait = muldiv(value - tsc, 1000000, c->vm->tsc_khz);
        now = wait >= NEVER - 1 - now ? NEVER - 1 : now + wait + 1; /* never before the guest's TSC is there */
    }
    timer_arm(c, now);
    if (value <= tsc)
        expire(c, now);
    spin_unlock(&l->timer_lock);
}

u64 apic_next_deadline(struct cpu *c)
{
    u64 next = __atomic_load_n(&c->lapic.timer_next, __ATOMIC_SEQ_CST);
    return next ? next : NEVER;
}

/* The vCPU's own thread or the ticker's. Whoever changes, saves or loads the timer meanwhile finds it expired, interrupt and all, or not. */
void apic_timer_expire(struct cpu *c, u64 now)
{
    spin_lock(&c->lapic.timer_lock);
    expire(c, now);
    spin_unlock(&c->lapic.timer_lock);
}
