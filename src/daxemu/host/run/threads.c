/*
 * Threads by their ids in this pid namespace. The listener gives ids of the namespace of its reader, and /proc may be that of
 * another namespace, as after `unshare --pid --fork` without --mount-proc.
 */
#define _GNU_SOURCE
#include "threads.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/mount.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

/* Opens /proc of this pid namespace. Another one is mounted after an unshare(CLONE_NEWPID) without a mount(2). */
int daxemu_open_proc(void)
{
	char own[16] = { 0 };
	int made = -1, fs = -1;
	if (readlink("/proc/self", own, sizeof own - 1) < 0 || atoi(own) != getpid())
		fs = syscall(SYS_fsopen, "proc", FSOPEN_CLOEXEC);
	if (fs >= 0 && syscall(SYS_fsconfig, fs, FSCONFIG_CMD_CREATE, NULL, NULL, 0) == 0)
		made = syscall(SYS_fsmount, fs, FSMOUNT_CLOEXEC, 0);
	if (fs >= 0)
		close(fs);
	return made >= 0 ? made : open("/proc", O_PATH | O_DIRECTORY | O_CLOEXEC);
}

/* Finds the device of an open file without a request to its filesystem: with an empty mask FUSE gives st_dev alone. */
int daxemu_device_of(int proc, int tid, int fd, uint32_t *major, uint32_t *minor)
{
	char path[48];
	struct statx found;
	snprintf(path, sizeof path, "%d/fd/%d", tid, fd);
	if (statx(proc, path, AT_STATX_DONT_SYNC | AT_NO_AUTOMOUNT, 0, &found))
		return -1;
	*major = found.stx_dev_major, *minor = found.stx_dev_minor;
	return 0;
}

/* Returns the process of a thread; -1 if the thread is gone. */
int daxemu_process_of(int proc, int tid)
{
	char path[32], text[512], *line;
	snprintf(path, sizeof path, "%d/status", tid);
	int fd = openat(proc, path, O_RDONLY | O_CLOEXEC);
	if (fd < 0)
		return -1;
	ssize_t got = read(fd, text, sizeof text - 1);
	close(fd);
	if (got <= 0)
		return -1;
	text[got] = 0;
	line = strstr(text, "\nTgid:");
	return line && atoi(line + 6) > 0 ? atoi(line + 6) : -1;
}

/*
 * Sends a call, with credentials that name the waiting thread: the kernel translates its id into the pid namespace of the
 * supervisor. Without the right to name another process the kernel puts the helper's own id there. Returns as send(2).
 */
ssize_t daxemu_send_call(int socket, struct seccomp_notif *call)
{
	union {
		char bytes[CMSG_SPACE(sizeof(struct ucred))];
		struct cmsghdr header;
	} control = { { 0 } };
	struct ucred named = { (pid_t)call->pid, geteuid(), getegid() };
	struct iovec body = { call, sizeof *call };
	struct msghdr message = { .msg_iov = &body, .msg_iovlen = 1, .msg_control = &control, .msg_controllen = sizeof control };
	control.header = (struct cmsghdr){ CMSG_LEN(sizeof named), SOL_SOCKET, SCM_CREDENTIALS };
	memcpy(CMSG_DATA(&control.header), &named, sizeof named);
	ssize_t sent = sendmsg(socket, &message, MSG_DONTWAIT | MSG_NOSIGNAL);
	return sent < 0 && errno == EPERM ? send(socket, call, sizeof *call, MSG_DONTWAIT | MSG_NOSIGNAL) : sent;
}
