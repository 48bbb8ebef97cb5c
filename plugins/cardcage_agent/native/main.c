/* The guest agent: one thread around poll, which reads what the host asks for from a virtio port and serves it. The port
   is the one with our name, or the device that an argument names.

   All that the host can make grow is a table of a fixed size. A stream that nobody reads stops at its credit and holds
   up no other; the port itself is always read, since each call has room for all that the host may send it. */
#include "agent.h"

static const char PORT[] = "org.cardcage.agent.0";
static const char PORTS[] = "/sys/class/virtio-ports";
static struct call calls[CALLS];
/* Frames go out together, before the next wait: output has whole ones up to pending, at most FRAME_MAX bytes, and room
   for another. */
static u8 input[2 * FRAME_MAX], output[2 * FRAME_MAX] __attribute__((aligned(8)));
static u32 filled, taken, pending;
static u8 nonce[8];
static int welcome;
static i32 port = -1;

void *memcpy(void *to, const void *from, u64 size)
{
	void *start = to;
	__asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
	return start;
}

void *memset(void *to, int value, u64 size)
{
	void *start = to;
	__asm__ volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(value) : "memory");
	return start;
}

u64 length(const char *text)
{
	u64 size = 0;
	while (text[size])
		size++;
	return size;
}

int same(const char *one, const char *other)
{
	while (*one && *one == *other)
		one++, other++;
	return *one == *other;
}

char *take(struct strings *strings)
{
	char *found = strings->next;
	for (char *at = found; at < strings->end; at++) {
		if (!*at) {
			strings->next = at + 1;
			return found;
		}
	}
	return 0;
}

/* Never waits: a FIFO without a peer, a device that is not ready. */
i32 open_at(const char *path, long flags, long mode)
{
	return (i32)SYS4(openat, AT_FDCWD, path, flags | O_CLOEXEC | O_NONBLOCK | O_NOCTTY, mode);
}

void close_fd(i32 *fd)
{
	if (*fd >= 0)
		SYS1(close, *fd);
	*fd = -1;
}

static void wait_for(i32 fd, u16 events, int milliseconds)
{
	struct pollfd one = {fd, events, 0};
	SYS3(poll, &one, 1, milliseconds);
}

u8 *room(void)
{
	return output + pending + sizeof(struct header);
}

static void flush(void)
{
	for (u32 at = 0; at < pending;) {
		long done = SYS3(write, port, output + at, pending - at);
		if (done > 0)
			at += (u32)done;
		else if (done == -EAGAIN || done == -EINTR || done == 0)
			wait_for(port, POLLOUT, 1000);
		else
			SYS1(exit_group, 1); /* the port is gone */
	}
	pending = 0;
}

void send(u32 id, enum kind kind, u32 stream, const void *data, u32 size)
{
	struct header header = {id, (u16)kind, (u16)stream, size};
	if (data != room())
		memcpy(room(), data, size);
	memcpy(output + pending, &header, sizeof header);
	u32 whole = sizeof header + size, before = pending;
	if (before + whole > FRAME_MAX) {
		flush();
		memcpy(output, output + before, whole); /* forwards, so that they may overlap */
	}
	pending += whole;
}

static void release(struct call *call)
{
	struct siginfo info;
	if (call->pty)
		call->in = -1; /* the same as out[0] */
	close_fd(&call->in);
	close_fd(&call->out[0]);
	close_fd(&call->out[1]);
	if (call->pid && !call->exited) {
		SYS2(kill, -call->pid, SIGKILL);
		SYS2(kill, call->pid, SIGKILL);
		call->state = DYING; /* until its end is there to be taken */
		return;
	}
	close_fd(&call->pidfd);
	if (call->pid)
		SYS5(waitid, P_PID, call->pid, &info, WEXITED, 0);
	call->state = FREE;
}

static void end_with(struct call *call, const void *data, u32 size, long error)
{
	i32 number = error < 0 ? (i32)-error : 0;
	u8 *to = room();
	if (size)
		memcpy(to + 4, data, size);
	memcpy(to, &number, 4);
	send(call->id, RESULT, 0, to, 4 + size);
	release(call);
}

void finish(struct call *call, long error, u8 subject)
{
	end_with(call, &subject, 1, error);
}

void answer(struct call *call, const void *data, u32 size)
{
	end_with(call, data, size, 0);
}

static void give_credit(struct call *call)
{
	send(call->id, CREDIT, 0, &call->given, 4);
	call->given = 0;
}

/* What the host sent for a stream's reader in the guest. */
static void pump_in(struct call *call)
{
	while (call->count) {
		u32 run = BUFFER - call->first < call->count ? BUFFER - call->first : call->count;
		long done = SYS3(write, call->in, call->data + call->first, run);
		if (done == -EAGAIN || done == -EINTR)
			break;
		if (done < 0 && call->verb == WRITE)
			return finish(call, done, 0);
		if (done < 0) { /* nobody reads it any more */
			if (!call->pty)
				close_fd(&call->in);
			call->count = 0;
			return send(call->id, END, 0, 0, 0);
		}
		call->first = (call->first + (u32)done) % BUFFER;
		call->count -= (u32)done;
		call->given += (u32)done;
	}
	if (call->given >= BUFFER / 2)
		give_credit(call);
	if (!call->count && call->ending && !call->pty) {
		close_fd(&call->in);
		if (call->verb == WRITE)
			finish(call, 0, 0);
	}
}

static void check_done(struct call *call)
{
	if (call->verb == RUN && call->exited && call->out[0] < 0 && call->out[1] < 0)
		release(call);
}

/* One piece of what the guest has for the host. */
static void pump_out(struct call *call, int at)
{
	u32 most = call->credit[at] < PAYLOAD_MAX ? call->credit[at] : PAYLOAD_MAX;
	long got;
	if (call->verb == LIST) {
		got = list(call);
	} else {
		got = SYS3(read, call->out[at], room(), most);
		if (got > 0) {
			call->credit[at] -= (u32)got;
			send(call->id, DATA, (u32)at + 1, room(), (u32)got);
		}
	}
	if (got > 0 || got == -EAGAIN || got == -EINTR)
		return;
	if (call->verb != RUN)
		return finish(call, got, 0);
	if (call->pty)
		call->in = -1;
	close_fd(&call->out[at]);
	send(call->id, END, (u32)at + 1, 0, 0);
	check_done(call);
}

static void ended(struct call *call)
{
	struct siginfo info = {0};
	if (call->state == DYING) {
		call->exited = 1;
		return release(call);
	}
	/* it stays a zombie until the call is over, so that its number is nobody else's */
	if (SYS5(waitid, P_PIDFD, call->pidfd, &info, WEXITED | WNOHANG | WNOWAIT, 0) < 0 || !info.pid)
		return;
	u32 status = info.code == 1 ? (u32)info.status & 0xFF : 256 + (u32)info.status;
	call->exited = 1;
	close_fd(&call->pidfd);
	send(call->id, EXITED, 0, &status, 4);
	check_done(call);
}

static struct call *find(u32 id)
{
	for (u32 at = 0; at < CALLS; at++)
		if ((calls[at].state == ASKED || calls[at].state == LIVE) && calls[at].id == id)
			return &calls[at];
	return 0;
}

static void ask(u32 id, u8 verb)
{
	for (u32 at = 0; at < CALLS; at++) {
		struct call *call = &calls[at];
		if (call->state != FREE)
			continue;
		memset(call, 0, __builtin_offsetof(struct call, data));
		call->id = id;
		call->state = ASKED;
		call->verb = verb;
		call->in = call->out[0] = call->out[1] = call->pidfd = -1;
		call->credit[0] = call->credit[1] = WINDOW_OUT;
		return;
	}
	u8 busy[5] = {EAGAIN, 0, 0, 0, RESOURCES};
	send(id, RESULT, 0, busy, sizeof busy);
}

static void begin(struct call *call)
{
	struct request request;
	struct strings strings = {(char *)call->data + sizeof request, (char *)call->data + call->count};
	if (call->count < sizeof request)
		return finish(call, -EINVAL, RESOURCES);
	memcpy(&request, call->data, sizeof request);
	call->count = 0;
	call->state = LIVE;
	if (call->verb == RUN)
		run(call, &request, strings);
	else if (call->verb >= READ && call->verb <= WATCH)
		begin_file(call, &request, strings);
	else
		finish(call, -EINVAL, RESOURCES);
}

static void store(struct call *call, const u8 *data, u32 size)
{
	if (call->in < 0)
		return;
	u32 at = (call->first + call->count) % BUFFER, run = BUFFER - at < size ? BUFFER - at : size;
	memcpy(call->data + at, data, run);
	memcpy(call->data, data + run, size - run);
	call->count += size;
	pump_in(call);
}

static void greet(void)
{
	u8 hello[20] = "cardcage";
	u32 version = VERSION;
	welcome = 0;
	SYS3(getrandom, nonce, sizeof nonce, GRND_INSECURE);
	memcpy(hello + 8, &version, 4);
	memcpy(hello + 12, nonce, sizeof nonce);
	send(0, HELLO, 0, hello, sizeof hello);
}

static void cancel(struct call *call)
{
	if (call->pid)
		SYS2(kill, -call->pid, SIGKILL); /* and what its leader left behind */
	release(call);
}

static void serve(struct header header, const u8 *data)
{
	u32 value = 0, size = header.size;
	memcpy(&value, data, size < 4 ? size : 4);
	if (!welcome) { /* it may be left from before the guest was reset */
		if (header.kind == WELCOME && size == 8) {
			welcome = 1;
			for (u32 at = 0; at < 8; at++)
				welcome &= data[at] == nonce[at];
		}
		return;
	}
	if (header.kind == GREET) { /* the guest was continued from a snapshot */
		for (u32 at = 0; at < CALLS; at++)
			if (calls[at].state == ASKED || calls[at].state == LIVE)
				cancel(&calls[at]);
		return greet();
	}
	if (header.kind == REQUEST)
		ask(header.call, (u8)header.stream);
	struct call *call = find(header.call);
	if (!call)
		return;
	switch (header.kind) {
	case REQUEST:
	case CONTINUE:
		if (call->state != ASKED || size > BUFFER - call->count)
			return finish(call, -E2BIG, RESOURCES);
		memcpy(call->data + call->count, data, size);
		call->count += size;
		if (!(header.stream & MORE))
			begin(call);
		break;
	case DATA:
		if (call->state != LIVE || size > BUFFER - call->count)
			return finish(call, -EINVAL, RESOURCES);
		store(call, data, size);
		break;
	case END:
		call->ending = 1;
		if (call->in >= 0)
			pump_in(call);
		break;
	case CREDIT:
		if (header.stream == 1 || header.stream == 2)
			call->credit[header.stream - 1] += value;
		break;
	case SIGNAL:
		if (call->pid)
			SYS2(kill, -call->pid, value);
		break;
	case RESIZE:
		if (call->pty && call->out[0] >= 0) {
			struct winsize window = {(u16)value, (u16)(value >> 16), 0, 0};
			SYS3(ioctl, call->out[0], TIOCSWINSZ, &window);
		}
		break;
	case CANCEL:
		cancel(call);
	}
}

static void receive(void)
{
	for (int turn = 0; turn < 32; turn++) { /* others get their turn */
		long got = SYS3(read, port, input + filled, sizeof input - filled);
		if (got == -EAGAIN || got == -EINTR)
			return;
		if (got == 0)
			return wait_for(-1, 0, 20); /* nobody is at the other end */
		if (got < 0)
			SYS1(exit_group, 1);
		filled += (u32)got;
		taken += (u32)got;
		u32 at = 0;
		for (struct header header; filled - at >= sizeof header;) {
			memcpy(&header, input + at, sizeof header);
			if (header.size > PAYLOAD_MAX)
				SYS1(exit_group, 2);
			if (filled - at < sizeof header + header.size)
				break;
			int before = welcome;
			serve(header, input + at + sizeof header);
			if (welcome && !before)
				taken = filled - at; /* the host counts from here */
			at += sizeof header + header.size;
		}
		if (welcome && taken >= LINK / 4) {
			u32 told = taken;
			taken = 0;
			send(0, TAKEN, 0, &told, 4);
		}
		filled -= at;
		if (at)
			memcpy(input, input + at, filled); /* forwards */
	}
}

/* Open the port by its name, once it is there (the kernel tells of each change in sysfs), or the one that was given. */
static void connect(const char *given)
{
	static u8 entries[4096] __attribute__((aligned(8)));
	char path[300], name[sizeof PORT];
	if (given && (port = open_at(given, O_RDWR, 0)) < 0)
		SYS1(exit_group, 1);
	if (given)
		return;
	struct sockaddr_nl address = {AF_NETLINK, 0, 0, 1};
	i32 news = (i32)SYS3(socket, AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC, NETLINK_KOBJECT_UEVENT);
	SYS3(bind, news, &address, sizeof address);
	while (port < 0) {
		i32 folder = open_at(PORTS, O_RDONLY | O_DIRECTORY, 0);
		for (long got; port < 0 && folder >= 0 && (got = SYS3(getdents64, folder, entries, sizeof entries)) > 0;) {
			for (long at = 0; at < got && port < 0;) {
				struct dirent *entry = (struct dirent *)(entries + at);
				u64 size = length(entry->name);
				at += entry->size;
				if (entry->name[0] == '.' || size > 64)
					continue;
				memcpy(path, entry->name, size);
				memcpy(path + size, "/name", 6);
				i32 file = (i32)SYS4(openat, folder, path, O_RDONLY | O_CLOEXEC, 0);
				long read = SYS3(read, file, name, sizeof name);
				close_fd(&file);
				if (read != sizeof name || name[sizeof PORT - 1] != '\n')
					continue;
				name[sizeof PORT - 1] = 0;
				if (!same(name, PORT))
					continue;
				memcpy(path, "/dev/", 5);
				memcpy(path + 5, entry->name, size + 1);
				port = open_at(path, O_RDWR, 0);
			}
		}
		close_fd(&folder);
		if (port < 0 && SYS5(recvfrom, news, entries, sizeof entries, 0, 0) < 0)
			wait_for(-1, 0, 100);
	}
	close_fd(&news);
}

static void loop(void)
{
	static struct pollfd polled[1 + 4 * CALLS];
	static struct { u8 call, what; } of[1 + 4 * CALLS];
	for (;;) {
		u32 count = 1;
		polled[0] = (struct pollfd){port, POLLIN, 0};
		for (u32 at = 0; at < CALLS; at++) {
			struct call *call = &calls[at];
			if (call->state != LIVE && call->state != DYING)
				continue;
			i32 fds[4] = {call->count ? call->in : -1, call->out[0], call->out[1], call->pidfd};
			for (u8 what = 0; what < 4; what++) {
				u32 least = call->verb == LIST || call->verb == WATCH ? PAYLOAD_MAX : 1;
				if (fds[what] < 0 || ((what == 1 || what == 2) && call->credit[what - 1] < least))
					continue;
				polled[count] = (struct pollfd){fds[what], what ? POLLIN : POLLOUT, 0};
				of[count].call = (u8)at;
				of[count++].what = what;
			}
		}
		flush();
		if (SYS3(poll, polled, count, -1) < 0)
			continue;
		for (u32 at = 1; at < count; at++) { /* before the port, whose news may free these */
			struct call *call = &calls[of[at].call];
			u8 what = of[at].what;
			if (!polled[at].revents || (call->state != LIVE && call->state != DYING))
				continue;
			if (what == 3)
				ended(call);
			else if (call->state == LIVE && what == 0 && call->in >= 0)
				pump_in(call);
			else if (call->state == LIVE && what && call->out[what - 1] >= 0)
				pump_out(call, what - 1);
		}
		if (polled[0].revents)
			receive();
	}
}

__attribute__((used, noreturn)) static void start(const u64 *stack)
{
	const char *const *arguments = (const char *const *)(stack + 1);
	struct sigaction ignore = {(void *)1, 0, 0, 0};
	SYS4(rt_sigaction, SIGPIPE, &ignore, 0, 8);
	SYS0(setsid);
	i32 adjust = open_at("/proc/self/oom_score_adj", O_WRONLY, 0); /* the last to go when memory runs out */
	SYS3(write, adjust, "-1000", 5);
	close_fd(&adjust);
	connect(stack[0] > 1 ? arguments[1] : 0);
	greet();
	loop();
	__builtin_unreachable();
}

__attribute__((naked, noreturn, used)) void _start(void)
{
	__asm__("xorl %ebp, %ebp\n\tmovq %rsp, %rdi\n\tandq $-16, %rsp\n\tcall start");
}
