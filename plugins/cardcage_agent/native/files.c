/* Files, the clock and randomness. */
#include "agent.h"

struct record { u32 mode, uid, gid, links; i64 size, modified; u64 inode; };

static struct record record_of(const struct stat *stat)
{
	return (struct record){stat->mode, stat->uid, stat->gid, (u32)stat->links, stat->size,
			       stat->modified.sec * 1000000000 + stat->modified.nsec, stat->inode};
}

/* One read of the directory and a record of each name, as one frame: 8 KiB of entries never make more than that. */
long list(struct call *call)
{
	static u8 entries[8192] __attribute__((aligned(8)));
	u8 *to = room();
	long got = SYS3(getdents64, call->out[0], entries, sizeof entries);
	if (got <= 0)
		return got;
	u32 size = 0;
	for (long at = 0; at < got;) {
		struct dirent *entry = (struct dirent *)(entries + at);
		at += entry->size;
		if (same(entry->name, ".") || same(entry->name, ".."))
			continue;
		struct stat stat;
		if (SYS4(newfstatat, call->out[0], entry->name, &stat, AT_SYMLINK_NOFOLLOW) < 0)
			continue; /* removed meanwhile */
		struct record record = record_of(&stat);
		u16 name = (u16)length(entry->name);
		if (size + sizeof record + 2 + name > PAYLOAD_MAX)
			return -EIO;
		memcpy(to + size, &record, sizeof record);
		memcpy(to + size + sizeof record, &name, 2);
		memcpy(to + size + sizeof record + 2, entry->name, name);
		size += sizeof record + 2 + name;
	}
	call->credit[0] -= size;
	if (size)
		send(call->id, DATA, 1, to, size);
	return 1;
}

static long make_directories(char *path, u32 mode, int parents)
{
	for (char *at = path + 1; parents && path[0] && *at; at++) {
		if (*at != '/')
			continue;
		*at = 0;
		long error = SYS2(mkdir, path, 0777);
		*at = '/';
		if (error < 0 && error != -EEXIST)
			return error;
	}
	long error = SYS2(mkdir, path, mode);
	if (error != -EEXIST || !parents)
		return error;
	struct stat stat;
	error = SYS4(newfstatat, AT_FDCWD, path, &stat, 0);
	return error < 0 || (stat.mode & S_IFMT) == S_IFDIR ? error : -EEXIST;
}

static long open_for_writing(struct call *call, struct request *request, char *path)
{
	long flags = O_WRONLY | O_CREAT | (request->flags & WRITE_EXCLUSIVE ? O_EXCL : 0);
	flags |= request->flags & WRITE_APPEND ? O_APPEND : O_TRUNC;
	call->in = open_at(path, flags, request->mode);
	if (call->in >= 0 && request->flags & WRITE_MODE)
		return SYS2(fchmod, call->in, request->mode);
	return call->in;
}

static long seed(const void *bytes, u64 size)
{
	struct { i32 bits, size; u8 bytes[512]; } pool;
	if (size > sizeof pool.bytes)
		return -EINVAL;
	pool.bits = (i32)size * 8;
	pool.size = (i32)size;
	memcpy(pool.bytes, bytes, size);
	i32 fd = open_at("/dev/urandom", O_WRONLY, 0);
	if (fd < 0)
		return fd;
	long error = SYS3(ioctl, fd, RNDADDENTROPY, &pool);
	if (error >= 0)
		error = SYS3(ioctl, fd, RNDRESEEDCRNG, 0);
	close_fd(&fd);
	return error;
}

/* What is frozen already, or thawed, is no error. */
static long freeze(const char *path, int on)
{
	i32 fd = open_at(path, O_RDONLY | O_DIRECTORY, 0);
	if (fd < 0)
		return fd;
	long error = SYS3(ioctl, fd, on ? FIFREEZE : FITHAW, 0);
	close_fd(&fd);
	return error == (on ? -EBUSY : -EINVAL) ? 0 : error;
}

/* Serve a request that is none to run something: READ, WRITE and LIST go on in the loop. */
void begin_file(struct call *call, struct request *request, struct strings strings)
{
	if (call->verb == SEED)
		return finish(call, seed(strings.next, (u64)(strings.end - strings.next)), 0);
	if (call->verb == PING)
		return finish(call, 0, 0);
	if (call->verb == TIME) {
		struct timespec time = {(i64)(request->value / 1000000000), (i64)(request->value % 1000000000)};
		return finish(call, SYS2(clock_settime, CLOCK_REALTIME, &time), 0);
	}
	char *path = take(&strings), *other = take(&strings);
	static char target[4096];
	struct stat stat;
	long error = -EINVAL;
	if (!path || ((call->verb == RENAME || call->verb == SYMLINK) && !other))
		return finish(call, error, 0);
	switch (call->verb) {
	case READ:
		error = call->out[0] = open_at(path, O_RDONLY, 0);
		if (error >= 0 && SYS4(newfstatat, AT_FDCWD, path, &stat, 0) >= 0 && (stat.mode & S_IFMT) == S_IFDIR)
			error = -EISDIR;
		break;
	case WATCH:
		error = call->out[0] = (i32)SYS1(inotify_init1, O_CLOEXEC | O_NONBLOCK);
		if (error >= 0)
			error = SYS3(inotify_add_watch, call->out[0], path, IN_CHANGES);
		break;
	case LIST:
		error = call->out[0] = open_at(path, O_RDONLY | O_DIRECTORY, 0);
		break;
	case WRITE:
		error = open_for_writing(call, request, path);
		break;
	case STAT:
		error = SYS4(newfstatat, AT_FDCWD, path, &stat, request->flags & STAT_LINK ? AT_SYMLINK_NOFOLLOW : 0);
		if (error >= 0) {
			struct record record = record_of(&stat);
			return answer(call, &record, sizeof record);
		}
		break;
	case READLINK:
		error = SYS3(readlink, path, target, sizeof target);
		if (error >= 0)
			return answer(call, target, (u32)error);
		break;
	case SYMLINK:
		return finish(call, SYS2(symlink, other, path), 0);
	case FREEZE:
	case THAW:
		return finish(call, freeze(path, call->verb == FREEZE), 0);
	case RENAME:
		return finish(call, SYS2(rename, path, other), 0);
	case REMOVE:
		return finish(call, SYS3(unlinkat, AT_FDCWD, path, request->flags & REMOVE_DIRECTORY ? AT_REMOVEDIR : 0), 0);
	case MKDIR:
		return finish(call, make_directories(path, request->mode, request->flags & MKDIR_PARENTS), 0);
	}
	if (error < 0)
		finish(call, error, 0);
}
