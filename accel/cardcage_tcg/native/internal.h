/* What the native files share that no helper needs. */
#ifndef CARDCAGE_INTERNAL_H
#define CARDCAGE_INTERNAL_H
#include "cpu.h"

#define EXPORTED __attribute__((visibility("default")))

/* What an empty entry of a table is tagged with: what belongs to its neighbour, so that no address which leads to the entry can be
 * equal, canonical or not. */
static inline u64 tlb_nothing(u32 index) { return (u64)(index ^ 1) << 12; } /* also xtlb's */
static inline u32 jc_size(u32 m) { return m ? JC_SIZE : 1 << JC_SUPERVISOR; }
static inline u32 jc_index(u64 pc, u32 m) { return (u32)((pc ^ pc >> JC_SHIFT) >> JC_LOW) & (jc_size(m) - 1); }
/* jc_index() of it is index ^ 1. */
static inline u64 jump_nothing(u32 index)
{
    u64 mixed = (u64)(index ^ 1) << JC_LOW;
    return mixed ^ mixed >> JC_SHIFT ^ mixed >> 2 * JC_SHIFT;
}

/* The bit of a set of regions that says that one may be in it. */
static inline u64 seen_in(u64 region) { return 1ul << (region * 0x9e3779b97f4a7c15ul >> 58); }

/* A translated block: this header, then the code that seldom runs (slow paths, stubs of jumps) and its fault sites. What runs lies by
 * itself, close to other blocks': see struct chunk. Pointers are executable-view addresses. */
struct block {
    u64 pc;              /* RIP of its first instruction: see floats() */
    u64 cs_base;
    u64 phys, phys2;     /* physical address of its first byte; of the second page it reaches, or ~0 */
    u32 mode;
    u16 length, valid;   /* guest bytes */
    u64 code;            /* what runs: it begins with the entry that restores flags */
    u32 code_length, entry;  /* its bytes; offset of the direct entry (flags live) */
    u64 hash_next;
    u64 page_next[2], page_prev[2]; /* lists of the pages of phys and phys2 */
    u64 incoming;        /* struct site * that jump here */
    u32 cold_length;     /* bytes after the header */
    u32 sites, nsites;   /* struct fault_site []: offset after the header, count */
    u32 pad;
    u64 written;         /* of a single: bytes that it writes at cpu.write_ptr */
};

/* The code buffer is a row of chunks. Code that runs fills one from its start, headers with cold code from its end, so that the
 * processor's caches hold what runs. Before each piece of it lies its distance to its header. */
enum { CHUNK_BITS = 17, CHUNK = 1 << CHUNK_BITS, CODE_ALIGN = 16, HEADER_ALIGN = 64 };
struct chunk { u32 low, high; }; /* where the next piece begins (behind its distance); the lowest header */
static inline struct block *block_of(u64 code) { return (struct block *)(code + ((const u32 *)code)[-1]); }

/* A block's code before it has a place. Each place in *fix* depends on how far the two parts are apart: in the first it grows when they
 * move apart, in the second it shrinks, but for those in *jump* (struct site.jump), which grow. */
enum { MAX_FIXES = 1024 };
struct code {
    const u8 *hot, *cold;
    u32 fixes, jumps;
    u32 fix[MAX_FIXES], jump[12]; /* offsets in the first, FIX_COLD | in the second; in the second */
};
enum { FIX_COLD = 1u << 31 };

/* Programs run at random addresses. So the code of a 64-bit one does not hold its own: there a block's pc is its offset in the page, wherever
 * that is mapped, and cpu.base has the page. Whatever goes to such a block from another page sets it. */
static inline int floats(u32 mode) { return (mode & (MODE_64 | MODE_CPL3)) == (MODE_64 | MODE_CPL3); }
static inline u64 pc_for(u32 mode, u64 rip) { return floats(mode) ? rip & 0xfff : rip; }
static inline u64 base_for(const struct cpu *c, u32 mode) { return floats(mode) ? c->base : 0; }

/* The page, as much of its number as jc_index() looks at, where a vCPU's jump cache may have a block that floats. It has it in one place
 * only, so that the block is found there when it goes. */
static inline u16 *seen_at(const struct cpu *c, const struct block *b) { return (u16 *)c->seen + (((u64)b - c->vm->code_rx) / HEADER_ALIGN); }
static inline u32 jc_index_of(const struct cpu *c, const struct block *b, u32 m)
{
    return jc_index(floats(b->mode) ? (u64)*seen_at(c, b) << 12 | b->pc : b->pc, m);
}

/* The address of the instruction that many bytes behind a block's start, for a vCPU that runs it. */
static inline u64 rip_in(const struct cpu *c, const struct block *b, u64 offset)
{
    u64 rip = base_for(c, b->mode) + b->pc + offset;
    return b->mode & MODE_64 ? rip : b->mode & MODE_32 ? (u32)rip : (u16)rip;
}

/* What a direct jump leaves after its `call [stub_chain]`: patched once its target is known. */
struct site {
    u32 header;          /* this - header = struct block */
    u32 jump;            /* this - jump = the rel32 field to patch */
    s64 target;          /* target RIP - that of the block */
    u64 next;            /* in the list of jumps to `block`, 1 at its end; 0: not linked */
    u64 block;
    u64 plain;           /* KEY_PLAIN, where it leads to a block of that kind */
};

/* ---- templates: made by Python, joined by assemble.c; all offsets, so that a store can be kept in a file ---- */

enum { K_NORMAL, K_JCC, K_JMP, K_CALL, K_INDIRECT, K_COUNTED, K_EMULATE }; /* the others end a block */
enum { T_CLOBBERS = 1, T_STORED = 2, T_SHADOW = 4, T_END = 8, T_INVALID = 16, T_ADDRESS32 = 32, T_EXACT = 64, T_BORROWED = 128 };
enum { KEY_SINGLE = 1 << 20, KEY_CALL = 1 << 21, KEY_EXACT = 1 << 22, KEY_BRIDGE = 1 << 23, KEY_PLAIN = 1 << 24 };  /* beside the mode in a template's and a block's key; PLAIN: each access looks its page up */
static inline u32 template_key(u32 mode) { return mode & ~(u32)(MODE_STEP | KEY_PLAIN); } /* a template does not depend on them */
enum { HEADS_MAX = 1 << 18, STORE_MAGIC = 0x47435443 };
enum { TRANSLATE_CHANGED = 0, TRANSLATE_FULL = 1, TRANSLATE_MISSING = 2 };
#define ALL_FLAGS 0x3f

/* Then: struct taccess[accesses], and the code. What a look-up compares comes first, in one line of the host's cache. */
struct tmpl {
    u32 next, key, restore; /* offset of the form that puts the flags back before the operation */
    u16 code_length, payload;
    u8 raw[16];             /* the instruction, as far as it is kept by it */
    u8 raw_length, kind, aux, reads, kills, flags;
    u8 accesses, length;    /* guest bytes; raw_length are those it is kept by */
    s64 relative;           /* target - own RIP; of a single, the bytes that it writes */
    s64 hole_relative[2];
    u16 hole[2];
    u8 hole_size[2];
    u8 rip_field, immediate_field, immediate_size; /* offsets in the instruction: of the displacement that hole 0 adds, of a store's immediate */
    u8 field_raw[2], field_size[2], pad;
    u16 field_code[2];      /* bytes of the instruction that are copied into the code */
    u16 changes;            /* general registers that it writes, a bit each */
    signed char moves;      /* what it adds to the stack pointer, which is not in *changes* then */
};
enum { T_ALIGN = 64 };

/* base: 0xff, or the address is base + index * scale (index 0xff: none) + disp (with disp_size: at disp_field in the instruction), the code
 * that looks it up begins at *start*, and the operand [rsi] of what follows has its ModRM byte at *operand*. */
struct taccess {
    u16 branch, resume, size, flags;
    u8 source, stub, pad[2];
    s32 immediate;
    u16 start, operand;
    u8 base, index, scale, disp_field;
    s32 disp;
    u32 disp_size;
};

struct store {
    u32 kind, size, used, count;    /* kind: STORE_MAGIC */
    u8 save[32], load[32];
    u32 save_length, load_length;
    u32 heads[HEADS_MAX];
};

/* An instruction whose host code ends at `end`, kept behind its block's code, for signals. guest: its offset, and SITE_*. */
struct fault_site { u16 end, guest; };
enum { SITE_STORED = 1 << 15, SITE_BORROWED = 1 << 14, SITE_OFFSET = SITE_BORROWED - 1 }; /* flags are in cpu.fl; RAX, RDX in scratch[2], [3] */

/* What a memory access leaves after its `call; jmp`. */
struct access {
    u32 header;          /* this - header = struct block */
    u16 delta;           /* instruction's guest offset in the block */
    u16 size;
    u8 source, length;   /* stores: register 0-15, 16-19 AH CH DH BH, 32 imm; instruction length */
    u16 flags;           /* ACCESS_* */
    s32 immediate;       /* of a load or read-modify-write: its single, as the distance from the block >> 6; 0: not made yet */
};
/* PYTHON: not all bytes may be written, so that an operand across two pages is Python's. AC, EMULATE: at STUB_LIMIT, why it was called. MASKED: not all bytes are read, so that a device's are Python's. ALIGNED: else #GP,
 * which comes from the host where the operand is RAM. LOOKED: the segment's limit was compared in line, not left to its being 4 GiB. */
enum { ACCESS_STACK = 1, ACCESS_AC = 2, ACCESS_EMULATE = 4, ACCESS_MASKED = 8, ACCESS_ALIGNED = 16, ACCESS_LOOKED = 32, ACCESS_PYTHON = 64, ACCESS_PROBE = 128 };

__attribute__((visibility("hidden"))) void *memcpy(void *to, const void *from, unsigned long n);
__attribute__((visibility("hidden"))) void *memset(void *to, int v, unsigned long n);
/* Whether memory, which others may write, has these bytes. */
static inline int same_bytes(const u8 *ram, const u8 *guest, u32 size)
{
    for (u32 i = 0; i < size; i++)
        if (((const volatile u8 *)ram)[i] != guest[i])
            return 0;
    return 1;
}

/* The linear address *by* bytes behind another. A program's have 32 bits outside 64-bit mode; those that the processor makes by itself
 * (descriptor tables, task state: AS_SYSTEM; stacks that gates switch to: AS_WIDE) have 64 in long mode whatever the code segment is. Nothing
 * else decides it. */
static inline u64 linear_after(const struct cpu *c, u64 linear, u64 by, int user)
{
    return (user & (AS_SYSTEM | AS_WIDE) ? c->efer & EFER_LMA : c->mode & MODE_64) ? linear + by : (u32)(linear + by);
}

void futex_wait(u32 *word, u32 value, u64 deadline);
void zero_pages(void *at, u64 size); /* of an Area of their own, without touching them */
void futex_wake(u32 *word);
void tcg_stop_world(struct vm *vm);
void tcg_start_world(struct vm *vm);
void ticker_kick(struct vm *vm, u64 deadline);
int frozen_fault(u64 address);
extern void stub_signal(void);
extern void stub_sigreturn(void);
u64 linear_host(struct cpu *c, u64 linear, int write);
int native_signal(struct cpu *c);
void jc_flush_one(struct cpu *c, u32 m);
void jc_drop(struct cpu *c, u32 m, u32 i);
void cross_unlink(struct vm *vm);
int cross_reaches(const struct vm *vm, u64 linear);

/* The size of a page at *linear* that code may have come from, as a shift; 21 for all pages of up to 2 MiB. */
static inline u32 code_span(const struct cpu *c, u32 m, u64 linear)
{
    return !(c->cr4 & CR4_PAE) ? 22 : c->code_huge[m] & seen_in(linear >> 30) ? 30 : 21;
}
u64 make_bridge(struct vm *vm, struct block *plan, u64 target);
/* Which block native_translate() makes: one to be looked up; or, for one run, of a single (see R_SLOW_WRITE) or of one instruction
 * again, whose read of a device has been answered. */
enum { MAKE_BLOCK, MAKE_SINGLE, MAKE_AGAIN };
u64 native_translate(struct cpu *c, u64 phys, u64 linear, u32 plain);
u64 single_of(struct cpu *c, const struct block *b, struct access *a);
void write_split(struct cpu *c);
u64 install(struct cpu *c, const struct block *plan, const struct code *code, const u8 *guest);
struct block *lay(struct vm *vm, const struct block *plan, const struct code *code);
u64 put_block(struct vm *vm, const struct block *plan, const struct code *code);
struct block *block_at(struct vm *vm, u64 host);
void tcg_watch_running(struct cpu *c, u64 gpa);
void tcg_memory_written(struct vm *vm, u64 gpa, u64 size);
#ifdef TCG_CHECK /* check.c */
void check_tables(struct cpu *c);
u64 check_target(struct cpu *c, u64 to);
void check_signal(int sig, int code, u64 address, u64 rip);
void check_died(int sig, u64 address, u64 rip, u64 near);
#endif
#endif
