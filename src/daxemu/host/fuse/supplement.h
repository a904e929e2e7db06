/* What the C files of the supplement have of each other. */
#ifndef DAXEMU_SUPPLEMENT_H
#define DAXEMU_SUPPLEMENT_H

#include <stddef.h>
#include <sys/types.h>
#include <sys/uio.h>

/* answers.c: struct fuse_custom_io's read. What comes from /dev/fuse and cannot be answered from a layout. */
ssize_t daxemu_read_request(int fd, void *buf, size_t size, void *userdata);

/* killpriv.c: look at a request that libfuse is given, and make it one that libfuse knows; and struct fuse_custom_io's writev. */
void daxemu_note_request(void *request, size_t size);
ssize_t daxemu_writev(int fd, struct iovec *pieces, int count, void *userdata);

#endif
