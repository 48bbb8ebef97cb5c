/* Address translation: page walks, the soft TLB, and linear memory for helpers (Intel SDM vol. 3, chapter 4). */
#include "cpu.h"
#include "internal.h"

#define PTE_P 1
#define PTE_W 2
#define PTE_U 4
#define PTE_A 0x20
#define PTE_D 0x40
#define PTE_PS 0x80
#define PTE_G 0x100
#define PTE_NX (1ul << 63)
#define ADDR 0x000ffffffffff000ul
#define TOO_HIGH (ADDR >> PHYS_BITS << PHYS_BITS) /* address bits that are reserved; PSE-36 has none of them */

static struct slot *find_slot(struct vm *vm, u64 gpa)
{
    for (u32 i = 0; i < vm->nslots; i++) {
        struct slot *s = &vm->slots[i];
        if (gpa - s->gpa < s->size)
            return s;
    }
    return 0;
}

void *phys_host(struct vm *vm, u64 gpa, struct slot **slot)
{
    struct slot *s = find_slot(vm, gpa);
    if (slot)
        *slot = s;
    return s ? (void *)(s->host + (gpa - s->gpa)) : 0;
}

static int bad_address(struct cpu *c, u64 linear)
{
    return c->efer & EFER_LMA && (u64)((s64)(linear << 16) >> 16) != linear;
}

#define FAULT_KEY 0x20 /* beside *present*: a protection key forbids it, whatever else does */
/* The error code of a page fault goes to scratch[3]. */
static int fault(struct cpu *c, u64 linear, int access, int user, u32 present, u32 reserved)
{
    user &= AS_USER;
    c->cr2 = linear;
    c->scratch[3] = present | (access == ACC_WRITE ? 2 : 0) | (user ? 4 : 0) | (reserved ? 8 : 0) |
                    (access == ACC_EXEC && ((c->efer & EFER_NXE && c->cr4 & CR4_PAE) || c->cr4 & CR4_SMEP) ? 16 : 0);
    return EX_PF;
}

/* Accessed and dirty bits, as any write of the guest's: ROM drops it, code that lies there is forgotten. 0 when another processor changed
 * the entry meanwhile: what was translated may be gone. */
static int set_bits(struct vm *vm, u64 table, u64 old, u64 bits, int wide)
{
    struct slot *slot;
    if ((old & bits) == bits)
        return 1;
    void *entry = phys_host(vm, table, &slot);
    if (!entry || slot->readonly)
        return 1;
    mark_dirty(vm, entry);
    u32 narrow = (u32)old;
    int done = wide ? __atomic_compare_exchange_n((u64 *)entry, &old, old | bits, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)
                    : __atomic_compare_exchange_n((u32 *)entry, &narrow, narrow | (u32)bits, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
    code_written(vm, slot, table, wide ? 8 : 4);
    return done;
}

int walk(struct cpu *c, u64 linear, int access, int user, u64 *phys, u32 *global, u32 *writable)
{
    *global = 0;
    *writable = 1;
    if (!(c->cr0 & CR0_PG)) {
        *phys = linear & 0xffffffff;
        *global = 1;
        return 0;
    }
    if (bad_address(c, linear)) {
        c->scratch[3] = 0;
        return EX_GP;
    }
    u64 rights, nx, entry, page_mask;
    void *at;
    u64 entries[4], values[4];
    int depth, wide;
again:
    rights = PTE_W | PTE_U, nx = 0, depth = 0, wide = 1;
    if (!(c->cr4 & CR4_PAE)) {
        wide = 0;
        u64 table = c->cr3 & 0xfffff000;
        for (int shift = 22;; shift -= 10) {
            u64 where = table + ((linear >> shift) & 1023) * 4;
            if (!(at = phys_host(c->vm, where, 0)))
                return fault(c, linear, access, user, 0, 0);
            entry = *(volatile u32 *)at;
            if (!(entry & PTE_P))
                return fault(c, linear, access, user, 0, 0);
            entries[depth] = where, values[depth++] = entry;
            rights &= entry;
            if (shift == 12) {
                page_mask = 0xfff;
                *phys = entry & 0xfffff000;
                break;
            }
            if (entry & PTE_PS && c->cr4 & CR4_PSE) {
                if (entry & 1 << 21)
                    return fault(c, linear, access, user, 1, 1);
                page_mask = 0x3fffff;
                *phys = (entry & 0xffc00000) | (entry & 0x1fe000) << 19;
                break;
            }
            table = entry & 0xfffff000;
        }
    } else {
        u64 reserved = TOO_HIGH | (c->efer & EFER_NXE ? 0 : PTE_NX);
        u64 table;
        int shift;
        if (c->efer & EFER_LMA) {
            table = c->cr3 & ADDR;
            shift = 39;
        } else {
            reserved |= 0x7ff0000000000000ul; /* protection keys and ignored bits are long mode's */
            entry = c->pdpte[(linear >> 30) & 3];
            if (!(entry & PTE_P))
                return fault(c, linear, access, user, 0, 0);
            table = entry & ADDR;
            shift = 21;
        }
        for (;; shift -= 9) {
            u64 where = table + ((linear >> shift) & 511) * 8;
            if (!(at = phys_host(c->vm, where, 0)))
                return fault(c, linear, access, user, 0, 0);
            entry = *(volatile u64 *)at;
            if (!(entry & PTE_P))
                return fault(c, linear, access, user, 0, 0);
            if (entry & (shift == 39 ? reserved | PTE_PS | PTE_G : shift == 30 && !(entry & PTE_PS) ? reserved | PTE_G : reserved))
                return fault(c, linear, access, user, 1, 1); /* G there: APM vol. 2, figures 5-19 to 5-24 */
            entries[depth] = where, values[depth++] = entry;
            rights &= entry;
            nx |= entry & PTE_NX;
            if (shift == 12) {
                page_mask = 0xfff;
                *phys = entry & ADDR;
                break;
            }
            if (entry & PTE_PS) {
                page_mask = (1ul << shift) - 1;
                if (entry & ADDR & page_mask & ~0x1ffful)
                    return fault(c, linear, access, user, 1, 1);
                *phys = entry & ADDR & ~page_mask;
                break;
            }
            table = entry & ADDR;
        }
    }
    u32 cause = 1, key = 0;
    if (rights & PTE_U && c->efer & EFER_LMA && access != ACC_EXEC) {
        key = entry >> 59 & 15;
        u32 disabled = c->pkru >> 2 * key;
        if (c->cr4 & CR4_PKE && (disabled & 1 || (disabled & 2 && access == ACC_WRITE && (user & AS_USER || c->cr0 & CR0_WP))))
            cause |= FAULT_KEY;
    }
    if (user & AS_USER) {
        if (!(rights & PTE_U) || (access == ACC_WRITE && !(rights & PTE_W)))
            return fault(c, linear, access, user, cause, 0);
    } else {
        if (access == ACC_WRITE && !(rights & PTE_W) && c->cr0 & CR0_WP)
            return fault(c, linear, access, user, cause, 0);
        if (rights & PTE_U && access == ACC_EXEC && c->cr4 & CR4_SMEP)
            return fault(c, linear, access, user, cause, 0);
        if (rights & PTE_U && access != ACC_EXEC && c->cr4 & CR4_SMAP && (!(c->eflags & F_AC) || user & AS_SYSTEM || c->cpl == 3))
            return fault(c, linear, access, user, cause, 0);
    }
    if ((access == ACC_EXEC && nx) || cause & FAULT_KEY)
        return fault(c, linear, access, user, cause, 0);
    for (int i = 0; i < depth; i++)
        if (!set_bits(c->vm, entries[i], values[i], access == ACC_WRITE && i == depth - 1 ? PTE_A | PTE_D : PTE_A, wide))
            goto again;
    *phys |= linear & page_mask & ~0xffful;
    *global = (entry & PTE_G) && c->cr4 & CR4_PGE;
    *writable = (rights & PTE_W ? 1 : 0) | (page_mask > 0xfff ? PAGE_LARGE : 0) | (page_mask > 0x3fffff ? PAGE_HUGE : 0) | (rights & PTE_U ? PAGE_USER : 0) | (key ? PAGE_KEYED : 0);
    return 0;
}

static u32 tlb_index(u64 linear) { return (linear >> 12) & (TLB_SIZE - 1); }

static void mark(u64 *map, u32 i, u32 on) { map[i / 64] = (map[i / 64] & ~(1ul << i % 64)) | (u64)(on != 0) << i % 64; }

/* *what*: PAGE_* */
static void tlb_fill(struct tlb *t, u64 linear, u64 host_page, u32 global, u32 what)
{
    u32 i = tlb_index(linear);
    t->e[i].tag = linear & ~0xffful; /* canonical: walk() saw to it */
    t->e[i].add = host_page;
    t->filled[i / 64] |= 1ul << i % 64;
    mark(t->local, i, !global);
    mark(t->large, i, what & PAGE_LARGE);
    if (what & PAGE_LARGE)
        t->large_in |= seen_in(linear >> 30);
    if (unlikely(what & PAGE_MARKED)) { /* else nobody asks, and CR4 empties the tables when somebody begins to */
        mark(t->user, i, what & PAGE_USER);
        mark(t->keyed, i, what & PAGE_KEYED);
    }
}

static u32 list_of(u64 host_page) { return (u32)((host_page >> 12) * 0x9e3779b97f4a7c15ul >> (64 - TLB_BITS)); }

/* The entry of a write table for *linear* is filled: into the list of its page, out of that which it was in. */
static void tlb_relink(struct tlb_lists *l, u64 linear, u64 host_page)
{
    u32 i = tlb_index(linear), list = list_of(host_page), before = l->before[i], after = l->after[i];
    if (before == TLB_SIZE + 1 + list)
        return; /* it is the first of that list */
    if (before > TLB_SIZE)
        l->head[before - TLB_SIZE - 1] = (u16)after;
    else if (before)
        l->after[before - 1] = (u16)after;
    if (before && after)
        l->before[after - 1] = (u16)before;
    after = l->head[list];
    l->head[list] = (u16)(i + 1);
    l->after[i] = (u16)after;
    l->before[i] = (u16)(TLB_SIZE + 1 + list);
    if (after)
        l->before[after - 1] = (u16)(i + 1);
}

/* An entry for nothing: neither tag nor host page of the one that was. */
static void tlb_drop(struct tlb *t, u32 i)
{
    t->e[i].tag = tlb_nothing(i);
    t->e[i].add = 0;
}

static void tlb_drop_marked(struct tlb *t, u64 *map)
{
    for (u32 i = 0; i < TLB_SIZE / 64; i++) {
        for (u64 bits = map[i]; bits; bits &= bits - 1)
            tlb_drop(t, i * 64 + (u32)__builtin_ctzl(bits));
        map[i] = 0;
    }
}

void smap_close(struct cpu *c)
{
    c->smap_open = 0;
    c->dropped = 1;
    tlb_drop_marked(&c->tlb_r[0], c->tlb_r[0].user);
    tlb_drop_marked(&c->tlb_w[0], c->tlb_w[0].user);
}

void set_pkru(struct cpu *c, u32 value)
{
    u32 changed = value ^ c->pkru;
    c->pkru = value;
    if (!changed || !(c->cr4 & CR4_PKE))
        return;
    c->dropped = 1;
    for (u32 m = 0; m < 2; m++) {
        tlb_drop_marked(&c->tlb_r[m], changed & 3 ? c->tlb_r[m].user : c->tlb_r[m].keyed);
        tlb_drop_marked(&c->tlb_w[m], changed & 3 ? c->tlb_w[m].user : c->tlb_w[m].keyed);
    }
}

static void xtlb_drop(struct cpu *c, u32 m, u32 i)
{
    c->xtlb[m][i].tag = tlb_nothing(i);
    c->xtlb[m][i].phys = 0;
}

void jc_drop(struct cpu *c, u32 m, u32 i)
{
    c->jc[m][i].pc = jump_nothing(i);
    c->jc[m][i].code = 0;
}

/* INVLPG drops the whole of a large page, of which there are pieces here: all that lie in its GiB. */
static void tlb_drop_large(struct tlb *t, u64 linear)
{
    if (!(t->large_in & seen_in(linear >> 30)))
        return;
    t->large_in = 0;
    for (u32 i = 0; i < TLB_SIZE / 64; i++)
        for (u64 bits = t->large[i]; bits; bits &= bits - 1) {
            u32 n = i * 64 + (u32)__builtin_ctzl(bits);
            if ((t->e[n].tag ^ linear) >> 30 == 0) {
                tlb_drop(t, n);
                t->large[i] &= ~(1ul << n % 64);
            } else {
                t->large_in |= seen_in(t->e[n].tag >> 30);
            }
        }
}

static void tlb_clear(struct tlb *t, int global)
{
    if (global) {
        tlb_drop_marked(t, t->filled);
        for (u32 i = 0; i < TLB_SIZE / 64; i++)
            t->local[i] = t->large[i] = t->user[i] = t->keyed[i] = 0;
        t->large_in = 0;
        return;
    }
    for (u32 i = 0; i < TLB_SIZE / 64; i++) {
        u64 bits = t->local[i];
        t->local[i] = 0;
        while (bits) {
            tlb_drop(t, i * 64 + (u32)__builtin_ctzl(bits));
            bits &= bits - 1;
        }
    }
}

/* The next entry from *at* on that may be for something; JC_SIZE: none. */
static u32 jc_next(struct cpu *c, u32 m, u32 at)
{
    for (u32 i = at / 4096; i < JC_SIZE / 4096; i++) {
        u64 words = c->jc_some[m][i];
        if (i == at / 4096)
            words &= ~0ul << at / 64 % 64;
        for (; words; words &= words - 1) {
            u32 word = i * 64 + (u32)__builtin_ctzl(words);
            u64 bits = c->jc_used[m][word];
            if (word == at / 64)
                bits &= ~0ul << at % 64;
            if (bits)
                return word * 64 + (u32)__builtin_ctzl(bits);
        }
    }
    return JC_SIZE;
}

void jc_flush_one(struct cpu *c, u32 m)
{
    for (u32 i = 0; i < JC_SIZE / 4096; i++) {
        for (u64 words = c->jc_some[m][i]; words; words &= words - 1) {
            u32 word = i * 64 + (u32)__builtin_ctzl(words);
            for (u64 bits = c->jc_used[m][word]; bits; bits &= bits - 1)
                jc_drop(c, m, word * 64 + (u32)__builtin_ctzl(bits));
            c->jc_used[m][word] = 0;
        }
        c->jc_some[m][i] = 0;
    }
}

/* Drop an entry of a block that begins in the page of *linear*, which has 1 << *span* bytes, or reaches it with its one instruction. */
static void jc_drop_near(struct cpu *c, u32 m, u32 n, u64 linear, u32 span)
{
    u64 at = c->jc[m][n].pc + c->jc_base[m], end = at + 14;
    if (!(c->jc_mode[m] & MODE_64))
        at = (u32)at, end = (u32)end;
    if ((at ^ linear) >> span == 0 || (end ^ linear) >> span == 0)
        jc_drop(c, m, n);
}

/* Whether code of this 2 MiB may have come from a large page. */
static int from_large(const struct cpu *c, u32 m, u64 linear)
{
    u64 region = linear >> 21;
    return c->code_large[m] & seen_in(region) && region >= c->large_first[m] && region <= c->large_last[m];
}

/* INVLPG, for the jump cache. A page of 4 KiB is looked for where its entries are; a large one, of which there are pieces, among all. */
static void jc_flush_page(struct cpu *c, u32 m, u64 linear, u32 span)
{
    u64 page = linear & ~0xffful;
    if (span == 21 && c->jc_mode[m] & MODE_64 && !from_large(c, m, linear) && !from_large(c, m, page - 1)) {
        for (u64 at = page - 16; at != page; at += 1 << JC_LOW) { /* an instruction that reaches over */
            u32 n = jc_index(at, m);
            if (c->jc[m][n].pc - (page - 14) < 14)
                jc_drop(c, m, n);
        }
        u32 first = jc_index(page, m) & ~(JC_PAGE - 1u);
        for (u32 word = first / 64; word < (first + JC_PAGE) / 64; word++)
            for (u64 bits = c->jc_used[m][word]; bits; bits &= bits - 1) {
                u32 n = word * 64 + (u32)__builtin_ctzl(bits);
                if ((c->jc[m][n].pc ^ page) >> 12 == 0)
                    jc_drop(c, m, n);
            }
        return;
    }
    for (u32 n = jc_next(c, m, 0); n < JC_SIZE; n = jc_next(c, m, n + 1))
        jc_drop_near(c, m, n, linear, span);
}

void jc_flush(struct cpu *c)
{
    jc_flush_one(c, 0);
    jc_flush_one(c, 1);
}

/* Jump-cache entries derive from translations, also from those that the xtlb no longer holds: jc_local says that one may
 * be of a page that is not global. */
void tlb_flush(struct cpu *c, int global)
{
    c->dropped = 1;
    for (u32 m = 0; m < 2; m++) {
        tlb_clear(&c->tlb_r[m], global);
        tlb_clear(&c->tlb_w[m], global);
        u64 left = 0;
        for (u32 i = 0; i < XTLB_SIZE; i++)
            if (global || c->xtlb[m][i].tag & 1)
                xtlb_drop(c, m, i);
            else if ((c->xtlb[m][i].tag >> 12 & (XTLB_SIZE - 1)) == i) /* not one for nothing */
                left |= seen_in(c->xtlb[m][i].tag >> 21);
        if (global || c->jc_local[m]) {
            jc_flush_one(c, m);
            c->code_in[m] = left;
        }
        if (global)
            c->code_large[m] = c->code_huge[m] = 0;
        c->jc_local[m] = 0;
    }
    if (global)
        cross_unlink(c->vm);
}

void tlb_flush_page(struct cpu *c, u64 linear)
{
    u32 i = tlb_index(linear);
    u64 page = linear & ~0xffful;
    c->dropped = 1;
    for (u32 m = 0; m < 2; m++) {
        if (c->tlb_r[m].e[i].tag == page)
            tlb_drop(&c->tlb_r[m], i);
        if (c->tlb_w[m].e[i].tag == page)
            tlb_drop(&c->tlb_w[m], i);
        tlb_drop_large(&c->tlb_r[m], linear);
        tlb_drop_large(&c->tlb_w[m], linear);
        u32 span = code_span(c, m, linear);
        if (span < 30 && !(c->code_in[m] & (seen_in(linear >> 21) | seen_in(linear >> 21 ^ (span == 22)))))
            continue;
        u32 n = (linear >> 12) & (XTLB_SIZE - 1), pieces = span > 21 || from_large(c, m, linear);
        if ((c->xtlb[m][n].tag ^ linear) >> 12 == 0)
            xtlb_drop(c, m, n);
        for (n = 0; pieces && n < XTLB_SIZE; n++)
            if ((c->xtlb[m][n].tag ^ linear) >> span == 0)
                xtlb_drop(c, m, n);
        jc_flush_page(c, m, linear, span);
    }
    if (cross_reaches(c->vm, linear))
        cross_unlink(c->vm);
}

/* Drop write entries for a page that now holds code, on a vCPU that is not running. */
void tlb_unwrite(struct cpu *c, u64 host_page)
{
    c->dropped = 1;
    for (u32 m = 0; m < 2; m++)
        for (u32 at = c->tlb_pages[m].head[list_of(host_page)]; at; at = c->tlb_pages[m].after[at - 1])
            if (c->tlb_w[m].e[at - 1].add == host_page)
                tlb_drop(&c->tlb_w[m], at - 1);
}

void tlb_unwrite_all(struct cpu *c)
{
    c->dropped = 1;
    tlb_clear(&c->tlb_w[0], 1);
    tlb_clear(&c->tlb_w[1], 1);
}

/* ---- slow paths of translated accesses ---- */

enum { ABORT_RAISE, ABORT_EXIT, ABORT_RETRY, ABORT_SINGLE };

static struct block *owner(struct access *a) { return (struct block *)((u64)a - a->header); }
static u32 bad_vector(const struct access *a) { return a->flags & ACCESS_STACK ? EX_SS : EX_GP; }

int native_limit(struct cpu *c, u64 ret)
{
    struct access *a = (struct access *)(ret + 5);
    c->rip = rip_in(c, owner(a), a->delta);
    if (a->flags & ACCESS_EMULATE) {
        c->reason = R_EMULATE;
        c->info[0] = a->length;
        return H_EXIT;
    }
    return raise(c, a->flags & ACCESS_AC ? EX_AC : bad_vector(a), 1, 0);
}

/* Where the instruction at cpu.rip goes on when Python has done its part. */
static void resume_at(struct cpu *c, u64 code, u32 kind)
{
    c->resume = code;
    c->resume_kind = kind;
    c->resume_generation = c->vm->generation;
    c->dropped = 0;
}

static u64 rip_after(const struct cpu *c, u32 length)
{
    u64 rip = c->rip + length;
    return c->mode & MODE_64 ? rip : c->mode & MODE_32 ? (u32)rip : (u16)rip;
}

static u64 give_up(struct cpu *c, u32 vector, u32 kind)
{
    c->scratch[2] = vector;
    c->abort_kind = kind;
    return 0;
}

/* Whether an operand reaches where no address is, which is found before any page is looked at: canonical space's end, or that of a flat
 * segment of 4 GiB, as of any other (SDM vol. 3, 5.3, leaves that open). */
static int out_of_reach(const struct block *b, const struct access *a, u64 linear)
{
    u64 last = linear + a->size - 1;
    if (b->mode & MODE_64)
        return (u64)((s64)(linear << 16) >> 16) != linear || (u64)((s64)(last << 16) >> 16) != last;
    return b->mode & MODE_PE && !(a->flags & ACCESS_LOOKED) && last >> 32;
}

/* Likewise an operand of 16 bytes or more that is not aligned (SDM vol. 3, 6.15, #GP): no page is looked at. */
static int misaligned(const struct access *a, u64 linear)
{
    return a->flags & ACCESS_ALIGNED && linear & (a->size == 512 ? 15 : a->size - 1u);
}

/* The vector of a failed translation, as the access has it: its segment says what an address that is not canonical raises. */
static u32 vector_of(const struct access *a, int vector) { return vector == EX_GP ? bad_vector(a) : (u32)vector; }

/* Translate for an access by the current instruction; fills the TLB where a later access may go straight to RAM. */
static int data_page(struct cpu *c, u64 linear, int write, int user, u64 *phys, void **host, struct slot **slot)
{
    u32 global, writable;
    int vector = walk(c, linear, write ? ACC_WRITE : ACC_READ, user, phys, &global, &writable);
    if (vector)
        return vector;
    void *page = phys_host(c->vm, *phys & ~0xffful, slot);
    *host = 0;
    if (!page)
        return 0;
    if (write && !(*slot)->readonly)
        mark_dirty(c->vm, page);
    if (unlikely(c->vm->watched) && is_watched(c->vm, *phys)) {
        *host = page; /* each access comes here */
        return 0;
    }
    struct page *info = &(*slot)->pages[(*phys - (*slot)->gpa) >> 12];
    u32 which = c->cpl == 3, fills = user == (int)which && c->in_native; /* Python's accesses may run while tcg_watch does */
    if (unlikely(c->armed & ARMED_DATA) && debug_page(c, linear, write))
        fills = 0; /* each access comes here */
    if (!which && fills && writable & PAGE_USER && c->cr4 & CR4_SMAP)
        c->smap_open = 1;
    if (unlikely(c->cr4 & (CR4_SMAP | CR4_PKE)))
        writable |= PAGE_MARKED;
    if (!write) {
        if (fills)
            tlb_fill(&c->tlb_r[which], linear, (u64)page, global, writable);
    } else if (!(*slot)->readonly && !__atomic_load_n(&info->code, __ATOMIC_SEQ_CST) && fills) {
        tlb_relink(&c->tlb_pages[which], linear, (u64)page);
        tlb_fill(&c->tlb_w[which], linear, (u64)page, global, writable);
    }
    *host = page;
    return 0;
}

static int is_apic(struct cpu *c, u64 phys)
{
    return c->vm->has_lapic && c->lapic.enabled && !c->lapic.x2 && (phys & ~0xffful) == (c->apic_base & ADDR);
}

static void read_watched(struct cpu *c, u64 phys)
{
    if (unlikely(c->vm->watched) && is_watched(c->vm, phys))
        watched_read(c->vm, phys);
}

/* An operand as the processor reads it: whole where it has a size that one load reads. */
static void copy_whole(void *to, const void *from, u32 size)
{
    switch (size) {
    case 1: *(u8 *)to = *(const volatile u8 *)from; break;
    case 2: *(u16 *)to = *(const volatile u16 *)from; break;
    case 4: *(u32 *)to = *(const volatile u32 *)from; break;
    case 8: *(u64 *)to = *(const volatile u64 *)from; break;
    default: memcpy(to, from, size);
    }
}

/* Host addresses of the parts of an operand across two pages that the soft TLB has both of. */
static int both_parts(const struct cpu *c, const struct tlb *tables, u64 linear, u32 first, u64 *host)
{
    u64 second = linear_after(c, linear, first, 0);
    const struct tlb *t = &tables[c->cpl == 3];
    const struct tlb_entry *e = &t->e[tlb_index(linear)], *f = &t->e[tlb_index(second)];
    if (e->tag != (linear & ~0xffful) || f->tag != second)
        return 0;
    host[0] = e->add + (linear & 0xfff);
    host[1] = f->add;
    return 1;
}

/* memcpy(), which takes its time to begin. */
static void copy_part(void *to, const void *from, u32 size)
{
    if (size > 32) {
        memcpy(to, from, size);
        return;
    }
    for (u32 i = 0; i < size; i++)
        ((volatile u8 *)to)[i] = ((const volatile u8 *)from)[i];
}

static void copy_parts(u8 *to, const u64 *host, u32 first, u32 size)
{
    copy_part(to, (const void *)host[0], first);
    copy_part(to + first, (const void *)host[1], size - first);
}

u64 native_slow_read(struct cpu *c, u64 linear, u64 ret)
{
    struct access *a = (struct access *)(ret + 5);
    struct block *b = owner(a);
    int user = c->cpl == 3;
    u64 phys, phys2;
    void *host, *host2;
    struct slot *slot;
    c->rip = rip_in(c, b, a->delta);
    if (out_of_reach(b, a, linear))
        return give_up(c, bad_vector(a), ABORT_RAISE);
    if (unlikely(misaligned(a, linear)))
        return give_up(c, EX_GP, ABORT_RAISE);
    u32 first = 4096 - (u32)(linear & 0xfff);
    u64 parts[2];
    if (a->size > first && both_parts(c, c->tlb_r, linear, first, parts)) {
        u8 *bounce = c->bounce + (linear & 63); /* as misaligned as the operand */
        copy_parts(bounce, parts, first, a->size);
        return (u64)bounce;
    }
    int vector = data_page(c, linear, 0, user, &phys, &host, &slot);
    if (vector)
        return give_up(c, vector_of(a, vector), ABORT_RAISE);
    if (unlikely(c->armed & ARMED_DATA) && debug_access(c, linear, a->size, 0) && !(b->mode & (MODE_STEP | KEY_SINGLE))) {
        c->once = 1; /* nothing was done yet: again, alone, so that the trap is right behind it */
        update_mode(c);
        return give_up(c, 0, ABORT_RETRY);
    }
    phys |= linear & 0xfff;
    if (a->size > first) {
        vector = data_page(c, linear_after(c, linear, first, 0), 0, user, &phys2, &host2, &slot);
        if (vector)
            return give_up(c, vector_of(a, vector), ABORT_RAISE);
        if (host && host2) {
            u8 *bounce = c->bounce + (linear & 63);
            memcpy(bounce, (u8 *)host + (linear & 0xfff), first);
            memcpy(bounce + first, host2, a->size - first);
            read_watched(c, phys);
            read_watched(c, phys2);
            return (u64)bounce;
        }
        host = 0;
    }
    if (host && unlikely(c->vm->watched) && is_watched(c->vm, phys)) {
        u8 *bounce = c->bounce + (linear & 63);
        copy_whole(bounce, (u8 *)host + (linear & 0xfff), a->size);
        watched_read(c->vm, phys);
        return (u64)bounce;
    }
    if (host)
        return (u64)host + (linear & 0xfff);
    if (a->flags & ACCESS_PROBE) /* a device is not read */
        return (u64)c->bounce;
    if (is_apic(c, phys) && a->size <= first) {
        u32 value = 0;
        apic_read(c, (u32)phys & 0xff0, &value);
        memset(c->bounce, 0, a->size);
        *(u64 *)c->bounce = (u64)value >> (phys & 3) * 8;
        return (u64)c->bounce;
    }
    if (a->flags & ACCESS_MASKED) {
        c->reason = R_EMULATE;
        c->info[0] = a->length;
        return give_up(c, 0, ABORT_EXIT);
    }
    if (c->pending_size == a->size && c->pending == phys) {
        c->pending_size = 0;
        return (u64)c->bounce;
    }
    c->reason = R_MMIO_READ;
    c->info[0] = phys, c->info[1] = a->size, c->info[2] = linear;
    c->bounce_ptr = (u64)c->bounce;
    c->pending = phys, c->pending_size = a->size;
    resume_at(c, ret, RESUME_LOAD);
    return give_up(c, 0, ABORT_EXIT);
}

/* Python does the write of the instruction at cpu->rip. */
static void leave_write(struct cpu *c, u64 linear, u32 size)
{
    c->split_size = 0;
    c->reason = R_SLOW_WRITE;
    c->info[0] = linear, c->info[1] = size;
}

/* An operand across two pages of RAM, whose parts are in `split`: the instruction runs as a single on a copy, which is written back after
 * it. Both pages may be written, or it would have faulted; nothing waits in between, so they stay what they are. */
static u64 begin_split(struct cpu *c, const struct block *b, struct access *a, u64 linear, u32 first)
{
    u64 code = single_of(c, b, a);
    if (unlikely(!code)) {
        leave_write(c, linear, a->size);
        return give_up(c, 0, ABORT_EXIT);
    }
    u8 *copy = c->bounce + 4096 + (linear & 63); /* as misaligned as the operand; what it does not write stays as it was */
    copy_parts(copy, c->split, first, a->size);
    c->write_ptr = (u64)copy;
    c->split_first = first;
    c->split_size = a->size;
    c->scratch[0] = code;
    return give_up(c, 0, ABORT_SINGLE);
}

static void split_store(struct cpu *c, const u8 *from, u32 first, u32 size)
{
    copy_part((void *)c->split[0], from, first);
    copy_part((void *)c->split[1], from + first, size - first);
    for (u32 i = 0; i < 2; i++) {
        struct slot *slot;
        if (c->split_phys[i] != ~0ul && phys_host(c->vm, c->split_phys[i], &slot))
            code_written(c->vm, slot, c->split_phys[i], i ? size - first : first);
    }
}

void write_split(struct cpu *c)
{
    split_store(c, (const u8 *)c->write_ptr, c->split_first, c->split_size);
    c->split_size = 0;
}

u64 native_slow_write(struct cpu *c, u64 linear, u64 ret)
{
    struct access *a = (struct access *)(ret + 5);
    struct block *b = owner(a);
    int user = c->cpl == 3;
    u64 phys;
    void *host;
    struct slot *slot;
    c->rip = rip_in(c, b, a->delta);
    if (out_of_reach(b, a, linear))
        return give_up(c, bad_vector(a), ABORT_RAISE);
    if (unlikely(misaligned(a, linear)))
        return give_up(c, EX_GP, ABORT_RAISE);
    u32 first = 4096 - (u32)(linear & 0xfff);
    int splits = a->size > first && !(a->flags & ACCESS_PYTHON) && !(b->mode & KEY_SINGLE);
    if (splits && both_parts(c, c->tlb_w, linear, first, c->split)) { /* such pages hold no code, and nobody looks at them */
        c->split_phys[0] = c->split_phys[1] = ~0ul;
        return begin_split(c, b, a, linear, first);
    }
    int vector = data_page(c, linear, 1, user, &phys, &host, &slot);
    if (vector)
        return give_up(c, vector_of(a, vector), ABORT_RAISE);
    if (a->size > first) { /* the second page may fault, too: before anything is written */
        u64 phys2;
        void *host2;
        struct slot *slot2;
        vector = data_page(c, linear_after(c, linear, first, 0), 1, user, &phys2, &host2, &slot2);
        if (vector)
            return give_up(c, vector_of(a, vector), ABORT_RAISE);
        if (splits && host && host2 && !slot->readonly && !slot2->readonly && likely(!c->vm->watched) && likely(!(c->armed & ARMED_DATA))) {
            c->split[0] = (u64)host + (linear & 0xfff), c->split[1] = (u64)host2;
            c->split_phys[0] = (phys & ~0xffful) | (linear & 0xfff), c->split_phys[1] = phys2 & ~0xffful;
            return begin_split(c, b, a, linear, first);
        }
    } else if (host && !slot->readonly && !(unlikely(c->vm->watched) && is_watched(c->vm, phys)) &&
               !(unlikely(c->armed & ARMED_DATA) && debug_match(c, linear, a->size, ACC_BOTH))) {
        struct page *p = &slot->pages[(phys - slot->gpa) >> 12];
        __atomic_store_n(&c->rmw, (phys & ~0xffful) | 1, __ATOMIC_SEQ_CST); /* first: install() marks the page before it looks at this */
        u64 code = __atomic_load_n(&p->code, __ATOMIC_SEQ_CST);
        u32 low = (u32)(linear & 0xfff) >> 6, high = ((u32)(linear & 0xfff) + a->size - 1) >> 6;
        u64 touched = (high - low == 63 ? ~0ul : ((1ul << (high - low + 1)) - 1) << low);
        if (!(code & touched))
            return (u64)host + (linear & 0xfff);
    }
    if (unlikely(c->armed & ARMED_DATA))
        debug_access(c, linear, a->size, ACC_BOTH);
    leave_write(c, linear, a->size);
    return give_up(c, 0, ABORT_EXIT);
}

int native_abort(struct cpu *c)
{
    if (c->abort_kind == ABORT_EXIT)
        return H_EXIT;
    if (c->abort_kind == ABORT_SINGLE)
        return H_SINGLE;
    if (c->abort_kind == ABORT_RETRY) {
        c->debug &= ~(u32)DEBUG_HITS;
        return H_REDIRECT;
    }
    u32 vector = (u32)c->scratch[2];
    return raise(c, (u32)vector, 1, vector == EX_PF ? (u32)c->scratch[3] : 0);
}

/* The write of a plain store, wherever it goes. Guest registers are saved; on H_CONTINUE the caller goes on after it. */
int native_slow_store(struct cpu *c, u64 linear, u64 ret)
{
    struct access *a = (struct access *)(ret + 5);
    struct block *b = owner(a);
    u64 value = a->source < 16   ? c->gpr[a->source]
                : a->source < 20 ? c->gpr[a->source - 16] >> 8
                                 : (u64)(s64)a->immediate;
    u64 phys;
    void *host;
    struct slot *slot;
    c->rip = rip_in(c, b, a->delta);
    if (out_of_reach(b, a, linear))
        return raise(c, bad_vector(a), 1, 0);
    u32 at = (u32)(linear & 0xfff), met = unlikely(c->armed & ARMED_DATA) ? debug_access(c, linear, a->size, 1) : 0;
    if (likely(at + a->size <= 4096)) {
        int vector = data_page(c, linear, 1, c->cpl == 3, &phys, &host, &slot);
        if (vector)
            return raise(c, vector_of(a, vector), 1, (u32)c->scratch[3]);
        if (host && !slot->readonly) {
            u8 *to = (u8 *)host + at;
            switch (a->size) {
            case 1: *(volatile u8 *)to = (u8)value; break;
            case 2: *(volatile u16 *)to = (u16)value; break;
            case 4: *(volatile u32 *)to = (u32)value; break;
            default: *(volatile u64 *)to = value;
            }
            code_written(c->vm, slot, (phys & ~0xffful) | at, a->size);
            goto done;
        }
        phys = (phys & ~0xffful) | at;
        c->bounce_ptr = 0;
        c->next_rip = rip_after(c, a->length);
        if (is_apic(c, phys)) {
            resume_at(c, ret, RESUME_AFTER);
            int action = apic_write(c, (u32)phys & 0xff0, (u32)value);
            if (action == H_CONTINUE && c->poll)
                action = H_REDIRECT; /* an interrupt that it lets in comes right after it */
            if (action == H_CONTINUE)
                c->resume = 0;
            if (action == H_CONTINUE && met)
                goto done;
            if (action == H_REDIRECT || met) {
                c->resume = 0;
                c->rip = c->next_rip;
            }
            return action;
        }
        value = a->size == 8 ? value : value & ((1ul << a->size * 8) - 1);
        if (c->vm->bells && ring_bell(c->vm, 0, phys, a->size, value))
            goto done;
        c->reason = R_MMIO_WRITE;
        c->info[0] = phys, c->info[1] = a->size;
        c->info[2] = value;
        resume_at(c, ret, RESUME_AFTER);
        if (unlikely(met)) { /* the trap comes before the next instruction */
            c->resume = 0;
            c->rip = c->next_rip;
        }
        return H_EXIT;
    }
    if (both_parts(c, c->tlb_w, linear, 4096 - at, c->split)) {
        copy_part((void *)c->split[0], &value, 4096 - at);
        copy_part((void *)c->split[1], (u8 *)&value + (4096 - at), a->size - (4096 - at));
        return H_CONTINUE;
    }
    int vector = vwrite(c, linear, &value, a->size, c->cpl == 3);
    if (vector == -1) { /* one of the pages is MMIO: byte by byte in Python */
        leave_write(c, linear, a->size);
        return H_EXIT;
    }
    if (vector)
        return raise(c, vector_of(a, vector), 1, vector == EX_PF ? (u32)c->scratch[3] : 0);
done:
    if (unlikely(c->code_hit)) {
        c->code_hit = 0;
        if (!b->valid) {
            c->rip = rip_after(c, a->length);
            return H_REDIRECT;
        }
    }
    if (unlikely(met)) {
        c->rip = rip_after(c, a->length);
        return H_REDIRECT;
    }
    return H_CONTINUE;
}

/* ---- linear memory for helpers ---- */

u64 linear_host(struct cpu *c, u64 linear, int write)
{
    u32 which = c->cpl == 3, i = tlb_index(linear);
    struct tlb_entry *e = write ? &c->tlb_w[which].e[i] : &c->tlb_r[which].e[i];
    if (bad_address(c, linear))
        return 0;
    if (e->tag == (linear & ~0xffful))
        return e->add + (linear & 0xfff);
    u64 phys, keep = c->cr2, code = c->scratch[3];
    void *host;
    struct slot *slot;
    if (data_page(c, linear, write, which, &phys, &host, &slot)) {
        c->cr2 = keep, c->scratch[3] = code; /* a probe: the fault is raised by whoever really accesses */
        return 0;
    }
    if (!host || (write && (slot->readonly || slot->pages[(phys - slot->gpa) >> 12].code)))
        return 0;
    if (unlikely(c->vm->watched) && is_watched(c->vm, phys))
        return 0;
    if (unlikely(c->armed & ARMED_DATA) && debug_page(c, linear, write))
        return 0;
    return (u64)host + (linear & 0xfff);
}

/* The host address that accesses of a block share: of all bytes that they reach, from *linear* on. 0 where they lie in two pages, or not all may
 * go straight to RAM: then each looks after itself, and whatever faults does so in its turn. */
static u64 shared(struct cpu *c, u64 linear, u64 ret, int write)
{
    const struct access *a = (const struct access *)(ret + 10);
    return (linear & 0xfff) + a->size > 4096 ? 0 : linear_host(c, linear, write);
}

u64 native_share_read(struct cpu *c, u64 linear, u64 ret) { return shared(c, linear, ret, 0); }

u64 native_share_write(struct cpu *c, u64 linear, u64 ret) { return shared(c, linear, ret, 1); }

/* 0, a vector (error code of #PF in scratch[3]), or -1 when it is not RAM. */
static int vaccess(struct cpu *c, u64 linear, u8 *data, u32 size, int user, int write)
{
    u64 host[3];
    u64 phys[3];
    struct slot *slots[3];
    u32 n = 0;
    if (size > 4096)
        return -1;
    if (bad_address(c, linear_after(c, linear, size - 1, user))) {
        c->scratch[3] = 0;
        return EX_GP;
    }
    for (u32 at = 0; at < size; n++) {
        u64 here = linear_after(c, linear, at, user);
        void *page;
        int vector = data_page(c, here, write, user & ~AS_WIDE, &phys[n], &page, &slots[n]);
        if (vector)
            return vector;
        if (!page || (write && slots[n]->readonly))
            return -1;
        phys[n] = (phys[n] & ~0xffful) | (here & 0xfff);
        host[n] = (u64)page + (here & 0xfff);
        at += 4096 - (u32)(here & 0xfff);
    }
    n = 0;
    for (u32 at = 0; at < size; n++) {
        u32 take = 4096 - (u32)(host[n] & 0xfff);
        if (take > size - at)
            take = size - at;
        void *ram = (void *)host[n];
        if (take == size && size == 8) { /* naturally aligned descriptors and entries are read and written whole */
            if (write)
                *(volatile u64 *)ram = *(u64 *)data;
            else
                *(u64 *)data = *(volatile u64 *)ram;
        } else if (take == size && size == 4) {
            if (write)
                *(volatile u32 *)ram = *(u32 *)data;
            else
                *(u32 *)data = *(volatile u32 *)ram;
        } else if (write)
            memcpy(ram, data + at, take);
        else
            memcpy(data + at, ram, take);
        if (write)
            code_written(c->vm, slots[n], phys[n], take);
        else
            read_watched(c, phys[n]);
        at += take;
    }
    return 0;
}

int vread(struct cpu *c, u64 linear, void *to, u32 size, int user) { return vaccess(c, linear, to, size, user, 0); }

int vwrite(struct cpu *c, u64 linear, const void *from, u32 size, int user)
{
    return vaccess(c, linear, (u8 *)(u64)from, size, user, 1);
}

/* What the instruction at hand accesses, with its privilege, meets breakpoints; what the processor looks at for it does not. */
static int met(struct cpu *c, u64 linear, u32 size, int user, int write, int result)
{
    if (unlikely(c->armed & ARMED_DATA) && result <= 0 && user == (c->cpl == 3))
        debug_access(c, linear, size, write);
    return result;
}

EXPORTED int tcg_vread(struct cpu *c, u64 linear, void *to, u32 size, int user)
{
    return met(c, linear, size, user, 0, vread(c, linear, to, size, user));
}

EXPORTED int tcg_vwrite(struct cpu *c, u64 linear, const void *from, u32 size, int user)
{
    return met(c, linear, size, user, 1, vwrite(c, linear, from, size, user));
}

/* Up to *size* code bytes, ones where there is no RAM: how many; or, where not even the first can be fetched, less than 0: -vector.
 * Looking ahead leaves no trace of a fault. */
EXPORTED int tcg_fetch(struct cpu *c, u64 linear, u8 *to, u32 size)
{
    u64 keep = c->cr2, code = c->scratch[3], phys;
    u32 global, writable, got = 0;
    while (got < size) {
        u64 here = linear_after(c, linear, got, 0);
        int vector = walk(c, here, ACC_EXEC, c->cpl == 3, &phys, &global, &writable);
        if (vector && !got)
            return -vector;
        if (vector) {
            c->cr2 = keep, c->scratch[3] = code;
            break;
        }
        u32 in_page = (u32)here & 0xfff, take = size - got < 4096 - in_page ? size - got : 4096 - in_page;
        const u8 *ram = phys_host(c->vm, phys & ~0xffful, 0);
        for (u32 i = 0; i < take; i++)
            to[got + i] = ram ? ram[in_page + i] : 0xff;
        got += take;
    }
    return (int)got;
}

EXPORTED void tcg_tlb_flush(struct cpu *c) { tlb_flush(c, 1); jc_flush(c); }
EXPORTED int tcg_walk(struct cpu *c, u64 linear, int access, int user, u64 *phys)
{
    u32 global, writable;
    int vector = walk(c, linear, access, user, phys, &global, &writable);
    if (!vector)
        *phys |= linear & 0xfff;
    return vector;
}
