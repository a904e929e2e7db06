/* RocksDB driver: records in a database. Interface: daxemu.apps.programs.driven. */
#include <rocksdb/c.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#define COUNT 2400
#define BASE 2000

static rocksdb_t *db;
static char text[COUNT][1024];

static void check(char *error)
{
	if (!error)
		return;
	printf("error: %s\n", error);
	exit(1);
}

static void put(int from, int until)
{
	rocksdb_writeoptions_t *options = rocksdb_writeoptions_create();
	char *error = NULL;

	for (int i = from; i < until; i++) {
		char number[8];
		snprintf(number, sizeof(number), "%06d", i);
		rocksdb_put(db, options, number, 6, text[i], strlen(text[i]), &error);
		check(error);
	}
}

static void prepare(void)
{
	char *error = NULL;

	for (int i = 0; i < COUNT && fgets(text[i], sizeof(text[i]), stdin); i++)
		text[i][strcspn(text[i], "\n")] = 0;
	put(0, BASE);
	rocksdb_flush(db, rocksdb_flushoptions_create(), &error);
	check(error);
	put(BASE, COUNT);
	_exit(0);
}

static void read_all(void)
{
	rocksdb_readoptions_t *options = rocksdb_readoptions_create();

	for (int i = 0; i < COUNT; i++) {
		char number[8], *error = NULL, *value;
		size_t length;
		snprintf(number, sizeof(number), "%06d", i);
		value = rocksdb_get(db, options, number, 6, &length, &error);
		if (error) {
			printf("error: %s: %s\n", number, error);
		} else if (value) {
			printf("%s ", number);
			fwrite(value, 1, length, stdout);
			putchar('\n');
			if (length < sizeof(text[i]))
				memcpy(text[i], value, length), text[i][length] = 0;
		}
		free(error);
		free(value);
	}
}

int main(int argc, char **argv)
{
	rocksdb_options_t *options = rocksdb_options_create();
	rocksdb_block_based_table_options_t *table = rocksdb_block_based_options_create();
	char *error = NULL, line[64];

	rocksdb_options_set_create_if_missing(options, 1);
	rocksdb_options_set_compression(options, rocksdb_no_compression);
	rocksdb_options_set_allow_mmap_reads(options, !strcmp(argv[3], "mmap"));
	rocksdb_options_set_db_log_dir(options, ".");
	rocksdb_block_based_options_set_no_block_cache(table, 1);
	rocksdb_options_set_block_based_table_factory(options, table);
	db = rocksdb_open(options, argv[2], &error);
	check(error);
	if (!strcmp(argv[1], "prepare"))
		prepare();
	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		if (!strcmp(line, "write\n")) {
			put(BASE, COUNT); /* write the records of the last read again */
			puts("written");
		} else {
			read_all();
			puts("end");
		}
		fflush(stdout);
	}
	rocksdb_close(db);
	return 0;
}
