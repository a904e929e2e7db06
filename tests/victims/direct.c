/* Processes and threads with direct mappings: direct STEP FILE [OTHER], see direct.h. */
#include "direct.h"
#include <dirent.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>

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
	{"two-mounts", step_two_mounts},
	{"wait", step_wait},
	{"shared-memory", step_shared_memory},
	{NULL, NULL},
};

int main(int argc, char **argv)
{
	return run_step(steps, argc, argv);
}
