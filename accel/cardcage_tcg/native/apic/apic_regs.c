/* The local APIC's registers as its own vCPU sees them: the page, the x2APIC's MSRs, the base MSR; and what Python calls. */
#include "apic.h"

/* ---- registers ---- */

static u32 lvt_bits(const struct cpu *c, u32 index)
{
    switch (index) {
    case A_TIMER: return c->vm->has_lapic & H_LAPIC_DEADLINE ? 0x700ff : 0x300ff;
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
    value &= lvt_bits(c, index);
    if (!(l->regs[A_SVR] & SVR_ENABLED))
        value |= LVT_MASKED;
    spin_lock(&l->timer_lock);
    l->regs[index] = value;
    if (index == A_TIMER && old != timer_mode(l)) {
        if (old == TIMER_DEADLINE || timer_mode(l) >= TIMER_DEADLINE) {
            timer_disarm(l);
            l->tsc_deadline = 0;
            l->timer_period = 0;
        } else { /* it counts on from where it is; a count that has come to zero stays there */
            timer_change(c, old == TIMER_PERIODIC);
        }
    }
    spin_unlock(&l->timer_lock);
    if (index == A_LINT0 && c->extint)
        c->poll = 1;
}

static int end_of_interrupt(struct cpu *c)
{
    struct lapic *l = &c->lapic;
    int v = apic_highest(l->isr);
    if (v < 0)
        return H_CONTINUE;
    apic_clear(l->isr, (u32)v);
    apic_recheck(c);
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
    case A_PPR: *value = apic_ppr(l); return 0;
    case A_TCCR: *value = timer_count(c); return 0;
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
        apic_recheck(c);
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
        apic_command(c, value, l->regs[A_ICR2] >> 24);
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
        timer_start(c, value);
        break;
    case A_DCR:
        spin_lock(&l->timer_lock);
        left = timer_count(c);
        l->regs[A_DCR] = value & 11;
        if (left) { /* what is left counts on at the new speed */
            u64 period = timer_ns(c, l->regs[A_TICR]), rest = timer_ns(c, left);
            timer_disarm(l);
            l->timer_period = period ? period : 1;
            l->timer_start = now_ns() + rest - l->timer_period;
            timer_arm(c, l->timer_start + l->timer_period);
        }
        spin_unlock(&l->timer_lock);
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
        apic_error(c, ESR_REGISTER);
    return 0;
}

int apic_write(struct cpu *c, u32 offset, u32 value)
{
    int r = write_register(c, offset >> 4 & 0xff, value);
    if (r >= 0)
        return r;
    apic_error(c, ESR_REGISTER);
    return H_CONTINUE;
}

/* ---- MSRs ---- */

static void reset_registers(struct cpu *c)
{
    struct lapic *l = &c->lapic;
    spin_lock(&l->timer_lock);
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
    timer_disarm(l);
    spin_unlock(&l->timer_lock);
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
    if (value >> PHYS_BITS || value & (c->vm->has_lapic & H_LAPIC_X2 ? 0x2ff : 0x2ff | BASE_X2))
        return EX_GP;
    if (mode == BASE_X2 || (was == (BASE_ENABLED | BASE_X2) && mode == BASE_ENABLED) ||
        (was == 0 && mode == (BASE_ENABLED | BASE_X2)))
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
static u64 x2_writable(const struct cpu *c, u32 index)
{
    switch (index) {
    case A_TPR: return 0xff;
    case A_EOI: case A_ESR: return 0;
    case A_SVR: return 0x13ff;
    case A_ICR: return 0xffffffff000ccffful;
    case A_TIMER: case A_LINT0: case A_LINT1: case A_ERROR: case A_THERMAL: case A_PERF: return lvt_bits(c, index) | 0x5000;
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
    if (value & ~x2_writable(c, index))
        return EX_GP;
    if (index == A_ICR) {
        l->regs[A_ICR] = (u32)value & ~0x1000u;
        l->regs[A_ICR2] = (u32)(value >> 32);
        apic_command(c, (u32)value, (u32)(value >> 32));
        return 0;
    }
    if (index == A_SELF) {
        if (value < 16)
            apic_error(c, ESR_SEND_VECTOR);
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
        if (!(c->vm->has_lapic & H_LAPIC_DEADLINE))
            return EX_GP;
        if (!write)
            *value = timer_mode(l) == TIMER_DEADLINE ? l->tsc_deadline : 0;
        else if (timer_mode(l) == TIMER_DEADLINE && l->enabled)
            timer_deadline(c, *value);
        return 0;
    }
    if (!l->x2 || msr < 0x800 || msr > 0x83f)
        return EX_GP;
    return write ? x2_write(c, msr - 0x800, *value) : x2_read(c, msr - 0x800, value);
}

/* ---- for Python ---- */

EXPORT void tcg_apic_reset(struct cpu *c) { apic_reset(c); }
/* The registers after INIT; a SIPI that came meanwhile waits. */
EXPORT void tcg_apic_init(struct cpu *c)
{
    reset_registers(c);
    c->poll = 1;
}
EXPORT void tcg_apic_message(struct vm *vm, u64 address, u32 data) { apic_message(vm, address, data); }
EXPORT void tcg_apic_post(struct cpu *c, u32 vector, u32 level) { apic_post(c, vector, level); }
EXPORT int tcg_apic_read(struct cpu *c, u32 offset, u32 *value) { return apic_read(c, offset, value); }
EXPORT int tcg_apic_write(struct cpu *c, u32 offset, u32 value) { return apic_write(c, offset, value); }
EXPORT int tcg_apic_msr(struct cpu *c, u32 msr, int write, u64 *value) { return apic_msr(c, msr, write, value); }

EXPORT void tcg_inject_nmi(struct cpu *c) { apic_post_mode(c, MODE_NMI, 0, 0); }

/* The 1024-byte register page as KVM_GET_LAPIC gives it: 64 registers 16 bytes apart. A timer whose time has come, but not its
 * thread's, has something left of its count: that or the interrupt is there. */
EXPORT void tcg_apic_save(struct cpu *c, u32 page[256])
{
    spin_lock(&c->lapic.timer_lock);
    for (u32 i = 0; i < 64; i++) {
        page[i * 4 + 1] = page[i * 4 + 2] = page[i * 4 + 3] = 0;
        if (read_register(c, i, &page[i * 4]))
            page[i * 4] = 0;
    }
    if (!page[A_TCCR * 4] && timer_mode(&c->lapic) < TIMER_DEADLINE && apic_next_deadline(c) != NEVER)
        page[A_TCCR * 4] = 1;
    spin_unlock(&c->lapic.timer_lock);
}

/* Restore it, the timer with what was left of its count; a deadline is set later, once the TSC is right. cpu.apic_base must be set. */
EXPORT void tcg_apic_load(struct cpu *c, const u32 page[256])
{
    struct lapic *l = &c->lapic;
    l->enabled = (c->apic_base & BASE_ENABLED) != 0;
    l->x2 = l->enabled && c->apic_base & BASE_X2;
    l->id = l->x2 ? page[A_ID * 4] : page[A_ID * 4] >> 24;
    spin_lock(&l->timer_lock);
    timer_disarm(l);
    for (u32 i = 0; i < 64; i++)
        l->regs[i] = page[i * 4];
    for (u32 i = 0; i < 8; i++) {
        l->isr[i] = page[(A_ISR + i) * 4];
        l->tmr[i] = page[(A_TMR + i) * 4];
        l->irr[i] = page[(A_IRR + i) * 4];
    }
    c->cr8 = (l->regs[A_TPR] & 0xff) >> 4;
    l->timer_period = l->timer_start = l->tsc_deadline = 0;
    if (timer_mode(l) < TIMER_DEADLINE && l->regs[A_TICR] && (timer_mode(l) == TIMER_PERIODIC || page[A_TCCR * 4])) {
        u64 rest = timer_ns(c, page[A_TCCR * 4]);
        l->timer_period = timer_ns(c, l->regs[A_TICR]);
        if (!l->timer_period)
            l->timer_period = 1;
        l->timer_start = now_ns() + rest - l->timer_period;
        timer_arm(c, l->timer_start + l->timer_period);
    }
    spin_unlock(&l->timer_lock);
    c->poll = 1;
}
