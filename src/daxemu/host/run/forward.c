/*
 * Helper of `daxemu run` for programs with direct mappings: receives each call that the filter notifies (host/run/filters.py),
 * and answers the call, forwards the call to the supervisor of a mount, or leaves the call to Python (host/run/helper.py).
 *
 * - A call that concerns no direct mount is answered "continue" here: ld.so makes some 40 such calls for each execve(2).
 * - A forwarded call is answered by the supervisor on its own copy of the listener; this file does not learn of the answer.
 * - A call for several supervisors (fork, execve) goes to one after the other: each but the last acknowledges it.
 * - When a supervisor ends, the calls that it may not have answered are answered here: ENODEV for mmap(2) of a file of the
 *   mount, "continue" for all others. An answer to a call that was answered before has no effect.
 *
 * One thread calls daxemu_serve(), daxemu_route(), daxemu_attach() and daxemu_not_ours(). No function here waits for a mount
 * or for a supervisor.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <linux/audit.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#include "threads.h"

#define MAX_MOUNTS 15 /* slices of the zone: zone.SLICES */
#define PID_MAX_LIMIT (1 << 22) /* linux/threads.h */
#define ANONYMOUS_DEVICES (1 << 20) /* minor numbers of major 0: fs/super.c */

/* uapi/linux/seccomp.h, whose installed version may be older than the kernel: Linux 6.6 */
#ifndef SECCOMP_IOCTL_NOTIF_SET_FLAGS
#define SECCOMP_IOCTL_NOTIF_SET_FLAGS SECCOMP_IOW(4, uint64_t)
#define SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP 1
#endif

/* asm/unistd.h and filters.py: numbers that the filter notifies */
enum {
	NR_MMAP = 9,
	NR_MREMAP = 25,
	NR_MADVISE = 28,
	NR_CLONE = 56,
	NR_FORK = 57,
	NR_EXECVE = 59,
	NR_MLOCK = 149,
	NR_MLOCKALL = 151,
	NR_EXECVEAT = 322,
	NR_MLOCK2 = 325,
	NR_X32_MMAP = 0x40000000 | 9,
	NR_I386_MMAP = 90,
	NR_I386_MMAP2 = 192
};

enum { ADVICE_HWPOISON = 100, ADVICE_SOFT_OFFLINE = 101 };

/* Results of daxemu_serve() and daxemu_route(): which work is left to Python. */
enum { DONE, ENDED, MADVISE, DEVICE, WOKEN };

/* Flag of a forwarded struct seccomp_notif: acknowledge by the id, in place of "continue". The kernel leaves flags 0. */
enum { ACKNOWLEDGE = 1 };

struct mount {
	enum { FREE, ATTACHED, GONE } state;
	uint32_t minor; /* of the files; the major number is 0 */
	uint64_t start, end; /* slice of the zone */
	int socket;
};

/* Entry of a thread id. */
struct thread {
	uint64_t id; /* last call that was forwarded */
	uint16_t known_to; /* mounts with mappings of the process; the thread id is the process id */
	uint16_t outside; /* mounts with mappings outside the zone */
	uint8_t waits; /* 1 + number of the mount that the call was forwarded to; 0: none */
	uint8_t is_mmap;
};

/* Call that waits for room in a socket, or for an acknowledgement. */
struct kept {
	struct kept *next;
	struct seccomp_notif call;
	int mount;
	uint32_t left; /* mounts to forward the call to afterwards */
	int is_sent;
};

struct helper {
	int listener, mountinfo, wake;
	int proc; /* /proc of this pid namespace, whose thread ids the listener gives */
	uint32_t asked; /* minor number of the last DEVICE */
	uint32_t used, forked; /* mounts that got an mmap(2); a fork(2) of a process with mappings */
	uint32_t outside, forked_outside; /* as used and forked, of mappings outside the zone */
	struct mount mounts[MAX_MOUNTS];
	struct kept *kept;
	struct thread *threads;
	uint8_t not_ours[ANONYMOUS_DEVICES / 8]; /* devices known to be no direct mount */
};

const int daxemu_run_version = 1;

static void answer(struct helper *helper, uint64_t id, int error, int proceed)
{
	struct seccomp_notif_resp response = { .id = id, .error = -error };
	if (proceed)
		response.flags = SECCOMP_USER_NOTIF_FLAG_CONTINUE;
	/* Fails if the thread is dead, or the call was answered before. */
	ioctl(helper->listener, SECCOMP_IOCTL_NOTIF_SEND, &response);
}

static int proceed(struct helper *helper, const struct seccomp_notif *call)
{
	answer(helper, call->id, 0, 1);
	return DONE;
}

/* -- what a call concerns */

static int is_mmap(const struct seccomp_notif *call)
{
	if (call->data.arch == AUDIT_ARCH_I386)
		return call->data.nr == NR_I386_MMAP || call->data.nr == NR_I386_MMAP2;
	return call->data.nr == NR_MMAP || call->data.nr == NR_X32_MMAP;
}

/* fork, execve, mlock: calls for each mount that the process maps files of */
static int concerns_process(const struct seccomp_notif *call)
{
	int nr = call->data.nr;
	return call->data.arch == AUDIT_ARCH_X86_64 &&
	       (nr == NR_FORK || nr == NR_CLONE || nr == NR_EXECVE || nr == NR_EXECVEAT || nr == NR_MLOCK ||
		nr == NR_MLOCK2 || nr == NR_MLOCKALL);
}

static int is_failure(const struct seccomp_notif *call)
{
	uint32_t advice = call->data.args[2];
	return call->data.nr == NR_MADVISE && (advice == ADVICE_HWPOISON || advice == ADVICE_SOFT_OFFLINE);
}

/* Returns the attached mount whose slice overlaps a range; -1 if none does. */
static int by_address(const struct helper *helper, uint64_t start, uint64_t length)
{
	uint64_t end = start + length < start ? UINT64_MAX : start + length;
	for (int at = 0; at < MAX_MOUNTS; at++) {
		const struct mount *mount = &helper->mounts[at];
		if (mount->state == ATTACHED && start < mount->end && (end > mount->start || start >= mount->start))
			return at;
	}
	return -1;
}

static int by_device(const struct helper *helper, uint32_t minor)
{
	for (int at = 0; at < MAX_MOUNTS; at++)
		if (helper->mounts[at].state != FREE && helper->mounts[at].minor == minor)
			return at;
	return -1;
}

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

static int is_tid(uint32_t tid)
{
	return tid > 0 && tid < PID_MAX_LIMIT;
}

/* -- forwarding */

/* Sends a call to a mount. A call that the socket has no room for, or that no supervisor can take any more, is kept. */
static void forward(struct helper *helper, struct kept *kept)
{
	struct mount *mount = &helper->mounts[kept->mount];
	struct thread *thread = &helper->threads[kept->call.pid];
	thread->id = kept->call.id;
	thread->waits = 1 + kept->mount;
	thread->is_mmap = is_mmap(&kept->call);
	kept->call.flags = kept->left ? ACKNOWLEDGE : 0;
	ssize_t sent = daxemu_send_call(mount->socket, &kept->call);
	kept->is_sent = sent == (ssize_t)sizeof kept->call;
	if (sent < 0 && errno == ESRCH)
		kept->is_sent = 1, kept->left = 0; /* the thread is dead: no mount waits for the call */
}

static void drop(struct helper *helper, struct kept *kept)
{
	for (struct kept **at = &helper->kept; *at; at = &(*at)->next) {
		if (*at == kept) {
			*at = kept->next;
			break;
		}
	}
	free(kept);
}

/* Forwards a call to the mounts of a set, one after the other. An empty set: the kernel carries the call out. */
static int forward_to(struct helper *helper, const struct seccomp_notif *call, uint32_t mounts)
{
	for (int at = 0; at < MAX_MOUNTS; at++)
		if (helper->mounts[at].state != ATTACHED)
			mounts &= ~(1u << at);
	struct kept *kept = mounts ? calloc(1, sizeof *kept) : NULL;
	if (!kept)
		return proceed(helper, call);
	kept->call = *call;
	kept->mount = __builtin_ctz(mounts);
	kept->left = mounts & (mounts - 1);
	kept->next = helper->kept;
	helper->kept = kept;
	forward(helper, kept);
	if (kept->is_sent && !kept->left)
		drop(helper, kept);
	return DONE;
}

/* Takes the next step of a call that a supervisor acknowledged, or whose supervisor ended. */
static void go_on(struct helper *helper, struct kept *kept)
{
	struct seccomp_notif call = kept->call;
	uint32_t left = kept->left;
	drop(helper, kept);
	helper->threads[call.pid].waits = 0;
	if (ioctl(helper->listener, SECCOMP_IOCTL_NOTIF_ID_VALID, &call.id) == 0)
		forward_to(helper, &call, left);
}

/* Marks a mount, and answers every call that its supervisor may not have answered. */
static void supervisor_ended(struct helper *helper, int at)
{
	struct mount *mount = &helper->mounts[at];
	if (mount->state != ATTACHED)
		return;
	mount->state = GONE;
	close(mount->socket);
	mount->socket = -1;
	for (struct kept *kept = helper->kept, *next; kept; kept = next) {
		next = kept->next;
		if (kept->mount == at && kept->left)
			go_on(helper, kept); /* adds at the head of the list only */
		else if (kept->mount == at)
			drop(helper, kept); /* answered below */
	}
	for (int tid = 1; tid < PID_MAX_LIMIT; tid++) {
		struct thread *thread = &helper->threads[tid];
		thread->known_to &= ~(1u << at);
		thread->outside &= ~(1u << at);
		if (thread->waits != 1 + at)
			continue;
		thread->waits = 0;
		answer(helper, thread->id, thread->is_mmap ? ENODEV : 0, !thread->is_mmap);
	}
	helper->used &= ~(1u << at);
	helper->forked &= ~(1u << at);
	helper->outside &= ~(1u << at);
	helper->forked_outside &= ~(1u << at);
}

/* Reads the acknowledgements of a supervisor: ids. Nonsense has no effect. */
static void acknowledged(struct helper *helper, int at)
{
	uint64_t id;
	ssize_t got;
	while ((got = recv(helper->mounts[at].socket, &id, sizeof id, MSG_DONTWAIT | MSG_TRUNC)) > 0) {
		struct kept *kept = helper->kept;
		while (kept && (kept->call.id != id || kept->mount != at || !kept->is_sent))
			kept = kept->next;
		if (got == sizeof id && kept)
			go_on(helper, kept);
		if (helper->mounts[at].state != ATTACHED)
			return;
	}
	if (got == 0 || (errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR))
		supervisor_ended(helper, at);
}

/* Sends what had no room. */
static void send_again(struct helper *helper, int at)
{
	for (struct kept *kept = helper->kept, *next; kept; kept = next) {
		next = kept->next;
		if (kept->mount != at || kept->is_sent)
			continue;
		forward(helper, kept);
		if (!kept->is_sent)
			return;
		if (!kept->left)
			drop(helper, kept);
	}
}

/* -- one call */

static int route_mmap(struct helper *helper, const struct seccomp_notif *notified)
{
	struct seccomp_notif as_registers = *notified, *call = &as_registers;
	int at = -1;
	uint32_t major, minor;
	if (!is_tid(call->pid) || read_arguments(call))
		return proceed(helper, call);
	uint32_t flags = call->data.args[3];
	if (!(flags & MAP_ANONYMOUS) && daxemu_device_of(helper->proc, call->pid, (int)call->data.args[4], &major, &minor) == 0 && major == 0 &&
	    minor < ANONYMOUS_DEVICES) {
		at = by_device(helper, minor);
		if (at < 0 && !(helper->not_ours[minor / 8] & 1 << minor % 8)) {
			helper->asked = minor;
			return DEVICE;
		}
	}
	if (at >= 0 && helper->mounts[at].state == GONE) {
		answer(helper, call->id, ENODEV, 0);
		return DONE;
	}
	if (at >= 0) {
		int tgid = daxemu_process_of(helper->proc, call->pid);
		/* A hint may be taken. The slice of the mount is for mappings without one. */
		int names_place = call->data.args[0] && by_address(helper, call->data.args[0], 1) < 0;
		if (tgid > 0)
			helper->threads[tgid].known_to |= 1u << at;
		if (tgid > 0 && names_place)
			helper->threads[tgid].outside |= 1u << at;
		helper->used |= 1u << at;
		if (names_place)
			helper->outside |= 1u << at;
	} else if (flags & MAP_FIXED) {
		at = by_address(helper, call->data.args[0], call->data.args[1]);
	}
	return forward_to(helper, call, at < 0 ? 0 : 1u << at);
}

static int route_to_all(struct helper *helper, const struct seccomp_notif *call)
{
	int tgid = helper->used && is_tid(call->pid) ? daxemu_process_of(helper->proc, call->pid) : -1;
	if (tgid < 0)
		return proceed(helper, call);
	/* After a fork with mappings, children whose numbers are not known here have mappings, too. */
	uint32_t mounts = helper->threads[tgid].known_to | helper->forked;
	if (call->data.nr == NR_FORK || call->data.nr == NR_CLONE) {
		helper->forked |= helper->threads[tgid].known_to;
		helper->forked_outside |= helper->threads[tgid].outside;
	}
	return forward_to(helper, call, mounts);
}

/* Returns the mounts that may have mappings of the process outside the zone. */
static uint32_t outside(const struct helper *helper, const struct seccomp_notif *call)
{
	int tgid = helper->outside && is_tid(call->pid) ? daxemu_process_of(helper->proc, call->pid) : -1;
	return tgid < 0 ? 0 : helper->threads[tgid].outside | helper->forked_outside;
}

/* Answers a call or forwards it. Returns DONE; MADVISE or DEVICE if Python has to look at the call. */
int daxemu_route(struct helper *helper, const struct seccomp_notif *call)
{
	if (is_mmap(call))
		return route_mmap(helper, call);
	if (concerns_process(call))
		return route_to_all(helper, call);
	int at = is_tid(call->pid) ? by_address(helper, call->data.args[0], 1) : -1;
	if (at < 0 && call->data.nr == NR_MREMAP && call->data.args[3] & MREMAP_FIXED && is_tid(call->pid))
		at = by_address(helper, call->data.args[4], call->data.args[2]);
	uint32_t mounts = at < 0 ? outside(helper, call) : 1u << at;
	if (!mounts && is_failure(call))
		return MADVISE;
	return forward_to(helper, call, mounts);
}

/* -- the loop */

/* The mount table changed: a device number may mean another filesystem now. */
static void forget_devices(struct helper *helper)
{
	memset(helper->not_ours, 0, sizeof helper->not_ours);
	for (int at = 0; at < MAX_MOUNTS; at++)
		if (helper->mounts[at].state == GONE)
			helper->mounts[at].state = FREE;
}

static int receive(struct helper *helper, struct seccomp_notif *call)
{
	memset(call, 0, sizeof *call);
	return ioctl(helper->listener, SECCOMP_IOCTL_NOTIF_RECV, call);
}

static void look_at_sockets(struct helper *helper, const struct pollfd *polled, const int *which, int count)
{
	for (int i = 0; i < count; i++) {
		if (helper->mounts[which[i]].state != ATTACHED)
			continue;
		if (polled[i].revents & POLLOUT)
			send_again(helper, which[i]);
		if (polled[i].revents & (POLLIN | POLLHUP | POLLERR) && helper->mounts[which[i]].state == ATTACHED)
			acknowledged(helper, which[i]);
	}
}

static int has_unsent(const struct helper *helper, int at)
{
	for (const struct kept *kept = helper->kept; kept; kept = kept->next)
		if (kept->mount == at && !kept->is_sent)
			return 1;
	return 0;
}

/*
 * Serves until Python has work to do. Returns MADVISE or DEVICE with the call; WOKEN when the wake descriptor is readable;
 * ENDED when the last process under the filter is gone.
 */
int daxemu_serve(struct helper *helper, struct seccomp_notif *call)
{
	for (;;) {
		struct pollfd polled[3 + MAX_MOUNTS] = {
			{ helper->listener, POLLIN, 0 }, { helper->wake, POLLIN, 0 }, { helper->mountinfo, POLLPRI, 0 }
		};
		int which[MAX_MOUNTS], count = 0;
		for (int at = 0; at < MAX_MOUNTS; at++) {
			if (helper->mounts[at].state != ATTACHED)
				continue;
			polled[3 + count] = (struct pollfd){ helper->mounts[at].socket, POLLIN, 0 };
			if (has_unsent(helper, at))
				polled[3 + count].events |= POLLOUT;
			which[count++] = at;
		}
		if (poll(polled, 3 + count, -1) < 0)
			continue;
		if (polled[2].revents & POLLPRI)
			forget_devices(helper);
		look_at_sockets(helper, polled + 3, which, count);
		if (polled[1].revents)
			return WOKEN;
		if (polled[0].revents & POLLIN) {
			int left = receive(helper, call) == 0 ? daxemu_route(helper, call) : DONE;
			if (left != DONE)
				return left;
		} else if (polled[0].revents) {
			return ENDED;
		}
	}
}

/* Makes a helper; NULL with errno. ``mountinfo``: a descriptor of /proc/self/mountinfo; ``wake``: an eventfd. */
struct helper *daxemu_helper(int listener, int mountinfo, int wake)
{
	struct helper *helper = calloc(1, sizeof *helper);
	if (!helper)
		return NULL;
	helper->listener = listener;
	helper->mountinfo = mountinfo;
	helper->wake = wake;
	helper->proc = daxemu_open_proc();
	/* Only the pages of thread ids that occur take memory. */
	helper->threads = mmap(NULL, PID_MAX_LIMIT * sizeof *helper->threads, PROT_READ | PROT_WRITE,
			       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (helper->threads == MAP_FAILED) {
		free(helper);
		return NULL;
	}
	/* A waiting thread and its helper run in turn: Linux 6.6 then wakes each on the processor of the other. */
	ioctl(listener, SECCOMP_IOCTL_NOTIF_SET_FLAGS, SECCOMP_USER_NOTIF_FD_SYNC_WAKE_UP);
	return helper;
}

/* Adds a mount with a slice of the zone; -1 if there are too many. The helper closes ``socket`` when the supervisor ends. */
int daxemu_attach(struct helper *helper, uint32_t minor, uint64_t start, uint64_t end, int socket)
{
	for (int at = 0; at < MAX_MOUNTS; at++) {
		if (helper->mounts[at].state == FREE) {
			helper->mounts[at] = (struct mount){ ATTACHED, minor, start, end, socket };
			return at;
		}
	}
	return -1;
}

/* Returns the minor number of the device that the last DEVICE was for. */
uint32_t daxemu_asked(const struct helper *helper)
{
	return helper->asked;
}

/* Notes that a device is no direct mount, until the mount table changes. */
void daxemu_not_ours(struct helper *helper, uint32_t minor)
{
	helper->not_ours[minor / 8] |= 1 << minor % 8;
}
