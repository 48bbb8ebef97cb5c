/* What only Python calls. */
#include "cpu.h"
#include "internal.h"
#include "helpers.h"
#include "sys.h"

#define STUB(name) extern void name(void);
STUB(stub_read_k) STUB(stub_read_u) STUB(stub_write_k) STUB(stub_write_u) STUB(stub_store_k) STUB(stub_store_u)
STUB(stub_chain) STUB(stub_jump) STUB(stub_helper) STUB(stub_poll) STUB(stub_limit)
STUB(stub_share_read_k) STUB(stub_share_read_u) STUB(stub_share_write_k) STUB(stub_share_write_u)

EXPORTED u64 tcg_stub(int i)
{
    switch (i) {
    case STUB_READ_K: return (u64)stub_read_k;
    case STUB_READ_U: return (u64)stub_read_u;
    case STUB_WRITE_K: return (u64)stub_write_k;
    case STUB_WRITE_U: return (u64)stub_write_u;
    case STUB_STORE_K: return (u64)stub_store_k;
    case STUB_STORE_U: return (u64)stub_store_u;
    case STUB_SHARE_READ_K: return (u64)stub_share_read_k;
    case STUB_SHARE_READ_U: return (u64)stub_share_read_u;
    case STUB_SHARE_WRITE_K: return (u64)stub_share_write_k;
    case STUB_SHARE_WRITE_U: return (u64)stub_share_write_u;
    case STUB_CHAIN: return (u64)stub_chain;
    case STUB_JUMP: return (u64)stub_jump;
    case STUB_HELPER: return (u64)stub_helper;
    case STUB_POLL: return (u64)stub_poll;
    case STUB_LIMIT: return (u64)stub_limit;
    }
    return 0;
}

/* Empty caches of a new vCPU, and after its registers were set from outside. */
EXPORTED void tcg_reset(struct cpu *c)
{
    for (u32 m = 0; m < 2 && !c->made; m++) { /* a new vCPU's are all zero, which is no tag for nothing; in the jump cache only at address 0 */
        jc_drop(c, m, 0);
        memset(c->tlb_r[m].filled, 0xff, sizeof c->tlb_r[m].filled);
        memset(c->tlb_w[m].filled, 0xff, sizeof c->tlb_w[m].filled);
    }
    c->made = 1;
    tlb_flush(c, 1);
    jc_flush(c);
    c->resume = 0;
    c->pending_size = 0;
    c->single_size = 0;
    c->split_size = 0;
    for (u32 i = 0; i < LEAVES; i++)
        c->leaves[i].key = 0;
    c->code_hit = 0;
    c->debug &= DEBUG_RF;
    c->once = 0;
    c->stop = 0;
    c->shutdown = 0;
    update_mode(c);
}

EXPORTED void tcg_load_pdptes(struct cpu *c)
{
    if (c->cr4 & CR4_PAE && c->cr0 & CR0_PG && !(c->efer & EFER_LMA))
        load_pdptes(c, c->cr3);
}

/* The level of the 8259's INTR output, on the boot processor. */
EXPORTED void tcg_set_extint(struct cpu *c, u32 level)
{
    __atomic_store_n(&c->extint, level, __ATOMIC_SEQ_CST);
    if (level)
        wake_cpu(c);
}

EXPORTED void tcg_cpuid(u32 leaf, u32 sub, u32 *out)
{
    __asm__ volatile("cpuid" : "=a"(out[0]), "=b"(out[1]), "=c"(out[2]), "=d"(out[3]) : "a"(leaf), "c"(sub));
}

/* What a leaf of CPUID depends on beside its number. */
static u64 leaf_key(const struct cpu *c)
{
    return 1 | (c->cr4 & (CR4_OSXSAVE | CR4_PKE)) | (c->apic_base & 0x800) | (u64)c->guest_xcr0 << 32;
}

static u32 leaf_index(u32 leaf, u32 sub) { return (leaf ^ leaf >> 24 ^ sub * 13) % LEAVES; }

/* CPUID was Python's the first time; it is this model's, and so are its answers. */
int h_cpuid(struct cpu *c, u32 arg)
{
    u32 leaf = (u32)c->gpr[RAX], sub = (u32)c->gpr[RCX], i = leaf_index(leaf, sub);
    if (c->leaves[i].key != leaf_key(c) || c->leaves[i].leaf != leaf || c->leaves[i].sub != sub)
        return emulate(c, arg);
    const u32 *value = c->leaves[i].value;
    c->gpr[RAX] = value[0], c->gpr[RBX] = value[1], c->gpr[RCX] = value[2], c->gpr[RDX] = value[3];
    return H_CONTINUE;
}

/* The registers have the answer. */
EXPORTED void tcg_keep_leaf(struct cpu *c, u32 leaf, u32 sub)
{
    u32 i = leaf_index(leaf, sub);
    c->leaves[i].key = leaf_key(c), c->leaves[i].leaf = leaf, c->leaves[i].sub = sub;
    const u32 from[4] = { RAX, RBX, RCX, RDX };
    for (u32 j = 0; j < 4; j++)
        c->leaves[i].value[j] = (u32)c->gpr[from[j]];
}

EXPORTED u64 tcg_tsc(void) { return rdtsc(); }

/* The time-stamp counter and CLOCK_MONOTONIC at one moment: the closest of a few tries. */
EXPORTED void tcg_rdtsc_pair(u64 *out)
{
    u64 best = ~0ul;
    for (int i = 0; i < 8; i++) {
        u64 before = rdtsc(), ns = now_ns(), after = rdtsc();
        if (after - before < best) {
            best = after - before;
            out[0] = before + (after - before) / 2;
            out[1] = ns;
        }
    }
}

/* The end of a single: Python writes back, unless the operand itself was written, among code. */
int h_single(struct cpu *c, u32 arg)
{
    c->rip = next_rip(c, arg);
    if (c->split_size) {
        write_split(c);
        return H_REDIRECT;
    }
    if (!c->single_size) {
        c->reason = R_SINGLE;
        return H_EXIT;
    }
    tcg_memory_written(c->vm, c->single_phys, c->single_size);
    if (c->vm->watched && is_watched(c->vm, c->single_phys))
        watched_read(c->vm, c->single_phys);
    c->single_size = 0;
    return H_REDIRECT;
}
