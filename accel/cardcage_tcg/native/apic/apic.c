/* The local APIC (Intel SDM vol. 3, chapter 11): registers, timer, and messages between processors.
 *
 * Only its own vCPU reads and writes the registers. IRR, ISR, TMR, NMI, INIT and SIPI are posted by any thread with atomics; then
 * wake_cpu() makes the target look. */
#include "apic.h"

/* ---- bitmaps of vectors ---- */

int apic_highest(const u32 *map)
{
    for (int i = 7; i >= 0; i--) {
        u32 w = __atomic_load_n(&map[i], __ATOMIC_SEQ_CST);
        if (w)
            return i * 32 + 31 - __builtin_clz(w);
    }
    return -1;
}

static u32 set_bit(u32 *map, u32 v) { return __atomic_fetch_or(&map[v / 32], 1u << v % 32, __ATOMIC_SEQ_CST) >> v % 32 & 1; }
u32 apic_clear(u32 *map, u32 v) { return __atomic_fetch_and(&map[v / 32], ~(1u << v % 32), __ATOMIC_SEQ_CST) >> v % 32 & 1; }

u32 apic_ppr(const struct lapic *l)
{
    int isr = apic_highest(l->isr);
    u32 tpr = l->regs[A_TPR] & 0xff, in_service = isr < 0 ? 0 : (u32)isr & 0xf0;
    return tpr >> 4 >= in_service >> 4 ? tpr : in_service;
}

int apic_pending(struct cpu *c)
{
    int irr = apic_highest(c->lapic.irr);
    return irr >= 0 && (u32)irr >> 4 > apic_ppr(&c->lapic) >> 4 ? irr : -1;
}

int apic_accept(struct cpu *c)
{
    struct lapic *l = &c->lapic;
    int v = apic_pending(c);
    if (v < 0) /* only its own vCPU takes from IRR and moves the priority: what check_events() saw is still there */
        return (int)(l->regs[A_SVR] & 0xff);
    apic_clear(l->irr, (u32)v);
    set_bit(l->isr, (u32)v);
    return v;
}

/* Look at interrupts again at the next poll. */
void apic_recheck(struct cpu *c)
{
    if (apic_pending(c) >= 0)
        c->poll = 1;
}

/* ---- accepting ---- */

void apic_error(struct cpu *c, u32 bit)
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
        apic_error(t, ESR_RECEIVE_VECTOR);
        return;
    }
    if (level)
        set_bit(l->tmr, vector);
    else
        apic_clear(l->tmr, vector);
    if (!set_bit(l->irr, vector))
        wake_cpu(t);
}

/* One NMI is latched while another is handled; a second waits where none is (SDM vol. 3, 6.7.1; KVM's limits). */
static void post_nmi(struct cpu *t)
{
    u32 *nmi = &t->lapic.nmi, have;
    do { /* blocked first: events() takes one, then blocks, so that the count is not from before where this says so */
        u32 blocked = __atomic_load_n(&t->nmi_blocked, __ATOMIC_SEQ_CST);
        have = __atomic_load_n(nmi, __ATOMIC_SEQ_CST);
        if (have >= (blocked ? 1u : 2u))
            return;
    } while (!__atomic_compare_exchange_n(nmi, &have, have + 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST));
}

void apic_post_mode(struct cpu *t, u32 mode, u32 vector, u32 level)
{
    struct lapic *l = &t->lapic;
    switch (mode) {
    case MODE_FIXED:
    case MODE_LOWEST:
        apic_post(t, vector, level);
        return;
    case MODE_NMI:
        post_nmi(t);
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
            apic_post_mode(t, mode, vector, level);
        else if (t->lapic.regs[A_SVR] & SVR_ENABLED && (!best || apic_ppr(&t->lapic) < apic_ppr(&best->lapic)))
            best = t;
    }
    if (best)
        apic_post_mode(best, MODE_FIXED, vector, level);
}

void apic_message(struct vm *vm, u64 address, u32 data)
{
    u32 mode = data >> 8 & 7, dest = address >> 12 & 0xff;
    int logical = address >> 2 & 1, hint = address >> 3 & 1;
    if (mode == MODE_SIPI || mode == MODE_REMOTE)
        return; /* not valid in messages */
    send(vm, 0, TO_DEST, dest, logical, mode, data & 0xff, data >> 15 & 1,
         mode == MODE_LOWEST || (mode == MODE_FIXED && hint && logical));
}

void apic_command(struct cpu *c, u32 low, u32 dest)
{
    u32 mode = low >> 8 & 7, vector = low & 0xff, level = low >> 15 & 1;
    if (mode == MODE_INIT && level && !(low >> 14 & 1))
        return; /* INIT level de-assert: nothing to do since the Pentium 4 */
    if (mode == MODE_REMOTE || mode == MODE_EXTINT)
        return;
    if (mode <= MODE_LOWEST && vector < 16) {
        apic_error(c, ESR_SEND_VECTOR);
        return;
    }
    level = level && mode <= MODE_LOWEST && low >> 14 & 1;
    send(c->vm, c, low >> 18 & 3, dest, low >> 11 & 1, mode, vector, level, mode == MODE_LOWEST);
}

u64 apic_pv_ipi(struct cpu *c, u64 low, u64 high, u64 first, u64 icr)
{
    u32 width = c->mode & MODE_64 ? 64 : 32, mode = icr >> 8 & 7, sent = 0;
    if (icr & (3 << 18 | 1 << 11)) /* no shorthand, no logical destination */
        return -(u64)22;           /* KVM_EINVAL */
    for (u32 i = 0; i < c->vm->ncpus && i < MAX_CPUS; i++) {
        struct cpu *t = c->vm->cpus[i];
        u64 bit = t ? t->lapic.id - first : 0;
        if (!t || !t->lapic.enabled || t->lapic.id < first || bit >= 2 * width || !((bit < width ? low : high) >> bit % width & 1))
            continue;
        if (mode != MODE_REMOTE && mode != MODE_EXTINT && (mode > MODE_LOWEST || (icr & 0xff) >= 16)) {
            apic_post_mode(t, mode, icr & 0xff, 0);
            sent++;
        }
    }
    return sent;
}

int apic_extint_enabled(struct cpu *c)
{
    const struct lapic *l = &c->lapic;
    if (!l->enabled || c->extint & 2)
        return 1;
    return (l->regs[A_LINT0] & (LVT_MASKED | 0x700)) == MODE_EXTINT << 8;
}
