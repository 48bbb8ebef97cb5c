/* The dirty log: which pages of RAM were written, by a byte each and as a list; and putting them back. A page is noted where a vCPU finds
 * out that it may write it: while there is a log no page is in a soft TLB's write table that is not in the log. The world is stopped in all
 * of these but note_written(). */
#include "cpu.h"
#include "internal.h"

/* Out of line: almost all writes have no log, or a page that is in it. */
void note_written(struct vm *vm, u64 host)
{
    struct dirty_log *log = (struct dirty_log *)vm->dirty;
    for (u32 i = 0; i < log->areas; i++) {
        struct dirty_area *area = &log->area[i];
        u64 page = (host - area->host) >> 12;
        if (host - area->host >= area->size)
            continue;
        u8 *at = (u8 *)area->map + page;
        if (!__atomic_load_n(at, __ATOMIC_RELAXED) && !__atomic_exchange_n(at, 1, __ATOMIC_SEQ_CST))
            ((u64 *)log->list)[__atomic_fetch_add(&log->count, 1, __ATOMIC_SEQ_CST)] = host & ~0xffful;
        return;
    }
}

static void unwrite_all(struct vm *vm)
{
    for (u32 i = 0; i < vm->ncpus; i++)
        if (vm->cpus[i])
            tlb_unwrite_all(vm->cpus[i]);
}

/* Begin a log, which is all zeros but for its areas, or end it (0). */
EXPORTED void tcg_dirty_log(struct vm *vm, u64 log)
{
    __atomic_store_n(&vm->dirty, log, __ATOMIC_SEQ_CST);
    unwrite_all(vm);
}

/* The pages of [host, host + size) that are in the log go into a bitmap, which is all zeros, and out of the log. Returns how many. */
EXPORTED u64 tcg_dirty_take(struct vm *vm, u64 host, u64 size, u8 *bitmap)
{
    struct dirty_log *log = (struct dirty_log *)vm->dirty;
    u64 *list = (u64 *)log->list, kept = 0, taken = 0;
    for (u64 i = 0; i < log->count; i++) {
        u64 page = list[i], offset = page - host;
        if (offset >= size) {
            list[kept++] = page;
            continue;
        }
        bitmap[offset >> 15] |= (u8)(1u << (offset >> 12 & 7));
        for (u32 n = 0; n < log->areas; n++)
            if (page - log->area[n].host < log->area[n].size)
                ((u8 *)log->area[n].map)[(page - log->area[n].host) >> 12] = 0;
        taken++;
    }
    log->count = kept;
    if (taken)
        unwrite_all(vm);
    return taken;
}

/* Each page in the log gets the bytes that it has in the area's base, and is no longer in the log; what was derived of it is forgotten.
 * Returns how many; all ones, and nothing has happened, where a page has no base. */
EXPORTED u64 tcg_dirty_revert(struct vm *vm)
{
    struct dirty_log *log = (struct dirty_log *)vm->dirty;
    u64 count = log->count;
    for (u64 i = 0; i < count; i++)
        for (u32 n = 0; n < log->areas; n++)
            if (((u64 *)log->list)[i] - log->area[n].host < log->area[n].size && !log->area[n].base)
                return ~0ul;
    for (u64 i = 0; i < count; i++) {
        u64 page = ((u64 *)log->list)[i];
        for (u32 n = 0; n < log->areas; n++) {
            struct dirty_area *area = &log->area[n];
            if (page - area->host >= area->size)
                continue;
            memcpy((void *)page, (void *)(area->base + (page - area->host)), 4096);
            ((u8 *)area->map)[(page - area->host) >> 12] = 0;
        }
        for (u32 n = 0; n < vm->nslots; n++) { /* each that shows it */
            struct slot *s = &vm->slots[n];
            if (page - s->host < s->size && s->pages[(page - s->host) >> 12].code)
                code_written(vm, s, s->gpa + (page - s->host), 4096);
        }
    }
    log->count = 0;
    for (u32 i = 0; i < vm->ncpus; i++)
        if (vm->cpus[i]) {
            tlb_flush(vm->cpus[i], 1);
            jc_flush(vm->cpus[i]);
        }
    return count;
}
