/* Processes and threads with direct mappings: direct STEP FILE [OTHER], see direct.h. */
#include "direct.h"
#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <sys/uio.h>
#include <sys/time.h>
#include <sys/syscall.h>

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

/* Have a child that shares the memory map the file and store x. The mapping outlives the child. */
static volatile char *mapped_by_vfork(const char *path)
{
	volatile char *volatile made = NULL;
	pid_t child = vfork();
	if (child == 0) {
		made = map_file(path);
		made[PAGE] = 'x';
		_exit(0);
	}
	reap(child);
	must(made[PAGE] == 'x');
	return made;
}

static void step_vfork_mmap(const char *path, const char *other unused)
{
	volatile char *map = map_file(path);
	mapped_by_vfork(path);
	must(map[PAGE] == 'x');
}

static void step_vfork_first(const char *path, const char *other unused)
{
	volatile char *more = mapped_by_vfork(path);
	volatile char *map = map_file(path);
	must(map[PAGE] == 'x');
	more[PAGE] = 'y';
	must(map[PAGE] == 'y');
	/* The mapping follows changes of the file. */
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

/* Two files, of two direct mounts. */
/* The child of a fork has no page of a shared mapping, whatever the number of mappings. */
static void step_many_mappings(const char *path, const char *other unused)
{
	enum { COUNT = 700 };
	static volatile char *maps[COUNT];
	int fd = open_file(path), pagemap;
	for (int i = 0; i < COUNT; i++) {
		maps[i] = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, (i % 2) * PAGE);
		must(maps[i] != MAP_FAILED && *maps[i] == 'A' + i % 2);
	}
	pid_t child = fork();
	must(child >= 0);
	if (child == 0) {
		uint64_t entry;
		must((pagemap = open("/proc/self/pagemap", O_RDONLY)) >= 0);
		for (int i = 0; i < COUNT; i++) {
			must(pread(pagemap, &entry, 8, (uintptr_t)maps[i] / PAGE * 8) == 8);
			must(!(entry >> 63));
			must(*maps[i] == 'A' + i % 2);
		}
		_exit(0);
	}
	reap(child);
}

#if defined(__x86_64__)
static int descriptors(void)
{
	int count = 0;
	DIR *dir = opendir("/proc/self/fd");
	while (readdir(dir))
		count++;
	closedir(dir);
	return count;
}

/* A clone(2) with given flags changes no register but rax, rcx and r11, in the parent and in the child. */
static pid_t raw_clone(long number, long flags)
{
	uint64_t in[13], out[13];
	long result;
	for (int i = 0; i < 13; i++)
		in[i] = 0x1111111111111111u * (i + 1);
	in[1] = in[2] = in[3] = in[4] = 0; /* stack, parent_tid, child_tid, tls */
	in[0] = flags;
	__asm__ volatile("push %%rbp\n"
			 "push %%rbx\n"
			 "push %[out]\n"
			 "mov %[number], %%rax\n"
			 "mov %[in], %%rbp\n"
			 "mov 0(%%rbp), %%rdi\n"
			 "mov 8(%%rbp), %%rsi\n"
			 "mov 16(%%rbp), %%rdx\n"
			 "mov 24(%%rbp), %%r10\n"
			 "mov 32(%%rbp), %%r8\n"
			 "mov 40(%%rbp), %%r9\n"
			 "mov 48(%%rbp), %%rbx\n"
			 "mov 64(%%rbp), %%r12\n"
			 "mov 72(%%rbp), %%r13\n"
			 "mov 80(%%rbp), %%r14\n"
			 "mov 88(%%rbp), %%r15\n"
			 "mov 56(%%rbp), %%rbp\n"
			 "syscall\n"
			 "mov (%%rsp), %%rcx\n"
			 "mov %%rdi, 0(%%rcx)\n"
			 "mov %%rsi, 8(%%rcx)\n"
			 "mov %%rdx, 16(%%rcx)\n"
			 "mov %%r10, 24(%%rcx)\n"
			 "mov %%r8, 32(%%rcx)\n"
			 "mov %%r9, 40(%%rcx)\n"
			 "mov %%rbx, 48(%%rcx)\n"
			 "mov %%rbp, 56(%%rcx)\n"
			 "mov %%r12, 64(%%rcx)\n"
			 "mov %%r13, 72(%%rcx)\n"
			 "mov %%r14, 80(%%rcx)\n"
			 "mov %%r15, 88(%%rcx)\n"
			 "pop %%rcx\n"
			 "pop %%rbx\n"
			 "pop %%rbp\n"
			 : "=a"(result)
			 : [out] "c"(out), [in] "S"(in), [number] "a"(number)
			 : "rdi", "rdx", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15", "memory");
	must(!memcmp(in, out, 12 * sizeof *in));
	return (pid_t)result;
}

static void step_raw_fork(const char *path, const char *other unused)
{
	volatile char *map = map_file(path);
	int before = descriptors();
	sigset_t mask, now;
	sigemptyset(&mask);
	sigaddset(&mask, SIGUSR1);
	must(sigprocmask(SIG_SETMASK, &mask, NULL) == 0);
	const struct {
		long number, flags;
	} ways[] = { { 57, 0 }, { 56, SIGCHLD }, { 56, SIGCHLD | CLONE_FILES }, { 56, SIGCHLD | CLONE_FS | CLONE_VFORK } };
	for (unsigned i = 0; i < sizeof ways / sizeof *ways; i++) {
		pid_t child = raw_clone(ways[i].number, ways[i].flags);
		must(child >= 0);
		must(sigprocmask(SIG_SETMASK, NULL, &now) == 0);
		must(sigismember(&now, SIGUSR1) && !sigismember(&now, SIGUSR2) && !sigismember(&now, SIGTERM));
		if (child == 0) {
			map[PAGE * (i + 1)] = (char)('0' + i);
			must(descriptors() == before);
			_exit(0);
		}
		reap(child);
		must(map[PAGE * (i + 1)] == (char)('0' + i));
		must(descriptors() == before);
	}
}

static volatile sig_atomic_t forked_by_handler;

static void fork_in_handler(int sig unused)
{
	pid_t child = fork();
	must(child >= 0);
	if (child == 0)
		_exit(0);
	must(waitpid(child, NULL, 0) == child);
	forked_by_handler++;
}

/* A handler that forks runs where another fork of the thread ends. */
static void step_forking_handler(const char *path, const char *other unused)
{
	volatile char *map = map_file(path);
	struct sigaction action = { .sa_handler = fork_in_handler, .sa_flags = SA_RESTART };
	must(sigaction(SIGALRM, &action, NULL) == 0);
	for (int i = 0; i < 60; i++) {
		struct itimerval once = { { 0, 0 }, { 0, 100 + 50 * i } };
		must(setitimer(ITIMER_REAL, &once, NULL) == 0);
		pid_t child = fork();
		must(child >= 0);
		if (child == 0) {
			map[PAGE] = (char)i;
			_exit(0);
		}
		must(waitpid(child, NULL, 0) == child);
		must(map[PAGE] == (char)i);
		while (forked_by_handler <= i)
			usleep(1000);
	}
}
#endif

static volatile char *consumed_in;

static void say_and_exit(int sig unused, siginfo_t *info, void *context unused)
{
	printf("code %d page %ld\nok\n", info->si_code, (long)((char *)info->si_addr - consumed_in) / (long)PAGE);
	fflush(stdout);
	_exit(0);
}

/* A thread of a child loads from page 3, which has poison. */
static void *consume(void *unused_too unused)
{
	(void)consumed_in[3 * PAGE];
	return NULL;
}

static void step_consume(const char *path, const char *other unused)
{
	consumed_in = map_file(path);
	struct sigaction action = { .sa_sigaction = say_and_exit, .sa_flags = SA_SIGINFO };
	must(sigaction(SIGBUS, &action, NULL) == 0);
	pid_t child = fork();
	if (child == 0) {
		pthread_t thread;
		must(pthread_create(&thread, NULL, consume, NULL) == 0);
		pthread_join(thread, NULL);
		must(!"no signal");
	}
	int status;
	must(waitpid(child, &status, 0) == child && status == 0);
	_exit(0);
}

static void step_two_mounts(const char *path, const char *other)
{
	volatile char *one = map_file(path), *two = map_file(other);
	one[PAGE] = '1';
	two[PAGE] = '2';
	must(at(path, PAGE) == '1' && at(other, PAGE) == '2');
	pid_t child;
	for (int round = 0; round < 10; round++) {
		child = fork();
		must(child >= 0);
		if (child == 0) {
			one[2 * PAGE] = (char)('a' + round);
			two[2 * PAGE] = (char)('A' + round);
			must(map_file(path)[2 * PAGE] == 'a' + round);
			_exit(0);
		}
		reap(child);
		must(one[2 * PAGE] == 'a' + round && two[2 * PAGE] == 'A' + round);
		must(waitpid(-1, NULL, __WALL) == -1 && errno == ECHILD);
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

static const struct step steps[] = {
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
	{"many-mappings", step_many_mappings},
#if defined(__x86_64__)
	{"raw-fork", step_raw_fork},
	{"forking-handler", step_forking_handler},
#endif
	{"consume", step_consume},
	{"two-mounts", step_two_mounts},
	{"wait", step_wait},
	{"shared-memory", step_shared_memory},
	{NULL, NULL},
};

int main(int argc, char **argv)
{
	return run_step(steps, argc, argv);
}
