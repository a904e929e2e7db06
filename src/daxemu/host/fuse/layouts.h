/* Layouts of files that the filesystem granted to C (fs/layouts.py). */
#ifndef DAXEMU_LAYOUTS_H
#define DAXEMU_LAYOUTS_H

#include <linux/fuse.h>
#include <stddef.h>
#include <stdint.h>

/* Bytes [start, end) of a file lie at byte `device` of the device. */
struct run {
	uint64_t start, end, device;
	int may_write;
};

/* Layout of one file: runs in order and disjoint. */
struct layout {
	struct layout *next;
	uint64_t ino, size;
	size_t written; /* index in `noted` plus 1; 0 if the file was not written since the last daxemu_noted */
	int told_kernel, has_attributes, has_no_caps;
	struct fuse_attr_out attributes;
	size_t count, room;
	struct run *runs;
};

/* Returns the layout of a file; NULL if it has none. */
struct layout *daxemu_layout_of(uint64_t ino);

/* Index of the first run that ends after a byte of the file. */
size_t daxemu_run_after(const struct layout *layout, uint64_t byte);

#endif
