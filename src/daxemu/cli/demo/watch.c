/*
 * Maps a file, touches every page, and prints each SIGBUS. On a line "touch N" the program reads page N.
 * Ordinary Linux code without any knowledge of daxemu.
 *
 * Usage: watch FILE PAGES [early]
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <unistd.h>

#define PAGE 4096

static volatile char *map;
static sigjmp_buf touching;

static const char *name(int code)
{
	return code == BUS_MCEERR_AO ? "BUS_MCEERR_AO" : code == BUS_MCEERR_AR ? "BUS_MCEERR_AR"
					     : code == BUS_ADRERR	       ? "BUS_ADRERR"
									       : "?";
}

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	char line[128];
	int n, lsb = info->si_code == BUS_MCEERR_AO || info->si_code == BUS_MCEERR_AR ? info->si_addr_lsb : 0;

	(void)sig;
	(void)context;
	n = snprintf(line, sizeof(line), "%s addr map+0x%lx lsb %d\n", name(info->si_code),
		     (long)((char *)info->si_addr - (char *)map), lsb);
	if (write(1, line, n) != n)
		_exit(1);
	if (info->si_code != BUS_MCEERR_AO)
		siglongjmp(touching, 1);
}

int main(int argc, char **argv)
{
	struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO | SA_RESTART};
	char line[64];
	int pages, fd;

	if (argc < 3)
		return 1;
	pages = atoi(argv[2]);
	fd = open(argv[1], O_RDWR);
	map = mmap(NULL, (size_t)pages * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED || sigaction(SIGBUS, &action, NULL))
		return 1;
	if (argc > 3)
		prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0);
	for (int i = 0; i < pages; i++)
		(void)map[(size_t)i * PAGE];
	setvbuf(stdout, NULL, _IOLBF, 0);
	printf("ready\n");
	while (fgets(line, sizeof(line), stdin)) {
		int page = atoi(line + strcspn(line, " "));

		if (sigsetjmp(touching, 1))
			continue;
		printf("read '%c'\n", map[(size_t)page * PAGE]);
	}
	return 0;
}
