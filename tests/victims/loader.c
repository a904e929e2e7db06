/*
 * loader FILE THREADS: map FILE, and have THREADS threads load from every page of the mapping without a pause.
 *
 * Prints "ready" once every thread has loaded every page. The process ends with its first SIGBUS, and prints that signal's
 * si_code and, of a BUS_MCEERR_*, its si_addr_lsb.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#define PAGE 4096

static volatile const char *pages;
static size_t length;
static atomic_int is_claimed, rounds_done;

static void on_sigbus(int number, siginfo_t *info, void *context)
{
	char text[64];

	(void)number, (void)context;
	if (atomic_exchange(&is_claimed, 1))
		for (;;)
			pause(); /* another thread's signal was first */
	int lsb = info->si_code == BUS_MCEERR_AO || info->si_code == BUS_MCEERR_AR ? info->si_addr_lsb : 0;
	int size = snprintf(text, sizeof text, "%d %d\n", info->si_code, lsb);
	_exit(write(STDOUT_FILENO, text, size) != size);
}

static void *load(void *unused)
{
	for (int is_first = 1;; is_first = 0) {
		for (size_t at = 0; at < length; at += PAGE)
			(void)pages[at];
		if (is_first)
			atomic_fetch_add(&rounds_done, 1);
	}
	return unused;
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO };
	struct stat stat;
	int threads = argc == 3 ? atoi(argv[2]) : 0;
	int fd = threads > 0 ? open(argv[1], O_RDWR) : -1;

	if (fd < 0 || fstat(fd, &stat) || sigaction(SIGBUS, &action, NULL))
		return 2;
	length = stat.st_size;
	pages = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (pages == MAP_FAILED)
		return 3;
	for (int at = 1; at < threads; at++) {
		pthread_t thread;
		if (pthread_create(&thread, NULL, load, NULL))
			return 4;
	}
	if (threads > 1) {
		while (atomic_load(&rounds_done) < threads - 1)
			usleep(1000);
	} else {
		for (size_t at = 0; at < length; at += PAGE)
			(void)pages[at];
	}
	puts("ready");
	fflush(stdout);
	load(NULL);
}
