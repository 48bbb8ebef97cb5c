/* Flags, mode, stacks, and what is looked at between two instructions. */
#include "sys.h"
#include "internal.h"

/* ---- flags and mode ---- */

u64 get_eflags(struct cpu *c)
{
    return (c->eflags & ~(u64)F_ARITH) | ((c->fl >> 8) & 0xd5) | (c->fl & 1 ? F_OF : 0) | 2;
}

void set_eflags(struct cpu *c, u64 value)
{
    c->debug = (c->debug & ~(u32)DEBUG_RF) | (value & F_RF ? DEBUG_RF : 0);
    c->fl = (((value & 0xd5) | 2) << 8) | ((value >> 11) & 1);
    c->eflags = (value & FLAGS_SYSTEM) | 2;
    if ((value & F_IF) && c->irq_pending)
        c->poll = 1;
}

static int flat(const struct seg *s) { return s->base == 0 && s->limit == 0xffffffffu && !(s->attr & SEG_UNUSABLE); }
static int flat_data(const struct seg *s) { return flat(s) && (s->attr & 0xe) == 2; }

/* What offsets a protected-mode segment lets through (Intel SDM vol. 3, 5.3). */
static struct limit limit_of(u32 attr, u64 limit)
{
    u64 low = 0, span = limit + 1;
    if (attr & SEG_UNUSABLE)
        return (struct limit){0, 0, 0};
    if ((attr & (ATTR_CODE | 4)) == 4) /* expand-down data */
        low = limit + 1, span = (attr & ATTR_DB ? 0x100000000ul : 0x10000) - (low > 0x10000 && !(attr & ATTR_DB) ? 0x10000 : low);
    return (struct limit){low, attr & ATTR_CODE && !(attr & ATTR_RW) ? 0 : span, attr & ATTR_CODE || !(attr & ATTR_RW) ? 0 : span};
}

/* 0, or #GP(0) or #SS(0) when the bytes are not all in the segment. */
int check_segment(struct cpu *c, int n, u64 off, u64 size, int write)
{
    const struct limit *l = &c->limits[n];
    if (c->mode & MODE_64 || !(c->mode & MODE_PE) || (u64)(u32)(off - l->low) + size <= (write ? l->write : l->read))
        return 0;
    return fault(c, n == SS ? EX_SS : EX_GP, 0);
}

void update_mode(struct cpu *c)
{
    u32 m = 0, pe = c->cr0 & CR0_PE, vm = pe && (c->eflags & F_VM), cs = c->seg[CS].attr;

    c->cpl = !pe ? 0 : vm ? 3 : SEG_DPL(c->seg[SS]);
    if (c->cpl == 3)
        m |= MODE_CPL3;
    if (c->efer & EFER_LMA)
        m |= MODE_LMA;
    if ((m & MODE_LMA) && (cs & ATTR_L)) {
        m |= MODE_64 | MODE_FLAT;
    } else {
        if (cs & ATTR_DB)
            m |= MODE_32;
        if (c->seg[SS].attr & ATTR_DB)
            m |= MODE_SS32;
        if (flat(&c->seg[CS]) && flat_data(&c->seg[SS]) && flat_data(&c->seg[DS]) && flat_data(&c->seg[ES]))
            m |= MODE_FLAT;
    }
    if (c->cr0 & (CR0_TS | CR0_EM))
        m |= MODE_NOFPU;
    if (!(c->cr4 & CR4_OSFXSR))
        m |= MODE_NOSSE;
    if (!(c->cr4 & CR4_OSXSAVE) || (c->guest_xcr0 & 6) != 6)
        m |= MODE_NOAVX;
    c->armed = unlikely(c->dr[7] & 0xff || c->vm->points) ? debug_armed(c) : 0;
    if (c->eflags & F_TF || c->shadow || c->once || c->armed & ARMED_CODE || c->stepping || c->pointed)
        m |= MODE_STEP;
    if (vm)
        m |= MODE_VM86;
    else if (pe)
        m |= MODE_PE;
    if (c->cpl <= ((c->eflags & F_IOPL) >> 12))
        m |= MODE_IOPL;
    if (c->cpl == 3 && c->cr0 & CR0_AM && c->eflags & F_AC)
        m |= MODE_AC;
    c->mode = m;
    for (int i = 0; i < 6; i++) {
        c->segbase[i] = (u32)c->seg[i].base;
        c->limits[i] = limit_of(c->seg[i].attr, c->seg[i].limit);
    }
    c->fsbase = c->seg[FS].base;
    c->gsbase = c->seg[GS].base;
    if (unlikely(c->smap_open) && !(c->eflags & F_AC))
        smap_close(c);
}

/* Interrupts wait until the next instruction is done, after MOV SS and POP SS debug exceptions, too. */
void set_shadow(struct cpu *c, u32 kind)
{
    if (kind == SHADOW_SS && c->debug & DEBUG_BEHIND_SS)
        return; /* of several in a row only the first one does (SDM vol. 3, 6.8.3) */
    c->shadow = kind;
    update_mode(c);
}

/* ---- memory with supervisor rights, and stacks ---- */

/* An access that is not RAM's: what Python did when this helper was called before, or it is to do it. */
static int device(struct cpu *c, u64 linear, u64 *value, u32 size, u32 write)
{
    struct device *d = &c->device;
    struct device_access *a = &d->log[d->at];
    if (!d->on)
        return -1;
    if (d->at == MAX_DEVICE || size > 8 || d->changed > 8) { /* no helper does, unless another processor goes on changing a TSS */
        *value = ~0ul;
        return 0;
    }
    if (d->at < d->count && a->linear == linear && a->size == size && a->write == write) {
        d->at++;
        if (!write)
            *value = a->value;
        return 0;
    }
    d->changed += d->at < d->count;
    d->count = d->at;
    *a = (struct device_access){linear, write ? *value : 0, size, write};
    c->reason = R_DEVICE;
    return PENDING;
}

int linear_read(struct cpu *c, u64 linear, void *to, u32 size, int user)
{
    int r = vread(c, linear, to, size, user);
    if (unlikely(c->armed & ARMED_DATA) && r <= 0)
        debug_access(c, linear, size, 0);
    if (unlikely(r < 0)) {
        u64 value;
        if (!(r = device(c, linear, &value, size, 0)))
            memcpy(to, &value, size < 8 ? size : 8);
        return r;
    }
    return r > 0 && r != EX_PF ? fault(c, r, 0) : r;
}

int linear_write(struct cpu *c, u64 linear, const void *from, u32 size, int user)
{
    int r = vwrite(c, linear, from, size, user);
    if (unlikely(c->armed & ARMED_DATA) && r <= 0)
        debug_access(c, linear, size, 1);
    if (unlikely(r < 0)) {
        u64 value = 0;
        if (c->device.on && size <= 8) {
            memcpy(&value, from, size);
            r = device(c, linear, &value, size, 1);
        }
        return r;
    }
    return r > 0 && r != EX_PF ? fault(c, r, 0) : r;
}

int sys_read(struct cpu *c, u64 linear, void *to, u32 size)
{
    int r = vread(c, linear, to, size, AS_SYSTEM); /* meets no breakpoint */
    if (r >= 0)
        return r > 0 && r != EX_PF ? fault(c, r, 0) : r;
    for (u32 i = 0; i < size; i++) /* a table outside RAM: as an open bus */
        ((u8 *)to)[i] = 0xff;
    return 0;
}

int sys_write(struct cpu *c, u64 linear, const void *from, u32 size)
{
    int r = vwrite(c, linear, from, size, AS_SYSTEM);
    return r < 0 ? 0 : r > 0 && r != EX_PF ? fault(c, r, 0) : r; /* ROM and empty space drop writes */
}

struct stack current_stack(const struct cpu *c)
{
    struct stack s = {c->gpr[RSP], c->segbase[SS], 0xffff, c->cpl == 3, 0, {0, ~0ul, ~0ul}, c->mode & MODE_AC};
    if (c->mode & MODE_PE)
        s.limit = c->limits[SS];
    if (c->mode & MODE_64)
        s.base = 0, s.mask = ~0ul;
    else if (c->mode & MODE_SS32)
        s.mask = 0xffffffff;
    return s;
}

struct stack stack_of(u64 ss_desc, u64 sp, int long_stack, int user, u32 error)
{
    struct stack s = {sp, 0, ~0ul, user, error, {0, ~0ul, ~0ul}, 0};
    if (!long_stack) {
        s.limit = limit_of(desc_attr(ss_desc), desc_limit(ss_desc));
        s.base = ((ss_desc >> 16) & 0xffffff) | ((ss_desc >> 32) & 0xff000000);
        s.mask = desc_attr(ss_desc) & ATTR_DB ? 0xffffffff : 0xffff;
    }
    return s;
}

static int misaligned(struct cpu *c, const struct stack *s, u64 linear, u32 size)
{
    return s->checked && linear & (size - 1) ? fault(c, EX_AC, 0) : 0;
}

static int stack_linear(struct cpu *c, const struct stack *s, u32 size, int write, u64 *linear)
{
    if (s->mask == ~0ul) {
        *linear = s->sp;
        return !canonical(s->sp) || !canonical(s->sp + size - 1) ? fault(c, EX_SS, s->error) : misaligned(c, s, *linear, size);
    }
    if ((u64)(u32)((s->sp & s->mask) - s->limit.low) + size > (write ? s->limit.write : s->limit.read))
        return fault(c, EX_SS, s->error);
    *linear = (u32)(s->base + (s->sp & s->mask));
    return misaligned(c, s, *linear, size);
}

static int rights(const struct stack *s) { return s->user | (s->mask == ~0ul ? AS_WIDE : 0); }

int push(struct cpu *c, struct stack *s, u32 size, u64 value)
{
    struct stack n = *s;
    u64 at;
    int r;
    n.sp = (n.sp & ~n.mask) | ((n.sp - size) & n.mask);
    if ((r = stack_linear(c, &n, size, 1, &at)) || ((r = linear_write(c, at, &value, size, rights(s))) && r != -1))
        return r;
    *s = n; /* an event on a stack outside RAM loses what is pushed */
    return 0;
}

int pop(struct cpu *c, struct stack *s, u32 size, u64 *value)
{
    u64 at;
    int r;
    *value = 0;
    if ((r = stack_linear(c, s, size, 0, &at)) || ((r = linear_read(c, at, value, size, rights(s))) && r != -1))
        return r;
    if (r)
        *value = size_mask(size);
    s->sp = (s->sp & ~s->mask) | ((s->sp + size) & s->mask);
    return 0;
}

/* The fault that writing at the stack pointer would raise, if it would. */
int probe_stack(struct cpu *c, const struct stack *s)
{
    u64 at, phys;
    u32 global, writable;
    int r = stack_linear(c, s, 1, 1, &at);
    return r ? r : walk(c, at, ACC_WRITE, s->user, &phys, &global, &writable);
}

/* RSP from a stack: all of it, or only SP where the stack is 16 bits wide. */
void set_sp(struct cpu *c, const struct stack *s)
{
    c->gpr[RSP] = s->mask == 0xffff ? (c->gpr[RSP] & ~0xfffful) | (s->sp & 0xffff) : s->sp & s->mask;
}

int tss_stack64(struct cpu *c, u32 offset, u32 ext, u64 *sp)
{
    int r;
    if (offset + 7 > c->seg[TR].limit)
        return fault(c, EX_TS, (c->seg[TR].sel & 0xfffc) | ext);
    if ((r = sys_read(c, c->seg[TR].base + offset, sp, 8)))
        return r;
    return canonical(*sp) ? 0 : fault(c, EX_SS, ext);
}

/* The stack for privilege level *cpl* from a 16- or 32-bit TSS, with the checks of its segment (SDM vol. 2, INT n). */
int tss_stack(struct cpu *c, u32 cpl, u32 ext, u32 *ss, u64 *sp, u64 *desc, u64 *at)
{
    const struct seg *tr = &c->seg[TR];
    u32 wide = tr->attr & 8, off = wide ? 4 + 8 * cpl : 2 + 4 * cpl, attr;
    u64 value = 0;
    int r;

    if (off + (wide ? 5 : 3) > tr->limit)
        return fault(c, EX_TS, (tr->sel & 0xfffc) | ext);
    if ((r = sys_read(c, (u32)(tr->base + off), &value, wide ? 6 : 4)))
        return r;
    *sp = wide ? (u32)value : (u16)value;
    *ss = (u16)(value >> (wide ? 32 : 16));
    if (!(*ss & 0xfffc))
        return fault(c, EX_TS, ext);
    if ((r = descriptor(c, *ss, desc, at)) > 0)
        return r;
    attr = desc_attr(*desc);
    if (r || (*ss & 3) != cpl || attr_dpl(attr) != cpl || !is_writable(attr))
        return fault(c, EX_TS, (*ss & 0xfffc) | ext);
    if (!(attr & ATTR_P))
        return fault(c, EX_SS, (*ss & 0xfffc) | ext);
    return mark_accessed(c, desc, *at);
}

void null_segment(struct cpu *c, int n)
{
    c->seg[n] = (struct seg){.attr = SEG_UNUSABLE};
}

/* Load a segment register in real (limit and attributes stay) or virtual-8086 mode. */
void real_segment(struct cpu *c, int n, u32 sel)
{
    struct seg *s = &c->seg[n];
    if (c->eflags & F_VM)
        s->limit = 0xffff, s->attr = 0xf3;
    else if (s->attr & SEG_UNUSABLE)
        s->limit = 0xffff, s->attr = 0x93;
    s->sel = (u16)sel;
    s->base = (u64)(u16)sel << 4;
}

/* ---- events ---- */

/* What is pending now: H_*, or -1 for nothing. */
static int events(struct cpu *c)
{
    struct lapic *l = &c->lapic;
    int extint, vector, apic = c->vm->has_lapic && l->enabled;

    __atomic_store_n(&c->poll, 0, __ATOMIC_SEQ_CST); /* first: what comes later sets it again */
    if (c->vm->closing) {
        c->poll = 1;
        return exit_to(c, R_STOPPED, 0);
    }
    if (__atomic_load_n(&c->vm->stopping, __ATOMIC_SEQ_CST)) {
        world_leave(c);
        world_enter(c);
    }
    if (__atomic_exchange_n(&c->kicked, 0, __ATOMIC_SEQ_CST)) {
        c->poll = 1;
        return exit_to(c, R_POLL, 0);
    }
    if (c->shutdown && !l->init) {
        c->poll = 1;
        return exit_to(c, R_SHUTDOWN, c->shutdown - 1);
    }
    if (__atomic_exchange_n(&l->init, 0, __ATOMIC_SEQ_CST)) {
        c->poll = 1;
        return exit_to(c, R_INIT, 0);
    }
    if (l->sipi) {
        u32 sipi = __atomic_exchange_n(&l->sipi, 0, __ATOMIC_SEQ_CST);
        if (sipi && c->startup) {
            c->poll = 1;
            return exit_to(c, R_SIPI, sipi & 0xff);
        }
    }
    if (c->startup)
        return -1;
    if (c->shadow && !c->halted)
        return -1; /* h_begin() of the next instruction ends it, and polls again */
    if (unlikely(c->stepping) && !c->halted) { /* a debugger steps: what it looks at goes on, not a handler */
        c->irq_pending = 1;
        return -1;
    }
    if (__atomic_load_n(&l->nmi, __ATOMIC_SEQ_CST) && !c->nmi_blocked) {
        __atomic_sub_fetch(&l->nmi, 1, __ATOMIC_SEQ_CST); /* others only add; the next one waits for IRET */
        c->poll = 1;
        c->halted = 0;
        __atomic_store_n(&c->nmi_blocked, 1, __ATOMIC_SEQ_CST);
        return deliver(c, EX_NMI, 0, 0, EVENT_EXTERNAL);
    }
    extint = c->extint && (!apic || apic_extint_enabled(c));
    vector = apic ? apic_pending(c) : -1;
    c->irq_pending = extint || vector >= 0;
    if (!c->irq_pending || !(c->eflags & F_IF))
        return -1;
    if (extint) {
        __atomic_and_fetch(&c->extint, ~2u, __ATOMIC_SEQ_CST); /* an ExtINT message, see apic.c: taken */
        c->poll = 1;
        return exit_to(c, R_EXTINT, 0);
    }
    vector = apic_accept(c);
    c->poll = 1; /* another may wait */
    c->halted = 0;
    return deliver(c, vector, 0, 0, EVENT_EXTERNAL);
}

int check_events(struct cpu *c)
{
    for (;;) {
        u32 seq = __atomic_load_n(&c->wake, __ATOMIC_SEQ_CST);
        u64 now, deadline;
        struct { s64 sec, nsec; } timeout;
        int r = events(c);

        if (r >= 0)
            return r;
        if (!c->halted && !c->startup)
            return H_REDIRECT;
        if (c->poll)
            continue;
        if (!c->vm->has_lapic) {
            c->poll = 1; /* look again when run again */
            return exit_to(c, R_HALTED, 0);
        }
        deadline = c->startup ? ~0ul : apic_next_deadline(c);
        if (deadline != ~0ul) {
            now = now_ns();
            if (deadline <= now) {
                apic_timer_expire(c, now);
                continue;
            }
            timeout.sec = (deadline - now) / 1000000000;
            timeout.nsec = (deadline - now) % 1000000000;
        }
        world_leave(c);
        if (!irq_wait(c, seq, deadline != ~0ul ? &timeout : 0)) {
            __atomic_store_n(&c->sleeping, 1, __ATOMIC_SEQ_CST); /* wake_cpu counts up before it looks at this */
            sys_futex(&c->wake, 128 /* FUTEX_WAIT | FUTEX_PRIVATE_FLAG */, seq, deadline != ~0ul ? &timeout : 0);
            __atomic_store_n(&c->sleeping, 0, __ATOMIC_SEQ_CST);
        }
        world_enter(c);
    }
}
