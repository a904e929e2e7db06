/*
 * racer: one kind of race against memory failures, round after round, and all its signals written down.
 *
 *     racer KIND SEED SIGNALS [lenient]      in a directory of the mount that has the file "common"
 *     racer stranger US                      sleeps and ends: a signal kills it
 *
 * stdin, a line each:  run     rounds, until the next line
 *                      park    answers "parked ROUNDS"
 *                      verify  reads every page of every mapping, answers "page FILE INO PAGE ADDR RESULT" each, then
 *                              "verified"; RESULT is a letter, 0 (zeros), or the code, lsb and address of the fault
 * stdout has those answers and "wrong WHAT" for whatever must never happen. It ends with stdin.
 *
 * SIGNALS gets a line for each signal: PID TID SIGNO CODE ADDR LSB SYNC and, for each mapping that this process has or had
 * there, FILE:PAGE:LIVE:TOUCHED. Every byte of page N of every file is the letter N, or zero.
 *
 * lenient: the mount ends meanwhile, so any system call may fail.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define PAGES 16
#define COMMON 32
#define WINDOWS 48
#define CLONE_RANGE 0x4020da0d /* host/fuse/extra_operations.py */

/* One mapping of a file, now (live) or lately. */
struct window {
	char *addr;
	const char *file;
	ino_t ino;
	unsigned pages;
	int live, touched;
};

static struct window windows[WINDOWS];
static unsigned next_window;
static int signals, lenient;
static unsigned long rounds;
static struct window *common;
static char *reserved; /* addresses for MAP_FIXED: two spans of PAGES */

static __thread sigjmp_buf escape;
static __thread char *volatile touching;
static __thread siginfo_t fault;
static __thread uint64_t dice;

static unsigned below(unsigned n)
{
	dice = dice * 6364136223846793005ULL + 1442695040888963407ULL;
	return (dice >> 33) % n;
}

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void say(const char *format, ...)
{
	char line[512];
	va_list args;
	va_start(args, format);
	int len = vsnprintf(line, sizeof line - 1, format, args);
	va_end(args);
	line[len] = '\n';
	if (write(1, line, len + 1) < 0)
		_exit(0); /* the test is gone */
}

static void wrong(const char *what)
{
	say("wrong %s: %s", what, strerror(errno));
}

/* Poison may refuse; nothing else may. */
static long must(long result, const char *what)
{
	if (result < 0 && errno != EIO && errno != EFAULT && !lenient)
		wrong(what);
	return result;
}

/* A while, asleep or awake. */
static void dawdle(unsigned us)
{
	struct timespec now, end;
	us = below(us + 1);
	if (below(2)) {
		usleep(us);
		return;
	}
	clock_gettime(CLOCK_MONOTONIC, &end);
	do
		clock_gettime(CLOCK_MONOTONIC, &now);
	while ((now.tv_sec - end.tv_sec) * 1000000000L + now.tv_nsec - end.tv_nsec < us * 1000L);
}

/* ---- signals ---- */

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	char line[1024];
	char *addr = info->si_code > 0 ? info->si_addr : NULL;
	int mce = info->si_code == BUS_MCEERR_AR || info->si_code == BUS_MCEERR_AO;
	int sync = touching && info->si_code > 0 && info->si_code != BUS_MCEERR_AO &&
		   !(((uintptr_t)addr ^ (uintptr_t)touching) & ~(PAGE - 1));
	int saved = errno, len;

	(void)context;
	len = snprintf(line, sizeof line, "%d %d %d %d %p %d %d", getpid(), gettid(), sig, info->si_code, (void *)addr,
		       mce ? info->si_addr_lsb : 0, sync);
	for (struct window *w = windows; w < windows + WINDOWS && len < 900; w++)
		if (w->addr && addr >= w->addr && addr < w->addr + w->pages * PAGE)
			len += snprintf(line + len, sizeof line - len, " %s:%lu:%d:%d", w->file,
					(addr - w->addr) / PAGE, w->live, w->touched);
	line[len++] = '\n';
	if (write(signals, line, len) < 0)
		_exit(4);
	if (sync) {
		fault = *info;
		siglongjmp(escape, 1);
	}
	if (info->si_code > 0 && info->si_code != BUS_MCEERR_AO)
		_exit(3); /* it would come again for ever; the line tells */
	errno = saved;
}

static void catch_signals(void)
{
	struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_RESTART};
	sigaction(SIGBUS, &action, NULL);
}

/* ---- mappings ---- */

static struct window *note(char *addr, unsigned pages, const char *file, ino_t ino)
{
	struct window *w;
	do
		w = &windows[next_window++ % WINDOWS];
	while (w->live);
	*w = (struct window){.addr = addr, .file = file, .ino = ino, .pages = pages, .live = 1};
	return w;
}

static struct window *map(int fd, const char *file, unsigned pages, int flags, char *at)
{
	struct stat st;
	if (fd < 0 || fstat(fd, &st) < 0)
		return NULL;
	char *addr = mmap(at, pages * PAGE, PROT_READ | PROT_WRITE, flags | (at ? MAP_FIXED : 0), fd, 0);
	if (addr == MAP_FAILED) {
		must(-1, "mmap");
		return NULL;
	}
	return note(addr, pages, file, st.st_ino);
}

static void unmap(struct window *w)
{
	if (!w)
		return;
	munmap(w->addr, w->pages * PAGE);
	w->live = 0;
}

/* One load or store; what was loaded, or -1 where it faulted. */
static __attribute__((noinline)) int access_once(char *at, int store, char c)
{
	int result;
	if (sigsetjmp(escape, 1)) {
		result = -1;
	} else {
		touching = at;
		if (store)
			*(volatile char *)at = c;
		result = *(volatile char *)at;
	}
	touching = NULL;
	return result;
}

static char letter(unsigned page)
{
	return 'a' + page % 26;
}

static void touch(struct window *w, unsigned page)
{
	if (!w)
		return;
	w->touched = 1;
	int c = access_once(w->addr + page * PAGE + below(PAGE), 0, 0);
	if (c > 0 && c != letter(page))
		say("wrong byte %d in page %u of %s", c, page, w->file);
}

static void touch_some(struct window *w, unsigned count)
{
	while (w && count--)
		touch(w, below(w->pages));
}

static void touch_all(struct window *w)
{
	for (unsigned page = 0; w && page < w->pages; page++)
		touch(w, page);
}

/* ---- files ---- */

static void fill(int fd, unsigned page, unsigned end)
{
	char bytes[PAGES * PAGE];
	for (unsigned i = page; i < end; i++)
		memset(bytes + (i - page) * PAGE, letter(i), PAGE);
	must(pwrite(fd, bytes, (end - page) * PAGE, page * PAGE), "pwrite");
}

static int make(const char *name)
{
	int fd = must(open(name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644), "create");
	fill(fd, 0, PAGES);
	return fd;
}

struct file {
	int fd;
	struct window *w;
};

/* A file that is made in the first round, mapped, and kept. */
static void keep(struct file *file, const char *name)
{
	if (!file->w) {
		file->fd = make(name);
		file->w = map(file->fd, name, PAGES, MAP_SHARED, NULL);
		touch_all(file->w);
	}
}

static int clone_all(int to, int from)
{
	uint64_t range[4] = {from, 0, PAGES * PAGE, 0};
	return ioctl(to, CLONE_RANGE, range);
}

/* ---- the kinds: one round each ---- */

static void race_truncate(void)
{
	static struct file f;
	keep(&f, "truncate");
	unsigned left = below(PAGES);
	must(ftruncate(f.fd, left * PAGE), "ftruncate");
	touch_some(f.w, 3);
	fill(f.fd, left, PAGES);
	touch_some(f.w, 6);
}

static void race_unlink(void)
{
	int fd = make("unlink");
	struct window *w = map(fd, "unlink", PAGES, MAP_SHARED, NULL);
	touch_all(w);
	dawdle(1000);
	must(unlink("unlink"), "unlink");
	touch_all(w);
	unmap(w);
	close(fd);
}

static void race_clone(void)
{
	static struct file from, to;
	keep(&from, "clone-from");
	keep(&to, "clone-to");
	off_t in = 0, out = 0;
	if (below(2))
		must(clone_all(to.fd, from.fd), "clone");
	else
		must(copy_file_range(from.fd, &in, to.fd, &out, PAGES * PAGE, 0), "copy_file_range");
	touch_some(from.w, 4);
	touch_some(to.w, 4);
	unsigned page = below(PAGES);
	fill(below(2) ? from.fd : to.fd, page, page + 1);
}

static void race_cow(void)
{
	static struct file from, to;
	keep(&from, "cow-from");
	keep(&to, "cow-to");
	if (rounds % 8 == 0)
		must(clone_all(to.fd, from.fd), "clone");
	unsigned page = below(PAGES);
	struct window *w = below(2) ? from.w : to.w;
	if (!w)
		return;
	w->touched = 1;
	access_once(w->addr + page * PAGE, 1, letter(page));
	if (below(2))
		must(msync(w->addr + page * PAGE, PAGE, MS_SYNC), "msync");
	page = below(PAGES);
	fill(below(2) ? from.fd : to.fd, page, page + 1);
	touch_some(from.w, 2);
	touch_some(to.w, 2);
}

static void race_rename(void)
{
	int fd = make("rename-new");
	struct window *w = map(fd, "rename", PAGES, MAP_SHARED, NULL);
	touch_some(w, 4);
	must(rename("rename-new", "rename"), "rename");
	touch_some(w, 8);
	unmap(w);
	close(fd);
}

static void expect_end(pid_t pid, const char *what, int killed)
{
	int status;
	if (waitpid(pid, &status, 0) != pid)
		wrong("waitpid");
	else if (!(WIFEXITED(status) && !WEXITSTATUS(status)) && !(killed && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL))
		say("wrong end of %s %d: wait status %#x", what, pid, status);
}

static void race_exec(void)
{
	static struct file f;
	static char *const argv[] = {"racer", "stranger", "3000", NULL};
	char *const envp[] = {NULL};
	pid_t pid;
	keep(&f, "exec");
	touch_some(f.w, 4);
	if (below(4) == 0) {
		if (posix_spawn(&pid, "/proc/self/exe", NULL, NULL, argv, envp))
			return wrong("posix_spawn");
	} else if (!(pid = fork())) {
		touch_all(f.w);
		dawdle(800);
		execve("/proc/self/exe", argv, envp);
		_exit(5);
	}
	touch_some(f.w, 4);
	expect_end(pid, "stranger", 0);
}

static void race_exit(void)
{
	static struct file f;
	keep(&f, "exit");
	pid_t pid = fork();
	if (!pid) {
		touch_all(f.w);
		dawdle(800);
		_exit(0);
	}
	int killed = below(2);
	if (killed) {
		dawdle(800);
		kill(pid, SIGKILL);
	}
	expect_end(pid, "child", killed);
}

static void race_fork(void)
{
	static struct file f;
	static struct window *own;
	keep(&f, "fork");
	if (!own)
		own = map(f.fd, "fork", PAGES, MAP_PRIVATE, NULL);
	touch_some(f.w, 4);
	touch_some(own, 4);
	pid_t pid = fork();
	if (!pid) {
		touch_all(f.w);
		touch_all(own);
		_exit(0);
	}
	touch_some(f.w, 4);
	expect_end(pid, "child", 0);
	unsigned page = below(PAGES);
	fill(f.fd, page, page + 1);
}

static void race_munmap(void)
{
	static struct file f;
	keep(&f, "munmap");
	struct window *w = map(f.fd, "munmap", PAGES, MAP_SHARED, NULL);
	touch_some(w, 4);
	unmap(w);
	unsigned page = below(PAGES);
	fill(f.fd, page, page + 1);
}

/* Where poison was mapped, but never touched, something healthy appears: nothing here may ever be signalled. */
static void race_replace(void)
{
	static int bad, good;
	if (!rounds) {
		bad = make("replace");
		good = make("healthy-replace");
	}
	struct window *w = map(bad, "replace", PAGES, MAP_SHARED, reserved);
	dawdle(100);
	if (w)
		w->live = 0;
	w = map(good, "healthy-replace", PAGES, MAP_SHARED, reserved);
	touch_all(w);
	dawdle(300);
	if (w)
		w->live = 0;
}

static void race_remap(void)
{
	static struct file f;
	static struct window *w;
	keep(&f, "remap");
	if (!w)
		w = map(f.fd, "remap", PAGES, MAP_SHARED, reserved);
	if (!w)
		return;
	touch_some(w, 4);
	char *to = w->addr == reserved ? reserved + PAGES * PAGE : reserved;
	struct window *moved = note(to, PAGES, "remap", w->ino);
	moved->touched = 1;
	if (mremap(w->addr, PAGES * PAGE, PAGES * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == MAP_FAILED)
		wrong("mremap");
	w->live = 0;
	w = moved;
	touch_some(w, 4);
	unsigned page = below(PAGES);
	fill(f.fd, page, page + 1);
}

static struct file threaded;

static void *run_thread(void *seed)
{
	dice = (uintptr_t)seed;
	touch_some(threaded.w, 8);
	return NULL;
}

static void race_threads(void)
{
	pthread_t thread[3];
	keep(&threaded, "threads");
	for (int i = 0; i < 3; i++)
		if (pthread_create(&thread[i], NULL, run_thread, (void *)(uintptr_t)(rounds * 3 + i)))
			return wrong("pthread_create");
	touch_some(threaded.w, 4);
	for (int i = 0; i < 3; i++)
		pthread_join(thread[i], NULL);
	unsigned page = below(PAGES);
	fill(threaded.fd, page, page + 1);
}

static void race_io(void)
{
	static struct file f;
	static int scratch;
	char bytes[4 * PAGE];
	keep(&f, "io");
	if (!scratch)
		scratch = memfd_create("scratch", MFD_CLOEXEC);
	unsigned page = below(PAGES), length = 1 + below(4 * PAGE);
	touch_some(f.w, 4);
	must(pread(f.fd, bytes, length, page * PAGE), "pread");
	memset(bytes, letter(page), PAGE);
	must(pwrite(f.fd, bytes, 1 + below(PAGE), page * PAGE), "pwrite");
	if (f.w) /* poison in the buffer of a system call: EFAULT, no signal */
		must(pwrite(scratch, f.w->addr + below(PAGES) * PAGE, PAGE, 0), "pwrite from the mapping");
}

static const struct kind {
	const char *name;
	void (*race)(void);
} kinds[] = {
	{"truncate", race_truncate}, {"unlink", race_unlink}, {"clone", race_clone},	 {"cow", race_cow},
	{"rename", race_rename},     {"exec", race_exec},     {"exit", race_exit},	 {"fork", race_fork},
	{"munmap", race_munmap},     {"replace", race_replace}, {"remap", race_remap}, {"threads", race_threads},
	{"io", race_io},
};

/* ---- what it is told ---- */

static void verify(void)
{
	for (struct window *w = windows; w < windows + WINDOWS; w++) {
		w->touched |= w->live;
		for (unsigned page = 0; w->live && page < w->pages; page++) {
			char *at = w->addr + page * PAGE;
			int c = access_once(at, 0, 0);
			if (c > 0)
				say("page %s %lu %u %p %c", w->file, w->ino, page, (void *)at, c);
			else if (!c)
				say("page %s %lu %u %p 0", w->file, w->ino, page, (void *)at);
			else
				say("page %s %lu %u %p %d %d %p", w->file, w->ino, page, (void *)at, fault.si_code,
				    fault.si_addr_lsb, fault.si_addr);
		}
	}
	say("verified");
}

static void serve(void (*race)(void))
{
	struct pollfd input = {.fd = 0, .events = POLLIN};
	char line[32];
	int running = 0;
	for (;;) {
		if (!running || poll(&input, 1, 0) > 0) {
			ssize_t length = read(0, line, sizeof line);
			if (length <= 0)
				_exit(0);
			if (line[0] == 'p')
				say("parked %lu", rounds);
			if (line[0] == 'v')
				verify();
			running = line[0] == 'r';
			continue;
		}
		race();
		touch(common, below(COMMON));
		rounds++;
	}
}

int main(int argc, char **argv)
{
	if (argc == 3 && !strcmp(argv[1], "stranger"))
		return usleep(atoi(argv[2]));
	if (argc < 4)
		return 2;
	dice = strtoull(argv[2], NULL, 0);
	lenient = argc > 4;
	signals = open(argv[3], O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	if (nice(10) < 0) /* or nobody else would get anything done, and there would be nothing to race against */
		return 2;
	prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0);
	catch_signals();
	/* A file: on a direct mount, MAP_FIXED is over direct mappings only. */
	reserved = mmap(NULL, 2 * PAGES * PAGE, PROT_NONE, MAP_SHARED, open("common", O_RDWR | O_CLOEXEC), 0);
	common = map(open("common", O_RDWR | O_CLOEXEC), "common", COMMON, MAP_SHARED, NULL);
	for (unsigned i = 0; i < sizeof kinds / sizeof *kinds; i++)
		if (!strcmp(kinds[i].name, argv[1]))
			serve(kinds[i].race);
	return 2;
}
