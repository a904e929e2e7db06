/*
 * A program that survives poison: the program maps a file, requests early signals (PR_MCE_KILL_EARLY), and at a SIGBUS for a
 * lost page rewrites the page with known data. Ordinary Linux code without any knowledge of daxemu.
 *
 * Usage: recover FILE PAGES      prints one line for each event; ends at the end of input.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define PAGE 4096

static char *map;
static volatile sig_atomic_t lost_page = -1;
static volatile sig_atomic_t lost_code;

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	(void)sig;
	(void)context;
	if (info->si_code != BUS_MCEERR_AO)
		_exit(2); /* the page was consumed before the program could rewrite it */
	lost_code = info->si_code;
	lost_page = ((char *)info->si_addr - map) / PAGE;
}

/* The right contents of page i. A real program would have a log, a replica or a parity block. */
static void fill(char *page, int i)
{
	memset(page, 'a' + i % 26, PAGE);
}

int main(int argc, char **argv)
{
	struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};
	char expected[PAGE], line[16];
	int pages, fd;

	if (argc != 3)
		return 1;
	pages = atoi(argv[2]);
	fd = open(argv[1], O_RDWR | O_CREAT, 0644);
	for (int i = 0; i < pages; i++) {
		fill(expected, i);
		if (pwrite(fd, expected, PAGE, (off_t)i * PAGE) != PAGE)
			return 1;
	}
	map = mmap(NULL, (size_t)pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED || sigaction(SIGBUS, &action, NULL))
		return 1;
	prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0);
	setvbuf(stdout, NULL, _IOLBF, 0);
	for (;;) {
		if (lost_page >= 0) {
			int page = lost_page;

			lost_page = -1;
			fill(expected, page);
			if (pwrite(fd, expected, PAGE, (off_t)page * PAGE) != PAGE)
				return 3;
			printf("got %s page %d: rewrote it\n", lost_code == BUS_MCEERR_AO ? "BUS_MCEERR_AO" : "?", page);
		}
		for (int i = 0; i < pages; i++) {
			fill(expected, i);
			if (memcmp(map + (size_t)i * PAGE, expected, PAGE))
				return 4;
		}
		printf("all %d pages are right\n", pages);
		/* A handler interrupts read(2) with EINTR: then a page must be rewritten. */
		if (lost_page < 0 && read(0, line, sizeof(line)) == 0)
			return 0;
	}
}
