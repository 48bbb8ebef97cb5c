/* Flags, mode, events and the delivery of exceptions and interrupts (Intel SDM vol. 3, chapter 6). */
#include "sys.h"

/* ---- flags and mode ---- */

u64 get_eflags(struct cpu *c)
{
    return (c->eflags & ~(u64)F_ARITH) | ((c->fl >> 8) & 0xd5) | (c->fl & 1 ? F_OF : 0) | 2;
}

void set_eflags(struct cpu *c, u64 value)
{
    /* RF lasts for one instruction and only masks code breakpoints, which do not exist here: it is never kept. */
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
    if (c->eflags & F_TF)
        m |= MODE_TF;
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
}

/* ---- memory with supervisor rights, and stacks ---- */

int linear_read(struct cpu *c, u64 linear, void *to, u32 size, int user)
{
    int r = vread(c, linear, to, size, user);
    return r > 0 && r != EX_PF ? fault(c, r, 0) : r;
}

int linear_write(struct cpu *c, u64 linear, const void *from, u32 size, int user)
{
    int r = vwrite(c, linear, from, size, user);
    return r > 0 && r != EX_PF ? fault(c, r, 0) : r;
}

int sys_read(struct cpu *c, u64 linear, void *to, u32 size)
{
    int r = linear_read(c, linear, to, size, 0);
    if (r >= 0)
        return r;
    for (u32 i = 0; i < size; i++) /* a table outside RAM: as an open bus */
        ((u8 *)to)[i] = 0xff;
    return 0;
}

int sys_write(struct cpu *c, u64 linear, const void *from, u32 size)
{
    int r = linear_write(c, linear, from, size, 0);
    return r < 0 ? 0 : r; /* ROM and empty space drop writes */
}

struct stack current_stack(const struct cpu *c)
{
    struct stack s = {c->gpr[RSP], c->segbase[SS], 0xffff, c->cpl == 3, 0};
    if (c->mode & MODE_64)
        s.base = 0, s.mask = ~0ul;
    else if (c->mode & MODE_SS32)
        s.mask = 0xffffffff;
    return s;
}

struct stack stack_of(const struct cpu *c, u64 ss_desc, u64 sp, int long_stack, int user)
{
    struct stack s = {sp, 0, ~0ul, user, 0};
    (void)c;
    if (!long_stack) {
        s.base = ((ss_desc >> 16) & 0xffffff) | ((ss_desc >> 32) & 0xff000000);
        s.mask = desc_attr(ss_desc) & ATTR_DB ? 0xffffffff : 0xffff;
    }
    return s;
}

static int stack_linear(struct cpu *c, const struct stack *s, u32 size, u64 *linear)
{
    if (s->mask == ~0ul) {
        *linear = s->sp;
        return canonical(s->sp) && canonical(s->sp + size - 1) ? 0 : fault(c, EX_SS, s->error);
    }
    *linear = (u32)(s->base + (s->sp & s->mask));
    return 0;
}

int push(struct cpu *c, struct stack *s, u32 size, u64 value)
{
    struct stack n = *s;
    u64 at;
    int r;
    n.sp = (n.sp & ~n.mask) | ((n.sp - size) & n.mask);
    if ((r = stack_linear(c, &n, size, &at)) || (r = linear_write(c, at, &value, size, s->user)) > 0)
        return r;
    *s = n; /* r < 0: a stack outside RAM loses what is pushed */
    return 0;
}

int pop(struct cpu *c, struct stack *s, u32 size, u64 *value)
{
    u64 at;
    int r;
    *value = 0;
    if ((r = stack_linear(c, s, size, &at)) || (r = linear_read(c, at, value, size, s->user)) > 0)
        return r;
    if (r < 0)
        *value = size_mask(size);
    s->sp = (s->sp & ~s->mask) | ((s->sp + size) & s->mask);
    return 0;
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

/* ---- delivery ---- */

struct event { u32 vector, has_error, error, kind, ext; u64 ret, flags; };

static int real_interrupt(struct cpu *c, const struct event *e)
{
    struct stack s = current_stack(c);
    u32 entry = 0;
    int r;
    if (e->vector * 4 + 3 > c->idt.limit)
        return fault(c, EX_GP, e->vector * 8 + 2);
    if ((r = sys_read(c, (u32)(c->idt.base + e->vector * 4), &entry, 4)) || (r = push(c, &s, 2, e->flags)) ||
        (r = push(c, &s, 2, c->seg[CS].sel)) || (r = push(c, &s, 2, e->ret)))
        return r;
    set_sp(c, &s);
    real_segment(c, CS, entry >> 16);
    c->rip = entry & 0xffff;
    c->eflags &= ~(u64)(F_IF | F_TF | F_AC | F_RF);
    return 0;
}

/* The code segment of a gate: 0 and its descriptor, or the fault. */
static int gate_code(struct cpu *c, u32 sel, u32 ext, u64 *desc, u64 *at)
{
    u32 attr, error = (sel & 0xfffc) | ext;
    int r;
    if (!(sel & 0xfffc))
        return fault(c, EX_GP, ext);
    if ((r = descriptor(c, sel, desc, at)) > 0)
        return r;
    attr = desc_attr(*desc);
    if (r || !is_code(attr) || attr_dpl(attr) > c->cpl)
        return fault(c, EX_GP, error);
    if (!(attr & ATTR_P))
        return fault(c, EX_NP, error);
    return 0;
}

static int long_interrupt(struct cpu *c, const struct event *e)
{
    u32 idt_error = e->vector * 8 | 2 | e->ext, type, sel, attr, cpl, ist, n = 0;
    u64 gate[2], desc, at, target, sp = c->gpr[RSP], frame[6];
    int r;

    if (e->vector * 16 + 15 > c->idt.limit)
        return fault(c, EX_GP, idt_error);
    if ((r = sys_read(c, c->idt.base + e->vector * 16, gate, 16)))
        return r;
    type = (gate[0] >> 40) & 0x1f;
    if ((type & 0x1e) != 14 || (e->kind == EVENT_SOFT && ((gate[0] >> 45) & 3) < c->cpl))
        return fault(c, EX_GP, idt_error);
    if (!(gate[0] >> 47 & 1))
        return fault(c, EX_NP, idt_error);
    sel = (u16)(gate[0] >> 16);
    ist = (gate[0] >> 32) & 7;
    target = (gate[0] & 0xffff) | (gate[0] >> 48 << 16) | gate[1] << 32;
    if ((r = gate_code(c, sel, e->ext, &desc, &at)))
        return r;
    attr = desc_attr(desc);
    if ((attr & (ATTR_L | ATTR_DB)) != ATTR_L)
        return fault(c, EX_GP, (sel & 0xfffc) | e->ext);
    cpl = attr & ATTR_CONFORMING ? c->cpl : attr_dpl(attr);
    if (ist)
        r = tss_stack64(c, 28 + 8 * ist, e->ext, &sp);
    else if (cpl != c->cpl)
        r = tss_stack64(c, 4 + 8 * cpl, e->ext, &sp);
    else if (!(c->mode & MODE_64))
        sp &= c->mode & MODE_SS32 ? 0xffffffff : 0xffff;
    if (r)
        return r;
    if (!canonical(target))
        return fault(c, EX_GP, e->ext);
    if (e->has_error)
        frame[n++] = e->error;
    frame[n++] = e->ret;
    frame[n++] = c->seg[CS].sel;
    frame[n++] = e->flags;
    frame[n++] = c->gpr[RSP];
    frame[n++] = c->seg[SS].sel;
    sp = (sp & ~15ul) - n * 8;
    if (!canonical(sp) || !canonical(sp + n * 8 - 1))
        return fault(c, EX_SS, e->ext);
    if ((r = mark_accessed(c, &desc, at)) || (r = linear_write(c, sp, frame, n * 8, cpl == 3)) > 0)
        return r;
    set_segment(c, CS, (sel & 0xfffc) | cpl, desc);
    if (cpl != c->cpl) {
        null_segment(c, SS);
        c->seg[SS].sel = (u16)cpl;
        c->seg[SS].attr |= cpl << 5;
    }
    c->gpr[RSP] = sp;
    c->rip = target;
    c->eflags &= ~(u64)(F_TF | F_NT | F_RF | F_VM | (type & 1 ? 0 : F_IF));
    return 0;
}

static int protected_interrupt(struct cpu *c, const struct event *e)
{
    static const u8 v86_order[4] = {GS, FS, DS, ES};
    u32 idt_error = e->vector * 8 | 2 | e->ext, type, sel, attr, cpl, ss = 0, vm = c->mode & MODE_VM86, size;
    u64 gate, desc, at, ss_desc = 0, ss_at = 0, target, sp;
    struct stack s = current_stack(c);
    int r;

    if (e->vector * 8 + 7 > c->idt.limit)
        return fault(c, EX_GP, idt_error);
    if ((r = sys_read(c, (u32)(c->idt.base + e->vector * 8), &gate, 8)))
        return r;
    type = (gate >> 40) & 0x1f;
    if (!(type == 5 || (type & 0x17) == 6 || (type & 0x17) == 7) ||
        (e->kind == EVENT_SOFT && ((gate >> 45) & 3) < c->cpl))
        return fault(c, EX_GP, idt_error);
    if (!(gate >> 47 & 1))
        return fault(c, EX_NP, idt_error);
    sel = (u16)(gate >> 16);
    if (type == 5)
        return task_switch(c, sel, TASK_INT, e->ret, e->ext, e->has_error, e->error);
    size = type & 8 ? 4 : 2;
    target = (gate & 0xffff) | (type & 8 ? gate >> 48 << 16 : 0);
    if ((r = gate_code(c, sel, e->ext, &desc, &at)))
        return r;
    attr = desc_attr(desc);
    cpl = attr & ATTR_CONFORMING ? c->cpl : attr_dpl(attr);
    if (vm && cpl)
        return fault(c, EX_GP, (sel & 0xfffc) | e->ext);
    if (target > desc_limit(desc))
        return fault(c, EX_GP, e->ext);
    if (cpl != c->cpl) {
        if ((r = tss_stack(c, cpl, e->ext, &ss, &sp, &ss_desc, &ss_at)))
            return r;
        s = stack_of(c, ss_desc, sp, 0, cpl == 3);
        for (int i = 0; vm && i < 4; i++)
            if ((r = push(c, &s, size, c->seg[v86_order[i]].sel)))
                return r;
        if ((r = push(c, &s, size, c->seg[SS].sel)) || (r = push(c, &s, size, c->gpr[RSP])))
            return r;
    }
    if ((r = push(c, &s, size, e->flags)) || (r = push(c, &s, size, c->seg[CS].sel)) || (r = push(c, &s, size, e->ret)) ||
        (e->has_error && (r = push(c, &s, size, e->error))) || (r = mark_accessed(c, &desc, at)))
        return r;
    c->eflags &= ~(u64)(F_TF | F_NT | F_RF | F_VM | (type & 1 ? 0 : F_IF));
    for (int i = 0; vm && i < 4; i++)
        null_segment(c, v86_order[i]);
    if (cpl != c->cpl) {
        set_segment(c, SS, (ss & 0xfffc) | cpl, ss_desc);
        c->gpr[RSP] = s.sp & 0xffffffff; /* the upper half of ESP is the new stack's even if SS.B is clear */
    } else {
        set_sp(c, &s);
    }
    set_segment(c, CS, (sel & 0xfffc) | cpl, desc);
    c->rip = target;
    return 0;
}

static int transfer(struct cpu *c, struct event *e)
{
    int r;
    e->flags = get_eflags(c) & ~(u64)F_RF;
    if (e->kind == EVENT_EXCEPTION && e->vector != EX_DB && e->vector != EX_DF && e->vector != EX_MC)
        e->flags |= F_RF; /* a fault: its restart must not hit the same code breakpoint */
    e->ext = e->kind != EVENT_SOFT;
    if (!(c->cr0 & CR0_PE))
        r = real_interrupt(c, e);
    else if (long_mode(c))
        r = long_interrupt(c, e);
    else
        r = protected_interrupt(c, e);
    return r;
}

static int contributory(u32 v) { return v == EX_DE || (v >= EX_TS && v <= EX_GP); }

/* Deliver an event; a fault on the way is delivered in its place, becomes #DF or shuts the processor down (SDM vol. 3,
 * table 6-5). *ret* is the address to push for the event itself; faults on the way push cpu.rip. */
int dispatch(struct cpu *c, u32 vector, u32 has_error, u32 error, u32 kind, u64 ret)
{
    struct event e = {.vector = vector, .has_error = has_error, .error = error, .kind = kind, .ret = ret};

    c->stepping = 0;
    for (;;) {
        int r;
        c->last_vector = e.vector;
        if (e.vector == EX_DB && e.kind == EVENT_EXCEPTION)
            c->dr[7] &= ~0x2000ul; /* GD */
        if (!(r = transfer(c, &e))) {
            update_mode(c);
            return H_REDIRECT;
        }
        update_mode(c); /* nothing was committed, except by a task switch */
        if (e.kind == EVENT_EXCEPTION && e.vector == EX_DF) {
            c->shutdown = vector + 1; /* whoever raised it: nothing runs any more */
            c->poll = 1;
            return exit_to(c, R_SHUTDOWN, vector);
        }
        if (e.kind == EVENT_EXCEPTION &&
            ((contributory(e.vector) && contributory(r)) || (e.vector == EX_PF && (contributory(r) || r == EX_PF)))) {
            e.vector = EX_DF;
            e.error = 0;
        } else {
            e.vector = r;
            e.error = c->scratch[3];
        }
        e.kind = EVENT_EXCEPTION;
        e.has_error = 1;
        e.ret = c->rip;
    }
}

int deliver(struct cpu *c, u32 vector, u32 has_error, u32 error, u32 soft)
{
    return dispatch(c, vector, has_error, error, soft, c->rip);
}

int raise(struct cpu *c, u32 vector, u32 has_error, u32 error)
{
    return dispatch(c, vector, has_error, error, EVENT_EXCEPTION, c->rip);
}

/* The single-step trap after an instruction; cpu.rip is the next one's address. */
int single_step(struct cpu *c)
{
    c->dr[6] |= 0x4000;
    return raise(c, EX_DB, 0, 0);
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
    if (c->shadow) {
        c->shadow = 0;
        c->poll = 1;
        return -1;
    }
    if (l->nmi && !c->nmi_blocked && __atomic_exchange_n(&l->nmi, 0, __ATOMIC_SEQ_CST)) {
        c->poll = 1;
        c->halted = 0;
        c->nmi_blocked = 1;
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
        __atomic_store_n(&c->sleeping, 1, __ATOMIC_SEQ_CST); /* wake_cpu counts up before it looks at this */
        sys_futex(&c->wake, 128 /* FUTEX_WAIT | FUTEX_PRIVATE_FLAG */, seq, deadline != ~0ul ? &timeout : 0);
        __atomic_store_n(&c->sleeping, 0, __ATOMIC_SEQ_CST);
        world_enter(c);
    }
}
