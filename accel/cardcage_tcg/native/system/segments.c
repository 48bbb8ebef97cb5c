/* Descriptors, segment registers, and the instructions about them (Intel SDM vol. 3, chapters 3 and 5). */
#include "sys.h"
#include "helpers.h"

int descriptor(struct cpu *c, u32 sel, u64 *desc, u64 *at)
{
    const struct seg *ldt = &c->seg[LDTR];
    u32 index = sel & 0xfff8, local = sel & 4, limit = local ? ldt->limit : c->gdt.limit;
    if ((local && (ldt->attr & SEG_UNUSABLE || !(ldt->attr & ATTR_P))) || index + 7 > limit)
        return BAD_SELECTOR;
    *at = (local ? ldt->base : c->gdt.base) + index;
    if (!long_mode(c))
        *at &= 0xffffffff;
    return sys_read(c, *at, desc, 8);
}

int mark_accessed(struct cpu *c, u64 *desc, u64 at)
{
    u8 type;
    if (*desc >> 40 & 1)
        return 0;
    *desc |= 1ul << 40;
    type = (u8)(*desc >> 40);
    return sys_write(c, at + 5, &type, 1);
}

void set_segment(struct cpu *c, int n, u32 sel, u64 desc)
{
    struct seg *s = &c->seg[n];
    u32 limit = (desc & 0xffff) | ((desc >> 32) & 0xf0000);
    s->sel = (u16)sel;
    s->attr = (u16)desc_attr(desc);
    s->base = ((desc >> 16) & 0xffffff) | ((desc >> 32) & 0xff000000);
    s->limit = desc >> 55 & 1 ? limit << 12 | 0xfff : limit;
}

int load_segment(struct cpu *c, int n, u32 sel)
{
    u32 attr, rpl = sel & 3, error = sel & 0xfffc;
    u64 desc, at;
    int r;

    sel &= 0xffff;
    if (!(c->mode & MODE_PE)) {
        real_segment(c, n, sel);
        goto done;
    }
    error &= 0xffff;
    if (!error) {
        if (n == SS && (!(c->mode & MODE_64) || c->cpl == 3 || rpl != c->cpl))
            return fault(c, EX_GP, 0);
        null_segment(c, n);
        c->seg[n].sel = (u16)sel;
        if (n == SS)
            c->seg[n].attr |= c->cpl << 5;
        goto done;
    }
    if ((r = descriptor(c, sel, &desc, &at)) > 0)
        return r;
    if (r)
        return fault(c, EX_GP, error);
    attr = desc_attr(desc);
    if (n == SS) {
        if (rpl != c->cpl || attr_dpl(attr) != c->cpl || !is_writable(attr))
            return fault(c, EX_GP, error);
        if (!(attr & ATTR_P))
            return fault(c, EX_SS, error);
    } else {
        if (!(attr & ATTR_S) || (attr & (ATTR_CODE | ATTR_RW)) == ATTR_CODE)
            return fault(c, EX_GP, error);
        if ((attr & (ATTR_CODE | ATTR_CONFORMING)) != (ATTR_CODE | ATTR_CONFORMING) &&
            (attr_dpl(attr) < rpl || attr_dpl(attr) < c->cpl))
            return fault(c, EX_GP, error);
        if (!(attr & ATTR_P))
            return fault(c, EX_NP, error);
    }
    if ((r = mark_accessed(c, &desc, at)))
        return r;
    set_segment(c, n, sel, desc);
done:
    update_mode(c);
    return 0;
}

/* ---- helpers ---- */

/* The end of a helper that loaded segment register n, after which the mode may be another. */
static int finish(struct cpu *c, u32 arg, u32 n, u32 old_mode)
{
    if (old_mode == c->mode && !(c->mode & MODE_STEP))
        return H_CONTINUE; /* the next instruction is in the same block, or h_shadow() is called */
    if (n == SS)
        set_shadow(c, SHADOW_SS);
    return redirect(c, arg);
}

static int load_next(struct cpu *c, u32 arg, u32 n, u32 sel)
{
    u32 mode = c->mode;
    int r = n == CS || n > GS ? -1 : load_segment(c, (int)n, sel);
    if (r < 0)
        return raise_ud(c);
    if (r)
        return raise_fault(c, r);
    return finish(c, arg, n, mode);
}

int h_load_sreg(struct cpu *c, u32 arg) { return load_next(c, arg, ARG_IMM(arg) & 7, (u32)c->info[0]); }
int h_mov_sreg(struct cpu *c, u32 arg) { return load_next(c, arg, ARG_IMM(arg) & 7, (u32)c->gpr[ARG_IMM(arg) >> 4 & 15]); }

int h_pop_sreg(struct cpu *c, u32 arg)
{
    u32 n = ARG_IMM(arg) & 7, size = ARG_IMM(arg) >> 4 & 15, mode = c->mode;
    struct stack s = current_stack(c);
    u64 value;
    int r = pop(c, &s, size, &value);
    if (r || (r = n == CS ? -1 : load_segment(c, (int)n, (u16)value)) > 0)
        return raise_fault(c, r);
    if (r)
        return raise_ud(c);
    set_sp(c, &s);
    return finish(c, arg, n, mode);
}

/* LDS, LES, LSS, LFS, LGS: info[0] = selector, info[1] = offset. */
int h_load_far(struct cpu *c, u32 arg)
{
    u32 imm = ARG_IMM(arg), mode = c->mode;
    u64 offset = c->info[1];
    int r = load_segment(c, imm & 7, (u16)c->info[0]);
    if (r)
        return raise_fault(c, r);
    set_reg(c, imm >> 4 & 15, imm >> 8 & 15, offset);
    return finish(c, arg, ES, mode); /* LSS holds nothing back */
}

static int system_segment(struct cpu *c, u32 n, u32 sel)
{
    u32 error = sel & 0xfffc, size = long_mode(c) ? 16 : 8, type, busy;
    u64 desc, at, high = 0;
    int r;

    if (!error) {
        if (n == TR)
            return fault(c, EX_GP, 0);
        null_segment(c, LDTR);
        c->seg[LDTR].sel = (u16)sel;
        return 0;
    }
    if (sel & 4 || (sel & 0xfff8) + size - 1 > c->gdt.limit)
        return fault(c, EX_GP, error);
    if ((r = descriptor(c, sel, &desc, &at)))
        return r > 0 ? r : fault(c, EX_GP, error);
    if (size == 16 && (r = sys_read(c, at + 8, &high, 8)))
        return r;
    type = (desc >> 40) & 0x1f;
    if (n == LDTR ? type != 2 : type != 9 && (type != 1 || size == 16))
        return fault(c, EX_GP, error);
    if (!(desc >> 47 & 1))
        return fault(c, EX_NP, error);
    if (size == 16 && ((high >> 40 & 0x1f) || !canonical(high << 32 | 0)))
        return fault(c, EX_GP, error);
    if (n == TR) {
        desc |= 2ul << 40;
        busy = (u8)(desc >> 40);
        if ((r = sys_write(c, at + 5, &busy, 1)))
            return r;
    }
    set_segment(c, (int)n, sel, desc);
    c->seg[n].base |= high << 32;
    return 0;
}

static int system_load(struct cpu *c, u32 n)
{
    int r;
    if (!(c->mode & MODE_PE))
        return raise_ud(c);
    if (c->cpl)
        return raise_gp(c);
    r = system_segment(c, n, (u16)c->info[0]);
    return r ? raise_fault(c, r) : H_CONTINUE;
}

int h_lldt(struct cpu *c, u32 arg) { (void)arg; return system_load(c, LDTR); }
int h_ltr(struct cpu *c, u32 arg) { (void)arg; return system_load(c, TR); }

static void set_zf(struct cpu *c, int zf) { c->fl = (c->fl & ~(u64)(F_ZF << 8)) | (zf ? F_ZF << 8 : 0); }

enum { LOOK_LAR, LOOK_LSL, LOOK_VERR, LOOK_VERW };

/* LAR, LSL, VERR, VERW: may the current privilege see the segment? 1 and its descriptor, 0, or -(vector) of a fault. */
static int look(struct cpu *c, u32 sel, u32 what, u64 *desc)
{
    static const u16 types[2][2] = {{0x1a3e, 0x0a0e}, {0x1a04, 0x0a04}}; /* [long][LAR, LSL]: valid system types */
    u32 attr, type, worst = (sel & 3) > c->cpl ? sel & 3 : c->cpl;
    u64 at;
    int r;
    if (!(sel & 0xfffc))
        return 0;
    if ((r = descriptor(c, sel, desc, &at)))
        return r > 0 ? -r : 0;
    attr = desc_attr(*desc);
    type = attr & 15;
    if (!(attr & ATTR_S)) {
        if (what > LOOK_LSL || !(types[long_mode(c)][what] >> type & 1))
            return 0;
    } else if (what == LOOK_VERW ? !is_writable(attr) : what == LOOK_VERR && (attr & (ATTR_CODE | ATTR_RW)) == ATTR_CODE) {
        return 0;
    }
    if ((attr & (ATTR_S | ATTR_CODE | ATTR_CONFORMING)) == (ATTR_S | ATTR_CODE | ATTR_CONFORMING))
        return 1;
    return attr_dpl(attr) >= worst;
}

static int look_helper(struct cpu *c, u32 arg, u32 what)
{
    u32 reg = ARG_IMM(arg) & 15, size = ARG_IMM(arg) >> 4 & 15, limit;
    u64 desc;
    int r;
    if (!(c->mode & MODE_PE))
        return raise_ud(c);
    r = look(c, (u16)c->info[0], what, &desc);
    if (r < 0)
        return raise_fault(c, -r);
    set_zf(c, r);
    if (r && what == LOOK_LAR) {
        set_reg(c, reg, size, (desc >> 32) & 0xffff00);
    } else if (r && what == LOOK_LSL) {
        limit = (desc & 0xffff) | ((desc >> 32) & 0xf0000);
        set_reg(c, reg, size, desc >> 55 & 1 ? limit << 12 | 0xfff : limit);
    }
    return H_CONTINUE;
}

int h_lar(struct cpu *c, u32 arg) { return look_helper(c, arg, LOOK_LAR); }
int h_lsl(struct cpu *c, u32 arg) { return look_helper(c, arg, LOOK_LSL); }
int h_verr(struct cpu *c, u32 arg) { return look_helper(c, arg, LOOK_VERR); }
int h_verw(struct cpu *c, u32 arg) { return look_helper(c, arg, LOOK_VERW); }

static int umip(struct cpu *c) { return c->cr4 & CR4_UMIP && c->cpl > 0; }

/* SGDT, SIDT: info[0] = linear address. In 64-bit mode the base has 8 bytes, else 4. */
static int store_table(struct cpu *c, u64 base, u32 limit)
{
    u8 image[10];
    u32 size = c->mode & MODE_64 ? 10 : 6;
    int r;
    if (umip(c))
        return raise_gp(c);
    image[0] = (u8)limit, image[1] = (u8)(limit >> 8);
    for (u32 i = 2; i < size; i++, base >>= 8)
        image[i] = (u8)base;
    r = vwrite(c, c->info[0], image, size, c->cpl == 3);
    if (r < 0 && !(r = linear_write(c, c->info[0], image, 2, c->cpl == 3))) /* a device's, in two accesses */
        r = linear_write(c, (c->info[0] + 2) & linear_mask(c), image + 2, size - 2, c->cpl == 3);
    else if (!r && unlikely(c->armed & ARMED_DATA))
        debug_access(c, c->info[0], size, 1);
    return r ? raise_fault(c, r) : H_CONTINUE;
}

int h_sgdt(struct cpu *c, u32 arg) { (void)arg; return store_table(c, c->gdt.base, c->gdt.limit); }
int h_sidt(struct cpu *c, u32 arg) { (void)arg; return store_table(c, c->idt.base, c->idt.limit); }

/* LGDT, LIDT: info[0] = linear address, imm = operand size (2: a 24-bit base). */
static int load_table(struct cpu *c, u32 arg, u64 *base, u32 *limit)
{
    u8 image[10];
    u32 size = c->mode & MODE_64 ? 10 : 6;
    u64 value = 0;
    int r;
    if (c->cpl)
        return raise_gp(c);
    if ((r = linear_read(c, c->info[0], image, 2, 0)) || (r = linear_read(c, (c->info[0] + 2) & linear_mask(c), image + 2, size - 2, 0)))
        return raise_fault(c, r);
    for (u32 i = size; i-- > 2;)
        value = value << 8 | image[i];
    if (size == 6 && ARG_IMM(arg) == 2)
        value &= 0xffffff;
    if (!canonical(value))
        return raise_gp(c);
    *base = value;
    *limit = image[0] | (u32)image[1] << 8;
    return H_CONTINUE;
}

int h_lgdt(struct cpu *c, u32 arg) { return load_table(c, arg, &c->gdt.base, &c->gdt.limit); }
int h_lidt(struct cpu *c, u32 arg) { return load_table(c, arg, &c->idt.base, &c->idt.limit); }

/* SLDT, STR, SMSW: imm = register | operand size << 4, or bit 8: two bytes to memory at info[0]. */
int store_word(struct cpu *c, u32 arg, u64 value)
{
    u32 imm = ARG_IMM(arg);
    int r;
    if (umip(c))
        return raise_gp(c);
    if (!(imm & 0x100)) {
        set_reg(c, imm & 15, imm >> 4 & 15, value);
        return H_CONTINUE;
    }
    r = linear_write(c, c->info[0], &value, 2, c->cpl == 3);
    return r ? raise_fault(c, r) : H_CONTINUE;
}

int h_sldt(struct cpu *c, u32 arg) { return c->mode & MODE_PE ? store_word(c, arg, c->seg[LDTR].sel) : raise_ud(c); }
int h_str(struct cpu *c, u32 arg) { return c->mode & MODE_PE ? store_word(c, arg, c->seg[TR].sel) : raise_ud(c); }

/* ARPL: imm = destination | source << 4, or bit 8: the destination is the word at info[0]. */
int h_arpl(struct cpu *c, u32 arg)
{
    u32 imm = ARG_IMM(arg), memory = imm & 0x100, rpl = c->gpr[imm >> 4 & 15] & 3;
    u16 value = (u16)c->gpr[imm & 15];
    int r, zf;
    if (!(c->mode & MODE_PE))
        return raise_ud(c);
    if (memory && (r = linear_read(c, c->info[0], &value, 2, c->cpl == 3)))
        return raise_fault(c, r);
    zf = (value & 3u) < rpl;
    if (zf)
        value = (u16)((value & ~3u) | rpl);
    if (memory && zf && (r = linear_write(c, c->info[0], &value, 2, c->cpl == 3)))
        return raise_fault(c, r);
    if (!memory)
        set_reg(c, imm & 15, 2, value);
    set_zf(c, zf);
    return H_CONTINUE;
}
