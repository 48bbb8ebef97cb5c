/* The guest agent's protocol (frames.py has the host's side) and what its files share.

   A frame is a header and up to PAYLOAD_MAX bytes, little-endian, and goes out in one write, so that what the host sees
   of it is all or nothing. Streams of a call: 0 towards the guest, 1 and 2 (errors) towards the host. */
#pragma once
#include "sys.h"

enum { FRAME_MAX = 32768, VERSION = 1 };

struct header { u32 call; u16 kind, stream; u32 size; };

enum { PAYLOAD_MAX = FRAME_MAX - sizeof(struct header) };

enum kind {
	/* from the host */
	WELCOME = 1, /* the nonce of HELLO: what came before was not for this agent */
	REQUEST, /* stream is the verb, with MORE where pieces follow */
	CONTINUE, /* a further piece; stream is MORE or 0 */
	SIGNAL, /* u32 number, for the process group */
	RESIZE, /* u16 rows, columns, of the pty */
	CANCEL, /* forget the call: kill, close, say nothing more */
	GREET, /* another host than that which was greeted: forget all calls, and greet again */
	/* both ways */
	DATA = 8,
	END, /* of a stream; of stream 0 from the guest: nobody reads it any more */
	CREDIT, /* u32: so many bytes more may be sent in this stream */
	/* from the guest */
	HELLO = 16, /* "cardcage", u32 version, 8 bytes nonce */
	TAKEN, /* u32: bytes taken from the port since the last one, from WELCOME on */
	STARTED, /* u32 process id */
	EXITED, /* u32: the status, or 256 + signal */
	RESULT, /* i32 errno, 0 for success, then u8 subject of the error or what was asked for; ends the call */
};

enum { MORE = 0x8000 };

enum verb { RUN = 1, READ, WRITE, LIST, STAT, RENAME, REMOVE, MKDIR, TIME, SEED, PING, READLINK, SYMLINK, FREEZE,
	THAW, WATCH };

enum subject { PROGRAM, DIRECTORY, USER, RESOURCES };

/* Each request begins with this; strings follow, each with its NUL. */
struct request { u32 flags, mode; u64 value; };

enum { RUN_ENVIRONMENT = 1, RUN_INPUT = 2, RUN_OUTPUT = 4, RUN_ERRORS = 8, RUN_JOINED = 16, RUN_PTY = 32 };
enum { WRITE_APPEND = 1, WRITE_EXCLUSIVE = 2, WRITE_MODE = 4, STAT_LINK = 1, REMOVE_DIRECTORY = 1, MKDIR_PARENTS = 1 };

enum {
	CALLS = 128,
	BUFFER = 1 << 17, /* of a call: its request, then what its stream 0 has not taken: the host's window */
	WINDOW_OUT = 1 << 18, /* what each of streams 1 and 2 may send before the first CREDIT */
	LINK = 1 << 18, /* the host has at most so much under way that was not TAKEN */
};

enum state { FREE, ASKED, LIVE, DYING };

struct call {
	u32 id;
	u8 state, verb, exited, ending, pty;
	i32 in, out[2], pidfd, pid;
	u32 credit[2];
	u32 first, count, given;
	u8 data[BUFFER];
};

/* Strings of a request, one after another. */
struct strings { char *next, *end; };
char *take(struct strings *strings);

/* main.c */
void send(u32 id, enum kind kind, u32 stream, const void *data, u32 size);
void finish(struct call *call, long error, u8 subject);
void answer(struct call *call, const void *data, u32 size);
u8 *room(void); /* for the payload of the frame that is sent next */
i32 open_at(const char *path, long flags, long mode);
void close_fd(i32 *fd);

/* run.c */
void run(struct call *call, struct request *request, struct strings strings);

/* files.c */
void begin_file(struct call *call, struct request *request, struct strings strings);
long list(struct call *call);
