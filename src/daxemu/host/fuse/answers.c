/*
 * Answers READ, WRITE, GETATTR and GETXATTR from layouts, without Python, and notes RELEASE and FORGET for Python.
 *
 * Python remains the authority: the filesystem grants a layout (layouts.h) after it has answered for the file itself, and
 * breaks the layout when any part of it changes. Requests that no layout covers go to Python.
 *
 * The code runs where libfuse reads its requests, so in the event loop's own thread. Python learns of everything done here
 * (daxemu_noted) before it looks at any state: neither side sees the other halfway. The GIL is released meanwhile.
 */
#define PY_SSIZE_T_CLEAN
#define _GNU_SOURCE
#include <Python.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "layouts.h"
#include "supplement.h"

#define MAX_PIECES 32
#define CAPS "security.capability"
#define SECOND 1000000000LL

/* Stores of this many bytes or more use pwrite(2), which does not fault in memory that is not mapped yet. */
#define PWRITE_FROM 16384

/* Waits in vain after which to sleep at once, and the number of waits after which to spin again all the same. */
#define TRUST 4
#define RETRY 64

enum { WRITTEN = 1, GROWN, RELEASED, FORGOTTEN };

/* One change to report to Python. host/fuse/layouts.py repeats the layout. */
struct noted {
	uint64_t what;
	uint64_t which; /* the inode; of RELEASED the file handle */
	int64_t value;	/* of WRITTEN the time, in ns since the epoch; of GROWN the size; of FORGOTTEN the number of lookups */
};

/* Count, then sizes and offsets: host/fuse/structs.py has the same, and compares. */
#define AT(field) offsetof(struct noted, field)
#define ATTR(field) offsetof(struct fuse_attr_out, field)
const uint32_t daxemu_answers_layout[] = {
	24, sizeof(struct noted), AT(what), AT(which), AT(value),
	sizeof(struct fuse_attr_out), ATTR(attr_valid), ATTR(attr_valid_nsec), ATTR(dummy), ATTR(attr.ino), ATTR(attr.size),
	ATTR(attr.blocks), ATTR(attr.atime), ATTR(attr.mtime), ATTR(attr.ctime), ATTR(attr.atimensec),
	ATTR(attr.mtimensec), ATTR(attr.ctimensec), ATTR(attr.mode), ATTR(attr.nlink), ATTR(attr.uid), ATTR(attr.gid),
	ATTR(attr.rdev), ATTR(attr.blksize), ATTR(attr.blksize) + 4 /* flags; older headers: padding */,
};
#undef AT
#undef ATTR

static struct noted *noted;
static size_t noted_count, noted_room;
static char *device; /* bytes of the device, mapped */
static int media_fd = -1;
static off_t media_start; /* offset in the media file at which the device begins */

/* Set by host/fuse/layouts.py: called with the GIL held, before Python runs. NULL: all requests go to Python. */
void (*daxemu_noted)(const struct noted *noted, size_t count);

/* Time in ns of CLOCK_MONOTONIC at which other tasks of the event loop must run. Set by host/fuse/loop.py. */
int64_t daxemu_burst_ends;
/* Time in ns for which the event loop waits for the next request alone: first awake, then asleep. */
int64_t daxemu_spin, daxemu_linger;
/* True after a wait of that time without a request. */
int daxemu_is_idle;
/* Number of requests that did not go to Python. */
uint64_t daxemu_answered;

static int64_t now(clockid_t clock)
{
	struct timespec t;

	clock_gettime(clock, &t);
	return t.tv_sec * SECOND + t.tv_nsec;
}

/* Sets the place of the device's bytes: in a file from `start` on, and mapped at `base`. */
void daxemu_layouts_device(int fd, off_t start, char *base)
{
	media_fd = fd;
	media_start = start;
	device = base;
}

/* ---- answers ---- */

/* Lists the memory of the file's bytes [start, end), in order; 0 if the layout does not cover all (for writing). */
static int pieces_of(const struct layout *layout, uint64_t start, uint64_t end, int write, struct iovec *pieces)
{
	size_t next = daxemu_run_after(layout, start);
	int count = 0;

	for (; start < end; next++) {
		const struct run *run = &layout->runs[next];

		if (next == layout->count || run->start > start || (write && !run->may_write) || count == MAX_PIECES)
			return 0;
		uint64_t stop = run->end < end ? run->end : end;

		pieces[count++] = (struct iovec){device + run->device + (start - run->start), stop - start};
		start = stop;
	}
	return count;
}

/* Sends a reply. True if the kernel took the reply, or wants none any more; if false, Python must answer. */
static int reply(int fd, uint64_t unique, struct iovec *pieces, int count, size_t size)
{
	struct fuse_out_header out = {.len = sizeof(out) + size, .unique = unique};

	pieces[0] = (struct iovec){&out, sizeof(out)};
	return writev(fd, pieces, count + 1) >= 0 || errno == ENOENT;
}

static int answer_read(int fd, const struct fuse_in_header *in, const struct fuse_read_in *wanted)
{
	const struct layout *layout = daxemu_layout_of(in->nodeid);
	struct iovec pieces[MAX_PIECES + 1];
	uint64_t end = wanted->offset + wanted->size;
	int count = 0;

	if (!layout || wanted->offset >= layout->size)
		return 0;
	if (end > layout->size)
		end = layout->size;
	count = pieces_of(layout, wanted->offset, end, 0, pieces + 1);
	if (!count)
		return 0;
	return reply(fd, in->unique, pieces, count, end - wanted->offset);
}

static int store(const struct iovec *piece, const char *data)
{
	ssize_t done;

	if (piece->iov_len >= PWRITE_FROM) {
		done = pwrite(media_fd, data, piece->iov_len, media_start + ((char *)piece->iov_base - device));
		return done == (ssize_t)piece->iov_len;
	}
	memcpy(piece->iov_base, data, piece->iov_len);
	return 1;
}

/* Makes the kernel drop the file's attributes: it does not know that a page written back changes the times. */
static void tell_kernel(int fd, struct layout *layout)
{
	struct fuse_notify_inval_inode_out body = {.ino = layout->ino, .off = -1};
	struct fuse_out_header out = {.len = sizeof(out) + sizeof(body), .error = FUSE_NOTIFY_INVAL_INODE};
	struct iovec pieces[] = {{&out, sizeof(out)}, {&body, sizeof(body)}};

	/* ENOENT: the kernel has forgotten the file, and caches no old attributes. */
	layout->told_kernel = writev(fd, pieces, 2) >= 0 || errno == ENOENT;
}

/* True if memory for `count` further notes is available. */
static int room_for(size_t count)
{
	size_t room = noted_room ? noted_room : 64;
	struct noted *grown;

	while (room < noted_count + count)
		room *= 2;
	if (room > noted_room) {
		if (!(grown = realloc(noted, room * sizeof(*noted))))
			return 0;
		noted = grown;
		noted_room = room;
	}
	return 1;
}

/* Precondition: room_for() returned true. */
static void note(uint64_t what, uint64_t which, int64_t value)
{
	if (noted_count == noted_room)
		abort();
	noted[noted_count++] = (struct noted){what, which, value};
}

/* Precondition: room_for(2) returned true. */
static void note_written(struct layout *layout, uint64_t end)
{
	if (!layout->written) {
		note(WRITTEN, layout->ino, 0);
		layout->written = noted_count;
	}
	noted[layout->written - 1].value = now(CLOCK_REALTIME);
	layout->has_attributes = 0;
	if (end > layout->size) {
		layout->size = end;
		note(GROWN, layout->ino, end);
	}
}

static int answer_write(int fd, const struct fuse_in_header *in, const struct fuse_write_in *what, size_t room)
{
	struct layout *layout = daxemu_layout_of(in->nodeid);
	struct iovec pieces[MAX_PIECES + 1];
	struct fuse_write_out done = {.size = what->size};
	const char *data = (const char *)(what + 1);
	int count;

	if (!layout || what->size > room)
		return 0;
	/* A write may pass the end of file within the last block: the rest of that block is zero. */
	count = pieces_of(layout, what->offset, what->offset + what->size, 1, pieces);
	if (!count || !room_for(2))
		return 0;
	for (int i = 0; i < count; data += pieces[i++].iov_len)
		if (!store(&pieces[i], data))
			return 0; /* Python stores all bytes anew, and reports an error if it cannot */
	note_written(layout, what->offset + what->size);
	if (what->write_flags & FUSE_WRITE_CACHE && !layout->told_kernel)
		tell_kernel(fd, layout);
	pieces[1] = (struct iovec){&done, sizeof(done)};
	return reply(fd, in->unique, pieces, 1, sizeof(done));
}

static int answer_getattr(int fd, const struct fuse_in_header *in)
{
	struct layout *layout = daxemu_layout_of(in->nodeid);
	struct iovec pieces[2];

	if (!layout || !layout->has_attributes)
		return 0;
	pieces[1] = (struct iovec){&layout->attributes, sizeof(layout->attributes)};
	return reply(fd, in->unique, pieces, 1, sizeof(layout->attributes));
}

/* The kernel asks for security.capability before every write(2). */
static int answer_getxattr(int fd, const struct fuse_in_header *in, const char *name, size_t room)
{
	struct fuse_out_header out = {.len = sizeof(out), .error = -ENODATA, .unique = in->unique};
	struct layout *layout = daxemu_layout_of(in->nodeid);

	if (!layout || !layout->has_no_caps || room != sizeof(CAPS) || memcmp(name, CAPS, sizeof(CAPS)))
		return 0;
	return write(fd, &out, sizeof(out)) >= 0 || errno == ENOENT;
}

/* The closing process does not wait for the result. */
static int answer_release(int fd, const struct fuse_in_header *in, const struct fuse_release_in *what)
{
	struct iovec pieces[1];

	if (!room_for(1) || !reply(fd, in->unique, pieces, 0, 0))
		return 0;
	note(RELEASED, what->fh, 0);
	return 1;
}

static int take_forget(const struct fuse_in_header *in, const struct fuse_forget_in *what)
{
	if (!room_for(1))
		return 0;
	note(FORGOTTEN, in->nodeid, what->nlookup);
	return 1;
}

static int take_forgets(const struct fuse_batch_forget_in *what, size_t room)
{
	const struct fuse_forget_one *each = (const void *)(what + 1);

	if (what->count > room / sizeof(*each) || !room_for(what->count))
		return 0;
	for (size_t i = 0; i < what->count; i++)
		note(FORGOTTEN, each[i].nodeid, each[i].nlookup);
	return 1;
}

static int answer(int fd, const void *request, size_t size)
{
	const struct fuse_in_header *in = request;
	const void *body = in + 1;

	if (!daxemu_noted || size < sizeof(*in) || in->len != size)
		return 0;
	size -= sizeof(*in);
	if (in->opcode == FUSE_GETATTR)
		return answer_getattr(fd, in);
	if (in->opcode == FUSE_GETXATTR && size >= sizeof(struct fuse_getxattr_in))
		return answer_getxattr(fd, in, (const char *)body + sizeof(struct fuse_getxattr_in),
				       size - sizeof(struct fuse_getxattr_in));
	if (in->opcode == FUSE_RELEASE && size >= sizeof(struct fuse_release_in))
		return answer_release(fd, in, body);
	if (in->opcode == FUSE_FORGET && size >= sizeof(struct fuse_forget_in))
		return take_forget(in, body);
	if (in->opcode == FUSE_BATCH_FORGET && size >= sizeof(struct fuse_batch_forget_in))
		return take_forgets(body, size - sizeof(struct fuse_batch_forget_in));
	if (in->opcode == FUSE_READ && size >= sizeof(struct fuse_read_in))
		return answer_read(fd, in, body);
	if (in->opcode == FUSE_WRITE && size >= sizeof(struct fuse_write_in))
		return answer_write(fd, in, body, size - sizeof(struct fuse_write_in));
	return 0;
}

/* ---- reading requests ---- */

/*
 * A process that has just got an answer often sends the next request at once. Spinning then saves the time of a wake-up;
 * but where the process waits for this processor, spinning delays it. So the wait spins as long as spinning helped lately.
 */
static ssize_t read_awake(int fd, void *buf, size_t size)
{
	static unsigned in_vain, asleep;
	int awake = in_vain < TRUST || ++asleep % RETRY == 0;
	int64_t until = now(CLOCK_MONOTONIC) + daxemu_spin;
	ssize_t got = read(fd, buf, size);

	if (!awake || !daxemu_spin || got >= 0 || errno != EAGAIN)
		return got;
	do
		got = read(fd, buf, size);
	while (got < 0 && errno == EAGAIN && now(CLOCK_MONOTONIC) < until);
	in_vain = got < 0 ? in_vain + 1 : 0;
	return got;
}

/* Returns the next request if it comes soon; otherwise -1 and EINTR, on which pyfuse3 waits once more. */
static ssize_t next_request(int fd, void *buf, size_t size)
{
	struct pollfd wanted = {.fd = fd, .events = POLLIN};
	struct timespec linger = {.tv_nsec = daxemu_linger};
	ssize_t got = read_awake(fd, buf, size);

	if (got >= 0 || errno != EAGAIN)
		return got;
	if (ppoll(&wanted, 1, &linger, NULL) > 0)
		got = read(fd, buf, size);
	else
		daxemu_is_idle = 1;
	if (got < 0 && errno == EAGAIN)
		errno = EINTR;
	return got;
}

static ssize_t next_for_python(int fd, void *buf, size_t size)
{
	ssize_t got;

	do {
		got = next_request(fd, buf, size);
		if (got < 0 || !answer(fd, buf, got))
			return got;
		daxemu_answered++;
	} while (now(CLOCK_MONOTONIC) < daxemu_burst_ends);
	errno = EINTR;
	return -1;
}

static void tell_python(void)
{
	size_t count = noted_count;

	for (size_t i = 0; i < count; i++)
		if (noted[i].what == WRITTEN) {
			struct layout *layout = daxemu_layout_of(noted[i].which);

			layout->written = layout->told_kernel = 0;
		}
	noted_count = 0;
	daxemu_noted(noted, count);
}

ssize_t daxemu_read_request(int fd, void *buf, size_t size, void *userdata)
{
	static int nonblocking = -1;
	ssize_t got;
	int error;

	(void)userdata;
	daxemu_is_idle = 0;
	if (fd != nonblocking && fcntl(fd, F_SETFL, fcntl(fd, F_GETFL) | O_NONBLOCK) == 0)
		nonblocking = fd;
	Py_BEGIN_ALLOW_THREADS;
	got = next_for_python(fd, buf, size);
	error = errno;
	Py_END_ALLOW_THREADS;
	if (noted_count)
		tell_python();
	if (got >= 0)
		daxemu_note_request(buf, got);
	errno = error;
	return got;
}
