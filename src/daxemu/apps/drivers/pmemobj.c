/* libpmemobj driver: records in the root object of a pool. Interface: daxemu.apps.programs.driven. */
#include <libpmemobj.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT 2400
#define WIDTH 512

struct root {
	char record[COUNT][WIDTH];
};

int main(int argc, char **argv)
{
	int prepare = !strcmp(argv[1], "prepare");
	char path[4096], line[1024];
	PMEMobjpool *pool;
	struct root *root;

	snprintf(path, sizeof(path), "%s/pool", argv[2]);
	pool = prepare ? pmemobj_create(path, "records", 16 << 20, 0644) : pmemobj_open(path, "records");
	if (!pool) {
		printf("error: %s\n", pmemobj_errormsg());
		return 1;
	}
	PMEMoid oid = pmemobj_root(pool, sizeof(struct root));
	if (OID_IS_NULL(oid)) {
		printf("error: %s\n", pmemobj_errormsg());
		return 1;
	}
	root = pmemobj_direct(oid);
	if (prepare) {
		TX_BEGIN(pool) {
			pmemobj_tx_add_range(oid, 0, sizeof(struct root));
			for (int i = 0; i < COUNT && fgets(line, sizeof(line), stdin); i++) {
				line[strcspn(line, "\n")] = 0;
				memcpy(root->record[i], line, strlen(line) + 1);
			}
		} TX_ONABORT {
			printf("error: %s\n", pmemobj_errormsg());
			exit(1);
		} TX_END
	} else {
		puts("ready");
		fflush(stdout);
		while (fgets(line, sizeof(line), stdin)) {
			for (int i = 0; i < COUNT; i++)
				printf("%06d %.*s\n", i, WIDTH, root->record[i]);
			puts("end");
			fflush(stdout);
		}
	}
	pmemobj_close(pool);
	return 0;
}
