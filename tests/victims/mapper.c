/*
 * A program whose mappings of one file are direct ones: commands on stdin, a line of answer each on stdout.
 *
 *   map PATH PAGES     mmap(MAP_SHARED); "at ADDRESS"
 *   store PAGE BYTE    a store to the first byte of a page
 *   load PAGE          "byte B"
 *   fork               the child serves the same commands from then on, on stdin; "child PID"; the parent waits for it
 *   forks N            N forks, each child stores its number to page N and ends; "forked N", with the number of failures
 *   threads T N        the same from T threads at once
 *   stress N           N forks, while another thread stores to all pages again and again
 *   alarmed N          N forks while a timer signals again and again; "failures N signals N"
 *   limit N            setrlimit(RLIMIT_NPROC)
 *   reaper             becomes a subreaper
 *   wait               waitpid(-1, __WALL): "wait RESULT ERRNO"
 *   state              everything that the making of an agent must not change
 *   vfork [PATH]       the child of a vfork maps PATH, or the file of the last command, stores to page 0, then exits
 *   exec PATH          execv(PATH)
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
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096L

static volatile char *map;
static long pages;
static volatile int stop;
static int failures;

static long xmap(const char *path, long count)
{
	int fd = open(path, O_RDWR | O_CLOEXEC);
	void *at = mmap(NULL, count * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (at == MAP_FAILED)
		return -errno;
	close(fd);
	map = at;
	pages = count;
	return 0;
}

static void forks(int first, int count)
{
	for (int i = 0; i < count; i++) {
		int status, number = first + i;
		pid_t child = fork();
		if (!child) {
			map[number * PAGE] = (char)('A' + number % 26);
			_exit(map[number * PAGE] != 'A' + number % 26);
		}
		if (child < 0 || waitpid(child, &status, 0) != child || status)
			__atomic_add_fetch(&failures, 1, __ATOMIC_SEQ_CST);
	}
}

static void bomb(int count)
{
	pid_t children[256];
	for (int i = 0; i < count; i++) {
		children[i] = fork();
		if (!children[i]) {
			map[i * PAGE] = (char)('A' + i % 26);
			_exit(0);
		}
	}
	for (int i = 0; i < count; i++) {
		int status;
		if (children[i] < 0 || waitpid(children[i], &status, 0) != children[i] || status)
			failures++;
	}
}

struct part {
	int first, count;
};

static void *forker(void *arg)
{
	struct part *part = arg;
	forks(part->first, part->count);
	return NULL;
}

static void *storer(void *arg)
{
	while (!stop)
		for (long i = 0; i < pages; i++) {
			map[i * PAGE + 8]++;
			madvise((void *)(map + i * PAGE), PAGE, MADV_NORMAL);
		}
	return arg;
}

static int caught;

static void on_signal(int sig)
{
	caught = sig;
}

static volatile int signals;
static volatile long wait_us;

static void set_timer(long microseconds)
{
	struct itimerval once = {{0, 0}, {microseconds / 1000000, microseconds % 1000000}};
	setitimer(ITIMER_REAL, &once, NULL);
}

/* Each wait is twice the one before: a fork begins anew at a signal, and must end on a slow machine, too. */
static void on_alarm(int sig)
{
	(void)sig;
	signals++;
	wait_us *= 2;
	set_timer(wait_us);
}

static void alarmed(int count)
{
	struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
	sigaction(SIGALRM, &action, NULL);
	for (int i = 0; i < count; i++) {
		set_timer(0);
		wait_us = 250;
		set_timer(wait_us);
		forks(i, 1);
	}
	set_timer(0);
}

/* What changes in a thread across an mmap, as the kernel shows it and as the program sees it. */
static void state(const char *path)
{
	sigset_t blocked, before, after, pending;
	struct sigaction action = {.sa_handler = on_signal}, trap, cont;
	sigaction(SIGTRAP, &action, NULL);
	sigaction(SIGCONT, &action, NULL);
	sigaction(SIGUSR1, &action, NULL);
	sigemptyset(&blocked);
	sigaddset(&blocked, SIGTRAP);
	sigaddset(&blocked, SIGCONT);
	sigaddset(&blocked, SIGUSR1);
	sigaddset(&blocked, SIGRTMAX);
	pthread_sigmask(SIG_BLOCK, &blocked, &before);
	raise(SIGTRAP);
	raise(SIGCONT);
	raise(SIGRTMAX);
	raise(SIGRTMAX);
	kill(getpid(), SIGUSR1);
	errno = 77;
	int fd = open(path, O_RDWR), next;
	register long keep __asm__("rbx") = 0x1122334455667788;
	register long keep12 __asm__("r12") = 0x99aabbccddeeff00;
	register long keep13 __asm__("r13") = 0x0123456789abcdef;
	__asm__ volatile("" : "+r"(keep), "+r"(keep12), "+r"(keep13));
	register long result __asm__("rax") = SYS_mmap;
	register long a4 __asm__("r10") = MAP_SHARED, a5 __asm__("r8") = fd, a6 __asm__("r9") = 0;
	__asm__ volatile("syscall"
			 : "+r"(result)
			 : "D"(0L), "S"(PAGE), "d"(3L), "r"(a4), "r"(a5), "r"(a6)
			 : "rcx", "r11", "memory");
	long at = result;
	__asm__ volatile("" : "+r"(keep), "+r"(keep12), "+r"(keep13));
	int regs = keep == 0x1122334455667788 && keep12 == (long)0x99aabbccddeeff00 && keep13 == 0x0123456789abcdef;
	int error = errno;
	next = open("/dev/null", O_RDONLY);
	close(fd);
	pthread_sigmask(SIG_SETMASK, NULL, &after);
	sigpending(&pending);
	sigaction(SIGTRAP, NULL, &trap);
	sigaction(SIGCONT, NULL, &cont);
	int same = 1;
	for (int sig = 1; sig < 65; sig++)
		same &= sigismember(&after, sig) == (sigismember(&before, sig) | sigismember(&blocked, sig));
	int queued = 0;
	struct timespec none = {0, 0};
	sigset_t last;
	sigemptyset(&last);
	sigaddset(&last, SIGRTMAX);
	while (sigtimedwait(&last, NULL, &none) == SIGRTMAX)
		queued++;
	int status, waited = waitpid(-1, &status, __WALL), why = errno, reaper = 0;
	prctl(PR_GET_CHILD_SUBREAPER, &reaper);
	printf("zone %d registers %d errno %d fds %d mask %d pending %d%d%d queued %d handlers %d wait %d %d caught %d "
	       "reaper %d\n",
	       at >> 44 == 2, regs, error, next - fd, same, sigismember(&pending, SIGTRAP), sigismember(&pending, SIGCONT),
	       sigismember(&pending, SIGUSR1), queued, trap.sa_handler == on_signal && cont.sa_handler == on_signal, waited,
	       why, caught, reaper);
}

int main(void)
{
	char line[512], path[400];
	long a, b;
	setvbuf(stdin, NULL, _IONBF, 0);
	setvbuf(stdout, NULL, _IOLBF, 0);
	while (fgets(line, sizeof line, stdin)) {
		char byte;
		if (sscanf(line, "map %399s %ld", path, &a) == 2) {
			long error = xmap(path, a);
			error ? printf("error %ld\n", -error) : printf("at %p\n", (void *)map);
		} else if (sscanf(line, "store %ld %c", &a, &byte) == 2) {
			map[a * PAGE] = byte;
			puts("stored");
		} else if (sscanf(line, "load %ld", &a) == 1) {
			printf("byte %d\n", map[a * PAGE]);
		} else if (!strcmp(line, "fork\n")) {
			pid_t child = fork();
			int status;
			if (child > 0) {
				waitpid(child, &status, 0);
				printf("child ended %d\n", status);
			} else if (!child) {
				printf("child %d\n", getpid());
			} else
				printf("fork %d\n", errno);
		} else if (sscanf(line, "forks %ld", &a) == 1) {
			forks(0, a);
			printf("failures %d\n", failures);
		} else if (sscanf(line, "alarmed %ld", &a) == 1) {
			alarmed(a);
			printf("failures %d signals %d\n", failures, signals);
		} else if (sscanf(line, "bomb %ld", &a) == 1) {
			bomb(a);
			printf("failures %d\n", failures);
		} else if (sscanf(line, "threads %ld %ld", &a, &b) == 2) {
			pthread_t threads[64];
			struct part parts[64];
			for (int i = 0; i < a; i++) {
				parts[i] = (struct part){i * b, b};
				pthread_create(&threads[i], NULL, forker, &parts[i]);
			}
			for (int i = 0; i < a; i++)
				pthread_join(threads[i], NULL);
			printf("failures %d\n", failures);
		} else if (sscanf(line, "stress %ld", &a) == 1) {
			pthread_t thread;
			pthread_create(&thread, NULL, storer, NULL);
			forks(0, a);
			stop = 1;
			pthread_join(thread, NULL);
			printf("failures %d\n", failures);
		} else if (!strcmp(line, "wait\n")) {
			int status, got = waitpid(-1, &status, __WALL);
			printf("wait %d %d\n", got, got < 0 ? errno : 0);
		} else if (!strcmp(line, "reaper\n")) {
			prctl(PR_SET_CHILD_SUBREAPER, 1);
			puts("done");
		} else if (sscanf(line, "limit %ld", &a) == 1) {
			struct rlimit processes = {a, 200};
			puts(setrlimit(RLIMIT_NPROC, &processes) ? "no" : "done");
		} else if (sscanf(line, "state %399s", path) == 1) {
			state(path);
		} else if (!strcmp(line, "vfork\n") || sscanf(line, "vfork %399s", path) == 1) {
			pid_t child = vfork();
			int status;
			if (!child) {
				int other = open(path, O_RDWR);
				char *again = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, other, 0);
				close(other);
				*again = 'V';
				_exit(0);
			}
			waitpid(child, &status, 0);
			printf("vfork %d\n", status);
		} else if (sscanf(line, "exec %399s", path) == 1) {
			execl(path, path, (char *)NULL);
			printf("exec %d\n", errno);
		} else
			puts("what?");
	}
	return 0;
}
