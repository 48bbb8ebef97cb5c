/* Invariants of the translator's tables, asserted where native code is entered and left: only in the build with -DTCG_CHECK,
 * which the hostile-guest fuzzer runs. A broken one ends the process with status 86, after a line on standard error.
 *
 * Here is also what UndefinedBehaviorSanitizer calls: its own library would use SSE registers, which are the guest's. */
#include "cpu.h"
#include "internal.h"

#define PLAIN __attribute__((no_sanitize("address", "undefined")))
enum { EVERY = 128 }; /* entries between two looks at the tables that all vCPUs share */

static long host_call(long n, long a, long b, long c)
{
    long ret;
    __asm__ volatile("syscall" : "=a"(ret) : "a"(n), "D"(a), "S"(b), "d"(c) : "rcx", "r11", "memory");
    return ret;
}

static u32 text(char *to, u32 at, const char *from)
{
    while (from && *from && at < 480)
        to[at++] = *from++;
    return at;
}

static u32 number(char *to, u32 at, u64 value)
{
    at = text(to, at, " 0x");
    for (int shift = 60; shift >= 0; shift -= 4)
        if (value >> shift || !shift)
            to[at++] = "0123456789abcdef"[value >> shift & 15];
    return at;
}

PLAIN static void fail(const char *what, const char *file, u64 a, u64 b)
{
    char line[600];
    u32 at = text(line, 0, "tcg check: ");
    at = text(line, at, what);
    at = text(line, at, " ");
    at = text(line, at, file);
    at = number(line, at, a);
    at = number(line, at, b);
    line[at++] = '\n';
    host_call(1, 2, (long)line, at);
    host_call(231, 86, 0, 0);
}

#define HOLDS(condition, a, b) do { if (!(condition)) fail(#condition, __func__, (u64)(a), (u64)(b)); } while (0)

static int canonical(u64 linear) { return (u64)((s64)(linear << 16) >> 16) == linear; }

static struct slot *slot_of_host(struct vm *vm, u64 host)
{
    for (u32 i = 0; i < vm->nslots; i++)
        if (host - vm->slots[i].host < vm->slots[i].size)
            return &vm->slots[i];
    return 0;
}

/* Whether tlb_unwrite() would find an entry. */
static int is_listed(const struct tlb_lists *l, u32 i, u64 host)
{
    u32 list = (u32)((host >> 12) * 0x9e3779b97f4a7c15ul >> (64 - TLB_BITS)), steps = 0;
    for (u32 at = l->head[list]; at && steps <= TLB_SIZE; at = l->after[at - 1], steps++)
        if (at - 1 == i)
            return 1;
    return 0;
}

/* Entries that a guest can name (of their own index) are of canonical pages and point into a slot. */
static void check_tlb(struct cpu *c, const struct tlb *t, int write)
{
    for (u32 i = 0; i < TLB_SIZE; i++) {
        u64 tag = t->e[i].tag, host = t->e[i].add;
        if ((tag >> 12 & (TLB_SIZE - 1)) != i)
            continue; /* no address has this tag at this index */
        HOLDS(t->filled[i / 64] >> i % 64 & 1, tag, i);
        HOLDS(!(t->large[i / 64] >> i % 64 & 1) || t->large_in & seen_in(tag >> 30), tag, i);
        HOLDS(!(tag & 0xfff), tag, i);
        HOLDS(canonical(tag), tag, i);
        struct slot *s = slot_of_host(c->vm, host);
        HOLDS(s && !(host & 0xfff), tag, host);
        if (write) {
            HOLDS(!s->readonly, tag, host);
            HOLDS(is_listed(&c->tlb_pages[t - c->tlb_w], i, host), tag, host);
            HOLDS(!__atomic_load_n(&s->pages[(host - s->host) >> 12].code, __ATOMIC_SEQ_CST), tag, host);
        }
    }
}

static int is_block(const struct vm *vm, u64 at)
{
    u64 offset = at - vm->code_rx;
    return offset < vm->code_used && !(at % HEADER_ALIGN) && offset % CHUNK >= ((struct chunk *)vm->chunks)[offset >> CHUNK_BITS].high;
}

static void check_jumps(struct cpu *c, u32 m)
{
    for (u32 i = 0; i < jc_size(m); i++) {
        struct jump j = c->jc[m][i];
        if (jc_index(j.pc, m) != i)
            continue;
        HOLDS(c->jc_used[m][i / 64] >> i % 64 & 1 && c->jc_some[m][i / 4096] >> i / 64 % 64 & 1, j.pc, i);
        HOLDS(!(c->jc_mode[m] & MODE_64) || canonical(j.pc), j.pc, i);
        struct block *b = block_of(j.code);
        HOLDS(is_block(c->vm, (u64)b) && b->code == j.code, j.pc, j.code);
        HOLDS(b->valid && b->pc == pc_for(b->mode, j.pc) && jc_index_of(c, b, m) == i, j.pc, b->pc);
        HOLDS(b->mode == c->jc_mode[m] && b->cs_base == c->jc_base[m], b->mode, c->jc_mode[m]);
        u64 linear = b->mode & MODE_64 ? j.pc : (u32)(b->cs_base + j.pc);
        HOLDS(c->code_in[m] & seen_in(linear >> 21), j.pc, c->code_in[m]);
        u64 next = (linear & ~0xffful) + 4096; /* in the block's mode, which is not the processor's at each moment */
        if (!(b->mode & MODE_64))
            next = (u32)next;
        if (b->phys2 != ~0ul)
            HOLDS(c->code_in[m] & seen_in(next >> 21), j.pc, c->code_in[m]);
    }
}

static int side_of(const struct block *b, u64 gpa) { return b->phys >> 12 != gpa >> 12; }

static int two_pages(const struct block *b) { return b->phys2 != ~0ul && b->phys2 >> 12 != b->phys >> 12; }

static u64 covered(const struct block *b, u64 gpa)
{
    u32 low = 0, high;
    if (b->phys2 != ~0ul && !two_pages(b))
        return 1ul << 63 | 1;
    if (!side_of(b, gpa)) {
        low = b->phys & 0xfff;
        high = low + b->length - 1 > 0xfff ? 0xfff : low + b->length - 1;
    } else {
        high = (u32)((b->phys & 0xfff) + b->length - 1) & 0xfff;
    }
    low >>= 6, high >>= 6;
    return high - low == 63 ? ~0ul : ((1ul << (high - low + 1)) - 1) << low;
}

static void check_page(const struct vm *vm, const struct page *p, u64 gpa)
{
    u64 listed = 0, before = 0;
    for (u64 one = p->first; one;) {
        const struct block *b = (const struct block *)one;
        HOLDS(is_block(vm, one), one, gpa);
        HOLDS(b->valid, one, gpa);
        HOLDS(b->phys >> 12 == gpa >> 12 || b->phys2 >> 12 == gpa >> 12, b->phys, gpa);
        HOLDS(!(covered(b, gpa) & ~p->code), covered(b, gpa), p->code);
        HOLDS(!before || b->page_prev[side_of(b, gpa)] == before, one, gpa);
        HOLDS(++listed <= p->count, listed, p->count);
        before = one;
        one = b->page_next[side_of(b, gpa)];
    }
    HOLDS(listed == p->count, listed, p->count);
    const struct block *newest = (const struct block *)p->first;
    HOLDS(!newest || newest->page_prev[side_of(newest, gpa)] == before, newest, before);
}

/* A chunk's pieces of code and its headers lie behind each other, as many of both. */
static void check_chunk(struct vm *vm, u64 base, u64 *all, u64 *blocks, u64 *reaches)
{
    const struct chunk *chunk = (struct chunk *)vm->chunks + ((base - vm->code_rx) >> CHUNK_BITS);
    u64 end = base + CHUNK, code = base + CODE_ALIGN, pieces = 0, headers = 0, at = base + chunk->high;
    HOLDS(chunk->low <= chunk->high && chunk->high <= CHUNK, chunk->low, chunk->high);
    for (; code < base + chunk->low; pieces++) {
        const struct block *b = block_of(code);
        HOLDS(is_block(vm, (u64)b) && b->code == code, code, b);
        HOLDS(block_at(vm, code) == b, code, block_at(vm, code));
        code += (b->code_length + sizeof(u32) + CODE_ALIGN - 1) & ~(u64)(CODE_ALIGN - 1);
    }
    HOLDS(code == base + chunk->low, code, chunk->low);
    for (; at < end; headers++) {
        const struct block *b = (const struct block *)at;
        HOLDS(b->code_length && b->entry < b->code_length && b->code_length < CHUNK, at, b->code_length);
        HOLDS(block_at(vm, at) == b, at, block_at(vm, at));
        ++*all;
        if (b->valid) {
            ++*blocks;
            *reaches += 1 + (u64)(two_pages(b) && phys_host(vm, b->phys2, 0)); /* it may go on where no RAM is */
        }
        u64 steps = 0;
        for (u64 s = b->incoming; s > 1; s = ((struct site *)s)->next) {
            HOLDS(s > vm->code_rx && s < vm->code_rx + vm->code_used, at, s);
            HOLDS(((struct site *)s)->block == at, at, s);
            HOLDS(++steps < 1u << 22, at, s);
        }
        at += (sizeof(struct block) + b->cold_length + HEADER_ALIGN - 1) & ~(u64)(HEADER_ALIGN - 1);
    }
    HOLDS(at == end && pieces == headers, pieces, headers);
}

/* Blocks that are valid are in one hash chain, and in the list of each page they reach. */
static void check_shared(struct vm *vm)
{
    u64 blocks = 0, reaches = 0, chained = 0, listed = 0, all = 0;
    HOLDS(vm->code_used <= vm->code_size && !(vm->code_used % CHUNK), vm->code_used, vm->code_size);
    for (u64 at = 0; at < vm->code_used; at += CHUNK)
        check_chunk(vm, vm->code_rx + at, &all, &blocks, &reaches);
    for (u64 i = 0; i <= vm->hash_mask; i++)
        for (u64 one = vm->hash[i]; one; one = ((struct block *)one)->hash_next) {
            HOLDS(is_block(vm, one), one, i);
            HOLDS(((struct block *)one)->valid, one, i);
            HOLDS(++chained <= all, one, i);
        }
    HOLDS(chained == blocks, chained, blocks);
    for (u32 i = 0; i < vm->nslots; i++)
        for (u64 page = 0; page < vm->slots[i].size >> 12; page++) {
            const struct page *p = &vm->slots[i].pages[page];
            check_page(vm, p, vm->slots[i].gpa + (page << 12));
            listed += p->count;
        }
    HOLDS(listed == reaches, listed, reaches);
}

static u64 entries;

void check_tables(struct cpu *c)
{
    struct vm *vm = c->vm;
    for (u32 m = 0; m < 2; m++) {
        check_tlb(c, &c->tlb_r[m], 0);
        check_tlb(c, &c->tlb_w[m], 1);
        for (u32 i = 0; i < XTLB_SIZE; i++) {
            u64 tag = c->xtlb[m][i].tag & ~1ul;
            HOLDS((tag >> 12 & (XTLB_SIZE - 1)) != i || canonical(tag), tag, i);
            HOLDS((tag >> 12 & (XTLB_SIZE - 1)) != i || c->code_in[m] & seen_in(tag >> 21), tag, i);
        }
    }
    spin_lock(&vm->lock);
    check_jumps(c, 0);
    check_jumps(c, 1);
    if (__atomic_fetch_add(&entries, 1, __ATOMIC_RELAXED) % EVERY == 0)
        check_shared(vm);
    spin_unlock(&vm->lock);
}

/* Before native code goes on at *to*: it lies in a block of this generation, at its start only if that is what RIP means. */
u64 check_target(struct cpu *c, u64 to)
{
    const struct block *b = block_at(c->vm, to);
    HOLDS(b && (to < (u64)b || to >= (u64)(b + 1)), to, b);
    if (to == b->code) {
        HOLDS(base_for(c, b->mode) + b->pc == c->rip, b->pc, c->rip);
        HOLDS((b->mode & 0xffff) == c->mode, b->mode, c->mode);
        HOLDS(b->cs_base == (c->mode & MODE_64 ? 0 : c->seg[CS].base), b->cs_base, c->seg[CS].base);
    }
    return to;
}

/* No access of a guest reaches memory that the host has not: only the processor's own checks may fault in translated code. */
void check_signal(int sig, int code, u64 address, u64 rip)
{
    if (sig == 11 && (code == 1 || code == 2))
        fail("translated code touched memory that is not there", "check_signal", address, rip);
}

/* Where the process dies of a signal in native code: as an offset from a function that is told. */
void check_died(int sig, u64 address, u64 rip, u64 near)
{
    char line[200];
    u32 at = number(line, text(line, 0, "tcg check: died by signal"), (u64)sig);
    at = number(line, text(line, at, " at handler +"), rip - near);
    at = number(line, text(line, at, " (or -"), near - rip);
    at = number(line, text(line, at, "), address"), address);
    line[at++] = '\n';
    host_call(1, 2, (long)line, at);
}

/* ---- what instrumented code calls ---- */

struct location { const char *file; u32 line, column; };

#define UBSAN(name, ...) \
    PLAIN void __ubsan_handle_##name##_abort(void *data __VA_ARGS__); \
    PLAIN void __ubsan_handle_##name##_abort(void *data __VA_ARGS__) \
    { \
        const struct location *at = data; \
        fail("undefined: " #name, at->file, at->line, at->column); \
    }
#define ONE , void *a __attribute__((unused))
#define TWO ONE, void *b __attribute__((unused))
UBSAN(out_of_bounds, ONE)
UBSAN(shift_out_of_bounds, TWO)
UBSAN(add_overflow, TWO)
UBSAN(sub_overflow, TWO)
UBSAN(mul_overflow, TWO)
UBSAN(divrem_overflow, TWO)
UBSAN(negate_overflow, ONE)
UBSAN(vla_bound_not_positive, ONE)
UBSAN(load_invalid_value, ONE)
