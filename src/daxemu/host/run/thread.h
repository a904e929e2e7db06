/* A thread in a notified call: its arguments, its descriptors, its process. Of forward.c alone. */
#pragma once
#include <fcntl.h>
#include <linux/audit.h>
#include <linux/seccomp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define PID_MAX_LIMIT (1 << 22) /* linux/threads.h */

enum { NR_I386_MMAP = 90 }; /* asm/unistd_32.h */

/* Puts the arguments of the old mmap(2) of i386, which are in memory, in the places of the registers; -1 if unreadable. */
static int read_arguments(struct seccomp_notif *call)
{
	uint32_t in_memory[6]; /* struct mmap_arg_struct */
	struct iovec here = { in_memory, sizeof in_memory };
	struct iovec there = { (void *)call->data.args[0], sizeof in_memory };
	if (call->data.arch != AUDIT_ARCH_I386 || call->data.nr != NR_I386_MMAP)
		return 0;
	if (process_vm_readv(call->pid, &here, 1, &there, 1, 0) != sizeof in_memory)
		return -1;
	for (int i = 0; i < 6; i++)
		call->data.args[i] = in_memory[i];
	return 0;
}

/* Finds the device of an open file without a request to its filesystem: with an empty mask FUSE gives st_dev alone. */
static int device_of(int tid, int fd, uint32_t *major, uint32_t *minor)
{
	char path[48];
	struct statx found;
	snprintf(path, sizeof path, "/proc/%d/fd/%d", tid, fd);
	if (statx(AT_FDCWD, path, AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT, 0, &found))
		return -1;
	*major = found.stx_dev_major, *minor = found.stx_dev_minor;
	return 0;
}

static int is_tid(uint32_t tid)
{
	return tid > 0 && tid < PID_MAX_LIMIT;
}

/* Returns the process of a thread; -1 if the thread is gone. */
static int process_of(int tid)
{
	char path[32], text[512], *line;
	snprintf(path, sizeof path, "/proc/%d/status", tid);
	int fd = open(path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	ssize_t got = read(fd, text, sizeof text - 1);
	close(fd);
	if (got <= 0)
		return -1;
	text[got] = 0;
	line = strstr(text, "\nTgid:");
	return line && is_tid(atoi(line + 6)) ? atoi(line + 6) : -1;
}
