/*
 * Redirection of a thread that forks to the code of its agent (agent.c), by one ptrace stop. Python: forks.py.
 *
 * The thread waits in a fork(2) or clone(2) that seccomp(2) notified. daxemu_seize() answers -ERESTARTNOINTR, so the call did
 * nothing, and the thread stops before its next instruction. daxemu_redirect() stores registers and signal mask in a record,
 * sets the registers for the code, blocks all signals, and lets the thread go: no thread is traced while it forks.
 *
 * All calls for a thread come from one thread of the supervisor, its tracer. No call waits, but for SPINS looks at a thread
 * that is about to stop.
 */
#define _GNU_SOURCE
#include "redirect.h"

#include <elf.h>
#include <errno.h>
#include <linux/seccomp.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/ptrace.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>

#if defined(__x86_64__)
#ifndef __WALL
#define __WALL 0x40000000
#endif
#define WNOTHREAD 0x20000000 /* uapi/linux/wait.h */
#define ERESTARTNOINTR 513 /* linux/errno.h */
#define EVENT_STOP 128 /* PTRACE_EVENT_STOP of uapi/linux/ptrace.h */
#define USER_CS 0x33
#define SPINS 50 /* some 20 us: the thread stops sooner, unless the machine is busy */

enum { NR_CLONE = 56, NR_FORK = 57 };

extern const char daxemu_agent_start[], daxemu_agent_fork[];

/* For redirect.py: place of the records in the memory of an agent, bytes of a record, offset of its word, most ranges. */
const uint32_t daxemu_records[] = { RECORDS, sizeof(struct record), offsetof(struct record, agent), NR_DROPS };

static int copy(int tid, uint64_t there, void *here, size_t length, int write)
{
	struct iovec local = { here, length }, remote = { (void *)there, length };
	ssize_t done = write ? process_vm_writev(tid, &local, 1, &remote, 1, 0) : process_vm_readv(tid, &local, 1, &remote, 1, 0);
	return done == (ssize_t)length ? 0 : done < 0 ? -errno : -EFAULT;
}

/*
 * Returns the number of a record that no thread uses, and in `used` a bit for each record in use; -EAGAIN if there is none,
 * -errno if the memory of the agent at `room` is not there.
 */
int daxemu_free_record(int tid, uint64_t room, uint32_t *used)
{
	struct record records[NR_RECORDS];
	int free = -EAGAIN, error = copy(tid, room + RECORDS, records, sizeof records, 0);
	*used = 0;
	for (int at = NR_RECORDS - 1; at >= 0 && !error; at--) {
		if (records[at].busy)
			*used |= 1u << at;
		else
			free = at;
	}
	return error ? error : free;
}

/* Traces a thread, has it stop, and ends the call `id` that it waits in. Returns -errno of PTRACE_SEIZE; then nothing is done. */
int daxemu_seize(int tid, int listener, uint64_t id)
{
	struct seccomp_notif_resp restart = { .id = id, .error = -ERESTARTNOINTR };
	if (ptrace(PTRACE_SEIZE, tid, NULL, NULL))
		return -errno;
	ptrace(PTRACE_INTERRUPT, tid, NULL, NULL);
	ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &restart); /* fails for a thread that left the call: it stops as well */
	return 0;
}

/* Returns 1 when a seized thread has stopped for good, 0 as long as it runs, -ESRCH if it has ended. */
int daxemu_is_stopped(int tid)
{
	for (int spin = 0; spin < SPINS; spin++) {
		int status, got = waitpid(tid, &status, __WALL | WNOTHREAD | WNOHANG);
		if (got < 0 || (got > 0 && !WIFSTOPPED(status)))
			return -ESRCH;
		if (got == 0) {
			sched_yield();
			continue;
		}
		if (status >> 16 == EVENT_STOP)
			return 1;
		/* Another stop may have swallowed the INTERRUPT: a signal is delivered first. */
		ptrace(PTRACE_INTERRUPT, tid, NULL, NULL);
		ptrace(PTRACE_CONT, tid, NULL, (void *)(uintptr_t)(status >> 16 ? 0 : WSTOPSIG(status)));
	}
	return 0;
}

static int redirected(int tid, uint64_t place, uint64_t room, int number, struct record *record, uint64_t magic)
{
	struct user_regs_struct regs;
	struct iovec vec = { &regs, sizeof regs };
	uint64_t all = ~0ull, at = room + RECORDS + number * sizeof *record;
	if (ptrace(PTRACE_GETREGSET, tid, (void *)NT_PRSTATUS, &vec))
		return -errno;
	if (vec.iov_len != sizeof regs || regs.cs != USER_CS || (long)regs.rax != -ERESTARTNOINTR ||
	    (regs.orig_rax != NR_CLONE && regs.orig_rax != NR_FORK))
		return 0; /* a signal came first: the call is made again, and notified */
	if (ptrace(PTRACE_GETSIGMASK, tid, (void *)sizeof record->mask, &record->mask))
		return -errno;
	record->busy = 1, record->rip = regs.rip, record->room = room;
	record->rdi = regs.rdi, record->rsi = regs.rsi, record->rdx = regs.rdx;
	record->r10 = regs.r10, record->r8 = regs.r8, record->r9 = regs.r9, record->rbp = regs.rbp;
	record->r12 = regs.r12, record->r13 = regs.r13, record->r14 = regs.r14, record->r15 = regs.r15;
	if (regs.orig_rax == NR_FORK)
		regs.rdi = SIGCHLD, regs.rsi = regs.rdx = regs.r10 = regs.r8 = 0;
	record->shares_files = (regs.rdi & CLONE_FILES) != 0;
	int error = copy(tid, at, record, sizeof *record, 1);
	if (error)
		return error;
	regs.rax = NR_CLONE, regs.r9 = magic << 32, regs.r12 = at;
	regs.rip = place + (uint64_t)(daxemu_agent_fork - daxemu_agent_start);
	regs.orig_rax = ~0ull; /* otherwise the kernel would restart the interrupted call */
	if (ptrace(PTRACE_SETSIGMASK, tid, (void *)sizeof all, &all) || ptrace(PTRACE_SETREGSET, tid, (void *)NT_PRSTATUS, &vec))
		return -errno; /* the thread is being killed */
	return 1;
}

/*
 * Lets a stopped thread go: to the code at `place`, with the descriptor `socket` of the agent and `count` ranges (start,
 * length) at `drops`. `magic`: mark of a call that the filter allows; 0: the clone is notified. Returns 1; 0 or -errno if the
 * thread makes its call again.
 */
int daxemu_redirect(int tid, uint64_t place, uint64_t room, int number, int socket, const uint64_t *drops, uint32_t count,
		    uint64_t magic)
{
	struct record record = { .socket = socket, .drops = count };
	int error = count > NR_DROPS ? -EINVAL : count ? copy(tid, room + DROPS, (void *)drops, 16 * count, 1) : 0;
	if (!error)
		error = redirected(tid, place, room, number, &record, magic);
	ptrace(PTRACE_DETACH, tid, NULL, NULL);
	return error;
}
#endif
