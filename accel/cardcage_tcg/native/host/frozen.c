/* Frozen code: what a forked process and its parent have in common. The writable view of all code so far becomes read-only; who writes
 * there copies that piece into a file of its own, by way of SIGSEGV, and maps both views of it anew. Nothing is writable and executable. */
#include "cpu.h"
#include "internal.h"

enum { SYS_mmap = 9, SYS_mprotect = 10, SYS_pwrite64 = 18 };
enum { READ = 1, WRITE = 2, EXEC = 4, SHARED_FIXED = 0x11 };

/* done: a byte for each piece of 1 << shift bytes; of this process's own copies. */
struct frozen { u64 rw, rx, size; s32 fd; u32 lock, shift, copied; u8 done[]; }; /* see forking.py */
static struct frozen *frozen[256]; /* by the number of the code's range */

static long call(long n, u64 a, u64 b, u64 c, u64 d, u64 e, u64 f)
{
    register u64 r10 __asm__("r10") = d;
    register u64 r8 __asm__("r8") = e;
    register u64 r9 __asm__("r9") = f;
    long ret;
    __asm__ volatile("syscall" : "=a"(ret) : "a"(n), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8), "r"(r9) : "rcx", "r11", "memory");
    return ret;
}

static int failed(long result) { return result < 0 && result > -4096; }

static int map_both(const struct frozen *f, u64 at, u64 size)
{
    return !failed(call(SYS_mmap, f->rx + at, size, READ | EXEC, SHARED_FIXED, (u64)(u32)f->fd, at)) &&
           !failed(call(SYS_mmap, f->rw + at, size, READ | WRITE, SHARED_FIXED, (u64)(u32)f->fd, at));
}

/* In the handler of SIGSEGV: whether the access is to be done again. */
int frozen_fault(u64 address)
{
    for (u32 i = 0; i < 256; i++) {
        struct frozen *f = __atomic_load_n(&frozen[i], __ATOMIC_SEQ_CST);
        if (!f || address - f->rw >= f->size)
            continue;
        u64 piece = (address - f->rw) >> f->shift, at = piece << f->shift, size = 1ul << f->shift;
        int good = 1;
        spin_lock(&f->lock);
        if (!f->done[piece]) { /* nobody writes it meanwhile: whoever would is here */
            good = call(SYS_pwrite64, (u64)(u32)f->fd, f->rw + at, size, at, 0, 0) == (long)size && map_both(f, at, size);
            f->done[piece] = (u8)good;
            f->copied += (u32)good;
        }
        spin_unlock(&f->lock);
        return good;
    }
    return 0;
}

/* Freeze the first f->size bytes of a buffer of *whole* bytes; the rest of it comes from f->fd, empty. The world is stopped. 0, or an
 * error number. With f 0 nothing is frozen any more. */
EXPORTED long tcg_freeze(int range, struct frozen *f, u64 whole)
{
    __atomic_store_n(&frozen[range], 0, __ATOMIC_SEQ_CST);
    if (!f)
        return 0;
    long result = f->size ? call(SYS_mprotect, f->rw, f->size, READ, 0, 0, 0) : 0;
    if (failed(result))
        return -result;
    __atomic_store_n(&frozen[range], f, __ATOMIC_SEQ_CST);
    return f->size < whole && !map_both(f, f->size, whole - f->size) ? 12 : 0;
}
