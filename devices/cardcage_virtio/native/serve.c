/* Block requests of a split ring, from the ring to a file and back, without the interpreter's lock.
 *
 * This serves what drivers usually make: one header, data, one status byte, in RAM; a read that the page cache has, or a write that it
 * takes. Anything else is left in the ring for the walk in Python (queue/split.py), which knows all the rules and says what is wrong.
 * So nothing here reports an error, and whatever is doubtful is OTHER. All that is read from guest memory is read once: the guest may
 * change it at any time. Nothing is called, neither a C library nor Python. */

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef int s32;
typedef unsigned long u64;
typedef long s64;
typedef volatile u64 __attribute__((aligned(1), may_alias)) guest64; /* of an indirect table or a header, which may lie anywhere */
typedef volatile u16 __attribute__((may_alias)) guest16;

enum { NEXT = 1, WRITE = 2, INDIRECT = 4 };
enum { IN, OUT };
enum { SECTOR = 512, PAGE = 4096, HEADER = 16 };
enum { MAY_READ = 1, MAY_WRITE = 2 };
#define NOWHERE (~0ul)
enum { RAMS = 8, MOST = 64, PARTS = 1024, AREAS = 4096 };
enum { EMPTY, MORE, OTHER, UNKNOWN, SERVED, FULL };
enum { SYS_PREADV2 = 327, SYS_PWRITEV2 = 328 };

/* One queue: Python (queue/lane.py) has the same structure. Only one thread is in it at a time. Who calls may only put places between two calls. */
struct lane {
    u64 table, avail, used;           /* the ring's parts, in this process */
    u32 size, longest;                /* its entries; the most of an indirect table */
    u32 event_index, last;            /* what was agreed; the available index up to which requests were taken */
    struct {
        u64 low, high, host;          /* guest-physical from and to, and where that is here */
    } ram[RAMS];
    u32 rams, most;                   /* stretches that are known; requests to serve */
    s32 fd;
    u32 may;
    s32 read_flags, write_flags;      /* RWF_* */
    u64 bytes, mask;                  /* the disk's size; its block's size less one */
    u64 write_low, write_high;        /* of the disk: where it may be written here */
    u64 budget;                       /* bytes after which to serve no further request */
    u64 unknown;                      /* UNKNOWN: a guest-physical address outside of all stretches */
    u32 served, areas, reads, writes; /* what was done */
    u64 read_bytes, write_bytes;
    u64 done[MOST];                   /* for the used ring, as it holds them */
    u64 area[2 * AREAS];              /* guest memory that was written: addresses and lengths by turns */
    struct {
        u64 base, length;             /* struct iovec */
    } part[PARTS];
    u32 wanted, parts;                /* requests that were gathered, and their parts */
    u32 at, kept;                     /* the available index behind them; areas of what was served */
    struct wanted {
        u64 offset, size;             /* of the disk */
        u64 place;                    /* where that is in the file, which who calls may say; NOWHERE if it cannot be */
        u64 status;                   /* where it is here */
        u32 out, head, first, parts, areas, none;
    } want[MOST];
};

/* What is known of a chain while it is walked. */
struct request {
    u64 header;                          /* where it is here; 0 for not yet */
    u64 readable, writable;              /* bytes of data */
    u64 last, last_address, last_length; /* a writable part that may be the status byte */
    u32 parts, areas;                    /* behind its last */
};

static s64 transfer(s64 number, s32 fd, const void *parts, u64 count, u64 offset, s32 flags)
{
    s64 result;
    register u64 low __asm__("r10") = offset;
    register u64 high __asm__("r8") = 0;
    register s64 how __asm__("r9") = flags;
    __asm__ volatile("syscall" : "=a"(result) : "a"(number), "D"((s64)fd), "S"(parts), "d"(count), "r"(low), "r"(high), "r"(how)
                     : "rcx", "r11", "memory");
    return result;
}

/* Where a buffer is in this process; 0 when it is not all in one stretch that is known, and *why says which. */
static u64 find(struct lane *l, u64 address, u64 length, int *why)
{
    u32 count = l->rams < RAMS ? l->rams : RAMS;
    for (u32 i = 0; i < count; i++)
        if (address >= l->ram[i].low && address < l->ram[i].high) {
            *why = OTHER;
            return length <= l->ram[i].high - address ? l->ram[i].host + (address - l->ram[i].low) : 0;
        }
    l->unknown = address;
    *why = UNKNOWN;
    return 0;
}

static int add_part(struct lane *l, struct request *r, u64 host, u64 length)
{
    if (r->parts > l->parts && l->part[r->parts - 1].base + l->part[r->parts - 1].length == host) {
        l->part[r->parts - 1].length += length;
        return 1;
    }
    if (r->parts == PARTS)
        return 0;
    l->part[r->parts].base = host;
    l->part[r->parts++].length = length;
    return 1;
}

static int add_area(struct lane *l, struct request *r, u64 address, u64 length)
{
    if (r->areas > l->areas && l->area[2 * r->areas - 2] + l->area[2 * r->areas - 1] == address) {
        l->area[2 * r->areas - 1] += length;
        return 1;
    }
    if (r->areas == AREAS)
        return 0;
    l->area[2 * r->areas] = address;
    l->area[2 * r->areas++ + 1] = length;
    return 1;
}

/* Take one buffer of a chain: the first is the header, the last the status byte. */
static int take(struct lane *l, struct request *r, u64 address, u64 length, u32 flags)
{
    int why;
    if (!length)
        return OTHER;
    u64 host = find(l, address, length, &why);
    if (!host)
        return why;
    if (flags & WRITE) {
        if (r->last) {
            if (!add_part(l, r, r->last, r->last_length) || !add_area(l, r, r->last_address, r->last_length))
                return FULL;
            r->writable += r->last_length;
        }
        r->last = host, r->last_address = address, r->last_length = length;
    } else if (r->last) {
        return OTHER;
    } else if (!r->header) {
        if (length != HEADER)
            return OTHER;
        r->header = host;
    } else {
        if (!add_part(l, r, host, length))
            return FULL;
        r->readable += length;
    }
    return SERVED;
}

static int walk(struct lane *l, struct request *r, u32 head)
{
    u64 table = l->table;
    u32 size = l->size, at = head, left;
    int why, inside = 0;
    if (head >= size)
        return OTHER;
    for (left = size;;) {
        guest64 *entry = (guest64 *)(table + 16ul * at);
        u64 address = entry[0], rest = entry[1];
        u32 length = (u32)rest, flags = rest >> 32 & 0xffff, next = (u32)(rest >> 48);
        if (flags == INDIRECT && !inside && left == size) {
            if (!length || length & 15 || length >> 4 > l->longest)
                return OTHER;
            table = find(l, address, length, &why);
            if (!table)
                return why;
            size = left = length >> 4, at = 0, inside = 1;
            continue;
        }
        if (flags & ~(NEXT | WRITE))
            return OTHER;
        why = take(l, r, address, length, flags);
        if (why != SERVED)
            return why;
        if (!(flags & NEXT))
            return SERVED;
        if (!--left || next >= size)
            return OTHER;
        at = next;
    }
}

/* Gather the request whose chain begins at *head*. */
static int gather(struct lane *l, u32 head)
{
    struct request r = {.parts = l->parts, .areas = l->areas};
    int why = walk(l, &r, head);
    if (why != SERVED)
        return why;
    if (!r.header || !r.last || r.last_length != 1)
        return OTHER;
    u64 kind = (u32)((guest64 *)r.header)[0], sector = ((guest64 *)r.header)[1];
    int out = kind == OUT;
    u64 size = out ? r.readable : r.writable;
    if (kind > OUT || !(l->may & (out ? MAY_WRITE : MAY_READ)) || (out ? r.writable : r.readable) || !size)
        return OTHER;
    if (sector >= l->bytes / SECTOR || size > l->bytes - sector * SECTOR)
        return OTHER;
    u64 at = sector * SECTOR;
    if ((at | size) & l->mask)
        return OTHER;
    if (out && ((at | size) & (PAGE - 1) || at < l->write_low || l->write_high < size || at > l->write_high - size))
        return OTHER;
    if (!add_area(l, &r, r.last_address, 1))
        return FULL;
    struct wanted *w = &l->want[l->wanted++];
    *w = (struct wanted){.offset = at, .size = size, .place = at, .status = r.last, .out = out, .head = head};
    w->first = l->parts, w->parts = r.parts - l->parts, w->areas = r.areas;
    l->parts = r.parts, l->areas = r.areas;
    return SERVED;
}

static void begin(struct lane *l)
{
    l->at = (u16)l->last;
    l->wanted = l->parts = l->served = l->areas = l->kept = l->reads = l->writes = 0;
    l->read_bytes = l->write_bytes = 0;
}

/* Gather up to *limit* requests (SERVED); or until there is none (EMPTY: the driver was asked to notify of the next), enough were (MORE),
 * or one is not for here. */
static int gather_some(struct lane *l, u32 limit)
{
    u32 turns = 0; /* a driver may take back and make available again what is not there */
    guest16 *avail = (guest16 *)l->avail, *used = (guest16 *)l->used;
    for (l->wanted = l->parts = 0; l->wanted < limit;) {
        u16 at = (u16)l->at, index = avail[1];
        if (index == at) {
            if (l->event_index)
                used[2 + 4ul * l->size] = at;
            else if (used[0])
                used[0] = 0;
            __atomic_thread_fence(__ATOMIC_SEQ_CST);
            if (avail[1] == at)
                return EMPTY;
            if (++turns > MOST)
                return MORE;
            continue;
        }
        if ((u16)(index - at) > l->size)
            return OTHER;
        u32 all = l->served + l->wanted;
        if (all >= l->most || all >= MOST || all >= l->size || !l->budget) /* the ring's size: a driver adds meanwhile */
            return MORE;
        int why = gather(l, avail[2 + (at & (l->size - 1))]);
        if (why == FULL) /* behind the others, or for this one alone */
            return all ? MORE : OTHER;
        if (why != SERVED)
            return why;
        l->at = (u16)(at + 1);
        u64 size = l->want[l->wanted - 1].size;
        l->budget = size < l->budget ? l->budget - size : 0;
    }
    return SERVED;
}

/* Move the data of what was gathered, and answer. OTHER when one of them is not for here, and neither are those behind it; else *why. */
static int move(struct lane *l, int why)
{
    for (u32 i = 0; i < l->wanted && i < MOST && l->served < MOST; i++) {
        const struct wanted *w = &l->want[i];
        s64 got = -1;
        if (w->place != NOWHERE && !(w->out && w->place & (PAGE - 1)))
            got = w->out ? transfer(SYS_PWRITEV2, l->fd, &l->part[w->first], w->parts, w->place, l->write_flags)
                         : transfer(SYS_PREADV2, l->fd, &l->part[w->first], w->parts, w->place, l->read_flags);
        if (got < 0 || (u64)got != w->size) { /* it would wait, or failed: the same is done again there */
            why = OTHER;
            break;
        }
        *(volatile u8 *)w->status = 0;
        u64 written = 1;
        if (w->out) {
            l->writes++, l->write_bytes += w->size;
        } else {
            l->reads++, l->read_bytes += w->size;
            written += w->size;
        }
        l->kept = w->areas;
        l->done[l->served++] = (u64)(u32)written << 32 | w->head;
        l->last = (u16)(l->last + 1);
    }
    l->areas = l->kept;
    return why;
}

/* Gather what there is, for who says where it lies before it is moved. EMPTY, MORE, OTHER, UNKNOWN: what to return then. */
__attribute__((visibility("default"))) int cardcage_gather(struct lane *l)
{
    begin(l);
    return gather_some(l, MOST + 1);
}

/* Move what was gathered. What was served is in *l*; the driver hears of it by who calls. */
__attribute__((visibility("default"))) int cardcage_move(struct lane *l, int why)
{
    return move(l, why);
}

/* Both, request by request, for a disk that lies in its file as it is. */
__attribute__((visibility("default"))) int cardcage_serve(struct lane *l)
{
    begin(l);
    for (;;) {
        int why = move(l, gather_some(l, 1));
        if (why != SERVED)
            return why;
    }
}

__attribute__((visibility("default"))) u64 cardcage_lane_size(void)
{
    return sizeof(struct lane);
}
