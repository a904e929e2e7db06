/* Steps of programs on a direct mount: PROGRAM STEP FILE [OTHER]. FILE has at least 16 pages of letters A to P. A
   program prints "ok", or the line and the expression that did not hold, with errno. The steps of direct.c are about
   processes, those of direct_memory.c about memory. tests/mount/direct/test_processes.py */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include "must.h"

#define unused __attribute__((unused))
#define SIZE (16 * PAGE)

struct step {
	const char *name;
	void (*run)(const char *path, const char *other);
};

static const char *self;

static volatile char *map_file(const char *path)
{
	int fd = open_file(path);
	volatile char *map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED_VALIDATE | MAP_SYNC, fd, 0);
	must(map != MAP_FAILED);
	must(map[0] == 'A');
	close(fd);
	return map;
}

static char at(const char *path, off_t offset)
{
	char byte = 0;
	int fd = open_file(path);
	must(pread(fd, &byte, 1, offset) == 1);
	close(fd);
	return byte;
}

/* Wait for a child, which must exit with 0, and after which no child is left. */
static void reap(pid_t child)
{
	int status = -1;
	must(child > 0);
	must(waitpid(child, &status, 0) == child);
	must(status == 0);
	must(waitpid(-1, NULL, __WALL) == -1 && errno == ECHILD);
}

/* Run the step that the arguments name, in at most 20 s. Return the exit status. */
static int run_step(const struct step *steps, int argc, char **argv)
{
	alarm(20);
	self = argv[0];
	for (; argc >= 3 && steps->name; steps++)
		if (!strcmp(steps->name, argv[1])) {
			steps->run(argv[2], argv[3]);
			puts("ok");
			return 0;
		}
	fprintf(stderr, "usage: %s STEP FILE [OTHER]\n", argv[0]);
	return 2;
}
