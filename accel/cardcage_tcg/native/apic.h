/* What the local APIC's files share. */
#ifndef CARDCAGE_APIC_H
#define CARDCAGE_APIC_H
#include "sys.h"

/* Registers by offset >> 4. */
enum {
    A_ID = 2, A_VERSION = 3, A_TPR = 8, A_APR, A_PPR, A_EOI, A_RRD, A_LDR, A_DFR, A_SVR, A_ISR = 0x10, A_TMR = 0x18, A_IRR = 0x20,
    A_ESR = 0x28, A_CMCI = 0x2f, A_ICR = 0x30, A_ICR2, A_TIMER, A_THERMAL, A_PERF, A_LINT0, A_LINT1, A_ERROR, A_TICR, A_TCCR,
    A_DCR = 0x3e, A_SELF = 0x3f
};
enum { ESR_SEND_VECTOR = 0x20, ESR_RECEIVE_VECTOR = 0x40, ESR_REGISTER = 0x80 };
enum { LVT_MASKED = 1 << 16, SVR_ENABLED = 1 << 8, SVR_NO_BROADCAST = 1 << 12 };
enum { MODE_FIXED, MODE_LOWEST, MODE_SMI, MODE_REMOTE, MODE_NMI, MODE_INIT, MODE_SIPI, MODE_EXTINT };
enum { TIMER_ONESHOT, TIMER_PERIODIC, TIMER_DEADLINE };
#define VERSION 0x50014u        /* version 0x14, six LVT entries */
#define BASE_ENABLED 0x800ul
#define BASE_X2 0x400ul
#define BASE_BSP 0x100ul
#define SHORTEST_PERIOD 20000ul /* ns: a shorter periodic timer would only keep the host busy */
#define NEVER (~0ul)

/* apic.c */
int apic_highest(const u32 *map);               /* highest vector in a bitmap, or -1 */
u32 apic_clear(u32 *map, u32 v);
u32 apic_ppr(const struct lapic *l);
void apic_recheck(struct cpu *c);               /* look at interrupts again at the next poll */
void apic_error(struct cpu *c, u32 bit);        /* ESR_* */
void apic_post_mode(struct cpu *t, u32 mode, u32 vector, u32 level);
void apic_command(struct cpu *c, u32 low, u32 dest);  /* the ICR was written */
/* apic_timer.c; all but timer_start() and timer_deadline() with timer_lock held where something is changed */
u32 timer_mode(const struct lapic *l);          /* TIMER_* */
u64 timer_ns(struct cpu *c, u64 count);
void timer_arm(struct cpu *c, u64 next);
void timer_disarm(struct lapic *l);
void timer_start(struct cpu *c, u32 count);
u32 timer_count(struct cpu *c);                 /* what is left */
void timer_change(struct cpu *c, int periodic); /* between one-shot and periodic, which it was */
void timer_deadline(struct cpu *c, u64 value);  /* a guest TSC value, 0: none */

#endif
