/* Files of /proc, for victims/collect.c and victims/deliver.c. */
#define _GNU_SOURCE
#include "victims.h"

#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

const int daxemu_victims_version = VERSION;

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
