/*
 * Parts of the kernel's requests that libfuse does not pass on: set-id bits, O_TMPFILE, and times set to now.
 *
 * Makes the kernel leave set-id bits to daxemu (FUSE_HANDLE_KILLPRIV_V2), which libfuse before 3.17 cannot ask for.
 *
 * Without the flag the kernel asks for security.capability before each write(2). With the flag the kernel remembers that a
 * file has no security.capability, and flags each request whose write clears the set-id bits; libfuse drops the flag.
 */
#include <linux/fuse.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#include "supplement.h"

#define TMPFILE 51 /* FUSE_TMPFILE, which older headers lack */

/* True if the request that Python handles now clears set-id bits. Read by host/fuse/supplement.py. */
int daxemu_kill_suidgid;

/* True if that request sets both times to now, as touch(1) does (ATTR_TOUCH). Read by host/fuse/supplement.py. */
int daxemu_touch;

static uint64_t init_unique;
static int offered;

/*
 * libfuse before 3.17 does not know FUSE_TMPFILE (since v6.1). The request is a FUSE_CREATE in all but its number, with the
 * name "/" (vfs_tmpfile()), which no file can have. Operations.create() recognizes the request by that name; a request with
 * any other name stays unknown to libfuse.
 */
static void make_tmpfile_a_create(struct fuse_in_header *in, size_t size)
{
	const char *name = (const char *)(in + 1) + sizeof(struct fuse_create_in);

	if (size >= sizeof(struct fuse_create_in) + 2 && !memcmp(name, "/", 2))
		in->opcode = FUSE_CREATE;
}

void daxemu_note_request(void *request, size_t size)
{
	struct fuse_in_header *in = request;
	const void *body = in + 1;

	daxemu_kill_suidgid = daxemu_touch = 0;
	if (size < sizeof(*in))
		return;
	size -= sizeof(*in);
	if (in->opcode == TMPFILE)
		make_tmpfile_a_create(in, size);
	if (in->opcode == FUSE_INIT && size >= offsetof(struct fuse_init_in, flags2)) {
		const struct fuse_init_in *init = body;

		init_unique = in->unique;
		offered = init->flags & FUSE_HANDLE_KILLPRIV_V2;
	} else if (in->opcode == FUSE_WRITE && size >= sizeof(struct fuse_write_in)) {
		const struct fuse_write_in *write = body;

		daxemu_kill_suidgid = write->write_flags & FUSE_WRITE_KILL_SUIDGID;
	} else if (in->opcode == FUSE_SETATTR && size >= sizeof(struct fuse_setattr_in)) {
		const struct fuse_setattr_in *attr = body;

		daxemu_kill_suidgid = attr->valid & FATTR_KILL_SUIDGID;
		daxemu_touch = attr->valid & FATTR_ATIME_NOW && attr->valid & FATTR_MTIME_NOW;
	} else if (in->opcode == FUSE_OPEN && size >= sizeof(struct fuse_open_in)) {
		const struct fuse_open_in *open = body;

		daxemu_kill_suidgid = open->open_flags & FUSE_OPEN_KILL_SUIDGID;
	}
}

ssize_t daxemu_writev(int fd, struct iovec *pieces, int count, void *userdata)
{
	const struct fuse_out_header *out = pieces[0].iov_base;

	(void)userdata;
	if (offered && out->unique == init_unique && !out->error && count > 1 &&
	    pieces[1].iov_len >= offsetof(struct fuse_init_out, max_background)) {
		((struct fuse_init_out *)pieces[1].iov_base)->flags |= FUSE_HANDLE_KILLPRIV_V2;
		offered = 0;
	}
	return writev(fd, pieces, count);
}
