/*
 * actor: a process that does what it is told, one command per line on stdin, and says on stdout, one JSON line each,
 * how every command ended ({"res": ...}) and which signals it got ({"signal": ...}).
 *
 *     actor NAME [die-with-parent | exec]
 *
 * tests/support/actor.py drives it. The commands are those of the kernel recordings:
 *
 *   open FD NAME rw|ro|direct|creat      close FD      fsync FD      fdatasync FD
 *   syncfs FD      trunc FD LEN          unlink NAME
 *   pread FD OFF LEN                     pwrite FD OFF LEN C
 *   punch FD OFF LEN                     zero FD OFF LEN
 *   ficlone DST SRC                      clonerange DST SRC SRCOFF LEN DSTOFF      copyrange (the same)
 *   mmap M FD PAGE PAGES shared|private|ro [populate|locked]      munmap M      msync M P PAGES
 *   mlock M P PAGES      mlock2 M P PAGES      mlockall current|future
 *   vmsplice M P LEN                     page P of M into a pipe
 *   fixbuf M P PAGES                     register it as a buffer with io_uring
 *   tr M P    tw M P C                   load, store the first byte of page P of mapping M
 *   ttr T M P    ttw T M P C             the same in extra thread T
 *   spin M P                             says {"spinning": true} after the first load, ends with the fault
 *   kread M P FD OFF LEN    kwrite ...   pread, pwrite with page P of M as the buffer
 *   pvmread PID ADDR LEN    pvmwrite ... process_vm_readv, process_vm_writev; ADDR in hex
 *   madvise M P PAGES hwpoison|soft|N    pagemap M P      addr M
 *   mcekill early|late|default|get       threads POLICY...  (n none, e early, l late; the main thread is 0)
 *   sig block|unblock|ignore|default|handler|pending|take
 *   queue CODE M P LSB                   queue a SIGBUS with this si_code to itself, as the kernel would
 *   fork NAME INFIFO OUTFIFO             the child is another actor, on those FIFOs
 *   exec      exit [STATUS]      sleep MS      tid T      barrier
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define PMD (2UL << 20)
#define FDS 64
#define MAPS 16
#define THREADS 32
#define WORDS 40
#define MAX_PAGES 3900 /* of one pread: its reply must fit into PIPE_BUF, to be written at once */

#ifndef MADV_SOFT_OFFLINE
#define MADV_SOFT_OFFLINE 101
#endif

struct mapping {
	char *addr;
	size_t len;
};

/* What a thread is doing, which tells how a signal got it. */
enum where { IDLE, COMMAND, ACCESS };

struct access {
	volatile char *at;
	int store;
	char c;
	long faults;
	int faulted;
};

struct thread {
	pthread_t handle;
	pid_t tid;
	char policy;
	sigset_t mask;
	sem_t work, done;
	struct access *job; /* NULL: a barrier */
};

static const char *name;
static int fds[FDS];
static struct mapping maps[MAPS];
static struct thread threads[THREADS]; /* [0] is the main thread's, and unused */
static int nthreads = 1;

static __thread int thread_index;
static __thread volatile sig_atomic_t where;
static __thread sigjmp_buf escape;

/* ---- output: every line is one write(2) of at most PIPE_BUF bytes, so lines of threads and handlers never mix ---- */

static void put_line(const char *line, size_t len)
{
	while (write(1, line, len) < 0)
		if (errno != EINTR)
			_exit(120); /* nobody listens any more */
}

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void say(const char *format, ...)
{
	char line[PAGE];
	va_list args;
	va_start(args, format);
	int len = vsnprintf(line, sizeof line - 1, format, args);
	va_end(args);
	line[len] = '\n';
	put_line(line, len + 1);
}

static const char *errno_name(int error)
{
	const char *known = error ? strerrorname_np(error) : "0";
	return known ? known : "?";
}

static void reply(long ret, int error)
{
	say("{\"res\": {\"ret\": %ld, \"errno\": \"%s\"}}", ret, errno_name(ret < 0 ? error : 0));
}

static void reply_call(long ret)
{
	reply(ret, errno);
}

/* The script is wrong: no outcome of anything. */
static void complain(const char *what)
{
	say("{\"error\": \"%s\"}", what);
}

static void reply_access(const struct access *a)
{
	unsigned char c = a->c ? a->c : '0';
	if (a->faulted)
		say("{\"res\": {\"faulted\": true}}");
	else
		say("{\"res\": {\"ok\": \"\\u%04x\", \"faults\": %ld}}", c, a->faults);
}

/* ---- signals: all of this is async-signal-safe ---- */

static char *put_str(char *p, const char *s)
{
	while (*s)
		*p++ = *s++;
	return p;
}

static char *put_num(char *p, uint64_t n, unsigned base)
{
	char digits[24];
	int i = 0;
	do
		digits[i++] = "0123456789abcdef"[n % base];
	while (n /= base);
	while (i)
		*p++ = digits[--i];
	return p;
}

static char *put_int(char *p, long n)
{
	if (n < 0)
		*p++ = '-';
	return put_num(p, n < 0 ? -(uint64_t)n : (uint64_t)n, 10);
}

static char *put_hex(char *p, uint64_t n)
{
	return put_num(put_str(p, "0x"), n, 16);
}

static char *put_code(char *p, int sig, int code)
{
	static const char *const bus[] = {"", "BUS_ADRALN", "BUS_ADRERR", "BUS_OBJERR", "BUS_MCEERR_AR", "BUS_MCEERR_AO"};
	static const char *const segv[] = {"", "SEGV_MAPERR", "SEGV_ACCERR"};
	if (sig == SIGBUS && code >= 1 && code <= 5)
		return put_str(p, bus[code]);
	if (sig == SIGSEGV && code >= 1 && code <= 2)
		return put_str(p, segv[code]);
	return put_int(p, code);
}

static char *put_addr(char *p, char *addr)
{
	for (int m = 0; m < MAPS; m++) {
		if (addr >= maps[m].addr && addr < maps[m].addr + maps[m].len) {
			p = put_num(put_str(p, "m"), m, 10);
			return put_hex(put_str(p, "+"), addr - maps[m].addr);
		}
	}
	return put_hex(p, (uintptr_t)addr);
}

/* Did something that the thread itself did cause it? (Anybody can send the others.) */
static int is_synchronous(const siginfo_t *info)
{
	return info->si_code > 0 && !(info->si_signo == SIGBUS && info->si_code == BUS_MCEERR_AO);
}

static const char *how(const siginfo_t *info)
{
	if (!is_synchronous(info) || where == IDLE)
		return "async";
	return where == ACCESS ? "during access" : "at syscall return";
}

static void report_signal(const siginfo_t *info, const char *manner)
{
	char line[512], *p = line;
	int sig = info->si_signo, code = info->si_code;
	char *addr = code > 0 ? info->si_addr : NULL;
	p = put_num(put_str(p, "{\"signal\": {\"thread\": "), thread_index, 10);
	p = put_str(p, sig == SIGBUS ? ", \"sig\": \"SIGBUS\"" : ", \"sig\": \"SIGSEGV\"");
	p = put_code(put_str(p, ", \"code\": \""), sig, code);
	p = put_addr(put_str(p, "\", \"addr\": \""), addr);
	p = put_num(put_str(p, "\", \"raw\": "), (uintptr_t)addr, 10);
	if (sig == SIGBUS && (code == BUS_MCEERR_AR || code == BUS_MCEERR_AO))
		p = put_int(put_str(p, ", \"lsb\": "), info->si_addr_lsb);
	p = put_str(put_str(p, ", \"how\": \""), manner);
	p = put_str(p, "\"}}\n");
	put_line(line, p - line);
}

static void on_signal(int sig, siginfo_t *info, void *context)
{
	int saved = errno;
	(void)context;
	report_signal(info, how(info));
	if (is_synchronous(info) && where == ACCESS)
		siglongjmp(escape, 1);
	if (sig == SIGSEGV)
		signal(SIGSEGV, SIG_DFL); /* a bug of the actor: let it happen again */
	errno = saved;
}

static int catch(int sig)
{
	struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
	return sigaction(sig, &action, NULL);
}

static sigset_t block_all(void)
{
	sigset_t all, before;
	sigfillset(&all);
	pthread_sigmask(SIG_SETMASK, &all, &before);
	return before;
}

static void restore_mask(const sigset_t *mask)
{
	pthread_sigmask(SIG_SETMASK, mask, NULL);
}

/* ---- memory accesses ---- */

static long fault_count(void)
{
	struct rusage usage;
	getrusage(RUSAGE_THREAD, &usage);
	return usage.ru_minflt + usage.ru_majflt;
}

static __attribute__((noinline)) void access_once(struct access *a)
{
	int before_this = where;
	if (sigsetjmp(escape, 1)) {
		a->faulted = 1;
	} else {
		where = ACCESS;
		long before = fault_count();
		if (a->store)
			*a->at = a->c;
		else
			a->c = *a->at;
		a->faults = fault_count() - before;
	}
	where = before_this;
}

/* A rehearsal on the stack first, so that the faults counted are the page's and not those of code, stack or TLS. */
static void do_access(struct access *a)
{
	char own = 0;
	struct access rehearsal = {.at = &own, .store = a->store};
	access_once(&rehearsal);
	access_once(a);
}

/* All of it counts as the access: nothing in the loop minds being jumped out of. */
static void spin(volatile char *at)
{
	static const char spinning[] = "{\"spinning\": true}\n";
	struct pollfd input = {.fd = 0, .events = POLLIN};
	if (sigsetjmp(escape, 1)) {
		where = COMMAND;
		say("{\"res\": {\"faulted\": true}}");
		return;
	}
	where = ACCESS;
	(void)*at;
	put_line(spinning, sizeof spinning - 1);
	for (;;) {
		for (int i = 0; i < 100000; i++)
			(void)*at;
		if (poll(&input, 1, 0) > 0 && input.revents & POLLHUP)
			_exit(0); /* the test is gone */
	}
}

/* ---- threads ---- */

static int set_policy(char policy)
{
	int arg = policy == 'e' ? PR_MCE_KILL_EARLY : policy == 'l' ? PR_MCE_KILL_LATE : PR_MCE_KILL_DEFAULT;
	return prctl(PR_MCE_KILL, PR_MCE_KILL_SET, arg, 0, 0);
}

static void wait_for(sem_t *sem)
{
	while (sem_wait(sem))
		;
}

static void *run_thread(void *arg)
{
	struct thread *self = arg;
	thread_index = self - threads;
	self->tid = gettid();
	set_policy(self->policy);
	restore_mask(&self->mask);
	for (;;) {
		sem_post(&self->done);
		wait_for(&self->work);
		where = COMMAND;
		if (self->job)
			do_access(self->job);
		where = IDLE;
	}
	return NULL;
}

static int start_thread(char policy)
{
	if (nthreads == THREADS)
		return EAGAIN;
	struct thread *t = &threads[nthreads];
	*t = (struct thread){.policy = policy};
	sem_init(&t->work, 0, 0);
	sem_init(&t->done, 0, 0);
	t->mask = block_all();
	int error = pthread_create(&t->handle, NULL, run_thread, t);
	restore_mask(&t->mask);
	if (error)
		return error;
	wait_for(&t->done);
	nthreads++;
	return 0;
}

static void run_in_thread(int t, struct access *job)
{
	threads[t].job = job;
	sem_post(&threads[t].work);
	wait_for(&threads[t].done);
}

/* ---- the words of the command being executed; a wrong one makes `bad` true ---- */

static char *words[WORDS];
static int nwords;
static const char *bad;

static const char *word(int i)
{
	if (i < nwords)
		return words[i];
	bad = "a word is missing";
	return "";
}

static long number(int i)
{
	char *end;
	const char *text = word(i);
	long n = strtol(text, &end, 0);
	if (!*text || *end)
		bad = "not a number";
	return n;
}

static int slot(int i, int limit)
{
	long n = number(i);
	if (n >= 0 && n < limit)
		return n;
	bad = "slot out of range";
	return 0;
}

/* The index in NULL-terminated `choices` of word i. */
static int choice(int i, const char *const *choices)
{
	const char *text = word(i);
	for (int k = 0; choices[k]; k++)
		if (!strcmp(choices[k], text))
			return k;
	bad = "no such choice";
	return -1;
}

/* An empty slot gives -1, so that the system call says EBADF. */
static int fd_at(int i)
{
	return fds[slot(i, FDS)];
}

static struct mapping *mapping_at(int i)
{
	struct mapping *m = &maps[slot(i, MAPS)];
	if (!m->addr)
		bad = "not mapped";
	return m;
}

/* Page word i+1 of mapping word i. */
static char *page_at(int i)
{
	struct mapping *m = mapping_at(i);
	unsigned long page = number(i + 1);
	if (!bad && page >= m->len / PAGE)
		bad = "beyond the mapping";
	return m->addr + page * PAGE;
}

/* ---- commands: files ---- */

static void cmd_open(void)
{
	static const char *const modes[] = {"rw", "ro", "direct", "creat", NULL};
	static const int flags[] = {O_RDWR, O_RDONLY, O_RDWR | O_DIRECT, O_RDWR | O_CREAT | O_TRUNC};
	int *fd = &fds[slot(1, FDS)];
	const char *path = word(2);
	int mode = choice(3, modes);
	if (*fd >= 0)
		bad = "descriptor in use";
	if (bad)
		return;
	*fd = open(path, flags[mode] | O_CLOEXEC, 0666);
	reply(*fd < 0 ? -1 : 0, errno);
}

static void cmd_close(void)
{
	int *fd = &fds[slot(1, FDS)];
	if (bad)
		return;
	reply_call(close(*fd));
	*fd = -1;
}

static void *page_buffer(size_t len)
{
	void *buffer = mmap(NULL, len + 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if (buffer != MAP_FAILED)
		return buffer;
	bad = "no memory";
	return NULL;
}

/* One letter for every page's worth of the buffer: what it holds all over, 0 for zeros, ? for anything else. */
static void describe(const char *buffer, size_t len, char *letters)
{
	for (size_t at = 0; at < len; at += PAGE) {
		size_t part = len - at < PAGE ? len - at : PAGE;
		char c = buffer[at];
		int same = !memcmp(buffer + at, buffer + at + 1, part - 1);
		int plain = c > ' ' && c < 127 && c != '"' && c != '\\';
		*letters++ = !same ? '?' : !c ? '0' : plain ? c : '?';
	}
	*letters = 0;
}

static void cmd_pread(void)
{
	char letters[MAX_PAGES + 1] = "";
	int fd = fd_at(1);
	long off = number(2);
	size_t len = number(3);
	if (len > MAX_PAGES * PAGE)
		bad = "too long";
	char *buffer = bad ? NULL : page_buffer(len);
	if (bad)
		return;
	long ret = pread(fd, buffer, len, off);
	int error = errno;
	if (ret > 0)
		describe(buffer, ret, letters);
	munmap(buffer, len + 1);
	say("{\"res\": {\"ret\": %ld, \"errno\": \"%s\", \"pages\": \"%s\"}}", ret, errno_name(ret < 0 ? error : 0), letters);
}

static void cmd_pwrite(void)
{
	int fd = fd_at(1);
	long off = number(2);
	size_t len = number(3);
	char c = *word(4);
	char *buffer = bad ? NULL : page_buffer(len);
	if (bad)
		return;
	memset(buffer, c, len);
	long ret = pwrite(fd, buffer, len, off);
	int error = errno;
	munmap(buffer, len + 1);
	reply(ret, error);
}

static void cmd_fsync(void)
{
	int fd = fd_at(1);
	if (!bad)
		reply_call(fsync(fd));
}

static void cmd_fdatasync(void)
{
	int fd = fd_at(1);
	if (!bad)
		reply_call(fdatasync(fd));
}

static void cmd_unlink(void)
{
	const char *path = word(1);
	if (!bad)
		reply_call(unlink(path));
}

static void cmd_syncfs(void)
{
	int fd = fd_at(1);
	if (!bad)
		reply_call(syncfs(fd));
}

static void cmd_trunc(void)
{
	int fd = fd_at(1);
	long len = number(2);
	if (!bad)
		reply_call(ftruncate(fd, len));
}

static void do_fallocate(int mode)
{
	int fd = fd_at(1);
	long off = number(2), len = number(3);
	if (!bad)
		reply_call(fallocate(fd, mode, off, len));
}

static void cmd_punch(void)
{
	do_fallocate(FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE);
}

static void cmd_zero(void)
{
	do_fallocate(FALLOC_FL_ZERO_RANGE);
}

static void cmd_ficlone(void)
{
	int dst = fd_at(1), src = fd_at(2);
	if (!bad)
		reply_call(ioctl(dst, FICLONE, src));
}

static void cmd_clonerange(void)
{
	int dst = fd_at(1);
	struct file_clone_range range = {
		.src_fd = fd_at(2), .src_offset = number(3), .src_length = number(4), .dest_offset = number(5)};
	if (!bad)
		reply_call(ioctl(dst, FICLONERANGE, &range));
}

static void cmd_copyrange(void)
{
	int dst = fd_at(1), src = fd_at(2);
	off_t from = number(3), to = number(5);
	size_t len = number(4);
	if (!bad)
		reply_call(copy_file_range(src, &from, dst, &to, len, 0));
}

/* ---- commands: memory ---- */

/* Room for a mapping that huge pages would fit: address and file offset agree in their low 21 bits. */
static char *aligned_room(size_t len, off_t off)
{
	if (len < PMD)
		return NULL;
	char *room = mmap(NULL, len + PMD, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	if (room == MAP_FAILED)
		return NULL;
	char *start = room + (((uintptr_t)off - (uintptr_t)room) & (PMD - 1));
	munmap(room, len + PMD);
	return start;
}

static void cmd_mmap(void)
{
	static const char *const kinds[] = {"shared", "private", "ro", NULL};
	static const int flags[] = {MAP_SHARED, MAP_PRIVATE, MAP_SHARED};
	static const char *const populates[] = {"touched", "populate", "locked", NULL};
	static const int also[] = {0, MAP_POPULATE, MAP_LOCKED};
	struct mapping *m = &maps[slot(1, MAPS)];
	int fd = fd_at(2);
	off_t off = number(3) * PAGE;
	size_t len = number(4) * PAGE;
	int kind = choice(5, kinds);
	int more = nwords > 6 ? choice(6, populates) : 0;
	if (m->addr)
		bad = "mapping in use";
	if (bad)
		return;
	int prot = kind == 2 ? PROT_READ : PROT_READ | PROT_WRITE;
	char *addr = mmap(aligned_room(len, off), len, prot, flags[kind] | also[more], fd, off);
	if (addr != MAP_FAILED)
		*m = (struct mapping){addr, len};
	reply(addr == MAP_FAILED ? -1 : 0, errno);
}

static void cmd_munmap(void)
{
	struct mapping *m = mapping_at(1);
	if (bad)
		return;
	reply_call(munmap(m->addr, m->len));
	*m = (struct mapping){0};
}

static void cmd_msync(void)
{
	char *at = page_at(1);
	size_t len = number(3) * PAGE;
	if (!bad)
		reply_call(msync(at, len, MS_SYNC));
}

static void touch_here(int store)
{
	struct access a = {.at = page_at(1), .store = store, .c = store ? *word(3) : 0};
	if (bad)
		return;
	do_access(&a);
	reply_access(&a);
}

static void touch_in_thread(int store)
{
	int t = slot(1, nthreads);
	struct access a = {.at = page_at(2), .store = store, .c = store ? *word(4) : 0};
	if (!bad && t == 0)
		bad = "not an extra thread";
	if (bad)
		return;
	run_in_thread(t, &a);
	reply_access(&a);
}

static void cmd_tr(void)
{
	touch_here(0);
}

static void cmd_tw(void)
{
	touch_here(1);
}

static void cmd_ttr(void)
{
	touch_in_thread(0);
}

static void cmd_ttw(void)
{
	touch_in_thread(1);
}

static void cmd_spin(void)
{
	char *at = page_at(1);
	if (!bad)
		spin(at);
}

static void cmd_kread(void)
{
	char *buffer = page_at(1);
	int fd = fd_at(3);
	long off = number(4), len = number(5);
	if (!bad)
		reply_call(pread(fd, buffer, len, off));
}

static void cmd_kwrite(void)
{
	char *buffer = page_at(1);
	int fd = fd_at(3);
	long off = number(4), len = number(5);
	if (!bad)
		reply_call(pwrite(fd, buffer, len, off));
}

static void do_process_vm(int write_it)
{
	pid_t pid = number(1);
	struct iovec remote = {(void *)number(2), number(3)};
	char *buffer = bad ? NULL : page_buffer(remote.iov_len);
	if (bad)
		return;
	struct iovec local = {buffer, remote.iov_len};
	memset(buffer, 'v', remote.iov_len);
	long ret = write_it ? process_vm_writev(pid, &local, 1, &remote, 1, 0)
			    : process_vm_readv(pid, &local, 1, &remote, 1, 0);
	int error = errno;
	munmap(buffer, remote.iov_len + 1);
	reply(ret, error);
}

static void cmd_pvmread(void)
{
	do_process_vm(0);
}

static void cmd_pvmwrite(void)
{
	do_process_vm(1);
}

static void cmd_madvise(void)
{
	char *at = page_at(1);
	size_t len = number(3) * PAGE;
	const char *advice = word(4);
	int n = !strcmp(advice, "hwpoison") ? MADV_HWPOISON : !strcmp(advice, "soft") ? MADV_SOFT_OFFLINE : number(4);
	if (!bad)
		reply_call(madvise(at, len, n));
}

static void cmd_mlock(void)
{
	char *at = page_at(1);
	size_t len = number(3) * PAGE;
	if (!bad)
		reply_call(mlock(at, len));
}

static void cmd_mlock2(void)
{
	char *at = page_at(1);
	size_t len = number(3) * PAGE;
	if (!bad)
		reply_call(syscall(SYS_mlock2, at, len, 0));
}

static void cmd_mlockall(void)
{
	static const char *const whiches[] = {"current", "future", NULL};
	int which = choice(1, whiches);
	if (!bad)
		reply_call(mlockall(which ? MCL_FUTURE : MCL_CURRENT));
}

static void cmd_vmsplice(void)
{
	struct iovec from = {page_at(1), number(3)};
	int ends[2];
	if (bad)
		return;
	if (pipe(ends)) {
		bad = "cannot make a pipe";
		return;
	}
	long ret = vmsplice(ends[1], &from, 1, 0);
	int error = errno;
	close(ends[0]);
	close(ends[1]);
	reply(ret, error);
}

static void cmd_fixbuf(void)
{
	struct io_uring_params params = {0};
	struct iovec buffer = {page_at(1), number(3) * PAGE};
	if (bad)
		return;
	int ring = syscall(SYS_io_uring_setup, 1, &params);
	if (ring < 0) {
		reply(-1, errno);
		return;
	}
	long ret = syscall(SYS_io_uring_register, ring, IORING_REGISTER_BUFFERS, &buffer, 1);
	int error = errno;
	close(ring);
	reply(ret, error);
}

static void cmd_pagemap(void)
{
	uint64_t entry = 0;
	uintptr_t at = (uintptr_t)page_at(1);
	if (bad)
		return;
	int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
	if (pread(fd, &entry, sizeof entry, at / PAGE * sizeof entry) != sizeof entry)
		bad = "cannot read /proc/self/pagemap";
	close(fd);
	if (!bad)
		say("{\"res\": {\"present\": %d, \"swap_entry\": %d, \"file_or_shared\": %d}}", (int)(entry >> 63 & 1),
		    (int)(entry >> 62 & 1), (int)(entry >> 61 & 1));
}

static void cmd_addr(void)
{
	struct mapping *m = mapping_at(1);
	if (!bad)
		reply((long)m->addr, 0);
}

/* ---- commands: signals and processes ---- */

static void cmd_mcekill(void)
{
	static const char *const what[] = {"early", "late", "default", "get", NULL};
	int k = choice(1, what);
	if (!bad)
		reply_call(k == 3 ? prctl(PR_MCE_KILL_GET, 0, 0, 0, 0) : set_policy(what[k][0]));
}

static void cmd_threads(void)
{
	for (int i = 1; i < nwords && !bad; i++) {
		if (!strchr("nel", words[i][0]) || words[i][1])
			bad = "a policy is n, e or l";
		else if (start_thread(words[i][0]))
			bad = "cannot start a thread";
	}
	if (!bad)
		reply(0, 0);
}

static void cmd_tid(void)
{
	int t = slot(1, nthreads);
	if (!bad)
		reply(t ? threads[t].tid : gettid(), 0);
}

/* Every thread has run since: signals sent to it before are reported by now. */
static void cmd_barrier(void)
{
	for (int t = 1; t < nthreads; t++)
		run_in_thread(t, NULL);
	reply(0, 0);
}

static sigset_t only_sigbus(void)
{
	sigset_t set;
	sigemptyset(&set);
	sigaddset(&set, SIGBUS);
	return set;
}

static long take_pending(void)
{
	sigset_t set = only_sigbus();
	siginfo_t info;
	long sig = sigtimedwait(&set, &info, &(struct timespec){0, 0});
	if (sig > 0)
		report_signal(&info, "pending, taken with sigtimedwait");
	return sig;
}

static long is_pending(void)
{
	sigset_t set;
	sigpending(&set);
	return sigismember(&set, SIGBUS);
}

static long set_blocked(int operation)
{
	sigset_t set = only_sigbus();
	errno = pthread_sigmask(operation, &set, NULL);
	return errno ? -1 : 0;
}

static long dispose(void (*action)(int))
{
	return signal(SIGBUS, action) == SIG_ERR ? -1 : 0;
}

static void cmd_sig(void)
{
	static const char *const what[] = {"block", "unblock", "ignore", "default", "handler", "pending", "take", NULL};
	switch (choice(1, what)) {
	case 0:
		reply_call(set_blocked(SIG_BLOCK));
		break;
	case 1:
		reply_call(set_blocked(SIG_UNBLOCK));
		break;
	case 2:
		reply_call(dispose(SIG_IGN));
		break;
	case 3:
		reply_call(dispose(SIG_DFL));
		break;
	case 4:
		reply_call(catch(SIGBUS));
		break;
	case 5:
		reply_call(is_pending());
		break;
	case 6:
		reply_call(take_pending());
		break;
	}
}

/* To itself, and only to itself, a process may send any si_code. */
static void cmd_queue(void)
{
	static const char *const codes[] = {"", "", "BUS_ADRERR", "", "BUS_MCEERR_AR", "BUS_MCEERR_AO", NULL};
	siginfo_t info;
	memset(&info, 0, sizeof info);
	info.si_signo = SIGBUS;
	info.si_code = choice(1, codes);
	info.si_addr = page_at(2);
	info.si_addr_lsb = number(4);
	if (!bad)
		reply_call(syscall(SYS_rt_tgsigqueueinfo, getpid(), gettid(), SIGBUS, &info));
}

static void cmd_sleep(void)
{
	long ms = number(1);
	struct timespec left = {ms / 1000, ms % 1000 * 1000000};
	if (bad)
		return;
	while (nanosleep(&left, &left))
		;
	reply(0, 0);
}

static void become(const char *new_name)
{
	name = strdup(new_name);
	prctl(PR_SET_NAME, name);
}

static void use_streams(int in, int out)
{
	if (in < 0 || out < 0 || dup2(in, 0) < 0 || dup2(out, 1) < 0)
		_exit(121);
	close(in);
	close(out);
}

static void hello(void)
{
	say("{\"hello\": %d}", getpid());
}

static void cmd_fork(void)
{
	const char *child = word(1), *in = word(2), *out = word(3);
	if (bad)
		return;
	sigset_t mask = block_all(); /* the child's signals belong on the child's stream */
	pid_t pid = fork();
	int error = errno;
	if (pid == 0) {
		use_streams(open(in, O_RDONLY | O_CLOEXEC), open(out, O_WRONLY | O_CLOEXEC));
		nthreads = 1;
		become(child);
		hello();
	} else {
		reply(pid, error);
	}
	restore_mask(&mask);
}

static void cmd_exec(void)
{
	char path[PAGE] = "";
	if (readlink("/proc/self/exe", path, sizeof path - 1) > 0)
		execl(path, "actor", name, "exec", NULL);
	reply(-1, errno);
}

static void cmd_exit(void)
{
	int status = nwords > 1 ? number(1) : 0;
	if (bad)
		return;
	reply(0, 0);
	_exit(status);
}

static const struct {
	const char *verb;
	void (*run)(void);
} commands[] = {
	{"addr", cmd_addr}, {"barrier", cmd_barrier}, {"clonerange", cmd_clonerange}, {"close", cmd_close},
	{"copyrange", cmd_copyrange}, {"exec", cmd_exec}, {"exit", cmd_exit}, {"ficlone", cmd_ficlone}, {"fixbuf", cmd_fixbuf},
	{"fdatasync", cmd_fdatasync}, {"fork", cmd_fork}, {"fsync", cmd_fsync}, {"kread", cmd_kread}, {"kwrite", cmd_kwrite},
	{"madvise", cmd_madvise}, {"mcekill", cmd_mcekill}, {"mlock", cmd_mlock},
	{"mlock2", cmd_mlock2}, {"mlockall", cmd_mlockall}, {"mmap", cmd_mmap}, {"msync", cmd_msync},
	{"munmap", cmd_munmap}, {"open", cmd_open}, {"pagemap", cmd_pagemap}, {"pread", cmd_pread},
	{"punch", cmd_punch}, {"pvmread", cmd_pvmread}, {"pvmwrite", cmd_pvmwrite}, {"pwrite", cmd_pwrite},
	{"queue", cmd_queue}, {"sig", cmd_sig}, {"sleep", cmd_sleep}, {"spin", cmd_spin},
	{"syncfs", cmd_syncfs}, {"threads", cmd_threads}, {"tid", cmd_tid}, {"tr", cmd_tr},
	{"trunc", cmd_trunc}, {"ttr", cmd_ttr}, {"ttw", cmd_ttw}, {"tw", cmd_tw}, {"unlink", cmd_unlink},
	{"vmsplice", cmd_vmsplice},
	{"zero", cmd_zero},
};

static void run_command(void)
{
	bad = NULL;
	where = COMMAND;
	for (size_t i = 0; i < sizeof commands / sizeof *commands; i++) {
		if (!strcmp(words[0], commands[i].verb)) {
			commands[i].run();
			if (bad)
				complain(bad);
			where = IDLE;
			return;
		}
	}
	where = IDLE;
	complain("no such command");
}

/* Byte by byte: nothing may be lost in a buffer at exec. */
static int read_line(char *line, size_t size)
{
	size_t len = 0;
	for (;;) {
		ssize_t got = read(0, line + len, 1);
		if (got == 0 || (got < 0 && errno != EINTR))
			return 0;
		if (got < 0)
			continue;
		if (line[len] == '\n')
			break;
		if (len < size - 1)
			len++;
	}
	line[len] = 0;
	return 1;
}

static void split(char *line)
{
	nwords = 0;
	for (char *w = strtok(line, " "); w && nwords < WORDS; w = strtok(NULL, " "))
		words[nwords++] = w;
}

int main(int argc, char **argv)
{
	char line[PAGE];
	const char *option = argc > 2 ? argv[2] : "";
	if (argc < 2)
		return 2;
	if (!strcmp(option, "die-with-parent"))
		prctl(PR_SET_PDEATHSIG, SIGKILL);
	setrlimit(RLIMIT_CORE, &(struct rlimit){0, 0}); /* no core file on the mount */
	for (int i = 0; i < FDS; i++)
		fds[i] = -1;
	become(argv[1]);
	catch(SIGBUS);
	catch(SIGSEGV);
	if (strcmp(option, "exec"))
		hello();
	else
		reply(0, 0);
	while (read_line(line, sizeof line)) {
		split(line);
		if (nwords)
			run_command();
	}
	return 0;
}
