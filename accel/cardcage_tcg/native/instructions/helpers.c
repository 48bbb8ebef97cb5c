/* The table of helpers, those about flags, and what Python calls. */
#include "sys.h"
#include "helpers.h"

#define HELPER(name, function) function,
int (*const helpers[])(struct cpu *c, u32 arg) = {HELPERS};
#undef HELPER

int helper_call(struct cpu *c, u32 arg)
{
    c->device.on = 1;
    c->device.arg = arg;
    c->device.count = c->device.at = c->device.changed = 0;
    return helpers[arg & 0xff](c, arg);
}

int h_raise(struct cpu *c, u32 arg) { return raise(c, ARG_IMM(arg) & 0xff, ARG_IMM(arg) >> 8 & 1, 0); }

/* Intel SDM vol. 3, tables 2-2 and 13-1. */
int h_fpu_off(struct cpu *c, u32 arg)
{
    u32 unit = ARG_IMM(arg) & 7, ts = (c->cr0 & CR0_TS) != 0, em = (c->cr0 & CR0_EM) != 0;
    if (unit == FPU_WAIT)
        ts = ts && c->cr0 & CR0_MP;
    else if (unit == FPU_X87)
        ts |= em;
    else if (unit == FPU_AVX || unit == FPU_XSAVE) {
        if (!(c->cr4 & CR4_OSXSAVE) || (unit == FPU_AVX && (c->guest_xcr0 & 6) != 6))
            return raise_ud(c);
    } else if (em || (unit == FPU_SSE && !(c->cr4 & CR4_OSFXSR)))
        return raise_ud(c);
    return ts ? raise(c, EX_NM, 0, 0) : H_CONTINUE;
}

int h_emulate(struct cpu *c, u32 arg) { return emulate(c, arg); }

int h_cli(struct cpu *c, u32 arg)
{
    (void)arg;
    if (!(c->mode & MODE_IOPL))
        return raise_gp(c);
    c->eflags &= ~(u64)F_IF;
    return H_CONTINUE;
}

/* The translator runs the next instruction before it polls. */
int h_sti(struct cpu *c, u32 arg)
{
    (void)arg;
    if (!(c->mode & MODE_IOPL))
        return raise_gp(c);
    c->eflags |= F_IF;
    if (c->irq_pending)
        c->poll = 1;
    return H_CONTINUE;
}

int h_hlt(struct cpu *c, u32 arg)
{
    if (c->cpl)
        return raise_gp(c);
    c->rip = next_rip(c, arg);
    if (c->debug & (DEBUG_STEP | DEBUG_HELD)) /* a debug exception ends the halt state at once */
        return H_REDIRECT;
    c->halted = 1;
    return check_events(c);
}

int h_pushf(struct cpu *c, u32 arg)
{
    u32 size = ARG_IMM(arg) & 15;
    struct stack s = current_stack(c);
    int r;
    if (c->mode & MODE_VM86 && !(c->mode & MODE_IOPL))
        return raise_gp(c);
    if ((r = push(c, &s, size, get_eflags(c) & ~(u64)F_VM)))
        return raise_fault(c, r);
    set_sp(c, &s);
    return H_CONTINUE;
}

int h_popf(struct cpu *c, u32 arg)
{
    u32 size = ARG_IMM(arg) & 15, mode = c->mode;
    struct stack s = current_stack(c);
    u64 value, old = get_eflags(c), mask = F_ARITH | F_TF | F_DF | F_NT | (size > 2 ? F_AC | F_ID : 0);
    int r;
    if (c->mode & MODE_VM86 && !(c->mode & MODE_IOPL))
        return raise_gp(c);
    if ((r = pop(c, &s, size, &value)))
        return raise_fault(c, r);
    if (c->mode & MODE_IOPL)
        mask |= F_IF;
    if (c->cpl == 0)
        mask |= F_IOPL;
    set_sp(c, &s);
    set_eflags(c, (old & ~mask) | (value & mask));
    if (!((old ^ value) & mask & (F_TF | F_IOPL | F_AC)))
        return c->poll ? redirect(c, arg) : H_CONTINUE; /* an interrupt that it lets in comes right after it */
    update_mode(c);
    return mode == c->mode ? H_CONTINUE : redirect(c, arg);
}

int h_cld(struct cpu *c, u32 arg)
{
    (void)arg;
    c->eflags &= ~(u64)F_DF;
    return H_CONTINUE;
}

int h_std(struct cpu *c, u32 arg)
{
    (void)arg;
    c->eflags |= F_DF;
    return H_CONTINUE;
}

static int set_ac(struct cpu *c, u64 ac)
{
    if (!(c->cr4_allowed & CR4_SMAP) || c->cpl)
        return raise_ud(c);
    c->eflags = (c->eflags & ~(u64)F_AC) | ac;
    if (c->smap_open && !ac)
        smap_close(c);
    return H_CONTINUE;
}

int h_clac(struct cpu *c, u32 arg) { (void)arg; return set_ac(c, 0); }
int h_stac(struct cpu *c, u32 arg) { (void)arg; return set_ac(c, F_AC); }

/* ---- for Python: H_CONTINUE, H_REDIRECT or H_EXIT unless said otherwise ---- */

EXPORT u64 tcg_get_eflags(struct cpu *c) { return get_eflags(c) | (c->debug & DEBUG_RF ? F_RF : 0); }
EXPORT void tcg_set_eflags(struct cpu *c, u64 value) { set_eflags(c, value); }
EXPORT void tcg_update_mode(struct cpu *c) { update_mode(c); }
EXPORT int tcg_check_events(struct cpu *c) { return check_events(c); }
EXPORT int tcg_helper(struct cpu *c, u32 arg) { return helper_call(c, arg); }

/* After R_DEVICE: whether there is another access. */
EXPORT int tcg_helper_again(struct cpu *c)
{
    u32 arg = c->device.arg;
    world_enter(c);
    c->device.at = 0;
    c->reason = R_NONE;
    if (helpers[arg & 0xff](c, arg) == H_CONTINUE)
        c->rip = next_rip(c, arg);
    world_leave(c);
    return c->reason == R_DEVICE;
}
EXPORT int tcg_raise(struct cpu *c, u32 vector, u32 has_error, u32 error) { return raise(c, vector, has_error, error); }

EXPORT int tcg_deliver_interrupt(struct cpu *c, u32 vector)
{
    c->halted = 0;
    return deliver(c, vector, 0, 0, EVENT_EXTERNAL);
}

EXPORT int tcg_load_segment(struct cpu *c, u32 seg, u32 selector)
{
    int r = load_segment(c, (int)seg, selector);
    return r ? raise_fault(c, r) : H_CONTINUE;
}

EXPORT int tcg_set_cr(struct cpu *c, u32 n, u64 value)
{
    int r = set_cr(c, n, value);
    return r == EX_UD ? raise_ud(c) : r ? raise_gp(c) : H_CONTINUE;
}

/* kind: FAR_*; *next* is where a call returns to. */
EXPORT int tcg_far_transfer(struct cpu *c, u32 kind, u32 sel, u64 off, u32 size, u64 next)
{
    int r = far_transfer(c, kind, sel, off, size, next);
    return r ? raise_fault(c, r) : H_REDIRECT;
}
