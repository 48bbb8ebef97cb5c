/* Integer instructions that are not re-emitted: frames, bounds, tables, BCD (Intel SDM vol. 2). */
#include "sys.h"
#include "helpers.h"

int h_pusha(struct cpu *c, u32 arg)
{
    u32 size = ARG_IMM(arg) & 15;
    struct stack s = current_stack(c);
    int r;
    for (u32 i = 0; i < 8; i++)
        if ((r = push(c, &s, size, c->gpr[i])))
            return raise_fault(c, r);
    set_sp(c, &s);
    return H_CONTINUE;
}

int h_popa(struct cpu *c, u32 arg)
{
    u32 size = ARG_IMM(arg) & 15;
    struct stack s = current_stack(c);
    u64 value[8];
    int r;
    for (u32 i = 8; i-- > 0;)
        if (i == RSP)
            s.sp = (s.sp & ~s.mask) | ((s.sp + size) & s.mask); /* passed over */
        else if ((r = pop(c, &s, size, &value[i])))
            return raise_fault(c, r);
    for (u32 i = 0; i < 8; i++)
        if (i != RSP)
            set_reg(c, i, size, value[i]);
    set_sp(c, &s);
    return H_CONTINUE;
}

int h_enter(struct cpu *c, u32 arg)
{
    u32 size = ARG_IMM(arg) & 15, level = c->info[0] >> 16 & 31;
    u64 frame, value;
    struct stack s = current_stack(c), from = s;
    int r;
    if ((r = push(c, &s, size, c->gpr[RBP])))
        return raise_fault(c, r);
    frame = s.sp;
    from.sp = (s.sp & ~s.mask) | (c->gpr[RBP] & s.mask);
    for (u32 i = 1; i < level; i++) {
        struct stack at;
        from.sp = (from.sp & ~from.mask) | ((from.sp - size) & from.mask);
        at = from;
        if ((r = pop(c, &at, size, &value)) || (r = push(c, &s, size, value)))
            return raise_fault(c, r);
    }
    if (level && (r = push(c, &s, size, frame)))
        return raise_fault(c, r);
    s.sp = (s.sp & ~s.mask) | ((s.sp - (u16)c->info[0]) & s.mask);
    if ((r = probe_stack(c, &s)))
        return raise_fault(c, r);
    set_reg(c, RBP, size, frame);
    set_sp(c, &s);
    return H_CONTINUE;
}

int h_bound(struct cpu *c, u32 arg)
{
    u32 size = ARG_IMM(arg) >> 4 & 15;
    u64 value = c->gpr[ARG_IMM(arg) & 15];
    union { s32 d[2]; short w[2]; } limits;
    s64 index, low, high;
    int r;
    if (c->mode & MODE_AC && c->info[0] & (size - 1))
        return raise(c, EX_AC, 1, 0);
    if ((r = linear_read(c, c->info[0], &limits, size, c->cpl == 3)) ||
        (r = linear_read(c, (c->info[0] + size) & linear_mask(c), (u8 *)&limits + size, size, c->cpl == 3)))
        return raise_fault(c, r);
    index = size == 2 ? (short)value : (s32)value;
    low = size == 2 ? limits.w[0] : limits.d[0];
    high = size == 2 ? limits.w[1] : limits.d[1];
    return index < low || index > high ? raise(c, EX_BR, 0, 0) : H_CONTINUE;
}

int h_xlat(struct cpu *c, u32 arg)
{
    u64 off = (c->gpr[RBX] + (c->gpr[RAX] & 0xff)) & size_mask(ARG_IMM(arg) & 15);
    u8 value;
    int r = check_segment(c, (int)(ARG_IMM(arg) >> 4 & 7), off, 1, 0);
    if (r)
        return raise_fault(c, r);
    r = linear_read(c, (c->info[1] + off) & linear_mask(c), &value, 1, c->cpl == 3);
    if (r)
        return raise_fault(c, r);
    set_reg(c, RAX, 1, value);
    return H_CONTINUE;
}

/* AL becomes CF; no manual of Intel's names it, AMD's calls it SALC (APM vol. 3, table A-1, opcode D6). */
int h_salc(struct cpu *c, u32 arg)
{
    (void)arg;
    set_reg(c, RAX, 1, c->fl & F_CF << 8 ? 0xff : 0);
    return H_CONTINUE;
}

/* ---- BCD ---- */

static void bcd_flags(struct cpu *c, u32 al, u32 cf, u32 af)
{
    u32 fl = 2;
    if (!(al & 0xff))
        fl |= F_ZF;
    if (al & 0x80)
        fl |= F_SF;
    if (!__builtin_parity(al & 0xff))
        fl |= F_PF;
    c->fl = (fl | (cf ? F_CF : 0) | (af ? F_AF : 0)) << 8;
}

static int ascii_adjust(struct cpu *c, u32 add)
{
    u32 ax = (u16)c->gpr[RAX], adjust = (ax & 15) > 9 || c->fl & F_AF << 8;
    if (adjust)
        ax += add;
    ax &= 0xff0f;
    set_reg(c, RAX, 2, ax);
    bcd_flags(c, ax & 0xff, adjust, adjust);
    return H_CONTINUE;
}

int h_aaa(struct cpu *c, u32 arg) { (void)arg; return ascii_adjust(c, 0x106); }
int h_aas(struct cpu *c, u32 arg) { (void)arg; return ascii_adjust(c, -0x106u); }

static int decimal_adjust(struct cpu *c, u32 sign)
{
    u32 old = c->gpr[RAX] & 0xff, al = old, old_cf = c->fl >> 8 & 1, cf = 0, af = (old & 15) > 9 || c->fl & F_AF << 8;
    if (af) {
        al += sign * 6;
        cf = old_cf || al > 0xff;
    }
    if (old > 0x99 || old_cf) {
        al += sign * 0x60;
        cf = 1;
    } else if (sign == 1) {
        cf = 0;
    }
    set_reg(c, RAX, 1, al & 0xff);
    bcd_flags(c, al, cf, af);
    return H_CONTINUE;
}

int h_daa(struct cpu *c, u32 arg) { (void)arg; return decimal_adjust(c, 1); }
int h_das(struct cpu *c, u32 arg) { (void)arg; return decimal_adjust(c, -1u); }

int h_aam(struct cpu *c, u32 arg)
{
    u32 base = ARG_IMM(arg) & 0xff, al = c->gpr[RAX] & 0xff;
    if (!base)
        return raise(c, EX_DE, 0, 0);
    set_reg(c, RAX, 2, al / base << 8 | al % base);
    bcd_flags(c, al % base, 0, 0);
    return H_CONTINUE;
}

int h_aad(struct cpu *c, u32 arg)
{
    u32 al = (c->gpr[RAX] + (c->gpr[RAX] >> 8 & 0xff) * (ARG_IMM(arg) & 0xff)) & 0xff;
    set_reg(c, RAX, 2, al);
    bcd_flags(c, al, 0, 0);
    return H_CONTINUE;
}
