/* Files of /proc, for victims/collect.c and victims/deliver.c. */
#define _GNU_SOURCE
#include "victims.h"

#include <fcntl.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

const int daxemu_victims_version = VERSION;

/* Count, then sizes and offsets of the structs of victims.h: victims/structs.py has the same, and compares. */
#define AT(name, field) offsetof(struct daxemu_##name, field)
const uint32_t daxemu_victims_layout[] = {
	42,
	sizeof(struct daxemu_wanted), AT(wanted, ino), AT(wanted, first), AT(wanted, end),
	sizeof(struct daxemu_search), AT(search, major), AT(search, minor), AT(search, wanted), AT(search, nr_wanted),
	sizeof(struct daxemu_process), AT(process, pid), AT(process, verdict), AT(process, nr_runs),
	AT(process, nr_threads), AT(process, flags), AT(process, comm),
	sizeof(struct daxemu_run), AT(run, ino), AT(run, index), AT(run, nr_pages), AT(run, address),
	AT(run, vma_start), AT(run, vma_end), AT(run, writable),
	sizeof(struct daxemu_runs), AT(runs, each), AT(runs, room), AT(runs, used),
	sizeof(struct daxemu_delivery), AT(delivery, tgid), AT(delivery, tid), AT(delivery, major),
	AT(delivery, minor), AT(delivery, ino), AT(delivery, pgoff), AT(delivery, address), AT(delivery, mark),
	AT(delivery, info),
	sizeof(struct daxemu_wait), AT(wait, tid), AT(wait, status), AT(wait, what),
};
#undef AT

int daxemu_open(int pid, const char *name)
{
	char path[64];
	snprintf(path, sizeof path, "/proc/%d/%s", pid, name);
	return open(path, O_RDONLY | O_CLOEXEC);
}

int daxemu_read_stat(int fd, struct daxemu_stat *stat)
{
	ssize_t size = pread(fd, stat->text, sizeof stat->text - 1, 0);
	if (size <= 0)
		return -1;
	stat->text[size] = 0;
	/* A name may hold parentheses: the last one ends the name. */
	char *name = strchr(stat->text, '('), *end = strrchr(stat->text, ')');
	if (!name || !end)
		return -1;
	*end = 0;
	stat->comm = name + 1;
	char *rest = end + 1;
	for (int at = 0; at < STAT_FIELDS; at++)
		if (!(stat->fields[at] = strtok_r(rest, " ", &rest)))
			return -1;
	return 0;
}
