/* The translator's native half: one vCPU's state and what its parts call of each other.
 *
 * Translated code runs with RSP at `struct cpu`, real stack below it. Everything here is built freestanding, uses general
 * registers only (guest x87/SSE/AVX state stays in the processor across helpers) and has no writable data of its own.
 */
#ifndef CARDCAGE_CPU_H
#define CARDCAGE_CPU_H

#if defined(__SSE__) || defined(__MMX__)
#error "vector registers are the guest's: native/build.py has the flags"
#endif

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef int s32;
typedef long s64;

#define offsetof __builtin_offsetof
#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

/* ---- architectural bits ---- */
enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI };
enum { ES, CS, SS, DS, FS, GS, LDTR, TR, NSEG };
enum {
    F_CF = 1, F_PF = 4, F_AF = 16, F_ZF = 64, F_SF = 128, F_TF = 0x100, F_IF = 0x200, F_DF = 0x400, F_OF = 0x800,
    F_IOPL = 0x3000, F_NT = 0x4000, F_RF = 0x10000, F_VM = 0x20000, F_AC = 0x40000, F_VIF = 0x80000, F_VIP = 0x100000,
    F_ID = 0x200000, F_ARITH = 0x8d5
};
enum { CR0_PE = 1, CR0_MP = 2, CR0_EM = 4, CR0_TS = 8, CR0_ET = 16, CR0_NE = 32, CR0_WP = 1 << 16, CR0_AM = 1 << 18 };
#define CR0_PG 0x80000000u
#define PHYS_BITS 40 /* MAXPHYADDR: CPUID 80000008 */
enum { CR4_VME = 1, CR4_PVI = 2, CR4_TSD = 4, CR4_DE = 8, CR4_PSE = 16, CR4_PAE = 32, CR4_PGE = 128, CR4_PCE = 256, CR4_OSFXSR = 512, CR4_OSXMMEXCPT = 1024, CR4_UMIP = 1 << 11,
       CR4_FSGSBASE = 1 << 16, CR4_OSXSAVE = 1 << 18, CR4_SMEP = 1 << 20, CR4_SMAP = 1 << 21, CR4_PKE = 1 << 22 };
enum { EFER_SCE = 1, EFER_LME = 1 << 8, EFER_LMA = 1 << 10, EFER_NXE = 1 << 11 };
enum { EX_DE = 0, EX_DB = 1, EX_NMI = 2, EX_BP = 3, EX_OF = 4, EX_BR = 5, EX_UD = 6, EX_NM = 7, EX_DF = 8, EX_TS = 10, EX_NP = 11,
       EX_SS = 12, EX_GP = 13, EX_PF = 14, EX_MF = 16, EX_AC = 17, EX_MC = 18, EX_XM = 19 };

/* A segment register with its hidden part; attr as in a descriptor's bits 40-47 and 52-55:
 * type 0-3, S 4, DPL 5-6, P 7, AVL 8, L 9, D/B 10, G 11; bit 12 = unusable (null). limit is in bytes, granularity applied. */
struct seg { u64 base; u32 limit; u16 sel, attr; };
#define SEG_UNUSABLE 0x1000
#define SEG_DPL(s) (((s).attr >> 5) & 3)

/* What of a segment may be accessed: *read* or *write* bytes from offset *low* on (0: none). */
struct limit { u64 low, read, write; };

/* What a block's code depends on besides its bytes and addresses: the block key. */
enum {
    MODE_CPL3 = 1,      /* user privilege: other TLB, other jump cache */
    MODE_64 = 2,        /* CS.L in long mode */
    MODE_32 = 4,        /* CS.D (neither: 16-bit) */
    MODE_SS32 = 8,      /* SS.B: stack pointer is 32 bits wide (ignored in 64-bit mode) */
    MODE_FLAT = 16,     /* ES CS SS DS: base 0, limit 4 GiB, usable and writable (always set in 64-bit mode) */
    MODE_NOFPU = 32,    /* CR0.TS or EM: x87/SSE raise #NM or #UD */
    MODE_NOSSE = 64,    /* CR4.OSFXSR clear: SSE raises #UD */
    MODE_STEP = 128,    /* blocks of one instruction, each begun by h_begin(): see debug.c */
    MODE_PE = 256,      /* protected mode and not virtual-8086 */
    MODE_LMA = 512,
    MODE_IOPL = 1024,   /* CPL <= IOPL: CLI, STI allowed; IN, OUT need no bitmap */
    MODE_NOAVX = 2048,  /* CR4.OSXSAVE clear or XCR0 lacks AVX */
    MODE_VM86 = 4096,
    MODE_AC = 8192,     /* CR0.AM and EFLAGS.AC at CPL 3: misaligned accesses raise #AC */
};

enum { SHADOW_STI = 1, SHADOW_SS = 2 };
/* cpu.debug: RFLAGS.RF; a trap is due for TF, for the T bit of a TSS; the instruction follows a MOV SS; data or I/O breakpoints that
 * were met, a bit each; those that a MOV SS met, which wait for the next instruction. */
enum { DEBUG_RF = 1, DEBUG_STEP = 2, DEBUG_TASK = 4, DEBUG_BEHIND_SS = 8, DEBUG_HIT = 16, DEBUG_HELD = 15 << 8,
       DEBUG_WATCHED = 1 << 12, DEBUG_HITS = 15 << 4 | DEBUG_WATCHED }; /* WATCHED: a point of the host's debugger */
/* cpu.armed: the breakpoints that DR7 enables, by what they are for. */
enum { ARMED_WATCH = 1 << 12, ARMED_DATA = 15 | ARMED_WATCH, ARMED_CODE = 15 << 4, ARMED_PORT = 15 << 8 };
/* What a debugger on the host has a vCPU stop at: struct point.kind; and cpu.stop, 0 while it is to go on. */
enum { POINT_EXECUTE = 1, POINT_WRITE = 2, POINT_READ = 4 };
enum { STOP_STEP = 1, STOP_POINT = 2 };

/* ---- why native code came back (cpu.reason) ---- */
enum {
    R_NONE,
    R_TRANSLATE,   /* no block for cpu.rip in this mode; info[0] = physical address of it */
    R_EMULATE,     /* the instruction at cpu.rip is Python's to do; info[0] = its length (0: not known) */
    R_MMIO_READ,   /* info[0] = address, info[1] = size, info[2] = linear address; value goes to cpu.bounce, then enter again */
    R_MMIO_WRITE,  /* info[0] = address, info[1] = size, info[2] = value; then enter again */
    R_SLOW_WRITE,  /* the instruction at cpu.rip writes where its operand crosses pages, is MMIO or code: single it; info[0] = linear address, info[1] = size */
    R_POLL,        /* a kick */
    R_HALTED,      /* HLT with no local APIC; cpu.rip is past it */
    R_SHUTDOWN,    /* triple fault; registers are those before the last exception; info[0] = the vector that failed first */
    R_EXTINT,      /* ExtINT can be taken: acknowledge, then deliver_interrupt() */
    R_EOI,         /* EOI of a level vector: info[0]; then enter again */
    R_SIGNAL,      /* host signal in translated code that no guest can cause: info[0] = signal, info[1] = host address, info[2] = trap number */
    R_SINGLE,      /* the end of a single (see R_SLOW_WRITE) */
    R_INIT,        /* an INIT was received; Python resets this vCPU and it waits for SIPI */
    R_SIPI,        /* start at info[0] << 12 */
    R_STOPPED,     /* machine asks vCPU threads to come back (close) */
    R_MSR,         /* RDMSR/WRMSR is Python's: as R_EMULATE */
    R_RESTART,     /* the code that cpu.resume led to is gone: make it again, then enter again */
    R_DEBUG,       /* a debugger's stop: cpu.stop, and cpu.stopped_at, the number of the point */
    R_DEVICE,      /* a helper's access is a device's: do cpu.device.log[count], count it, then tcg_helper_again() */
};

/* What cpu.resume leads to: behind a store or EOI that is done; behind a load, whose value is in `bounce`; a one-off block. */
enum { RESUME_AFTER, RESUME_LOAD, RESUME_SINGLE, RESUME_AGAIN };

/* What a helper answers to the code that called it. */
enum { H_CONTINUE = 0, H_REDIRECT = 1, H_EXIT = 2, H_SINGLE = 3 /* native_abort's: go on at the single in scratch[0] */ };

#define TLB_BITS 12
#define TLB_SIZE (1 << TLB_BITS)
#define JC_BITS 17        /* of which supervisor code uses fewer: kernels chain nearly all that they jump to */
#define JC_SUPERVISOR 14
#define JC_LOW 2          /* entry of a RIP: its bits from this one on, which are sparse, mixed with those from JC_SHIFT on, so that a small */
#define JC_SHIFT 9        /* program's lie in few pages of the table; emit_indirect() does the same */
#define JC_SIZE (1 << JC_BITS)
#define JC_PAGE (4096 >> JC_LOW) /* entries of a page's code: all that differ from one of its in the low bits alone */
#define XTLB_SIZE 256

struct tlb_entry { u64 tag, add; };   /* tag = linear page; host address = (linear ^ tag) + add, add = host page */
/* local: entries that a CR3 load drops (not global); large: those of pages of 2 MiB and more, perhaps of others too;
 * user: those of user pages in a supervisor's table; keyed: those of user pages with another protection key than 0; filled: all that
 * may be for something; large_in: in which GiB the large ones are, a bit each by seen_in() */
struct tlb {
    struct tlb_entry e[TLB_SIZE];
    u64 local[TLB_SIZE / 64], large[TLB_SIZE / 64], user[TLB_SIZE / 64], keyed[TLB_SIZE / 64], filled[TLB_SIZE / 64], large_in;
};
/* The entries of a write table by a hash of their host page: lists whose links are an index + 1, 0 at the end; the first one's `before` is
 * TLB_SIZE + 1 + the list. An entry stays in its list until it is filled again, whatever has become of it. */
struct tlb_lists { u16 head[TLB_SIZE], after[TLB_SIZE], before[TLB_SIZE]; };
struct jump { u64 pc, code; };
struct xtlb_entry { u64 tag, phys; };

enum { H_LAPIC_X2 = 2, H_LAPIC_DEADLINE = 4 };
#define LEAVES 64
#define MAX_CPUS 64
#define MAX_SLOTS 64
#define MAX_CROSS 0x20000

struct lapic {
    u32 regs[256];        /* by offset >> 2 of the 4 KiB page's 16-byte slots: regs[(off >> 4) * 4] layout is NOT used; regs[off >> 4] */
    u32 irr[8], isr[8], tmr[8];   /* changed with atomics: other vCPUs and devices post here */
    u32 id, x2, enabled;          /* x2: x2APIC mode; enabled: APIC base MSR bit 11 */
    u64 timer_start, timer_period; /* host nanoseconds (CLOCK_MONOTONIC) */
    u64 tsc_deadline;             /* guest TSC value, 0 = disarmed */
    u32 nmi, init, sipi;          /* pending; sipi = vector | 0x100 */
    u32 esr;                      /* errors since the last write of the ESR */
    u64 timer_next;               /* host ns of the next expiry, ~0 or 0: none; read without the lock */
    u32 timer_lock;               /* for the timer's fields, its mode and its request: the ticker's thread expires it in one step */
};

struct vm;

/* A helper that meets a device leaves with R_DEVICE and is called again from its beginning, as often as it has accesses: those that
 * were made are in the log. So a helper changes no register before its last access. changed: how often it did not make them again. */
#define MAX_DEVICE 80 /* more than ENTER makes, or a call gate */
struct device_access { u64 linear, value; u32 size, write; };
struct device { u32 on, arg, count, at, changed, pad; struct device_access log[MAX_DEVICE]; };

struct cpu {
    u64 near[4];          /* host addresses that accesses of one block share: see share() */
    u64 base;             /* linear page of the block that runs, where blocks do not hold their own: see floats() */
    u64 gpr[16];          /* guest r9, r10, r11 live here while native code runs */
    u64 rip;              /* EIP/RIP (an offset in CS) */
    u64 fl;               /* guest arithmetic flags: LAHF image in bits 8-15, OF in bit 0 */
    u32 poll;             /* non-zero: leave translated code at the next poll */
    u32 irq_pending;      /* something is pending that IF=0 holds back: STI, POPF, IRET copy it to poll */
    u64 eflags;           /* the other flags: TF IF DF IOPL NT RF VM AC VIF VIP ID, and bit 1; never arithmetic ones */
    u64 resume;           /* host address to go on at after R_MMIO_*, R_EOI, or of a one-off block; 0: look cpu.rip up */
    u64 resume_generation; /* vm.generation that `resume` belongs to: in another one there is other code */
    u64 next_rip;         /* where a RESUME_AFTER goes on then */
    u64 bounce_ptr;       /* where RSI points when resumed */
    u64 scratch[4];
    u64 host_rsp;
    u32 host_mxcsr, guest_xcr0;
    u32 reason, mode;
    u64 info[4];
    u64 fsbase, gsbase;   /* copies of seg[FS].base, seg[GS].base at a fixed place: kept equal */
    u64 stubs[16];        /* addresses that translated code calls through: see STUB_* */
    struct seg seg[NSEG];
    u64 segbase[6];       /* seg[i].base truncated to 32 bits, for 16- and 32-bit code */
    struct limit limits[6];
    struct { u64 base; u32 limit, pad; } gdt, idt;
    u64 cr0, cr2, cr3, cr4, cr8, efer, dr[8];
    u64 pdpte[4];         /* PAE paging: loaded with CR3 */
    u64 star, lstar, cstar, sfmask, kernel_gs_base, sysenter_cs, sysenter_esp, sysenter_eip, tsc_aux, apic_base;
    u64 tsc_offset;       /* guest TSC = host TSC + tsc_offset */
    u64 tsc_adjust;       /* what WRMSR has added to it (SDM vol. 3, 18.17.3) */
    u32 cpl, index;
    u32 shadow;           /* SHADOW_*: interrupts blocked until the next instruction is done */
    u32 nmi_blocked;
    u32 resume_kind;      /* RESUME_* */
    u32 halted, startup;  /* startup: 0 running, 1 wait for SIPI */
    u32 in_native;        /* guest code or a helper may be running: see stop_world */
    u32 wake;             /* futex: HLT sleeps on it */
    u32 kicked;
    u32 extint;           /* level of the 8259's INTR */
    u32 code_hit, pending_size;
    u64 pending;          /* what a device answered at this address waits in `bounce` for RESUME_AGAIN; pending_size 0: nothing does */
    u32 sleeping, abort_kind;  /* in HLT: 1 by its futex, 2 by irq_wait; what native_abort is to do */
    u32 debug;            /* DEBUG_*: RF, and what traps when the present instruction is done */
    u32 armed, once;      /* ARMED_*; the next instruction runs in MODE_STEP */
    u32 stepping, stop;   /* a debugger's: stop when the next instruction is done; STOP_* */
    u32 pointed, stopped_at; /* the page being run has POINT_EXECUTE; the number of the point that was met */
    u64 began;            /* RIP of the step that began last */
    u32 still;            /* futex: its thread is out of native code between two instructions, and goes in by way of tcg_hold's caller */
    u32 pauses;           /* how many PAUSEs it has done */
    u32 made;             /* its caches are what they should be when they are empty: see tcg_reset() */
    u32 shutdown;         /* 1 + the vector that ended in a triple fault: R_SHUTDOWN until the state is set */
    u64 cr4_allowed;      /* bits CPUID shows; 0: a default without SMAP */
    u32 pkru, smap_open;  /* smap_open: a supervisor's TLB may have entries of user pages, which go when RFLAGS.AC is cleared */
    struct vm *vm;
    u64 seen;             /* u16 []: see seen_at() */
    u64 write_ptr;        /* where a single writes (see R_SLOW_WRITE): a buffer, or its operand itself, in RAM that holds code */
    u64 single_phys, single_size;  /* that operand; size 0: it is a buffer, and Python writes back */
    u64 split[2], split_phys[2]; /* or one that lies across two pages of RAM: host addresses of both parts, and their physical ones, ~0 where no code is */
    u32 split_first, split_size; /* bytes in the first page, and in all; split_size 0: it is none */
    u32 plain, dropped;   /* the next block is to be one of KEY_PLAIN; a translation was dropped since resume_at() */
    u64 rmw;              /* 1 | physical page that a read-modify-write was let into beside code: see install() */
    struct device device;
    struct { u64 key; u32 leaf, sub, value[4]; } leaves[LEAVES]; /* what CPUID answered; key 0: nothing */
    struct lapic lapic;
    u8 fx[4096] __attribute__((aligned(64)));      /* XSAVE area of the guest while Python runs */
    u8 bounce[8192] __attribute__((aligned(64)));
    struct tlb tlb_r[2], tlb_w[2];                 /* [supervisor, user] */
    struct tlb_lists tlb_pages[2];                 /* tlb_w's */
    u64 code_in[2];       /* in which 2 MiB xtlb or the jump cache have something, a bit each by seen_in() */
    u32 jc_mode[2];
    u64 jc_base[2];
    u32 jc_local[2];      /* the jump cache may hold what a CR3 load drops */
    u64 jc_used[2][JC_SIZE / 64];  /* entries that may be for something */
    u64 jc_some[2][JC_SIZE / 4096]; /* words of jc_used that may have some */
    u64 code_large[2];    /* in which 2 MiB code came from large pages; and between which, so that a program's pages are not taken for a kernel's */
    u64 large_first[2], large_last[2];
    u64 code_huge[2];     /* in which GiB it came from pages of that size */
    struct jump jc[2][JC_SIZE];
    struct xtlb_entry xtlb[2][XTLB_SIZE];
};

enum { STUB_READ_K, STUB_READ_U, STUB_WRITE_K, STUB_WRITE_U, STUB_STORE_K, STUB_STORE_U, STUB_CHAIN, STUB_JUMP, STUB_HELPER, STUB_POLL,
       STUB_LIMIT, STUB_SHARE_READ_K, STUB_SHARE_READ_U, STUB_SHARE_WRITE_K, STUB_SHARE_WRITE_U };

/* Guest-physical memory, as the accelerator's slots. */
/* code: which 64-byte pieces hold translated code; first: list of `count` blocks (struct block *) */
struct page { u64 code, first, count; };
struct slot { u64 gpa, size, host; struct page *pages; u32 readonly, used; };

/* Sorted by pio, then address. size 0: any; match: only this value. */
struct bell { u64 address, value; s32 fd; u32 size, pio, match; };
struct bells { u64 count; struct bell bell[]; };
struct point { u64 linear, size; u32 kind, pad; };
struct points { u64 count, watches; struct point point[]; }; /* a debugger's; watches: how many are of data */
struct watched { u64 count, page[]; };  /* sorted pages that hold used rings */
struct route { u64 address; u32 data; s32 fd; u32 used, generation; };
/* A split virtqueue that another process serves; seen: the used index up to which its writes are known; size 0: none. */
struct ring { u64 table, used, avail, heads; u32 size, seen, made, pad; }; /* heads: u8 [size], how often available less how often used */

/* host, size: RAM in this process; map: u8 a page, 1: in the log; base: bytes that a revert puts back. list: count host addresses of pages. */
struct dirty_area { u64 host, size, map, base; };
struct dirty_log { u64 areas, list, count; struct dirty_area area[]; };

struct block;
struct vm {
    struct slot slots[MAX_SLOTS];
    u32 nslots, ncpus;
    u32 stopping, lock;            /* futexes */
    u32 holding, holding_pad;      /* somebody waits until all vCPUs are still */
    u32 crossed, closing;          /* how many chains join two pages */
    u32 ticker_seq, has_lapic;     /* has_lapic: 0, or 1 and H_LAPIC_* for what CPUID shows of it */
    u64 code_rx, code_rw, code_size, code_used;
    u64 generation;                /* how often all code was forgotten: an address into the buffer is good for one generation */
    u64 chunks;                    /* struct chunk []: see internal.h; code_used counts whole ones */
    u64 hash_key[4];               /* random odd numbers: a guest cannot aim at one chain */
    u64 *hash;                     /* struct block * heads */
    u64 hash_mask;
    u64 ticker_deadline;           /* host ns the ticker thread sleeps until */
    u64 tsc_khz;
    u64 apic_bus_hz;               /* LAPIC timer clock, 1000000000 */
    struct cpu *cpus[MAX_CPUS];
    u64 stat[16];
    u64 store;                     /* struct store: templates */
    u64 cross;                     /* struct site *[MAX_CROSS]: those chains */
    u64 cross_pages[16];           /* bits by 2 MiB: where they may lead to; and from which on, up to which */
    u64 cross_first, cross_end;
    u64 block_limit;               /* the most instructions in a block */
    u64 bells, watched;            /* struct bells *, watched *, 0 without any: replaced whole */
    u64 routes, rings;             /* struct route *, ring *: see eventfds.c */
    u32 nrings;
    u32 irq_lock, ring_lock;       /* of routes; of rings[].seen */
    s32 irq_epoll, idle_fd;        /* idle_fd: -1 without irqfds; see irq_wait */
    u32 idler;                     /* a vCPU is in irq_wait */
    u32 stopper;                   /* futex: somebody has stopped the world */
    u64 dirty;                     /* struct dirty_log *, 0 without one */
    u64 points;                    /* struct points *, 0 without any: replaced while the world is stopped */
};

/* ---- mmu.c ---- */
enum { ACC_READ = 0, ACC_WRITE = 1, ACC_EXEC = 2, ACC_BOTH = 3 }; /* BOTH: what debug_*() take for a read-modify-write */
/* Translate a linear address; 0 or the exception: then cpu->cr2 and cpu->scratch[3] (error code) are set. */
enum { PAGE_LARGE = 2, PAGE_USER = 4, PAGE_KEYED = 8, PAGE_MARKED = 16, PAGE_HUGE = 32 };  /* in *writable, beside 1: 2 MiB or more; a user page; its protection key is not 0; both are to be noted; 1 GiB */
/* Of an access (*user*): AS_USER with user rights, else the supervisor's. AS_SYSTEM: what the processor reads and writes by itself (descriptor
 * tables, TSS), which RFLAGS.AC does not let through SMAP. AS_SYSTEM, AS_WIDE (stacks that gates switch to): see linear_after(). */
enum { AS_USER = 1, AS_SYSTEM = 2, AS_WIDE = 4 };
int walk(struct cpu *c, u64 linear, int access, int user, u64 *phys, u32 *global, u32 *writable);
/* Linear memory. 0, or a vector with its error code in scratch[3], or -1: not all of it is RAM. */
int vread(struct cpu *c, u64 linear, void *to, u32 size, int user);
int vwrite(struct cpu *c, u64 linear, const void *from, u32 size, int user);
void *phys_host(struct vm *vm, u64 gpa, struct slot **slot);   /* 0: not RAM */
void tlb_flush(struct cpu *c, int global);                     /* global 0: CR3 load */
void tlb_flush_page(struct cpu *c, u64 linear);
void jc_flush(struct cpu *c);
void smap_close(struct cpu *c);         /* RFLAGS.AC is clear again: drop what only AC let in */
void set_pkru(struct cpu *c, u32 value);
void tlb_unwrite_all(struct cpu *c);    /* no page is written but by way of the MMU */
/* ---- dirty.c ---- */
void note_written(struct vm *vm, u64 host);
static inline void mark_dirty(struct vm *vm, const void *host)  /* a page is about to be written, or was */
{
    if (unlikely(vm->dirty))
        note_written(vm, (u64)host);
}
/* ---- blocks.c ---- */
void code_written(struct vm *vm, struct slot *s, u64 gpa, u32 size);  /* guest or host wrote RAM that may hold code */
/* ---- eventfds.c ---- */
int ring_bell(struct vm *vm, u32 pio, u64 address, u32 size, u64 value);
int irq_wait(struct cpu *c, u32 seq, const void *timeout);
int is_watched(const struct vm *vm, u64 gpa);
void watched_read(struct vm *vm, u64 gpa);                     /* after the bytes were copied */
/* ---- sys.c ---- */
/* Set the pending exception; the caller returns H_REDIRECT or H_EXIT as raise() says. cpu->rip must be the instruction's address (fault)
 * or the next one (trap). Delivers at once, including #DF and shutdown. */
int raise(struct cpu *c, u32 vector, u32 has_error, u32 error);
int deliver(struct cpu *c, u32 vector, u32 has_error, u32 error, u32 soft);   /* soft: 1 = INT n, INT3, INTO: DPL is checked */
void update_mode(struct cpu *c);        /* recompute cpu->mode, cpl, segbase, fsbase/gsbase copies */
u64 get_eflags(struct cpu *c);          /* whole RFLAGS */
void set_eflags(struct cpu *c, u64 value);  /* whole; IF going up copies irq_pending to poll */
int check_events(struct cpu *c);        /* at a poll: NMI, INIT, interrupts, kicks, stop requests: H_REDIRECT (go on at rip), H_EXIT */
/* ---- debug.c ---- */
int debug_trap(struct cpu *c);          /* between two instructions, cpu.debug not 0: the trap that is due, as H_* */
u32 debug_armed(const struct cpu *c);
/* With cpu.armed & ARMED_DATA: what data breakpoints an access meets, as a mask; the same, and they trap after the instruction;
 * whether a page has some, so that no soft TLB may have it. */
u32 debug_match(const struct cpu *c, u64 linear, u64 size, int write);
u32 debug_access(struct cpu *c, u64 linear, u64 size, int write);
int debug_page(const struct cpu *c, u64 linear, int write);
int points_on_page(const struct vm *vm, u64 linear);
/* ---- apic.c ---- */
int apic_read(struct cpu *c, u32 offset, u32 *value);          /* offset in the page; 0 = ok */
int apic_write(struct cpu *c, u32 offset, u32 value);          /* H_CONTINUE, or H_EXIT with R_EOI */
int apic_msr(struct cpu *c, u32 msr, int write, u64 *value);   /* x2APIC MSRs 0x800-0x8ff, 0x6e0 deadline: 0 ok, else EX_GP; H_EXIT for EOI */
int apic_pending(struct cpu *c);        /* highest deliverable vector above PPR, or -1 (IRR against ISR, TPR) */
int apic_accept(struct cpu *c);         /* move it from IRR to ISR; vector */
void apic_post(struct cpu *target, u32 vector, u32 level);     /* from any thread: IRR, TMR, wake or poll */
void apic_message(struct vm *vm, u64 address, u32 data);       /* MSI, any thread */
void apic_reset(struct cpu *c);
u64 apic_pv_ipi(struct cpu *c, u64 low, u64 high, u64 first, u64 icr);  /* KVM_HC_SEND_IPI: how many got it, or an error */
int apic_extint_enabled(struct cpu *c); /* LINT0 is ExtINT and unmasked (or the APIC is disabled) */
u64 apic_next_deadline(struct cpu *c);  /* host ns, ~0 if none */
void apic_timer_expire(struct cpu *c, u64 now);
/* ---- world.c ---- */
u64 now_ns(void);
u64 rdtsc(void);
long sys_futex(u32 *word, int op, u32 value, const void *timeout);
void ticker_kick(struct vm *vm, u64 deadline);  /* a timer was armed for host ns `deadline` */
void wake_idler(struct vm *vm);
void wake_cpu(struct cpu *c);           /* poll = 1, and out of HLT */
void world_enter(struct cpu *c);        /* in_native = 1, waiting while the world is stopped */
void world_leave(struct cpu *c);
void spin_lock(u32 *lock);
void spin_unlock(u32 *lock);

#endif
