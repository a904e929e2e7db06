"""Databases in the midst of transactions when the supervisor is killed, or the power fails: each opens by its
own recovery, passes the consistency check, and has every acknowledged commit.
"""

from __future__ import annotations

import random
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.mount import PATIENCE
from tests.support.quick import QuickMount

pytestmark = [pytest.mark.mount, pytest.mark.parametrize("how", ["kill", "powerfail"])]

ROUNDS = 5

SQLITE_WRITER = """
import os, sqlite3, sys
path, journal, mmap_size = sys.argv[1:]
db = sqlite3.connect(path, isolation_level=None, timeout=10)
db.execute(f"PRAGMA journal_mode={journal}")
db.execute("PRAGMA synchronous=EXTRA")  # FULL does not sync the unlink of the journal: so on any filesystem
db.execute(f"PRAGMA mmap_size={mmap_size}")
db.execute("CREATE TABLE IF NOT EXISTS t(i INTEGER PRIMARY KEY, v BLOB, twice INTEGER)")
i = db.execute("SELECT coalesce(max(i), 0) FROM t").fetchone()[0]
alive = os.open(path, os.O_RDONLY)
print("ready", flush=True)
while True:
    i += 1
    db.execute("BEGIN")
    db.execute("INSERT INTO t VALUES(?, randomblob(?), ?)", (i, i * 37 % 9000, 2 * i))
    db.execute("UPDATE t SET v = randomblob(700) WHERE i % 5 = ?", (i % 5,))
    db.execute("COMMIT")
    os.fstatvfs(alive)  # to SQLite a directory that it cannot open is synced: unixDelete(), os_unix.c
    print(i, flush=True)
"""

LMDB = r"""
#include <lmdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define CHECK(call) do { int rc = (call); if (rc) { fputs(mdb_strerror(rc), stderr); return 1; } } while (0)
#define LEN(i) (100 + (i) * 37 % 3000)

/* lmdb write DIR FLAGS: transactions of one record each for ever; lmdb check DIR FLAGS: how many there are */
int main(int argc, char **argv)
{
	MDB_env *env; MDB_txn *txn; MDB_dbi dbi; MDB_val key, data; MDB_cursor *cursor;
	unsigned flags = strcmp(argv[3], "writemap") ? 0 : MDB_WRITEMAP;
	static char value[4096];
	int n = 0, rc;

	(void)argc;
	CHECK(mdb_env_create(&env));
	CHECK(mdb_env_set_mapsize(env, 64 << 20));
	CHECK(mdb_env_open(env, argv[2], flags, 0644));
	CHECK(mdb_txn_begin(env, NULL, 0, &txn));
	CHECK(mdb_dbi_open(txn, NULL, MDB_INTEGERKEY, &dbi));
	CHECK(mdb_cursor_open(txn, dbi, &cursor));
	while (!(rc = mdb_cursor_get(cursor, &key, &data, MDB_NEXT))) {
		if (*(int *)key.mv_data != n || data.mv_size != (size_t)LEN(n)) return 2;
		for (size_t j = 0; j < data.mv_size; j++)
			if (((char *)data.mv_data)[j] != 'a' + n % 26) return 3;
		n++;
	}
	if (rc != MDB_NOTFOUND) return 4;
	mdb_cursor_close(cursor);
	CHECK(mdb_txn_commit(txn));
	if (!strcmp(argv[1], "check")) {
		printf("%d\n", n);
		mdb_env_close(env);
		return 0;
	}
	puts("ready");
	fflush(stdout);
	for (;; n++) {
		CHECK(mdb_txn_begin(env, NULL, 0, &txn));
		memset(value, 'a' + n % 26, LEN(n));
		key.mv_size = sizeof(n); key.mv_data = &n;
		data.mv_size = LEN(n); data.mv_data = value;
		CHECK(mdb_put(txn, dbi, &key, &data, 0));
		CHECK(mdb_txn_commit(txn));
		printf("%d\n", n + 1);
		fflush(stdout);
	}
}
"""


def crash_in_the_midst(mount: QuickMount, how: str, writer: list[str | Path], commits: int) -> int:
    """Crash after a number of acknowledged commits; return the last acknowledged commit at the moment of the
    crash.
    """
    process = subprocess.Popen([str(a) for a in writer], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        last = 0
        for _ in range(commits):
            last = int(process.stdout.readline())
        mount.crash(how)
        process.kill()
        rest = process.stdout.read().split()
        return int(rest[-1]) if rest else last
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("journal", ["delete", "truncate", "persist", "wal"])
@pytest.mark.parametrize("mmap_size", [0, 1 << 28])
def test_sqlite(quick_mount: QuickMount, how: str, journal: str, mmap_size: int) -> None:
    database = quick_mount.path / "db"
    rng = random.Random(f"{journal}{mmap_size}{how}")
    writer: list[str | Path] = [sys.executable, "-c", SQLITE_WRITER, database, journal, str(mmap_size)]
    for _ in range(ROUNDS):
        acknowledged = crash_in_the_midst(quick_mount, how, writer, rng.randrange(1, 25))
        with closing(sqlite3.connect(database)) as db:
            assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            count, last, twice = db.execute("SELECT count(*), max(i), sum(twice) FROM t").fetchone()
        assert count == last >= acknowledged
        assert twice == last * (last + 1)


@pytest.mark.parametrize("mode", ["plain", "writemap"])
def test_lmdb(quick_mount: QuickMount, tmp_path: Path, how: str, mode: str) -> None:
    program, source = tmp_path / "lmdb", tmp_path / "lmdb.c"
    if shutil.which("mdb_stat") is None:
        pytest.skip("lmdb is not installed: make setup installs it")
    source.write_text(LMDB)
    subprocess.run(["gcc", "-o", program, source, "-llmdb"], check=True, timeout=PATIENCE)
    environment = quick_mount.path / "env"
    environment.mkdir()
    rng = random.Random(f"{mode}{how}")
    writer: list[str | Path] = [program, "write", environment, mode]
    for _ in range(ROUNDS):
        acknowledged = crash_in_the_midst(quick_mount, how, writer, rng.randrange(1, 60))
        done = subprocess.run(
            [program, "check", environment, mode], capture_output=True, text=True, timeout=PATIENCE
        )
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) >= acknowledged
    stat = subprocess.run(["mdb_stat", environment], capture_output=True, text=True, timeout=PATIENCE)
    assert f"Entries: {int(done.stdout)}" in stat.stdout
