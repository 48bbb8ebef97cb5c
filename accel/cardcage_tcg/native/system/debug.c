/* Single steps and breakpoints (Intel SDM vol. 3, chapter 17).
 *
 * While TF is set, a code breakpoint is enabled or an interrupt shadow lasts, blocks have one instruction (MODE_STEP) and begin with
 * h_begin(). However an instruction ends, native_dispatch() comes next, and takes the trap that cpu.debug says.
 *
 * Data breakpoints need no steps: the soft TLB has no entry for their pages, so that each access comes to native code. One that meets
 * a breakpoint leaves translated code when its instruction is done; where it cannot, the instruction starts again as a step. */
#include "sys.h"
#include "helpers.h"

enum { TYPE_CODE, TYPE_WRITE, TYPE_PORT, TYPE_BOTH };

static u32 type_of(const struct cpu *c, u32 i) { return c->dr[7] >> (16 + 4 * i) & 3; }

static int meets(const struct cpu *c, u32 i, u64 address, u64 size)
{
    static const u8 sizes[4] = {1, 2, 8, 4};
    u64 length = sizes[c->dr[7] >> (18 + 4 * i) & 3], start = c->dr[i] & ~(length - 1);
    return start - address < size || address - start < length;
}

u32 debug_armed(const struct cpu *c)
{
    u32 armed = 0;
    for (u32 i = 0; i < 4; i++)
        if (c->dr[7] >> 2 * i & 3) {
            u32 type = type_of(c, i);
            if (type == TYPE_CODE)
                armed |= 16u << i;
            else if (type != TYPE_PORT)
                armed |= 1u << i;
            else if (c->cr4 & CR4_DE)
                armed |= 256u << i;
        }
    const struct points *points = (const struct points *)c->vm->points;
    return armed | (points && points->watches ? ARMED_WATCH : 0);
}

/* ---- points of a debugger on the host: its guest sees nothing of them ---- */

/* The number of a point of these kinds that the bytes meet, 1 for the first; 0: of none. */
static u32 point_at(const struct vm *vm, u32 kinds, u64 linear, u64 size)
{
    const struct points *points = (const struct points *)vm->points;
    for (u64 i = 0; points && i < points->count; i++) {
        const struct point *p = &points->point[i];
        if (p->kind & kinds && (p->linear - linear < size || linear - p->linear < p->size))
            return (u32)i + 1;
    }
    return 0;
}

int points_on_page(const struct vm *vm, u64 linear) { return point_at(vm, POINT_EXECUTE, linear & ~0xffful, 4096) != 0; }

static u32 watch_at(const struct cpu *c, u64 linear, u64 size, int write)
{
    u32 kinds = write == ACC_BOTH ? POINT_READ | POINT_WRITE : write ? POINT_WRITE : POINT_READ;
    return c->armed & ARMED_WATCH ? point_at(c->vm, kinds, linear, size) : 0;
}

u32 debug_match(const struct cpu *c, u64 linear, u64 size, int write)
{
    u32 found = watch_at(c, linear, size, write) ? DEBUG_WATCHED / DEBUG_HIT : 0;
    for (u32 i = 0; i < 4; i++)
        if (c->armed >> i & 1 && (write || type_of(c, i) == TYPE_BOTH) && meets(c, i, linear, size))
            found |= 1u << i;
    return found;
}

u32 debug_access(struct cpu *c, u64 linear, u64 size, int write)
{
    u32 found = debug_match(c, linear, size, write);
    c->debug |= found * DEBUG_HIT;
    if (unlikely(found & DEBUG_WATCHED / DEBUG_HIT))
        c->stopped_at = watch_at(c, linear, size, write);
    return found;
}

/* A page that may be written may be read by the same entry. */
int debug_page(const struct cpu *c, u64 linear, int write) { return debug_match(c, linear & ~0xffful, 4096, write ? ACC_BOTH : 0) != 0; }

/* After an access to ports. */
EXPORT void tcg_debug_port(struct cpu *c, u32 port, u32 size)
{
    for (u32 i = 0; i < 4; i++)
        if (c->armed >> (8 + i) & 1 && meets(c, i, port, size))
            c->debug |= DEBUG_HIT << i;
}

int debug_raise(struct cpu *c, u64 bits)
{
    c->dr[6] = (c->dr[6] & ~15ul) | bits; /* bits 0 to 3 are the present exception's, the others stay */
    return raise(c, EX_DB, 0, 0);
}

static u64 linear_rip(const struct cpu *c) { return c->mode & MODE_64 ? c->rip : (u32)(c->seg[CS].base + c->rip); }

/* Code breakpoints are faults: RF keeps them off for one instruction, MOV SS and POP SS off the next one. */
static u32 met_by_code(const struct cpu *c)
{
    u64 linear = linear_rip(c);
    u32 found = 0;
    for (u32 i = 0; i < 4; i++)
        if (c->armed >> (4 + i) & 1 && c->dr[i] == linear)
            found |= 1u << i;
    return found;
}

int h_begin(struct cpu *c, u32 arg)
{
    int again = c->debug & DEBUG_RF && c->began == c->rip; /* the rest of a string instruction */
    u32 point = unlikely(c->pointed) && !again ? point_at(c->vm, POINT_EXECUTE, linear_rip(c), 1) : 0;
    if (point) {
        c->stop = STOP_POINT, c->stopped_at = point;
        return exit_to(c, R_DEBUG, 0);
    }
    u32 shadow = c->shadow, met = c->debug & DEBUG_RF || shadow == SHADOW_SS || !(c->armed & ARMED_CODE) ? 0 : met_by_code(c);
    (void)arg;
    c->began = c->rip;
    if (c->stepping)
        c->stop = STOP_STEP; /* which native_dispatch() sees when the instruction is done */
    if (met)
        return debug_raise(c, met);
    c->debug = (c->debug & DEBUG_HELD) | (c->eflags & F_TF ? DEBUG_STEP : 0) | (shadow == SHADOW_SS ? DEBUG_BEHIND_SS : 0);
    if (shadow || c->once) {
        if (shadow)
            c->poll = 1; /* what it held back */
        c->shadow = c->once = 0;
        update_mode(c);
    }
    return H_CONTINUE;
}

int h_shadow(struct cpu *c, u32 arg)
{
    set_shadow(c, ARG_IMM(arg));
    return H_CONTINUE;
}

int debug_trap(struct cpu *c)
{
    if (unlikely(c->debug & DEBUG_WATCHED)) {
        c->debug &= ~(u32)DEBUG_WATCHED;
        c->stop = STOP_POINT;
    }
    u32 due = c->debug & (DEBUG_STEP | DEBUG_TASK | DEBUG_HITS | DEBUG_HELD), met = (due | due >> 4) >> 4 & 15;
    c->debug &= DEBUG_RF;
    if (!due)
        return H_CONTINUE;
    if (c->shadow == SHADOW_SS) { /* no trap between MOV SS and the instruction behind it; a step's is lost (SDM vol. 3, 6.8.3) */
        c->debug |= met << 8;
        return H_CONTINUE;
    }
    return debug_raise(c, (due & DEBUG_STEP ? DR6_BS : 0) | (due & DEBUG_TASK ? DR6_BT : 0) | met);
}

/* Other points were set, with the world stopped: no block, jump or TLB entry leads past them. */
EXPORT void tcg_points_changed(struct cpu *c)
{
    const struct points *points = (const struct points *)c->vm->points;
    update_mode(c);
    for (u64 i = 0; points && i < points->count; i++) {
        u64 page = points->point[i].linear & ~0xffful, last = (points->point[i].linear + points->point[i].size - 1) & ~0xffful;
        for (tlb_flush_page(c, page); page != last; page += 4096)
            tlb_flush_page(c, page + 4096);
    }
    jc_flush(c);
}
