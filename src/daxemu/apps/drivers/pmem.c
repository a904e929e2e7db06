/* libpmem driver: records in a mapped file. Interface: daxemu.apps.programs.driven. */
#include <libpmem.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT 2400
#define WIDTH 512

int main(int argc, char **argv)
{
	int prepare = !strcmp(argv[1], "prepare"), is_pmem;
	char path[4096], line[1024], *base;
	size_t length;

	snprintf(path, sizeof(path), "%s/records", argv[2]);
	base = pmem_map_file(path, prepare ? COUNT * WIDTH : 0, prepare ? PMEM_FILE_CREATE : 0, 0644, &length,
			     &is_pmem);
	if (!base || length < COUNT * WIDTH) {
		printf("error: %s\n", pmem_errormsg());
		return 1;
	}
	if (prepare) {
		for (int i = 0; i < COUNT && fgets(line, sizeof(line), stdin); i++) {
			size_t bytes = strcspn(line, "\n");
			pmem_memcpy_nodrain(base + i * WIDTH, line, bytes);
		}
		return is_pmem ? pmem_persist(base, length), 0 : pmem_msync(base, length);
	}
	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		for (int i = 0; i < COUNT; i++)
			printf("%06d %.*s\n", i, WIDTH, base + i * WIDTH);
		puts("end");
		fflush(stdout);
	}
	return pmem_unmap(base, length);
}
