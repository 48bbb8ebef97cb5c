/* MOVS, CMPS, STOS, LODS, SCAS with and without REP (Intel SDM vol. 2): page by page where both ends are plain RAM. */
#include "sys.h"
#include "internal.h"
#include "helpers.h"

struct string {
    u32 op, size, rep, asize; /* sizes in bytes */
    int back, limits;         /* limits: segments are to be looked at */
    u64 amask, source_base, dest_base, lmask;
};

static int has_source(const struct string *s) { return s->op == STRING_MOVS || s->op == STRING_CMPS || s->op == STRING_LODS; }
static int has_dest(const struct string *s) { return s->op != STRING_LODS; }

/* Host address of a linear one for writing up to the end of its page, or 0. On a page that holds code *slot is set: then
 * code_written(vm, *slot, *phys, size) is to be called after the write. */
static u64 write_host(struct cpu *c, u64 linear, struct slot **slot, u64 *phys)
{
    u64 host = linear_host(c, linear, 1), keep = c->cr2, code = c->scratch[3];
    u32 global, writable;
    void *at;
    *slot = 0;
    if (host)
        return host;
    if (unlikely(c->armed & ARMED_DATA) && debug_page(c, linear, 1))
        return 0;
    if ((long_mode(c) && !canonical(linear)) || walk(c, linear, ACC_WRITE, c->cpl == 3, phys, &global, &writable)) {
        c->cr2 = keep, c->scratch[3] = code; /* only looked: whoever accesses it faults */
        return 0;
    }
    *phys = (*phys & ~0xffful) | (linear & 0xfff);
    at = phys_host(c->vm, *phys, slot);
    if (!at || (*slot)->readonly)
        return 0;
    mark_dirty(c->vm, at);
    return (u64)at;
}

/* How many elements from this one on stay in the page, in the segment, and do not wrap around the address size. */
static u64 span(struct cpu *c, const struct string *s, u32 seg, int write, u64 linear, u64 off)
{
    u64 in_page = linear & 0xfff, n, wrap;
    if (s->limits && check_segment(c, (int)seg, off, s->size, write))
        return 0;
    if (in_page + s->size > 4096)
        return 0;
    n = s->back ? in_page / s->size + 1 : (4096 - in_page) / s->size;
    if (s->amask == ~0ul)
        return n;
    wrap = s->back ? off / s->size + 1 : (s->amask + 1 - off) / s->size;
    n = n < wrap ? n : wrap;
    if (s->limits) {
        const struct limit *l = &c->limits[seg];
        u64 at = (u32)(off - l->low), room = s->back ? at / s->size + 1 : ((write ? l->write : l->read) - at) / s->size;
        n = n < room ? n : room;
    }
    return n;
}

#define REPEAT(instruction)                                                                                             \
    do {                                                                                                                \
        if (back)                                                                                                       \
            __asm__ volatile("std; rep " instruction "; cld" : "+D"(to), "+S"(from), "+c"(n) : "a"(value) : "memory"); \
        else                                                                                                            \
            __asm__ volatile("rep " instruction : "+D"(to), "+S"(from), "+c"(n) : "a"(value) : "memory");              \
    } while (0)

/* The processor's own instruction of the same element size: overlapping moves come out as the guest expects. */
static void host_move(u32 size, int back, u64 to, u64 from, u64 n)
{
    u64 value = 0;
    if (size == 1)
        REPEAT("movsb");
    else if (size == 2)
        REPEAT("movsw");
    else if (size == 4)
        REPEAT("movsl");
    else
        REPEAT("movsq");
}

static void host_store(u32 size, int back, u64 to, u64 value, u64 n)
{
    u64 from = 0;
    if (size == 1)
        REPEAT("stosb");
    else if (size == 2)
        REPEAT("stosw");
    else if (size == 4)
        REPEAT("stosl");
    else
        REPEAT("stosq");
}

static inline u64 host_load(u64 at, u32 size)
{
    return size == 1   ? *(volatile u8 *)at
           : size == 2 ? *(volatile u16 *)at
           : size == 4 ? *(volatile u32 *)at
                       : *(volatile u64 *)at;
}

/* The arithmetic flags of CMP a, b in cpu.fl's form. */
static u64 compare(u32 size, u64 a, u64 b)
{
    u64 fl = 0;
#define COMPARE(suffix, modifier) \
    __asm__("cmp" suffix " %" modifier "2, %" modifier "1; lahf; seto %%al" : "=&a"(fl) : "r"(a), "r"(b) : "cc")
    if (size == 1)
        COMPARE("b", "b");
    else if (size == 2)
        COMPARE("w", "w");
    else if (size == 4)
        COMPARE("l", "k");
    else
        COMPARE("q", "q");
    return fl & 0xffff;
}

/* Compare up to n elements, until the repeat condition ends; *last* are the two that were compared last. */
static inline __attribute__((always_inline)) u64 scan_of(u32 size, s64 step, u64 a_at, u64 a, u64 b_at, u64 n,
                                                         int until_equal, u64 last[2])
{
    u64 i = 0;
    for (;;) {
        u64 b = host_load(b_at, size);
        if (a_at)
            a = host_load(a_at, size);
        i++;
        if (i == n || (a == b) == until_equal) {
            last[0] = a, last[1] = b;
            return i;
        }
        b_at += (u64)step;
        if (a_at)
            a_at += (u64)step;
    }
}

static u64 scan(u32 size, s64 step, u64 a_at, u64 a, u64 b_at, u64 n, int until_equal, u64 last[2])
{
    if (size == 1)
        return scan_of(1, step, a_at, a, b_at, n, until_equal, last);
    if (size == 2)
        return scan_of(2, step, a_at, a, b_at, n, until_equal, last);
    if (size == 4)
        return scan_of(4, step, a_at, a, b_at, n, until_equal, last);
    return scan_of(8, step, a_at, a, b_at, n, until_equal, last);
}

/* Do up to n elements through host addresses: how many were done, 0 where that cannot be. */
static u64 fast(struct cpu *c, const struct string *s, u64 source, u64 dest, u64 n)
{
    u64 from = 0, to = 0, phys = 0, last[2], accumulator = c->gpr[RAX] & size_mask(s->size);
    s64 step = s->back ? -(s64)s->size : (s64)s->size;
    struct slot *code = 0;
    int writes = s->op == STRING_MOVS || s->op == STRING_STOS;

    if (has_source(s) && !(from = linear_host(c, source, 0)))
        return 0;
    if (has_dest(s) && !(to = writes ? write_host(c, dest, &code, &phys) : linear_host(c, dest, 0)))
        return 0;
    switch (s->op) {
    case STRING_MOVS: host_move(s->size, s->back, to, from, n); break;
    case STRING_STOS: host_store(s->size, s->back, to, accumulator, n); break;
    case STRING_LODS: set_reg(c, RAX, s->size, host_load(from + (u64)step * (n - 1), s->size)); break;
    default:
        n = scan(s->size, step, from, accumulator, to, n, s->rep == 2, last);
        c->fl = compare(s->size, last[0], last[1]);
    }
    if (code)
        code_written(c->vm, code, s->back ? phys - (n - 1) * s->size : phys, (u32)(n * s->size));
    return n;
}

/* One element by way of the MMU: 0, a vector, or -1. */
static int slow(struct cpu *c, const struct string *s, u32 seg, u64 source, u64 dest)
{
    u64 a = c->gpr[RAX] & size_mask(s->size), b = 0;
    int r, user = c->cpl == 3, writes = s->op == STRING_MOVS || s->op == STRING_STOS;
    if (s->limits && ((has_source(s) && (r = check_segment(c, (int)seg, c->gpr[RSI] & s->amask, s->size, 0))) ||
                      (has_dest(s) && (r = check_segment(c, ES, c->gpr[RDI] & s->amask, s->size, writes)))))
        return r;
    if (has_source(s)) {
        a = 0;
        if ((r = linear_read(c, source, &a, s->size, user)))
            return r;
    }
    if (writes)
        return linear_write(c, dest, &a, s->size, user);
    if (s->op == STRING_LODS) {
        set_reg(c, RAX, s->size, a);
        return 0;
    }
    if ((r = linear_read(c, dest, &b, s->size, user)))
        return r;
    c->fl = compare(s->size, a, b);
    return 0;
}

int h_string(struct cpu *c, u32 arg)
{
    u32 imm = ARG_IMM(arg), seg = imm >> 9 & 7;
    struct string s = {.op = imm & 7, .size = 1u << (imm >> 3 & 3), .rep = imm >> 5 & 3, .asize = 2u << (imm >> 7 & 3)};
    s.back = (c->eflags & F_DF) != 0;
    s.limits = (c->mode & (MODE_PE | MODE_64)) == MODE_PE;
    s.amask = size_mask(s.asize);
    s.lmask = linear_mask(c);
    s.source_base = seg == FS ? c->fsbase : seg == GS ? c->gsbase : c->mode & MODE_64 ? 0 : c->segbase[seg];
    s.dest_base = c->mode & MODE_64 ? 0 : c->segbase[ES];
    u64 flags = c->fl; /* stay until the last iteration (SDM vol. 2, CMPS) */

    for (;;) {
        u64 count = s.rep ? c->gpr[RCX] & s.amask : 1, n = count, more, off;
        u64 source = 0, dest = 0, done;
        if (!count)
            return H_CONTINUE;
        if (c->mode & MODE_STEP)
            n = 1;
        if (has_source(&s)) {
            off = c->gpr[RSI] & s.amask;
            source = (s.source_base + off) & s.lmask;
            more = span(c, &s, seg, 0, source, off);
            n = more < n ? more : n;
        }
        if (has_dest(&s)) {
            off = c->gpr[RDI] & s.amask;
            dest = (s.dest_base + off) & s.lmask;
            more = span(c, &s, ES, s.op == STRING_MOVS || s.op == STRING_STOS, dest, off);
            n = more < n ? more : n;
        }
        if (unlikely(c->mode & MODE_AC) && (((has_source(&s) ? source : 0) | (has_dest(&s) ? dest : 0)) & (s.size - 1))) {
            c->fl = flags;
            return raise(c, EX_AC, 1, 0);
        }
        done = n ? fast(c, &s, source, dest, n) : 0;
        if (!done) {
            int r = slow(c, &s, seg, source, dest);
            if (r) {
                c->fl = flags;
                return raise_fault(c, r);
            }
            done = 1;
            c->device.at = c->device.count = 0;
        }
        more = s.back ? -done * s.size : done * s.size;
        if (has_source(&s))
            set_reg(c, RSI, s.asize, c->gpr[RSI] + more);
        if (has_dest(&s))
            set_reg(c, RDI, s.asize, c->gpr[RDI] + more);
        if (!s.rep)
            return H_CONTINUE;
        set_reg(c, RCX, s.asize, c->gpr[RCX] - done);
        if (count == done || ((s.op == STRING_CMPS || s.op == STRING_SCAS) && !(c->fl & F_ZF << 8) == (s.rep == 1)))
            return H_CONTINUE;
        if (c->poll || c->mode & MODE_STEP || c->debug & DEBUG_HITS) {
            c->fl = flags;
            c->debug |= DEBUG_RF; /* the rest after the interrupt or trap, from the same instruction */
            return H_REDIRECT;
        }
    }
}
