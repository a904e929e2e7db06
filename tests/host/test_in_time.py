"""A process whose page tables cannot be read holds up no walk over processes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from daxemu.host.proc import in_time
from daxemu.host.proc.present import collect_tasks
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, Ino
from tests.support.actor import Actor
from tests.support.hung_fuse import stuck_victim

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a mount of another filesystem")


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_time, "PATIENCE", 0.1)
    monkeypatch.setattr(in_time, "_NEXT_PATIENCE", 0.1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """File of four pages."""
    path = tmp_path / "f"
    path.write_bytes(bytes(4 * PAGE_SIZE))
    return path


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Directory for a mount."""
    path = tmp_path / "other"
    path.mkdir()
    return path


def read_page_table(pid: int) -> int:
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        pagemap.read(8)
    return pid


@pytest.mark.mount
@needs_root
@pytest.mark.usefixtures("impatient")
def test_a_stuck_process_is_left_out_until_it_can_be_looked_at(file: Path, other: Path) -> None:
    with Actor.spawn("p0") as p0, Actor.spawn("p1") as p1:
        with stuck_victim(file, 0, other, "locked") as pid:
            everyone = [p0.pid, pid, p1.pid]
            assert in_time.each_by(everyone, read_page_table) == ([p0.pid, p1.pid], [pid])
            assert in_time.stuck() == {pid}
        deadline = time.monotonic() + 30
        while in_time.stuck():
            assert time.monotonic() < deadline
            time.sleep(0.001)


@pytest.mark.mount
@needs_root
@pytest.mark.usefixtures("impatient", "way")
def test_each_mapped_page_of_a_stuck_process_counts_as_present(file: Path, other: Path) -> None:
    info = file.stat()
    dev, wanted = (os.major(info.st_dev), os.minor(info.st_dev)), {Ino(info.st_ino): [Range(0, 4)]}
    with Actor.spawn("p0") as p0, stuck_victim(file, 1, other, "locked") as pid:
        p0.cmd(f"open 0 {file} rw")
        p0.cmd("mmap 0 0 2 1 shared")
        assert p0.cmd("tr 0 0").ok is not None
        for _ in range(2):  # the second walk knows that the process is stuck
            found = {
                task.pid: [(run.index, run.nr_pages) for run in task.present]
                for task in collect_tasks(dev, wanted)
            }
            assert found == {p0.pid: [(2, 1)], pid: [(1, 1)]}


@pytest.mark.parametrize(
    "wait", [lambda: time.sleep(0.5), lambda: sum(range(10_000_000))], ids=["asleep", "busy"]
)
@pytest.mark.usefixtures("impatient")
def test_a_slow_look_is_awaited(wait: Callable[[], object]) -> None:
    def look(pid: int) -> int:
        wait()
        return pid

    assert in_time.each_by([1, 2], look) == ([1, 2], [])
    assert in_time.stuck() == set()


def test_an_error_of_a_look_is_raised() -> None:
    def look(pid: int) -> int:
        raise PermissionError(pid)

    with pytest.raises(PermissionError):
        in_time.each_by([1], look)
