"""Real programs on the mount, unmodified, each judged by the program's own consistency check."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.mount import DaxMount

pytestmark = pytest.mark.mount


def run(*argv: str | Path, cwd: Path | None = None, stdin: str = "") -> str:
    """Run a program, which must succeed; return the output."""
    if shutil.which(str(argv[0])) is None:
        pytest.skip(f"{argv[0]} is not installed: make setup installs it")
    done = subprocess.run(
        [str(a) for a in argv], cwd=cwd, input=stdin, capture_output=True, text=True, timeout=90, check=False
    )
    assert done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("journal", ["delete", "wal", "truncate"])
@pytest.mark.parametrize("mmap_size", [0, 1 << 30])
def test_sqlite3(dax_mount: DaxMount, journal: str, mmap_size: int) -> None:
    database = dax_mount.path / "db"
    script = f"""
        PRAGMA journal_mode={journal}; PRAGMA mmap_size={mmap_size};
        CREATE TABLE t(i INTEGER PRIMARY KEY, v BLOB);
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<3000)
            INSERT INTO t SELECT i, randomblob(300) FROM n;
        UPDATE t SET v = randomblob(500) WHERE i % 3 = 0;
        DELETE FROM t WHERE i % 7 = 0;
        VACUUM;
    """
    run("sqlite3", "-batch", database, stdin=script)
    dax_mount.umount()
    dax_mount.mount()
    checked = run("sqlite3", "-batch", database, "PRAGMA integrity_check; SELECT count(*) FROM t;")
    assert checked.split() == ["ok", str(3000 - 3000 // 7)]


def test_git(dax_mount: DaxMount) -> None:
    repository, clone = dax_mount.path / "repo", dax_mount.path / "clone"
    git = ("git", "-c", "user.name=t", "-c", "user.email=t@t", "-c", "init.defaultBranch=main")
    run(*git, "init", "-q", repository)
    for number in range(30):
        (repository / f"file{number % 7}").write_text(f"content {number}\n" * number * 50)
        run(*git, "add", "-A", cwd=repository)
        run(*git, "commit", "-q", "--allow-empty", "-m", str(number), cwd=repository)
    run(*git, "gc", "-q", cwd=repository)
    run(*git, "clone", "-q", repository, clone)
    run(*git, "fsck", "--strict", cwd=clone)
    assert run(*git, "status", "--porcelain", cwd=clone) == ""
    assert run(*git, "log", "--oneline", cwd=clone).count("\n") == 30


def test_cp_tar_find_rm(dax_mount: DaxMount) -> None:
    source = Path(__file__).parents[2] / "src"
    copied, unpacked = dax_mount.path / "copied", dax_mount.path / "unpacked"
    run("cp", "-a", source, copied)
    run("diff", "-r", source, copied)
    unpacked.mkdir()
    run("tar", "-cf", dax_mount.path / "a.tar", "-C", copied, ".")
    run("tar", "-xf", dax_mount.path / "a.tar", "-C", unpacked)
    run("diff", "-r", source, unpacked)
    names = [run("find", ".", cwd=where).split() for where in (source, unpacked)]
    assert sorted(names[0]) == sorted(names[1])
    run("rm", "-r", copied, unpacked)
    assert [p.name for p in dax_mount.path.iterdir()] == ["a.tar"]


LMDB = r"""
#include <lmdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define CHECK(call) do { int rc = (call); if (rc) { puts(mdb_strerror(rc)); return 1; } } while (0)
int main(int argc, char **argv)
{
	MDB_env *env; MDB_txn *txn; MDB_dbi dbi; MDB_val key, data; char value[200];
	unsigned flags = argc > 2 ? MDB_WRITEMAP : 0;
	CHECK(mdb_env_create(&env));
	CHECK(mdb_env_set_mapsize(env, 64 << 20));
	CHECK(mdb_env_open(env, argv[1], flags, 0644));
	for (int round = 0; round < 20; round++) {
		CHECK(mdb_txn_begin(env, NULL, 0, &txn));
		CHECK(mdb_dbi_open(txn, NULL, 0, &dbi));
		for (int i = 0; i < 500; i++) {
			int number = i * 7919 % 5003;
			memset(value, 'a' + round, sizeof(value));
			key.mv_size = sizeof(number); key.mv_data = &number;
			data.mv_size = sizeof(value); data.mv_data = value;
			CHECK(mdb_put(txn, dbi, &key, &data, 0));
		}
		CHECK(mdb_txn_commit(txn));
	}
	CHECK(mdb_txn_begin(env, NULL, MDB_RDONLY, &txn));
	for (int i = 0; i < 500; i++) {
		int number = i * 7919 % 5003;
		key.mv_size = sizeof(number); key.mv_data = &number;
		CHECK(mdb_get(txn, dbi, &key, &data));
		if (data.mv_size != 200 || ((char *)data.mv_data)[99] != 'a' + 19) return 2;
	}
	mdb_txn_abort(txn);
	mdb_env_close(env);
	puts("ok");
	return 0;
}
"""


@pytest.mark.parametrize("writemap", [False, True])
def test_lmdb(dax_mount: DaxMount, tmp_path: Path, writemap: bool) -> None:
    program = tmp_path / "lmdb"
    run("gcc", "-o", program, "-x", "c", "-", "-x", "none", "-llmdb", stdin=LMDB)
    environment = dax_mount.path / "env"
    environment.mkdir()
    assert run(program, environment, *(["writemap"] if writemap else [])) == "ok\n"
    dax_mount.umount()
    dax_mount.mount()
    assert "Entries: 500" in run("mdb_stat", environment)


@pytest.mark.parametrize("engine", ["psync", "mmap", "libaio"])
def test_fio_verifies(dax_mount: DaxMount, engine: str) -> None:
    run(
        "fio",
        "--name=verify",
        f"--directory={dax_mount.path}",
        f"--ioengine={engine}",
        "--rw=randrw",
        "--bs=4k-64k",
        "--size=24m",
        "--verify=crc32c",
        "--fsync=64",
        "--do_verify=1",
        "--output=/dev/null",
        cwd=dax_mount.path,  # fio writes its state file to the working directory
    )


UNLINKED = """
import mmap, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 1 << 40)
os.unlink(sys.argv[1])
os.pwrite(fd, b"end", (1 << 40) - 3)
view = mmap.mmap(fd, 1 << 20, offset=1 << 30)
view[5:10] = b"hello"
assert os.pread(fd, 10, (1 << 30) + 3) == bytes(2) + b"hello" + bytes(3)
assert os.pread(fd, 10, (1 << 40) - 3) == b"end"
assert os.fstat(fd).st_blocks <= 16, os.fstat(fd)
assert os.fstat(fd).st_nlink == 0
"""


def test_sparse_and_unlinked_but_open(dax_mount: DaxMount) -> None:
    before = shutil.disk_usage(dax_mount.path).free
    run(sys.executable, "-c", UNLINKED, dax_mount.path / "f")
    run("sync", "-f", dax_mount.path)
    dax_mount.umount()
    dax_mount.mount()
    assert shutil.disk_usage(dax_mount.path).free == before
