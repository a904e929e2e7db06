/*
 * Structures passed between Python (host/victims/__init__.py, host/proc/collect_in_c.py, host/tracer/deliver_in_c.py) and
 * C, and declarations that the C files share. The Python modules repeat the layouts: change both, and VERSION.
 */
#include <signal.h>
#include <stdint.h>
#include <sys/ioctl.h>

#define VERSION 2
#define PAGE_SHIFT 12

/* -- victims/collect.c */

struct daxemu_wanted {
	uint64_t ino, first, end; /* pages of the file */
};

struct daxemu_search {
	uint32_t major, minor; /* device of the files, as shown in /proc */
	const struct daxemu_wanted *wanted;
	uint32_t nr_wanted; /* 0: only look for any mapping of the device; then ASK */
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

/* -- victims/deliver.c */

struct daxemu_delivery {
	int32_t tgid, tid;
	uint32_t major, minor;
	uint64_t ino, pgoff, address; /* page that the address must map; ino 0: any page */
	siginfo_t mark; /* as queued: identifies the tracer's own signal */
	siginfo_t info; /* as received by the thread */
};

struct daxemu_wait {
	int32_t tid, status, what;
};

/* -- victims/proc.c: access to /proc for both */

/* uapi/linux/fs.h, whose installed version may be older than the kernel: PROCMAP_QUERY came with Linux 6.11 */
struct daxemu_procmap_query {
	uint64_t size, flags, address;
	uint64_t start, end, vma_flags, page_size, offset, ino;
	uint32_t major, minor, name_size, build_id_size;
	uint64_t name, build_id;
};

#define DAXEMU_PROCMAP_QUERY _IOWR('f', 17, struct daxemu_procmap_query)

/* Fields of /proc/PID/stat, counted from the one after the name. */
enum {
	STAT_FLAGS = 6,
	STAT_MINOR_FAULTS = 7,
	STAT_MAJOR_FAULTS = 9,
	STAT_THREADS = 17,
	STAT_PENDING = 28,
	STAT_BLOCKED,
	STAT_IGNORED,
	STAT_FIELDS
};

struct daxemu_stat {
	char text[1024];
	const char *comm, *fields[STAT_FIELDS];
};

/* Opens a file in /proc/PID for reading; -1 with errno. */
int daxemu_open(int pid, const char *name);

/* Reads a stat file from its beginning and splits it into fields; -1 if that fails. */
int daxemu_read_stat(int fd, struct daxemu_stat *stat);
