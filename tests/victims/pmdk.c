/* PMDK on a direct mount: pmdk STEP PATH [MARK]. Prints "ok", or what did not hold. The programs of the vendor's
   libraries are not changed. tests/mount/direct/test_programs.py */
#include <errno.h>
#include <fcntl.h>
#include <libpmem.h>
#include <libpmem2.h>
#include <libpmemobj.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define must(condition)                                                                                               \
	do {                                                                                                          \
		if (!(condition)) {                                                                                   \
			printf("line %d: %s: %s\n", __LINE__, #condition, strerror(errno));                           \
			fflush(stdout);                                                                               \
			exit(1);                                                                                     \
		}                                                                                                     \
	} while (0)

struct root {
	unsigned long count[2];
};

static void step_pmem(const char *path)
{
	size_t length;
	int is_pmem = -1;
	char byte, *base = pmem_map_file(path, 1 << 20, PMEM_FILE_CREATE, 0644, &length, &is_pmem);
	must(base && length == 1 << 20);
	printf("is_pmem %d %d\n", is_pmem, pmem_is_pmem(base, length));
	pmem_memcpy_persist(base + 5000, "stored", 6);
	int fd = open(path, O_RDONLY);
	must(pread(fd, &byte, 1, 5003) == 1 && byte == 'r');
	must(pmem_unmap(base, length) == 0);
}

/* `reserved`: bytes that the program reserves for the mapping; 0: the library reserves. */
static void step_pmem2(const char *path, size_t reserved)
{
	struct pmem2_vm_reservation *reservation = NULL;
	struct pmem2_config *config;
	struct pmem2_source *source;
	struct pmem2_map *map;
	int fd = open(path, O_RDWR | O_CREAT, 0644);
	must(fd >= 0 && ftruncate(fd, 1 << 20) == 0);
	must(pmem2_config_new(&config) == 0 && pmem2_source_from_fd(&source, fd) == 0);
	must(pmem2_config_set_required_store_granularity(config, PMEM2_GRANULARITY_PAGE) == 0);
	if (reserved) {
		must(pmem2_vm_reservation_new(&reservation, NULL, reserved) == 0);
		must(pmem2_config_set_vm_reservation(config, reservation, reserved / 2) == 0);
	}
	if (pmem2_map_new(&map, config, source)) {
		printf("pmem2_map_new: %s\n", pmem2_errormsg());
		exit(1);
	}
	static const char *const names[] = {"byte", "cache line", "page"};
	printf("granularity %s\n", names[pmem2_map_get_store_granularity(map)]);
	char *base = pmem2_map_get_address(map);
	memcpy(base + 100, "stored", 6);
	pmem2_get_persist_fn(map)(base + 100, 6);
	must(pmem2_map_delete(&map) == 0);
	if (reserved) { /* the place is reserved again, and can be mapped again */
		must(pmem2_map_new(&map, config, source) == 0 && pmem2_map_get_address(map) == base);
		must(!memcmp(base + 100, "stored", 6) && pmem2_map_delete(&map) == 0);
		must(pmem2_vm_reservation_delete(&reservation) == 0);
	}
}

/* Transactions that keep both counts equal, until killed. */
static void step_count(const char *path)
{
	PMEMobjpool *pool = pmemobj_create(path, "counts", PMEMOBJ_MIN_POOL, 0644);
	if (!pool) {
		printf("pmemobj_create: %s\n", pmemobj_errormsg());
		exit(1);
	}
	struct root *root = pmemobj_direct(pmemobj_root(pool, sizeof(struct root)));
	for (unsigned long i = 1;; i++) {
		TX_BEGIN(pool)
		{
			pmemobj_tx_add_range_direct(root, sizeof(*root));
			root->count[0] = i;
			root->count[1] = i;
		}
		TX_ONABORT
		{
			printf("aborted: %s\n", pmemobj_errormsg());
			exit(1);
		}
		TX_END
		if (i == 100) {
			puts("ready");
			fflush(stdout);
		}
	}
}

static void step_check(const char *path)
{
	int checked = pmemobj_check(path, "counts");
	if (checked != 1) {
		printf("pmemobj_check: %d: %s\n", checked, pmemobj_errormsg());
		exit(1);
	}
	PMEMobjpool *pool = pmemobj_open(path, "counts");
	must(pool);
	struct root *root = pmemobj_direct(pmemobj_root(pool, sizeof(struct root)));
	must(root->count[0] == root->count[1] && root->count[0] >= 100);
	pmemobj_close(pool);
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	if (!strcmp(argv[1], "pmem"))
		step_pmem(argv[2]);
	else if (!strcmp(argv[1], "pmem2"))
		step_pmem2(argv[2], 0);
	else if (!strcmp(argv[1], "pmem2-reservation"))
		step_pmem2(argv[2], 1 << 30);
	else if (!strcmp(argv[1], "count"))
		step_count(argv[2]);
	else if (!strcmp(argv[1], "check"))
		step_check(argv[2]);
	else
		return 2;
	puts("ok");
	return 0;
}
