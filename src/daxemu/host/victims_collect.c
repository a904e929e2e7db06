/*
 * Who has pages of a file present: many processes in one call, with no Python between the system calls.
 *
 * This answers for what is ordinary: a process that maps nothing of the device, or that has its mappings and pages as they
 * were from before the look to after it. Any other verdict is ASK: host/tasks.py looks at that process itself, and
 * knows what to make of one that changes. What is looked for, and who is told of what is found, is decided there, too.
 *
 * Needs PROCMAP_QUERY (Linux 6.11) and PAGEMAP_SCAN (6.7); on older kernels every verdict is ASK.
 */
#define _GNU_SOURCE
#include "victims.h"

#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

#define PAGE_SHIFT 12
#define MOST_VMAS 64 /* of the device, in one process */
#define MOST_REGIONS 256 /* of pages that are present, in one range */

enum { NOTHING, FOUND, ASK }; /* verdicts */

/* uapi/linux/fs.h, whose installed version may be older than the kernel */
struct procmap_query {
	uint64_t size, flags, address;
	uint64_t start, end, vma_flags, page_size, offset, ino;
	uint32_t major, minor, name_size, build_id_size;
	uint64_t name, build_id;
};

struct page_region {
	uint64_t start, end, categories;
};

struct pm_scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t inverted, all_of, any_of, returned;
};

#define QUERY_VMA _IOWR('f', 17, struct procmap_query)
#define VMA_WRITABLE 0x02
#define VMA_SHARED 0x08
#define COVERING_OR_NEXT 0x10
#define FILE_BACKED 0x20
#define SCAN_PAGES _IOWR('f', 16, struct pm_scan_arg)
#define PAGE_IS_FILE (1 << 2)
#define PAGE_IS_PRESENT (1 << 3)

const int daxemu_victims_version = VERSION;

struct vma {
	uint64_t start, end, pgoff, ino, flags;
};

struct stat_line {
	char text[1024];
	const char *minor_faults, *major_faults; /* as text, to compare */
	uint64_t flags;
	uint32_t nr_threads;
};

static int open_of(int pid, const char *name)
{
	char path[48];
	snprintf(path, sizeof path, "/proc/%d/%s", pid, name);
	return open(path, O_RDONLY | O_CLOEXEC);
}

/* The process is gone, or not ours to look into: then it has nothing that we could tell it of. */
static int is_gone(void)
{
	return errno == ENOENT || errno == ESRCH || errno == EACCES || errno == EPERM;
}

/* The process's mappings of files on the device; how many, or -1 with errno. */
static int read_vmas(int maps, const struct daxemu_search *search, struct vma *vmas)
{
	int count = 0;
	for (uint64_t address = 0;;) {
		struct procmap_query query = {
			.size = sizeof query, .flags = COVERING_OR_NEXT | FILE_BACKED, .address = address
		};
		if (ioctl(maps, QUERY_VMA, &query))
			return errno == ENOENT ? count : -1; /* ENOENT: there are no more */
		address = query.end;
		if (query.major != search->major || query.minor != search->minor)
			continue;
		if (count == MOST_VMAS) {
			errno = E2BIG;
			return -1;
		}
		vmas[count++] = (struct vma){ query.start, query.end, query.offset >> PAGE_SHIFT, query.ino,
					      query.vma_flags };
	}
}

/* Reads /proc/PID/stat and takes it apart: the fields begin after the last parenthesis, for a name may hold some. */
static int read_stat(int fd, struct stat_line *stat)
{
	ssize_t size = pread(fd, stat->text, sizeof stat->text - 1, 0);
	if (size <= 0)
		return -1;
	stat->text[size] = 0;
	char *rest = strrchr(stat->text, ')');
	if (!rest)
		return -1;
	*rest = 0; /* the name ends here */
	char *next = rest + 1, *field;
	for (int at = 0; (field = strtok_r(next, " ", &next)) && at <= 17; at++) {
		if (at == 6)
			stat->flags = strtoull(field, NULL, 10);
		else if (at == 7)
			stat->minor_faults = field;
		else if (at == 9)
			stat->major_faults = field;
		else if (at == 17)
			stat->nr_threads = strtoul(field, NULL, 10);
	}
	return field ? 0 : -1;
}

/* Adds the pages of one range of a mapping that are present and the file's own. */
static int scan(int pagemap, const struct vma *vma, const struct daxemu_wanted *wanted, struct daxemu_runs *runs)
{
	uint64_t first = wanted->first > vma->pgoff ? wanted->first : vma->pgoff;
	uint64_t end = vma->pgoff + ((vma->end - vma->start) >> PAGE_SHIFT);
	struct page_region regions[MOST_REGIONS];
	if (wanted->end < end)
		end = wanted->end;
	if (first >= end)
		return 0;
	struct pm_scan_arg arg = { .size = sizeof arg,
				   .start = vma->start + ((first - vma->pgoff) << PAGE_SHIFT),
				   .end = vma->start + ((end - vma->pgoff) << PAGE_SHIFT),
				   .vec = (uintptr_t)regions,
				   .vec_len = MOST_REGIONS,
				   .all_of = PAGE_IS_PRESENT | PAGE_IS_FILE,
				   .returned = PAGE_IS_FILE };
	int count = ioctl(pagemap, SCAN_PAGES, &arg);
	if (count < 0 || arg.walk_end < arg.end || runs->used + count > runs->room)
		return -1;
	for (int at = 0; at < count; at++)
		runs->each[runs->used++] = (struct daxemu_run){
			.ino = vma->ino,
			.index = vma->pgoff + ((regions[at].start - vma->start) >> PAGE_SHIFT),
			.nr_pages = (regions[at].end - regions[at].start) >> PAGE_SHIFT,
			.address = regions[at].start,
			.vma_start = vma->start,
			.vma_end = vma->end,
			.writable = (vma->flags & VMA_WRITABLE) && (vma->flags & VMA_SHARED),
		};
	return 0;
}

static int scan_all(int pagemap, const struct daxemu_search *search, const struct vma *vmas, int count,
		    struct daxemu_runs *runs)
{
	for (int at = 0; at < count; at++)
		for (uint32_t which = 0; which < search->nr_wanted; which++)
			if (search->wanted[which].ino == vmas[at].ino &&
			    scan(pagemap, &vmas[at], &search->wanted[which], runs))
				return -1;
	return 0;
}

/*
 * Mappings and page tables cannot be read at once. What is present where a mapping is before and after is that mapping's,
 * if there was no page fault in between: without one nothing becomes present.
 */
static int look_again(int maps, int pagemap, int stat, const struct daxemu_search *search, const struct vma *vmas,
		      int count, struct daxemu_process *process, struct daxemu_runs *runs)
{
	struct vma now[MOST_VMAS];
	struct stat_line before, after;
	uint32_t used = runs->used;
	if (read_stat(stat, &before) || scan_all(pagemap, search, vmas, count, runs))
		return ASK;
	if (read_vmas(maps, search, now) != count || memcmp(now, vmas, count * sizeof *vmas))
		return ASK;
	process->nr_runs = runs->used - used;
	if (!process->nr_runs)
		return NOTHING;
	if (read_stat(stat, &after) || strcmp(before.minor_faults, after.minor_faults) ||
	    strcmp(before.major_faults, after.major_faults))
		return ASK;
	const char *name = strchr(after.text, '(');
	if (!name || strlen(name + 1) >= sizeof process->comm)
		return ASK;
	strcpy(process->comm, name + 1);
	process->flags = after.flags;
	process->nr_threads = after.nr_threads;
	return FOUND;
}

static int look_at(const struct daxemu_search *search, struct daxemu_process *process, struct daxemu_runs *runs)
{
	struct vma vmas[MOST_VMAS];
	int maps = open_of(process->pid, "maps");
	if (maps < 0)
		return is_gone() ? NOTHING : ASK;
	int verdict = ASK, count = read_vmas(maps, search, vmas);
	if (!count || (count < 0 && is_gone())) {
		verdict = NOTHING;
	} else if (count > 0 && search->nr_wanted) {
		int pagemap = open_of(process->pid, "pagemap"), stat = open_of(process->pid, "stat");
		if (pagemap >= 0 && stat >= 0)
			verdict = look_again(maps, pagemap, stat, search, vmas, count, process, runs);
		if (pagemap >= 0)
			close(pagemap);
		if (stat >= 0)
			close(stat);
	}
	close(maps);
	return verdict;
}

/* Sets the verdict of each process. Those that are FOUND have their runs one after another, in the order of the processes. */
void daxemu_collect(const struct daxemu_search *search, struct daxemu_process *processes, uint32_t count,
		    struct daxemu_runs *runs)
{
	for (uint32_t at = 0; at < count; at++) {
		uint32_t used = runs->used;
		processes[at].verdict = look_at(search, &processes[at], runs);
		if (processes[at].verdict != FOUND)
			runs->used = used;
	}
}
