/* What the native files share that no helper needs. */
#ifndef CARDCAGE_INTERNAL_H
#define CARDCAGE_INTERNAL_H
#include "cpu.h"

#define EXPORTED __attribute__((visibility("default")))

/* A translated block: this header, then its code. It lives in the code buffer; pointers are executable-view addresses. */
struct block {
    u64 pc;              /* RIP of its first instruction */
    u64 cs_base;
    u64 phys, phys2;     /* physical address of its first byte; of the second page it reaches, or ~0 */
    u32 mode;
    u16 length, valid;   /* guest bytes */
    u32 code_length, entry;  /* host bytes after the header; offset of the direct entry (flags live) */
    u64 hash_next;
    u64 page_next[2];
    u64 incoming;        /* struct site * that jump here */
};

/* What a direct jump leaves after its `call [stub_chain]`: patched once its target is known. */
struct site {
    u32 header;          /* this - header = struct block */
    u32 jump;            /* this - jump = the rel32 field to patch */
    s32 target;          /* target RIP - block pc */
    u32 wrap;            /* mask class: 0 = 64 bits, 1 = 32, 2 = 16 */
    u64 next;
};

/* What a memory access leaves after its `call; jmp`. */
struct access {
    u32 header;          /* this - header = struct block */
    u16 delta;           /* instruction's guest offset in the block */
    u16 size;
    u8 source, length;   /* stores: register 0-15, 16-19 AH CH DH BH, 32 imm; instruction length */
    u16 pad;
    s32 immediate;
};

__attribute__((visibility("hidden"))) void *memcpy(void *to, const void *from, unsigned long n);
__attribute__((visibility("hidden"))) void *memset(void *to, int v, unsigned long n);
void futex_wait(u32 *word, u32 value, u64 deadline);
void futex_wake(u32 *word);
void tcg_stop_world(struct vm *vm);
void tcg_start_world(struct vm *vm);
void ticker_kick(struct vm *vm, u64 deadline);
extern void stub_signal(void);
extern void stub_sigreturn(void);
u64 linear_host(struct cpu *c, u64 linear, int write);
u64 native_lookup(struct cpu *c);
void cross_unlink(struct vm *vm);
#endif
