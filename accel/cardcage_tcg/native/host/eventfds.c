/* Doorbells: stores that write an eventfd. Irqfds: eventfds that send a message, on one thread for each VM. Rings that another
 * process serves. None of it needs Python, which fills their tables: routes under their lock, the others replaced whole while the
 * world is stopped. */
#include "cpu.h"
#include "internal.h"
#include "sys.h"

enum { SYS_read = 0, SYS_write = 1, SYS_sched_yield = 24, SYS_epoll_wait = 232, SYS_epoll_ctl = 233, SYS_preadv2 = 327, SYS_epoll_pwait2 = 441 };
enum { RWF_NOWAIT = 8, EINTR = 4, ENOSYS = 38, EOPNOTSUPP = 95 };

static long syscall4(long n, long a, long b, long c, long d)
{
    register long r10 __asm__("r10") = d;
    long ret;
    __asm__ volatile("syscall" : "=a"(ret) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10) : "rcx", "r11", "memory");
    return ret;
}

static long epoll_pwait2(int epoll, void *events, long most, const void *timeout)
{
    register long r10 __asm__("r10") = (long)timeout;
    register long mask __asm__("r8") = 0;
    long ret;
    __asm__ volatile("syscall" : "=a"(ret) : "a"((long)SYS_epoll_pwait2), "D"((long)epoll), "S"(events), "d"(most), "r"(r10), "r"(mask)
                     : "rcx", "r11", "memory");
    return ret;
}

/* ---- doorbells ---- */

/* Whether a doorbell takes the store of size bytes. The table is sorted by port or memory, then by address. */
int ring_bell(struct vm *vm, u32 pio, u64 address, u32 size, u64 value)
{
    const struct bells *table = (const struct bells *)__atomic_load_n(&vm->bells, __ATOMIC_ACQUIRE);
    if (!table)
        return 0;
    const struct bell *bells = table->bell;
    u64 low = 0, high = table->count;
    while (low < high) {
        u64 middle = (low + high) / 2;
        if (bells[middle].pio < pio || (bells[middle].pio == pio && bells[middle].address < address))
            low = middle + 1;
        else
            high = middle;
    }
    for (; low < table->count && bells[low].pio == pio && bells[low].address == address; low++)
        if ((!bells[low].size || bells[low].size == size) && (!bells[low].match || bells[low].value == value)) {
            u64 one = 1;
            syscall4(SYS_write, bells[low].fd, (long)&one, 8, 0);
            return 1;
        }
    return 0;
}

EXPORTED int tcg_ring_bell(struct vm *vm, u32 pio, u64 address, u32 size, u64 value) { return ring_bell(vm, pio, address, size, value); }

/* OUT to a doorbell; all others are Python's. imm: log2 of the size | 4 for the port in bits 3 to 10, else it is in DX */
int h_out(struct cpu *c, u32 arg)
{
    u32 imm = ARG_IMM(arg), size = 1u << (imm & 3), port = imm & 4 ? imm >> 3 & 0xff : (u32)c->gpr[RDX] & 0xffff;
    if (c->vm->bells && !(c->armed & ARMED_PORT) && c->mode & MODE_IOPL && !(c->mode & MODE_VM86)) {
        u64 value = c->gpr[RAX] & (size == 4 ? 0xffffffff : (1u << size * 8) - 1);
        if (ring_bell(c->vm, 1, port, size, value))
            return H_CONTINUE;
    }
    return emulate(c, arg);
}

/* ---- irqfds ---- */

struct event { u32 events; u64 data; } __attribute__((packed));
struct iovec { u64 base, size; };

/* Take what an eventfd counted: whether it was more than 0. Never waits, unless the kernel cannot do without (before 5.8). */
static int take(s32 fd)
{
    u64 count;
    struct iovec part = { (u64)&count, 8 };
    register long flags __asm__("r9") = RWF_NOWAIT;
    register long high __asm__("r8") = -1;
    register long low __asm__("r10") = -1;
    long ret;
    __asm__ volatile("syscall" : "=a"(ret) : "a"((long)SYS_preadv2), "D"((long)fd), "S"(&part), "d"(1l), "r"(low), "r"(high), "r"(flags)
                     : "rcx", "r11", "memory");
    if (ret == -EOPNOTSUPP)
        ret = syscall4(SYS_read, fd, (long)&count, 8, 0);
    return ret == 8;
}

enum { DATA_END = -1, DATA_IDLE = -2 };

/* An event's data is the route's number and generation: one that was taken away, or made anew, after epoll found it is passed over.
 * Each write of an eventfd is one event (EPOLLET), and adding one that counts is another: none is lost to whoever got it. */
static void deliver_event(struct vm *vm, u64 data)
{
    spin_lock(&vm->irq_lock);
    struct route *r = &((struct route *)vm->routes)[data & 0xffffffff];
    if (r->used && r->generation == data >> 32 && take(r->fd))
        apic_message(vm, r->address, r->data);
    spin_unlock(&vm->irq_lock);
}

/* The thread: until the eventfd that is registered as DATA_END is written. */
EXPORTED void tcg_irqfds(struct vm *vm)
{
    struct event events[32];
    for (;;) {
        long count = syscall4(SYS_epoll_wait, vm->irq_epoll, (long)events, 32, -1);
        if (count < 0 && count != -EINTR)
            return;
        for (long i = 0; i < count; i++) {
            if (events[i].data == (u64)DATA_END)
                return;
            if (events[i].data != (u64)DATA_IDLE) {
                deliver_event(vm, events[i].data);
            } else if (__atomic_load_n(&vm->idler, __ATOMIC_SEQ_CST)) { /* for the vCPU that is about to wait: again */
                wake_idler(vm);
                syscall4(SYS_sched_yield, 0, 0, 0, 0);
            }
        }
    }
}

/* Sleep as a vCPU that has nothing to do, for as long as c->wake is seq: in the thread's own epoll, before it (the kernel wakes the
 * waiter that came last), so that an interrupt for this vCPU, which most are, wakes one thread and not two. One vCPU at a time; 0:
 * there is one, or there are no irqfds, or the kernel is older than 5.11. */
int irq_wait(struct cpu *c, u32 seq, const void *timeout)
{
    struct vm *vm = c->vm;
    struct event events[8];
    long count = 0;
    u32 none = 0;
    if (vm->idle_fd < 0 || !__atomic_compare_exchange_n(&vm->idler, &none, 1, 0, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
        return 0;
    __atomic_store_n(&c->sleeping, 2, __ATOMIC_SEQ_CST); /* wake_cpu counts up before it looks at this */
    if (__atomic_load_n(&c->wake, __ATOMIC_SEQ_CST) == seq)
        count = epoll_pwait2(vm->irq_epoll, events, 8, timeout);
    __atomic_store_n(&c->sleeping, 0, __ATOMIC_SEQ_CST);
    __atomic_store_n(&vm->idler, 0, __ATOMIC_SEQ_CST);
    for (long i = 0; i < count; i++)
        if (events[i].data < (u64)DATA_IDLE)
            deliver_event(vm, events[i].data);
    if (count == -ENOSYS)
        vm->idle_fd = -1;
    return count != -ENOSYS;
}

EXPORTED void tcg_set_route(struct vm *vm, u32 number, const struct route *new)
{
    spin_lock(&vm->irq_lock);
    ((struct route *)vm->routes)[number] = *new;
    spin_unlock(&vm->irq_lock);
}

/* Have the thread hear of an eventfd by the name of data. */
EXPORTED int tcg_watch_eventfd(int epoll, int fd, u64 data)
{
    struct event e = { 1 /* EPOLLIN */ | (data == (u64)DATA_END ? 0 : 1u << 31 /* EPOLLET */), data };
    return (int)syscall4(SYS_epoll_ctl, epoll, 1 /* EPOLL_CTL_ADD */, fd, (long)&e);
}

/* ---- rings that another process serves ----
 *
 * What the other process wrote is known once the guest can see the buffer as used. So the guest never reads the page of a used
 * ring by itself: a read comes to the slow path, which copies the operand first, and then looks at all that the ring says
 * by now. What the copy shows has been looked at. */

int is_watched(const struct vm *vm, u64 gpa)
{
    const struct watched *table = (const struct watched *)__atomic_load_n(&vm->watched, __ATOMIC_ACQUIRE);
    if (!table)
        return 0;
    u64 low = 0, high = table->count;
    gpa &= ~0xffful;
    while (low < high) {
        u64 middle = (low + high) / 2;
        if (table->page[middle] < gpa)
            low = middle + 1;
        else
            high = middle;
    }
    return low < table->count && table->page[low] == gpa;
}

static void *ram(struct vm *vm, u64 gpa, u64 size)
{
    struct slot *s;
    u8 *host = phys_host(vm, gpa, &s);
    return host && size <= s->size - (gpa - s->gpa) ? host : 0;
}

struct descriptor { u64 address; u32 length; u16 flags, next; };
enum { DESC_NEXT = 1, DESC_WRITE = 2, DESC_INDIRECT = 4 };

/* Forget what was derived of a chain's writable buffers; the budget that is left, 0 when it did not do. The guest owns the chain
 * and may have made anything of it. */
static u64 forget(struct vm *vm, const struct descriptor *table, u32 size, u32 at, u64 budget, int nested)
{
    for (u32 left = size; left && at < size; left--) {
        struct descriptor d = *(const volatile struct descriptor *)&table[at];
        u64 cost = d.flags & DESC_WRITE && d.length > 4096 ? d.length : 4096;
        if (cost >= budget)
            return 0;
        budget -= cost;
        if (d.flags & DESC_INDIRECT) {
            const struct descriptor *inner = nested ? 0 : ram(vm, d.address, d.length);
            if (inner && !(budget = forget(vm, inner, d.length / 16, 0, budget, 1)))
                return 0;
        } else if (d.flags & DESC_WRITE) {
            tcg_memory_written(vm, d.address, d.length);
        }
        if (!(d.flags & DESC_NEXT))
            break;
        at = d.next;
    }
    return budget;
}

/* Count what was made available since the last time. */
static void count_available(struct vm *vm, struct ring *r)
{
    const u8 *avail = ram(vm, r->avail, 6 + 2ul * r->size);
    u8 *heads = (u8 *)r->heads;
    if (!avail)
        return;
    u16 made = __atomic_load_n((const u16 *)(avail + 2), __ATOMIC_ACQUIRE), at = (u16)r->made;
    for (; at != made; at++) {
        u16 head = *(const volatile u16 *)(avail + 4 + 2 * (at & (r->size - 1)));
        if (head < r->size)
            heads[head]++;
    }
    r->made = made;
}

static void look(struct vm *vm, struct ring *r)
{
    const u8 *used = ram(vm, r->used, 6 + 8ul * r->size);
    const struct descriptor *table = ram(vm, r->table, 16ul * r->size);
    if (!used || !table)
        return;
    u16 now = __atomic_load_n((const u16 *)(used + 2), __ATOMIC_ACQUIRE);
    if (likely(now == __atomic_load_n(&r->seen, __ATOMIC_ACQUIRE)))
        return;
    spin_lock(&vm->ring_lock);
    now = __atomic_load_n((const u16 *)(used + 2), __ATOMIC_ACQUIRE);
    u64 all = 0;
    for (u32 i = 0; i < vm->nslots; i++)
        all += vm->slots[i].size;
    u64 budget = all;
    count_available(vm, r); /* after the used index was read: what is used was available before */
    for (u16 at = (u16)r->seen; at != now; at++) {
        u32 head = *(const volatile u32 *)(used + 4 + 8 * (at & (r->size - 1)));
        if (head < r->size)
            ((u8 *)r->heads)[head]--;
        budget = budget ? forget(vm, table, r->size, head, budget, 0) : 0;
    }
    if (!budget) /* more than all memory: then all of it */
        for (u32 i = 0; i < vm->nslots; i++)
            tcg_memory_written(vm, vm->slots[i].gpa, vm->slots[i].size);
    __atomic_store_n(&r->seen, now, __ATOMIC_RELEASE);
    spin_unlock(&vm->ring_lock);
}

EXPORTED void tcg_look(struct vm *vm, u32 number)
{
    struct ring *r = &((struct ring *)vm->rings)[number];
    look(vm, r);
    spin_lock(&vm->ring_lock);
    count_available(vm, r);
    spin_unlock(&vm->ring_lock);
}

/* The guest has read from a watched page. */
void watched_read(struct vm *vm, u64 gpa)
{
    struct ring *rings = (struct ring *)vm->rings;
    gpa &= ~0xffful;
    for (u32 i = 0; i < vm->nrings; i++)
        if (rings[i].size && (rings[i].used & ~0xffful) <= gpa && gpa <= ((rings[i].used + 5 + 8ul * rings[i].size) & ~0xffful))
            look(vm, &rings[i]);
}
