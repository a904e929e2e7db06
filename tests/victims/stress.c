/* Loads of programs with direct mappings: stress STEP FILE [ARGUMENTS]. Prints "ok", or the line and the expression that
   did not hold, with errno. tests/mount/direct/test_stress.py */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>
#include "must.h"

#define CLONE_RANGE 0x4020da0d /* host/fuse/extra_operations.py */

static char *self;

static unsigned long pages_of(int fd)
{
	struct stat found;
	must(fstat(fd, &found) == 0);
	return found.st_size / PAGE;
}

static volatile char *map_fd(int fd, unsigned long pages)
{
	char *map = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	must(map != MAP_FAILED);
	return map;
}

/* Every second page of the file is a hole; the others hold their number. Load, store and load each. */
static void touch_every_page(volatile char *map, unsigned long pages)
{
	for (unsigned long page = 0; page < pages; page++) {
		volatile uint64_t *word = (volatile uint64_t *)(map + page * PAGE);
		must(word[0] == (page % 2 ? 0 : page));
		if (page % 2 == 0) {
			word[1] = ~page;
			must(word[1] == ~page);
		}
	}
}

static void step_extents(int argc, char **argv)
{
	int fd = open_file(argv[0]);
	unsigned long pages = pages_of(fd);
	(void)argc;
	volatile char *map = map_fd(fd, pages);
	touch_every_page(map, pages);
	must(munmap((void *)map, pages * PAGE) == 0);
}

/* The same, in an address space that has argv[1] VMAs of the program. */
static void step_vmas(int argc, char **argv)
{
	unsigned long count = strtoul(argv[1], NULL, 0);
	char *block = mmap(NULL, count * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
	must(block != MAP_FAILED);
	for (unsigned long page = 1; page < count; page += 2)
		must(mprotect(block + page * PAGE, PAGE, PROT_READ) == 0);
	step_extents(argc, argv);
}

/* Many mappings of one file in one process; each sees the stores of all others. */
static void step_many(int argc, char **argv)
{
	enum { MANY = 1000 };
	static volatile char *map[MANY];
	int fd = open_file(argv[0]);
	(void)argc;
	for (int i = 0; i < MANY; i++) {
		map[i] = map_fd(fd, 16);
		map[i][i % 16 * PAGE + i / 16] = (char)i;
		must(map[0][i % 16 * PAGE + i / 16] == (char)i);
	}
	must(ftruncate(fd, 8 * PAGE) == 0 && ftruncate(fd, 16 * PAGE) == 0);
	for (int i = 0; i < MANY; i++)
		must(map[i][9 * PAGE] == 0);
	map[0][9 * PAGE] = 'x';
	for (int i = 0; i < MANY; i++)
		must(map[i][9 * PAGE] == 'x');
	for (int i = 0; i < MANY; i++)
		must(munmap((void *)map[i], 16 * PAGE) == 0);
}

static char **files;

static void *map_store_unmap(void *number)
{
	uintptr_t me = (uintptr_t)number;
	for (int i = 0; i < 60; i++) {
		int fd = open_file(files[(me + i) % 4]);
		volatile char *map = map_fd(fd, 16);
		close(fd);
		map[me * PAGE + i] = (char)i;
		must(map[me * PAGE + i] == (char)i);
		must(munmap((void *)map, 16 * PAGE) == 0);
	}
	return NULL;
}

/* Eight threads map, store and unmap four files. */
static void step_loop(int argc, char **argv)
{
	pthread_t thread[8];
	must(argc == 4);
	files = argv;
	for (uintptr_t i = 0; i < 8; i++)
		must(pthread_create(&thread[i], NULL, map_store_unmap, (void *)i) == 0);
	for (int i = 0; i < 8; i++)
		pthread_join(thread[i], NULL);
	for (unsigned i = 0; i < 8 * 60; i++) {
		char byte;
		unsigned me = i / 60, turn = i % 60;
		int fd = open_file(argv[(me + turn) % 4]);
		must(pread(fd, &byte, 1, me * PAGE + turn) == 1 && byte == (char)turn);
		close(fd);
	}
}

static __thread sigjmp_buf escape;
static __thread volatile int may_fault;

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	(void)sig;
	(void)context;
	if (!may_fault || info->si_code != BUS_ADRERR)
		_exit(3);
	siglongjmp(escape, 1);
}

static volatile char *stored_to;
static volatile int stop;

/* The pages of a thread hold zeros, or what this thread stored last. */
static void *store_and_check(void *number)
{
	uintptr_t me = (uintptr_t)number;
	for (volatile uint64_t turn = 1; !stop; turn++) {
		volatile uint64_t *word = (volatile uint64_t *)(stored_to + (turn % 8 * 8 + me) * PAGE);
		uint64_t value = turn << 8 | me;
		if (sigsetjmp(escape, 1) == 0) {
			may_fault = 1;
			uint64_t before = word[0];
			must(before == 0 || (before & 0xff) == me);
			must(before >> 8 < turn);
			word[0] = value;
			uint64_t after = word[0];
			must(after == value || after == 0);
		}
		may_fault = 0;
	}
	return NULL;
}

static int clone_over(int to, int from)
{
	uint64_t range[4] = {from, 0, 0, 0};
	return ioctl(to, CLONE_RANGE, range);
}

static void step_changes(int argc, char **argv)
{
	enum { PAGES = 64 };
	pthread_t thread[8];
	struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};
	int fd = open_file(argv[0]), other = open_file(argv[1]), turns = atoi(argv[2]);
	(void)argc;
	must(sigaction(SIGBUS, &action, NULL) == 0);
	must(ftruncate(fd, 0) == 0 && ftruncate(fd, PAGES * PAGE) == 0);
	stored_to = map_fd(fd, PAGES);
	for (uintptr_t i = 0; i < 8; i++)
		must(pthread_create(&thread[i], NULL, store_and_check, (void *)i) == 0);
	unsigned dice = 1;
	for (int turn = 0; turn < turns; turn++) {
		dice = dice * 1103515245 + 12345;
		unsigned page = (dice >> 16) % PAGES;
		switch (dice >> 8 & 3) {
		case 0:
			must(ftruncate(fd, page * PAGE) == 0);
			must(ftruncate(fd, PAGES * PAGE) == 0);
			break;
		case 1:
			must(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, page * PAGE, 4 * PAGE) == 0);
			break;
		case 2:
			must(clone_over(other, fd) == 0);
			break;
		case 3:
			must(fallocate(fd, FALLOC_FL_ZERO_RANGE | FALLOC_FL_KEEP_SIZE, page * PAGE, 2 * PAGE) == 0);
			break;
		}
	}
	stop = 1;
	for (int i = 0; i < 8; i++)
		pthread_join(thread[i], NULL);
	for (unsigned page = 0; page < PAGES; page++) {
		uint64_t word;
		*(volatile uint64_t *)(stored_to + page * PAGE) = page + 1;
		must(pread(fd, &word, sizeof(word), page * PAGE) == sizeof(word) && word == page + 1);
	}
}

/* 200 processes at a time: each forks two more until all are there, and stores its number. */
static void grow(volatile char *map, int number, int go)
{
	enum { ALIVE = 200 };
	char byte;
	pid_t child[2];
	for (int i = 0; i < 2; i++) {
		int next = 2 * number + 1 + i;
		child[i] = next < ALIVE ? fork() : 0;
		must(next >= ALIVE || child[i] >= 0);
		if (next < ALIVE && child[i] == 0) {
			grow(map, next, go);
			_exit(0);
		}
	}
	*(volatile int *)(map + number % 16 * PAGE + number * sizeof(int)) = number + 1;
	must(read(go, &byte, 1) == 0);
	for (int i = 0; i < 2; i++) {
		int status;
		must(!child[i] || (waitpid(child[i], &status, 0) == child[i] && status == 0));
	}
	must(*(volatile int *)(map + number % 16 * PAGE + number * sizeof(int)) == number + 1);
}

static void step_tree(int argc, char **argv)
{
	int ends[2], fd = open_file(argv[0]);
	volatile char *map = map_fd(fd, 16);
	(void)argc;
	must(ftruncate(fd, 0) == 0 && ftruncate(fd, 16 * PAGE) == 0);
	must(pipe(ends) == 0);
	pid_t root = fork();
	must(root >= 0);
	if (root == 0) {
		close(ends[1]);
		grow(map, 0, ends[0]);
		_exit(0);
	}
	for (int number = 0; number < 200; number++)
		while (*(volatile int *)(map + number % 16 * PAGE + number * sizeof(int)) != number + 1)
			usleep(1000);
	printf("all alive\n");
	fflush(stdout);
	char byte;
	if (argc > 1)
		must(read(0, &byte, 1) >= 0);
	close(ends[0]);
	close(ends[1]);
	int status;
	must(waitpid(root, &status, 0) == root && status == 0);
	must(waitpid(-1, NULL, __WALL) == -1 && errno == ECHILD);
}

/* A program that executes itself again and again. */
static void step_execs(int argc, char **argv)
{
	int fd = open_file(argv[0]), left = atoi(argv[1]);
	char number[16];
	volatile char *map = map_fd(fd, 16);
	(void)argc;
	volatile int *count = (volatile int *)(map + left % 16 * PAGE);
	*count = left;
	must(*(volatile int *)(map + (left + 1) % 16 * PAGE) != left);
	if (!left)
		return;
	snprintf(number, sizeof(number), "%d", left - 1);
	execl(self, self, "execs", argv[0], number, NULL);
	must(0);
}

/* A program whose descriptors are all in use. Its limit of argv[1] descriptors stays. */
static void has_limit(unsigned long soft)
{
	struct rlimit now;
	must(getrlimit(RLIMIT_NOFILE, &now) == 0 && now.rlim_cur == soft && now.rlim_max > soft);
}

static void step_descriptors(int argc, char **argv)
{
	int fd = open_file(argv[0]), status;
	struct rlimit limit;
	(void)argc;
	must(getrlimit(RLIMIT_NOFILE, &limit) == 0);
	limit.rlim_cur = atoi(argv[1]);
	must(setrlimit(RLIMIT_NOFILE, &limit) == 0);
	while (dup(fd) >= 0)
		;
	must(errno == EMFILE);
	volatile char *map = map_fd(fd, 16);
	map[PAGE] = 'd';
	has_limit(limit.rlim_cur);
	pid_t child = fork();
	must(child >= 0);
	if (child == 0) {
		has_limit(limit.rlim_cur);
		map[2 * PAGE] = 'e';
		_exit(map[PAGE] != 'd');
	}
	must(waitpid(child, &status, 0) == child && status == 0);
	must(map[2 * PAGE] == 'e');
	has_limit(limit.rlim_cur);
	must(dup(fd) == -1 && errno == EMFILE);
}

/* Store increasing numbers to each page in turn, until stdin ends. */
static void step_numbers(int argc, char **argv)
{
	int fd = open_file(argv[0]), pages = atoi(argv[1]);
	volatile char *map = map_fd(fd, pages);
	(void)argc;
	must(fcntl(0, F_SETFL, O_NONBLOCK) == 0);
	char byte;
	printf("ready\n");
	fflush(stdout);
	for (uint64_t number = 1; read(0, &byte, 1) != 0; number++)
		for (int page = 0; page < pages; page++)
			*(volatile uint64_t *)(map + page * PAGE) = number;
}

/* System calls on a mapping by other ways than loads and stores. The file has letters, a hole behind, and a clone. */
static void step_interfaces(int argc, char **argv)
{
	int fd = open_file(argv[0]), clone = open_file(argv[1]), ends[2], mem = open("/proc/self/mem", O_RDWR);
	char bytes[PAGE], *map;
	(void)argc;
	must(mem >= 0 && pipe(ends) == 0);
	must(ftruncate(fd, 32 * PAGE) == 0);
	must(clone_over(clone, fd) == 0);
	map = (char *)map_fd(fd, 32);
	/* Shared blocks, and a hole. */
	struct iovec here = {bytes, PAGE}, there = {map + PAGE, PAGE};
	must(process_vm_readv(getpid(), &here, 1, &there, 1, 0) == (ssize_t)PAGE && bytes[0] == 'B');
	bytes[0] = 'v';
	must(process_vm_writev(getpid(), &here, 1, &there, 1, 0) == (ssize_t)PAGE);
	there.iov_base = map + 20 * PAGE;
	must(process_vm_writev(getpid(), &here, 1, &there, 1, 0) == (ssize_t)PAGE);
	must(map[PAGE] == 'v' && map[20 * PAGE] == 'v');
	must(pread(mem, bytes, 1, (off_t)(uintptr_t)(map + 2 * PAGE)) == 1 && bytes[0] == 'C');
	/* access_remote_vm() waits for no userfaultfd: a page that the filesystem must decide is EIO. */
	must(pwrite(mem, "m", 1, (off_t)(uintptr_t)(map + 2 * PAGE)) == -1 && errno == EIO);
	must(pwrite(mem, "m", 1, (off_t)(uintptr_t)(map + 21 * PAGE)) == -1 && errno == EIO);
	must(pread(clone, bytes, 1, 2 * PAGE) == 1 && bytes[0] == 'C');
	map[2 * PAGE + 1] = map[21 * PAGE + 1] = 'n';
	must(pwrite(mem, "m", 1, (off_t)(uintptr_t)(map + 2 * PAGE)) == 1);
	must(pwrite(mem, "m", 1, (off_t)(uintptr_t)(map + 21 * PAGE)) == 1);
	must(map[2 * PAGE] == 'm' && map[21 * PAGE] == 'm');
	must(pread(clone, bytes, 1, PAGE) == 1 && bytes[0] == 'B');
	must(pread(clone, bytes, 1, 2 * PAGE) == 1 && bytes[0] == 'C');
	/* Pipes. */
	struct iovec gift = {map + 3 * PAGE, PAGE};
	must(vmsplice(ends[1], &gift, 1, 0) == (ssize_t)PAGE);
	must(read(ends[0], bytes, PAGE) == (ssize_t)PAGE && bytes[0] == 'D');
	off_t at = 4 * PAGE;
	must(splice(fd, &at, ends[1], NULL, PAGE, 0) == (ssize_t)PAGE);
	must(read(ends[0], bytes, PAGE) == (ssize_t)PAGE && bytes[0] == 'E');
	at = 5 * PAGE;
	must(sendfile(ends[1], fd, &at, PAGE) == (ssize_t)PAGE);
	must(read(ends[0], map + 22 * PAGE, PAGE) == (ssize_t)PAGE && map[22 * PAGE] == 'F');
	/* Advice changes no content. */
	static const int advice[] = {MADV_NORMAL, MADV_RANDOM, MADV_SEQUENTIAL, MADV_WILLNEED, MADV_DONTNEED, MADV_HUGEPAGE,
				     MADV_NOHUGEPAGE, MADV_MERGEABLE, MADV_UNMERGEABLE, MADV_COLD, MADV_PAGEOUT, MADV_FREE,
				     MADV_WIPEONFORK, MADV_KEEPONFORK, MADV_DONTDUMP, MADV_DODUMP};
	for (unsigned i = 0; i < sizeof(advice) / sizeof(*advice); i++) {
		madvise(map, 32 * PAGE, advice[i]);
		must(map[PAGE] == 'v' && map[2 * PAGE] == 'm' && map[6 * PAGE] == 'G' && map[20 * PAGE] == 'v');
		map[6 * PAGE + 1] = (char)i;
		must(pread(fd, bytes, 1, 6 * PAGE + 1) == 1 && bytes[0] == (char)i);
	}
	must(madvise(map + 6 * PAGE, PAGE, MADV_REMOVE) == 0 && map[6 * PAGE] == 0);
	unsigned char present[32];
	must(mincore(map, 32 * PAGE, present) == 0);
	/* A child without the mapping does not get it back by a change of the file. */
	must(madvise(map, 32 * PAGE, MADV_DONTFORK) == 0);
	int go[2], status;
	must(pipe(go) == 0);
	pid_t child = fork();
	must(child >= 0);
	if (child == 0) {
		must(read(go[0], bytes, 1) == 1);
		*(volatile char *)(map + 7 * PAGE) = 'x';
		_exit(0);
	}
	must(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, 7 * PAGE, PAGE) == 0);
	must(write(go[1], "g", 1) == 1);
	must(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
	must(map[7 * PAGE] == 0);
}

static const struct {
	const char *name;
	void (*run)(int argc, char **argv);
} steps[] = {
	{"extents", step_extents}, {"vmas", step_vmas},	  {"many", step_many},		   {"loop", step_loop},
	{"changes", step_changes}, {"tree", step_tree},	  {"execs", step_execs},	   {"descriptors", step_descriptors},
	{"numbers", step_numbers}, {"interfaces", step_interfaces},
};

int main(int argc, char **argv)
{
	alarm(600);
	self = argv[0];
	for (unsigned i = 0; argc >= 3 && i < sizeof(steps) / sizeof(*steps); i++)
		if (!strcmp(steps[i].name, argv[1])) {
			steps[i].run(argc - 2, argv + 2);
			puts("ok");
			return 0;
		}
	fprintf(stderr, "usage: %s STEP FILE [ARGUMENT...]\n", argv[0]);
	return 2;
}
