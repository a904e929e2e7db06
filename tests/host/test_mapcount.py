"""Processes without a look once the kernel's mapcount is reached: real processes, a plain
shared-memory file.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from daxemu.host.proc import maps
from daxemu.host.proc.mapcount import MAX_PAGES, Mms, all_found
from daxemu.host.proc.present import collect_tasks
from daxemu.mm.memory_failure import Task
from daxemu.ranges import Range
from tests.host.conftest import without_c
from tests.support.actor import Actor

PAGE = 4096
PAGES = 2 * MAX_PAGES

pytestmark = pytest.mark.skipif(
    not os.access("/proc/kpagecount", os.R_OK), reason="/proc/kpagecount is root's, and not in every kernel"
)

# The process maps the file, lends its memory to a child by vfork(2), and waits for the child's end.
LENDER = """
import ctypes, mmap, os, sys, time
shown = mmap.mmap(os.open(sys.argv[1], os.O_RDWR), 4096)
shown[0]
if not ctypes.PyDLL(None).vfork():
    print(os.getpid(), flush=True)
    while True:
        time.sleep(100)
"""


@pytest.fixture
def file() -> Iterator[Path]:
    path = Path("/dev/shm") / f"daxemu-mapcount-{os.getpid()}"
    path.write_bytes(b"f" * PAGE * PAGES)
    yield path
    path.unlink()


@pytest.fixture
def spawn(file: Path) -> Iterator[Callable[[], Actor]]:
    """Start a process with pages 0 and 32 of the file present."""
    with ExitStack() as stack:

        def make() -> Actor:
            actor = stack.enter_context(Actor.spawn("mapper", cwd=file.parent))
            for command in (f"open 0 {file.name} rw", f"mmap 0 0 0 {PAGES} shared", "tr 0 0", "tr 0 32"):
                actor.cmd(command)
            return actor

        yield make


def wanted(file: Path, *ranges: Range) -> dict[int, list[Range]]:
    return {file.stat().st_ino: list(ranges or (Range(0, 1),))}


def found(file: Path, *ranges: Range, likely: frozenset[int] = frozenset()) -> list[Task]:
    there = file.stat()
    dev = os.major(there.st_dev), os.minor(there.st_dev)
    return collect_tasks(dev, wanted(file, *ranges), likely=likely)


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the processes whose mappings are read, one at a time."""
    without_c(monkeypatch)
    pids: list[int] = []
    read = maps.read

    def seen(pid: int, dev: tuple[int, int] | None = None) -> Iterator[maps.Vma]:
        pids.append(pid)
        return read(pid, dev)

    monkeypatch.setattr(maps, "read", seen)
    return pids


def test_no_further_process_is_looked_at_once_all_are_found(
    file: Path, spawn: Callable[[], Actor], looked_at: list[int]
) -> None:
    pids = {spawn().pid, spawn().pid}
    assert {task.pid for task in found(file)} == pids
    assert os.getpid() in looked_at
    looked_at.clear()
    assert {task.pid for task in found(file, likely=frozenset(pids))} == pids
    assert pids <= set(looked_at)
    assert os.getpid() not in looked_at


def test_a_process_started_since_is_found(file: Path, spawn: Callable[[], Actor]) -> None:
    first = spawn().pid
    second = spawn().pid
    assert [task.pid for task in found(file, likely=frozenset({first}))] == sorted((first, second))
    assert all_found(found(file)[:1], wanted(file)) is None


def test_each_page_counts(file: Path, spawn: Callable[[], Actor]) -> None:
    spawn()
    everybody = found(file, Range(0, 1), Range(32, 33))
    assert all_found(everybody, wanted(file, Range(0, 1), Range(32, 33))) is not None
    assert all_found(found(file), wanted(file, Range(0, 1), Range(32, 33))) is None, "whose is page 32?"


def test_a_process_that_has_a_page_twice_is_one_that_counts_twice(
    file: Path, spawn: Callable[[], Actor]
) -> None:
    one = spawn()
    one.cmd("mmap 1 0 0 1 shared")
    one.cmd("tr 1 0")
    (task,) = found(file)
    assert len(task.present) == 2
    assert all_found([task], wanted(file)) is not None
    spawn()
    assert all_found([task], wanted(file)) is None


def test_large_failures_and_failures_without_victims_are_not_certain(
    file: Path, spawn: Callable[[], Actor]
) -> None:
    assert all_found([], wanted(file)) is None
    spawn()
    assert all_found(found(file), wanted(file, Range(0, PAGES))) is None


@pytest.mark.usefixtures("way")
def test_processes_that_share_their_memory_count_once_and_are_all_found(file: Path) -> None:
    lender = subprocess.Popen([sys.executable, "-c", LENDER, file], stdout=subprocess.PIPE, text=True)
    assert lender.stdout is not None
    borrower = int(lender.stdout.readline())
    try:
        both = sorted((lender.pid, borrower))
        assert [task.pid for task in found(file)] == both
        for pid in both:
            assert [task.pid for task in found(file, likely=frozenset({pid}))] == both
    finally:
        os.kill(borrower, signal.SIGKILL)
        lender.kill()
        lender.communicate()


@pytest.mark.usefixtures("way")
def test_threads_are_in_the_address_space_of_their_process_and_others_are_not() -> None:
    ends = threading.Event()
    thread = threading.Thread(target=ends.wait)
    thread.start()
    try:
        with ExitStack() as stack:
            actors = [stack.enter_context(Actor.spawn(f"p{number}")).pid for number in range(5)]
            mms = Mms([*actors[:4], os.getpid(), actors[0]])
            assert len(mms.pids) == 5
            assert thread.native_id is not None
            inside = [*actors[:4], os.getpid(), thread.native_id]
            gone = 1 << 22
            assert sorted(mms.living_in([*inside, actors[4], gone])) == sorted([*inside, gone])
    finally:
        ends.set()
        thread.join()
