"""Cost of work on files, compared with C libfuse's passthrough_ll, tmpfs and the simplest pyfuse3
filesystem.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.bench.contenders import EXAMPLES, SHM, TMPFS, Contender, Contest, Work, contest

pytestmark = [
    pytest.mark.bench,
    pytest.mark.mount,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts several filesystems: needs root"),
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason=f"no {EXAMPLES}: install libfuse3-dev"),
]

MIB = 1 << 20
FILE_MIB = 256
BLOCKS, SMALL_MIB = 4000, 64
APPENDS = 500
STATS = 200_000
NAMES, ENTRIES = 1000, 10_000
INSERTS = 300
TOUCHED_MIB = 1024
XFS = "XFS on loop"


@pytest.fixture(scope="module")
def field() -> Iterator[Contest]:
    """The contenders."""
    with contest() as made:
        yield made


def mb_per_s(mib: float, seconds: float) -> float:
    return mib * MIB / 1e6 / seconds


def test_sequential_read(field: Contest) -> None:
    field.race(
        Work(
            "sequential read, 1 MiB",
            "MB/s",
            lambda at: mb_per_s(FILE_MIB, field.load("read", at / "f", MIB)),
            lambda at: field.load("write", at / "f", MIB, FILE_MIB),
            more_is_better=True,
            target=1.0,
        )
    )


@pytest.mark.parametrize("where", ["a new file", "over old bytes"])
def test_sequential_write(field: Contest, where: str) -> None:
    def measure(at: Path) -> float:
        if where == "a new file":
            (at / "f").unlink(missing_ok=True)
        return mb_per_s(FILE_MIB, field.load("write", at / "f", MIB, FILE_MIB))

    field.race(
        Work(
            f"sequential write, 1 MiB, {where}",
            "MB/s",
            measure,
            lambda at: field.load("write", at / "f", MIB, FILE_MIB),
            more_is_better=True,
            target=1.0,
        )
    )


@pytest.mark.parametrize("verb", ["read", "write"])
def test_random_4_kib(field: Contest, verb: str) -> None:
    field.race(
        Work(
            f"random {verb}, 4 KiB",
            "us",
            lambda at: field.load(f"rand{verb}", at / "f", 4096, BLOCKS) / BLOCKS * 1e6,
            lambda at: field.load("write", at / "f", MIB, SMALL_MIB),
            target=1.0,
        )
    )


def test_append_and_fsync(field: Contest) -> None:
    field.race(
        Work(
            "append 4 KiB and fsync",
            "us",
            lambda at: field.load("append", at / "f", 4096, APPENDS) / APPENDS * 1e6,
            target=1.0,
        )
    )


def test_stat(field: Contest) -> None:
    field.race(
        Work(
            "stat",
            "us",
            lambda at: field.load("stat", at / "f", STATS) / STATS * 1e6,
            lambda at: field.load("write", at / "f", MIB, 1),
            target=1.0,
        )
    )


@pytest.mark.parametrize("verb", ["create", "unlink"])
def test_create_and_unlink(field: Contest, verb: str) -> None:
    def measure(at: Path) -> float:
        took = {step: field.load(step, at, NAMES) / NAMES * 1e6 for step in ("create", "unlink")}
        return took[verb]

    field.race(Work(verb, "us", measure, target=0.7))


@pytest.mark.parametrize("changed", [True, False], ids=["changed", "again"])
def test_readdir(field: Contest, changed: bool) -> None:
    def measure(at: Path) -> float:
        if changed:
            (at / "last").touch()
            (at / "last").unlink()
        return field.load("list", at) * 1e3

    name = f"readdir of {ENTRIES:,}, {'changed since' if changed else 'again'}"
    field.race(Work(name, "ms", measure, lambda at: field.load("create", at, ENTRIES), rounds=5))


def test_git_clone(field: Contest, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()

    def git(*arguments: str | Path) -> None:
        identity = ("-c", "user.name=bench", "-c", "user.email=bench@localhost")
        subprocess.run(["git", *identity, *arguments], cwd=source, check=True, capture_output=True)

    git("init", "-q")
    for index in range(300):
        file = source / f"d{index % 20}" / f"f{index}"
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"{index}\n" * (index + 1) * 10)
    git("add", "-A")
    git("commit", "-q", "-m", "files")

    def measure(at: Path) -> float:
        shutil.rmtree(at / "clone", ignore_errors=True)
        began = time.perf_counter()
        git("clone", "-q", "--no-hardlinks", source, at / "clone")
        return (time.perf_counter() - began) * 1e3

    field.race(Work("git clone of 300 files", "ms", measure, target=1.0, rounds=5))


def test_sqlite_inserts(field: Contest) -> None:
    script = "CREATE TABLE t (a, b);" + "INSERT INTO t VALUES (1, hex(randomblob(50)));" * INSERTS

    def measure(at: Path) -> float:
        (at / "db").unlink(missing_ok=True)
        began = time.perf_counter()
        subprocess.run(["sqlite3", at / "db"], input=script, text=True, check=True, timeout=60)
        return (time.perf_counter() - began) / INSERTS * 1e6

    field.race(Work("sqlite3 insert", "us", measure, target=1.0, rounds=5))


def test_fio_mmap(field: Contest) -> None:
    def measure(at: Path) -> float:
        command = ["fio", "--name=mmap", "--ioengine=mmap", "--rw=randrw", "--bs=4k", f"--size={SMALL_MIB}m"]
        options = [f"--directory={at}", f"--io_size={4 * SMALL_MIB}m", "--output-format=json"]
        done = subprocess.run([*command, *options], capture_output=True, text=True, check=True, timeout=120)
        (job,) = json.loads(done.stdout)["jobs"]
        return float(job["read"]["bw_bytes"] + job["write"]["bw_bytes"]) / 1e6

    name = "fio, mmap engine, randrw 4 KiB"
    field.race(Work(name, "MB/s", measure, more_is_better=True, target=1.0, rounds=5, maps=True))


def test_first_touch(field: Contest) -> None:
    def measure(at: Path) -> float:
        field.load("write", at / "f", MIB, TOUCHED_MIB)
        took = field.load("touch", at / "f")
        (at / "f").unlink()
        return took * 1e3

    field.race(Work("first touch of 1 GiB mapped", "ms", measure, target=0.8, rounds=3, maps=True))


def test_mapped_load_and_store(field: Contest) -> None:
    field.race(
        Work(
            "mapped load and store, after first touch",
            "ms",
            lambda at: field.load("mapped", at / "f") * 1e3,
            lambda at: field.load("write", at / "f", MIB, SMALL_MIB),
            target=0.95,
            against=TMPFS,
            maps=True,
        )
    )


def test_copy_by_reflink(field: Contest) -> None:
    def prepare(at: Path) -> None:
        field.load("write", at / "f", MIB, SMALL_MIB)
        field.load("copy", at / "f", at / "first")  # writes dirty pages back

    def measure(at: Path) -> float:
        (at / "copy").unlink(missing_ok=True)
        return field.load("copy", at / "f", at / "copy") * 1e6

    work = Work(f"copy of {SMALL_MIB} MiB by reflink", "us", measure, prepare, against=XFS)
    if shutil.which("mkfs.xfs") is None:
        field.race(work, notes={XFS: "absent: no mkfs.xfs"})
        return
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="daxemu-bench-", dir=SHM)))
        image, path = directory / "image", directory / "xfs"
        path.mkdir()
        subprocess.run(["truncate", "-s", "1G", image], check=True)
        subprocess.run(["mkfs.xfs", "-q", "-m", "reflink=1", image], check=True)
        subprocess.run(["mount", "-o", "loop", image, path], check=True)
        stack.callback(lambda: subprocess.run(["umount", path], check=True))
        field.race(work, Contender(XFS, path))
