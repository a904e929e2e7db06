/*
 * waiter FILE PAGE vfork|leader|read|fault [OTHER]: map FILE, load from PAGE, print "ready" and wait in a rare state until
 * stdin ends.
 *
 *   vfork     the process sleeps in vfork(2), beyond signals, while its child waits
 *   leader    the main thread has ended (a zombie); another thread waits, and then loads from PAGE
 *   read      the process sleeps in read(2) of OTHER, for as long as its server does
 *   fault     a thread sleeps in a page fault of OTHER and holds mmap_lock; a byte on stdin makes the main thread wait for
 *             mmap_lock, in mmap(2), so that every reader of the lock waits
 *
 * Prints the si_code of each SIGBUS. Exit status 0 after that.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096L

static volatile const char *page, *other;

static void on_sigbus(int number, siginfo_t *info, void *context)
{
	char text[] = "0\n";

	(void)number, (void)context;
	text[0] += info->si_code;
	if (write(1, text, 2) != 2 || info->si_code == BUS_MCEERR_AR)
		_exit(0);
}

static void *wait_and_load(void *unused)
{
	char byte;

	if (read(0, &byte, 1) == 0)
		(void)*page;
	_exit(0);
	return unused;
}

static void *load_other(void *unused)
{
	(void)*other;
	return unused;
}

static int wait_for_other(const char *path, int faults)
{
	pthread_t thread;
	char byte;
	int fd = open(path, O_RDONLY);

	if (fd < 0)
		return 5;
	if (!faults) {
		if (write(1, "ready\n", 6) == 6)
			(void)!pread(fd, &byte, 1, 0);
		return read(0, &byte, 1) != 0;
	}
	other = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0);
	if (other == MAP_FAILED || pthread_create(&thread, NULL, load_other, NULL))
		return 6;
	if (write(1, "ready\n", 6) != 6 || read(0, &byte, 1) != 1)
		return 7;
	if (mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, 0) == MAP_FAILED)
		return 8;
	return read(0, &byte, 1) != 0;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO };
	int fd = argc >= 4 ? open(argv[1], O_RDWR) : -1;
	pthread_t thread;

	if (fd < 0 || sigaction(SIGBUS, &action, NULL))
		return 2;
	page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, atol(argv[2]) * PAGE);
	if (page == MAP_FAILED)
		return 3;
	(void)*page;
	if (argc == 5)
		return wait_for_other(argv[4], !strcmp(argv[3], "fault"));
	if (!strcmp(argv[3], "leader")) {
		if (write(1, "ready\n", 6) != 6 || pthread_create(&thread, NULL, wait_and_load, NULL))
			return 4;
		pthread_exit(NULL);
	}
	if (write(1, "ready\n", 6) == 6 && vfork() == 0) {
		char byte;
		while (read(0, &byte, 1) != 0)
			; /* a signal of its own */
		_exit(0);
	}
	return 0;
}
