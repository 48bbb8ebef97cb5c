/* Single steps and breakpoints (Intel SDM vol. 3, chapter 17).
 *
 * While TF is set or an interrupt shadow lasts, blocks have one instruction (MODE_STEP) and begin with h_begin(). However an
 * instruction ends, native_dispatch() comes next, and takes the trap that cpu.debug says. */
#include "sys.h"
#include "helpers.h"

enum { DR6_BS = 0x4000, DR6_BT = 0x8000 };

static int debug_raise(struct cpu *c, u64 bits)
{
    c->dr[6] = (c->dr[6] & ~15ul) | bits; /* bits 0 to 3 are the present exception's, the others stay */
    return raise(c, EX_DB, 0, 0);
}

int h_begin(struct cpu *c, u32 arg)
{
    (void)arg;
    c->debug = c->eflags & F_TF ? DEBUG_STEP : 0;
    if (c->shadow) {
        if (c->shadow == SHADOW_SS)
            c->debug |= DEBUG_BEHIND_SS;
        c->shadow = 0;
        c->poll = 1; /* what it held back */
        update_mode(c);
    }
    return H_CONTINUE;
}

int h_shadow(struct cpu *c, u32 arg)
{
    set_shadow(c, ARG_IMM(arg));
    return H_CONTINUE;
}

int debug_trap(struct cpu *c)
{
    u32 due = c->debug & (DEBUG_STEP | DEBUG_TASK);
    c->debug &= DEBUG_RF;
    if (!due || c->shadow == SHADOW_SS) /* no trap between MOV SS and the instruction behind it (SDM vol. 3, 6.8.3) */
        return H_CONTINUE;
    return debug_raise(c, (due & DEBUG_STEP ? DR6_BS : 0) | (due & DEBUG_TASK ? DR6_BT : 0));
}
