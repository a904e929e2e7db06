/*
 * Exact SIGBUS to many threads: seized, interrupted and signalled together, and served in the order in which they stop.
 *
 * For one request and one thread, this file carries out the decisions of host/tracer/held_thread.py in the ordinary case:
 * the thread stops because of PTRACE_INTERRUPT, neither blocks nor ignores SIGBUS nor has a SIGBUS pending, still maps the
 * page, stops next for the signal with our mark, and is let go with the exact siginfo. In every other case the thread goes
 * back to host/tracer/process.py, in the very stop that it is in. process.py supplies both siginfos.
 *
 * Belongs to the one thread that traces.
 */
#define _GNU_SOURCE
#include "victims.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

#define MOST 4096 /* under way at once */
#define SIGBUS_BIT (1UL << (SIGBUS - 1))
#define ERESTARTNOHAND 514 /* linux/errno.h */
#define USER_CS_64 0x33
#define NT_PRSTATUS 1
#define MOST_CALLS 32

enum { OTHER, DELIVERED, INTERRUPTED, QUEUED }; /* kinds of wait; the last two: stages of a delivery */

static struct daxemu_delivery deliveries[MOST];
static int32_t tids[MOST], stages[MOST];
static uint32_t under_way;
static uint32_t restarted[MOST_CALLS], nr_restarted; /* system calls that restart_call() restarts */

static void forget(uint32_t at)
{
	deliveries[at] = deliveries[--under_way];
	tids[at] = tids[under_way];
	stages[at] = stages[under_way];
}

static int find(int tid)
{
	for (uint32_t at = 0; at < under_way; at++)
		if (tids[at] == tid)
			return at;
	return -1;
}

/* True if the process maps the page at the address. Otherwise Python looks: the process may have moved the page. */
static int shows(const struct daxemu_delivery *delivery)
{
	struct daxemu_procmap_query query = { .size = sizeof query, .address = delivery->address };
	if (!delivery->ino)
		return 1;
	int maps = daxemu_open(delivery->tgid, "maps");
	if (maps < 0)
		return 0;
	int shown = !ioctl(maps, DAXEMU_PROCMAP_QUERY, &query) && query.major == delivery->major &&
		query.minor == delivery->minor && query.ino == delivery->ino &&
		(query.offset + delivery->address - query.start) >> PAGE_SHIFT == delivery->pgoff;
	close(maps);
	return shown;
}

/* True if a stopped thread takes a SIGBUS at once: SIGBUS is neither pending nor blocked nor ignored. */
static int takes_sigbus(const struct daxemu_delivery *delivery)
{
	char name[32];
	struct daxemu_stat now;
	unsigned long masks = 0;
	snprintf(name, sizeof name, "task/%d/stat", delivery->tid);
	int stat = daxemu_open(delivery->tgid, name);
	if (stat < 0)
		return 0;
	int unknown = daxemu_read_stat(stat, &now);
	close(stat);
	for (int at = STAT_PENDING; !unknown && at <= STAT_IGNORED; at++)
		masks |= strtoul(now.fields[at], NULL, 10);
	return !unknown && !(masks & SIGBUS_BIT);
}

/* True if PTRACE_SEIZE may sleep, so that all other victims wait: see may_sleep() in host/tracer/ptrace.py. */
static int may_sleep(const struct daxemu_delivery *delivery)
{
	char name[32], text[512];
	snprintf(name, sizeof name, "task/%d/stat", delivery->tid);
	int file = daxemu_open(delivery->tgid, name);
	ssize_t got = file < 0 ? -1 : read(file, text, sizeof text - 1);
	if (file >= 0)
		close(file);
	if (got <= 0)
		return 1;
	text[got] = 0;
	const char *state = strrchr(text, ')');
	if (!state || strlen(state) < 3 || state[2] == 'T')
		return 1;
	if (state[2] == 'D') { /* not the D of a page fault: that thread may be traced for an AR already */
		snprintf(name, sizeof name, "task/%d/wchan", delivery->tid);
		file = daxemu_open(delivery->tgid, name);
		got = file < 0 ? -1 : read(file, text, sizeof text - 1);
		if (file >= 0)
			close(file);
		text[got > 0 ? got : 0] = 0;
		if (strstr(text, "refrigerator") || strstr(text, "freez") || strstr(text, "signal_stop"))
			return 1;
	}
	snprintf(name, sizeof name, "task/%d/syscall", delivery->tid);
	file = daxemu_open(delivery->tgid, name);
	got = file < 0 ? -1 : read(file, text, sizeof text - 1);
	if (file >= 0)
		close(file);
	if (got <= 0)
		return 0;
	text[got] = 0;
	long call = strtol(text, NULL, 10);
	return call == SYS_execve || call == SYS_execveat;
}

/* Restarts the interrupted system call where the kernel would not: see restart_call() in host/tracer/injection.py. */
static void restart_call(int tid)
{
#ifdef __x86_64__
	struct user_regs_struct regs;
	struct iovec io = { &regs, sizeof regs };
	if (ptrace(PTRACE_GETREGSET, tid, (void *)NT_PRSTATUS, &io) || io.iov_len != sizeof regs ||
	    regs.cs != USER_CS_64 || (long)regs.rax != -EINTR)
		return;
	for (uint32_t at = 0; at < nr_restarted; at++)
		if (restarted[at] == regs.orig_rax) {
			regs.rax = -ERESTARTNOHAND;
			ptrace(PTRACE_SETREGSET, tid, (void *)NT_PRSTATUS, &io);
			return;
		}
#else
	(void)tid;
#endif
}

/* Queues the signal with our mark, in the stop that PTRACE_INTERRUPT caused. Returns 0 if it is queued. */
static int queue(const struct daxemu_delivery *delivery)
{
	if (!takes_sigbus(delivery) || !shows(delivery))
		return -1;
	restart_call(delivery->tid);
	return syscall(SYS_rt_tgsigqueueinfo, delivery->tgid, delivery->tid, SIGBUS, &delivery->mark);
}

/* In a stop for a SIGBUS: gives the signal with our mark its exact siginfo, and detaches. Returns 0 if it did. */
static int give(const struct daxemu_delivery *delivery)
{
	siginfo_t info;
	if (ptrace(PTRACE_GETSIGINFO, delivery->tid, 0, &info) || info.si_code != delivery->mark.si_code ||
	    info.si_value.sival_ptr != delivery->mark.si_value.sival_ptr)
		return -1;
	return ptrace(PTRACE_SETSIGINFO, delivery->tid, 0, &delivery->info) ||
	       ptrace(PTRACE_DETACH, delivery->tid, 0, SIGBUS);
}

/* Handles one stop, or end, of a thread. Returns the kind of wait; -1 while the delivery goes on in C. */
static int step(uint32_t at, int status)
{
	int stage = stages[at], tid = deliveries[at].tid;
	if (stage == INTERRUPTED && WIFSTOPPED(status) && status >> 8 == (SIGTRAP | PTRACE_EVENT_STOP << 8)) {
		if (!queue(&deliveries[at])) {
			stages[at] = QUEUED;
			if (!ptrace(PTRACE_CONT, tid, 0, 0))
				return -1;
			stage = QUEUED;
		}
	} else if (stage == QUEUED && WIFSTOPPED(status) && status >> 8 == SIGBUS && !give(&deliveries[at])) {
		stage = DELIVERED;
	}
	forget(at);
	return stage;
}

/* Each stop raises SIGCHLD, which would interrupt this loop; one at the end is enough for the tracer to look again. */
static void hold_sigchld(int how)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGCHLD);
	pthread_sigmask(how, &set, NULL);
}

void daxemu_restart(const uint32_t *calls, uint32_t count)
{
	for (nr_restarted = 0; nr_restarted < count && nr_restarted < MOST_CALLS; nr_restarted++)
		restarted[nr_restarted] = calls[nr_restarted];
}

/* Seizes and interrupts each thread. Returns the number begun: the next cannot be seized at once, or no slot is free. */
uint32_t daxemu_deliver(const struct daxemu_delivery *each, uint32_t count, uint64_t options)
{
	uint32_t at = 0;
	hold_sigchld(SIG_BLOCK);
	for (; at < count && under_way < MOST; at++) {
		if (may_sleep(&each[at]) || ptrace(PTRACE_SEIZE, each[at].tid, 0, options))
			break;
		/* Fails if the thread is dying, which the next wait reports. */
		ptrace(PTRACE_INTERRUPT, each[at].tid, 0, 0);
		deliveries[under_way] = each[at];
		tids[under_way] = each[at].tid;
		stages[under_way++] = INTERRUPTED;
	}
	hold_sigchld(SIG_UNBLOCK);
	return at;
}

/* Serves up to ``most`` stops reported by now, and lists in ``waits`` those for Python. Returns the number of stops. */
uint32_t daxemu_reap(struct daxemu_wait *waits, uint32_t most, uint32_t *count)
{
	uint32_t stops = 0;
	hold_sigchld(SIG_BLOCK);
	for (*count = 0; stops < most; stops++) {
		int status, tid = waitpid(-1, &status, WNOHANG | __WALL | __WNOTHREAD);
		if (tid <= 0)
			break;
		int at = find(tid), what = at < 0 ? OTHER : step(at, status);
		if (what >= 0)
			waits[(*count)++] = (struct daxemu_wait){ tid, status, what };
	}
	hold_sigchld(SIG_UNBLOCK);
	return stops;
}

/* Hands a thread to Python between two stops. Returns the stage of its delivery; -1 if it has none. */
int32_t daxemu_take_over(int tid)
{
	int at = find(tid);
	int32_t stage = at < 0 ? -1 : stages[at];
	if (at >= 0)
		forget(at);
	return stage;
}
