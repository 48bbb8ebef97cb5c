/* Every helper that translated code can call: HELPER(NAME, function), numbered in this order.
 *
 * The argument: bits 0-7 number, 8-11 instruction length, 12-31 operand ("imm" below). Sizes are in bytes (2, 4, 8).
 * "reg": general register 0-15; "seg": ES CS SS DS FS GS. info[] is cpu.info[], filled before the call. */
#ifndef CARDCAGE_HELPERS_H
#define CARDCAGE_HELPERS_H
#include "cpu.h"

#define HELPERS \
    HELPER(RAISE, h_raise)           /* imm: vector | 0x100 if it has an error code (which is 0) */ \
    HELPER(FPU_OFF, h_fpu_off)       /* imm: FPU_*; the exception of an instruction whose unit is off, if it is */ \
    HELPER(EMULATE, h_emulate)       /* leave with R_EMULATE */ \
    HELPER(BEGIN, h_begin)           /* MODE_STEP: before each instruction; length 0 */ \
    HELPER(SHADOW, h_shadow)         /* imm: SHADOW_*; behind an instruction whose next one is in another block; length 0 */ \
    HELPER(SINGLE, h_single)         /* the end of a single (see R_SLOW_WRITE): leave with R_SINGLE */ \
    HELPER(CLI, h_cli) \
    HELPER(STI, h_sti) \
    HELPER(HLT, h_hlt) \
    HELPER(PAUSE, h_pause) \
    HELPER(PUSHF, h_pushf)           /* imm: size */ \
    HELPER(POPF, h_popf)             /* imm: size */ \
    HELPER(CLD, h_cld) \
    HELPER(STD, h_std) \
    HELPER(CLAC, h_clac) \
    HELPER(STAC, h_stac) \
    HELPER(INT, h_int)               /* imm: vector */ \
    HELPER(INT3, h_int3) \
    HELPER(INTO, h_into) \
    HELPER(INT1, h_int1) \
    HELPER(IRET, h_iret)             /* imm: size */ \
    HELPER(SYSCALL, h_syscall) \
    HELPER(SYSRET, h_sysret)         /* imm: 1 = REX.W */ \
    HELPER(SYSENTER, h_sysenter) \
    HELPER(SYSEXIT, h_sysexit) \
    HELPER(SWAPGS, h_swapgs) \
    HELPER(FAR_JMP, h_far_jmp)       /* imm: size; info[0] = selector, info[1] = offset */ \
    HELPER(FAR_CALL, h_far_call)     /* likewise */ \
    HELPER(RETF, h_retf)             /* imm: size | bytes to release << 4 */ \
    HELPER(MOV_SREG, h_mov_sreg)     /* imm: seg | reg << 4 */ \
    HELPER(LOAD_SREG, h_load_sreg)   /* imm: seg; info[0] = selector */ \
    HELPER(POP_SREG, h_pop_sreg)     /* imm: seg | size << 4 */ \
    HELPER(LOAD_FAR, h_load_far)     /* LDS..LGS; imm: seg | reg << 4 | size << 8; info[0] = selector, info[1] = offset */ \
    HELPER(LLDT, h_lldt)             /* info[0] = selector */ \
    HELPER(LTR, h_ltr)               /* info[0] = selector */ \
    HELPER(LAR, h_lar)               /* imm: reg | size << 4; info[0] = selector */ \
    HELPER(LSL, h_lsl)               /* likewise */ \
    HELPER(VERR, h_verr)             /* info[0] = selector */ \
    HELPER(VERW, h_verw)             /* info[0] = selector */ \
    HELPER(SGDT, h_sgdt)             /* info[0] = linear address */ \
    HELPER(SIDT, h_sidt) \
    HELPER(LGDT, h_lgdt)             /* imm: size; info[0] = linear address */ \
    HELPER(LIDT, h_lidt) \
    HELPER(SLDT, h_sldt)             /* imm: reg | size << 4, or 0x100: info[0] = linear address */ \
    HELPER(STR, h_str) \
    HELPER(SMSW, h_smsw) \
    HELPER(LMSW, h_lmsw)             /* info[0] = value */ \
    HELPER(ARPL, h_arpl)             /* imm: destination reg | source reg << 4, or | 0x100: destination at info[0] */ \
    HELPER(MOV_FROM_CR, h_mov_from_cr) /* imm: reg | control register << 4 */ \
    HELPER(MOV_TO_CR, h_mov_to_cr) \
    HELPER(MOV_FROM_DR, h_mov_from_dr) /* imm: reg | debug register << 4 */ \
    HELPER(MOV_TO_DR, h_mov_to_dr) \
    HELPER(CLTS, h_clts) \
    HELPER(INVLPG, h_invlpg)         /* info[0] = linear address */ \
    HELPER(CPUID, h_cpuid) \
    HELPER(RDTSC, h_rdtsc) \
    HELPER(RDTSCP, h_rdtscp) \
    HELPER(RDPMC, h_rdpmc) \
    HELPER(FSGSBASE, h_fsgsbase)     /* imm: reg | 16 for GS | 32 for WR | 64 for 64-bit operands */ \
    HELPER(XGETBV, h_xgetbv) \
    HELPER(RDMSR, h_rdmsr) \
    HELPER(WRMSR, h_wrmsr) \
    HELPER(XSAVE, h_xsave)           /* imm: XSAVE_*; info[0] = linear address. Only of guests with PKU */ \
    HELPER(RDPKRU, h_rdpkru) \
    HELPER(WRPKRU, h_wrpkru) \
    HELPER(HYPERCALL, h_hypercall)   /* VMCALL, VMMCALL */ \
    HELPER(PRIVILEGED_NOP, h_privileged_nop) /* WBINVD, INVD: #GP unless CPL is 0 */ \
    HELPER(STRING, h_string)         /* imm: STRING_* */ \
    HELPER(PUSHA, h_pusha)           /* imm: size */ \
    HELPER(POPA, h_popa)             /* imm: size */ \
    HELPER(ENTER, h_enter)           /* imm: size; info[0] = bytes | level << 16 */ \
    HELPER(BOUND, h_bound)           /* imm: reg | size << 4; info[0] = linear address */ \
    HELPER(XLAT, h_xlat)             /* imm: address size | segment << 4; info[1] = segment base */ \
    HELPER(SALC, h_salc) \
    HELPER(AAA, h_aaa) \
    HELPER(AAS, h_aas) \
    HELPER(DAA, h_daa) \
    HELPER(DAS, h_das) \
    HELPER(AAM, h_aam)               /* imm: base */ \
    HELPER(AAD, h_aad)               /* imm: base */ \
    HELPER(OUT, h_out)               /* imm: log2 of the size | 4 | port << 3, without 4 the port is in DX */

/* The operand of STRING: operation | log2 of the element size << 3 | repeat (1 REP or REPE, 2 REPNE) << 5 |
 * address size (0, 1, 2: 16, 32, 64 bits) << 7 | segment register of the source << 9. */
enum { FPU_X87, FPU_MMX, FPU_SSE, FPU_AVX, FPU_XSAVE, FPU_WAIT };
enum { XSAVE_STANDARD, XSAVE_COMPACT, XSAVE_RESTORE };
enum { STRING_MOVS, STRING_CMPS, STRING_STOS, STRING_LODS, STRING_SCAS };

#define HELPER(name, function) HLP_##name,
enum { HELPERS HLP_COUNT };
#undef HELPER
#define HELPER(name, function) int function(struct cpu *c, u32 arg);
HELPERS
#undef HELPER

extern int (*const helpers[])(struct cpu *c, u32 arg);
int helper_call(struct cpu *c, u32 arg);
#endif
