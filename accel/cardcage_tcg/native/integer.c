/* Integer instructions that are not re-emitted: far bit strings, wide compare-and-exchange, frames, BCD (Intel SDM vol. 2). */
#include "sys.h"
#include "helpers.h"

static void set_flag(struct cpu *c, u64 flag, int value) { c->fl = (c->fl & ~(flag << 8)) | (value ? flag << 8 : 0); }

#define MODIFY(type)                                                            \
    do {                                                                        \
        type *p = (type *)host, m = (type)mask;                                 \
        if (!lock) {                                                            \
            old = *p;                                                           \
            *p = (type)(op == 1 ? old | m : op == 2 ? old & ~(u64)m : old ^ m); \
        } else if (op == 1) {                                                   \
            old = __atomic_fetch_or(p, m, __ATOMIC_SEQ_CST);                    \
        } else if (op == 2) {                                                   \
            old = __atomic_fetch_and(p, (type)~m, __ATOMIC_SEQ_CST);            \
        } else {                                                                \
            old = __atomic_fetch_xor(p, m, __ATOMIC_SEQ_CST);                   \
        }                                                                       \
    } while (0)

/* BTS (1), BTR (2), BTC (3) in RAM; the old value. */
static u64 modify(u64 host, u32 size, u32 op, u64 mask, int lock)
{
    u64 old;
    if (size == 2)
        MODIFY(u16);
    else if (size == 4)
        MODIFY(u32);
    else
        MODIFY(u64);
    return old;
}

/* BT, BTS, BTR, BTC memory, register. imm: operation 0-3 | log2 of the operand size << 2 | reg << 4 | address size
 * (0, 1, 2: 16, 32, 64 bits) << 8 | LOCK << 10. */
int h_bit(struct cpu *c, u32 arg)
{
    u32 imm = ARG_IMM(arg), op = imm & 3, log = imm >> 2 & 3, size = 1u << log, width = size * 8, reg = imm >> 4 & 15;
    u64 amask = size_mask(2u << (imm >> 8 & 3)), value = c->gpr[reg], linear, mask, old = 0, host = 0, phys = 0;
    s64 bit = size == 2 ? (short)value : size == 4 ? (s32)value : (s64)value;
    struct slot *code = 0;
    int r, user = c->cpl == 3;

    linear = (c->info[1] + ((c->info[0] + (u64)((bit >> (log + 3)) * size)) & amask)) & linear_mask(c);
    mask = 1ul << (bit & (width - 1));
    if (op && (linear & 0xfff) + size <= 4096 && (host = write_host(c, linear, &code, &phys))) {
        old = modify(host, size, op, mask, imm >> 10 & 1);
        if (code)
            code_written(c->vm, code, phys, size);
    } else {
        if ((r = linear_read(c, linear, &old, size, user)))
            return memory_fault(c, arg, r);
        value = op == 1 ? old | mask : op == 2 ? old & ~mask : old ^ mask;
        if (op && (r = linear_write(c, linear, &value, size, user)))
            return memory_fault(c, arg, r);
    }
    set_flag(c, F_CF, (old & mask) != 0);
    return H_CONTINUE;
}

/* imm: 1 = CMPXCHG16B, 2 = LOCK (always taken here: it does no harm). */
int h_cmpxchg8b(struct cpu *c, u32 arg)
{
    u32 wide = ARG_IMM(arg) & 1, size = wide ? 16 : 8;
    u64 linear = c->info[0], phys = 0, host, old[2] = {0, 0}, want[2], new[2];
    struct slot *code = 0;
    u8 equal;
    int r;

    if (wide && linear & 15)
        return raise_gp(c);
    want[0] = wide ? c->gpr[RAX] : (u32)c->gpr[RAX] | c->gpr[RDX] << 32, want[1] = wide ? c->gpr[RDX] : 0;
    new[0] = wide ? c->gpr[RBX] : (u32)c->gpr[RBX] | c->gpr[RCX] << 32, new[1] = wide ? c->gpr[RCX] : 0;
    if ((linear & 0xfff) + size <= 4096 && (host = write_host(c, linear, &code, &phys))) {
        old[0] = want[0], old[1] = want[1];
        if (wide)
            __asm__ volatile("lock cmpxchg16b %1; sete %0"
                             : "=q"(equal), "+m"(*(u8(*)[16])host), "+a"(old[0]), "+d"(old[1])
                             : "b"(new[0]), "c"(new[1])
                             : "cc", "memory");
        else
            equal = __atomic_compare_exchange_n((u64 *)host, &old[0], new[0], 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
        if (code)
            code_written(c->vm, code, phys, size);
    } else {
        if ((r = linear_read(c, linear, old, size, c->cpl == 3)))
            return memory_fault(c, arg, r);
        equal = old[0] == want[0] && old[1] == want[1];
        if ((r = linear_write(c, linear, equal ? new : old, size, c->cpl == 3)))
            return memory_fault(c, arg, r);
    }
    set_flag(c, F_ZF, equal);
    if (!equal) {
        c->gpr[RAX] = wide ? old[0] : (u32)old[0];
        c->gpr[RDX] = wide ? old[1] : old[0] >> 32;
    }
    return H_CONTINUE;
}

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
        if ((r = pop(c, &s, size, &value[i])))
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
    set_reg(c, RBP, size, frame);
    set_sp(c, &s);
    return H_CONTINUE;
}

int h_leave(struct cpu *c, u32 arg)
{
    u32 size = ARG_IMM(arg) & 15;
    struct stack s = current_stack(c);
    u64 value;
    int r;
    s.sp = (s.sp & ~s.mask) | (c->gpr[RBP] & s.mask);
    if ((r = pop(c, &s, size, &value)))
        return raise_fault(c, r);
    set_sp(c, &s);
    set_reg(c, RBP, size, value);
    return H_CONTINUE;
}

int h_bound(struct cpu *c, u32 arg)
{
    u32 size = ARG_IMM(arg) >> 4 & 15;
    u64 value = c->gpr[ARG_IMM(arg) & 15];
    union { s32 d[2]; short w[2]; } limits;
    s64 index, low, high;
    int r;
    if ((r = linear_read(c, c->info[0], &limits, size * 2, c->cpl == 3)))
        return memory_fault(c, arg, r);
    index = size == 2 ? (short)value : (s32)value;
    low = size == 2 ? limits.w[0] : limits.d[0];
    high = size == 2 ? limits.w[1] : limits.d[1];
    return index < low || index > high ? raise(c, EX_BR, 0, 0) : H_CONTINUE;
}

int h_xlat(struct cpu *c, u32 arg)
{
    u64 off = (c->gpr[RBX] + (c->gpr[RAX] & 0xff)) & size_mask(ARG_IMM(arg) & 15);
    u8 value;
    int r = linear_read(c, (c->info[1] + off) & linear_mask(c), &value, 1, c->cpl == 3);
    if (r)
        return memory_fault(c, arg, r);
    set_reg(c, RAX, 1, value);
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
