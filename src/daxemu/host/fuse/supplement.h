/* Functions that the C files of the supplement share. */
#ifndef DAXEMU_SUPPLEMENT_H
#define DAXEMU_SUPPLEMENT_H

#include <stddef.h>
#include <sys/types.h>
#include <sys/uio.h>

/* answers.c: struct fuse_custom_io's read. Returns requests from /dev/fuse that no layout can answer. */
ssize_t daxemu_read_request(int fd, void *buf, size_t size, void *userdata);

/* killpriv.c: inspects a request before libfuse does, and turns FUSE_TMPFILE into FUSE_CREATE. */
void daxemu_note_request(void *request, size_t size);
/* killpriv.c: struct fuse_custom_io's writev. */
ssize_t daxemu_writev(int fd, struct iovec *pieces, int count, void *userdata);

#endif
