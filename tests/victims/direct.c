/* Steps of a program on a direct mount: direct STEP FILE [ARGUMENTS]. FILE has at least 16 pages of letters A to
   P. Prints "ok", or the line and the expression that did not hold, with errno. tests/mount/direct/test_processes.py */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/io_uring.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define unused __attribute__((unused))
#define PAGE 4096UL
#define SIZE (16 * PAGE)
#define must(condition)                                                                                               \
	do {                                                                                                          \
		if (!(condition)) {                                                                                   \
			printf("line %d: %s: %s\n", __LINE__, #condition, strerror(errno));                           \
			fflush(stdout);                                                                               \
			_exit(1);                                                                                     \
		}                                                                                                     \
	} while (0)

extern char **environ;
static const char *self;

static int open_file(const char *path)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);
	must(fd >= 0);
	return fd;
}

static volatile char *map_file(const char *path)
{
	int fd = open_file(path);
	volatile char *map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED_VALIDATE | MAP_SYNC, fd, 0);
	must(map != MAP_FAILED);
	must(map[0] == 'A');
	close(fd);
	return map;
}

static char at(const char *path, off_t offset)
{
	char byte = 0;
	int fd = open_file(path);
	must(pread(fd, &byte, 1, offset) == 1);
	close(fd);
	return byte;
}

/* Wait for a child, which must exit with 0, and for which nobody is left to wait afterwards. */
static void reap(pid_t child)
{
	int status = -1;
	must(child > 0);
	must(waitpid(child, &status, 0) == child);
	must(status == 0);
	must(waitpid(-1, NULL, __WALL) == -1 && errno == ECHILD);
}

static void step_store(const char *path, const char *other unused)
{
	volatile char *map = map_file(path);
	int fd = open_file(path);
	map[3 * PAGE] = '3';
	must(at(path, 3 * PAGE) == '3');
	must(pwrite(fd, "w", 1, 4 * PAGE) == 1);
	must(map[4 * PAGE] == 'w');
}

static void step_fork(const char *path, const char *other unused)
{
	volatile char *map = map_file(path);
	pid_t child = fork();
	if (child == 0) {
		must(map[PAGE] == 'B');
		map[PAGE] = 'c';
		volatile char *more = map_file(path);
		must(more[PAGE] == 'c');
		more[2 * PAGE] = 'm';
		_exit(0);
	}
	reap(child);
	must(map[PAGE] == 'c' && map[2 * PAGE] == 'm');
	for (int i = 0; i < 5; i++) {
		child = fork();
		if (child == 0) {
			pid_t grandchild = fork();
			if (grandchild == 0) {
				map[5 * PAGE + i] = '5';
				_exit(0);
			}
			reap(grandchild);
			_exit(0);
		}
		reap(child);
		must(map[5 * PAGE + i] == '5');
	}
}

static void step_vfork(const char *path, const char *other unused)
{
	volatile char *map = map_file(path);
	pid_t child = vfork();
	if (child == 0) {
		map[PAGE] = 'v';
		_exit(0);
	}
	reap(child);
	must(map[PAGE] == 'v');
}

static void step_vfork_mmap(const char *path, const char *other unused)
{
	volatile char *map = map_file(path);
	volatile char *volatile more = NULL;
	pid_t child = vfork();
	if (child == 0) {
		more = map_file(path);
		more[PAGE] = 'x';
		_exit(0);
	}
	reap(child);
	must(map[PAGE] == 'x' && more[PAGE] == 'x');
}

static void step_vfork_first(const char *path, const char *other unused)
{
	volatile char *volatile more = NULL;
	pid_t child = vfork();
	if (child == 0) {
		more = map_file(path);
		more[PAGE] = 'x';
		_exit(0);
	}
	reap(child);
	must(more[PAGE] == 'x');
	volatile char *map = map_file(path);
	must(map[PAGE] == 'x');
	more[PAGE] = 'y';
	must(map[PAGE] == 'y');
	/* The mapping that the child made outlives the child, and follows changes of the file. */
	int ends[2];
	must(pipe(ends) == 0);
	usleep(300000);
	must(write(ends[1], (const char *)more + PAGE, 1) == 1);
	must(truncate(path, 0) == 0);
	must(write(ends[1], (const char *)more + PAGE, 1) == -1 && errno == EFAULT);
	close(ends[0]);
	close(ends[1]);
}

static void step_spawn(const char *path, const char *other unused)
{
	volatile char *map = map_file(path);
	char *arguments[] = {(char *)self, "store", (char *)path, NULL};
	pid_t child;
	must(posix_spawn(&child, self, NULL, NULL, arguments, environ) == 0);
	reap(child);
	must(map[3 * PAGE] == '3');
}

static void step_exec(const char *path, const char *other unused)
{
	volatile char *map = map_file(path);
	map[PAGE] = 'e';
	execl(self, self, "after-exec", path, NULL);
	must(0);
}

static void step_after_exec(const char *path, const char *other unused)
{
	must(waitpid(-1, NULL, __WALL) == -1 && errno == ECHILD);
	volatile char *map = map_file(path);
	must(map[PAGE] == 'e');
	map[PAGE] = 'f';
	must(at(path, PAGE) == 'f');
}

static void *exec_now(void *path)
{
	execl(self, self, "after-exec", path, NULL);
	return NULL;
}

/* execve(2) of a thread that is not the leader: the thread takes over the leader's id. */
static void step_thread_exec(const char *path, const char *other unused)
{
	pthread_t thread;
	volatile char *map = map_file(path);
	map[PAGE] = 'e';
	must(pthread_create(&thread, NULL, exec_now, (void *)path) == 0);
	pthread_join(thread, NULL);
	must(0);
}

/* A failed execve(2) leaves the mappings. */
static void step_failed_exec(const char *path, const char *other unused)
{
	volatile char *map = map_file(path);
	for (int i = 0; i < 3; i++)
		must(execl("/nowhere/at/all", "x", NULL) == -1 && errno == ENOENT);
	map[6 * PAGE] = 'e';
	volatile char *more = map_file(path);
	must(more[6 * PAGE] == 'e');
}

static const char *shared_path;

static void *work(void *number)
{
	uintptr_t me = (uintptr_t)number;
	for (int i = 0; i < 20; i++) {
		volatile char *map = map_file(shared_path);
		map[(8 + me) * PAGE + i] = '0' + me;
		must(map[(8 + me) * PAGE + i] == (char)('0' + me));
		must(munmap((void *)map, SIZE) == 0);
	}
	return NULL;
}

static void step_threads(const char *path, const char *other unused)
{
	pthread_t thread[4];
	shared_path = path;
	for (uintptr_t i = 0; i < 4; i++)
		must(pthread_create(&thread[i], NULL, work, (void *)i) == 0);
	for (int i = 0; i < 4; i++)
		pthread_join(thread[i], NULL);
	for (int i = 0; i < 4; i++)
		must(at(path, (8 + i) * PAGE + 19) == (char)('0' + i));
	must(waitpid(-1, NULL, __WALL) == -1 && errno == ECHILD);
}

/* One thread forks while others store. */
static volatile int stop;

static void *store_on(void *map)
{
	for (unsigned i = 0; !stop; i++)
		((volatile char *)map)[i % 16 * PAGE + 7] = (char)i;
	return NULL;
}

static void step_forking_threads(const char *path, const char *other unused)
{
	pthread_t thread[2];
	volatile char *map = map_file(path);
	for (int i = 0; i < 2; i++)
		must(pthread_create(&thread[i], NULL, store_on, (void *)map) == 0);
	for (int i = 0; i < 10; i++) {
		pid_t child = fork();
		if (child == 0) {
			map[i * PAGE + 9] = 'k';
			_exit(0);
		}
		reap(child);
		must(map[i * PAGE + 9] == 'k');
	}
	stop = 1;
	for (int i = 0; i < 2; i++)
		pthread_join(thread[i], NULL);
}

/* Count the entries of a directory. */
static int entries(const char *path)
{
	DIR *directory = opendir(path);
	int count = 0;
	must(directory);
	while (readdir(directory))
		count++;
	closedir(directory);
	return count;
}

/* A direct mapping adds no descriptor, thread, child or handler of signals. */
static void step_proc(const char *path, const char *other unused)
{
	char children[100] = "";
	struct sigaction action;
	int fds = entries("/proc/self/fd"), tasks = entries("/proc/self/task");
	volatile char *map = map_file(path);
	map[PAGE] = 'x';
	must(entries("/proc/self/fd") == fds);
	must(entries("/proc/self/task") == tasks);
	int fd = open("/proc/thread-self/children", O_RDONLY);
	must(fd >= 0 && read(fd, children, sizeof(children)) == 0);
	must(waitpid(-1, NULL, __WALL | WNOHANG) == -1 && errno == ECHILD);
	for (int sig = 1; sig < 32; sig++)
		must(sigaction(sig, NULL, &action) == 0 && (sig == SIGALRM || action.sa_handler != SIG_IGN));
}

static void step_parts(const char *path, const char *other unused)
{
	volatile char *map = map_file(path);
	must(munmap((void *)(map + 4 * PAGE), 2 * PAGE) == 0);
	must(map[3 * PAGE] == 'D' && map[6 * PAGE] == 'G');
	pid_t child = fork();
	if (child == 0) {
		(void)map[4 * PAGE];
		_exit(0);
	}
	int status;
	must(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
	must(mprotect((void *)(map + 8 * PAGE), PAGE, PROT_READ) == 0);
	child = fork();
	if (child == 0) {
		map[8 * PAGE] = 'x';
		_exit(0);
	}
	must(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
	map[7 * PAGE] = 'x';
	map[9 * PAGE] = 'x';
	must(mprotect((void *)(map + 8 * PAGE), PAGE, PROT_READ | PROT_WRITE) == 0);
	map[8 * PAGE] = 'y';
	must(at(path, 8 * PAGE) == 'y');
	must(madvise((void *)(map + 8 * PAGE), 2 * PAGE, MADV_DONTNEED) == 0);
	must(map[8 * PAGE] == 'y' && map[9 * PAGE] == 'x');
	must(msync((void *)map, 4 * PAGE, MS_SYNC) == 0);
	must(msync((void *)map, SIZE, MS_SYNC) == -1 && errno == ENOMEM);
	must(msync((void *)(map + 6 * PAGE), 10 * PAGE, MS_ASYNC) == 0);
	must(munmap((void *)map, SIZE) == 0);
}

static void step_mremap(const char *path, const char *other unused)
{
	int fd = open_file(path);
	char *map = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	must(map != MAP_FAILED && map[0] == 'A');
	char *grown = mremap(map, 4 * PAGE, 8 * PAGE, MREMAP_MAYMOVE);
	must(grown != MAP_FAILED && grown[7 * PAGE] == 'H');
	must(mremap(grown, 8 * PAGE, 2 * PAGE, 0) == grown && grown[PAGE] == 'B');
	char *elsewhere = mmap(NULL, 16 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *moved = mremap(grown, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, elsewhere);
	must(moved == elsewhere);
	moved[PAGE] = 'r';
	must(at(path, PAGE) == 'r');
}

static void step_fixed(const char *path, const char *other unused)
{
	int fd = open_file(path);
	char *place = mmap(NULL, 16 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *map = mmap(place, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
	must(map == place);
	map[PAGE] = 'r';
	must(at(path, PAGE) == 'r');
	map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	must(map != MAP_FAILED);
	must(mmap(map + PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 9 * PAGE) == map + PAGE);
	must(map[0] == 'A' && map[PAGE] == 'J' && map[2 * PAGE] == 'C');
	must(mmap(map + 2 * PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
	     map + 2 * PAGE);
	map[2 * PAGE] = 'z';
	must(at(path, 2 * PAGE) == 'C' && map[3 * PAGE] == 'D');
}

static void step_private(const char *path, const char *other unused)
{
	int fd = open_file(path);
	char *map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	must(map != MAP_FAILED && map[PAGE] == 'B');
	map[PAGE] = 'p';
	must(at(path, PAGE) == 'B');
	pid_t child = fork();
	if (child == 0) {
		must(map[PAGE] == 'p');
		map[PAGE] = 'q';
		map[2 * PAGE] = 'q';
		_exit(0);
	}
	reap(child);
	must(map[PAGE] == 'p' && map[2 * PAGE] == 'C' && at(path, 2 * PAGE) == 'C');
}

static void step_locked(const char *path, const char *other unused)
{
	unsigned char present[16];
	int fd = open_file(path);
	char *map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_LOCKED, fd, 0);
	must(map != MAP_FAILED && map[PAGE] == 'B');
	map[PAGE] = 'l';
	must(at(path, PAGE) == 'l');
	must(munlock(map, SIZE) == 0);
	must(mlock(map, SIZE) == 0);
	must(mincore(map, SIZE, present) == 0);
	must(mlockall(MCL_CURRENT) == 0);
	must(munlockall() == 0);
	map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
	must(map != MAP_FAILED && map[PAGE] == 'l');
	must(munmap(map, SIZE) == 0);
}

/* read(2) and writev(2) with the mapping as buffer, over a hole. argv[3]: a file for O_DIRECT. */
static void step_kernel_mode(const char *path, const char *other)
{
	int ends[2], fd = open_file(path);
	must(ftruncate(fd, 32 * PAGE) == 0);
	char *map = mmap(NULL, 32 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	must(map != MAP_FAILED);
	must(pipe(ends) == 0);
	must(write(ends[1], "pipe", 4) == 4);
	must(read(ends[0], map + 20 * PAGE - 2, 4) == 4);
	must(!memcmp(map + 20 * PAGE - 2, "pipe", 4));
	must(at(path, 20 * PAGE) == 'p');
	must(write(ends[1], map + 20 * PAGE - 2, 4) == 4);
	struct iovec from = {map + 3 * PAGE, 2 * PAGE};
	must(writev(ends[1], &from, 1) == (ssize_t)(2 * PAGE));
	/* From the file into its own mapping, and from its own mapping into the file. */
	must(pread(fd, map + 21 * PAGE, PAGE, 3 * PAGE) == (ssize_t)PAGE && map[21 * PAGE] == 'D');
	must(pwrite(fd, map + 3 * PAGE, PAGE, 22 * PAGE) == (ssize_t)PAGE && map[22 * PAGE] == 'D');
	must(pread(fd, map + 23 * PAGE, PAGE, 23 * PAGE) == (ssize_t)PAGE && map[23 * PAGE] == 0);
	int from_disk = open(other, O_RDONLY | O_DIRECT);
	if (from_disk < 0) {
		must(errno == EINVAL);
		printf("no O_DIRECT there\n");
		return;
	}
	must(pread(from_disk, map + 24 * PAGE, 4 * PAGE, 0) == (ssize_t)(4 * PAGE));
	must(map[24 * PAGE] == 'o' && map[27 * PAGE] == 'o' && at(path, 26 * PAGE) == 'o');
	int direct = open(path, O_RDONLY | O_DIRECT);
	must(pread(direct, map + 28 * PAGE, PAGE, 26 * PAGE) == (ssize_t)PAGE && map[28 * PAGE] == 'o');
}

/* IORING_OP_READ of a file into a hole, once by the thread and once by a worker of the kernel. */
static void step_io_uring(const char *path, const char *other)
{
	struct io_uring_params parameters = {0};
	int ring = syscall(SYS_io_uring_setup, 4, &parameters), fd = open_file(path);
	if (ring < 0) {
		printf("no io_uring: %s\n", strerror(errno));
		return;
	}
	must(ftruncate(fd, 32 * PAGE) == 0);
	char *map = mmap(NULL, 32 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	must(map != MAP_FAILED);
	char *sq = mmap(NULL, parameters.sq_off.array + 4 * sizeof(unsigned), PROT_READ | PROT_WRITE,
			MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQ_RING);
	char *cq = mmap(NULL, parameters.cq_off.cqes + 8 * sizeof(struct io_uring_cqe), PROT_READ | PROT_WRITE,
			MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_CQ_RING);
	struct io_uring_sqe *sqes = mmap(NULL, 4 * sizeof(*sqes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
					 ring, IORING_OFF_SQES);
	must(sq != MAP_FAILED && cq != MAP_FAILED && sqes != MAP_FAILED);
	int source = open(other, O_RDONLY);
	must(source >= 0);
	for (unsigned i = 0; i < 2; i++) {
		memset(&sqes[i], 0, sizeof(*sqes));
		sqes[i].opcode = IORING_OP_READ;
		sqes[i].flags = i ? IOSQE_ASYNC : 0;
		sqes[i].fd = source;
		sqes[i].addr = (uintptr_t)(map + (24 + 4 * i) * PAGE);
		sqes[i].len = 2 * PAGE;
		((unsigned *)(sq + parameters.sq_off.array))[i] = i;
		__atomic_store_n((unsigned *)(sq + parameters.sq_off.tail), i + 1, __ATOMIC_RELEASE);
		must(syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) == 1);
		struct io_uring_cqe *done = (struct io_uring_cqe *)(cq + parameters.cq_off.cqes) + i;
		errno = -done->res;
		must(done->res == (int)(2 * PAGE));
		must(map[(24 + 4 * i) * PAGE] == 'o' && map[(26 + 4 * i) * PAGE - 1] == 'o');
		must(at(path, (24 + 4 * i) * PAGE) == 'o');
		__atomic_store_n((unsigned *)(cq + parameters.cq_off.head), i + 1, __ATOMIC_RELEASE);
	}
}

/* Two files, of two direct mounts. */
static void step_two_mounts(const char *path, const char *other)
{
	volatile char *one = map_file(path), *two = map_file(other);
	one[PAGE] = '1';
	two[PAGE] = '2';
	must(at(path, PAGE) == '1' && at(other, PAGE) == '2');
	pid_t child = fork();
	if (child < 0) {
		printf("fork: %s\n", strerrorname_np(errno));
	} else if (child == 0) {
		one[2 * PAGE] = '3';
		two[2 * PAGE] = '4';
		_exit(0);
	} else {
		reap(child);
		must(one[2 * PAGE] == '3' && two[2 * PAGE] == '4');
	}
	must(posix_spawnp(&child, "true", NULL, NULL, (char *[]){"true", NULL}, environ) == 0);
	reap(child);
	one[3 * PAGE] = '5';
	must(at(path, 3 * PAGE) == '5');
}

/* Map, say so, and wait to be killed. */
static void step_wait(const char *path, const char *other unused)
{
	volatile char *map = map_file(path);
	map[PAGE] = 'w';
	printf("ready\n");
	fflush(stdout);
	pause();
}

/* clone(2) with CLONE_VM alone: another process with the same memory. */
static volatile char *volatile made;

static int child_main(void *given)
{
	made = map_file(given);
	made[PAGE] = 'n';
	return 0;
}

static void step_shared_memory(const char *path, const char *other unused)
{
	volatile char *map = map_file(path);
	static char stack[65536] __attribute__((aligned(16)));
	int status, child = clone(child_main, stack + sizeof(stack), CLONE_VM | SIGCHLD, (void *)path);
	must(child > 0 && waitpid(child, &status, 0) == child && status == 0);
	must(map[PAGE] == 'n' && made[PAGE] == 'n');
	made[PAGE] = 'o';
	must(map[PAGE] == 'o');
}

static const struct {
	const char *name;
	void (*run)(const char *path, const char *other);
} steps[] = {
	{"store", step_store},
	{"fork", step_fork},
	{"vfork", step_vfork},
	{"vfork-mmap", step_vfork_mmap},
	{"vfork-first", step_vfork_first},
	{"spawn", step_spawn},
	{"exec", step_exec},
	{"after-exec", step_after_exec},
	{"thread-exec", step_thread_exec},
	{"failed-exec", step_failed_exec},
	{"threads", step_threads},
	{"forking-threads", step_forking_threads},
	{"proc", step_proc},
	{"parts", step_parts},
	{"mremap", step_mremap},
	{"fixed", step_fixed},
	{"private", step_private},
	{"locked", step_locked},
	{"kernel-mode", step_kernel_mode},
	{"io-uring", step_io_uring},
	{"two-mounts", step_two_mounts},
	{"wait", step_wait},
	{"shared-memory", step_shared_memory},
};

int main(int argc, char **argv)
{
	alarm(20);
	self = argv[0];
	for (unsigned i = 0; argc >= 3 && i < sizeof(steps) / sizeof(*steps); i++)
		if (!strcmp(steps[i].name, argv[1])) {
			steps[i].run(argv[2], argv[3]);
			puts("ok");
			return 0;
		}
	fprintf(stderr, "usage: %s STEP FILE [OTHER]\n", argv[0]);
	return 2;
}
