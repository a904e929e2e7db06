/* Calls on direct mappings, and mappings as buffers of calls: direct_memory STEP FILE [OTHER], see direct.h. */
#include "direct.h"
#include <linux/io_uring.h>
#include <signal.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <sys/uio.h>

static void step_parts(const char *path, const char *other unused)
{
	volatile char *map = map_file(path);
	must(munmap((void *)(map + 4 * PAGE), 2 * PAGE) == 0);
	must(map[3 * PAGE] == 'D' && map[6 * PAGE] == 'G');
	pid_t child = fork();
	if (child == 0) {
		(void)map[4 * PAGE];
		_exit(0);
	}
	int status;
	must(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
	must(mprotect((void *)(map + 8 * PAGE), PAGE, PROT_READ) == 0);
	child = fork();
	if (child == 0) {
		map[8 * PAGE] = 'x';
		_exit(0);
	}
	must(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGSEGV);
	map[7 * PAGE] = 'x';
	map[9 * PAGE] = 'x';
	must(mprotect((void *)(map + 8 * PAGE), PAGE, PROT_READ | PROT_WRITE) == 0);
	map[8 * PAGE] = 'y';
	must(at(path, 8 * PAGE) == 'y');
	must(madvise((void *)(map + 8 * PAGE), 2 * PAGE, MADV_DONTNEED) == 0);
	must(map[8 * PAGE] == 'y' && map[9 * PAGE] == 'x');
	must(msync((void *)map, 4 * PAGE, MS_SYNC) == 0);
	must(msync((void *)map, SIZE, MS_SYNC) == -1 && errno == ENOMEM);
	must(msync((void *)(map + 6 * PAGE), 10 * PAGE, MS_ASYNC) == 0);
	must(munmap((void *)map, SIZE) == 0);
}

static void step_mremap(const char *path, const char *other unused)
{
	int fd = open_file(path);
	char *map = mmap(NULL, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	must(map != MAP_FAILED && map[0] == 'A');
	char *grown = mremap(map, 4 * PAGE, 8 * PAGE, MREMAP_MAYMOVE);
	must(grown != MAP_FAILED && grown[7 * PAGE] == 'H');
	must(mremap(grown, 8 * PAGE, 2 * PAGE, 0) == grown && grown[PAGE] == 'B');
	char *elsewhere = mmap(NULL, 16 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *moved = mremap(grown, 2 * PAGE, 2 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, elsewhere);
	if (moved == MAP_FAILED) {
		must(errno == ENOMEM);
		printf("outside of the zone: ENOMEM\n");
		moved = grown;
	}
	moved[PAGE] = 'r';
	must(at(path, PAGE) == 'r');
}

static void step_fixed(const char *path, const char *other unused)
{
	int fd = open_file(path);
	char *place = mmap(NULL, 16 * PAGE, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	char *map = mmap(place, 4 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0);
	if (map == MAP_FAILED) {
		must(errno == ENODEV);
		printf("outside of the zone: ENODEV\n");
	} else {
		map[PAGE] = 'r';
		must(at(path, PAGE) == 'r');
	}
	map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	must(map != MAP_FAILED);
	must(mmap(map + PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 9 * PAGE) == map + PAGE);
	must(map[0] == 'A' && map[PAGE] == 'J' && map[2 * PAGE] == 'C');
	must(mmap(map + 2 * PAGE, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) ==
	     map + 2 * PAGE);
	map[2 * PAGE] = 'z';
	must(at(path, 2 * PAGE) == 'C' && map[3 * PAGE] == 'D');
}

static void step_private(const char *path, const char *other unused)
{
	int fd = open_file(path);
	char *map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE, fd, 0);
	must(map != MAP_FAILED && map[PAGE] == 'B');
	map[PAGE] = 'p';
	must(at(path, PAGE) == 'B');
	pid_t child = fork();
	if (child == 0) {
		must(map[PAGE] == 'p');
		map[PAGE] = 'q';
		map[2 * PAGE] = 'q';
		_exit(0);
	}
	reap(child);
	must(map[PAGE] == 'p' && map[2 * PAGE] == 'C' && at(path, 2 * PAGE) == 'C');
	/* Copies outlive the blocks of the file until madvise(2) or a truncation takes them. */
	map[2 * PAGE] = 'r';
	must(fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, PAGE, 2 * PAGE) == 0);
	must(map[PAGE] == 'p' && map[2 * PAGE] == 'r');
	must(madvise(map + PAGE, PAGE, MADV_DONTNEED) == 0);
	must(map[PAGE] == 0 && map[2 * PAGE] == 'r');
	must(ftruncate(fd, PAGE) == 0 && ftruncate(fd, SIZE) == 0);
	must(map[0] == 'A' && map[2 * PAGE] == 0);
}

static void step_locked(const char *path, const char *other unused)
{
	unsigned char present[16];
	int fd = open_file(path);
	char *map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_LOCKED, fd, 0);
	must(map != MAP_FAILED && map[PAGE] == 'B');
	map[PAGE] = 'l';
	must(at(path, PAGE) == 'l');
	must(munlock(map, SIZE) == 0);
	must(mlock(map, SIZE) == 0);
	must(mincore(map, SIZE, present) == 0);
	must(mlockall(MCL_CURRENT) == 0);
	must(munlockall() == 0);
	map = mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, 0);
	must(map != MAP_FAILED && map[PAGE] == 'l');
	must(munmap(map, SIZE) == 0);
}

/* read(2) and writev(2) with the mapping as buffer, over a hole. argv[3]: a file for O_DIRECT. */
static void step_kernel_mode(const char *path, const char *other)
{
	int ends[2], fd = open_file(path);
	must(ftruncate(fd, 32 * PAGE) == 0);
	char *map = mmap(NULL, 32 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	must(map != MAP_FAILED);
	must(pipe(ends) == 0);
	must(write(ends[1], "pipe", 4) == 4);
	must(read(ends[0], map + 20 * PAGE - 2, 4) == 4);
	must(!memcmp(map + 20 * PAGE - 2, "pipe", 4));
	must(at(path, 20 * PAGE) == 'p');
	must(write(ends[1], map + 20 * PAGE - 2, 4) == 4);
	struct iovec from = {map + 3 * PAGE, 2 * PAGE};
	must(writev(ends[1], &from, 1) == (ssize_t)(2 * PAGE));
	/* From the file into its own mapping, and from its own mapping into the file. */
	must(pread(fd, map + 21 * PAGE, PAGE, 3 * PAGE) == (ssize_t)PAGE && map[21 * PAGE] == 'D');
	must(pwrite(fd, map + 3 * PAGE, PAGE, 22 * PAGE) == (ssize_t)PAGE && map[22 * PAGE] == 'D');
	must(pread(fd, map + 23 * PAGE, PAGE, 23 * PAGE) == (ssize_t)PAGE && map[23 * PAGE] == 0);
	int from_disk = open(other, O_RDONLY | O_DIRECT);
	if (from_disk < 0) {
		must(errno == EINVAL);
		printf("no O_DIRECT there\n");
		return;
	}
	must(pread(from_disk, map + 24 * PAGE, 4 * PAGE, 0) == (ssize_t)(4 * PAGE));
	must(map[24 * PAGE] == 'o' && map[27 * PAGE] == 'o' && at(path, 26 * PAGE) == 'o');
	int direct = open(path, O_RDONLY | O_DIRECT);
	must(pread(direct, map + 28 * PAGE, PAGE, 26 * PAGE) == (ssize_t)PAGE && map[28 * PAGE] == 'o');
}

/* IORING_OP_READ of a file into a hole, once by the thread and once by a worker of the kernel. */
static void step_io_uring(const char *path, const char *other)
{
	struct io_uring_params parameters = {0};
	int ring = syscall(SYS_io_uring_setup, 4, &parameters), fd = open_file(path);
	if (ring < 0) {
		printf("no io_uring: %s\n", strerror(errno));
		return;
	}
	must(ftruncate(fd, 32 * PAGE) == 0);
	char *map = mmap(NULL, 32 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
	must(map != MAP_FAILED);
	char *sq = mmap(NULL, parameters.sq_off.array + 4 * sizeof(unsigned), PROT_READ | PROT_WRITE,
			MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_SQ_RING);
	char *cq = mmap(NULL, parameters.cq_off.cqes + 8 * sizeof(struct io_uring_cqe), PROT_READ | PROT_WRITE,
			MAP_SHARED | MAP_POPULATE, ring, IORING_OFF_CQ_RING);
	struct io_uring_sqe *sqes = mmap(NULL, 4 * sizeof(*sqes), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE,
					 ring, IORING_OFF_SQES);
	must(sq != MAP_FAILED && cq != MAP_FAILED && sqes != MAP_FAILED);
	int source = open(other, O_RDONLY);
	must(source >= 0);
	for (unsigned i = 0; i < 2; i++) {
		memset(&sqes[i], 0, sizeof(*sqes));
		sqes[i].opcode = IORING_OP_READ;
		sqes[i].flags = i ? IOSQE_ASYNC : 0;
		sqes[i].fd = source;
		sqes[i].addr = (uintptr_t)(map + (24 + 4 * i) * PAGE);
		sqes[i].len = 2 * PAGE;
		((unsigned *)(sq + parameters.sq_off.array))[i] = i;
		__atomic_store_n((unsigned *)(sq + parameters.sq_off.tail), i + 1, __ATOMIC_RELEASE);
		must(syscall(SYS_io_uring_enter, ring, 1, 1, IORING_ENTER_GETEVENTS, NULL, 0) == 1);
		struct io_uring_cqe *done = (struct io_uring_cqe *)(cq + parameters.cq_off.cqes) + i;
		errno = -done->res;
		must(done->res == (int)(2 * PAGE));
		must(map[(24 + 4 * i) * PAGE] == 'o' && map[(26 + 4 * i) * PAGE - 1] == 'o');
		must(at(path, (24 + 4 * i) * PAGE) == 'o');
		__atomic_store_n((unsigned *)(cq + parameters.cq_off.head), i + 1, __ATOMIC_RELEASE);
	}
}

static const struct step steps[] = {
	{"parts", step_parts},
	{"mremap", step_mremap},
	{"fixed", step_fixed},
	{"private", step_private},
	{"locked", step_locked},
	{"kernel-mode", step_kernel_mode},
	{"io-uring", step_io_uring},
	{NULL, NULL},
};

int main(int argc, char **argv)
{
	return run_step(steps, argc, argv);
}
