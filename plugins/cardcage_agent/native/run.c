/* Processes: each leads a session of its own, so that a signal reaches all that it began. */
#include "agent.h"

enum { STRINGS = 8192, GROUPS = 64, FILE_MAX = 65536 };

static const char SEARCH[] = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

struct user { u32 uid, gid, groups[GROUPS], group_count; const char *home, *name; int given; };

/* Between clone and execve the child has our memory while we wait: it leaves its error here. */
struct plan {
	char **arguments, **environment, *directory;
	struct user user;
	i32 fds[3], terminal;
	long error;
	u8 subject;
};

static char *pointers[STRINGS + 2];
static char texts[2][FILE_MAX];
static u8 stack[16384] __attribute__((aligned(16)));

__attribute__((naked, noinline)) static long spawn(u64 flags __attribute__((unused)), void *top __attribute__((unused)),
						   i32 *pidfd __attribute__((unused)),
						   void (*child)(struct plan *) __attribute__((unused)),
						   struct plan *plan __attribute__((unused)))
{
	__asm__("movq %rcx, %r9\n\t"
		"xorl %r10d, %r10d\n\t"
		"movl $56, %eax\n\t" /* clone: rcx and r11 are lost, r8 and r9 kept */
		"syscall\n\t"
		"testq %rax, %rax\n\t"
		"jz 1f\n\t"
		"ret\n"
		"1:\txorl %ebp, %ebp\n\t"
		"movq %r8, %rdi\n\t"
		"call *%r9\n\t"
		"ud2");
}

static int number(const char *text, u32 *value)
{
	u64 found = 0;
	if (!*text)
		return 0;
	for (; *text; text++) {
		if (*text < '0' || *text > '9' || (found = found * 10 + (u64)(*text - '0')) > 0xFFFFFFFE)
			return 0;
	}
	*value = (u32)found;
	return 1;
}

/* The contents of a file of the guest's as text: what is beyond FILE_MAX is left out. */
static char *text_of(const char *path, char *text)
{
	i32 fd = open_at(path, O_RDONLY, 0);
	u64 size = 0;
	for (long got; fd >= 0 && size < FILE_MAX - 1 && (got = SYS3(read, fd, text + size, FILE_MAX - 1 - size)) > 0;)
		size += (u64)got;
	close_fd(&fd);
	text[size] = 0;
	return text;
}

/* Cut *at at the next separator, which may be the end; the part before it, NULL behind the end. */
static char *part(char **at, char separator)
{
	char *begin = *at, *end = begin;
	if (!begin)
		return 0;
	while (*end && *end != separator)
		end++;
	*at = *end ? end + 1 : 0;
	*end = 0;
	return begin;
}

static void find_groups(struct user *user)
{
	char *file = text_of("/etc/group", texts[1]);
	user->groups[user->group_count++] = user->gid;
	for (char *line; (line = part(&file, '\n')) && user->group_count < GROUPS;) {
		part(&line, ':');
		part(&line, ':');
		char *gid = part(&line, ':');
		for (char *member; (member = part(&line, ','));) {
			if (same(member, user->name) && gid && number(gid, &user->groups[user->group_count])) {
				user->group_count++;
				break;
			}
		}
	}
}

/* The user by name or number; an empty name is the agent's own, root. */
static int find_user(const char *name, struct user *user)
{
	user->given = *name != 0;
	user->name = *name ? name : "root";
	user->home = "/";
	int numeric = number(user->name, &user->uid);
	user->gid = user->uid;
	char *file = text_of("/etc/passwd", texts[0]);
	for (char *line; (line = part(&file, '\n'));) {
		char *entry = part(&line, ':');
		part(&line, ':');
		char *uid = part(&line, ':'), *gid = part(&line, ':');
		part(&line, ':');
		char *home = part(&line, ':');
		u32 found, group;
		if (!home || !number(uid, &found) || !number(gid, &group))
			continue;
		if (numeric ? found != user->uid : !same(entry, user->name))
			continue;
		user->uid = found;
		user->gid = group;
		user->name = entry;
		user->home = *home ? home : "/";
		find_groups(user);
		return 1;
	}
	if (numeric)
		user->groups[user->group_count++] = user->gid;
	return numeric || !*name;
}

static const char *value_of(char **environment, const char *name)
{
	for (; *environment; environment++) {
		u64 at = 0;
		while (name[at] && (*environment)[at] == name[at])
			at++;
		if (!name[at] && (*environment)[at] == '=')
			return *environment + at + 1;
	}
	return 0;
}

/* As execvp does: a name without a slash is looked for in PATH. */
static long execute(char **arguments, char **environment)
{
	char path[4096];
	const char *search = value_of(environment, "PATH"), *name = arguments[0];
	for (const char *at = name; *at; at++)
		if (*at == '/')
			return SYS3(execve, name, arguments, environment);
	long error = -ENOENT;
	u64 size = length(name);
	for (const char *at = search ? search : SEARCH; *name;) {
		const char *end = at;
		while (*end && *end != ':')
			end++;
		u64 folder = (u64)(end - at);
		if (folder + size + 2 <= sizeof path) {
			memcpy(path, at, folder);
			if (folder)
				path[folder++] = '/';
			memcpy(path + folder, name, size + 1);
			long found = SYS3(execve, path, arguments, environment);
			if (found != -ENOENT && found != -ENOTDIR)
				error = found;
			if (error != -ENOENT && error != -EACCES)
				break;
		}
		if (!*end)
			break;
		at = end + 1;
	}
	return error;
}

static void fail(struct plan *plan, long error, u8 subject)
{
	plan->error = error;
	plan->subject = subject;
	SYS1(exit_group, 127);
}

static void child(struct plan *plan)
{
	struct sigaction usual = {0};
	u64 none = 0;
	long error;
	for (int one = 1; one <= 64; one++) /* a shell's background job has SIGINT ignored, and so had what it ran */
		SYS4(rt_sigaction, one, &usual, 0, 8);
	SYS4(rt_sigprocmask, 2, &none, 0, 8);
	SYS0(setsid);
	i32 adjust = open_at("/proc/self/oom_score_adj", O_WRONLY, 0); /* ours is for us alone */
	SYS3(write, adjust, "0", 1);
	close_fd(&adjust);
	if (plan->terminal && (error = SYS3(ioctl, plan->fds[0], TIOCSCTTY, 0)) < 0)
		fail(plan, error, RESOURCES);
	for (i32 at = 0; at < 3; at++)
		if ((error = SYS2(dup2, plan->fds[at], at)) < 0)
			fail(plan, error, RESOURCES);
	struct user *user = &plan->user;
	if (user->given) {
		if ((error = SYS2(setgroups, user->group_count, user->groups)) < 0 || (error = SYS1(setgid, user->gid)) < 0 ||
		    (error = SYS1(setuid, user->uid)) < 0)
			fail(plan, error, USER);
	}
	SYS1(umask, 022);
	if ((error = SYS1(chdir, plan->directory)) < 0)
		fail(plan, error, DIRECTORY);
	fail(plan, execute(plan->arguments, plan->environment), PROGRAM);
}

static void add(char *to, u64 size, const char *name, const char *value)
{
	u64 first = length(name), second = length(value);
	if (first + second + 1 > size)
		second = size - first - 1;
	memcpy(to, name, first);
	memcpy(to + first, value, second);
	to[first + second] = 0;
}

/* The arguments and the environment, as pointers into the request; 0 where they do not fit or are not all there. */
static int place(struct plan *plan, struct request *request, struct strings strings)
{
	static char made[4][512];
	u64 arguments = request->value & 0xFFFFFFFF, variables = request->value >> 32, at = 0;
	if (!arguments || arguments > STRINGS || variables > STRINGS || arguments + variables + 6 > STRINGS)
		return 0;
	plan->arguments = pointers;
	for (; at < arguments; at++)
		if (!(pointers[at] = take(&strings)))
			return 0;
	pointers[at++] = 0;
	plan->environment = pointers + at;
	for (u64 left = variables; left; left--)
		if (!(pointers[at++] = take(&strings)))
			return 0;
	if (!(request->flags & RUN_ENVIRONMENT)) {
		add(made[0], sizeof made[0], "PATH=", SEARCH);
		add(made[1], sizeof made[1], "HOME=", plan->user.home);
		add(made[2], sizeof made[2], "USER=", plan->user.name);
		add(made[3], sizeof made[3], "LOGNAME=", plan->user.name);
		for (int index = 0; index < 4; index++)
			pointers[at++] = made[index];
	}
	pointers[at] = 0;
	return 1;
}

static long make_pipe(i32 *ours, i32 *theirs, int to_child)
{
	i32 pair[2];
	long error = SYS2(pipe2, pair, O_CLOEXEC);
	if (error < 0)
		return error;
	*ours = pair[to_child ? 1 : 0];
	*theirs = pair[to_child ? 0 : 1];
	return SYS3(fcntl, *ours, F_SETFL, O_NONBLOCK | (to_child ? O_WRONLY : O_RDONLY));
}

static long make_terminal(struct call *call, i32 *theirs, u32 size)
{
	i32 unlocked = 0;
	struct winsize window = {(u16)(size >> 16), (u16)size, 0, 0};
	call->out[0] = open_at("/dev/ptmx", O_RDWR, 0);
	if (call->out[0] < 0)
		return call->out[0];
	call->pty = 1;
	SYS3(ioctl, call->out[0], TIOCSPTLCK, &unlocked);
	SYS3(ioctl, call->out[0], TIOCSWINSZ, &window);
	long peer = SYS3(ioctl, call->out[0], TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
	*theirs = (i32)peer;
	call->in = call->out[0];
	return peer;
}

/* The streams: ours into *call*, the child's into *plan*; what is in *kept* is to be closed once the child has it. */
static long make_streams(struct call *call, struct plan *plan, struct request *request, i32 *kept)
{
	long error = 0;
	u32 flags = request->flags;
	if (flags & RUN_PTY) {
		error = make_terminal(call, &kept[0], request->mode);
		plan->terminal = 1;
		plan->fds[0] = plan->fds[1] = plan->fds[2] = kept[0];
		return error;
	}
	if ((kept[3] = open_at("/dev/null", O_RDWR, 0)) < 0)
		return kept[3];
	SYS3(fcntl, kept[3], F_SETFL, O_RDWR);
	for (int at = 0; at < 3; at++) {
		plan->fds[at] = kept[3];
		if (!(flags & (RUN_INPUT << at)))
			continue;
		if ((error = make_pipe(at ? &call->out[at - 1] : &call->in, &kept[at], at == 0)) < 0)
			return error;
		plan->fds[at] = kept[at];
	}
	if (flags & RUN_JOINED)
		plan->fds[2] = plan->fds[1];
	return 0;
}

/* Start the process that *request* describes: user, directory, arguments and variables are its strings. */
void run(struct call *call, struct request *request, struct strings strings)
{
	struct plan plan = {0};
	i32 kept[4] = {-1, -1, -1, -1};
	char *user = take(&strings), *directory = take(&strings);
	if (!user || !directory)
		return finish(call, -EINVAL, PROGRAM);
	if (!find_user(user, &plan.user))
		return finish(call, -ENOENT, USER);
	plan.directory = *directory ? directory : (char *)plan.user.home;
	if (!place(&plan, request, strings))
		return finish(call, -E2BIG, PROGRAM);
	long error = make_streams(call, &plan, request, kept);
	long pid = error < 0 ? error : spawn(CLONE_VM | CLONE_VFORK | CLONE_PIDFD | SIGCHLD, stack + sizeof stack, &call->pidfd, child, &plan);
	for (int at = 0; at < 4; at++)
		close_fd(&kept[at]);
	if (pid < 0)
		return finish(call, pid, RESOURCES);
	call->pid = (i32)pid;
	if (plan.error < 0) { /* its end is there already */
		call->exited = 1;
		return finish(call, plan.error, plan.subject);
	}
	u32 told = (u32)pid;
	send(call->id, STARTED, 0, &told, 4);
}
