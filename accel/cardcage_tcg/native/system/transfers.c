/* Far jumps, calls and returns, IRET, software interrupts, SYSCALL and SYSENTER (Intel SDM vol. 2 and vol. 3, chapter 5). */
#include "sys.h"
#include "helpers.h"

#define FLAGS_IRET (F_ARITH | F_TF | F_DF | F_NT) /* restored at every privilege */

/* Leave the segments that the new privilege level may not use. */
static void drop_segments(struct cpu *c, u32 cpl)
{
    static const u8 list[4] = {ES, DS, FS, GS};
    for (int i = 0; i < 4; i++) {
        struct seg *s = &c->seg[list[i]];
        if (!(s->attr & SEG_UNUSABLE) && SEG_DPL(*s) < cpl &&
            (s->attr & (ATTR_CODE | ATTR_CONFORMING)) != (ATTR_CODE | ATTR_CONFORMING)) {
            s->sel = 0;
            s->attr |= SEG_UNUSABLE;
        }
    }
}

u32 desc_limit(u64 desc)
{
    u32 limit = (desc & 0xffff) | ((desc >> 32) & 0xf0000);
    return desc >> 55 & 1 ? limit << 12 | 0xfff : limit;
}

/* May the code segment be entered at off? */
static int target_ok(struct cpu *c, u64 desc, u64 off)
{
    return long_mode(c) && desc_attr(desc) & ATTR_L ? canonical(off) : off <= desc_limit(desc);
}

static int long_code_bad(struct cpu *c, u32 attr) { return long_mode(c) && (attr & (ATTR_L | ATTR_DB)) == (ATTR_L | ATTR_DB); }

static int real_far(struct cpu *c, u32 kind, u32 sel, u64 off, u32 size, u64 next)
{
    struct stack s = current_stack(c);
    int r;
    if (off > c->seg[CS].limit && !(c->eflags & F_VM))
        return fault(c, EX_GP, 0);
    if (off > 0xffff && c->eflags & F_VM)
        return fault(c, EX_GP, 0);
    if (kind == FAR_CALL) {
        if ((r = push(c, &s, size, c->seg[CS].sel)) || (r = push(c, &s, size, next)))
            return r;
        set_sp(c, &s);
    }
    real_segment(c, CS, sel);
    c->rip = off;
    return 0;
}

/* Through a call gate: `gate` is its first eight bytes. */
static int gate_far(struct cpu *c, u32 kind, u32 gate_sel, u64 gate, u64 gate_at, u64 next)
{
    u32 type = (gate >> 40) & 0x1f, dpl = (gate >> 45) & 3, sel = (u16)(gate >> 16), attr, cpl, ss = 0, count = (gate >> 32) & 31;
    u32 lm = long_mode(c), size = lm ? 8 : type == 12 ? 4 : 2, error = gate_sel & 0xfffc;
    u64 off = (gate & 0xffff) | (type == 12 ? gate >> 48 << 16 : 0), high = 0, desc, at, sp, ss_desc = 0, ss_at, value;
    struct stack s = current_stack(c), old = s;
    int r;

    if (dpl < c->cpl || dpl < (gate_sel & 3))
        return fault(c, EX_GP, error);
    if (!(gate >> 47 & 1))
        return fault(c, EX_NP, error);
    if (lm) {
        const u32 limit = gate_sel & 4 ? c->seg[LDTR].limit : c->gdt.limit;
        if (type != 12 || (gate_sel & 0xfff8) + 15 > limit)
            return fault(c, EX_GP, error);
        if ((r = sys_read(c, gate_at + 8, &high, 8)))
            return r;
        if (high >> 40 & 0x1f)
            return fault(c, EX_GP, error);
        off |= high << 32;
    }
    if (!(sel & 0xfffc))
        return fault(c, EX_GP, 0);
    if ((r = descriptor(c, sel, &desc, &at)) > 0)
        return r;
    attr = desc_attr(desc);
    if (r || !is_code(attr) || attr_dpl(attr) > c->cpl || (lm && (attr & (ATTR_L | ATTR_DB)) != ATTR_L) ||
        (kind == FAR_JMP && !(attr & ATTR_CONFORMING) && attr_dpl(attr) != c->cpl))
        return fault(c, EX_GP, sel & 0xfffc);
    if (!(attr & ATTR_P))
        return fault(c, EX_NP, sel & 0xfffc);
    cpl = attr & ATTR_CONFORMING ? c->cpl : attr_dpl(attr);
    if (!target_ok(c, desc, off))
        return fault(c, EX_GP, 0);
    if (kind == FAR_CALL && cpl < c->cpl) {
        if (lm) {
            if ((r = tss_stack64(c, 4 + 8 * cpl, 0, &sp)))
                return r;
            ss = cpl;
        } else if ((r = tss_stack(c, cpl, 0, &ss, &sp, &ss_desc, &ss_at))) {
            return r;
        }
        s = stack_of(ss_desc, sp, (int)lm, 0, lm ? 0 : ss & 0xfffc);
        if ((r = push(c, &s, size, c->seg[SS].sel)) || (r = push(c, &s, size, c->gpr[RSP])))
            return r;
        for (u32 i = lm ? 0 : count; i-- > 0;) {
            struct stack from = old;
            from.sp = (old.sp & ~old.mask) | ((old.sp + i * size) & old.mask);
            if ((r = pop(c, &from, size, &value)) || (r = push(c, &s, size, value)))
                return r;
        }
        if ((r = push(c, &s, size, c->seg[CS].sel)) || (r = push(c, &s, size, next)))
            return r;
        if (lm) {
            null_segment(c, SS);
            c->seg[SS].sel = (u16)cpl;
            c->seg[SS].attr |= cpl << 5;
        } else {
            set_segment(c, SS, (ss & 0xfffc) | cpl, ss_desc);
        }
        c->gpr[RSP] = s.mask == ~0ul ? s.sp : (u32)s.sp;
    } else {
        if (lm)
            s.mask = ~0ul, s.base = 0;
        if (kind == FAR_CALL) {
            if ((r = push(c, &s, size, c->seg[CS].sel)) || (r = push(c, &s, size, next)))
                return r;
            set_sp(c, &s);
        }
        cpl = c->cpl;
    }
    if ((r = mark_accessed(c, &desc, at)))
        return r;
    set_segment(c, CS, (sel & 0xfffc) | cpl, desc);
    c->rip = off;
    return 0;
}

static int protected_far(struct cpu *c, u32 kind, u32 sel, u64 off, u32 size, u64 next)
{
    u32 attr, type, error = sel & 0xfffc;
    struct stack s = current_stack(c);
    u64 desc, at;
    int r;

    if (!error)
        return fault(c, EX_GP, 0);
    if ((r = descriptor(c, sel, &desc, &at)) > 0)
        return r;
    attr = desc_attr(desc);
    if (r)
        return fault(c, EX_GP, error);
    if (!(attr & ATTR_S)) {
        type = attr & 15;
        if (type == 12 || (type == 4 && !long_mode(c)))
            return gate_far(c, kind, sel, desc, at, next);
        if (long_mode(c) || (type != 1 && type != 5 && type != 9) || attr_dpl(attr) < c->cpl || attr_dpl(attr) < (sel & 3))
            return fault(c, EX_GP, error);
        if (!(attr & ATTR_P))
            return fault(c, EX_NP, error);
        return task_switch(c, type == 5 ? (u16)(desc >> 16) : sel, kind == FAR_JMP ? TASK_JMP : TASK_CALL, next, 0, 0, 0);
    }
    if (!is_code(attr) || long_code_bad(c, attr) ||
        (attr & ATTR_CONFORMING ? attr_dpl(attr) > c->cpl : (sel & 3) > c->cpl || attr_dpl(attr) != c->cpl))
        return fault(c, EX_GP, error);
    if (!(attr & ATTR_P))
        return fault(c, EX_NP, error);
    if (!target_ok(c, desc, off))
        return fault(c, EX_GP, 0);
    if (kind == FAR_CALL && ((r = push(c, &s, size, c->seg[CS].sel)) || (r = push(c, &s, size, next))))
        return r;
    if ((r = mark_accessed(c, &desc, at)))
        return r;
    set_sp(c, &s);
    set_segment(c, CS, (sel & 0xfffc) | c->cpl, desc);
    c->rip = off;
    return 0;
}

static u64 iret_mask(const struct cpu *c, u32 size)
{
    u64 mask = FLAGS_IRET;
    if (size > 2)
        mask |= F_AC | F_ID | F_RF;
    if (c->cpl <= (c->eflags & F_IOPL) >> 12)
        mask |= F_IF;
    if (c->cpl == 0)
        mask |= F_IOPL | (size > 2 && c->mode & MODE_PE ? F_VIF | F_VIP : 0);
    return mask;
}

static int real_return(struct cpu *c, u32 kind, u64 release, u32 size)
{
    struct stack s = current_stack(c);
    u64 ip, cs, flags, mask = iret_mask(c, size);
    int r;
    if (kind == FAR_IRET && c->eflags & F_VM && (c->eflags & F_IOPL) != F_IOPL)
        return fault(c, EX_GP, 0);
    if ((r = pop(c, &s, size, &ip)) || (r = pop(c, &s, size, &cs)) || (kind == FAR_IRET && (r = pop(c, &s, size, &flags))))
        return r;
    if (ip > c->seg[CS].limit)
        return fault(c, EX_GP, 0);
    s.sp = (s.sp & ~s.mask) | ((s.sp + release) & s.mask);
    set_sp(c, &s);
    real_segment(c, CS, (u16)cs);
    c->rip = ip;
    if (kind == FAR_IRET)
        set_eflags(c, (get_eflags(c) & ~mask) | (flags & mask));
    return 0;
}

static int return_to_v86(struct cpu *c, struct stack *s, u64 ip, u64 cs, u64 flags)
{
    static const u8 order[5] = {SS, ES, DS, FS, GS};
    u64 sp, sel[5];
    int r;
    if ((r = pop(c, s, 4, &sp)))
        return r;
    for (int i = 0; i < 5; i++)
        if ((r = pop(c, s, 4, &sel[i])))
            return r;
    if (ip > 0xffff)
        return fault(c, EX_GP, 0);
    set_eflags(c, flags | F_VM);
    for (int i = 0; i < 5; i++)
        real_segment(c, order[i], (u16)sel[i]);
    real_segment(c, CS, (u16)cs);
    c->gpr[RSP] = (u32)sp;
    c->rip = ip;
    return 0;
}

static int protected_return(struct cpu *c, u32 kind, u64 release, u32 size, u64 next)
{
    struct stack s = current_stack(c);
    u32 attr, rpl, error, to64, outer;
    u64 ip, cs, flags = 0, sp = 0, ss = 0, desc, at, ss_desc = 0, ss_at = 0, mask = iret_mask(c, size);
    int r;

    if (kind == FAR_IRET && c->eflags & F_NT) {
        u16 back;
        if (long_mode(c))
            return fault(c, EX_GP, 0);
        if ((r = sys_read(c, (u32)c->seg[TR].base, &back, 2)))
            return r;
        return task_switch(c, back, TASK_IRET, next, 0, 0, 0);
    }
    if ((r = pop(c, &s, size, &ip)) || (r = pop(c, &s, size, &cs)) || (kind == FAR_IRET && (r = pop(c, &s, size, &flags))))
        return r;
    cs &= 0xffff;
    if (kind == FAR_IRET && flags & F_VM && size == 4 && c->cpl == 0 && !long_mode(c))
        return return_to_v86(c, &s, ip, cs, flags);
    rpl = cs & 3;
    error = cs & 0xfffc;
    if (!error)
        return fault(c, EX_GP, 0);
    if ((r = descriptor(c, (u32)cs, &desc, &at)) > 0)
        return r;
    attr = desc_attr(desc);
    if (r || !is_code(attr) || rpl < c->cpl || long_code_bad(c, attr) ||
        (attr & ATTR_CONFORMING ? attr_dpl(attr) > rpl : attr_dpl(attr) != rpl))
        return fault(c, EX_GP, error);
    if (!(attr & ATTR_P))
        return fault(c, EX_NP, error);
    to64 = long_mode(c) && attr & ATTR_L;
    outer = rpl > c->cpl;
    s.sp = (s.sp & ~s.mask) | ((s.sp + release) & s.mask);
    if (outer || (kind == FAR_IRET && c->mode & MODE_64)) {
        if ((r = pop(c, &s, size, &sp)) || (r = pop(c, &s, size, &ss)))
            return r;
        ss &= 0xffff;
        error = ss & 0xfffc;
        if (!error) {
            if (!to64 || rpl == 3)
                return fault(c, EX_GP, 0);
        } else {
            if ((r = descriptor(c, (u32)ss, &ss_desc, &ss_at)) > 0)
                return r;
            attr = desc_attr(ss_desc);
            if (r || (ss & 3) != rpl || !is_writable(attr) || attr_dpl(attr) != rpl)
                return fault(c, EX_GP, error);
            if (!(attr & ATTR_P))
                return fault(c, EX_SS, error);
        }
        if (!target_ok(c, desc, ip))
            return fault(c, EX_GP, 0);
        if ((r = mark_accessed(c, &desc, at)) || (error && (r = mark_accessed(c, &ss_desc, ss_at))))
            return r;
        sp += outer ? release : 0;
        set_segment(c, CS, (u32)cs, desc);
        if (error) {
            set_segment(c, SS, (u32)ss, ss_desc);
        } else {
            null_segment(c, SS);
            c->seg[SS].sel = (u16)ss;
            c->seg[SS].attr |= rpl << 5;
        }
        if (to64)
            c->gpr[RSP] = sp;
        else if (c->seg[SS].attr & ATTR_DB)
            c->gpr[RSP] = (u32)sp;
        else
            c->gpr[RSP] = (c->gpr[RSP] & ~0xfffful) | (u16)sp;
        if (outer)
            drop_segments(c, rpl);
    } else {
        if (!target_ok(c, desc, ip))
            return fault(c, EX_GP, 0);
        if ((r = mark_accessed(c, &desc, at)))
            return r;
        set_sp(c, &s);
        set_segment(c, CS, (u32)cs, desc);
    }
    c->rip = ip;
    if (kind == FAR_IRET)
        set_eflags(c, (get_eflags(c) & ~mask) | (flags & mask));
    return 0;
}

/* One far transfer; *off* of FAR_RET is how many bytes of parameters it releases, *next* where a call comes back to. */
int far_transfer(struct cpu *c, u32 kind, u32 sel, u64 off, u32 size, u64 next)
{
    u32 direct = kind == FAR_JMP || kind == FAR_CALL;
    int r;
    if (kind == FAR_IRET)
        off = 0;
    if (c->mode & MODE_PE)
        r = direct ? protected_far(c, kind, (u16)sel, off, size, next) : protected_return(c, kind, off, size, next);
    else
        r = direct ? real_far(c, kind, (u16)sel, off, size, next) : real_return(c, kind, off, size);
    if (!r)
        update_mode(c);
    return r;
}

/* ---- helpers ---- */

/* *size* bytes of operand; selector in info[0], offset in info[1]. */
static int far_helper(struct cpu *c, u32 arg, u32 kind)
{
    u32 size = ARG_IMM(arg) & 15;
    int r = far_transfer(c, kind, (u16)c->info[0], c->info[1] & size_mask(size), size, next_rip(c, arg));
    return r ? raise_fault(c, r) : H_REDIRECT;
}

int h_far_jmp(struct cpu *c, u32 arg) { return far_helper(c, arg, FAR_JMP); }
int h_far_call(struct cpu *c, u32 arg) { return far_helper(c, arg, FAR_CALL); }

int h_retf(struct cpu *c, u32 arg)
{
    int r = far_transfer(c, FAR_RET, 0, ARG_IMM(arg) >> 4, ARG_IMM(arg) & 15, 0);
    return r ? raise_fault(c, r) : H_REDIRECT;
}

int h_iret(struct cpu *c, u32 arg)
{
    u32 nmi = c->nmi_blocked;
    int r = far_transfer(c, FAR_IRET, 0, 0, ARG_IMM(arg) & 15, next_rip(c, arg));
    if (nmi && r != PENDING) {
        c->nmi_blocked = 0;
        if (c->lapic.nmi)
            c->poll = 1;
    }
    return r ? raise_fault(c, r) : H_REDIRECT;
}

int h_int(struct cpu *c, u32 arg)
{
    if (c->mode & MODE_VM86 && (c->eflags & F_IOPL) != F_IOPL)
        return raise_gp(c);
    return dispatch(c, ARG_IMM(arg) & 0xff, 0, 0, EVENT_SOFT, next_rip(c, arg));
}

int h_int3(struct cpu *c, u32 arg) { return dispatch(c, EX_BP, 0, 0, EVENT_SOFT, next_rip(c, arg)); }
/* What a MOV SS before it met is told with its own #DB, and not by another one in the handler as with INT n: processors do so, and suites
 * of kernels rely on it. */
int h_int1(struct cpu *c, u32 arg)
{
    if (c->debug & DEBUG_HELD)
        c->dr[6] = (c->dr[6] & ~15ul) | (c->debug & DEBUG_HELD) >> 8;
    return dispatch(c, EX_DB, 0, 0, EVENT_INT1, next_rip(c, arg));
}

int h_into(struct cpu *c, u32 arg)
{
    if (c->mode & MODE_64)
        return raise_ud(c);
    return c->fl & 1 ? dispatch(c, EX_OF, 0, 0, EVENT_SOFT, next_rip(c, arg)) : H_CONTINUE;
}

/* A flat code segment and stack as SYSCALL and SYSENTER set them, without looking at descriptors. */
static void fixed_segments(struct cpu *c, u32 cs, u32 ss, u32 cpl, int code64)
{
    c->seg[CS] = (struct seg){0, 0xffffffff, (u16)((cs & 0xfffc) | cpl), (u16)(0x89b | cpl << 5 | (code64 ? ATTR_L : ATTR_DB))};
    c->seg[SS] = (struct seg){0, 0xffffffff, (u16)((ss & 0xfffc) | cpl), (u16)(0xc93 | cpl << 5)};
}

/* SYSCALL and SYSRET trap when TF is set after them, unlike other instructions, which trap when it was set before: so SFMASK keeps
 * the kernel from being stepped (XSA-204; Linux, arch/x86/entry/entry_64.S). */
static void step_by_new_flags(struct cpu *c) { c->debug = (c->debug & ~(u32)DEBUG_STEP) | (c->eflags & F_TF ? DEBUG_STEP : 0); }

int h_syscall(struct cpu *c, u32 arg)
{
    u64 flags = get_eflags(c), next = next_rip(c, arg);
    u32 cs = (u16)(c->star >> 32);
    if (!(c->efer & EFER_SCE) || !(c->mode & MODE_PE))
        return raise_ud(c);
    if (long_mode(c)) {
        c->gpr[RCX] = next;
        c->gpr[11] = flags;
        c->rip = c->mode & MODE_64 ? c->lstar : c->cstar;
        fixed_segments(c, cs, cs + 8, 0, 1);
        set_eflags(c, flags & ~c->sfmask);
    } else {
        c->gpr[RCX] = (u32)next;
        c->rip = (u32)c->star;
        fixed_segments(c, cs, cs + 8, 0, 0);
        set_eflags(c, flags & ~(u64)(F_IF | F_VM));
    }
    step_by_new_flags(c);
    update_mode(c);
    return H_REDIRECT;
}

/* imm bit 0: REX.W. */
int h_sysret(struct cpu *c, u32 arg)
{
    u32 wide = ARG_IMM(arg) & 1, base = (u16)(c->star >> 48);
    if (!(c->efer & EFER_SCE) || !(c->mode & MODE_PE))
        return raise_ud(c);
    if (c->cpl || (wide && !canonical(c->gpr[RCX])))
        return raise_gp(c);
    if (long_mode(c))
        set_eflags(c, (c->gpr[11] & 0x3c7fd7) | 2);
    else
        set_eflags(c, get_eflags(c) | F_IF);
    step_by_new_flags(c);
    c->rip = wide ? c->gpr[RCX] : (u32)c->gpr[RCX];
    fixed_segments(c, wide ? base + 16 : base, base + 8, 3, (int)wide);
    update_mode(c);
    return H_REDIRECT;
}

int h_sysenter(struct cpu *c, u32 arg)
{
    u32 cs = (u32)c->sysenter_cs & 0xfffc;
    (void)arg;
    if (long_mode(c)) /* as an AMD processor, which CPUID says it is: kernels there are not ready for it (APM vol. 3, SYSENTER) */
        return raise_ud(c);
    if (!(c->cr0 & CR0_PE) || !cs)
        return raise_gp(c);
    c->eflags &= ~(u64)(F_VM | F_IF);
    c->rip = (u32)c->sysenter_eip;
    c->gpr[RSP] = (u32)c->sysenter_esp;
    fixed_segments(c, cs, cs + 8, 0, 0);
    update_mode(c);
    return H_REDIRECT;
}

int h_sysexit(struct cpu *c, u32 arg)
{
    u32 cs = (u32)c->sysenter_cs & 0xfffc;
    (void)arg;
    if (long_mode(c))
        return raise_ud(c);
    if (!(c->mode & MODE_PE) || !cs || c->cpl)
        return raise_gp(c);
    c->rip = (u32)c->gpr[RDX];
    c->gpr[RSP] = (u32)c->gpr[RCX];
    fixed_segments(c, cs + 16, cs + 24, 3, 0);
    update_mode(c);
    return H_REDIRECT;
}
