/*
 * What host/victims_*.py and the C beside it say to each other, and what the C files share. The layouts are those
 * modules' too: change both, and VERSION.
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

/* -- victims/deliver.c */

struct daxemu_delivery {
	int32_t tgid, tid;
	uint32_t major, minor;
	uint64_t ino, pgoff, address; /* the page that should be there; any, if ino is 0 */
	siginfo_t mark; /* as it is queued: by this we know our own */
	siginfo_t info; /* as it is received */
};

struct daxemu_wait {
	int32_t tid, status, what;
};

/* -- victims/proc.c: what both need of /proc */

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

/* A file in /proc/PID, for reading; -1 with errno. */
int daxemu_open(int pid, const char *name);

/* Reads a stat file from its beginning and takes it apart; not 0 if that cannot be. */
int daxemu_read_stat(int fd, struct daxemu_stat *stat);
