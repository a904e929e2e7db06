/* What host/victims.py and the C beside it say to each other. The layouts are victims.py's too: change both, and VERSION. */
#include <stdint.h>

#define VERSION 1

/* -- victims_collect.c */

struct daxemu_wanted {
	uint64_t ino, first, end; /* pages of the file */
};

struct daxemu_search {
	uint32_t major, minor; /* the device that /proc shows the files to be on */
	const struct daxemu_wanted *wanted;
	uint32_t nr_wanted; /* 0: only whether there is any mapping of the device; then ASK */
};

struct daxemu_process {
	int32_t pid; /* in; the others are out */
	int32_t verdict;
	uint32_t nr_runs, nr_threads;
	uint64_t flags; /* task->flags of the leader */
	char comm[64];
};

struct daxemu_run {
	uint64_t ino, index, nr_pages, address, vma_start, vma_end, writable;
};

struct daxemu_runs {
	struct daxemu_run *each;
	uint32_t room, used;
};
