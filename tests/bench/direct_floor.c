/*
 * direct_floor: the system calls alone of one kind of work on direct mappings, with nothing decided or looked up; prints one
 * figure, in seconds. No direct mount can be faster.
 *
 *   thread         a copy at the store: page fault, copy, mmap in place, registration, wake-up; by a thread of the process
 *   agent          the same; the mmap by another process that shares the memory
 *   protect MIB    write protection of so many MiB of present pages
 *   mmap FILE      mmap of a file, notified by seccomp(2) to a process that looks at nothing
 */
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <linux/userfaultfd.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096UL
#define COPIES 2048
#define CALLS 5000
#define WP_SHMEM (1 << 12) /* UFFD_FEATURE_WP_HUGETLBFS_SHMEM */

static int uffd, media, sockets[2], has_agent;
static char *place, *view, stack[65536];

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static double now(void)
{
	struct timespec t;

	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static void register_range(char *at, size_t length)
{
	struct uffdio_register request = { { (unsigned long)at, length },
					   UFFDIO_REGISTER_MODE_MISSING | UFFDIO_REGISTER_MODE_WP, 0 };
	if (ioctl(uffd, UFFDIO_REGISTER, &request))
		fail("UFFDIO_REGISTER");
}

static void protect(char *at, size_t length)
{
	struct uffdio_writeprotect request = { { (unsigned long)at, length }, UFFDIO_WRITEPROTECT_MODE_WP };
	if (ioctl(uffd, UFFDIO_WRITEPROTECT, &request))
		fail("UFFDIO_WRITEPROTECT");
}

/* Makes a present, registered mapping of ``pages`` of a file of twice as many. */
static void prepare(size_t pages)
{
	struct uffdio_api api = { UFFD_API, UFFD_FEATURE_PAGEFAULT_FLAG_WP | UFFD_FEATURE_MISSING_SHMEM | WP_SHMEM, 0 };

	uffd = syscall(SYS_userfaultfd, O_CLOEXEC | O_NONBLOCK);
	media = syscall(SYS_memfd_create, "media", 0);
	if (uffd < 0 || ioctl(uffd, UFFDIO_API, &api) || media < 0 || ftruncate(media, 2 * pages * PAGE))
		fail("userfaultfd");
	view = mmap(NULL, 2 * pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, media, 0);
	place = mmap(NULL, pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, media, 0);
	if (view == MAP_FAILED || place == MAP_FAILED)
		fail("mmap");
	memset(view, 1, pages * PAGE);
	register_range(place, pages * PAGE);
	for (size_t at = 0; at < pages; at++)
		((volatile char *)place)[at * PAGE] = 2;
}

static int map_page(long at, long offset)
{
	return mmap((void *)at, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, media, offset) == MAP_FAILED;
}

static int agent(void *unused)
{
	long call[2], result;

	(void)unused;
	while (read(sockets[1], call, sizeof call) == sizeof call) {
		result = map_page(call[0], call[1]);
		if (write(sockets[1], &result, sizeof result) != sizeof result)
			break;
	}
	_exit(0);
}

static void *answer(void *unused)
{
	long new = COPIES;

	(void)unused;
	for (;;) {
		struct uffd_msg event;
		struct pollfd polled = { uffd, POLLIN, 0 };
		poll(&polled, 1, -1);
		if (read(uffd, &event, sizeof event) != sizeof event)
			continue;
		char *at = (char *)(event.arg.pagefault.address & ~(PAGE - 1));
		struct uffdio_range range = { (unsigned long)at, PAGE };
		long call[2] = { (long)at, new * PAGE }, result = 0;
		memcpy(view + new++ * PAGE, view + (at - place), PAGE);
		if (!has_agent)
			result = map_page(call[0], call[1]);
		else if (write(sockets[0], call, sizeof call) != sizeof call ||
			 read(sockets[0], &result, sizeof result) != sizeof result)
			fail("agent");
		if (result)
			fail("mmap");
		register_range(at, PAGE);
		if (ioctl(uffd, UFFDIO_WAKE, &range))
			fail("UFFDIO_WAKE");
	}
	return NULL;
}

static double do_copies(void)
{
	pthread_t thread;

	prepare(COPIES);
	protect(place, COPIES * PAGE);
	if (has_agent && (socketpair(AF_UNIX, SOCK_SEQPACKET, 0, sockets) ||
			  clone(agent, stack + sizeof stack, CLONE_VM | CLONE_FILES, NULL) < 0))
		fail("clone");
	if (pthread_create(&thread, NULL, answer, NULL))
		fail("pthread_create");
	double began = now();
	for (long at = 0; at < COPIES; at++)
		((volatile char *)place)[at * PAGE] = 3;
	double took = (now() - began) / COPIES;
	if (has_agent)
		shutdown(sockets[0], SHUT_RDWR); /* the agent ends */
	return took;
}

static double do_protect(long mib)
{
	prepare(mib << 8);
	double began = now();
	protect(place, mib << 20);
	return now() - began;
}

static int compared(const void *one, const void *other)
{
	double a = *(const double *)one, b = *(const double *)other;
	return (a > b) - (a < b);
}

static void answer_calls(int listener)
{
	struct sched_param first = { 1 };
	uint64_t sync_wake_up = 1;

	sched_setscheduler(0, SCHED_FIFO, &first);
	ioctl(listener, _IOW('!', 4, uint64_t), &sync_wake_up); /* SECCOMP_IOCTL_NOTIF_SET_FLAGS */
	for (;;) {
		struct seccomp_notif call;
		memset(&call, 0, sizeof call);
		if (ioctl(listener, SECCOMP_IOCTL_NOTIF_RECV, &call))
			_exit(0);
		struct seccomp_notif_resp go_on = { call.id, 0, 0, SECCOMP_USER_NOTIF_FLAG_CONTINUE };
		ioctl(listener, SECCOMP_IOCTL_NOTIF_SEND, &go_on);
	}
}

static double do_mmap(const char *path)
{
	static double spent[CALLS];
	struct sock_filter filter[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_mmap, 0, 3),
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args[3])),
		BPF_JUMP(BPF_JMP | BPF_JSET | BPF_K, MAP_ANONYMOUS, 1, 0),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_USER_NOTIF),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = { 6, filter };
	int fd = open(path, O_RDONLY);

	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	int listener = syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, SECCOMP_FILTER_FLAG_NEW_LISTENER, &program);
	if (fd < 0 || listener < 0)
		fail(path);
	pid_t helper = fork();
	if (!helper)
		answer_calls(listener);
	for (int i = 0; i < CALLS; i++) {
		double began = now();
		void *map = mmap(NULL, PAGE, PROT_READ, MAP_PRIVATE, fd, 0);
		spent[i] = now() - began;
		if (map == MAP_FAILED || munmap(map, PAGE))
			fail("mmap");
	}
	kill(helper, SIGKILL);
	waitpid(helper, NULL, 0);
	qsort(spent, CALLS, sizeof *spent, compared);
	return spent[CALLS / 2];
}

int main(int argc, char **argv)
{
	const char *verb = argc > 1 ? argv[1] : "";
	double took;

	has_agent = !strcmp(verb, "agent");
	if (has_agent || !strcmp(verb, "thread"))
		took = do_copies();
	else if (!strcmp(verb, "protect") && argc == 3)
		took = do_protect(atol(argv[2]));
	else if (!strcmp(verb, "mmap") && argc == 3)
		took = do_mmap(argv[2]);
	else {
		fprintf(stderr, "direct_floor: see the head of direct_floor.c\n");
		return 2;
	}
	printf("%.9f\n", took);
	fflush(stdout);
	_exit(0);
}
