/* What the system-instruction files share: faults as values, stacks, descriptors.
 *
 * Inner functions answer 0, or the vector of a fault whose error code is in cpu.scratch[3], or PENDING; only helpers raise. */
#ifndef CARDCAGE_SYS_H
#define CARDCAGE_SYS_H
#include "cpu.h"

#define ARG_LEN(arg) (((arg) >> 8) & 15)
#define ARG_IMM(arg) ((arg) >> 12)
#define EXPORT __attribute__((visibility("default")))

typedef int (*helper_fn)(struct cpu *c, u32 arg);

/* Kinds of event for deliver(): what the IDT's DPL, the EXT bit and double faults depend on. */
enum { EVENT_EXCEPTION, EVENT_SOFT, EVENT_EXTERNAL, EVENT_INT1 };
enum { FAR_JMP, FAR_CALL, FAR_RET, FAR_IRET };
enum { ATTR_A = 1, ATTR_RW = 2, ATTR_CONFORMING = 4, ATTR_CODE = 8, ATTR_S = 16, ATTR_P = 128, ATTR_L = 0x200, ATTR_DB = 0x400 };
#define BAD_SELECTOR (-2) /* descriptor(): outside its table */
#define PENDING (-3)      /* a device's: the helper leaves, see struct device */
#define FLAGS_SYSTEM 0x3e7702ul /* in cpu.eflags: ID VIP VIF AC VM NT IOPL DF IF TF; RF is in cpu.debug */

struct stack {
    u64 sp, base, mask; /* mask: of the stack pointer, ~0 for 64-bit stacks */
    int user;
    u32 error;          /* of #SS when it leaves its segment or canonical space */
    struct limit limit;
    u32 checked;        /* for alignment: an instruction's accesses with EFLAGS.AC at CPL 3, not those of an event */
};

static inline int fault(struct cpu *c, int vector, u32 error)
{
    c->scratch[3] = error;
    return vector;
}

static inline int long_mode(const struct cpu *c) { return (c->efer & EFER_LMA) != 0; }
static inline int canonical(u64 a) { return (u64)((s64)(a << 16) >> 16) == a; }
static inline u64 linear_mask(const struct cpu *c) { return c->mode & MODE_64 ? ~0ul : 0xfffffffful; }
static inline u32 desc_attr(u64 d) { return ((d >> 40) & 0xff) | ((d >> 44) & 0xf00); }
static inline u32 attr_dpl(u32 attr) { return (attr >> 5) & 3; }
static inline int is_code(u32 attr) { return (attr & (ATTR_S | ATTR_CODE)) == (ATTR_S | ATTR_CODE); }
static inline int is_writable(u32 attr) { return (attr & (ATTR_S | ATTR_CODE | ATTR_RW)) == (ATTR_S | ATTR_RW); }

static inline u64 rip_mask(const struct cpu *c, u64 rip)
{
    return c->mode & MODE_64 ? rip : c->mode & MODE_32 ? (u32)rip : (u16)rip;
}

static inline u64 next_rip(const struct cpu *c, u32 arg) { return rip_mask(c, c->rip + ARG_LEN(arg)); }
static inline int redirect(struct cpu *c, u32 arg)
{
    c->rip = next_rip(c, arg);
    return H_REDIRECT;
}
static inline int exit_to(struct cpu *c, u32 reason, u64 info)
{
    c->reason = reason;
    c->info[0] = info;
    return H_EXIT;
}
static inline int emulate(struct cpu *c, u32 arg) { return exit_to(c, R_EMULATE, ARG_LEN(arg)); }
static inline int raise_fault(struct cpu *c, int vector) { return vector == PENDING ? H_EXIT : raise(c, vector, 1, c->scratch[3]); }
static inline int raise_gp(struct cpu *c) { return raise(c, EX_GP, 1, 0); }
static inline int raise_ud(struct cpu *c) { return raise(c, EX_UD, 0, 0); }

/* Write a general register as an instruction of operand size 1, 2, 4 or 8 does (1: the low byte). */
static inline void set_reg(struct cpu *c, u32 n, u32 size, u64 value)
{
    u64 mask = size == 1 ? 0xff : 0xffff;
    c->gpr[n] = size == 8 ? value : size == 4 ? (u32)value : (c->gpr[n] & ~mask) | (value & mask);
}

static inline u64 size_mask(u32 size) { return size == 8 ? ~0ul : (1ul << size * 8) - 1; }

/* sys.c */
/* Linear memory of up to 8 bytes, devices too: 0, a vector with scratch[3] set, PENDING, or -1 where an event is delivered and there is
 * no RAM. */
int linear_read(struct cpu *c, u64 linear, void *to, u32 size, int user);
int linear_write(struct cpu *c, u64 linear, const void *from, u32 size, int user);
int sys_read(struct cpu *c, u64 linear, void *to, u32 size);            /* supervisor rights; nothing there reads as ones */
int sys_write(struct cpu *c, u64 linear, const void *from, u32 size);   /* supervisor rights; nothing there drops it */
int check_segment(struct cpu *c, int n, u64 off, u64 size, int write);  /* of a 16- or 32-bit mode's segment */
struct stack current_stack(const struct cpu *c);
struct stack stack_of(u64 ss_desc, u64 sp, int long_stack, int user, u32 error);
void set_shadow(struct cpu *c, u32 kind);
int probe_stack(struct cpu *c, const struct stack *s);
int push(struct cpu *c, struct stack *s, u32 size, u64 value);
int pop(struct cpu *c, struct stack *s, u32 size, u64 *value);
void set_sp(struct cpu *c, const struct stack *s);
int tss_stack(struct cpu *c, u32 cpl, u32 ext, u32 *ss, u64 *sp, u64 *desc, u64 *at);
int tss_stack64(struct cpu *c, u32 offset, u32 ext, u64 *sp);
void null_segment(struct cpu *c, int n);
void real_segment(struct cpu *c, int n, u32 sel);
int dispatch(struct cpu *c, u32 vector, u32 has_error, u32 error, u32 kind, u64 ret);
/* debug.c */
enum { DR6_BD = 0x2000, DR6_BS = 0x4000, DR6_BT = 0x8000 };
int debug_raise(struct cpu *c, u64 bits);
/* segments.c */
int descriptor(struct cpu *c, u32 sel, u64 *desc, u64 *at);
int mark_accessed(struct cpu *c, u64 *desc, u64 at);
void set_segment(struct cpu *c, int n, u32 sel, u64 desc);
int load_segment(struct cpu *c, int n, u32 sel);
/* transfers.c */
u32 desc_limit(u64 desc);
int far_transfer(struct cpu *c, u32 kind, u32 sel, u64 off, u32 size, u64 next);
/* tasks.c */
enum { TASK_JMP, TASK_CALL, TASK_INT, TASK_IRET };
int task_switch(struct cpu *c, u32 sel, u32 source, u64 next, u32 ext, u32 has_error, u32 error);
/* segments.c, for SMSW */
int store_word(struct cpu *c, u32 arg, u64 value);
/* control.c */
int set_cr(struct cpu *c, u32 n, u64 value);
int load_pdptes(struct cpu *c, u64 cr3);

#endif
