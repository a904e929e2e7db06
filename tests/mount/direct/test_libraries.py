"""Unmodified libraries for persistent memory and memory-mapped data, on direct mappings."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.mount import DAXEMU, PATIENCE, DaxMount

pytestmark = pytest.mark.mount

PMEM = """
#include <libpmem.h>
#include <stdio.h>
#include <string.h>
int main(void) {
    size_t length; int is_pmem;
    char *at = pmem_map_file("pool", 1 << 20, PMEM_FILE_CREATE, 0666, &length, &is_pmem);
    if (!at) return 1;
    strcpy(at, "persisted");
    pmem_persist(at, 10);
    printf("%d %d", is_pmem, pmem_is_pmem(at, length));
    return 0;
}
"""
LMDB = """
#include <lmdb.h>
#include <stdio.h>
int main(int argc, char **argv) {
    MDB_env *env; MDB_txn *txn; MDB_dbi dbi; MDB_stat stat;
    mdb_env_create(&env);
    mdb_env_set_mapsize(env, 16 << 20);
    if (mdb_env_open(env, "db", MDB_NOSUBDIR | (argc > 1 ? MDB_WRITEMAP : 0), 0644)) return 1;
    for (int i = 0; i < 200; i++) {
        MDB_val value = {sizeof i, &i};
        if (mdb_txn_begin(env, 0, 0, &txn) || mdb_dbi_open(txn, 0, 0, &dbi)) return 2;
        if (mdb_put(txn, dbi, &value, &value, 0) || mdb_txn_commit(txn)) return 3;
    }
    mdb_txn_begin(env, 0, MDB_RDONLY, &txn);
    mdb_stat(txn, dbi, &stat);
    printf("%zu", stat.ms_entries);
    return 0;
}
"""


def compiled(directory: Path, source: str, library: str) -> Path:
    """Compile a program; skip the test without the library."""
    (directory / "p.c").write_text(source)
    argv = ["gcc", "-w", "-o", str(directory / "p"), str(directory / "p.c"), f"-l{library}"]
    if subprocess.run(argv, capture_output=True).returncode != 0:
        pytest.skip(f"no compiler, or no lib{library}")
    return directory / "p"


def output(mount: DaxMount, *command: str | Path) -> str:
    """Return the output of a command under ``daxemu run`` in the mount's root directory."""
    argv = [*DAXEMU, "run", str(mount.path), "--", *map(str, command)]
    done = subprocess.run(argv, cwd=mount.path, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_libpmem_takes_a_mapping_for_persistent_memory(dax_mount: DaxMount, tmp_path: Path) -> None:
    assert output(dax_mount, compiled(tmp_path, PMEM, "pmem")) == "1 1"
    assert (dax_mount.path / "pool").read_bytes()[:9] == b"persisted"


@pytest.mark.parametrize("options", [(), ("writemap",)], ids=["read-only map", "writable map"])
def test_lmdb(dax_mount: DaxMount, tmp_path: Path, options: tuple[str, ...]) -> None:
    assert output(dax_mount, compiled(tmp_path, LMDB, "lmdb"), *options) == "200"
