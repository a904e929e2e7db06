/*
 * Processes that have pages of a file present: many processes in one call, with no Python between the system calls.
 *
 * The code answers for ordinary processes: a process that maps no file of the device, or whose mappings and pages do not
 * change during the look. Any other verdict is ASK: host/proc/present.py then looks at that process itself, and handles a
 * process that changes. present.py also decides which pages to look for, and which processes to signal.
 *
 * Needs PROCMAP_QUERY (Linux 6.11) and PAGEMAP_SCAN (6.7); on older kernels every verdict is ASK.
 */
#define _GNU_SOURCE
#include "victims.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <linux/kcmp.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <unistd.h>

#define MOST_VMAS 64 /* of the device, in one process */
#define MOST_REGIONS 256 /* of pages that are present, in one range */

enum { NOTHING, FOUND, ASK }; /* verdicts */

/* uapi/linux/fs.h */
struct page_region {
	uint64_t start, end, categories;
};

struct pm_scan_arg {
	uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages;
	uint64_t inverted, all_of, any_of, returned;
};

#define VMA_WRITABLE 0x02
#define VMA_SHARED 0x08
#define COVERING_OR_NEXT 0x10
#define FILE_BACKED 0x20
#define SCAN_PAGES _IOWR('f', 16, struct pm_scan_arg)
#define PAGE_IS_FILE (1 << 2)
#define PAGE_IS_PRESENT (1 << 3)

struct vma {
	uint64_t start, end, pgoff, ino, flags;
};

/* The process is gone, or may not be inspected: then it cannot be a victim. */
static int is_gone(void)
{
	return errno == ENOENT || errno == ESRCH || errno == EACCES || errno == EPERM;
}

/* Reads the process's mappings of files on the device. Returns their number, or -1 with errno. */
static int read_vmas(int maps, const struct daxemu_search *search, struct vma *vmas)
{
	int count = 0;
	for (uint64_t address = 0;;) {
		struct daxemu_procmap_query query = {
			.size = sizeof query, .flags = COVERING_OR_NEXT | FILE_BACKED, .address = address
		};
		if (ioctl(maps, DAXEMU_PROCMAP_QUERY, &query))
			return errno == ENOENT ? count : -1; /* ENOENT: no further mapping */
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

/* Adds the pages of one range of a mapping that are present and belong to the file. */
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
 * Mappings and page tables cannot be read in one step. A page found present belongs to a mapping that existed before and
 * after the scan, if no page fault came in between: without a page fault no page becomes present.
 */
static int look_again(int maps, int pagemap, int stat, const struct daxemu_search *search, const struct vma *vmas,
		      int count, struct daxemu_process *process, struct daxemu_runs *runs)
{
	struct vma now[MOST_VMAS];
	struct daxemu_stat before, after;
	uint32_t used = runs->used;
	if (daxemu_read_stat(stat, &before) || scan_all(pagemap, search, vmas, count, runs))
		return ASK;
	if (read_vmas(maps, search, now) != count || memcmp(now, vmas, count * sizeof *vmas))
		return ASK;
	process->nr_runs = runs->used - used;
	if (!process->nr_runs)
		return NOTHING;
	if (daxemu_read_stat(stat, &after) ||
	    strcmp(before.fields[STAT_MINOR_FAULTS], after.fields[STAT_MINOR_FAULTS]) ||
	    strcmp(before.fields[STAT_MAJOR_FAULTS], after.fields[STAT_MAJOR_FAULTS]))
		return ASK;
	if (strlen(after.comm) >= sizeof process->comm)
		return ASK;
	strcpy(process->comm, after.comm);
	process->flags = strtoull(after.fields[STAT_FLAGS], NULL, 10);
	process->nr_threads = strtoul(after.fields[STAT_THREADS], NULL, 10);
	return FOUND;
}

static int look_at(const struct daxemu_search *search, struct daxemu_process *process, struct daxemu_runs *runs)
{
	struct vma vmas[MOST_VMAS];
	int maps = daxemu_open(process->pid, "maps");
	if (maps < 0)
		return is_gone() ? NOTHING : ASK;
	int verdict = ASK, count = read_vmas(maps, search, vmas);
	if (!count || (count < 0 && is_gone())) {
		verdict = NOTHING;
	} else if (count > 0 && search->nr_wanted) {
		int pagemap = daxemu_open(process->pid, "pagemap"), stat = daxemu_open(process->pid, "stat");
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

/* Sets the verdict of each process. The runs of processes with FOUND follow one another, in the order of the processes. */
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

/* Compares the address space of one process with those of others; the result of kcmp(2) replaces the id of each. */
void daxemu_compare(int one, int32_t *others, uint32_t count)
{
	for (uint32_t at = 0; at < count; at++)
		others[at] = syscall(SYS_kcmp, one, others[at], KCMP_VM, 0, 0);
}
