/* LMDB driver: records in a database. Interface: daxemu.apps.programs.driven. */
#include <lmdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define COUNT 2400
#define CHECK(call) do { int rc = (call); if (rc) { printf("error: %s\n", mdb_strerror(rc)); exit(1); } } while (0)

static MDB_env *env;

static void prepare(void)
{
	MDB_txn *txn;
	MDB_dbi dbi;
	char line[1024];

	CHECK(mdb_txn_begin(env, NULL, 0, &txn));
	CHECK(mdb_dbi_open(txn, NULL, 0, &dbi));
	for (int i = 0; fgets(line, sizeof(line), stdin); i++) {
		char number[8];
		snprintf(number, sizeof(number), "%06d", i);
		MDB_val key = { 6, number }, data = { strcspn(line, "\n"), line };
		CHECK(mdb_put(txn, dbi, &key, &data, 0));
	}
	CHECK(mdb_txn_commit(txn));
}

static void read_all(void)
{
	MDB_txn *txn;
	MDB_dbi dbi;

	CHECK(mdb_txn_begin(env, NULL, MDB_RDONLY, &txn));
	CHECK(mdb_dbi_open(txn, NULL, 0, &dbi));
	for (int i = 0; i < COUNT; i++) {
		char number[8];
		snprintf(number, sizeof(number), "%06d", i);
		MDB_val key = { 6, number }, data;
		int rc = mdb_get(txn, dbi, &key, &data);
		if (rc == MDB_NOTFOUND)
			continue;
		if (rc) {
			printf("error: %s: %s\n", number, mdb_strerror(rc));
			continue;
		}
		printf("%s ", number);
		fwrite(data.mv_data, 1, data.mv_size, stdout);
		putchar('\n');
	}
	mdb_txn_abort(txn);
}

int main(int argc, char **argv)
{
	char line[1024];

	CHECK(mdb_env_create(&env));
	CHECK(mdb_env_set_mapsize(env, 64 << 20));
	CHECK(mdb_env_open(env, argv[2], 0, 0644));
	if (!strcmp(argv[1], "prepare")) {
		prepare();
	} else {
		puts("ready");
		fflush(stdout);
		while (fgets(line, sizeof(line), stdin)) {
			read_all();
			puts("end");
			fflush(stdout);
		}
	}
	mdb_env_close(env);
	return 0;
}
