/*
 * direct: one kind of work on shared mappings of files; prints one figure, in seconds.
 *
 *   persist FILE COUNT    store a byte and make it durable, by cache line if FILE takes MAP_SYNC, else by msync;
 *                         a page each time, one call
 *   touch FILE            mmap FILE and load each page; not the first mapping of the process
 *   first FILE            the first mmap of a process
 *   map FILE COUNT        mmap and munmap, one pair
 *   fork FILE COUNT       fork, exit and wait, while FILE is mapped and touched; one fork
 *   cow FILE COPY         clone FILE, then the first store to each page of a mapping, one store
 *   cowsync FILE COPY     the same; each store is followed by msync
 *   hole FILE MIB         make FILE a hole of so many MiB, then the first store to each page of a mapping, one store
 *   clone FILE COPY       clone FILE, all pages of which are mapped and stored to
 *   pmd FILE              mmap FILE and load each page; prints kB of PMD mappings of all kB, by smaps
 */
#include "work.h"
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>

#ifndef MAP_SYNC
#define MAP_SYNC 0x80000
#endif

static int is_sync;

static volatile char *mapped(int fd, off_t size)
{
	void *map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED_VALIDATE | MAP_SYNC, fd, 0);

	is_sync = map != MAP_FAILED;
	if (!is_sync)
		map = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	if (map == MAP_FAILED)
		fail("mmap");
	return map;
}

static void store_all(volatile char *map, off_t size)
{
	for (off_t at = 0; at < size; at += PAGE)
		map[at] = 'x';
}

static long load_all(volatile char *map, off_t size)
{
	long sum = 0;

	for (off_t at = 0; at < size; at += PAGE)
		sum += map[at];
	return sum;
}

static void sync_page(volatile char *page)
{
	if (msync((void *)page, PAGE, MS_SYNC))
		fail("msync");
}

/* FUSE has no FICLONE: daxemu clones whole blocks in copy_file_range(2). */
static void clone_all(int from, int to, off_t size)
{
	off_t at = 0, there = 0;

	while (at < size)
		if (copy_file_range(from, &at, to, &there, size - at, 0) <= 0)
			fail("copy_file_range");
}

static double do_persist(const char *path, long count)
{
	int fd = opened(path, O_RDWR);
	off_t size = size_of(fd);
	volatile char *map = mapped(fd, size);

	store_all(map, size);
	double began = now();
	for (long i = 0; i < count; i++) {
		volatile char *at = map + i * PAGE % size;
		*at = (char)i;
		if (is_sync) {
			__builtin_ia32_clflush((const void *)at);
			__builtin_ia32_sfence();
		} else
			sync_page(at);
	}
	return (now() - began) / count;
}

static double do_map(const char *path, long count)
{
	int fd = opened(path, O_RDWR);
	off_t size = size_of(fd);

	mapped(fd, size);
	double began = now();
	for (long i = 0; i < count; i++) {
		void *map = mmap(NULL, size, PROT_READ, MAP_SHARED, fd, 0);
		if (map == MAP_FAILED || munmap(map, size))
			fail("mmap");
	}
	return (now() - began) / count;
}

static double do_fork(const char *path, long count)
{
	int fd = opened(path, O_RDWR), status;
	off_t size = size_of(fd);

	store_all(mapped(fd, size), size);
	double began = now();
	for (long i = 0; i < count; i++) {
		pid_t pid = fork();
		if (!pid)
			_exit(7);
		if (pid < 0 || waitpid(pid, &status, 0) != pid || WEXITSTATUS(status) != 7)
			fail("fork");
	}
	return (now() - began) / count;
}

static double do_cow(const char *path, const char *copy, int sync)
{
	int fd = opened(path, O_RDWR), target = opened(copy, O_RDWR | O_CREAT | O_TRUNC);
	off_t size = size_of(fd);
	volatile char *map = mapped(fd, size);

	store_all(map, size);
	clone_all(fd, target, size);
	double began = now();
	for (off_t at = 0; at < size; at += PAGE) {
		map[at] = 'y';
		if (sync)
			sync_page(map + at);
	}
	return (now() - began) / (size / PAGE);
}

static double do_hole(const char *path, long mib)
{
	int fd = opened(path, O_RDWR | O_CREAT | O_TRUNC);
	off_t size = mib << 20;

	if (ftruncate(fd, size))
		fail("ftruncate");
	volatile char *map = mapped(fd, size);
	double began = now();
	store_all(map, size);
	return (now() - began) / (size / PAGE);
}

static double do_clone(const char *path, const char *copy)
{
	int fd = opened(path, O_RDWR), target = opened(copy, O_RDWR | O_CREAT | O_TRUNC);
	off_t size = size_of(fd);
	volatile char *map = mapped(fd, size);

	store_all(map, size);
	if (!is_sync && msync((void *)map, size, MS_SYNC))
		fail("msync");
	double began = now();
	clone_all(fd, target, size);
	return now() - began;
}

static double do_touch(const char *path)
{
	int fd = opened(path, O_RDWR);
	off_t size = size_of(fd);

	mapped(fd, PAGE);
	double began = now();
	long sum = load_all(mapped(fd, size), size);
	double took = now() - began;
	if (!sum)
		fail("the file is empty");
	return took;
}

static double do_first(const char *path)
{
	int fd = opened(path, O_RDWR);
	double began = now();

	mapped(fd, PAGE);
	return now() - began;
}

static void do_pmd(const char *path)
{
	int fd = opened(path, O_RDWR);
	off_t size = size_of(fd);
	volatile char *map = mapped(fd, size);
	unsigned long start, end, kb, pmd = 0, inside = 0;
	char line[4096];
	FILE *smaps = fopen("/proc/self/smaps", "r");

	if (!load_all(map, size) || !smaps)
		fail("smaps");
	while (fgets(line, sizeof(line), smaps)) {
		if (sscanf(line, "%lx-%lx %*4c", &start, &end) == 2)
			inside = start >= (unsigned long)map && end <= (unsigned long)map + size;
		else if (inside && (sscanf(line, "ShmemPmdMapped: %lu", &kb) == 1 ||
				    sscanf(line, "FilePmdMapped: %lu", &kb) == 1))
			pmd += kb;
	}
	printf("%lu %lu\n", pmd, (unsigned long)size / 1024);
}

int main(int argc, char **argv)
{
	const char *verb = argc > 2 ? argv[1] : "", *path = argc > 2 ? argv[2] : "";
	const char *last = argc > 3 ? argv[3] : "";
	double took;

	if (!strcmp(verb, "persist") && argc == 4)
		took = do_persist(path, atol(last));
	else if (!strcmp(verb, "touch") && argc == 3)
		took = do_touch(path);
	else if (!strcmp(verb, "first") && argc == 3)
		took = do_first(path);
	else if (!strcmp(verb, "map") && argc == 4)
		took = do_map(path, atol(last));
	else if (!strcmp(verb, "fork") && argc == 4)
		took = do_fork(path, atol(last));
	else if (!strcmp(verb, "cow") && argc == 4)
		took = do_cow(path, last, 0);
	else if (!strcmp(verb, "cowsync") && argc == 4)
		took = do_cow(path, last, 1);
	else if (!strcmp(verb, "hole") && argc == 4)
		took = do_hole(path, atol(last));
	else if (!strcmp(verb, "clone") && argc == 4)
		took = do_clone(path, last);
	else if (!strcmp(verb, "pmd") && argc == 3) {
		do_pmd(path);
		return 0;
	} else {
		fprintf(stderr, "direct: see the head of direct.c\n");
		return 2;
	}
	printf("%.9f\n", took);
	return 0;
}
