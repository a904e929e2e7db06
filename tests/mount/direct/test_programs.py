"""Real programs with direct mappings, unmodified, each judged by the program's own consistency check."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mount.test_programs import LMDB
from tests.support.actor import VICTIMS, compile_victim
from tests.support.mount import DAXEMU, DaxMount

pytestmark = [pytest.mark.mount, pytest.mark.timeout(180)]

LIMIT = 90
"""Time limit of a program in seconds. A hang fails the test."""


def argv(mount: DaxMount, *command: str | Path) -> list[str]:
    return [*DAXEMU, "run", str(mount.path), "--", *map(str, command)]


def under_run(mount: DaxMount, *command: str | Path, stdin: str = "") -> str:
    """Run a program below ``daxemu run``; return the output. The exit status must be 0."""
    needs(str(command[0]))
    done = subprocess.run(argv(mount, *command), input=stdin, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, f"{command}: exit {done.returncode}\n{done.stdout}{done.stderr}"
    assert not mount.events("UnexpectedError")
    return done.stdout


def needs(*programs: str) -> None:
    """Skip the test if a program is missing."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


def remount(mount: DaxMount) -> None:
    mount.umount()
    mount.mount("--direct")


def compiled(scratch: Path, source: str, *libraries: str) -> Path:
    program = scratch / hashlib.sha256(source.encode()).hexdigest()[:8]
    words = ["gcc", "-O1", "-o", str(program), "-x", "c", "-", "-x", "none", *libraries]
    subprocess.run(words, input=source, text=True, check=True)
    return program


# -- Python

PYTHON = """
import mmap, os, subprocess, sys
path = sys.argv[1]
fd = os.open(path, os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 1 << 20)
view = mmap.mmap(fd, 1 << 20)
view[5000:5005] = b"hello"
assert os.pread(fd, 5, 5000) == b"hello"
view.resize(4 << 20)  # ftruncate(2) and mremap(2)
assert view[5000:5005] == b"hello" and len(view) == 4 << 20
view[3 << 20] = 7
assert os.pread(fd, 1, 3 << 20) == b"\\x07"
copy = mmap.mmap(fd, 1 << 20, access=mmap.ACCESS_COPY)
copy[5000:5005] = b"COPY!"
assert view[5000:5005] == b"hello" and copy[5000:5005] == b"COPY!"
read_only = mmap.mmap(fd, 1 << 20, access=mmap.ACCESS_READ)
assert read_only[5000:5005] == b"hello"
child = os.fork()
if child == 0:
    view[5000:5005] = b"child"
    copy[0] = 9
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
assert view[5000:5005] == b"child" and copy[0] == 0
script = '''
import mmap, sys
with open(sys.argv[1], "r+b") as file:
    assert mmap.mmap(file.fileno(), 0)[5000:5005] == b"child"
'''
subprocess.run([sys.executable, "-c", script, path], check=True)
view.flush()
view.resize(1 << 20)
assert os.fstat(fd).st_size == 1 << 20 and view[5000:5005] == b"child"
view.close()
os.execv(sys.executable, [sys.executable, "-c", script, path])
"""


def test_python_mmap(dax_mount: DaxMount) -> None:
    assert under_run(dax_mount, sys.executable, "-c", PYTHON, dax_mount.path / "f") == ""


NUMPY = """
import numpy, sys
array = numpy.memmap(sys.argv[1], dtype="i8", mode="w+", shape=(1 << 18,))
array[:] = numpy.arange(1 << 18)
again = numpy.memmap(sys.argv[1], dtype="i8", mode="r")
assert (again == numpy.arange(1 << 18)).all()
"""


def test_numpy_memmap(dax_mount: DaxMount) -> None:
    assert under_run(dax_mount, sys.executable, "-c", NUMPY, dax_mount.path / "f") == ""


MULTIPROCESSING = """
import mmap, multiprocessing, os, sys
fd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)
os.ftruncate(fd, 1 << 20)
view = mmap.mmap(fd, 1 << 20)
def work(number):
    for at in range(number, 1 << 20, 256):
        view[at] = number
    return os.getpid()
with multiprocessing.get_context("fork").Pool(4) as pool:
    assert len(set(pool.map(work, range(64)))) > 1
assert all(view[at] == at % 256 for at in range(1 << 20) if at % 256 < 64)
"""


def test_python_processes_share_a_mapping(dax_mount: DaxMount) -> None:
    assert under_run(dax_mount, sys.executable, "-c", MULTIPROCESSING, dax_mount.path / "f") == ""


# -- Node, Java, Go

NODE = """
const fs = require('fs'), child = require('child_process'), path = process.argv[1];
const data = Buffer.alloc(1 << 20, 'node');
fs.writeFileSync(path, data);
if (!fs.readFileSync(path).equals(data)) throw Error('read');
child.execFileSync('cmp', [path, path]);
const {Worker} = require('worker_threads');
const copy = `
  const from = require('worker_threads').workerData;
  require('fs').copyFileSync(from, from + '2')`;
const worker = new Worker(copy, {eval: true, workerData: path});
worker.on('exit', () => {
  if (!fs.readFileSync(path + '2').equals(data)) throw Error('copy');
  console.log('ok');
});
"""


def test_node(dax_mount: DaxMount) -> None:
    """Node has no mmap(2): this is a runtime with many threads and mappings of its own."""
    assert under_run(dax_mount, "node", "-e", NODE, dax_mount.path / "f") == "ok\n"


@pytest.mark.slow
def test_java(dax_mount: DaxMount, tmp_path: Path) -> None:
    needs("java", "javac")
    module = ("--add-modules", "jdk.nio.mapmode")
    subprocess.run(["javac", *module, "-d", tmp_path, VICTIMS / "MapFile.java"], check=True, timeout=LIMIT)
    said = under_run(dax_mount, "java", *module, "-cp", tmp_path, "MapFile", dax_mount.path / "f")
    assert said.splitlines() == ["read j", "shared j", "sync s"]


GO = """
package main

import (
	"fmt"
	"os"
	"syscall"
)

func main() {
	file, _ := os.OpenFile(os.Args[1], os.O_RDWR|os.O_CREATE, 0644)
	file.Truncate(1 << 20)
	both := syscall.PROT_READ | syscall.PROT_WRITE
	view, err := syscall.Mmap(int(file.Fd()), 0, 1<<20, both, syscall.MAP_SHARED)
	if err != nil {
		panic(err)
	}
	done := make(chan bool)
	for first := 0; first < 4; first++ {
		go func(first int) {
			for at := first; at < 1<<20; at += 4 {
				view[at] = byte(first)
			}
			done <- true
		}(first)
	}
	for i := 0; i < 4; i++ {
		<-done
	}
	one := make([]byte, 1)
	file.ReadAt(one, 4003)
	fmt.Println(one[0])
}
"""


@pytest.mark.slow
def test_go(dax_mount: DaxMount, tmp_path: Path) -> None:
    needs("go")
    source = tmp_path / "main.go"
    source.write_text(GO)
    environment = {**os.environ, "GOCACHE": str(tmp_path / "cache"), "CGO_ENABLED": "0"}
    words = ["go", "build", "-o", str(tmp_path / "program"), str(source)]
    subprocess.run(words, check=True, env=environment, timeout=LIMIT)
    assert under_run(dax_mount, tmp_path / "program", dax_mount.path / "f") == "3\n"


# -- databases


@pytest.mark.parametrize("journal", ["delete", "wal"])
def test_sqlite3(dax_mount: DaxMount, journal: str) -> None:
    database = dax_mount.path / "db"
    script = f"""
        PRAGMA journal_mode={journal}; PRAGMA mmap_size={256 << 20};
        CREATE TABLE t(i INTEGER PRIMARY KEY, v BLOB);
        WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n WHERE i<3000)
            INSERT INTO t SELECT i, randomblob(300) FROM n;
        UPDATE t SET v = randomblob(500) WHERE i % 3 = 0;
        DELETE FROM t WHERE i % 7 = 0;
        VACUUM;
    """
    under_run(dax_mount, "sqlite3", "-batch", database, stdin=script)
    remount(dax_mount)
    question = f"PRAGMA mmap_size={256 << 20}; PRAGMA integrity_check; SELECT count(*) FROM t;"
    checked = under_run(dax_mount, "sqlite3", "-batch", database, question)
    assert checked.split() == [str(256 << 20), "ok", str(3000 - 3000 // 7)]


SQLITE_WRITERS = """
import sqlite3, subprocess, sys, threading
path, who = sys.argv[1:3]
def connect():
    found = sqlite3.connect(path, timeout=60, isolation_level=None)
    found.execute("PRAGMA mmap_size=268435456")
    return found
if who == "parent":
    first = connect()
    assert first.execute("PRAGMA journal_mode=wal").fetchone() == ("wal",)
    first.execute("CREATE TABLE t(who TEXT, i INTEGER, v BLOB)")
    second = subprocess.Popen([sys.executable, *sys.orig_argv[1:3], path, "child"])
def write(name):
    mine = connect()
    for i in range(100):
        mine.execute("INSERT INTO t VALUES (?, ?, randomblob(400))", (name, i))
threads = [threading.Thread(target=write, args=(f"{who}{n}",)) for n in range(2)]
for thread in threads: thread.start()
for thread in threads: thread.join()
if who == "parent":
    assert second.wait() == 0
    print(first.execute("PRAGMA integrity_check").fetchone()[0],
          first.execute("SELECT count(*), count(DISTINCT who) FROM t").fetchone())
"""


def test_sqlite3_with_two_writers_in_each_of_two_processes(dax_mount: DaxMount) -> None:
    """WAL: the file -shm is a shared mapping."""
    database = dax_mount.path / "db"
    said = under_run(dax_mount, sys.executable, "-c", SQLITE_WRITERS, database, "parent")
    assert said == "ok (400, 4)\n"
    remount(dax_mount)
    assert under_run(dax_mount, "sqlite3", "-batch", database, "PRAGMA integrity_check") == "ok\n"


@pytest.mark.parametrize("writemap", [False, True])
def test_lmdb(dax_mount: DaxMount, tmp_path: Path, writemap: bool) -> None:
    needs("mdb_stat")
    program = compiled(tmp_path, LMDB, "-llmdb")
    environment = dax_mount.path / "env"
    environment.mkdir()
    assert under_run(dax_mount, program, environment, *(["writemap"] if writemap else [])) == "ok\n"
    remount(dax_mount)
    assert "Entries: 500" in under_run(dax_mount, "mdb_stat", environment)


ROCKSDB = r"""
#include <rocksdb/c.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#define CHECK(error) do { if (error) { puts(error); return 1; } } while (0)
int main(int argc, char **argv)
{
	char *error = NULL, key[20], value[400];
	size_t length;
	rocksdb_options_t *options = rocksdb_options_create();
	rocksdb_options_set_create_if_missing(options, 1);
	rocksdb_options_set_allow_mmap_reads(options, 1);
	rocksdb_options_set_allow_mmap_writes(options, 1);
	rocksdb_options_set_write_buffer_size(options, 65536);
	rocksdb_t *db = rocksdb_open(options, argv[1], &error);
	CHECK(error);
	rocksdb_writeoptions_t *write = rocksdb_writeoptions_create();
	rocksdb_readoptions_t *read = rocksdb_readoptions_create();
	for (int i = 0; argc == 2 && i < 3000; i++) {
		memset(value, 'a' + i % 26, sizeof(value));
		rocksdb_put(db, write, key, sprintf(key, "%06d", i), value, sizeof(value), &error);
		CHECK(error);
	}
	if (argc == 2)
		rocksdb_compact_range(db, NULL, 0, NULL, 0);
	for (int i = 0; i < 3000; i++) {
		char *found = rocksdb_get(db, read, key, sprintf(key, "%06d", i), &length, &error);
		CHECK(error);
		if (!found || length != sizeof(value) || found[399] != 'a' + i % 26) {
			printf("record %d\n", i);
			return 1;
		}
		free(found);
	}
	rocksdb_close(db);
	puts("ok");
	return 0;
}
"""


@pytest.mark.slow
def test_rocksdb(dax_mount: DaxMount, tmp_path: Path) -> None:
    """allow_mmap_reads and allow_mmap_writes."""
    if not Path("/usr/include/rocksdb/c.h").exists():
        pytest.skip("librocksdb-dev is not installed")
    program = compiled(tmp_path, ROCKSDB, "-lrocksdb")
    assert under_run(dax_mount, program, dax_mount.path / "db") == "ok\n"
    remount(dax_mount)
    assert under_run(dax_mount, program, dax_mount.path / "db", "again") == "ok\n"


@pytest.mark.parametrize("engine", ["mmap", "psync", "libaio"])
def test_fio_verifies(dax_mount: DaxMount, engine: str) -> None:
    needs("fio")
    words = [f"--directory={dax_mount.path}", f"--ioengine={engine}", "--rw=randrw", "--bs=4k-64k"]
    more = ["--size=24m", "--verify=crc32c", "--fsync=64", "--do_verify=1", "--output=/dev/null"]
    under_run(
        dax_mount,
        "sh",
        "-c",
        'cd "$1" && shift && "$@"',
        "sh",
        dax_mount.path,
        "fio",
        "--name=v",
        *words,
        *more,
    )


# -- PMDK

PMDK = ("-Wl,--no-as-needed", "-lpmem", "-lpmem2", "-lpmemobj")


@pytest.fixture(scope="module")
def pmdk() -> Path:
    for header in ("libpmem.h", "libpmem2.h", "libpmemobj.h"):
        if not Path("/usr/include", header).exists():
            pytest.skip(f"{header.removesuffix('.h')}-dev is not installed")
    return compile_victim("pmdk", options=PMDK)


def test_libpmem_takes_the_mount_for_persistent_memory(dax_mount: DaxMount, pmdk: Path) -> None:
    said = under_run(dax_mount, pmdk, "pmem", dax_mount.path / "f").splitlines()
    assert said == ["is_pmem 1 1", "ok"]


@pytest.mark.parametrize("step", ["pmem2", "pmem2-reservation"])
def test_libpmem2_stores_by_cache_line(dax_mount: DaxMount, pmdk: Path, step: str) -> None:
    """libpmem2 maps with MAP_FIXED over memory that it, or the program, has reserved."""
    said = under_run(dax_mount, pmdk, step, dax_mount.path / "f").splitlines()
    assert said == ["granularity cache line", "ok"]
    assert (dax_mount.path / "f").read_bytes()[100:106] == b"stored"
    assert not dax_mount.events("DirectMappingRefused")


def test_a_libpmemobj_pool_is_whole_after_kill_9_and_remount(dax_mount: DaxMount, pmdk: Path) -> None:
    pool = dax_mount.path / "pool"
    with subprocess.Popen(argv(dax_mount, pmdk, "count", pool), stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        finally:
            os.kill(process.pid, signal.SIGKILL)
    remount(dax_mount)
    assert under_run(dax_mount, pmdk, "check", pool) == "ok\n"
    if shutil.which("pmempool") is not None:
        assert ": consistent" in under_run(dax_mount, "pmempool", "check", "-v", pool)
