/*
 * poisoner: a program that poisons its own memory, and knows nothing of daxemu.
 *
 *     poisoner HOW FILE PAGE [PAGES]       HOW: load, store, thread, fork, vfork (and exec), blocked-thread
 *     poisoner sharers FILE PAGE FILE PAGE the first is mapped by an early killer, a child poisons the second
 *
 * It says what madvise(2) returned and each SIGBUS: its code, the page of the mapping, lsb, whether the thread that
 * made the call got it.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096L

static const char *name = "main";
static char *map;
static long page, pages = 1;
static volatile pid_t caller;

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	(void)sig, (void)context;
	dprintf(1, "%s: code %d page %ld lsb %d%s\n", name, info->si_code, ((char *)info->si_addr - map) / PAGE,
		info->si_addr_lsb, gettid() == caller ? " caller" : "");
}

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static void map_file(const char *file)
{
	int fd = open(file, O_RDWR);
	struct stat st;

	if (fd < 0 || fstat(fd, &st))
		die(file);
	map = mmap(NULL, st.st_size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		die("mmap");
	close(fd);
}

static void *poison(void *unused)
{
	caller = gettid();
	int ret = madvise(map + page * PAGE, pages * PAGE, MADV_HWPOISON);

	dprintf(1, "%s: madvise %d%s%s\n", name, ret, ret ? " " : "", ret ? strerrorname_np(errno) : "");
	return unused;
}

static void join(pid_t child)
{
	int status;

	if (waitpid(child, &status, 0) != child || status)
		dprintf(1, "child: status %#x\n", status);
}

int main(int argc, char **argv)
{
	struct sigaction act = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_RESTART };
	const char *how = argv[1];
	pthread_t thread;
	sigset_t sigbus;
	pid_t child;

	if (argc < 4)
		return 2;
	sigaction(SIGBUS, &act, NULL);
	page = atol(argv[3]);
	map_file(argv[2]);
	if (!strcmp(how, "sharers")) {
		prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0);
		*(volatile char *)(map + page * PAGE);
		child = fork();
		if (!child) {
			prctl(PR_MCE_KILL, PR_MCE_KILL_CLEAR, 0, 0, 0);
			name = "child";
			page = atol(argv[5]);
			map_file(argv[4]);
			poison(NULL);
			return 0;
		}
		join(child);
		return 0;
	}
	if (argc > 4)
		pages = atol(argv[4]);
	if (!strcmp(how, "store")) {
		map[page * PAGE] = 'x';
	} else if (!strcmp(how, "thread") || !strcmp(how, "blocked-thread")) {
		sigemptyset(&sigbus);
		sigaddset(&sigbus, SIGBUS);
		if (how[0] == 'b')
			pthread_sigmask(SIG_BLOCK, &sigbus, NULL);
		pthread_create(&thread, NULL, poison, NULL);
		pthread_join(thread, NULL);
		return 0;
	} else if (!strcmp(how, "fork")) {
		child = fork();
		if (child) {
			join(child);
			return 0;
		}
		name = "child";
	} else if (!strcmp(how, "vfork")) {
		argv[1] = "load";
		child = vfork();
		if (!child) {
			execv("/proc/self/exe", argv);
			_exit(127);
		}
		join(child);
		return 0;
	}
	poison(NULL);
	return 0;
}
