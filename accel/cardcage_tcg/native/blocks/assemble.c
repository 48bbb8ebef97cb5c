/* Guest code to a block: templates that Python made, one for each distinct instruction, are looked up by the
 * instruction's bytes and joined. Which flags live, where they are saved, polls and chains are decided here.
 *
 * What an instruction is, and how long, its head says: prefixes, opcode, ModRM, SIB. So templates are kept by heads (shapes), and
 * displacement and immediate are copied from the instruction into the template's code. Where that does not do (a shift by an
 * immediate count, say), the shape is marked exact, and its templates are kept by all bytes. */
#include "cpu.h"
#include "internal.h"
#include "helpers.h"

#define MAX_BODY 66
#define MAX_SIDES 4
#define MAX_SLOW 288 /* accesses of a block's body; with those of its last instruction and its end they are fewer than MAX_SLOW + 32 */
#define ROOM 12288
#define COLD_AT (ROOM + 4096) /* where the cold part begins while both are one: in between lies what the last instruction and the end take */
#define MOST_CODE (15 * MAX_BODY) /* bytes of the longest block */

/* Accesses of a block whose addresses are one register's value, or two registers' sum, and a displacement. The first of them looks up the page
 * for all, which lie within bytes *low* to *high* (of the base's value when the block began, where that is the stack pointer). What it
 * finds stays in cpu.near[slot]. */
enum { SLOTS = 4, MAX_GROUPS = 24, MAX_NEAR = 2, SPAN = 120, ALONE = 0xff };
struct group { u8 base, index, scale, write, slot, open, item; u32 members, last; s32 low, high; };

struct out {
    u8 code[2 * COLD_AT];
    u32 used, stored;   /* stored: guest flags are in cpu.fl, and the host's may be junk */
    struct code to;     /* what becomes of it */
    u32 payloads, chains, misses;
    struct { u32 at, guest; } payload[2 * MAX_BODY + 4];
    struct { u32 field; s64 target; u32 saved, plain; } chain[4 + MAX_SIDES + SLOTS * 4]; /* saved: cpu.fl has the flags too */
    struct { u32 branch, resume, item; const struct taccess *access; struct group *group; u32 saved; } slow[MAX_SLOW + 32];
    u32 slows, groups;
    struct group group[MAX_GROUPS];
    u8 shares[MAX_BODY + 1][MAX_NEAR]; /* the group of an instruction's access */
    short moved[MAX_BODY + 1];         /* how far the stack pointer has moved before it */
    u32 miss[8], spent; /* spent: how far the indirect branch moved the stack pointer */
    u32 page;           /* offset of the block's start in its page */
    struct { u32 branch, guest; } poll[2];
    u32 polls;
};

struct plan {
    const struct tmpl *t[MAX_BODY];
    u16 at[MAX_BODY];   /* guest offsets */
    u8 before[MAX_BODY], after[MAX_BODY]; /* flags that live */
    u8 length[MAX_BODY];
    u32 count, next;    /* bytes up to where the body ends */
    const struct tmpl *end;
    s64 relative;       /* the end's target - its own RIP */
    struct tmpl branch; /* a direct jump, which needs no template */
    u32 sides;
    struct { u8 condition, item; s64 relative; } side[MAX_SIDES]; /* conditional jumps ahead, behind which the block goes on */
};

/* Such a jump among the instructions: what is behind it is not known, so that all flags live. */
static const struct tmpl side_jump = { .kind = K_JCC, .reads = ALL_FLAGS, .payload = 0xffff };

static u32 hash_raw(u32 key, const u8 *raw, u32 length)
{
    u32 h = key * 0x9e3779b1u ^ length * 0x85ebca6bu;
    for (u32 i = 0; i < length; i++)
        h = (h ^ raw[i]) * 0x01000193u;
    return h ^ h >> 15;
}

static const struct tmpl *at_offset(const struct store *s, u32 offset) { return (const struct tmpl *)((u64)s + offset); }
static const struct taccess *accesses_of(const struct tmpl *t) { return (const struct taccess *)(t + 1); }
static const u8 *code_of(const struct tmpl *t) { return (const u8 *)(accesses_of(t) + t->accesses); }

static const struct tmpl *find_template(const struct store *s, u32 key, const u8 *raw, u32 length)
{
    u32 at = __atomic_load_n(&s->heads[hash_raw(key, raw, length) & (HEADS_MAX - 1)], __ATOMIC_ACQUIRE);
    while (at) {
        const struct tmpl *t = at_offset(s, at);
        if (t->key == key && t->raw_length == length) {
            const u8 *known = t->raw;
            u32 j = 0;
            while (j < length && known[j] == raw[j])
                j++;
            if (j == length)
                return t;
        }
        at = t->next;
    }
    return 0;
}

/* Length of an instruction's head (Intel SDM vol. 2, 2.1): legacy prefixes, REX or VEX, opcode, ModRM, SIB. 0: more than room. */
static u32 head_length(const u8 *raw, u32 room, u32 mode)
{
    /* opcodes with a ModRM byte, of the one-byte map and of 0F */
    static const u32 modrm[8] = { 0x0f0f0f0f, 0x0f0f0f0f, 0, 0x00000a0c, 0x0000ffff, 0, 0xff0f00f3, 0xc0c00000 };
    static const u32 plain_0f[8] = { 0x00004be0, 0x00ff0000, 0, 0x00800000, 0x0000ffff, 0x00000707, 0x0000ff00, 0 };
    u32 i = 0, op, narrow = !(mode & (MODE_64 | MODE_32));
    for (;; i++) {
        if (i >= room || i >= 14)
            return 0;
        op = raw[i];
        if (op == 0x67)
            narrow = mode & MODE_64 ? 0 : !(mode & (MODE_64 | MODE_32)) ? 0 : 1;
        else if (op != 0x66 && op != 0xf2 && op != 0xf3 && op != 0xf0 && (op & 0xe7) != 0x26 && (op & 0xfe) != 0x64 &&
                 !(mode & MODE_64 && (op & 0xf0) == 0x40)) /* a REX before another prefix does nothing */
            break;
    }
    i++;
    u32 has = 1, vex = 0;
    if (op == 0xc5 || op == 0xc4) {
        if (i >= room)
            return 0;
        vex = mode & MODE_64 || raw[i] >= 0xc0;
    }
    if (vex) {
        i += op == 0xc5 ? 2 : 3;
        has = i > room || op == 0xc4 || raw[i - 1] != 0x77; /* VZEROUPPER, VZEROALL */
    } else if (op == 0x62 && mode & MODE_64) {
        i += 4;
    } else if (op == 0x0f) {
        if (i >= room)
            return 0;
        op = raw[i++];
        if (op == 0x38 || op == 0x3a)
            i++;
        else
            has = !(plain_0f[op >> 5] >> (op & 31) & 1);
    } else {
        has = modrm[op >> 5] >> (op & 31) & 1;
    }
    if (!has)
        return i <= room ? i : 0;
    if (i >= room)
        return 0;
    u32 registers = !vex && i >= 2 && raw[i - 2] == 0x0f && (raw[i - 1] & 0xfc) == 0x20; /* MOV CRn, DRn: no memory form */
    op = raw[i++];
    if (!narrow && !registers && op < 0xc0 && (op & 7) == 4)
        i++;
    return i <= room ? i : 0;
}

/* The template of the instruction at raw, 0 when there is none yet. *truncated: it may reach past `room`. */
static const struct tmpl *resolve(const struct store *s, u32 key, const u8 *raw, u32 room, u32 *truncated)
{
    *truncated = 0;
    u32 head = head_length(raw, room, key);
    if (!head) {
        *truncated = room < 15;
        /* nothing but prefixes up to the longest length: kept by all bytes */
        return room < 15 ? 0 : find_template(s, key | KEY_EXACT, raw, 15);
    }
    const struct tmpl *t = find_template(s, key, raw, head);
    if (!t) {
        *truncated = room < 15;
        return 0;
    }
    if (t->length > room) {
        *truncated = 1;
        return 0;
    }
    return t->flags & T_EXACT ? find_template(s, key | KEY_EXACT, raw, t->length) : t;
}

/* Direct jumps and calls without prefixes, in 32- and 64-bit mode: no two have the same bytes, so none is remembered.
 * Calls share one template, kept under the opcode alone with a key of its own. */
static int direct_branch(const struct store *s, struct plan *p, u32 key, const u8 *raw, u32 room, u32 at)
{
    struct tmpl *t = &p->branch;
    u32 length = 0;
    p->end = t;
    if ((raw[0] & 0xf0) == 0x70 || raw[0] == 0xeb) {
        if (room < 2)
            return 0;
        length = 2;
        p->relative = (signed char)raw[1] + 2;
        t->kind = raw[0] == 0xeb ? K_JMP : K_JCC;
        t->aux = raw[0] & 15;
    } else if (room >= 6 && raw[0] == 0x0f && (raw[1] & 0xf0) == 0x80) {
        length = 6;
        p->relative = (s64)*(const s32 *)(raw + 2) + 6;
        t->kind = K_JCC;
        t->aux = raw[1] & 15;
    } else if (room >= 5 && (raw[0] == 0xe9 || raw[0] == 0xe8)) {
        length = 5;
        p->relative = (s64)*(const s32 *)(raw + 1) + 5;
        t->kind = K_JMP;
        if (raw[0] == 0xe8 && !(p->end = find_template(s, key | KEY_CALL, raw, 1)))
            return 0;
    } else {
        return 0;
    }
    t->length = (u8)length;
    t->accesses = t->flags = 0;
    p->at[p->count] = (u16)at;
    p->length[p->count] = (u8)length;
    p->next = at + length;
    return 1;
}

static void put(struct out *o, const u8 *bytes, u32 n)
{
    memcpy(o->code + o->used, bytes, n);
    o->used += n;
}

static void put32(struct out *o, u32 v)
{
    *(u32 *)(o->code + o->used) = v;
    o->used += 4;
}

static void save(struct out *o, const struct store *s)
{
    if (!o->stored)
        put(o, s->save, s->save_length);
    o->stored = 1;
}

static void restore(struct out *o, const struct store *s)
{
    if (o->stored)
        put(o, s->load, s->load_length);
    o->stored = 0;
}

/* Have the jump with this rel32 lead to offset *to*; one between both parts depends on where they come to lie. */
static void patch(struct out *o, u32 field, u32 to)
{
    *(s32 *)(o->code + field) = (s32)(to - field - 4);
    if ((field < COLD_AT) != (to < COLD_AT))
        o->to.fix[o->to.fixes++] = field < COLD_AT ? field : (field - COLD_AT) | FIX_COLD;
}

/* Distance to what a stub looks for, its block's header or (from code that runs) code. */
static u32 from_start(u32 at) { return at < COLD_AT ? at : (u32)sizeof(struct block) + at - COLD_AT; }

static void begin(struct out *o)
{
    o->used = o->stored = o->payloads = o->chains = o->misses = o->polls = o->spent = o->to.fixes = o->to.jumps = o->slows = o->groups = 0;
}

/* The code that runs is complete: what follows is cold. */
static void begin_cold(struct out *o, struct block *b)
{
    b->code_length = o->used;
    o->used = COLD_AT;
}

static void end_cold(struct out *o, struct block *b)
{
    for (u32 i = 0; i < o->payloads; i++) /* a stub's return address is where the NOP begins */
        *(u32 *)(o->code + o->payload[i].at) = from_start(o->payload[i].at - 4) << 12 | o->payload[i].guest;
    b->cold_length = o->used - COLD_AT;
    o->to.hot = o->code, o->to.cold = o->code + COLD_AT;
}

static void call_stub(struct out *o, u32 stub)
{
    static const u8 call[] = { 0xff, 0x94, 0x24 };
    put(o, call, 3);
    put32(o, offsetof(struct cpu, stubs) + 8 * stub);
}

/* The NOP whose displacement tells a stub which instruction of which block called it. */
static void payload_nop(struct out *o, u32 guest)
{
    static const u8 nop[] = { 0x0f, 0x1f, 0x84, 0, 0, 0, 0, 0 };
    put(o, nop, 8);
    o->payload[o->payloads].at = o->used - 4;
    o->payload[o->payloads++].guest = guest;
}

static void emit_poll(struct out *o, u32 guest)
{
    static const u8 compare[] = { 0x83, 0xbc, 0x24 }, jne[] = { 0, 0x0f, 0x85, 0, 0, 0, 0 };
    put(o, compare, 3);
    put32(o, offsetof(struct cpu, poll));
    put(o, jne, 7);
    o->poll[o->polls].branch = o->used - 4;
    o->poll[o->polls++].guest = guest;
}

static void align(struct out *o, u32 before) /* a field that is patched while others run it lies in one aligned word */
{
    static const u8 nops[4][3] = { { 0 }, { 0x90 }, { 0x66, 0x90 }, { 0x0f, 0x1f, 0x00 } };
    u32 pad = -(o->used + before) % 4;
    put(o, nops[pad], pad);
}

static void note_chain(struct out *o, s64 target, u32 saved)
{
    o->chain[o->chains].field = o->used - 4;
    o->chain[o->chains].saved = saved;
    o->chain[o->chains].plain = 0;
    o->chain[o->chains++].target = target;
}

static void emit_chain(struct out *o, s64 target, u32 saved)
{
    static const u8 jmp[] = { 0xe9, 0, 0, 0, 0 };
    align(o, 1);
    put(o, jmp, 5);
    note_chain(o, target, saved);
}

static void emit_helper(struct out *o, u32 number, u32 length, u32 guest)
{
    static const u8 mov = 0xbf;
    put(o, &mov, 1);
    put32(o, number | length << 8);
    call_stub(o, STUB_HELPER);
    payload_nop(o, guest);
}

_Static_assert(offsetof(struct cpu, base) < 128, "in one byte");

static u32 jump_table(u32 mode) { return offsetof(struct cpu, jc) + (mode & MODE_CPL3 ? JC_SIZE * 16 : 0); }

static void emit_miss(struct out *o, const u8 *jump, u32 length) /* to where the jump cache misses */
{
    put(o, jump, length);
    o->miss[o->misses++] = o->used - 4;
}

static void emit_indirect(struct out *o, u32 mode)
{
    /* mov edi, esi; shr edi, JC_SHIFT; xor edi, esi; shl edi, 4 - JC_LOW; and edi, ... */
    static const u8 index[] = { 0x89, 0xf7, 0xc1, 0xef, JC_SHIFT, 0x31, 0xf7, 0xc1, 0xe7, 4 - JC_LOW, 0x81, 0xe7 }, compare[] = { 0x48, 0x3b, 0xb4, 0x3c },
                    always[] = { 0xe9, 0, 0, 0, 0 }, jne[] = { 0x0f, 0x85, 0, 0, 0, 0 }, jmp[] = { 0xff, 0xa4, 0x3c },
                    rebase[] = { 0x48, 0x81, 0xe6, 0, 0xf0, 0xff, 0xff, 0x48, 0x89, 0x74, 0x24, offsetof(struct cpu, base) }; /* and rsi, -4096; mov [base], rsi */
    if (mode & MODE_STEP) { /* to where traps are taken */
        emit_miss(o, always, 5);
        return;
    }
    put(o, index, sizeof index);
    put32(o, (jc_size(mode & MODE_CPL3) - 1) << 4);
    put(o, compare, 4);
    put32(o, jump_table(mode));
    emit_miss(o, jne, 6);
    if (floats(mode))
        put(o, rebase, sizeof rebase);
    put(o, jmp, 3);
    put32(o, jump_table(mode) + 8);
}

/* User mappings go with every context switch, so that no chain of theirs may leave its page: through the jump cache instead. */
static int leaves_user_page(const struct out *o, u32 mode, s64 target)
{
    return mode & MODE_CPL3 && ((s64)o->page + target) >> 12 != 0;
}

/* Through the jump cache to a target that is known, and with it the entry; or its distance from cpu.base. The guest's flags are in cpu.fl. */
static void emit_direct(struct out *o, u32 mode, u64 target)
{
    static const u8 wide[] = { 0x48, 0xbe }, near[] = { 0x48, 0xc7, 0xc6 }, add[] = { 0x48, 0x03, 0x74, 0x24, offsetof(struct cpu, base) }, narrow = 0xbe, compare[] = { 0x48, 0x3b, 0xb4, 0x24 }, jmp[] = { 0xff, 0xa4, 0x24 },
                    always[] = { 0xe9, 0, 0, 0, 0 }, jne[] = { 0x0f, 0x85, 0, 0, 0, 0 };
    if (floats(mode) && target == (u64)(s64)(s32)target) {
        put(o, near, 3);
        put32(o, (u32)target);
    } else if (mode & MODE_64) {
        put(o, wide, 2);
        *(u64 *)(o->code + o->used) = target;
        o->used += 8;
    } else {
        target = mode & MODE_32 ? (u32)target : (u16)target;
        put(o, &narrow, 1);
        put32(o, (u32)target);
    }
    if (floats(mode)) {
        put(o, add, sizeof add);
        emit_indirect(o, mode);
        return;
    }
    if (mode & MODE_STEP) {
        emit_miss(o, always, 5);
        return;
    }
    u32 entry = jump_table(mode) + (u32)sizeof(struct jump) * jc_index(target, mode & MODE_CPL3);
    put(o, compare, 4);
    put32(o, entry + offsetof(struct jump, pc));
    emit_miss(o, jne, 6);
    put(o, jmp, 3);
    put32(o, entry + offsetof(struct jump, code));
}

/* On to the code `target` bytes behind the block's start. */
static void emit_onward(struct out *o, const struct store *s, u32 mode, u64 pc, s64 target)
{
    if (leaves_user_page(o, mode, target)) {
        save(o, s);
        emit_direct(o, mode, pc + (u64)target);
    } else {
        u32 saved = o->stored;
        restore(o, s);
        emit_chain(o, target, saved);
    }
}

/* As emit_onward(), behind a conditional branch: the flags are in the host's, and in cpu.fl too if *saved*. */
static void emit_not_taken(struct out *o, const struct store *s, u32 mode, u64 pc, s64 target, u32 saved)
{
    o->stored = saved && leaves_user_page(o, mode, target);
    emit_onward(o, s, mode, pc, target);
}

static s32 field_value(const u8 *at, u32 size)
{
    return size == 1 ? (signed char)*at : size == 2 ? *(const short *)at : *(const s32 *)at;
}

static u32 tlb_of(u32 mode, int write)
{
    return (write ? offsetof(struct cpu, tlb_w) : offsetof(struct cpu, tlb_r)) + (mode & MODE_CPL3 ? (u32)sizeof(struct tlb) : 0);
}

static int is_write(const struct taccess *a) { return a->stub != STUB_READ_K && a->stub != STUB_READ_U; }

static s32 displacement(const struct taccess *a, const u8 *raw) { return a->disp_size ? field_value(raw + a->disp_field, a->disp_size) : a->disp; }

/* Where host code has a guest's register: in another one, or loaded into *scratch*. */
static u32 host_of(struct out *o, u32 guest, u32 scratch)
{
    if (guest == RSP || guest == RSI || guest == RDI)
        return guest == RSP ? 9 : guest == RSI ? 10 : 11;
    if (guest < 9 || guest > 11)
        return guest;
    const u8 load[] = { 0x48, 0x8b, (u8)(0x84 | scratch << 3), 0x24 }; /* mov scratch, [gpr] */
    put(o, load, 4);
    put32(o, offsetof(struct cpu, gpr) + 8 * guest);
    return scratch;
}

/* RSI = host address of a group's lowest byte, which is *disp* from its registers' sum; cpu.near[slot] has it then. Arithmetic flags go. */
static void emit_shared(struct out *o, struct group *g, u32 mode, u32 item, s32 disp, u32 kept)
{
    static const u8 index[] = { 0x89, 0xf7, 0xc1, 0xef, 0x08, 0x81, 0xe7 }, tag[] = { 0x48, 0x33, 0xb4, 0x3c }, compare[] = { 0x48, 0x81, 0xfe },
                    above[] = { 0x0f, 0x87, 0, 0, 0, 0 }, add[] = { 0x48, 0x03, 0xb4, 0x3c };
    u32 base = host_of(o, g->base, 6), second = g->index == 0xff ? 4 : host_of(o, g->index, 7); /* 4: none */
    u32 sib = g->index != 0xff || (base & 7) == 4, shift = g->scale == 8 ? 3 : g->scale == 4 ? 2 : g->scale == 2 ? 1 : 0;
    u32 wide = disp != (signed char)disp;
    const u8 lea[] = { (u8)(0x48 | base >> 3 | (second >> 3) << 1), 0x8d, (u8)((wide ? 0x80 : 0x40) | 6 << 3 | (sib ? 4 : base & 7)),
                       (u8)(shift << 6 | (second & 7) << 3 | (base & 7)) };
    put(o, lea, sib ? 4 : 3);
    if (wide)
        put32(o, (u32)disp);
    else
        o->code[o->used++] = (u8)disp;
    put(o, index, sizeof index);
    put32(o, (TLB_SIZE - 1) << 4);
    put(o, tag, 4);
    put32(o, tlb_of(mode, g->write));
    put(o, compare, 3);
    put32(o, 4096 - (u32)(g->high - g->low));
    put(o, above, 6);
    o->slow[o->slows].branch = o->used - 4;
    put(o, add, 4);
    put32(o, tlb_of(mode, g->write) + 8);
    o->slow[o->slows].resume = o->used;
    o->slow[o->slows].item = item;
    o->slow[o->slows].saved = kept;
    o->slow[o->slows++].group = g;
    const u8 keep[] = { 0x48, 0x89, 0x74, 0x24, (u8)(offsetof(struct cpu, near) + 8u * g->slot) }; /* mov [near], rsi */
    put(o, keep, 5);
}

/* A piece of a template's code, and where it was put. */
struct piece { u32 from, to, at; };

static void put_piece(struct out *o, const u8 *code, struct piece *pieces, u32 *count, u32 from, u32 to)
{
    pieces[(*count)++] = (struct piece){ from, to, o->used };
    put(o, code + from, to - from);
}

/* Where *size* bytes of a template are now; 0: they were left out. */
static u32 moved_to(const struct piece *pieces, u32 count, u32 offset, u32 size)
{
    for (u32 i = count; i--;)
        if (offset >= pieces[i].from && offset + size <= pieces[i].to)
            return pieces[i].at + offset - pieces[i].from;
    return 0;
}

/* A template's code, its holes filled; accesses of a group without their own look-up. */
static void place(struct out *o, const struct tmpl *t, u32 mode, u32 item, u64 ip, u32 guest, const u8 *raw, u32 kept)
{
    struct piece pieces[2 * MAX_NEAR + 1];
    const u8 *code = code_of(t);
    u32 count = 0, from = 0;
    for (u32 i = 0; i < t->accesses; i++) {
        const struct taccess *a = accesses_of(t) + i;
        if (i >= MAX_NEAR || o->shares[item][i] == ALONE)
            continue;
        struct group *g = &o->group[o->shares[item][i]];
        s32 disp = displacement(a, raw), there = disp + (g->base == RSP ? o->moved[item] : 0) - g->low;
        put_piece(o, code, pieces, &count, from, a->start);
        if (!g->open) { /* the first */
            g->open = 1;
            emit_shared(o, g, mode, item, disp - there, kept);
        } else {
            const u8 load[] = { 0x48, 0x8b, 0x74, 0x24, (u8)(offsetof(struct cpu, near) + 8u * g->slot) }; /* mov rsi, [near] */
            put(o, load, 5);
        }
        put_piece(o, code, pieces, &count, a->branch + 12u, a->operand);
        const u8 operand[] = { (u8)(code[a->operand] | (there ? 0x40 : 0)), (u8)there };
        put(o, operand, there ? 2 : 1);
        from = a->operand + 1u;
    }
    put_piece(o, code, pieces, &count, from, t->code_length);
    for (u32 i = 0; i < t->accesses; i++) {
        const struct taccess *a = accesses_of(t) + i;
        if (i < MAX_NEAR && o->shares[item][i] != ALONE)
            continue;
        o->slow[o->slows].branch = moved_to(pieces, count, a->branch, 4);
        o->slow[o->slows].resume = moved_to(pieces, count, a->resume, 0);
        o->slow[o->slows].item = item;
        o->slow[o->slows].access = a;
        o->slow[o->slows++].group = 0;
    }
    for (u32 i = 0; i < 2; i++) {
        u32 at = t->hole_size[i] ? moved_to(pieces, count, t->hole[i], t->hole_size[i]) : 0;
        u8 *hole = o->code + at;
        u64 value = ip + (u64)t->hole_relative[i];
        if (t->hole_size[i] == 8)
            *(u64 *)hole = value + (i == 0 && t->rip_field ? (u64)(s64)*(const s32 *)(raw + t->rip_field) : 0);
        else if (t->hole_size[i] == 4)
            *(u32 *)hole = (u32)value;
        else if (t->hole_size[i] == 2)
            *(u16 *)hole = (u16)value;
    }
    for (u32 i = 0; i < 2 && t->field_size[i]; i++) {
        u32 at = moved_to(pieces, count, t->field_code[i], t->field_size[i]);
        if (at)
            memcpy(o->code + at, raw + t->field_raw[i], t->field_size[i]);
    }
    if (t->payload != 0xffff) {
        o->payload[o->payloads].at = moved_to(pieces, count, t->payload, 4);
        o->payload[o->payloads++].guest = guest;
    }
    if (t->flags & T_STORED)
        o->stored = 1;
}

/* The group that an access may join: the newest that has its registers, as it is used or more, and room. */
static struct group *group_for(struct out *o, const struct taccess *a, s32 disp)
{
    for (u32 i = o->groups; i--;) {
        struct group *g = &o->group[i];
        s32 low = disp < g->low ? disp : g->low, high = disp + a->size > g->high ? disp + a->size : g->high;
        if (!g->open || g->base != a->base || g->index != a->index || g->scale != a->scale || (is_write(a) && !g->write) || high - low > SPAN)
            continue;
        g->low = low, g->high = high;
        return g;
    }
    if (o->groups == MAX_GROUPS)
        return 0;
    struct group *g = &o->group[o->groups++];
    *g = (struct group){ .base = a->base, .index = a->index, .scale = a->scale, .write = (u8)is_write(a), .open = 1, .low = disp,
                         .high = disp + a->size };
    return g;
}

/* Find the accesses that share a look-up. A group ends where one of its registers is written, and at each helper, which may change
 * translations; code that leaves for a device in its middle goes on only where none was dropped meanwhile (cpu.dropped). */
static void share(struct out *o, const struct plan *p, const u8 *data, int wanted)
{
    u32 count = p->count + (p->end && (p->end->kind == K_CALL || p->end->kind == K_INDIRECT));
    s32 moved = 0;
    for (u32 i = 0; i < count; i++) {
        const struct tmpl *t = i < p->count ? p->t[i] : p->end;
        o->moved[i] = (short)moved;
        for (u32 j = 0; j < MAX_NEAR; j++)
            o->shares[i][j] = ALONE;
        for (u32 j = 0; wanted && j < t->accesses && j < MAX_NEAR; j++) {
            const struct taccess *a = accesses_of(t) + j;
            if (a->base == 0xff || a->size > 32)
                continue;
            s64 disp = (s64)displacement(a, data + p->at[i]) + (a->base == RSP ? moved : 0);
            struct group *g = disp == (s32)disp && (s32)disp < 1 << 30 && (s32)disp > -(1 << 30) ? group_for(o, a, (s32)disp) : 0;
            if (!g)
                continue;
            if (!g->members++)
                g->item = (u8)i;
            g->last = i;
            o->shares[i][j] = (u8)(g - o->group);
        }
        for (u32 j = 0; j < o->groups; j++)
            if (t->payload != 0xffff || t->changes >> o->group[j].base & 1 || (o->group[j].index < 16 && t->changes >> o->group[j].index & 1))
                o->group[j].open = 0;
        moved += t->moves;
    }
    u32 until[SLOTS] = { 0 }, taken = 0;
    for (u32 j = 0; j < o->groups; j++) { /* they are in the order of their first accesses */
        struct group *g = &o->group[j];
        g->open = 0;
        g->slot = ALONE;
        for (u32 slot = 0; g->members > 1 && taken < 4 * SLOTS && slot < SLOTS && g->slot == ALONE; slot++)
            if (until[slot] <= g->item)
                g->slot = (u8)slot, until[slot] = g->last + 1, taken++;
    }
    for (u32 i = 0; i < count; i++)
        for (u32 j = 0; j < MAX_NEAR; j++)
            if (o->shares[i][j] != ALONE && o->group[o->shares[i][j]].slot == ALONE)
                o->shares[i][j] = ALONE;
}

/* Whether an instruction's accesses all use what another one has looked up; such a one leaves the flags alone. */
static int only_shares(const struct out *o, const struct tmpl *t, u32 item)
{
    for (u32 j = 0; j < t->accesses; j++)
        if (j >= MAX_NEAR || o->shares[item][j] == ALONE || o->group[o->shares[item][j]].item == item)
            return 0;
    return t->accesses != 0;
}

/* Whether the code *offset* bytes behind a block's start is no further on: addresses wrap but for those of 64 bits, whose end is not
 * canonical. What only goes on comes to its end, or to code that was never run, soon enough. */
static int goes_back(const struct block *b, s64 offset)
{
    u64 to = b->pc + (u64)offset;
    return b->mode & MODE_64 ? offset <= 0 : (b->mode & MODE_32 ? (u32)to : (u16)to) <= b->pc;
}

static int wants_poll(const struct plan *p, const struct block *b)
{
    if (p->end && p->end->kind == K_EMULATE)
        return 0;
    if (p->end && p->end->kind != K_JCC && p->end->kind != K_JMP)
        return 1;
    return (p->end && goes_back(b, p->at[p->count] + p->relative)) || ((!p->end || p->end->kind == K_JCC) && goes_back(b, p->next));
}

/* Whether the block goes on behind the conditional jump that it would end with: one ahead, which no loop is made of. */
static int goes_on(struct plan *p, u32 key, u32 size, u32 limit)
{
    if (p->end != &p->branch || p->branch.kind != K_JCC || p->relative <= p->length[p->count] || !(key & MODE_64) || p->sides == MAX_SIDES ||
        p->count + 1 >= limit || p->next >= size || (p->count && p->t[p->count - 1]->flags & T_SHADOW))
        return 0;
    p->side[p->sides].condition = p->branch.aux;
    p->side[p->sides].item = (u8)p->count;
    p->side[p->sides++].relative = p->relative;
    p->t[p->count++] = &side_jump;
    p->end = 0;
    return 1;
}

/* The block ends with the last of those jumps after all. */
static void end_at_side(struct plan *p)
{
    p->sides--;
    p->count = p->side[p->sides].item;
    p->relative = p->side[p->sides].relative;
    p->branch.kind = K_JCC;
    p->branch.aux = p->side[p->sides].condition;
    p->branch.accesses = p->branch.flags = 0;
    p->end = &p->branch;
    p->next = p->at[p->count] + p->length[p->count];
}

/* 0, or the offset + 1 of an instruction without a template. */
static u32 collect(const struct store *s, struct plan *p, u32 key, const u8 *data, u32 size, u32 limit, int alone, int crosses)
{
    u32 at = 0, shadow = 0, bytes = 0, slow = 0;
    p->count = p->sides = 0;
    p->end = 0;
    while (at < size && (p->count < (alone ? 1 : limit) || (shadow && !alone)) && bytes < ROOM && slow < MAX_SLOW) {
        u32 room = size - at < 15 ? size - at : 15;
        if (key & (MODE_64 | MODE_32) && direct_branch(s, p, key, data + at, room, at)) {
            if (alone || !goes_on(p, key, size, limit))
                return 0;
            at = p->next;
            continue;
        }
        p->end = 0;
        u32 truncated;
        const struct tmpl *t = resolve(s, key, data + at, room, &truncated);
        if (!t) {
            if (p->count && truncated && !crosses)
                break;
            if (!p->sides)
                return at + 1;
            end_at_side(p); /* no template is made of what may never run */
            return 0;
        }
        p->at[p->count] = (u16)at;
        p->length[p->count] = t->length;
        if (t->kind != K_NORMAL) {
            p->end = t;
            p->relative = t->relative;
            p->next = at + t->length;
            return 0;
        }
        p->t[p->count++] = t;
        at += t->length;
        bytes += t->code_length + 40u * t->accesses + 40;
        slow += t->accesses;
        if (t->flags & T_END || shadow)
            break;
        shadow = t->flags & T_SHADOW;
    }
    p->next = at;
    return 0;
}

static u8 opcode_of(const u8 *raw, u32 mode)
{
    u32 i = 0;
    while (i < 14 && (raw[i] == 0x66 || raw[i] == 0x67 || (raw[i] & 0xfc) == 0xf0 || (raw[i] & 0xe7) == 0x26 || (raw[i] & 0xfe) == 0x64 ||
                      (mode & MODE_64 && (raw[i] & 0xf0) == 0x40)))
        i++;
    return raw[i];
}

/* A conditional jump out of the block's midst. The flags stay where they are. */
static void emit_side(struct out *o, const struct store *s, const struct plan *p, u32 number)
{
    const u8 jcc[] = { 0x0f, (u8)(0x80 | p->side[number].condition), 0, 0, 0, 0 };
    u32 saved = o->stored;
    restore(o, s);
    align(o, 2);
    put(o, jcc, 6);
    note_chain(o, p->at[p->side[number].item] + p->side[number].relative, saved);
}

static void finish(struct out *o, const struct store *s, const struct plan *p, u32 mode, u64 pc, int single, const u8 *data)
{
    const struct tmpl *end = p->end;
    u32 here = p->at[p->count];
    if (!end) {
        const struct tmpl *last = p->t[p->count - 1];
        u32 guest = p->at[p->count - 1];
        if (single) {
            save(o, s);
            emit_helper(o, HLP_SINGLE, last->length, guest);
        } else if (last->flags & T_SHADOW) {
            save(o, s);
            emit_helper(o, HLP_SHADOW | (opcode_of(data + guest, mode) == 0xfb ? SHADOW_STI : SHADOW_SS) << 12, 0, p->next);
            emit_onward(o, s, mode, pc, p->next);
        } else if (p->count > 1 && p->t[p->count - 2]->flags & T_SHADOW) {
            save(o, s); /* interrupts that STI let in are looked for one instruction later */
            emit_poll(o, p->next);
            emit_onward(o, s, mode, pc, p->next);
        } else {
            emit_onward(o, s, mode, pc, p->next);
        }
        return;
    }
    if (end->kind == K_EMULATE || single) {
        save(o, s);
        emit_helper(o, HLP_EMULATE, end->flags & T_INVALID ? 0 : p->length[p->count], here);
        return;
    }
    s64 target = (s64)here + p->relative;
    switch (end->kind) {
    case K_JCC: {
        u8 jcc[] = { 0x0f, (u8)(0x80 | end->aux), 0, 0, 0, 0 };
        u32 saved = o->stored;
        restore(o, s);
        align(o, 2);
        put(o, jcc, 6);
        note_chain(o, target, saved);
        emit_not_taken(o, s, mode, pc, p->next, saved);
        return;
    }
    case K_JMP:
        emit_onward(o, s, mode, pc, target);
        return;
    case K_COUNTED: {
        u8 code[] = { 0x67, end->aux, 0 };
        u32 from = !(end->flags & T_ADDRESS32), saved = o->stored;
        restore(o, s);
        put(o, code + from, 3 - from);
        u32 branch = o->used;
        emit_not_taken(o, s, mode, pc, p->next, saved);
        o->code[branch - 1] = (u8)(o->used - branch);
        emit_not_taken(o, s, mode, pc, target, saved);
        return;
    }
    }
}

/* The slow path of the look-up that accesses share. On where each looks up its own page, in a block of KEY_PLAIN that begins here. */
static void cold_shared(struct out *o, const struct store *s, const struct plan *p, u32 mode, u32 number)
{
    static const u8 jmp[] = { 0xe9, 0, 0, 0, 0 };
    const struct group *g = o->slow[number].group;
    u32 item = o->slow[number].item;
    patch(o, o->slow[number].branch, o->used);
    call_stub(o, (g->write ? STUB_SHARE_WRITE_K : STUB_SHARE_READ_K) + (mode & MODE_CPL3 ? 1 : 0));
    put(o, jmp, 5);
    patch(o, o->used - 4, o->slow[number].resume);
    put(o, jmp, 5);
    u32 plain = o->used - 4;
    struct access *to = (struct access *)(o->code + o->used);
    memset(to, 0, sizeof *to);
    to->header = from_start(o->used);
    to->delta = p->at[item];
    to->size = (u16)(g->high - g->low);
    o->used += sizeof *to;
    patch(o, plain, o->used);
    if (o->slow[number].saved)
        put(o, s->load, s->load_length);
    align(o, 1);
    put(o, jmp, 5);
    note_chain(o, p->at[item], o->slow[number].saved);
    o->chain[o->chains - 1].plain = 1;
}

static void cold(struct out *o, const struct store *s, const struct plan *p, const struct tmpl **placed, u32 mode, u64 pc, const u8 *data)
{
    static const u8 jmp[] = { 0xe9, 0, 0, 0, 0 }, nop = 0x90;
    for (u32 i = 0; i < o->slows; i++) {
        if (o->slow[i].group) {
            cold_shared(o, s, p, mode, i);
            continue;
        }
        const struct taccess *a = o->slow[i].access;
        u32 item = o->slow[i].item;
        const struct tmpl *t = placed[item];
        int write = a->stub == STUB_WRITE_K || a->stub == STUB_WRITE_U;
        while (write && o->used % 4) /* `immediate` is set while others look at it */
            put(o, &nop, 1);
        patch(o, o->slow[i].branch, o->used);
        call_stub(o, a->stub);
        put(o, jmp, 5);
        patch(o, o->used - 4, o->slow[i].resume);
        struct access *to = (struct access *)(o->code + o->used);
        to->header = from_start(o->used);
        to->delta = p->at[item];
        to->size = a->size;
        to->source = a->source;
        to->length = p->length[item];
        to->flags = a->flags;
        to->immediate = write ? 0 : t->immediate_field ? field_value(data + p->at[item] + t->immediate_field, t->immediate_size) : a->immediate;
        o->used += sizeof(struct access);
    }
    for (u32 i = 0; i < o->polls; i++) {
        patch(o, o->poll[i].branch, o->used);
        call_stub(o, STUB_POLL);
        payload_nop(o, o->poll[i].guest);
    }
    for (u32 i = 0; i < o->chains; i++) {
        if (!o->chain[i].plain && leaves_user_page(o, mode, o->chain[i].target)) {
            patch(o, o->chain[i].field, o->used);
            if (!o->chain[i].saved)
                put(o, s->save, s->save_length);
            emit_direct(o, mode, pc + (u64)o->chain[i].target);
            continue;
        }
        while ((o->used + 7) % 8)
            put(o, &nop, 1);
        patch(o, o->chain[i].field, o->used);
        call_stub(o, STUB_CHAIN);
        struct site *site = (struct site *)(o->code + o->used);
        site->header = from_start(o->used);
        site->jump = o->used - o->chain[i].field;
        if (o->chain[i].field < COLD_AT)
            o->to.jump[o->to.jumps++] = o->used - COLD_AT + (u32)offsetof(struct site, jump);
        site->target = o->chain[i].target;
        site->plain = o->chain[i].plain ? KEY_PLAIN : 0;
        site->next = site->block = 0;
        o->used += sizeof(struct site);
    }
    if (o->misses) {
        static const u8 mov = 0xbf;
        for (u32 i = 0; i < o->misses; i++)
            patch(o, o->miss[i], o->used);
        put(o, &mov, 1);
        put32(o, o->spent);
        call_stub(o, STUB_JUMP);
        payload_nop(o, p->at[p->count - !p->end]);
    }
}

static void liveness(struct plan *p)
{
    u8 live = ALL_FLAGS;
    for (u32 i = p->count; i--;) {
        const struct tmpl *t = p->t[i];
        p->after[i] = live;
        live = (u8)((live & ~t->kills) | t->reads);
        p->before[i] = live;
    }
}

static void note_site(struct fault_site *site, const struct out *o, const struct tmpl *t, u32 guest, u32 stored)
{
    site->end = (u16)o->used;
    site->guest = (u16)(guest | (stored ? SITE_STORED : 0) | (t->flags & T_BORROWED ? SITE_BORROWED : 0));
}

/* Assemble the block at block->pc from `size` bytes of code. Fills block->length, code_length, entry, sites.
 * 0, or the offset + 1 of an instruction without a template. */
static u32 assemble(const struct store *s, struct out *o, struct block *block, const u8 *data, u32 size, u32 limit, u32 what, int crosses)
{
    struct plan p;
    struct fault_site sites[MAX_BODY + 1];
    const struct tmpl *placed[MAX_BODY + 1];
    u32 mode = block->mode, nsites = 0, side = 0;
    int single = what == MAKE_SINGLE;
    u32 missing = collect(s, &p, template_key(mode) | (single ? KEY_SINGLE : 0), data, size, limit, mode & MODE_STEP || what != MAKE_BLOCK, crosses);
    if (missing)
        return missing;
    liveness(&p);
    begin(o);
    o->page = (u32)(block->cs_base + block->pc) & 0xfff;
    share(o, &p, data, what == MAKE_BLOCK && mode & MODE_64 && !(mode & (MODE_STEP | KEY_PLAIN)));
    u8 entry_live = p.count ? p.before[0] : ALL_FLAGS;
    int step = mode & MODE_STEP && what == MAKE_BLOCK; /* else the instruction has begun */
    if (step) { /* never chained to; what traps or polls is looked at after each instruction */
        emit_helper(o, HLP_BEGIN, 0, 0);
        o->stored = 1;
    } else if (entry_live) {
        put(o, s->load, s->load_length);
    }
    block->entry = o->used;
    int poll = what == MAKE_BLOCK && !step && wants_poll(&p, block);
    for (u32 i = 0; poll && i < p.count; i++)
        if (p.t[i]->flags & T_SHADOW) { /* never between STI and the instruction after it: at the start instead */
            if (entry_live)
                save(o, s);
            emit_poll(o, 0);
            poll = 0;
        }
    for (u32 i = 0; i < p.count; i++) {
        const struct tmpl *t = p.t[i];
        u8 before = p.before[i], after = p.after[i];
        if (t == &side_jump) {
            emit_side(o, s, &p, side++);
            continue;
        }
        if (poll && !before) {
            emit_poll(o, p.at[i]);
            poll = 0;
            o->stored = 0;
        }
        u32 kept = o->stored;
        int needs = t->reads || (t->kills && after & ~t->kills);
        if (t->flags & T_CLOBBERS && !only_shares(o, t, i)) {
            if (before || t->flags & T_STORED) {
                save(o, s);
                kept = 1;
                if (!(t->flags & T_STORED)) {
                    if (needs && t->restore)
                        t = at_offset(s, t->restore), o->stored = 0;
                    else if (t->kills)
                        o->stored = 0;
                }
            } else if (t->kills) {
                o->stored = 0;
            }
        } else if (o->stored && needs) {
            restore(o, s);
            kept = 0;
        } else if (t->kills) {
            o->stored = 0;
        }
        placed[i] = t;
        place(o, t, mode, i, block->pc + p.at[i], p.at[i], data + p.at[i], kept);
        note_site(&sites[nsites++], o, t, p.at[i], kept);
    }
    if (poll) {
        save(o, s);
        emit_poll(o, p.end ? p.at[p.count] : p.next);
    }
    if (p.end && (p.end->kind == K_CALL || p.end->kind == K_INDIRECT) && !single) {
        save(o, s);
        placed[p.count] = p.end;
        place(o, p.end, mode, p.count, block->pc + p.at[p.count], p.at[p.count], data + p.at[p.count], 1);
        note_site(&sites[nsites++], o, p.end, p.at[p.count], 1);
        s64 target = (s64)p.at[p.count] + p.relative;
        if (p.end->kind == K_INDIRECT) {
            o->spent = (u32)p.end->relative;
            emit_indirect(o, mode);
        } else {
            emit_onward(o, s, mode, block->pc, target);
        }
    } else {
        finish(o, s, &p, mode, block->pc, single, data);
    }
    begin_cold(o, block);
    cold(o, s, &p, placed, mode, block->pc, data);
    while (o->used % 2)
        put(o, (const u8 *)"\x90", 1);
    block->sites = o->used - COLD_AT;
    block->nsites = nsites;
    put(o, (const u8 *)sites, nsites * sizeof *sites);
    end_cold(o, block);
    block->written = single && p.count ? (u64)p.t[0]->relative : 0;
    block->length = (u16)p.next;
    return 0;
}

/* A jump that no chain may take, as a block: to `target` through the jump cache, with the guest's flags in the host's; with the lock held. */
u64 make_bridge(struct vm *vm, struct block *plan, u64 target)
{
    static const u8 mov = 0xbf;
    const struct store *s = (const struct store *)vm->store;
    struct out o;
    begin(&o);
    save(&o, s);
    emit_direct(&o, plan->mode & ~(u32)KEY_BRIDGE, target);
    begin_cold(&o, plan);
    patch(&o, o.miss[0], o.used);
    put(&o, &mov, 1);
    put32(&o, 0);
    call_stub(&o, STUB_JUMP);
    payload_nop(&o, 0);
    end_cold(&o, plan);
    plan->pc = target;
    return (u64)lay(vm, plan, &o.to);
}

/* Copy what the block at *phys* can be made of: its page, or the next one too where its one instruction reaches over. Nothing is made
 * of memory itself, which other vCPUs write meanwhile. How much; 0: the next page cannot be fetched. */
static u32 copy_code(struct cpu *c, struct block *b, u64 linear, u32 key, u8 *to)
{
    const struct store *s = (const struct store *)c->vm->store;
    u32 room = 4096 - (u32)(b->phys & 0xfff), truncated, global, writable;
    struct plan first;
    const u8 *ram = phys_host(c->vm, b->phys, 0);
    if (!ram)
        return 0;
    memcpy(to, ram, room < MOST_CODE ? room : MOST_CODE);
    first.count = 0;
    if (room >= 15 || (key & (MODE_64 | MODE_32) && direct_branch(s, &first, key, to, room, 0)) || resolve(s, key, to, room, &truncated) ||
        !truncated)
        return room < MOST_CODE ? room : MOST_CODE;
    u64 keep = c->cr2, code = c->scratch[3], phys2;
    int vector = walk(c, linear_after(c, linear, room, 0), ACC_EXEC, c->cpl == 3, &phys2, &global, &writable);
    c->cr2 = keep, c->scratch[3] = code; /* Python walks again, and raises it */
    if (vector)
        return 0;
    const u8 *more = phys_host(c->vm, phys2 & ~0xffful, 0);
    if (more)
        memcpy(to + room, more, 15);
    else
        memset(to + room, 0xff, 15); /* an open bus */
    const struct tmpl *t = 0;
    u32 size = 0;
    if (key & (MODE_64 | MODE_32) && direct_branch(s, &first, key, to, 15, 0))
        size = first.next;
    else if ((t = resolve(s, key, to, 15, &truncated)))
        size = t->length;
    if (size > room)
        b->phys2 = phys2 & ~0xffful;
    return size;
}

/* Translate the code at cpu->rip. Host address of the block (installed if *what* is MAKE_BLOCK), or TRANSLATE_*. */
/* With *guest*, of *known* bytes, only if the instruction is one that it begins with; without, a single only if *known* is what it writes,
 * and its length << 16. */
static u64 translate(struct cpu *c, u64 phys, u64 linear, u32 what, const u8 *guest, u32 known)
{
    struct vm *vm = c->vm;
    struct { struct block header; struct out out; } image;
    struct block *b = &image.header;
    u32 plain = what & KEY_PLAIN;
    what &= ~(u32)KEY_PLAIN;
    u8 data[MOST_CODE + 15];
    u64 generation = vm->generation;
    c->info[3] = 0;
    c->base = linear & ~0xffful;
    if (!phys_host(vm, phys, 0))
        return TRANSLATE_MISSING;
    memset(b, 0, sizeof *b);
    b->pc = pc_for(c->mode, c->rip);
    b->cs_base = c->mode & MODE_64 ? 0 : c->seg[CS].base;
    b->phys = phys;
    b->phys2 = ~0ul;
    b->mode = c->mode | plain;
    if (what == MAKE_BLOCK)
        tcg_watch_running(c, phys);
    u32 size = copy_code(c, b, linear, template_key(c->mode) | (what == MAKE_SINGLE ? KEY_SINGLE : 0), data);
    if (!size)
        return TRANSLATE_MISSING;
    if (what == MAKE_BLOCK && b->phys2 != ~0ul)
        tcg_watch_running(c, b->phys2);
    if (generation != vm->generation) /* while it waited: there may be other memory now */
        return TRANSLATE_CHANGED;
    u32 missing = assemble((const struct store *)vm->store, &image.out, b, data, size, vm->block_limit, what, b->phys2 != ~0ul);
    if (missing) {
        c->info[3] = missing - 1;
        return TRANSLATE_MISSING;
    }
    if (what == MAKE_BLOCK)
        return install(c, b, &image.out.to, data);
    if (!guest && what == MAKE_SINGLE && known != (b->written | (u32)b->length << 16))
        return TRANSLATE_CHANGED;
    if (guest && known && (b->length > known || !same_bytes(data, guest, b->length)))
        return TRANSLATE_CHANGED;
    b->mode |= KEY_SINGLE; /* no chain leads to it */
    return put_block(vm, b, &image.out.to);
}

u64 native_translate(struct cpu *c, u64 phys, u64 linear, u32 plain) { return translate(c, phys, linear, MAKE_BLOCK | plain, 0, 0); }

/* The code of the single of the instruction at cpu->rip whose write *a* is; it is made once. 0: Python has to make a template first, or does the
 * instruction. It stays as long as the code that *a* lies in. */
u64 single_of(struct cpu *c, const struct block *b, struct access *a)
{
    s32 distance = __atomic_load_n(&a->immediate, __ATOMIC_ACQUIRE);
    if (likely(distance))
        return ((const struct block *)((u64)b + ((u64)(s64)distance << 6)))->code;
    if ((b->phys & 0xfff) + a->delta > 0xfff)
        return 0;
    u64 linear = c->mode & MODE_64 ? c->rip : (u32)(c->seg[CS].base + c->rip);
    u64 made = translate(c, b->phys + a->delta, linear, MAKE_SINGLE, 0, a->size | (u32)a->length << 16);
    if (made <= TRANSLATE_MISSING)
        return 0;
    s32 *field = (s32 *)((u64)&a->immediate + (c->vm->code_rw - c->vm->code_rx));
    __atomic_store_n(field, (s32)((s64)(made - (u64)b) >> 6), __ATOMIC_RELEASE);
    return ((const struct block *)made)->code;
}

/* For Python: a block at cpu->rip for one run (MAKE_*). */
EXPORTED u64 tcg_once(struct cpu *c, u64 phys, u64 linear, u32 what, const u8 *guest, u32 size)
{
    return translate(c, phys, linear, what, guest, size);
}

/* A host fault in translated code (info: signal, host address, trap number): the guest's exception where an instruction of its can raise
 * it, with the registers that it had. By hardware's own vector, not by what memory holds now. */
int native_signal(struct cpu *c)
{
    u64 host = c->info[1], trap = c->info[2];
    const struct block *b = block_at(c->vm, host);
    u32 vector = trap == EX_NP || trap == EX_SS || trap == EX_AC ? EX_GP : trap == EX_XM && !(c->cr4 & CR4_OSXMMEXCPT) ? EX_UD : (u32)trap;
    if (b && (vector == EX_DE || vector == EX_UD || vector == EX_GP || vector == EX_MF || vector == EX_XM)) {
        const struct fault_site *sites = (const struct fault_site *)((u64)(b + 1) + b->sites);
        u64 offset = host - b->code;
        for (u32 i = 0; i < b->nsites; i++) {
            if (offset >= sites[i].end)
                continue;
            c->rip = rip_in(c, b, sites[i].guest & SITE_OFFSET);
            if (!(sites[i].guest & SITE_STORED))
                c->fl = c->scratch[0];
            if (sites[i].guest & SITE_BORROWED)
                c->gpr[RAX] = c->scratch[2], c->gpr[RDX] = c->scratch[3];
            return raise(c, vector, vector == EX_GP, 0);
        }
    }
    c->reason = R_SIGNAL;
    return H_EXIT;
}

/* Add a template (its bytes as struct tmpl and what follows). 0, or 1 when the store is full. */
EXPORTED u32 tcg_add_template(struct vm *vm, const struct tmpl *t, u32 size, u32 link)
{
    struct store *s = (struct store *)vm->store;
    spin_lock(&vm->lock);
    u32 at = s->used;
    if (at + size > s->size) {
        spin_unlock(&vm->lock);
        return 1;
    }
    memcpy((u8 *)s + at, t, size);
    s->used = (at + size + T_ALIGN - 1) & ~(u32)(T_ALIGN - 1);
    if (link) {
        struct tmpl *w = (struct tmpl *)((u8 *)s + at);
        u32 *head = &s->heads[hash_raw(t->key, t->raw, t->raw_length) & (HEADS_MAX - 1)];
        w->next = *head;
        __atomic_store_n(head, at, __ATOMIC_RELEASE);
        s->count++;
    }
    spin_unlock(&vm->lock);
    return 0;
}

EXPORTED u32 tcg_head_length(const u8 *raw, u32 room, u32 mode) { return head_length(raw, room, mode); }

/* 0: nothing known of it; 1: it has a template; 2: its shape is exact, and it has none. */
EXPORTED int tcg_has_template(struct vm *vm, u32 key, const u8 *raw, u32 length)
{
    const struct store *s = (const struct store *)vm->store;
    struct plan p;
    u32 truncated;
    p.count = 0;
    if (key & (MODE_64 | MODE_32) && direct_branch(s, &p, key, raw, length, 0))
        return 1;
    if (resolve(s, key, raw, length, &truncated))
        return 1;
    u32 head = head_length(raw, length, key);
    const struct tmpl *t = head ? find_template(s, key, raw, head) : 0;
    return t && t->flags & T_EXACT ? 2 : 0;
}
