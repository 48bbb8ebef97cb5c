/* Control, debug and model-specific registers (Intel SDM vol. 3, chapter 2). */
#include "sys.h"
#include "helpers.h"

/* CR4 bits with an implementation: TSD DE PSE PAE MCE PGE PCE OSFXSR OSXMMEXCPT UMIP FSGSBASE OSXSAVE SMEP. */
#define CR4_DEFAULT 0x150ffcul
#define CR0_BITS 0xe005003ful
#define EFER_BITS (EFER_SCE | EFER_LME | EFER_LMA | EFER_NXE)
#define EFER_LMA_LME (EFER_LMA | EFER_LME)

int load_pdptes(struct cpu *c, u64 cr3)
{
    u64 new[4];
    for (u32 i = 0; i < 4; i++) {
        u64 *at = phys_host(c->vm, (cr3 & 0xffffffe0) + i * 8, 0);
        new[i] = at ? *(volatile u64 *)at : 0;
        if (new[i] & 1 && new[i] & (~0ul << PHYS_BITS | 0x1e6))
            return fault(c, EX_GP, 0);
    }
    for (u32 i = 0; i < 4; i++)
        c->pdpte[i] = new[i];
    return 0;
}

static int pae_legacy(u64 cr0, u64 cr4, u64 efer) { return cr0 & CR0_PG && cr4 & CR4_PAE && !(efer & EFER_LME); }

static int set_cr0(struct cpu *c, u64 value)
{
    u64 old = c->cr0, efer = c->efer;
    int r;
    if (value >> 32 || (value & CR0_PG && !(value & CR0_PE)) || (value & 0x60000000) == 0x20000000)
        return fault(c, EX_GP, 0);
    value = (value & CR0_BITS) | 0x10;
    if (value & CR0_PG && !(old & CR0_PG) && efer & EFER_LME) {
        if (!(c->cr4 & CR4_PAE) || c->seg[CS].attr & ATTR_L)
            return fault(c, EX_GP, 0);
        efer |= EFER_LMA;
    } else if (!(value & CR0_PG) && old & CR0_PG) {
        if (c->mode & MODE_64)
            return fault(c, EX_GP, 0);
        efer &= ~(u64)EFER_LMA;
    }
    if (pae_legacy(value, c->cr4, efer) && (value ^ old) & (CR0_PG | 0x60000000) && (r = load_pdptes(c, c->cr3)))
        return r;
    c->cr0 = value;
    c->efer = efer;
    if ((value ^ old) & (CR0_PG | CR0_PE | CR0_WP))
        tlb_flush(c, 1);
    update_mode(c);
    return 0;
}

static int set_cr3(struct cpu *c, u64 value)
{
    int r;
    if (long_mode(c)) {
        if (value >> PHYS_BITS)
            return fault(c, EX_GP, 0);
    } else {
        value &= 0xffffffff;
        if (pae_legacy(c->cr0, c->cr4, c->efer) && (r = load_pdptes(c, value)))
            return r;
    }
    c->cr3 = value;
    tlb_flush(c, 0);
    return 0;
}

static int set_cr4(struct cpu *c, u64 value)
{
    u64 changed = value ^ c->cr4;
    int r;
    if (value & ~(c->cr4_allowed ? c->cr4_allowed : CR4_DEFAULT) || (long_mode(c) && !(value & CR4_PAE)))
        return fault(c, EX_GP, 0);
    if (pae_legacy(c->cr0, value, c->efer) && changed & (CR4_PAE | CR4_PGE | CR4_PSE | CR4_SMEP) && (r = load_pdptes(c, c->cr3)))
        return r;
    c->cr4 = value;
    if (changed & (CR4_PSE | CR4_PAE | CR4_PGE | CR4_SMEP | CR4_SMAP | CR4_PKE))
        tlb_flush(c, 1);
    update_mode(c);
    return 0;
}

static int set_cr8(struct cpu *c, u64 value)
{
    if (value & ~15ul)
        return fault(c, EX_GP, 0);
    c->cr8 = value;
    c->lapic.regs[8] = (u32)value << 4;
    if (c->vm->has_lapic && apic_pending(c) >= 0)
        c->poll = 1;
    return 0;
}

/* Load a control register with its checks and side effects: 0, or #GP's vector. */
int set_cr(struct cpu *c, u32 n, u64 value)
{
    switch (n) {
    case 0: return set_cr0(c, value);
    case 2: c->cr2 = value; return 0;
    case 3: return set_cr3(c, value);
    case 4: return set_cr4(c, value);
    case 8: return set_cr8(c, value);
    default: return EX_UD;
    }
}

/* ---- helpers; imm of the register moves: general register | number << 4 ---- */

static int bad_cr(struct cpu *c, u32 n) { return n != 0 && n != 2 && n != 3 && n != 4 && (n != 8 || !(c->mode & MODE_64)); }

int h_mov_from_cr(struct cpu *c, u32 arg)
{
    u32 reg = ARG_IMM(arg) & 15, n = ARG_IMM(arg) >> 4 & 15;
    u64 value = n == 0 ? c->cr0 : n == 2 ? c->cr2 : n == 3 ? c->cr3 : n == 4 ? c->cr4 : c->cr8;
    if (bad_cr(c, n))
        return raise_ud(c);
    if (c->cpl)
        return raise_gp(c);
    c->gpr[reg] = value & linear_mask(c);
    return H_CONTINUE;
}

int h_mov_to_cr(struct cpu *c, u32 arg)
{
    u32 reg = ARG_IMM(arg) & 15, n = ARG_IMM(arg) >> 4 & 15;
    if (bad_cr(c, n))
        return raise_ud(c);
    if (c->cpl)
        return raise_gp(c);
    if (set_cr(c, n, c->gpr[reg] & linear_mask(c)))
        return raise_gp(c);
    return n == 2 || (n == 8 && !c->poll) ? H_CONTINUE : redirect(c, arg);
}

int h_clts(struct cpu *c, u32 arg)
{
    if (c->cpl)
        return raise_gp(c);
    c->cr0 &= ~(u64)CR0_TS;
    update_mode(c);
    return redirect(c, arg);
}

/* info[0] = the machine status word. */
int h_lmsw(struct cpu *c, u32 arg)
{
    if (c->cpl)
        return raise_gp(c);
    if (set_cr0(c, (c->cr0 & ~14ul) | (c->info[0] & 15))) /* it can set PE but not clear it */
        return raise_gp(c);
    return redirect(c, arg);
}

int h_smsw(struct cpu *c, u32 arg) { return store_word(c, arg, c->cr0); }

/* MOV DRn: *n, or -1 with the exception raised into *action. */
static int debug_register(struct cpu *c, u32 *n, int *action)
{
    if (*n > 7 || ((*n == 4 || *n == 5) && c->cr4 & CR4_DE)) {
        *action = raise_ud(c);
        return -1;
    }
    if (c->cpl) {
        *action = raise_gp(c);
        return -1;
    }
    if (c->dr[7] & 0x2000) {
        *action = debug_raise(c, DR6_BD);
        return -1;
    }
    if (*n == 4 || *n == 5)
        *n += 2;
    return 0;
}

int h_mov_from_dr(struct cpu *c, u32 arg)
{
    u32 n = ARG_IMM(arg) >> 4 & 15;
    int action;
    if (debug_register(c, &n, &action))
        return action;
    c->gpr[ARG_IMM(arg) & 15] = c->dr[n] & linear_mask(c);
    return H_CONTINUE;
}

int h_mov_to_dr(struct cpu *c, u32 arg)
{
    u32 n = ARG_IMM(arg) >> 4 & 15;
    u64 value = c->gpr[ARG_IMM(arg) & 15] & linear_mask(c);
    int action;
    if (debug_register(c, &n, &action))
        return action;
    if (n >= 6) {
        if (value >> 32)
            return raise_gp(c);
        value = n == 6 ? (value & 0xe00f) | 0xffff0ff0 : (value & 0xffff2bff) | 0x400;
    }
    c->dr[n] = value;
    update_mode(c);
    for (u32 i = 0; i < 4; i++)
        if (c->armed >> i & 1)
            tlb_flush_page(c, c->dr[i]);
    return redirect(c, arg);
}

/* info[0] = linear address. */
int h_invlpg(struct cpu *c, u32 arg)
{
    if (c->cpl)
        return raise_gp(c);
    if (!(c->mode & MODE_64) || canonical(c->info[0]))
        tlb_flush_page(c, c->info[0]);
    return redirect(c, arg); /* what follows may be on the page */
}

static void set_pair(struct cpu *c, u64 value)
{
    c->gpr[RAX] = (u32)value;
    c->gpr[RDX] = value >> 32;
}

int h_rdtsc(struct cpu *c, u32 arg)
{
    (void)arg;
    if (c->cr4 & CR4_TSD && c->cpl)
        return raise_gp(c);
    set_pair(c, rdtsc() + c->tsc_offset);
    return H_CONTINUE;
}

int h_rdtscp(struct cpu *c, u32 arg)
{
    if (c->cr4 & CR4_TSD && c->cpl)
        return raise_gp(c);
    (void)h_rdtsc(c, arg);
    c->gpr[RCX] = (u32)c->tsc_aux;
    return H_CONTINUE;
}

/* Four counters, as their MSRs: see msrlist.py. */
int h_rdpmc(struct cpu *c, u32 arg)
{
    (void)arg;
    if ((c->cpl && !(c->cr4 & CR4_PCE)) || (u32)c->gpr[RCX] > 3)
        return raise_gp(c);
    set_pair(c, 0);
    return H_CONTINUE;
}

/* imm = register | GS << 4 | write << 5 | 64 bits << 6. */
int h_fsgsbase(struct cpu *c, u32 arg)
{
    u32 imm = ARG_IMM(arg), reg = imm & 15;
    struct seg *s = &c->seg[imm & 16 ? GS : FS];
    u64 value = imm & 64 ? c->gpr[reg] : (u32)c->gpr[reg];
    if (!(c->cr4 & CR4_FSGSBASE) || !(c->mode & MODE_64))
        return raise_ud(c);
    if (!(imm & 32)) {
        c->gpr[reg] = imm & 64 ? s->base : (u32)s->base;
        return H_CONTINUE;
    }
    if (!canonical(value))
        return raise_gp(c);
    s->base = value;
    *(imm & 16 ? &c->gsbase : &c->fsbase) = value;
    return H_CONTINUE;
}

int h_swapgs(struct cpu *c, u32 arg)
{
    u64 base = c->gsbase;
    (void)arg;
    if (!(c->mode & MODE_64))
        return raise_ud(c);
    if (c->cpl)
        return raise_gp(c);
    c->gsbase = c->seg[GS].base = c->kernel_gs_base;
    c->kernel_gs_base = base;
    return H_CONTINUE;
}

int h_xgetbv(struct cpu *c, u32 arg)
{
    (void)arg;
    if (!(c->cr4 & CR4_OSXSAVE))
        return raise_ud(c);
    if ((u32)c->gpr[RCX])
        return raise_gp(c);
    set_pair(c, c->guest_xcr0);
    return H_CONTINUE;
}

int h_privileged_nop(struct cpu *c, u32 arg) { (void)arg; return c->cpl ? raise_gp(c) : H_CONTINUE; }

/* ---- hypercalls (Linux, Documentation/virt/kvm/x86/hypercalls.rst, include/uapi/linux/kvm_para.h) ---- */

enum { KVM_HC_VAPIC_POLL_IRQ = 1, KVM_HC_SEND_IPI = 10 };
enum { KVM_EPERM = 1, KVM_ENOSYS = 1000 };

/* Both instructions on either vendor's processor, as KVM has it. What it does without a CPUID bit is done; what it needs
 * a bit for, which is not announced, is unknown: a caller then goes another way. */
int h_hypercall(struct cpu *c, u32 arg)
{
    u64 mask = linear_mask(c), result = -(u64)KVM_ENOSYS;
    if (c->cpl)
        result = -(u64)KVM_EPERM;
    else if ((c->gpr[RAX] & mask) == KVM_HC_VAPIC_POLL_IRQ)
        result = 0; /* interrupts are looked at whenever one comes */
    else if ((c->gpr[RAX] & mask) == KVM_HC_SEND_IPI && c->vm->has_lapic)
        result = apic_pv_ipi(c, c->gpr[RBX] & mask, c->gpr[RCX] & mask, c->gpr[RDX] & mask, c->gpr[RSI] & mask);
    c->gpr[RAX] = result & mask;
    return redirect(c, arg);
}

/* ---- model-specific registers ---- */

enum {
    MSR_TSC = 0x10, MSR_APIC_BASE = 0x1b, MSR_SYSENTER_CS = 0x174, MSR_SYSENTER_ESP, MSR_SYSENTER_EIP, MSR_TSC_DEADLINE = 0x6e0
};
#define MSR_EFER 0xc0000080u

/* Where a plain MSR is kept: its address, and whether the value must be canonical. */
static u64 *plain_msr(struct cpu *c, u32 msr, int *must_be_canonical)
{
    *must_be_canonical = 0;
    switch (msr) {
    case MSR_SYSENTER_CS: return &c->sysenter_cs;
    case MSR_SYSENTER_ESP: *must_be_canonical = 1; return &c->sysenter_esp;
    case MSR_SYSENTER_EIP: *must_be_canonical = 1; return &c->sysenter_eip;
    case 0xc0000081: return &c->star;
    case 0xc0000082: *must_be_canonical = 1; return &c->lstar;
    case 0xc0000083: *must_be_canonical = 1; return &c->cstar;
    case 0xc0000084: return &c->sfmask;
    case 0xc0000100: *must_be_canonical = 1; return &c->fsbase;
    case 0xc0000101: *must_be_canonical = 1; return &c->gsbase;
    case 0xc0000102: *must_be_canonical = 1; return &c->kernel_gs_base;
    case 0xc0000103: return &c->tsc_aux;
    default: return 0;
    }
}

static int apic_register(const struct cpu *c, u32 msr)
{
    return c->vm->has_lapic && (msr == MSR_APIC_BASE || msr == MSR_TSC_DEADLINE || (msr >= 0x800 && msr <= 0x8ff));
}

int h_rdmsr(struct cpu *c, u32 arg)
{
    u32 msr = (u32)c->gpr[RCX];
    u64 value, *plain;
    int unused;
    if (c->cpl)
        return raise_gp(c);
    if ((plain = plain_msr(c, msr, &unused)))
        value = *plain;
    else if (msr == MSR_TSC)
        value = rdtsc() + c->tsc_offset;
    else if (msr == MSR_EFER)
        value = c->efer;
    else if (apic_register(c, msr)) {
        if (apic_msr(c, msr, 0, &value))
            return raise_gp(c);
    } else
        return exit_to(c, R_MSR, ARG_LEN(arg));
    set_pair(c, value);
    return H_CONTINUE;
}

static int write_efer(struct cpu *c, u32 arg, u64 value)
{
    u64 changed = (value ^ c->efer) & ~(u64)EFER_LMA;
    if (value & ~(u64)EFER_BITS || (changed & EFER_LME && c->cr0 & CR0_PG))
        return raise_gp(c);
    c->efer = (value & ~(u64)EFER_LMA) | (c->efer & EFER_LMA);
    if (changed & EFER_NXE)
        tlb_flush(c, 1);
    update_mode(c);
    return redirect(c, arg);
}

int h_wrmsr(struct cpu *c, u32 arg)
{
    u32 msr = (u32)c->gpr[RCX];
    u64 value = (u32)c->gpr[RAX] | c->gpr[RDX] << 32, *plain;
    int need;
    if (c->cpl)
        return raise_gp(c);
    if ((plain = plain_msr(c, msr, &need))) {
        if (need && !canonical(value))
            return raise_gp(c);
        if ((msr == 0xc0000103 && value >> 32))
            return raise_gp(c);
        *plain = msr == 0xc0000084 || msr == MSR_SYSENTER_CS ? (u32)value : value;
        c->seg[FS].base = c->fsbase; /* two of them live there too */
        c->seg[GS].base = c->gsbase;
        c->segbase[FS] = (u32)c->fsbase;
        c->segbase[GS] = (u32)c->gsbase;
        return H_CONTINUE;
    }
    if (msr == MSR_TSC) {
        u64 offset = value - rdtsc();
        c->tsc_adjust += offset - c->tsc_offset;
        c->tsc_offset = offset;
        return H_CONTINUE;
    }
    if (msr == MSR_EFER)
        return write_efer(c, arg, value);
    if (apic_register(c, msr)) {
        int r = apic_msr(c, msr, 1, &value);
        if (r == EX_GP)
            return raise_gp(c);
        if (r == H_EXIT) /* R_EOI: the instruction is done */
            c->rip = next_rip(c, arg);
        return r == H_CONTINUE && c->poll ? redirect(c, arg) : r; /* an interrupt that it lets in comes right after it */
    }
    return exit_to(c, R_MSR, ARG_LEN(arg));
}
