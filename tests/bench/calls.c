/*
 * calls: system calls in a row; prints the median time of one, in seconds. A mean would count other programs, which run while
 * a caller waits for its answer.
 *
 *   getppid COUNT                in batches of 100
 *   anonymous COUNT              mmap of anonymous memory; the munmap is not timed
 *   madvise COUNT                MADV_NORMAL, in batches of 100
 *   file COUNT FILE              mmap of a file; the munmap is not timed
 *   fork COUNT                   fork, exit and wait
 *   exec COUNT                   posix_spawn of /bin/true, and wait
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <spawn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define BATCH 100

static double now(void)
{
	struct timespec at;
	clock_gettime(CLOCK_MONOTONIC, &at);
	return at.tv_sec + at.tv_nsec / 1e9;
}

static int compared(const void *one, const void *other)
{
	double a = *(const double *)one, b = *(const double *)other;
	return (a > b) - (a < b);
}

int main(int argc, char **argv)
{
	const char *kind = argv[1];
	int count = atoi(argv[2]), fd = argc > 3 ? open(argv[3], O_RDONLY) : -1;
	int is_file = !strcmp(kind, "file");
	char *arguments[] = { "true", NULL }, *environment[] = { NULL };
	double *spent = calloc(count, sizeof *spent);
	void *page = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	if ((is_file && fd < 0) || page == MAP_FAILED || !spent)
		return 1;
	for (int i = 0; i < count; i++) {
		double began = now();
		if (!strcmp(kind, "getppid")) {
			for (int n = 0; n < BATCH; n++)
				syscall(SYS_getppid);
		} else if (!strcmp(kind, "madvise")) {
			for (int n = 0; n < BATCH; n++)
				madvise(page, 4096, MADV_NORMAL);
		} else if (!strcmp(kind, "fork")) {
			if (!fork())
				_exit(0);
			wait(NULL);
		} else if (!strcmp(kind, "exec")) {
			pid_t pid;
			posix_spawn(&pid, "/bin/true", NULL, NULL, arguments, environment);
			wait(NULL);
		} else {
			void *at = mmap(NULL, 4096, PROT_READ, MAP_PRIVATE | (is_file ? 0 : MAP_ANONYMOUS), fd, 0);
			double mapped = now();
			if (at == MAP_FAILED || munmap(at, 4096))
				return 1;
			spent[i] = mapped - began;
			continue;
		}
		spent[i] = now() - began;
	}
	qsort(spent, count, sizeof *spent, compared);
	int is_batch = !strcmp(kind, "getppid") || !strcmp(kind, "madvise");
	printf("%.12f\n", spent[count / 2] / (is_batch ? BATCH : 1));
	return 0;
}
