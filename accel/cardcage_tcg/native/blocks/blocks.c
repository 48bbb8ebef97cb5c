/* Translated blocks: look-up, installation, chaining, invalidation. All changes happen under vm.lock. */
#include "cpu.h"
#include "internal.h"
#include "helpers.h"

#define RW(vm, type, rx) ((type *)((u64)(rx) + ((vm)->code_rw - (vm)->code_rx)))

enum { PAGE_BLOCKS = 8192 }; /* the most on one page: aliases, modes and segment bases can make any number of them, and a store kills all */

static u64 *chain_of(struct vm *vm, u64 phys, u32 mode, u64 pc, u64 cs_base)
{
    const u64 *key = vm->hash_key;
    u64 h = (phys * key[0] ^ (u64)mode * key[1] ^ pc * key[2] ^ cs_base * key[3]) * key[0];
    return &vm->hash[h >> 40 & vm->hash_mask];
}

static u64 header_size(const struct block *b) { return (sizeof *b + b->cold_length + HEADER_ALIGN - 1) & ~(u64)(HEADER_ALIGN - 1); }

/* Bytes from one piece of code to where the next one begins. */
static u64 code_size(u32 length) { return (length + sizeof(u32) + CODE_ALIGN - 1) & ~(u64)(CODE_ALIGN - 1); }

static struct chunk *chunk_at(const struct vm *vm, u64 offset) { return (struct chunk *)vm->chunks + (offset >> CHUNK_BITS); }

/* Make sure that the last chunk has room for a block, with the lock held; 0: the buffer is full. */
static int has_room(struct vm *vm, const struct block *plan)
{
    if (vm->code_used) {
        const struct chunk *last = chunk_at(vm, vm->code_used - CHUNK);
        if (last->low + code_size(plan->code_length) + header_size(plan) <= last->high)
            return 1;
    }
    if (vm->code_used + CHUNK > vm->code_size)
        return 0;
    *chunk_at(vm, vm->code_used) = (struct chunk){ CODE_ALIGN, CHUNK };
    __atomic_store_n(&vm->code_used, vm->code_used + CHUNK, __ATOMIC_RELEASE);
    return 1;
}

/* Put a block into the buffer, with the lock held; 0: it is full. */
struct block *lay(struct vm *vm, const struct block *plan, const struct code *code)
{
    if (!has_room(vm, plan))
        return 0;
    u64 base = vm->code_rx + vm->code_used - CHUNK;
    struct chunk *last = chunk_at(vm, vm->code_used - CHUNK);
    u32 low = last->low + (u32)code_size(plan->code_length), high = last->high - (u32)header_size(plan);
    u64 hot = base + last->low;
    struct block *b = (struct block *)(base + high), *w = RW(vm, struct block, b);
    u8 *to = RW(vm, u8, hot), *cold = (u8 *)(w + 1);
    u32 apart = (u32)((u64)(b + 1) - hot - (u64)(code->cold - code->hot)); /* more than now */
    *w = *plan;
    w->code = hot;
    memcpy(cold, code->cold, plan->cold_length);
    memcpy(to, code->hot, plan->code_length);
    ((u32 *)to)[-1] = (u32)((u64)b - hot);
    for (u32 i = 0; i < code->fixes; i++) {
        u32 at = code->fix[i] & ~FIX_COLD;
        if (code->fix[i] & FIX_COLD)
            *(u32 *)(cold + at) -= apart;
        else
            *(u32 *)(to + at) += apart;
    }
    for (u32 i = 0; i < code->jumps; i++)
        *(u32 *)(cold + code->jump[i]) += apart;
    __atomic_store_n(&last->low, low, __ATOMIC_RELEASE); /* block_at() looks without the lock */
    __atomic_store_n(&last->high, high, __ATOMIC_RELEASE);
    return b;
}

/* A block that is to run once: no look-up finds it, and no write ends it. */
u64 put_block(struct vm *vm, const struct block *plan, const struct code *code)
{
    spin_lock(&vm->lock);
    struct block *b = lay(vm, plan, code);
    spin_unlock(&vm->lock);
    return b ? (u64)b : TRANSLATE_FULL;
}

/* The block that a host address lies in, 0 if it lies in none. For a vCPU in native code: none is forgotten meanwhile. */
struct block *block_at(struct vm *vm, u64 host)
{
    u64 offset = host - vm->code_rx;
    if (offset >= __atomic_load_n(&vm->code_used, __ATOMIC_ACQUIRE))
        return 0;
    const struct chunk *chunk = chunk_at(vm, offset);
    u64 base = host - offset % CHUNK, low = base + __atomic_load_n(&chunk->low, __ATOMIC_ACQUIRE);
    if (host >= low) { /* among the headers, of which it can see all that may lead here */
        for (u64 at = base + __atomic_load_n(&chunk->high, __ATOMIC_ACQUIRE); at <= host && at < base + CHUNK; at += header_size((struct block *)at))
            if (host < at + header_size((struct block *)at))
                return (struct block *)at;
        return 0;
    }
    for (u64 at = base + CODE_ALIGN; at <= host && at < low; at += code_size(block_of(at)->code_length))
        if (host < at + block_of(at)->code_length)
            return block_of(at);
    return 0;
}

static struct page *page_of(struct vm *vm, u64 gpa, struct slot **slot)
{
    struct slot *s;
    if (!phys_host(vm, gpa, &s))
        return 0;
    if (slot)
        *slot = s;
    return &s->pages[(gpa - s->gpa) >> 12];
}

/* Physical page of a linear address for execution; 0 or a vector. */
static int exec_page(struct cpu *c, u64 linear, u64 *phys, u32 *global)
{
    u32 which = c->cpl == 3;
    struct xtlb_entry *x = &c->xtlb[which][(linear >> 12) & (XTLB_SIZE - 1)];
    u64 page = linear & ~0xffful;
    if (likely((x->tag & ~1ul) == page)) {
        *phys = x->phys;
        *global = !(x->tag & 1);
        return 0;
    }
    u32 writable;
    int vector = walk(c, linear, ACC_EXEC, (int)which, phys, global, &writable);
    if (vector)
        return vector;
    *phys &= ~0xffful;
    x->tag = page | !*global;
    x->phys = *phys;
    c->code_in[which] |= seen_in(linear >> 21);
    if (writable & PAGE_LARGE) {
        u64 region = linear >> 21;
        if (!c->code_large[which] || region < c->large_first[which])
            c->large_first[which] = region;
        if (!c->code_large[which] || region > c->large_last[which])
            c->large_last[which] = region;
        c->code_large[which] |= seen_in(region);
    }
    if (unlikely(writable & PAGE_HUGE))
        c->code_huge[which] |= seen_in(linear >> 30);
    return 0;
}

/* The block at *phys* that goes on to page *second* if it reaches over, with the lock held. *unknown is set where that decides and *second*
 * is UNKNOWN: a page walk may have to take the lock, so the caller does it. */
enum { UNKNOWN = 1 }; /* no page's address */

static struct block *find(struct cpu *c, u64 phys, u32 mode, u64 cs_base, u64 second, int *unknown)
{
    *unknown = 0;
    u64 pc = pc_for(mode, c->rip);
    struct block *b = (struct block *)*chain_of(c->vm, phys, mode, pc, cs_base);
    for (; b; b = (struct block *)b->hash_next) {
        if (b->phys != phys || b->pc != pc || b->mode != mode || b->cs_base != cs_base || !b->valid)
            continue;
        if (b->phys2 == ~0ul || b->phys2 == second)
            return b;
        *unknown |= second == UNKNOWN;
    }
    return 0;
}

/* Likewise, without the lock; it is held when a block was found, and *global says of both its pages whether they are. On 0 the instruction may fault when it is fetched: whoever translates it
 * sees to that. */
static struct block *look_up(struct cpu *c, u64 phys, u64 linear, u32 mode, u64 cs_base, u32 *global)
{
    int unknown;
    spin_lock(&c->vm->lock);
    struct block *b = find(c, phys, mode, cs_base, UNKNOWN, &unknown);
    if (b)
        return b;
    spin_unlock(&c->vm->lock);
    if (!unknown)
        return 0;
    u64 second, keep = c->cr2, code = c->scratch[3];
    u32 global_second;
    if (exec_page(c, linear_after(c, linear & ~0xffful, 4096, 0), &second, &global_second)) {
        c->cr2 = keep, c->scratch[3] = code;
        return 0;
    }
    *global &= global_second;
    spin_lock(&c->vm->lock);
    b = find(c, phys, mode, cs_base, second, &unknown);
    if (!b)
        spin_unlock(&c->vm->lock);
    return b;
}

/* The jump cache has a block for c->rip from now on, with the lock held. */
static void jc_fill(struct cpu *c, u32 m, u32 entry, const struct block *b)
{
    if (floats(b->mode)) {
        u32 before = jc_index_of(c, b, m);
        if (before != entry && c->jc[m][before].code == b->code)
            jc_drop(c, m, before);
        *seen_at(c, b) = (u16)(c->rip >> 12);
    }
    c->jc[m][entry].code = b->code;
    c->jc[m][entry].pc = c->rip;
    c->jc_used[m][entry / 64] |= 1ul << entry % 64;
    c->jc_some[m][entry / 4096] |= 1ul << entry / 64 % 64;
}

/* Where to go on at c->rip: host code (entry that restores flags from c->fl), or 0: leave, c->reason says why. */
u64 native_dispatch(struct cpu *c)
{
    c->pending_size = 0; /* what a device answered was for the instruction before */
    u32 plain = c->plain ? KEY_PLAIN : 0; /* such blocks keep out of the jump cache: at their address it has the others */
    c->plain = 0;
    for (;;) {
        if (unlikely(c->debug) && debug_trap(c) == H_EXIT)
            return 0;
        if (unlikely(c->stop)) {
            c->reason = R_DEBUG;
            return 0;
        }
        if (unlikely(__atomic_load_n(&c->poll, __ATOMIC_SEQ_CST)) || unlikely(c->halted)) {
            if (check_events(c) == H_EXIT)
                return 0;
            continue;
        }
        u64 cs_base = c->mode & MODE_64 ? 0 : c->seg[CS].base;
        u64 linear = c->mode & MODE_64 ? c->rip : (u32)(cs_base + c->rip);
        if (unlikely(c->vm->points || c->pointed)) {
            u32 pointed = (u32)points_on_page(c->vm, linear);
            if (pointed != c->pointed) {
                c->pointed = pointed;
                update_mode(c);
            }
        }
        u32 m = c->mode & MODE_CPL3 ? 1 : 0, step = c->mode & MODE_STEP; /* steps keep out of the jump cache */
        if (unlikely(c->debug) && !step)
            c->debug = 0; /* RF, which only code breakpoints ask for */
        if (unlikely(c->jc_mode[m] != c->mode || c->jc_base[m] != cs_base) && !step) {
            jc_flush_one(c, m);
            c->jc_mode[m] = c->mode;
            c->jc_base[m] = cs_base;
        }
        if (unlikely(c->mode & MODE_64 && (u64)((s64)(linear << 16) >> 16) != linear)) {
            if (raise(c, EX_GP, 1, 0) == H_EXIT)
                return 0;
            continue;
        }
        c->base = linear & ~0xffful;
        u32 entry = jc_index(c->rip, m);
        struct jump *j = &c->jc[m][entry];
        if (j->pc == c->rip && likely(!step && !plain))
            return j->code;
        u64 phys;
        u32 global;
        int vector = exec_page(c, linear, &phys, &global);
        if (vector) {
            if (raise(c, (u32)vector, 1, (u32)c->scratch[3]) == H_EXIT)
                return 0;
            continue;
        }
        phys |= linear & 0xfff;
        struct block *b = look_up(c, phys, linear, c->mode | plain, cs_base, &global);
        if (likely(b != 0)) {
            if (likely(!step && !plain)) {
                jc_fill(c, m, entry, b);
                c->jc_local[m] |= !global;
            }
            u64 code = b->code;
            spin_unlock(&c->vm->lock); /* not before: kill() clears jump caches */
            return code;
        }
        u64 made = native_translate(c, phys, linear, plain);
        if (made != TRANSLATE_MISSING && made != TRANSLATE_FULL)
            continue;
        c->info[2] = made;
        c->reason = R_TRANSLATE;
        c->info[0] = phys;
        c->info[1] = linear;
        return 0;
    }
}

/* Where tcg_enter goes on: at cpu.resume if its code is still there, else by what Python was left for. 0: leave again. */
u64 native_resume(struct cpu *c)
{
    u64 code = c->resume;
    if (!code)
        return native_dispatch(c);
    int stale = c->dropped && (c->resume_kind == RESUME_LOAD || c->resume_kind == RESUME_AFTER); /* addresses that a block's accesses share */
    if (c->resume_generation == c->vm->generation && likely(!stale)) {
        c->resume = 0;
        if (c->resume_kind != RESUME_AGAIN)
            c->pending_size = 0;
        return code;
    }
    if (c->resume_kind == RESUME_AFTER) { /* the instruction is done */
        c->resume = 0;
        c->rip = c->next_rip;
        return native_dispatch(c);
    }
    c->reason = R_RESTART;
    return 0;
}

/* Which instruction of which block called a stub: the disp32 of the NOP that follows the call has its offset, and how far the call lies
 * behind the start of the code, or (*cold*) of the header. */
static struct block *payload(u64 ret, int cold, u32 *offset)
{
    u32 p = *(u32 *)(ret + 4);
    struct block *b = cold ? (struct block *)(ret - (p >> 12)) : block_of(ret - (p >> 12));
    *offset = p & 0xfff;
    return b;
}

int native_helper(struct cpu *c, u32 arg, u64 ret)
{
    u32 offset;
    struct block *b = payload(ret, 0, &offset);
    u64 generation = c->vm->generation, next = rip_in(c, b, offset + (arg >> 8 & 15));
    c->rip = rip_in(c, b, offset);
    int action = helper_call(c, arg);
    if (action != H_CONTINUE)
        return action;
    int gone = generation != c->vm->generation; /* it waited, and others forgot the code that called it */
    int ends = gone || (c->code_hit && !b->valid) || (c->debug & DEBUG_HITS && !(b->mode & MODE_STEP)); /* a step ends anyway */
    c->code_hit = 0;
    if (likely(!ends))
        return H_CONTINUE;
    c->rip = next;
    return H_REDIRECT;
}

/* An indirect branch that the jump cache did not know. One to a non-canonical address faults before it moves the stack. */
int native_jump(struct cpu *c, u64 target, u64 ret, s32 moved)
{
    u32 offset;
    const struct block *b = payload(ret, 1, &offset);
    if (c->mode & MODE_64 ? (u64)((s64)(target << 16) >> 16) != target : c->mode & MODE_PE && target > c->seg[CS].limit) {
        c->rip = rip_in(c, b, offset);
        if (c->mode & (MODE_64 | MODE_SS32))
            c->gpr[RSP] = c->mode & MODE_64 ? c->gpr[RSP] - (u64)(s64)moved : (u32)(c->gpr[RSP] - (u64)(s64)moved);
        else
            c->gpr[RSP] = (c->gpr[RSP] & ~0xfffful) | (u16)(c->gpr[RSP] - (u64)(s64)moved);
        return raise(c, EX_GP, 1, 0);
    }
    c->rip = target;
    return H_REDIRECT;
}

int native_poll(struct cpu *c, u64 ret)
{
    u32 offset;
    const struct block *b = payload(ret, 1, &offset);
    c->rip = rip_in(c, b, offset);
    return check_events(c);
}

static void aim(struct vm *vm, struct site *s, u64 target)
{
    u64 field = (u64)s - s->jump;
    __atomic_store_n(RW(vm, s32, field), (s32)(target - field - 4), __ATOMIC_RELEASE);
}

static u64 stub_of(const struct site *s) { return (u64)s - 7; } /* the call before it */

static void link(struct vm *vm, struct site *s, struct block *to)
{
    if (s->next && s->block != (u64)to) /* in the list of a block that the target's address meant before */
        return;
    if (!s->next) {
        RW(vm, struct site, s)->next = to->incoming ? to->incoming : 1;
        RW(vm, struct site, s)->block = (u64)to;
        RW(vm, struct block, to)->incoming = (u64)s;
    }
    aim(vm, s, to->code + to->entry);
}

static void unlink_all(struct vm *vm, struct block *to)
{
    u64 at = to->incoming;
    while (at > 1) {
        struct site *s = (struct site *)at;
        at = s->next;
        RW(vm, struct site, s)->next = 0;
        aim(vm, s, stub_of(s));
    }
    RW(vm, struct block, to)->incoming = 0;
}

static void cross_none(struct vm *vm)
{
    vm->crossed = 0;
    vm->cross_end = 0;
    for (u32 i = 0; i < 16; i++)
        vm->cross_pages[i] = 0;
}

/* Chains between pages hold while the translation of both does; a change of a global translation stops them all. */
void cross_unlink(struct vm *vm)
{
    if (!vm->crossed)
        return;
    spin_lock(&vm->lock);
    for (u32 i = 0; i < vm->crossed; i++)
        aim(vm, ((struct site **)vm->cross)[i], stub_of(((struct site **)vm->cross)[i]));
    cross_none(vm);
    spin_unlock(&vm->lock);
}

/* The whole of the page: INVLPG may name any address of it. */
static void cross_mark(struct cpu *c, u64 linear)
{
    struct vm *vm = c->vm;
    u32 span = code_span(c, c->cpl == 3, linear);
    u64 first = linear >> span << span >> 21, end = first + (1ul << (span - 21));
    for (u64 at = first; at < end; at++)
        vm->cross_pages[at >> 6 & 15] |= 1ul << (at & 63);
    if (!vm->cross_end || first < vm->cross_first)
        vm->cross_first = first;
    if (end > vm->cross_end)
        vm->cross_end = end;
}

/* Whether a chain between pages may lead to a page in the same 2 MiB. */
int cross_reaches(const struct vm *vm, u64 linear)
{
    u64 region = linear >> 21;
    return vm->crossed && region >= vm->cross_first && region < vm->cross_end && vm->cross_pages[region >> 6 & 15] >> (region & 63) & 1;
}

u64 native_chain(struct cpu *c, u64 ret)
{
    struct site *s = (struct site *)ret;
    struct block *from = (struct block *)(ret - s->header);
    u64 generation = c->vm->generation, base = base_for(c, from->mode), linear = from->cs_base + base + from->pc;
    u32 plain = (u32)s->plain, mode = (from->mode & ~(u32)KEY_PLAIN) | plain;
    u64 pc = rip_in(c, from, (u64)s->target);
    c->plain = plain;
    c->rip = pc;
    u64 code = native_dispatch(c);
    if (!code || generation != c->vm->generation) /* where it came from is gone */
        return code;
    struct block *to = block_of(code);
    /* an interrupt may have been taken instead, or the target was reached in another mode */
    if (base_for(c, to->mode) + to->pc != pc || to->mode != mode || to->cs_base != from->cs_base || from->mode & MODE_STEP)
        return code;
    struct vm *vm = c->vm;
    u64 goal = to->cs_base + pc;
    int same = (linear ^ goal) >> 12 == 0 && to->phys2 == ~0ul && (from->phys ^ to->phys) >> 12 == 0;
    u64 phys;
    u32 global_from = 0, global_to = 0, g2 = 1;
    int cross = !same && !floats(mode) && exec_page(c, linear, &phys, &global_from) == 0 && exec_page(c, goal, &phys, &global_to) == 0 &&
                (to->phys2 == ~0ul || exec_page(c, linear_after(c, goal & ~0xffful, 4096, 0), &phys, &g2) == 0) && global_from && global_to && g2;
    spin_lock(&vm->lock);
    if (from->valid && to->valid) {
        if (same) {
            link(vm, s, to);
        } else if (plain) {
            ; /* its page was moved or changed meanwhile */
        } else if (cross && vm->crossed < MAX_CROSS) {
            ((struct site **)vm->cross)[vm->crossed++] = s;
            cross_mark(c, goal);
            if (to->phys2 != ~0ul)
                cross_mark(c, linear_after(c, goal, 4096, 0));
            link(vm, s, to);
        } else if (!s->next) {
            struct block plan = { .cs_base = from->cs_base, .phys = ~0ul, .phys2 = ~0ul, .mode = mode | KEY_BRIDGE };
            struct block *bridge = (struct block *)make_bridge(vm, &plan, pc - base);
            if (bridge)
                link(vm, s, bridge);
        }
    }
    spin_unlock(&vm->lock);
    return code;
}

/* Every jump between pages is looked up again. */
EXPORTED void tcg_unlink_pages(struct vm *vm) { cross_unlink(vm); }

/* ---- invalidation ---- */

static int side_of(const struct block *b, u64 gpa) { return b->phys >> 12 != gpa >> 12; }

static u64 *next_in(struct vm *vm, struct block *b, u64 gpa) { return &RW(vm, struct block, b)->page_next[side_of(b, gpa)]; }
static u64 *previous_in(struct vm *vm, struct block *b, u64 gpa) { return &RW(vm, struct block, b)->page_prev[side_of(b, gpa)]; }

/* The list begins with the newest block, whose previous one is the oldest. */
static void page_add(struct vm *vm, struct page *p, struct block *b, u64 gpa)
{
    struct block *first = (struct block *)p->first;
    *next_in(vm, b, gpa) = p->first;
    *previous_in(vm, b, gpa) = first ? *previous_in(vm, first, gpa) : (u64)b;
    if (first)
        *previous_in(vm, first, gpa) = (u64)b;
    p->first = (u64)b;
    p->count++;
}

static void page_remove(struct vm *vm, struct block *b, u64 gpa)
{
    struct page *p = page_of(vm, gpa, 0);
    u64 next = *next_in(vm, b, gpa), previous = *previous_in(vm, b, gpa);
    if (!p)
        return;
    if (p->first == (u64)b)
        p->first = next;
    else
        *next_in(vm, (struct block *)previous, gpa) = next;
    if (next)
        *previous_in(vm, (struct block *)next, gpa) = previous;
    else if (p->first)
        *previous_in(vm, (struct block *)p->first, gpa) = previous;
    p->count--;
}

static int two_pages(const struct block *b) { return b->phys2 != ~0ul && b->phys2 >> 12 != b->phys >> 12; }

static void kill(struct vm *vm, struct block *b)
{
    u64 *at = chain_of(vm, b->phys, b->mode, b->pc, b->cs_base);
    while (*at && *at != (u64)b)
        at = &RW(vm, struct block, *at)->hash_next;
    if (*at)
        *at = b->hash_next;
    RW(vm, struct block, b)->valid = 0;
    unlink_all(vm, b);
    page_remove(vm, b, b->phys);
    if (two_pages(b))
        page_remove(vm, b, b->phys2);
    for (u32 i = 0; i < vm->ncpus; i++)
        for (u32 m = 0; vm->cpus[i] && m < 2; m++) {
            u32 n = jc_index_of(vm->cpus[i], b, m);
            if (vm->cpus[i]->jc[m][n].code == b->code)
                __atomic_store_n(&vm->cpus[i]->jc[m][n].pc, jump_nothing(n), __ATOMIC_RELAXED);
        }
    vm->stat[0]++;
}

static u64 granules(u32 low, u32 high) /* byte offsets in a page, inclusive */
{
    low >>= 6, high >>= 6;
    return high - low == 63 ? ~0ul : ((1ul << (high - low + 1)) - 1) << low;
}

/* The part of a block that lies in the page of gpa, as offsets. */
static void extent(struct block *b, u64 gpa, u32 *low, u32 *high)
{
    if (b->phys2 != ~0ul && !two_pages(b)) { /* from the end of a page to its own start, by an alias */
        *low = 0;
        *high = 0xfff;
    } else if ((b->phys >> 12) == (gpa >> 12)) {
        *low = b->phys & 0xfff;
        *high = *low + b->length - 1;
        if (*high > 0xfff)
            *high = 0xfff;
    } else {
        *low = 0;
        *high = (u32)((b->phys & 0xfff) + b->length - 1) & 0xfff;
    }
}

void code_written(struct vm *vm, struct slot *s, u64 gpa, u32 size)
{
    struct page *p = &s->pages[(gpa - s->gpa) >> 12];
    u32 low = gpa & 0xfff, high = low + size - 1;
    __atomic_thread_fence(__ATOMIC_SEQ_CST); /* the write first; install() marks the page before it compares */
    if (high > 0xfff)
        high = 0xfff;
    if (likely(!(__atomic_load_n(&p->code, __ATOMIC_SEQ_CST) & granules(low, high))))
        return;
    spin_lock(&vm->lock);
    u64 mask = 0;
    int hit = 0;
    for (u64 at = p->first; at;) {
        struct block *b = (struct block *)at;
        u32 from, to;
        at = b->page_next[side_of(b, gpa)];
        extent(b, gpa, &from, &to);
        if (from <= high && to >= low) {
            kill(vm, b);
            hit = 1;
        } else {
            mask |= granules(from, to);
        }
    }
    __atomic_store_n(&p->code, mask, __ATOMIC_SEQ_CST);
    if (hit)
        for (u32 i = 0; i < vm->ncpus; i++)
            if (vm->cpus[i])
                vm->cpus[i]->code_hit = 1;
    spin_unlock(&vm->lock);
}

/* The host wrote guest memory. */
EXPORTED void tcg_memory_written(struct vm *vm, u64 gpa, u64 size)
{
    while (size) {
        struct slot *s;
        u64 take = 4096 - (gpa & 0xfff);
        if (take > size)
            take = size;
        void *host = phys_host(vm, gpa, &s);
        if (host)
            mark_dirty(vm, host);
        if (host && s->pages[(gpa - s->gpa) >> 12].code)
            code_written(vm, s, gpa, (u32)take);
        gpa += take, size -= take;
    }
}

/* The same for many ranges: pairs of address and size. */
EXPORTED void tcg_memory_written_many(struct vm *vm, const u64 *ranges, u64 count)
{
    for (u64 i = 0; i < count; i++)
        tcg_memory_written(vm, ranges[2 * i], ranges[2 * i + 1]);
}

void tlb_unwrite(struct cpu *c, u64 host_page);

/* Watch a page that is about to be translated for the first time: no vCPU may keep writing it unseen. */
static void watch(struct vm *vm, u64 gpa)
{
    tcg_stop_world(vm);
    struct slot *s;
    struct page *p = page_of(vm, gpa, &s); /* only now: while others stopped the world the slots may have changed */
    if (p && __atomic_load_n(&p->code, __ATOMIC_SEQ_CST) != ~0ul && !p->first) {
        __atomic_store_n(&p->code, ~0ul, __ATOMIC_SEQ_CST);
        u64 host = s->host + ((gpa & ~0xffful) - s->gpa);
        for (u32 i = 0; i < vm->ncpus; i++)
            if (vm->cpus[i])
                tlb_unwrite(vm->cpus[i], host);
    }
    tcg_start_world(vm);
}

/* Likewise, from a vCPU that is in native code itself. */
void tcg_watch_running(struct cpu *c, u64 gpa)
{
    struct page *p = page_of(c->vm, gpa, 0);
    if (!p || p->first || __atomic_load_n(&p->code, __ATOMIC_SEQ_CST) == ~0ul)
        return;
    world_leave(c);
    watch(c->vm, gpa);
    world_enter(c);
}

/* Whether another vCPU may be in the midst of a read-modify-write that it began before this page was marked. */
static int being_written(const struct vm *vm, const struct cpu *self, u64 gpa)
{
    for (u32 i = 0; i < vm->ncpus; i++)
        if (vm->cpus[i] && vm->cpus[i] != self && __atomic_load_n(&vm->cpus[i]->rmw, __ATOMIC_SEQ_CST) == ((gpa & ~0xffful) | 1))
            return 1;
    return 0;
}

/* Put a block into the buffer: its header as planned, its code, and a copy of the guest bytes that it was made from. Its executable
 * address; TRANSLATE_CHANGED: memory has other bytes, translate again; TRANSLATE_FULL: flush first. */
u64 install(struct cpu *c, const struct block *plan, const struct code *code, const u8 *guest)
{
    struct vm *vm = c->vm;
    u64 result = TRANSLATE_CHANGED;
    int wait = 0;
    spin_lock(&vm->lock);
    u32 first = 4096 - (u32)(plan->phys & 0xfff), both = plan->phys2 != ~0ul;
    if (first > plan->length)
        first = plan->length;
    struct page *p = page_of(vm, plan->phys, 0), *p2 = both ? page_of(vm, plan->phys2, 0) : 0;
    /* a page without blocks must still be watched since tcg_watch: a write meanwhile ended that */
    if (!p || (!p->first && !p->code) || (p2 && !p2->first && !p2->code))
        goto out;
    if (!has_room(vm, plan)) {
        result = TRANSLATE_FULL;
        goto out;
    }
    for (int i = 0; i < 2; i++) {
        struct page *full = i ? p2 : p;
        while (full && full->count >= PAGE_BLOCKS && full->first) /* the oldest: likely of an address space that is gone */
            kill(vm, (struct block *)*previous_in(vm, (struct block *)full->first, i ? plan->phys2 : plan->phys));
    }
    __atomic_fetch_or(&p->code, granules(plan->phys & 0xfff, (u32)(plan->phys & 0xfff) + first - 1), __ATOMIC_SEQ_CST);
    if (p2)
        __atomic_fetch_or(&p2->code, granules(0, plan->length - first - 1), __ATOMIC_SEQ_CST);
    if (being_written(vm, c, plan->phys) || (p2 && being_written(vm, c, plan->phys2))) {
        wait = 1;
        goto out;
    }
    if (!same_bytes(phys_host(vm, plan->phys, 0), guest, first) ||
        (p2 && !same_bytes(phys_host(vm, plan->phys2, 0), guest + first, plan->length - first)))
        goto out;
    struct block *b = lay(vm, plan, code);
    u64 *head = chain_of(vm, b->phys, b->mode, b->pc, b->cs_base);
    RW(vm, struct block, b)->valid = 1;
    page_add(vm, p, b, b->phys);
    if (p2 && p2 != p)
        page_add(vm, p2, b, b->phys2);
    RW(vm, struct block, b)->hash_next = *head;
    *head = (u64)b;
    vm->stat[1]++;
    result = (u64)b;
out:
    spin_unlock(&vm->lock);
    if (wait) { /* what comes after finds the page marked */
        world_leave(c);
        tcg_stop_world(vm);
        tcg_start_world(vm);
        world_enter(c);
    }
    return result;
}

/* All lists of blocks are empty. Few blocks are gone through, and what the many of a full buffer left is given up as a whole: all vCPUs wait. */
static void clear_pages(struct vm *vm)
{
    if (vm->code_used > 16 * CHUNK) {
        for (u32 i = 0; i < vm->nslots; i++)
            zero_pages(vm->slots[i].pages, (vm->slots[i].size >> 12) * sizeof(struct page));
        return;
    }
    for (u64 at = 0; at < vm->code_used; at += CHUNK)
        for (u64 one = vm->code_rx + at + chunk_at(vm, at)->high; one < vm->code_rx + at + CHUNK; one += header_size((struct block *)one)) {
            struct block *b = (struct block *)one;
            struct page *p = page_of(vm, b->phys, 0), *p2 = page_of(vm, b->phys2, 0);
            if (p)
                *p = (struct page){ 0, 0, 0 };
            if (p2)
                *p2 = (struct page){ 0, 0, 0 };
        }
}

/* Forget all blocks; call it with the world stopped, from a thread that is not in native code. Who comes back to native code with an
 * address into the buffer sees by the generation that it means nothing any more. */
EXPORTED void tcg_flush_blocks(struct vm *vm)
{
    spin_lock(&vm->lock);
    clear_pages(vm);
    vm->generation++;
    vm->code_used = 0;
    cross_none(vm);
    zero_pages(vm->hash, (vm->hash_mask + 1) * sizeof *vm->hash);
    for (u32 i = 0; i < vm->ncpus; i++)
        if (vm->cpus[i])
            jc_flush(vm->cpus[i]);
    vm->stat[2]++;
    spin_unlock(&vm->lock);
}
