/*
 * Features that pyfuse3 lacks: the id of the calling thread, the mark of a write by the page cache, operations without a
 * handler in pyfuse3, and the capabilities to ask the kernel for at the start.
 *
 * Loaded RTLD_GLOBAL before pyfuse3, so that pyfuse3 calls the fuse_session_new() of this file, which wraps the init, read
 * and write handlers: the caller's thread id and the writepage flag ride in the upper bits of the file handle, which daxemu's
 * handles leave free (see host/fuse/supplement.py for the layout). The other operations go to one callback, which answers the
 * request with libfuse's own fuse_reply_*() now or later. Then libfuse's own fuse_session_new() does the work.
 *
 * Everything here runs in pyfuse3's thread, inside fuse_session_process_buf().
 *
 * Built against libfuse 3.10 to 3.16: from 3.17 on fuse_session_new() is a macro over a versioned function.
 */
#define FUSE_USE_VERSION 35
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fuse_lowlevel.h>
#include <stdint.h>
#include <string.h>

#include "supplement.h"

#define TID_SHIFT 40
#define WRITEPAGE_BIT 63

enum { OP_FALLOCATE = 1, OP_LSEEK, OP_COPY_FILE_RANGE, OP_IOCTL };

/* One request for Python. supplement.py repeats the layout: change both, and the version. */
struct daxemu_request {
	fuse_req_t req;
	uint64_t op, tid;
	uint64_t ino, fh;
	int64_t offset, length; /* offset: of an ioctl its argument, an address of the caller's */
	int64_t mode; /* fallocate's mode, lseek's whence, ioctl's command, copy_file_range's flags */
	uint64_t target_ino, target_fh;
	int64_t target_offset;
	const void *data;
	uint64_t data_size, room;
};

const int daxemu_supplement_version = 6;

/* Count, then size and offsets of struct daxemu_request: host/fuse/structs.py has the same, and compares. */
#define AT(field) offsetof(struct daxemu_request, field)
const uint32_t daxemu_request_layout[] = {
	15, sizeof(struct daxemu_request), AT(req), AT(op), AT(tid), AT(ino), AT(fh), AT(offset), AT(length), AT(mode),
	AT(target_ino), AT(target_fh), AT(target_offset), AT(data), AT(data_size), AT(room),
};
#undef AT

/* True if requests come through answers.c: since 3.14 libfuse accepts a read function (fuse_session_custom_io()). */
#define READS (FUSE_VERSION >= FUSE_MAKE_VERSION(3, 14))
const int daxemu_reads = READS;

void (*daxemu_handler)(const struct daxemu_request *request);

static struct fuse_lowlevel_ops wrapped;

static void hand_over(struct daxemu_request *request)
{
	request->tid = fuse_req_ctx(request->req)->pid;
	if (daxemu_handler)
		daxemu_handler(request);
	else
		fuse_reply_err(request->req, ENOSYS);
}

static void supplement_fallocate(fuse_req_t req, fuse_ino_t ino, int mode, off_t offset, off_t length,
				 struct fuse_file_info *fi)
{
	struct daxemu_request request = {.req = req,	      .op = OP_FALLOCATE, .ino = ino,	.fh = fi->fh,
					 .offset = offset, .length = length,   .mode = mode};

	hand_over(&request);
}

static void supplement_lseek(fuse_req_t req, fuse_ino_t ino, off_t off, int whence, struct fuse_file_info *fi)
{
	struct daxemu_request request = {
		.req = req, .op = OP_LSEEK, .ino = ino, .fh = fi->fh, .offset = off, .mode = whence};

	hand_over(&request);
}

static void supplement_copy_file_range(fuse_req_t req, fuse_ino_t ino_in, off_t off_in, struct fuse_file_info *fi_in,
				       fuse_ino_t ino_out, off_t off_out, struct fuse_file_info *fi_out, size_t len,
				       int flags)
{
	struct daxemu_request request = {.req = req,
					 .op = OP_COPY_FILE_RANGE,
					 .ino = ino_in,
					 .fh = fi_in->fh,
					 .offset = off_in,
					 .length = len > INT64_MAX ? INT64_MAX : (int64_t)len,
					 .mode = flags,
					 .target_ino = ino_out,
					 .target_fh = fi_out->fh,
					 .target_offset = off_out};

	hand_over(&request);
}

static void supplement_ioctl(fuse_req_t req, fuse_ino_t ino, unsigned int cmd, void *arg, struct fuse_file_info *fi,
			     unsigned flags, const void *in_buf, size_t in_bufsz, size_t out_bufsz)
{
	struct daxemu_request request = {.req = req,	 .op = OP_IOCTL,       .ino = ino,	     .fh = fi->fh,
					 .offset = (int64_t)(uintptr_t)arg,
					 .mode = cmd, .data = in_buf, .data_size = in_bufsz, .room = out_bufsz};

	(void)flags;
	hand_over(&request);
}

static struct fuse_file_info tagged(fuse_req_t req, const struct fuse_file_info *fi)
{
	struct fuse_file_info copy = *fi;

	copy.fh |= (uint64_t)fuse_req_ctx(req)->pid << TID_SHIFT;
	copy.fh |= (uint64_t)fi->writepage << WRITEPAGE_BIT;
	return copy;
}

/*
 * The kernel drops a file's whole page cache when it sees a new mtime or size, unless the filesystem declares that it
 * invalidates explicitly: a mere stat(2) would unmap every page. daxemu is the only writer, and revokes changed ranges.
 */
static void supplement_init(void *userdata, struct fuse_conn_info *conn)
{
	if (wrapped.init)
		wrapped.init(userdata, conn);
	conn->want &= ~FUSE_CAP_AUTO_INVAL_DATA;
	/* The kernel drops cached pages behind a direct write only if it waited for the write. */
	conn->want &= ~FUSE_CAP_ASYNC_DIO;
	if (conn->capable & FUSE_CAP_EXPLICIT_INVAL_DATA)
		conn->want |= FUSE_CAP_EXPLICIT_INVAL_DATA;
	/* A default ACL replaces the umask, so only the filesystem can apply the umask. */
	if (conn->capable & FUSE_CAP_DONT_MASK)
		conn->want |= FUSE_CAP_DONT_MASK;
}

static void supplement_read(fuse_req_t req, fuse_ino_t ino, size_t size, off_t off, struct fuse_file_info *fi)
{
	struct fuse_file_info copy = tagged(req, fi);

	wrapped.read(req, ino, size, off, &copy);
}

static void supplement_write(fuse_req_t req, fuse_ino_t ino, const char *buf, size_t size, off_t off,
			     struct fuse_file_info *fi)
{
	struct fuse_file_info copy = tagged(req, fi);

	wrapped.write(req, ino, buf, size, off, &copy);
}

/* libfuse prefers write_buf to write, and pyfuse3 has both. */
static void supplement_write_buf(fuse_req_t req, fuse_ino_t ino, struct fuse_bufvec *bufv, off_t off,
				 struct fuse_file_info *fi)
{
	struct fuse_file_info copy = tagged(req, fi);

	wrapped.write_buf(req, ino, bufv, off, &copy);
}

static void supplement_fsync(fuse_req_t req, fuse_ino_t ino, int datasync, struct fuse_file_info *fi)
{
	struct fuse_file_info copy = tagged(req, fi);

	wrapped.fsync(req, ino, datasync, &copy);
}

struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t op_size,
				      void *userdata)
{
	struct fuse_session *(*libfuse_session_new)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
						    void *);
	void *libfuse = dlopen("libfuse3.so.3", RTLD_LAZY | RTLD_NOLOAD);
	struct fuse_lowlevel_ops ours;
	struct fuse_session *session;

	if (!libfuse)
		return NULL;
	*(void **)&libfuse_session_new = dlsym(libfuse, "fuse_session_new");
	if (!libfuse_session_new)
		return NULL;
	memset(&wrapped, 0, sizeof(wrapped));
	memcpy(&wrapped, op, op_size < sizeof(wrapped) ? op_size : sizeof(wrapped));
	ours = wrapped;
	ours.init = supplement_init;
	ours.read = supplement_read;
	ours.write = supplement_write;
	if (wrapped.write_buf)
		ours.write_buf = supplement_write_buf;
	ours.fsync = supplement_fsync;
	ours.fallocate = supplement_fallocate;
	ours.lseek = supplement_lseek;
	ours.copy_file_range = supplement_copy_file_range;
	ours.ioctl = supplement_ioctl;
	session = libfuse_session_new(args, &ours, sizeof(ours), userdata);
#if READS
	const struct fuse_custom_io io = {.read = daxemu_read_request, .writev = daxemu_writev};

	/* Mounting replaces this descriptor by the right one. */
	if (session && fuse_session_custom_io(session, &io, 0)) {
		fuse_session_destroy(session);
		return NULL;
	}
#endif
	return session;
}
