/* The hardware task switch (Intel SDM vol. 3, chapter 8). */
#include "sys.h"

enum { TSS32_SIZE = 0x68, TSS16_SIZE = 0x2c };

struct task { u64 eip, eflags, cr3, gpr[8], sel[6], ldt; }; /* sel: ES CS SS DS FS GS */

static u32 field(const u8 *image, u32 at, u32 size)
{
    u32 v = image[at] | (u32)image[at + 1] << 8;
    return size == 2 ? v : v | (u32)image[at + 2] << 16 | (u32)image[at + 3] << 24;
}

static void put(u8 *image, u32 at, u32 size, u64 v)
{
    for (u32 i = 0; i < size; i++, v >>= 8)
        image[at + i] = (u8)v;
}

static void unpack(const u8 *image, int wide, struct task *t)
{
    u32 size = wide ? 4 : 2, first = wide ? 0x20 : 0x0e;
    t->cr3 = wide ? field(image, 0x1c, 4) : 0;
    t->eip = field(image, first, size);
    t->eflags = field(image, first + size, size);
    for (u32 i = 0; i < 8; i++)
        t->gpr[i] = field(image, first + (2 + i) * size, size);
    for (u32 i = 0; i < 6; i++)
        t->sel[i] = i < (wide ? 6u : 4u) ? field(image, first + (10 + i) * size, 2) : 0;
    t->ldt = field(image, wide ? 0x60 : 0x2a, 2);
}

/* Save the running task's dynamic fields into its TSS. */
static int save(struct cpu *c, u64 flags, u64 next)
{
    u32 wide = c->seg[TR].attr & 8, size = wide ? 4 : 2, first = wide ? 0x20 : 0x0e, count = wide ? 6 : 4;
    u8 image[0x40];
    put(image, 0, size, next);
    put(image, size, size, flags);
    for (u32 i = 0; i < 8; i++)
        put(image, (2 + i) * size, size, c->gpr[i]);
    for (u32 i = 0; i < count; i++)
        put(image, (10 + i) * size, size, c->seg[i].sel);
    return sys_write(c, (u32)(c->seg[TR].base + first), image, (10 + count) * size);
}

static int set_busy(struct cpu *c, u64 at, int busy)
{
    u8 type;
    int r = sys_read(c, at + 5, &type, 1);
    if (r)
        return r;
    type = busy ? type | 2 : type & (u8)~2;
    return sys_write(c, at + 5, &type, 1);
}

/* A segment of the new task: faults are #TS, or #NP/#SS for what is not present (SDM vol. 3, table 8-1). */
static int task_segment(struct cpu *c, int n, u32 sel, u32 cpl)
{
    u32 attr, error = sel & 0xfffc, dpl, rpl = sel & 3;
    u64 desc, at;
    int r, bad;

    if (!error) {
        if (n == CS || n == SS)
            return fault(c, EX_TS, 0);
        null_segment(c, n);
        c->seg[n].sel = (u16)sel;
        return 0;
    }
    if ((r = descriptor(c, sel, &desc, &at)) > 0)
        return r;
    if (r)
        return fault(c, EX_TS, error);
    attr = desc_attr(desc);
    dpl = attr_dpl(attr);
    if (n == CS)
        bad = !is_code(attr) || (attr & ATTR_CONFORMING ? dpl > rpl : dpl != rpl);
    else if (n == SS)
        bad = !is_writable(attr) || dpl != cpl || rpl != cpl;
    else
        bad = !(attr & ATTR_S) || (attr & (ATTR_CODE | ATTR_RW)) == ATTR_CODE ||
              ((attr & (ATTR_CODE | ATTR_CONFORMING)) != (ATTR_CODE | ATTR_CONFORMING) && (dpl < rpl || dpl < cpl));
    if (bad)
        return fault(c, EX_TS, error);
    if (!(attr & ATTR_P))
        return fault(c, n == SS ? EX_SS : EX_NP, error);
    if ((r = mark_accessed(c, &desc, at)))
        return r;
    set_segment(c, n, sel, desc);
    return 0;
}

static int task_ldt(struct cpu *c, u32 sel)
{
    u64 desc, at;
    int r;
    null_segment(c, LDTR);
    c->seg[LDTR].sel = (u16)sel;
    if (!(sel & 0xfffc))
        return 0;
    if (sel & 4)
        return fault(c, EX_TS, sel & 0xfffc);
    if ((r = descriptor(c, sel, &desc, &at)) > 0)
        return r;
    if (r || (desc_attr(desc) & 0x9f) != 0x82)
        return fault(c, EX_TS, sel & 0xfffc);
    set_segment(c, LDTR, sel, desc);
    return 0;
}

int task_switch(struct cpu *c, u32 sel, u32 source, u64 next, u32 ext, u32 has_error, u32 error)
{
    u32 code = (sel & 0xfffc) | ext, vector = source == TASK_IRET ? EX_TS : EX_GP, type, wide, old_sel = c->seg[TR].sel, cpl;
    u64 desc, at, old_at, flags = get_eflags(c);
    u8 image[TSS32_SIZE];
    struct task t;
    int r;

    if (sel & 4 || !(sel & 0xfffc))
        return fault(c, vector, code);
    if ((r = descriptor(c, sel, &desc, &at)) > 0)
        return r;
    type = (desc >> 40) & 0x1f;
    if (r || (type & ~8u) != (source == TASK_IRET ? 3 : 1))
        return fault(c, vector, code);
    if (!(desc >> 47 & 1))
        return fault(c, EX_NP, code);
    wide = type & 8;
    {
        struct seg keep = c->seg[TR];
        u32 limit;
        set_segment(c, TR, sel, desc);
        limit = c->seg[TR].limit;
        c->seg[TR] = keep;
        if (limit < (wide ? TSS32_SIZE : TSS16_SIZE) - 1)
            return fault(c, EX_TS, code);
    }
    if ((r = sys_read(c, (u32)(((desc >> 16) & 0xffffff) | ((desc >> 32) & 0xff000000)), image, wide ? TSS32_SIZE : TSS16_SIZE)))
        return r;
    if (source == TASK_IRET)
        flags &= ~(u64)F_NT;
    old_at = (u32)(c->gdt.base + (old_sel & 0xfff8));
    if ((r = save(c, flags, next)))
        return r;
    if ((source == TASK_JMP || source == TASK_IRET) && (r = set_busy(c, old_at, 0)))
        return r;
    if (source != TASK_IRET && (r = set_busy(c, at, 1)))
        return r;
    unpack(image, wide != 0, &t);
    set_segment(c, TR, sel, desc | 2ul << 40);
    if (source == TASK_CALL || source == TASK_INT) {
        u16 link = (u16)old_sel;
        if ((r = sys_write(c, (u32)c->seg[TR].base, &link, 2)))
            return r;
        t.eflags |= F_NT;
    }
    c->cr0 |= CR0_TS;
    if (wide && c->cr0 & CR0_PG && t.cr3 != c->cr3) {
        if (c->cr4 & CR4_PAE && (r = load_pdptes(c, t.cr3)))
            return fault(c, EX_TS, code);
        c->cr3 = t.cr3;
        tlb_flush(c, 0);
    }
    c->dr[7] &= ~0x155ul; /* local breakpoints are the old task's */
    c->rip = t.eip;
    set_eflags(c, wide ? t.eflags : (get_eflags(c) & ~0xfffful) | t.eflags);
    for (u32 i = 0; i < 8; i++)
        c->gpr[i] = wide ? t.gpr[i] : (c->gpr[i] & 0xffff0000) | t.gpr[i];
    if ((r = task_ldt(c, (u32)t.ldt)))
        return r;
    if (c->eflags & F_VM) {
        for (int i = 0; i < 6; i++)
            real_segment(c, i, (u32)t.sel[i]);
    } else {
        static const u8 order[6] = {SS, CS, ES, DS, FS, GS};
        cpl = t.sel[CS] & 3;
        for (int i = 0; i < 6; i++)
            if ((r = task_segment(c, order[i], (u32)t.sel[order[i]], cpl)))
                return r;
    }
    c->debug |= wide && image[0x64] & 1 ? DEBUG_TASK : 0;
    update_mode(c);
    if (has_error) {
        struct stack s = current_stack(c);
        s.checked = 0;
        if ((r = push(c, &s, wide ? 4 : 2, error)))
            return r;
        set_sp(c, &s);
    }
    return c->rip > c->seg[CS].limit ? fault(c, EX_GP, 0) : 0;
}
