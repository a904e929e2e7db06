/*
 * peeker FILE PAGE: map FILE, and load the first byte of PAGE in a tight loop until stdin ends.
 *
 * Prints "ready" before the loop, and then "faults N zeros N spans N longest NS total NS": loads that ended in SIGBUS,
 * loads of a zero byte, uninterrupted runs of the latter, and how long the longest run and all runs lasted.
 */
#include <fcntl.h>
#include <poll.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096L
#define LOOKS 256 /* loads between two looks at stdin */

static sigjmp_buf fault;

static void on_sigbus(int number)
{
	(void)number;
	siglongjmp(fault, 1);
}

static long now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

int main(int argc, char **argv)
{
	static volatile long faults, zeros, spans, longest, total, since, looks;
	struct pollfd input = { .fd = 0, .events = POLLIN };
	int fd = argc == 3 ? open(argv[1], O_RDONLY) : -1;
	if (fd < 0)
		return 2;
	volatile const char *page = mmap(NULL, PAGE, PROT_READ, MAP_SHARED, fd, atol(argv[2]) * PAGE);
	if (page == MAP_FAILED)
		return 3;
	signal(SIGBUS, on_sigbus);
	puts("ready");
	fflush(stdout);
	while (++looks % LOOKS || !poll(&input, 1, 0)) {
		int is_zero = 0;
		if (sigsetjmp(fault, 1))
			faults++;
		else
			is_zero = *page == 0;
		zeros += is_zero;
		if (is_zero && !since)
			since = now();
		if (!is_zero && since) {
			long lasted = now() - since;
			spans++;
			total += lasted;
			longest = lasted > longest ? lasted : longest;
			since = 0;
		}
	}
	printf("faults %ld zeros %ld spans %ld longest %ld total %ld\n", faults, zeros, spans, longest, total);
	return 0;
}
