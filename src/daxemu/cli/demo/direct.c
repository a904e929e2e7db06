/*
 * Maps two files with MAP_SYNC, and obeys orders, one a line. Ordinary Linux code without any knowledge of daxemu.
 *
 * frames: does the first page of both files have one page frame?   store: store 'S' into the first file
 * clone: read the first byte of the second file                    load: read byte 0x1123 of the first file
 *
 * Usage: direct FILE FILE
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define PAGE 4096
#define SIZE (4 * PAGE)

static volatile char *first, *second;
static sigjmp_buf loading;

static void on_sigbus(int sig, siginfo_t *info, void *context)
{
	char line[128];
	int ar = info->si_code == BUS_MCEERR_AR;
	int n = snprintf(line, sizeof(line), "%s addr map+0x%lx lsb %d\n",
			 ar ? "BUS_MCEERR_AR" : info->si_code == BUS_ADRERR ? "BUS_ADRERR" : "?",
			 (long)((char *)info->si_addr - (char *)first), ar ? info->si_addr_lsb : 0);

	(void)sig;
	(void)context;
	if (write(1, line, n) != n)
		_exit(1);
	siglongjmp(loading, 1);
}

static volatile char *mapped(const char *path)
{
	int fd = open(path, O_RDWR);
	void *map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED_VALIDATE | MAP_SYNC, fd, 0);

	if (map == MAP_FAILED) {
		perror(path);
		_exit(1);
	}
	return map;
}

static uint64_t frame(int pagemap, volatile char *page)
{
	uint64_t entry = 0;

	(void)*page;
	if (pread(pagemap, &entry, sizeof(entry), (uintptr_t)page / PAGE * sizeof(entry)) != sizeof(entry))
		perror("pagemap");
	return entry & ((1ULL << 55) - 1);
}

int main(int argc, char **argv)
{
	struct sigaction action = {.sa_sigaction = on_sigbus, .sa_flags = SA_SIGINFO};
	int pagemap = open("/proc/self/pagemap", O_RDONLY);
	char order[16];

	if (argc < 3 || sigaction(SIGBUS, &action, NULL))
		return 1;
	setvbuf(stdout, NULL, _IOLBF, 0);
	first = mapped(argv[1]);
	second = mapped(argv[2]);
	printf("mapped with MAP_SYNC\n");
	while (fgets(order, sizeof(order), stdin)) {
		if (sigsetjmp(loading, 1))
			continue;
		if (!strcmp(order, "frames\n")) {
			uint64_t one = frame(pagemap, first), other = frame(pagemap, second);

			printf("%s\n", !one || !other ? "unknown page frames"
					: one == other ? "one page frame" : "two page frames");
		} else if (!strcmp(order, "store\n")) {
			first[0] = 'S';
			printf("stored\n");
		} else if (!strcmp(order, "clone\n")) {
			printf("'%c'\n", second[0]);
		} else if (!strcmp(order, "load\n")) {
			printf("'%c'\n", first[PAGE + 0x123]);
		}
	}
	return 0;
}
