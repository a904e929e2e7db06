"""Workloads: check() finds no mismatch in unchanged data, and each mismatch in changed data."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from daxemu.evaluate.worker import RUNS, Job, workload_of
from daxemu.evaluate.workloads.base import Mismatch, Truth, Workload, pattern
from daxemu.evaluate.workloads.specs import (
    AnyWorkload,
    AppendLog,
    Command,
    Dataset,
    FileServer,
    KvStore,
    Snapshots,
    Sqlite,
)
from tests.support.quick import QuickMount

SPECS: dict[str, AnyWorkload] = {
    "fileserver": FileServer(count=12, largest=32 << 10),
    "kvstore": KvStore(count=64, record=700),
    "sqlite": Sqlite(count=40),
    "dataset": Dataset(count=20, record=9000, batch=4),
    "log": AppendLog(count=60, record=300),
    "snapshots": Snapshots(count=32, every=10, keep=2),
    "command": Command(
        command="date >> log; cat data > copy",
        prepare="seq 1000 > data; sha1sum data > $DAXEMU_STATE/sum",
        verify="sha1sum -c $DAXEMU_STATE/sum || { echo wrong data 0 100; exit 1; }",
    ),
}
DATA = {
    "fileserver": "file-0003",
    "kvstore": "store",
    "dataset": "samples/data.ninja",
    "log": "log",
    "snapshots": "live",
    "command": "data",
}


@pytest.fixture
def job(tmp_path: Path, request: pytest.FixtureRequest) -> Job:
    """Return a job on a plain filesystem; on a daxemu mount for workloads with reflinks."""
    kind = request.param
    root = tmp_path / "root"
    if kind == "snapshots":
        mount: QuickMount = request.getfixturevalue("quick_mount")
        root = mount.path / "root"
    state = tmp_path / "state"
    for directory in (root, state):
        directory.mkdir()
    return Job(SPECS[kind], str(root), str(state), seed=7, seconds=0.1)


def steps(workload: Workload, count: int, seed: int = 1) -> None:
    workload.open()
    rng = random.Random(seed)
    for _ in range(count):
        workload.step(rng)


every = pytest.mark.parametrize(
    "job",
    [pytest.param(k, marks=pytest.mark.mount) if k == "snapshots" else k for k in SPECS],
    indirect=True,
)
with_bytes = pytest.mark.parametrize(
    "job",
    [pytest.param(k, marks=pytest.mark.mount) if k == "snapshots" else k for k in DATA],
    indirect=True,
)


def test_every_kind_has_a_spec_here() -> None:
    assert set(SPECS) == set(RUNS)


@every
def test_unchanged_data_has_no_mismatch(job: Job) -> None:
    first = workload_of(job)
    first.prepare()
    assert list(first.check()) == []
    steps(first, 120)
    again = workload_of(job)  # as after a death
    again.begin_again()
    steps(again, 40, seed=2)
    assert list(workload_of(job).check()) == []
    assert workload_of(job).size() > 0


@with_bytes
def test_a_changed_byte_is_found_at_its_offset(job: Job) -> None:
    workload = workload_of(job)
    workload.prepare()
    if job.spec.kind != "command":
        steps(workload, 60)
    name = DATA[job.spec.kind]
    with open(Path(job.root) / name, "r+b") as file:
        file.seek(17)
        was = file.read(1)
        file.seek(17)
        file.write(bytes([was[0] ^ 0x10]))
    (bad,) = workload_of(job).check()
    assert (bad.path, bad.state) == (name, "wrong")
    if job.spec.kind != "command":
        assert (bad.offset, bad.length) == (17, 1)
        assert bad.ino == (Path(job.root) / name).stat().st_ino


@pytest.mark.parametrize("job", ["sqlite"], indirect=True)
def test_a_changed_row_is_found(job: Job) -> None:
    workload = workload_of(job)
    workload.prepare()
    database = Path(job.root) / "rows.db"
    data = database.read_bytes()
    content = pattern(7, 2, 11, 0, 1000)
    assert data.count(content) == 1
    database.write_bytes(data.replace(content, bytes(1000)))
    assert list(workload_of(job).check()) == [Mismatch("rows.db", database.stat().st_ino, -1, 1000, "wrong")]


@pytest.mark.parametrize("job", ["kvstore", "fileserver", "dataset", "log"], indirect=True)
def test_a_missing_or_truncated_file_is_found(job: Job) -> None:
    workload = workload_of(job)
    workload.prepare()
    file = Path(job.root) / DATA[job.spec.kind]
    size = file.stat().st_size
    os.truncate(file, size - 5)
    found = list(workload_of(job).check())
    assert sum(bad.length for bad in found) == 5
    file.unlink()
    assert sum(bad.length for bad in workload_of(job).check()) in (size, workload.size())


@pytest.mark.parametrize("job", ["kvstore"], indirect=True)
def test_an_unacknowledged_write_may_be_old_new_or_torn(job: Job) -> None:
    workload = workload_of(job)
    workload.prepare()
    workload.open()
    truth = Truth(Path(job.state) / "truth", 64)
    truth.begin(3)
    old, new = (pattern(7, 0, 3, version, 700) for version in (0, 1))
    for content, good in ((new, True), (new[:100] + old[100:], True), (bytes(700), False)):
        with open(Path(job.root) / "store", "r+b") as file:
            file.seek(3 * 700)
            file.write(content)
        assert (list(workload_of(job).check()) == []) is good


@pytest.mark.parametrize("job", ["kvstore"], indirect=True)
def test_after_a_death_an_unreadable_record_is_avoided(job: Job) -> None:
    workload = workload_of(job)
    workload.prepare()
    workload.open()
    with pytest.raises(ZeroDivisionError), workload.touching(5):
        raise ZeroDivisionError
    survivor = workload_of(job)
    survivor.begin_again()
    assert survivor.avoid == set(), "record 5 can be read"
    with pytest.raises(ZeroDivisionError), survivor.touching(63):
        raise ZeroDivisionError
    os.truncate(Path(job.root) / "store", 64 * 700 - 1)
    survivor = workload_of(job)
    survivor.begin_again()
    assert survivor.avoid == {63}
    again = workload_of(job)
    again.begin_again()
    assert again.avoid == {63}, "the record is remembered"


@pytest.mark.parametrize("job", ["command"], indirect=True)
def test_a_worker_reports_errors_and_time_without_service(job: Job) -> None:
    job.spec = Command(command="test $(date +%N | cut -c1) -ge 5")
    job.seconds = 1.2
    done = subprocess.run(
        [sys.executable, "-m", "daxemu.evaluate.worker", "run", msgspec.json.encode(job).decode()],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["ops"] > 0
    assert last["errors"] > 0
    assert 0.3 < last["down"] < 1.2
    assert "exit 1" in last["error"]


def test_patterns_of_different_keys_differ() -> None:
    made = {
        pattern(*key, 64) for key in [(1, 2, 3, 4), (2, 2, 3, 4), (1, 1, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5)]
    }
    assert len(made) == 5
    assert pattern(1, 2, 3, 4, 4097)[:64] == pattern(1, 2, 3, 4, 64), (
        "a longer version begins with the shorter one"
    )
