/* Linux on x86-64 without a C library: types, system calls, and the few structures of the kernel's that we use. */
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;
typedef int i32;
typedef long i64;

enum {
	SYS_read = 0, SYS_write = 1, SYS_close = 3, SYS_poll = 7, SYS_ioctl = 16, SYS_dup2 = 33, SYS_nanosleep = 35,
	SYS_socket = 41, SYS_recvfrom = 45, SYS_bind = 49, SYS_clone = 56, SYS_execve = 59, SYS_kill = 62, SYS_fcntl = 72,
	SYS_chdir = 80, SYS_rename = 82, SYS_mkdir = 83, SYS_symlink = 88, SYS_readlink = 89, SYS_fchmod = 91, SYS_umask = 95, SYS_setuid = 105, SYS_setgid = 106,
	SYS_setsid = 112, SYS_setgroups = 116, SYS_rt_sigaction = 13, SYS_rt_sigprocmask = 14, SYS_getdents64 = 217,
	SYS_clock_settime = 227, SYS_exit_group = 231, SYS_waitid = 247, SYS_openat = 257, SYS_newfstatat = 262,
	SYS_inotify_add_watch = 254, SYS_inotify_init1 = 294,
	SYS_unlinkat = 263, SYS_pipe2 = 293, SYS_getrandom = 318,
};

enum { ENOENT = 2, EINTR = 4, EIO = 5, E2BIG = 7, EAGAIN = 11, EACCES = 13, EBUSY = 16, EEXIST = 17, ENOTDIR = 20, EISDIR = 21, EINVAL = 22, EPIPE = 32 };

enum {
	O_RDONLY = 0, O_WRONLY = 1, O_RDWR = 2, O_CREAT = 0100, O_EXCL = 0200, O_NOCTTY = 0400, O_TRUNC = 01000,
	O_APPEND = 02000, O_NONBLOCK = 04000, O_DIRECTORY = 0200000, O_CLOEXEC = 02000000,
	AT_FDCWD = -100, AT_SYMLINK_NOFOLLOW = 0x100, AT_REMOVEDIR = 0x200,
	F_GETFL = 3, F_SETFL = 4,
	POLLIN = 1, POLLOUT = 4, POLLERR = 8, POLLHUP = 16,
	P_PID = 1, P_PIDFD = 3, WNOHANG = 1, WEXITED = 4, WNOWAIT = 0x1000000,
	CLONE_VM = 0x100, CLONE_PIDFD = 0x1000, CLONE_VFORK = 0x4000, SIGCHLD = 17, SIGKILL = 9, SIGPIPE = 13,
	TIOCSWINSZ = 0x5414, TIOCSCTTY = 0x540E, TIOCSPTLCK = 0x40045431, TIOCGPTPEER = 0x5441,
	FIFREEZE = 0xC0045877, FITHAW = 0xC0045878,
	IN_CHANGES = 0x2 | 0x4 | 0x8 | 0x40 | 0x80 | 0x100 | 0x200 | 0x400 | 0x800,
	RNDADDENTROPY = 0x40085203, RNDRESEEDCRNG = 0x5207,
	AF_NETLINK = 16, SOCK_DGRAM = 2, SOCK_CLOEXEC = 02000000, NETLINK_KOBJECT_UEVENT = 15,
	GRND_INSECURE = 4, CLOCK_REALTIME = 0,
	S_IFMT = 0170000, S_IFDIR = 0040000,
};

struct pollfd { i32 fd; u16 events, revents; };
struct timespec { i64 sec, nsec; };
struct winsize { u16 rows, columns, x, y; };
struct sockaddr_nl { u16 family, pad; u32 pid, groups; };
struct siginfo { i32 signo, error, code, pad, pid; u32 uid; i32 status; u8 more[100]; };
struct dirent { u64 inode; i64 offset; u16 size; u8 type; char name[]; };
struct sigaction { void *handler; u64 flags; void *restorer; u64 mask; };
struct stat {
	u64 device, inode, links;
	u32 mode, uid, gid, pad;
	u64 of_device;
	i64 size, block_size, blocks;
	struct timespec accessed, modified, changed;
	i64 unused[3];
};

static inline long sys(long number, long a, long b, long c, long d, long e)
{
	long result;
	register long r10 __asm__("r10") = d;
	register long r8 __asm__("r8") = e;
	__asm__ volatile("syscall"
			 : "=a"(result)
			 : "a"(number), "D"(a), "S"(b), "d"(c), "r"(r10), "r"(r8)
			 : "rcx", "r11", "memory");
	return result;
}

#define SYS5(name, a, b, c, d, e) sys(SYS_##name, (long)(a), (long)(b), (long)(c), (long)(d), (long)(e))
#define SYS4(name, a, b, c, d) SYS5(name, a, b, c, d, 0)
#define SYS3(name, a, b, c) SYS4(name, a, b, c, 0)
#define SYS2(name, a, b) SYS3(name, a, b, 0)
#define SYS1(name, a) SYS2(name, a, 0)
#define SYS0(name) SYS1(name, 0)

void *memcpy(void *to, const void *from, u64 size);
void *memset(void *to, int value, u64 size);
u64 length(const char *text);
int same(const char *one, const char *other);
