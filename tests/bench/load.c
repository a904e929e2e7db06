/*
 * load: one kind of work on one path; prints how long it took, in seconds.
 *
 *   read FILE CHUNK              sequential, to the end, after its pages were dropped
 *   write FILE CHUNK COUNT       sequential, from open to close; truncates nothing
 *   randread FILE CHUNK COUNT    each place once, in an order of its own, after its pages were dropped
 *   randwrite FILE CHUNK COUNT   the same, stores
 *   append FILE CHUNK COUNT      each followed by fsync
 *   stat FILE COUNT
 *   create DIR COUNT             open(O_CREAT) and close; the names are 0, 1, ...
 *   unlink DIR COUNT
 *   list DIR                     all of it; counts too
 *   touch FILE                   the first load of each page of a mapping, after its pages were dropped
 *   mapped FILE                  loads and stores over a mapping that was stored to before; processor time, since these wait
 *                                for nothing, and other programs would count
 *   copy FROM TO                 FICLONE, else copy_file_range, else read and write
 */
#include "work.h"
#include <dirent.h>
#include <errno.h>
#include <linux/fs.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

#define PASSES 8

static void expect(ssize_t done, size_t wanted, const char *what)
{
	if (done < 0)
		fail(what);
	if ((size_t)done != wanted) {
		fprintf(stderr, "%s: %zd of %zu\n", what, done, wanted);
		exit(1);
	}
}

static void drop(int fd)
{
	if (fsync(fd))
		fail("fsync");
	errno = posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
	if (errno)
		fail("fadvise");
}

static char *buffer(size_t size)
{
	char *made = aligned_alloc(PAGE, size);

	if (!made)
		fail("aligned_alloc");
	memset(made, 'x', size);
	return made;
}

/* 0 .. count - 1, each once. */
static long *shuffled(long count)
{
	long *order = malloc(count * sizeof(*order));
	uint64_t state = 88172645463325252ULL;

	if (!order)
		fail("malloc");
	for (long i = 0; i < count; i++)
		order[i] = i;
	for (long i = count - 1; i > 0; i--) {
		state ^= state << 13, state ^= state >> 7, state ^= state << 17;
		long j = state % (i + 1), keep = order[i];
		order[i] = order[j], order[j] = keep;
	}
	return order;
}

static double do_read(const char *path, size_t chunk)
{
	int fd = opened(path, O_RDWR);
	char *buf = buffer(chunk);
	ssize_t got;

	drop(fd);
	double began = now();
	while ((got = read(fd, buf, chunk)) > 0)
		;
	if (got < 0)
		fail("read");
	return now() - began;
}

static double do_write(const char *path, size_t chunk, long count)
{
	char *buf = buffer(chunk);
	double began = now();
	int fd = opened(path, O_WRONLY | O_CREAT);

	for (long i = 0; i < count; i++)
		expect(write(fd, buf, chunk), chunk, "write");
	if (close(fd))
		fail("close");
	return now() - began;
}

static double do_random(const char *path, size_t chunk, long count, int store)
{
	int fd = opened(path, O_RDWR);
	long *order = shuffled(size_of(fd) / chunk);
	char *buf = buffer(chunk);

	if (!store)
		drop(fd);
	double began = now();
	for (long i = 0; i < count; i++) {
		off_t at = order[i] * (off_t)chunk;
		expect(store ? pwrite(fd, buf, chunk, at) : pread(fd, buf, chunk, at), chunk, path);
	}
	if (close(fd))
		fail("close");
	return now() - began;
}

static double do_append(const char *path, size_t chunk, long count)
{
	int fd = opened(path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND);
	char *buf = buffer(chunk);
	double began = now();

	for (long i = 0; i < count; i++) {
		expect(write(fd, buf, chunk), chunk, "write");
		if (fsync(fd))
			fail("fsync");
	}
	return now() - began;
}

static double do_stat(const char *path, long count)
{
	struct stat st;
	double began = now();

	for (long i = 0; i < count; i++)
		if (stat(path, &st))
			fail(path);
	return now() - began;
}

static double do_names(const char *directory, long count, int make)
{
	char name[32];

	if (chdir(directory))
		fail(directory);
	double began = now();
	for (long i = 0; i < count; i++) {
		snprintf(name, sizeof(name), "%ld", i);
		if (make)
			close(opened(name, O_WRONLY | O_CREAT | O_EXCL));
		else if (unlink(name))
			fail(name);
	}
	return now() - began;
}

static double do_list(const char *path)
{
	double began = now();
	DIR *directory = opendir(path);
	long count = 0;

	if (!directory)
		fail(path);
	while (readdir(directory))
		count++;
	closedir(directory);
	double took = now() - began;
	if (count < 3)
		fail("readdir: nothing there");
	return took;
}

static double do_touch(const char *path)
{
	int fd = opened(path, O_RDWR);
	off_t size = size_of(fd);
	long sum = 0;

	drop(fd);
	double began = now();
	volatile char *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		fail("mmap");
	for (off_t at = 0; at < size; at += PAGE)
		sum += map[at];
	double took = now() - began;
	return sum ? took : (fail("the file is empty"), 0);
}

static double processor_time(void)
{
	struct timespec t;

	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return t.tv_sec + t.tv_nsec / 1e9;
}

static double do_mapped(const char *path)
{
	int fd = opened(path, O_RDWR);
	off_t words = size_of(fd) / sizeof(uint64_t);
	volatile uint64_t *map = mmap(NULL, words * 8, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

	if (map == MAP_FAILED)
		fail("mmap");
	for (off_t i = 0; i < words; i += PAGE / 8)
		map[i] = map[i] + 1;
	double began = processor_time();
	for (int pass = 0; pass < PASSES; pass++)
		for (off_t i = 0; i < words; i++)
			map[i] = map[i] + 1;
	return processor_time() - began;
}

static double do_copy(const char *from, const char *to)
{
	double began = now();
	int source = opened(from, O_RDONLY), target = opened(to, O_WRONLY | O_CREAT | O_TRUNC);

	if (ioctl(target, FICLONE, source)) {
		off_t left = size_of(source);
		while (left > 0) {
			ssize_t done = copy_file_range(source, NULL, target, NULL, left, 0);
			if (done <= 0)
				fail("copy_file_range");
			left -= done;
		}
	}
	if (close(target))
		fail("close");
	return now() - began;
}

int main(int argc, char **argv)
{
	const char *verb = argc > 2 ? argv[1] : "", *path = argc > 2 ? argv[2] : "";
	long first = argc > 3 ? atol(argv[3]) : 0, second = argc > 4 ? atol(argv[4]) : 0;
	double took;

	if (!strcmp(verb, "read") && argc == 4)
		took = do_read(path, first);
	else if (!strcmp(verb, "write") && argc == 5)
		took = do_write(path, first, second);
	else if (!strcmp(verb, "randread") && argc == 5)
		took = do_random(path, first, second, 0);
	else if (!strcmp(verb, "randwrite") && argc == 5)
		took = do_random(path, first, second, 1);
	else if (!strcmp(verb, "append") && argc == 5)
		took = do_append(path, first, second);
	else if (!strcmp(verb, "stat") && argc == 4)
		took = do_stat(path, first);
	else if (!strcmp(verb, "create") && argc == 4)
		took = do_names(path, first, 1);
	else if (!strcmp(verb, "unlink") && argc == 4)
		took = do_names(path, first, 0);
	else if (!strcmp(verb, "list") && argc == 3)
		took = do_list(path);
	else if (!strcmp(verb, "touch") && argc == 3)
		took = do_touch(path);
	else if (!strcmp(verb, "mapped") && argc == 3)
		took = do_mapped(path);
	else if (!strcmp(verb, "copy") && argc == 4)
		took = do_copy(path, argv[3]);
	else {
		fprintf(stderr, "load: see the head of load.c\n");
		return 2;
	}
	printf("%.9f\n", took);
	return 0;
}
