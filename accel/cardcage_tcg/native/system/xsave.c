/* XSAVE and XRSTOR of guests that have protection keys, whose PKRU the host's image has no place for
 * (Intel SDM vol. 1, chapter 13). Without PKU they are templates: see templates.py. */
#include "sys.h"
#include "helpers.h"
#include "internal.h"

enum { X87 = 1, SSE = 2, AVX = 4, PKRU = 1 << 9 };
enum { LEGACY = 512, HEADER = 64, AVX_AT = 576, AVX_SIZE = 256, PKRU_AT = 832, PKRU_SIZE = 8, IMAGE = 840 }; /* as CPUID 0xD has them */
#define COMPACT (1ul << 63)

/* The image as the host saves it, in the bounce buffer, and what of it is not in its initial state. */
static u64 save_host(struct cpu *c, u64 mask)
{
    u64 *header = (u64 *)(c->bounce + LEGACY);
    memset(c->bounce, 0, IMAGE);
    __asm__ volatile("xsave64 (%0)" : : "r"(c->bounce), "a"((u32)mask & 7), "d"(0) : "memory");
    memset(c->bounce + 6, 0, 18); /* the last opcode and its pointers: the host's */
    *(u32 *)(c->bounce + PKRU_AT) = c->pkru;
    return (header[0] & 7) | (c->pkru ? PKRU : 0);
}

struct piece { u32 at, from, size; }; /* in the guest's image; in ours */

/* Parts of *what* in an image; AVX and PKRU lie one behind the other in a compact one. */
static u32 pieces(struct piece *p, u64 what, u64 layout, int compact)
{
    u32 n = 0, at = AVX_AT;
    if (what & X87) {
        p[n++] = (struct piece){0, 0, 24};
        p[n++] = (struct piece){32, 32, 128};
    }
    if (what & SSE || (!compact && what & AVX))
        p[n++] = (struct piece){24, 24, 8};
    if (what & SSE)
        p[n++] = (struct piece){160, 160, 256};
    if (layout & AVX || !compact) {
        if (what & AVX)
            p[n++] = (struct piece){at, AVX_AT, AVX_SIZE};
        at += AVX_SIZE;
    }
    if (what & PKRU)
        p[n++] = (struct piece){at, PKRU_AT, PKRU_SIZE};
    return n;
}

/* The image in the guest's memory. On a device it raises #GP: helpers that begin again (struct device) do so without the guest's
 * x87, SSE and AVX state in the processor. */
static int image(struct cpu *c, u64 linear, void *data, u32 size, int write)
{
    int user = c->cpl == 3, r = write ? vwrite(c, linear, data, size, user) : vread(c, linear, data, size, user);
    if (unlikely(c->armed & ARMED_DATA) && !r)
        debug_access(c, linear, size, write);
    return r && r != EX_PF ? fault(c, EX_GP, 0) : r;
}

/* 0, or the fault of an access to all of the image. */
static int probe(struct cpu *c, u64 linear, u32 size, int access)
{
    u64 phys;
    u32 global, writable;
    for (u32 off = 0; off < size; off += 4096 - ((u32)(linear + off) & 0xfff)) {
        u64 here = long_mode(c) ? linear + off : (u32)(linear + off);
        int r = long_mode(c) && !canonical(here) ? fault(c, EX_GP, 0) : walk(c, here, access, c->cpl == 3, &phys, &global, &writable);
        if (r)
            return r;
    }
    return 0;
}

static int save(struct cpu *c, u32 kind, u64 linear)
{
    u64 wanted = ((u32)c->gpr[RAX] | c->gpr[RDX] << 32) & c->guest_xcr0, used = save_host(c, wanted) & wanted, what = wanted, header[2];
    struct piece p[6];
    int r, compact = kind == XSAVE_COMPACT;
    u32 n, size = 576;
    if (compact)
        what = used;
    n = pieces(p, what, wanted, compact);
    for (u32 i = 0; i < n; i++)
        size = p[i].at + p[i].size > size ? p[i].at + p[i].size : size;
    if ((r = probe(c, linear, size, ACC_WRITE)) || (r = image(c, linear + LEGACY, header, 16, 0)))
        return raise_fault(c, r);
    header[0] = compact ? used : (header[0] & ~wanted) | used;
    header[1] = wanted | COMPACT;
    for (u32 i = 0; i < n; i++)
        if ((r = image(c, linear + p[i].at, c->bounce + p[i].from, p[i].size, 1)))
            return raise_fault(c, r);
    r = image(c, linear + LEGACY, header, compact ? 16 : 8, 1);
    return r ? raise_fault(c, r) : H_CONTINUE;
}

/* Nothing that the host's XRSTOR could refuse goes on to it. */
static int restore(struct cpu *c, u64 linear)
{
    u64 wanted = ((u32)c->gpr[RAX] | c->gpr[RDX] << 32) & c->guest_xcr0, header[8], present, layout;
    struct piece p[6];
    u8 *ours = c->bounce;
    int r, compact;
    u32 n;
    if ((r = image(c, linear + LEGACY, header, 64, 0)))
        return raise_fault(c, r);
    present = header[0], layout = header[1], compact = layout >> 63;
    for (u32 i = compact ? 2 : 1; i < (compact ? 8u : 3u); i++)
        if (header[i])
            return raise_gp(c);
    if (present & ~(u64)c->guest_xcr0 || (compact && (layout & ~(COMPACT | c->guest_xcr0) || present & ~layout)))
        return raise_gp(c);
    memset(ours, 0, IMAGE);
    if (compact && !(wanted & SSE)) /* MXCSR stays; the host's XRSTOR of the standard form takes it from here for AVX, too */
        __asm__ volatile("stmxcsr %0" : "=m"(*(u32 *)(ours + 24)));
    else
        *(u32 *)(ours + 24) = 0x1f80;
    n = pieces(p, wanted & present, layout, compact);
    for (u32 i = 0; i < n; i++)
        if ((r = image(c, linear + p[i].at, ours + p[i].from, p[i].size, 0)))
            return raise_fault(c, r);
    if (!compact && wanted & (SSE | AVX) && (r = image(c, linear + 24, ours + 24, 8, 0)))
        return raise_fault(c, r); /* MXCSR comes from there whatever the header says */
    if (*(u32 *)(ours + 24) & ~0xffffu)
        return raise_gp(c);
    *(u64 *)(ours + LEGACY) = present & wanted & 7;
    __asm__ volatile("xrstor64 (%0)" : : "r"(ours), "a"((u32)wanted & 7), "d"(0) : "memory");
    if (wanted & PKRU)
        set_pkru(c, present & PKRU ? *(u32 *)(ours + PKRU_AT) : 0);
    return H_CONTINUE;
}

int h_xsave(struct cpu *c, u32 arg)
{
    u32 kind = ARG_IMM(arg) & 3;
    if (!(c->cr4 & CR4_OSXSAVE))
        return raise_ud(c);
    if (c->cr0 & CR0_TS)
        return raise(c, EX_NM, 0, 0);
    if (c->info[0] & 63)
        return raise_gp(c);
    return kind == XSAVE_RESTORE ? restore(c, c->info[0]) : save(c, kind, c->info[0]);
}

int h_rdpkru(struct cpu *c, u32 arg)
{
    (void)arg;
    if (!(c->cr4 & CR4_PKE))
        return raise_ud(c);
    if ((u32)c->gpr[RCX])
        return raise_gp(c);
    c->gpr[RAX] = c->pkru;
    c->gpr[RDX] = 0;
    return H_CONTINUE;
}

int h_wrpkru(struct cpu *c, u32 arg)
{
    (void)arg;
    if (!(c->cr4 & CR4_PKE))
        return raise_ud(c);
    if ((u32)c->gpr[RCX] || (u32)c->gpr[RDX])
        return raise_gp(c);
    set_pkru(c, (u32)c->gpr[RAX]);
    return H_CONTINUE;
}
