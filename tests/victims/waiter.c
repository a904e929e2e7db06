/*
 * waiter FILE PAGE vfork|leader: map FILE, load from PAGE, print "ready" and wait in a rare state until stdin ends.
 *
 *   vfork     the process sleeps in vfork(2), beyond signals, while its child waits
 *   leader    the main thread has ended (a zombie); another thread waits, and then loads from PAGE
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

static volatile const char *page;

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

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO };
	int fd = argc == 4 ? open(argv[1], O_RDWR) : -1;
	pthread_t thread;

	if (fd < 0 || sigaction(SIGBUS, &action, NULL))
		return 2;
	page = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, atol(argv[2]) * PAGE);
	if (page == MAP_FAILED)
		return 3;
	(void)*page;
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
