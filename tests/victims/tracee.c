/*
 * tracee: an ordinary program for the tracer's tests. It obeys one command per line on stdin, and says one line on
 * stdout for each thing that happens to it.
 *
 *     tracee FILE                  maps 1 MiB of FILE shared, says "ready ADDR", and obeys until "quit"
 *
 * tests/host/tracee.py drives it. Of each SIGBUS it says "BUS CODE ADDR LSB TID". The commands:
 *
 *   touch OFF                      load a byte of the mapping: "byte N", or nothing but its BUS
 *   block    unblock               SIGBUS, in the main thread
 *   ignore   default               SIGBUS, in place of the handler
 *   take SECONDS                   sigtimedwait(2): "TOOK 7 CODE ADDR LSB" or "TOOK -1 ERRNO"
 *   epoll                          a signalfd(2) for SIGBUS in epoll_wait(2): "EPOLL CODE ADDR LSB"
 *   sleep MS                       nanosleep(2): "slept RET WAS_LONG_ENOUGH"
 *   spin N                         "done", then compute until N SIGRTMIN+1 came in all: "counted N"
 *   count                          how many SIGRTMIN+1 came so far: "counted N"
 *   thread                         one more that sleeps: "thread TID"
 *   exec                           one more, "thread TID"; once it reads a byte of stdin it calls execve(2)
 *   execself                       the main thread calls execve(2)
 *   seccomp                        death to whoever calls rt_tgsigqueueinfo(2): "done 0"
 *   quit
 *
 * Every signal handler has SA_RESTART; a read(2) of stdin that is interrupted all the same says "READ ERRNO".
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAP_SIZE (1 << 20)

static char **args;
static char *map;
static sigset_t bus;
static volatile int counted;
static __thread sigjmp_buf recover;
static __thread volatile int touching;

static void say(const char *format, ...) __attribute__((format(printf, 1, 2)));

static void say(const char *format, ...)
{
	char line[200];
	va_list list;
	va_start(list, format);
	int len = vsnprintf(line, sizeof line, format, list);
	va_end(list);
	if (write(1, line, len) != len)
		_exit(3);
}

/* ---- signals ---- */

static void on_bus(int sig, siginfo_t *info, void *context)
{
	(void)sig, (void)context;
	say("BUS %d %lx %d %ld\n", info->si_code, (long)info->si_addr, info->si_addr_lsb, syscall(SYS_gettid));
	if (touching && info->si_code != BUS_MCEERR_AO)
		siglongjmp(recover, 1);
}

static void on_count(int sig, siginfo_t *info, void *context)
{
	(void)sig, (void)info, (void)context;
	counted++;
}

static void handle(int sig, void (*handler)(int, siginfo_t *, void *))
{
	struct sigaction action = {.sa_sigaction = handler, .sa_flags = SA_SIGINFO | SA_RESTART};
	sigaction(sig, &action, NULL);
}

static void mask(int how)
{
	pthread_sigmask(how, &bus, NULL);
	say("done\n");
}

static void dispose(void (*disposition)(int))
{
	signal(SIGBUS, disposition);
	say("done\n");
}

/* ---- commands ---- */

static void touch(long offset)
{
	touching = 1;
	if (!sigsetjmp(recover, 1))
		say("byte %d\n", ((volatile char *)map)[offset]);
	touching = 0;
}

static void take(long seconds)
{
	siginfo_t info;
	struct timespec limit = {.tv_sec = seconds};
	int ret = sigtimedwait(&bus, &info, &limit);
	if (ret < 0)
		say("TOOK %d %d\n", ret, errno);
	else
		say("TOOK %d %d %lx %d\n", ret, info.si_code, (long)info.si_addr, info.si_addr_lsb);
}

static void take_by_epoll(void)
{
	struct epoll_event event = {.events = EPOLLIN};
	struct signalfd_siginfo info;
	int epoll = epoll_create1(0), fd = signalfd(-1, &bus, 0);
	epoll_ctl(epoll, EPOLL_CTL_ADD, fd, &event);
	int ret = epoll_wait(epoll, &event, 1, -1);
	if (ret != 1 || read(fd, &info, sizeof info) != sizeof info)
		say("EPOLL %d %d\n", ret, errno);
	else
		say("EPOLL %d %lx %d\n", info.ssi_code, (long)info.ssi_addr, info.ssi_addr_lsb);
}

static long now_ms(void)
{
	struct timespec now;
	clock_gettime(CLOCK_MONOTONIC, &now);
	return now.tv_sec * 1000 + now.tv_nsec / 1000000;
}

static void doze(long ms)
{
	struct timespec length = {.tv_nsec = ms * 1000000};
	long from = now_ms();
	int ret = nanosleep(&length, NULL);
	say("slept %d %d\n", ret, now_ms() - from >= ms);
}

/* Values that live in the red zone and in registers must survive. */
static void spin(long until)
{
	say("done\n");
	for (unsigned long n = 0; counted < until; n++) {
		volatile unsigned long check[8];
		for (int k = 0; k < 8; k++)
			check[k] = n * k;
		for (int k = 0; k < 8; k++)
			if (check[k] != n * k)
				abort();
	}
	say("counted %d\n", counted);
}

static _Noreturn void pause_for_ever(void)
{
	for (;;)
		pause();
}

static void *sleeper(void *unused)
{
	(void)unused;
	say("thread %ld\n", syscall(SYS_gettid));
	pause_for_ever();
}

static void *execer(void *unused)
{
	char go;
	(void)unused;
	say("thread %ld\n", syscall(SYS_gettid));
	if (read(0, &go, 1) == 1)
		execl(args[0], args[0], "/dev/null", "again", NULL);
	_exit(4);
}

static void start(void *(*body)(void *))
{
	pthread_t thread;
	pthread_create(&thread, NULL, body, NULL);
}

static void leave_stdin_to_execer(void)
{
	start(execer);
	pause_for_ever();
}

static void forbid_sigqueue(void)
{
	struct sock_filter code[] = {
		BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
		BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_rt_tgsigqueueinfo, 0, 1),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
		BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
	};
	struct sock_fprog program = {sizeof code / sizeof *code, code};
	prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
	say("done %d\n", prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program));
}

static void obey(const char *word, long arg)
{
	if (!strcmp(word, "touch"))
		touch(arg);
	else if (!strcmp(word, "block"))
		mask(SIG_BLOCK);
	else if (!strcmp(word, "unblock"))
		mask(SIG_UNBLOCK);
	else if (!strcmp(word, "ignore"))
		dispose(SIG_IGN);
	else if (!strcmp(word, "default"))
		dispose(SIG_DFL);
	else if (!strcmp(word, "take"))
		take(arg);
	else if (!strcmp(word, "epoll"))
		take_by_epoll();
	else if (!strcmp(word, "sleep"))
		doze(arg);
	else if (!strcmp(word, "spin"))
		spin(arg);
	else if (!strcmp(word, "count"))
		say("counted %d\n", counted);
	else if (!strcmp(word, "thread"))
		start(sleeper);
	else if (!strcmp(word, "execself"))
		execl(args[0], args[0], args[1], NULL);
	else if (!strcmp(word, "seccomp"))
		forbid_sigqueue();
	else if (!strcmp(word, "exec"))
		leave_stdin_to_execer();
	else if (!strcmp(word, "quit"))
		exit(0);
}

/* Byte by byte: what stdio read ahead would be lost in execve(2). */
static void read_line(char *line, int size)
{
	for (int n = 0; n < size; n++) {
		if (read(0, line + n, 1) != 1) {
			say("READ %d\n", errno);
			_exit(5);
		}
		if (line[n] == '\n') {
			line[n] = 0;
			return;
		}
	}
	_exit(1);
}

int main(int argc, char **argv)
{
	if (argc < 2)
		return 2;
	args = argv;
	map = mmap(NULL, MAP_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, open(argv[1], O_RDWR), 0);
	sigemptyset(&bus);
	sigaddset(&bus, SIGBUS);
	handle(SIGBUS, on_bus);
	handle(SIGRTMIN + 1, on_count);
	say("ready %lx\n", (long)map);
	for (;;) {
		char line[100], word[20] = "";
		long arg = 0;
		read_line(line, sizeof line);
		sscanf(line, "%19s %ld", word, &arg);
		obey(word, arg);
	}
}
