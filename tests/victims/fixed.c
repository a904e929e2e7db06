/* Direct mappings at addresses that the program chooses: fixed STEP FILE... Each FILE has at least 16 pages of letters A
   to P. Prints "ok", or the line and the expression that did not hold. tests/mount/direct/test_fixed.py */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/capability.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "must.h"

#define SIZE (16 * PAGE)
#define GIB (1UL << 30)

static sigjmp_buf back;
static siginfo_t last;

static void on_signal(int number, siginfo_t *info, void *context)
{
	(void)number, (void)context;
	if (info->si_code == BUS_MCEERR_AO)
		return;
	last = *info;
	siglongjmp(back, 1);
}

/* Returns the signal of a load, 0 if there is none; the byte in *byte. */
static int load(volatile char *at, char *byte)
{
	if (sigsetjmp(back, 1))
		return last.si_signo;
	*byte = *at;
	return 0;
}

static int store(volatile char *at, char byte)
{
	if (sigsetjmp(back, 1))
		return last.si_signo;
	*at = byte;
	return 0;
}

static char in_file(const char *path, off_t offset)
{
	char byte = 0;
	int fd = open_file(path);
	must(pread(fd, &byte, 1, offset) == 1);
	close(fd);
	return byte;
}

static char *reserve(size_t length)
{
	char *at = mmap(NULL, length, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	must(at != MAP_FAILED);
	return at;
}

static char *map_at(const char *path, void *at, int flags)
{
	int fd = open_file(path);
	char *map = mmap(at, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED_VALIDATE | MAP_SYNC | flags, fd, 0);
	must(map != MAP_FAILED);
	close(fd);
	return map;
}

static int reap(pid_t child)
{
	int status = -1;
	must(child > 0 && waitpid(child, &status, 0) == child);
	return status;
}

/* Four files in a reservation of 1 GiB: stores, the gaps stay reserved. */
static void step_reservation(char **files)
{
	char byte, *base = reserve(GIB);
	for (int i = 0; i < 4; i++) {
		char *at = map_at(files[i], base + i * (GIB / 4), MAP_FIXED);
		must(at == base + i * (GIB / 4) && at[2 * PAGE] == 'C');
		at[2 * PAGE] = '0' + i;
		must(in_file(files[i], 2 * PAGE) == '0' + i);
		must(load(at + SIZE, &byte) == SIGSEGV);
	}
	must(munmap(base, GIB) == 0);
	for (int i = 0; i < 4; i++)
		must(load(base + i * (GIB / 4), &byte) == SIGSEGV);
}

/* munmap of a part, and an anonymous mmap over a part, are the kernel's: the rest follows its file. */
static void step_parts(char **files)
{
	char byte, *base = map_at(files[0], reserve(SIZE), MAP_FIXED);
	must(base[3 * PAGE] == 'D' && base[9 * PAGE] == 'J');
	must(munmap(base + 2 * PAGE, 4 * PAGE) == 0);
	must(mmap(base + 8 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
	     base + 8 * PAGE);
	memset(base + 8 * PAGE, 'm', 4 * PAGE);
	must(truncate(files[0], 0) == 0 && truncate(files[0], SIZE) == 0);
	must(load(base + 3 * PAGE, &byte) == SIGSEGV);
	for (int page = 8; page < 12; page++)
		must(base[page * PAGE] == 'm');
	must(base[0] == 0 && base[7 * PAGE] == 0 && base[12 * PAGE] == 0);
	base[12 * PAGE] = 'n';
	must(in_file(files[0], 12 * PAGE) == 'n');
	/* memory of the program in the place of the unmapped part */
	char *own = mmap(base + 2 * PAGE, 4 * PAGE, PROT_READ | PROT_WRITE,
			 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE, -1, 0);
	must(own == base + 2 * PAGE);
	memset(own, 'o', 4 * PAGE);
	must(truncate(files[0], 0) == 0 && truncate(files[0], SIZE) == 0);
	must(own[0] == 'o' && own[4 * PAGE - 1] == 'o' && base[12 * PAGE] == 0);
	/* a file again, over memory and over the direct mapping */
	must(map_at(files[1], base, MAP_FIXED) == base && base[3 * PAGE] == 'D' && base[12 * PAGE] == 'M');
	must(msync(base, SIZE, MS_SYNC) == 0);
	must(munmap(base, SIZE) == 0);
}

static void step_moves(char **files)
{
	char byte, *there, *place = reserve(4 * SIZE), *base = map_at(files[0], place, MAP_FIXED);
	base[PAGE] = '1';
	/* outside to outside */
	there = mremap(base, SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, place + 2 * SIZE);
	must(there == place + 2 * SIZE && there[PAGE] == '1' && there[5 * PAGE] == 'F');
	must(load(base, &byte) == SIGSEGV);
	there[PAGE] = '2';
	must(in_file(files[0], PAGE) == '2');
	/* no room behind: the mapping moves, and its new pages are the file's */
	must(truncate(files[0], 2 * SIZE) == 0);
	must(mremap(there, SIZE, 2 * SIZE, 0) == MAP_FAILED && errno == ENOMEM);
	char *grown = mremap(there, SIZE, 2 * SIZE, MREMAP_MAYMOVE);
	must(grown != MAP_FAILED && grown[PAGE] == '2' && grown[SIZE] == 0);
	grown[SIZE] = 'g';
	must(in_file(files[0], SIZE) == 'g');
	/* and back to a chosen place */
	must(mremap(grown, 2 * SIZE, 2 * SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, place) == place);
	must(place[PAGE] == '2' && place[SIZE] == 'g');
	must(truncate(files[0], PAGE) == 0);
	must(load(place + PAGE, &byte) == SIGBUS && last.si_code == BUS_ADRERR);
	/* shrinks in place, grows in place */
	must(mremap(place, 2 * SIZE, PAGE, 0) == place && load(place + PAGE, &byte) == SIGSEGV);
	must(munmap(place + PAGE, 4 * SIZE - PAGE) == 0);
	must(truncate(files[0], 2 * PAGE) == 0);
	must(mremap(place, PAGE, 2 * PAGE, 0) == place && place[PAGE] == 0 && place[0] == 'A');
	/* a private mapping keeps its copies */
	int fd = open_file(files[1]);
	char *copy = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	must(copy != MAP_FAILED && (copy[PAGE] = 'c'));
	must(mremap(copy, SIZE, SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, place + 8 * PAGE) == place + 8 * PAGE);
	must(place[9 * PAGE] == 'c' && place[10 * PAGE] == 'C');
	must(truncate(files[1], SIZE / 2) == 0 && place[9 * PAGE] == 'c' && load(place + 20 * PAGE, &byte) == SIGBUS);
}

static void step_fork(char **files)
{
	char byte, *base = map_at(files[0], reserve(SIZE), MAP_FIXED);
	base[0] = 'p';
	pid_t child = fork();
	if (child == 0) {
		must(base[0] == 'p' && base[3 * PAGE] == 'D');
		base[PAGE] = 'c';
		must(munmap(base + 8 * PAGE, 8 * PAGE) == 0);
		must(truncate(files[0], 4 * PAGE) == 0 && load(base + 4 * PAGE, &byte) == SIGBUS);
		must(load(base + 8 * PAGE, &byte) == SIGSEGV);
		if (fork() == 0) {
			must(base[PAGE] == 'c' && load(base + 4 * PAGE, &byte) == SIGBUS);
			_exit(0);
		}
		int status;
		must(wait(&status) > 0 && status == 0);
		_exit(0);
	}
	must(reap(child) == 0);
	must(base[PAGE] == 'c' && load(base + 8 * PAGE, &byte) == SIGBUS);
}

/* Protections that the supervisor did not see hold after a replacement. */
static void step_protection(char **files)
{
	char byte, *base = map_at(files[0], reserve(SIZE), MAP_FIXED);
	must(mprotect(base + 4 * PAGE, 4 * PAGE, PROT_READ) == 0);
	must(store(base + 5 * PAGE, 'x') == SIGSEGV);
	must(truncate(files[0], 0) == 0 && truncate(files[0], SIZE) == 0);
	must(load(base + 5 * PAGE, &byte) == 0 && byte == 0 && store(base + 5 * PAGE, 'x') == SIGSEGV);
	must(store(base + 9 * PAGE, 'y') == 0 && store(base + 3 * PAGE, 'z') == 0);
	must(mprotect(base, SIZE, PROT_READ | PROT_WRITE) == 0 && store(base + 5 * PAGE, 'x') == 0);
	must(in_file(files[0], 5 * PAGE) == 'x' && in_file(files[0], 9 * PAGE) == 'y');
}

static void step_hint(char **files)
{
	char *place = reserve(SIZE);
	must(munmap(place, SIZE) == 0);
	must(map_at(files[0], place, 0) == place && place[PAGE] == 'B');
	char *second = map_at(files[1], place, 0);
	must(second != place && second[PAGE] == 'B');
	int fd = open_file(files[2]);
	must(mmap(place + 2 * PAGE, SIZE, PROT_READ, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0) == MAP_FAILED && errno == EEXIST);
	must(munmap(place, SIZE) == 0);
	must(mmap(place, SIZE, PROT_READ, MAP_SHARED | MAP_FIXED_NOREPLACE, fd, 0) == place && place[PAGE] == 'B');
	must(mmap((void *)(0x7ffffffff000UL), SIZE, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED && errno == ENOMEM);
	must(mmap(place + 1, SIZE, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED && errno == EINVAL);
}

/* madvise: MADV_REMOVE punches the file, MADV_DONTNEED loses nothing. */
static void step_advice(char **files)
{
	char *base = map_at(files[0], reserve(SIZE), MAP_FIXED);
	base[PAGE] = '1';
	must(madvise(base, SIZE, MADV_DONTNEED) == 0 && base[PAGE] == '1');
	must(madvise(base + PAGE, PAGE, MADV_REMOVE) == 0 && base[PAGE] == 0 && in_file(files[0], PAGE) == 0);
	must(base[2 * PAGE] == 'C');
	char *own = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
	must(own != MAP_FAILED && (own[0] = 'x'));
	must(madvise(own, SIZE, MADV_REMOVE) == 0 && own[0] == 0);
	must((own = mremap(own, SIZE, 2 * SIZE, MREMAP_MAYMOVE)) != MAP_FAILED && msync(own, SIZE, MS_SYNC) == 0);
}

static volatile int stop;

static void *churn(void *unused)
{
	(void)unused;
	while (!stop) {
		char *own[16];
		for (int i = 0; i < 16; i++) {
			own[i] = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
			must(own[i] != MAP_FAILED);
			memset(own[i], 'm', SIZE);
		}
		for (int i = 0; i < 16; i++) {
			for (size_t at = 0; at < SIZE; at += PAGE)
				must(own[i][at] == 'm');
			must(munmap(own[i], SIZE) == 0);
		}
	}
	return NULL;
}

/* A direct mapping comes and goes where other threads get memory, and its file changes all the time. */
static void step_churn(char **files)
{
	pthread_t threads[2];
	pid_t child = fork();
	if (child == 0) {
		must(prctl(PR_SET_PDEATHSIG, SIGKILL) == 0);
		for (;;)
			must(truncate(files[0], 0) == 0 && truncate(files[0], SIZE) == 0);
	}
	for (int i = 0; i < 2; i++)
		must(pthread_create(&threads[i], NULL, churn, NULL) == 0);
	for (int turn = 0; turn < 300; turn++) {
		char byte, *base = map_at(files[0], reserve(SIZE), MAP_FIXED);
		(void)load(base + PAGE, &byte), (void)store(base + 2 * PAGE, 's');
		must(munmap(base, SIZE) == 0);
	}
	stop = 1;
	for (int i = 0; i < 2; i++)
		must(pthread_join(threads[i], NULL) == 0);
	must(kill(child, SIGKILL) == 0 && reap(child) == SIGKILL);
}

/* Loads the page that each line names: a to p. Prints the letter, or signal, code, offset of the address, and lsb. */
static void step_wait(char **files)
{
	char byte, line[8], *base = map_at(files[0], reserve(GIB) + GIB / 2, MAP_FIXED);
	must(base[3 * PAGE] == 'D');
	printf("%p\n", (void *)base);
	fflush(stdout);
	while (fgets(line, sizeof line, stdin)) {
		int number = load(base + (line[0] - 'a') * PAGE + 5, &byte);
		if (number)
			printf("%d %d %ld %d\n", number, last.si_code, (long)((char *)last.si_addr - base), last.si_addr_lsb);
		else
			printf("%c\n", byte);
		fflush(stdout);
	}
}

/* Each call on a poisoned page fails with EFAULT. The next instruction that loads from the page gets AR. */
static void step_calls(char **files)
{
	char byte, buffer[PAGE], *base = map_at(files[0], NULL, 0), *bad = base + 3 * PAGE;
	int ends[2], fd = open_file(files[1]);
	struct iovec here = {buffer, PAGE}, there = {bad, PAGE};
	must(pipe(ends) == 0 && write(ends[1], buffer, 100) == 100);
	puts("mapped"), fflush(stdout);
	must(getchar() == '\n');
	for (int turn = 0; turn < 20; turn++) {
		for (int call = 0; call < 5; call++) {
			long result = call == 0   ? write(ends[1], bad, 100)
				      : call == 1 ? read(ends[0], bad, 100)
				      : call == 2 ? pwrite(fd, bad, PAGE, 0)
				      : call == 3 ? (long)open(bad, O_RDONLY)
						  : process_vm_readv(getpid(), &here, 1, &there, 1, 0);
			must(result == -1 && errno == EFAULT);
			must(load(bad + call, &byte) == SIGBUS && last.si_addr == bad + call);
			if (last.si_code != 4) {
				printf("turn %d, call %d: code %d\n", turn, call, last.si_code);
				_exit(1);
			}
		}
	}
	must(base[2 * PAGE] == 'C' && base[4 * PAGE] == 'E');
}

/* Returns the pages of 16 that are present, as letters. */
static const char *present(const char *at)
{
	static char letters[17];
	uint64_t words[16];
	int fd = open("/proc/self/pagemap", O_RDONLY), count = 0;
	must(pread(fd, words, sizeof words, (uintptr_t)at / PAGE * 8) == sizeof words);
	close(fd);
	for (int page = 0; page < 16; page++)
		if (words[page] >> 63)
			letters[count++] = 'a' + page;
	letters[count] = 0;
	return letters;
}

static char *map_with(const char *path, int prot, int flags)
{
	int fd = open_file(path);
	char *map = mmap(NULL, SIZE, prot, flags, fd, 0);
	must(map != MAP_FAILED);
	close(fd);
	return map;
}

#define BOTH (PROT_READ | PROT_WRITE)
#define ALL "abcdefghijklmnop"

/* Page d of the first file is poisoned. */
static void step_populate(char **files)
{
	char byte;
	puts("ready"), fflush(stdout);
	must(getchar() == '\n');
	must(!strcmp(present(map_with(files[0], BOTH, MAP_SHARED | MAP_POPULATE)), "abc"));
	must(!strcmp(present(map_with(files[1], BOTH, MAP_SHARED)), ""));
	must(!strcmp(present(map_with(files[1], BOTH, MAP_SHARED | MAP_POPULATE | MAP_NONBLOCK)), ""));
	must(!strcmp(present(map_with(files[1], BOTH, MAP_SHARED | MAP_POPULATE)), ALL));
	must(!strcmp(present(map_with(files[1], PROT_READ, MAP_SHARED | MAP_LOCKED)), ALL));
	char *copy = map_with(files[1], BOTH, MAP_PRIVATE | MAP_POPULATE);
	must(!strcmp(present(copy), ALL) && copy[5 * PAGE] == 'F');
	int fd = open_file(files[1]);
	must(pwrite(fd, "w", 1, 5 * PAGE) == 1 && copy[5 * PAGE] == 'F');
	char *bad = map_with(files[0], BOTH, MAP_SHARED);
	must(madvise(bad, 3 * PAGE, 22) == 0 && !strcmp(present(bad), "abc")); /* MADV_POPULATE_READ */
	must(madvise(bad, SIZE, 22) == -1 && errno == EHWPOISON);
	must(madvise(bad, SIZE, 23) == -1 && errno == EHWPOISON); /* MADV_POPULATE_WRITE */
	must(madvise(bad, SIZE, MADV_WILLNEED) == 0);
	must(mlock(bad, SIZE) == -1 && errno == ENOMEM && mlock(bad, 3 * PAGE) == 0);
	must(load(bad + 3 * PAGE, &byte) == SIGBUS && last.si_code == 4);
	must(mlock(bad + 4 * PAGE, 12 * PAGE) == 0 && !strcmp(present(bad), "abcefghijklmnop"));
	char *later = map_with(files[2], BOTH, MAP_SHARED);
	must(mlock2(later, SIZE, MLOCK_ONFAULT) == 0 && !strcmp(present(later), ""));
	must(later[PAGE] == 'B' && !strcmp(present(later), "b"));
	must(munlockall() == 0);
}

/* After mlockall(MCL_FUTURE) a new mapping has its pages; a hole, and a page that goes, read as zeros. */
static void step_future(char **files)
{
	char byte;
	must(truncate(files[1], 0) == 0 && truncate(files[1], SIZE) == 0);
	must(mlockall(MCL_FUTURE) == 0);
	char *map = map_with(files[0], BOTH, MAP_SHARED), *hole = map_with(files[1], BOTH, MAP_SHARED);
	must(!strcmp(present(map), ALL) && map[PAGE] == 'B' && hole[PAGE] == 0);
	hole[PAGE] = 'h';
	must(in_file(files[1], PAGE) == 'h');
	must(truncate(files[0], 2 * PAGE) == 0 && truncate(files[0], SIZE) == 0);
	must(map[PAGE] == 'B' && map[2 * PAGE] == 0);
	map[2 * PAGE] = 'n';
	must(in_file(files[0], 2 * PAGE) == 'n');
	must(truncate(files[0], PAGE) == 0 && load(map + 2 * PAGE, &byte) == SIGBUS && last.si_code == BUS_ADRERR);
	must(mlockall(MCL_FUTURE | MCL_ONFAULT) == 0);
	must(!strcmp(present(map_with(files[2], BOTH, MAP_SHARED)), ""));
}

/* RLIMIT_AS and RLIMIT_MEMLOCK, as of now; a copy at the store needs no more addresses. */
static void step_limits(char **files)
{
	char *map = map_with(files[0], BOTH, MAP_SHARED);
	struct rlimit few = {64 << 20, RLIM_INFINITY}, all = {RLIM_INFINITY, RLIM_INFINITY};
	int fd = open_file(files[1]);
	must(ftruncate(fd, 1 << 30) == 0 && setrlimit(RLIMIT_AS, &few) == 0);
	must(mmap(NULL, 1 << 30, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED && errno == ENOMEM);
	must(mremap(map, SIZE, 1 << 30, MREMAP_MAYMOVE) == MAP_FAILED && errno == ENOMEM && map[PAGE] == 'B');
	few.rlim_cur = 1 << 20;
	must(setrlimit(RLIMIT_AS, &few) == 0);
	must(truncate(files[0], PAGE) == 0 && truncate(files[0], SIZE) == 0);
	must(map[2 * PAGE] == 0 && (map[2 * PAGE] = 'x') && in_file(files[0], 2 * PAGE) == 'x');
	must(setrlimit(RLIMIT_AS, &all) == 0);
	must(prctl(PR_CAPBSET_DROP, 14) == 0);
	struct __user_cap_header_struct head = {_LINUX_CAPABILITY_VERSION_3, 0};
	struct __user_cap_data_struct caps[2];
	must(syscall(SYS_capget, &head, caps) == 0);
	caps[0].effective &= ~(1u << 14), caps[0].permitted &= ~(1u << 14), caps[0].inheritable &= ~(1u << 14);
	must(syscall(SYS_capset, &head, caps) == 0);
	few.rlim_cur = few.rlim_max = 2 * PAGE;
	must(setrlimit(RLIMIT_MEMLOCK, &few) == 0);
	must(mmap(NULL, SIZE, PROT_READ, MAP_SHARED | MAP_LOCKED, fd, 0) == MAP_FAILED && errno == EAGAIN);
	must(mmap(NULL, PAGE, PROT_READ, MAP_SHARED | MAP_LOCKED, fd, 0) != MAP_FAILED);
	must(mlock(map, SIZE) == -1 && errno == ENOMEM);
	few.rlim_cur = few.rlim_max = 0;
	must(setrlimit(RLIMIT_MEMLOCK, &few) == 0);
	must(mmap(NULL, PAGE, PROT_READ, MAP_SHARED | MAP_LOCKED, fd, 0) == MAP_FAILED && errno == EPERM);
}

static int64_t mtime(const char *path)
{
	struct stat found;
	must(stat(path, &found) == 0);
	return found.st_mtim.tv_sec * 1000000000L + found.st_mtim.tv_nsec;
}

static int64_t now(void)
{
	struct timespec time;
	must(clock_gettime(CLOCK_REALTIME, &time) == 0);
	return time.tv_sec * 1000000000L + time.tv_nsec;
}

/* Stores set mtime at the next msync, fsync, munmap or end of the process; a load alone of a mapping to read does not. */
static void step_times(char **files)
{
	const char *path = files[0];
	int fd = open_file(path);
	int64_t before = mtime(path);
	char *map = map_with(path, BOTH, MAP_SHARED);
	must(munmap(map, SIZE) == 0 && mtime(path) == before);
	map = map_with(path, PROT_READ, MAP_SHARED);
	must(map[PAGE] == 'B' && msync(map, SIZE, MS_SYNC) == 0 && munmap(map, SIZE) == 0 && mtime(path) == before);
	map = map_with(path, BOTH, MAP_PRIVATE);
	must((map[PAGE] = 'p') && munmap(map, SIZE) == 0 && fsync(fd) == 0 && mtime(path) == before);
	for (int call = 0; call < 6; call++) {
		map = call == 4 ? map_with(path, BOTH, MAP_SHARED) : map_at(path, reserve(SIZE), call < 3 ? 0 : MAP_FIXED);
		int64_t stored = now();
		if (call == 5) {
			pid_t child = fork();
			if (child == 0) {
				map[PAGE] = 'x';
				_exit(0);
			}
			must(reap(child) == 0);
			for (int wait = 0; wait < 5000 && mtime(path) < stored; wait++)
				usleep(1000);
		}
		map[PAGE] = '0' + call;
		if (call == 0)
			must(msync(map, PAGE * 2, MS_SYNC) == 0);
		else if (call == 1)
			must(msync(map, PAGE * 2, MS_ASYNC) == 0);
		else if (call == 2)
			must(fsync(fd) == 0);
		else if (call < 5)
			must(munmap(map, SIZE) == 0);
		if (mtime(path) < stored - 20000000) { /* the clock of files is coarse: a tick */
			printf("call %d: %ld ns too old\n", call, (long)(stored - mtime(path)));
			_exit(1);
		}
	}
}

int main(int argc, char **argv)
{
	static const struct {
		const char *name;
		void (*run)(char **);
	} steps[] = {{"reservation", step_reservation}, {"parts", step_parts}, {"moves", step_moves}, {"fork", step_fork},
		     {"protection", step_protection}, {"hint", step_hint}, {"advice", step_advice}, {"churn", step_churn},
		     {"wait", step_wait}, {"calls", step_calls},
		     {"populate", step_populate}, {"future", step_future}, {"limits", step_limits},
		     {"times", step_times}};
	struct sigaction action = {.sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART};
	must(argc > 2 && sigaction(SIGBUS, &action, NULL) == 0 && sigaction(SIGSEGV, &action, NULL) == 0);
	for (size_t i = 0; i < sizeof steps / sizeof *steps; i++)
		if (!strcmp(argv[1], steps[i].name)) {
			steps[i].run(argv + 2);
			puts("ok");
			return 0;
		}
	return 2;
}
