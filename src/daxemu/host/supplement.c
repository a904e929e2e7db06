/*
 * What pyfuse3 does not pass on: which thread asks, whether a write is the page cache's, and what to ask of the kernel at
 * the start.
 *
 * Loaded RTLD_GLOBAL before pyfuse3, so that pyfuse3's fuse_session_new() is this one. It wraps the init, read and
 * write handlers: the caller's thread id and the writepage flag ride in the upper bits of the file handle, which daxemu's
 * handles leave free (see host/supplement.py for the layout). Then libfuse's own fuse_session_new() does the work.
 *
 * Built against libfuse 3.10 to 3.16: from 3.17 on fuse_session_new() is a macro over a versioned function.
 */
#define FUSE_USE_VERSION 35
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fuse_lowlevel.h>
#include <stdint.h>
#include <string.h>

#define TID_SHIFT 40
#define WRITEPAGE_BIT 63

const int daxemu_supplement_version = 1;

static struct fuse_lowlevel_ops wrapped;

static struct fuse_file_info tagged(fuse_req_t req, const struct fuse_file_info *fi)
{
	struct fuse_file_info copy = *fi;

	copy.fh |= (uint64_t)fuse_req_ctx(req)->pid << TID_SHIFT;
	copy.fh |= (uint64_t)fi->writepage << WRITEPAGE_BIT;
	return copy;
}

/*
 * The kernel drops a file's whole page cache when it sees a new mtime or size, unless it is told that we see to it: then
 * nobody would have a page present after a mere stat(2). We are the only writer, and revoke what changes by range.
 */
static void supplement_init(void *userdata, struct fuse_conn_info *conn)
{
	if (wrapped.init)
		wrapped.init(userdata, conn);
	conn->want &= ~FUSE_CAP_AUTO_INVAL_DATA;
	if (conn->capable & FUSE_CAP_EXPLICIT_INVAL_DATA)
		conn->want |= FUSE_CAP_EXPLICIT_INVAL_DATA;
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

struct fuse_session *fuse_session_new(struct fuse_args *args, const struct fuse_lowlevel_ops *op, size_t op_size,
				      void *userdata)
{
	struct fuse_session *(*libfuse_session_new)(struct fuse_args *, const struct fuse_lowlevel_ops *, size_t,
						    void *);
	void *libfuse = dlopen("libfuse3.so.3", RTLD_LAZY | RTLD_NOLOAD);
	struct fuse_lowlevel_ops ours;

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
	return libfuse_session_new(args, &ours, sizeof(ours), userdata);
}
