/* The delivery of exceptions and interrupts (Intel SDM vol. 3, chapter 6). */
#include "sys.h"

struct event { u32 vector, has_error, error, kind, ext; u64 ret, flags; };

static int real_interrupt(struct cpu *c, const struct event *e)
{
    struct stack s = current_stack(c);
    u32 entry = 0;
    int r;
    s.checked = 0;
    if (e->vector * 4 + 3 > c->idt.limit)
        return fault(c, EX_GP, e->vector * 8 + 2);
    if ((r = sys_read(c, (u32)(c->idt.base + e->vector * 4), &entry, 4)) || (r = push(c, &s, 2, e->flags)) ||
        (r = push(c, &s, 2, c->seg[CS].sel)) || (r = push(c, &s, 2, e->ret)))
        return r;
    set_sp(c, &s);
    real_segment(c, CS, entry >> 16);
    c->rip = entry & 0xffff;
    c->eflags &= ~(u64)(F_IF | F_TF | F_AC);
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
    if ((r = mark_accessed(c, &desc, at)) || (r = linear_write(c, sp, frame, n * 8, AS_WIDE | (cpl == 3))) > 0)
        return r;
    set_segment(c, CS, (sel & 0xfffc) | cpl, desc);
    if (cpl != c->cpl) {
        null_segment(c, SS);
        c->seg[SS].sel = (u16)cpl;
        c->seg[SS].attr |= cpl << 5;
    }
    c->gpr[RSP] = sp;
    c->rip = target;
    c->eflags &= ~(u64)(F_TF | F_NT | F_VM | (type & 1 ? 0 : F_IF));
    return 0;
}

static int protected_interrupt(struct cpu *c, const struct event *e)
{
    static const u8 v86_order[4] = {GS, FS, DS, ES};
    u32 idt_error = e->vector * 8 | 2 | e->ext, type, sel, attr, cpl, ss = 0, vm = c->mode & MODE_VM86, size;
    u64 gate, desc, at, ss_desc = 0, ss_at = 0, target, sp;
    struct stack s = current_stack(c);
    int r;

    s.checked = 0;
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
    s.error = e->ext;
    if (cpl != c->cpl) {
        if ((r = tss_stack(c, cpl, e->ext, &ss, &sp, &ss_desc, &ss_at)))
            return r;
        s = stack_of(ss_desc, sp, 0, cpl == 3, (ss & 0xfffc) | e->ext);
        for (int i = 0; vm && i < 4; i++)
            if ((r = push(c, &s, size, c->seg[v86_order[i]].sel)))
                return r;
        if ((r = push(c, &s, size, c->seg[SS].sel)) || (r = push(c, &s, size, c->gpr[RSP])))
            return r;
    }
    if ((r = push(c, &s, size, e->flags)) || (r = push(c, &s, size, c->seg[CS].sel)) || (r = push(c, &s, size, e->ret)) ||
        (e->has_error && (r = push(c, &s, size, e->error))) || (r = mark_accessed(c, &desc, at)))
        return r;
    c->eflags &= ~(u64)(F_TF | F_NT | F_VM | (type & 1 ? 0 : F_IF));
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
    e->flags = get_eflags(c);
    if (e->kind == EVENT_EXCEPTION && e->vector != EX_DB && e->vector != EX_DF && e->vector != EX_MC)
        e->flags |= F_RF; /* a fault: its restart must not hit the same code breakpoint */
    else if (c->debug & DEBUG_RF)
        e->flags |= F_RF; /* IRET has just set it, or this is between two iterations of a string instruction */
    /* no trap after an instruction that raised or entered a handler, but for what a MOV SS met before an INT n */
    c->debug &= e->kind == EVENT_SOFT ? DEBUG_HELD | DEBUG_WATCHED : e->kind == EVENT_INT1 ? DEBUG_WATCHED : 0;
    c->shadow = c->once = 0;
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

    c->device.on = 0; /* nothing calls this again */
    for (;;) {
        int r;
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
