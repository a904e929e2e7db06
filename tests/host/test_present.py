"""Mappings of real processes, on a plain shared-memory file."""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from itertools import count
from pathlib import Path

import pytest

from daxemu.host import victims
from daxemu.host.proc import maps, pagemap, present
from daxemu.host.proc.pagemap import Pagemap
from daxemu.host.proc.present import collect_tasks, present_runs
from daxemu.host.proc.processes import in_page_fault, process_of, read_comm, read_threads
from daxemu.mm.memory_failure import Task
from daxemu.ranges import Range
from daxemu.uapi import PF_MCE_EARLY, PF_MCE_PROCESS
from tests.host.conftest import without_c
from tests.support.actor import Actor

PAGE = 4096


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Path]:
    path = Path("/dev/shm") / f"daxemu-tasks-{os.getpid()}"
    path.write_bytes(b"f" * PAGE * 64)
    yield path
    path.unlink()


@pytest.fixture
def actor(file: Path) -> Iterator[Actor]:
    with Actor.spawn("mapper", cwd=file.parent) as made:
        made.cmd(f"open 0 {file.name} rw")
        yield made


def identity(file: Path) -> tuple[tuple[int, int], int]:
    found = file.stat()
    return (os.major(found.st_dev), os.minor(found.st_dev)), found.st_ino


def present_pages(file: Path, actor: Actor, *ranges: Range) -> list[tuple[int, int, int]]:
    """Return (first page, pages, address in mapping 0) of each run that the actor has present."""
    dev, ino = identity(file)
    found = [task for task in collect_tasks(dev, {ino: list(ranges)}) if task.pid == actor.pid]
    return [(r.index, r.nr_pages, r.address - actor.addr(0)) for task in found for r in task.present]


@pytest.mark.usefixtures("way")
def test_only_present_pages_of_the_wanted_ranges_are_found(file: Path, actor: Actor) -> None:
    actor.cmd("mmap 0 0 8 40 shared")
    assert present_pages(file, actor, Range(0, 64)) == []
    actor.cmd("tw 0 0 x")
    actor.cmd("tw 0 32 x")
    everything = present_pages(file, actor, Range(0, 64))
    pages = {page for first, count, _ in everything for page in range(first, first + count)}
    assert {8, 40} <= pages, "page 0 of the mapping is page 8 of the file"
    assert all(offset == (first - 8) * PAGE for first, _, offset in everything)
    assert present_pages(file, actor, Range(40, 41)) == [(40, 1, 32 * PAGE)]
    assert present_pages(file, actor, Range(0, 8)) == []


@pytest.mark.usefixtures("way")
def test_a_private_copy_is_the_processs_own(file: Path, actor: Actor) -> None:
    actor.cmd("mmap 0 0 0 1 private")
    actor.cmd("tr 0 0")
    assert present_pages(file, actor, Range(0, 1)) == [(0, 1, 0)]
    actor.cmd("tw 0 0 x")
    assert present_pages(file, actor, Range(0, 1)) == []


@pytest.mark.usefixtures("way")
def test_everything_on_the_device_reports_one_run_a_process(file: Path, actor: Actor) -> None:
    dev, _ = identity(file)
    actor.cmd("mmap 0 0 0 64 shared")
    for page in (50, 20):
        actor.cmd(f"tw 0 {page} x")
    (task,) = [task for task in collect_tasks(dev, None) if task.pid == actor.pid]
    assert len(task.present) == 1
    assert task.comm == "mapper"


def everybody(file: Path) -> list[Task]:
    """Return the processes with any page of the file present."""
    dev, ino = identity(file)
    return collect_tasks(dev, {ino: [Range(0, 1 << 40)]})


@pytest.mark.parametrize(
    "commands",
    [
        ["mmap 0 0 0 64 shared", "mmap 1 0 8 40 private", "tr 1 2", "tw 1 3 x", "tw 0 60 x"],
        ["mmap 0 0 0 64 shared", "tr 0 0", "threads e l n"],
        ["mmap 0 0 0 64 ro", "tr 0 0"],
        [line for m in range(10) for line in (f"mmap {m} 0 0 {m + 1} shared", f"tr {m} {m}")],
    ],
)
def test_both_ways_find_the_same(
    file: Path, actor: Actor, monkeypatch: pytest.MonkeyPatch, commands: list[str]
) -> None:
    if victims.MISSING is not None:
        pytest.skip(victims.MISSING)
    for command in commands:
        actor.cmd(command)
    closely: list[int] = []
    monkeypatch.setattr(present, "_look_at", lambda pid, *_: closely.append(pid))
    quickly = everybody(file)
    assert actor.pid in {task.pid for task in quickly}
    assert actor.pid not in closely, "C found it all"
    monkeypatch.undo()
    without_c(monkeypatch)
    assert everybody(file) == quickly


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(("mappings", "pages"), [(65, 1), (1, 600)])
def test_many_mappings_and_many_runs(file: Path, mappings: int, pages: int) -> None:
    """Python handles a process with more mappings, or more runs, than C has space for."""
    os.truncate(file, pages * PAGE)
    with ExitStack() as stack, file.open("r+b") as opened:
        for _ in range(mappings):
            shown = stack.enter_context(mmap.mmap(opened.fileno(), pages * PAGE))
            for page in range(0, pages, 2):
                shown[page * PAGE] = 1
        (present,) = [task.present for task in everybody(file) if task.pid == os.getpid()]
    assert len(present) == mappings * -(-pages // 2)


def meanwhile(monkeypatch: pytest.MonkeyPatch, *changes: Callable[[], None]) -> None:
    """Run these functions before the first look at the page tables, after the first look, before the second,
    and so on.
    """
    real, todo = Pagemap.present_in, [*changes]
    without_c(monkeypatch)

    def present_in(self: Pagemap, start: int, end: int, *, copies: bool = False) -> Iterator[Range]:
        if todo:
            todo.pop(0)()
        yield from list(real(self, start, end, copies=copies))
        if todo:
            todo.pop(0)()

    monkeypatch.setattr(Pagemap, "present_in", present_in)


def test_a_page_mapped_where_a_file_was_is_not_the_files(
    file: Path, actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor.cmd("mmap 0 0 0 40 shared")
    address = actor.addr(0)

    def replace() -> None:
        actor.cmd("munmap 0")
        actor.cmd("mmap 1 0 20 40 shared")
        assert actor.addr(1) == address
        actor.cmd("tw 1 0 x")

    meanwhile(monkeypatch, replace)
    assert present_pages(file, actor, Range(0, 20)) == []


def test_a_page_mapped_for_a_moment_over_a_file_is_not_the_files(
    file: Path, actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor.cmd("mmap 0 0 0 40 shared")
    address = actor.addr(0)

    def replace(old: int, new: int, first: int, touch: bool) -> None:
        actor.cmd(f"munmap {old}")
        actor.cmd(f"mmap {new} 0 {first} 40 shared")
        assert actor.addr(new) == address
        if touch:
            actor.cmd(f"tw {new} 0 x")

    meanwhile(monkeypatch, partial(replace, 0, 1, 20, True), partial(replace, 1, 0, 0, False))
    assert present_pages(file, actor, Range(0, 20)) == []


def test_a_process_that_faults_all_the_while_is_found(
    file: Path, actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor.cmd("mmap 0 0 0 64 shared")
    actor.cmd("tw 0 3 x")
    turns = count()
    without_c(monkeypatch)
    monkeypatch.setattr(present, "_faults", lambda _: next(turns))
    assert (3, 1, 3 * PAGE) in present_pages(file, actor, Range(3, 4))


def test_a_page_that_moves_is_found_where_it_is(
    file: Path, actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor.cmd("mmap 1 0 0 40 shared")
    old = actor.addr(1)

    def move() -> None:
        actor.cmd("munmap 1")
        actor.cmd("mmap 2 0 20 40 shared")
        assert actor.addr(2) == old
        actor.cmd("mmap 0 0 0 40 shared")
        actor.cmd("tw 0 3 x")

    meanwhile(monkeypatch, move)
    ((_, pages, offset),) = present_pages(file, actor, Range(3, 4))
    assert (pages, offset) == (1, 3 * PAGE)


def test_without_pagemap_scan_the_same_is_found(
    file: Path, actor: Actor, monkeypatch: pytest.MonkeyPatch
) -> None:
    actor.cmd("mmap 0 0 0 64 shared")
    for page in (3, 17, 18, 63):
        actor.cmd(f"tw 0 {page} x")
    new = present_pages(file, actor, Range(0, 64))
    without_c(monkeypatch)
    monkeypatch.setattr(pagemap, "_PAGEMAP_SCAN", 0xDEAD)  # a kernel that does not know the ioctl
    assert present_pages(file, actor, Range(0, 64)) == new != []


def test_threads_come_with_their_policy(actor: Actor) -> None:
    actor.cmd("threads e l")
    threads = list(read_threads(actor.pid))
    assert [t.tid for t in threads] == [actor.pid, actor.tid(1), actor.tid(2)]
    policies = [t.flags & (PF_MCE_PROCESS | PF_MCE_EARLY) for t in threads]
    assert policies == [0, PF_MCE_PROCESS | PF_MCE_EARLY, PF_MCE_PROCESS]
    assert {process_of(t.tid) for t in threads} == {actor.pid}
    while Path(f"/proc/{actor.pid}/syscall").read_text() == "running\n":
        pass  # the actor has answered, and is about to begin
    assert in_page_fault(actor.pid) is False, "it waits in read(2)"


def test_a_thread_not_asleep_yet_may_be_in_a_page_fault(actor: Actor) -> None:
    actor.cmd("mmap 0 0 0 1 shared")
    actor.start_spin(0, 0)
    assert in_page_fault(actor.pid) is True


@pytest.mark.usefixtures("way")
def test_a_process_that_ended_is_left_out(file: Path) -> None:
    dev, _ = identity(file)
    with Actor.spawn("gone", cwd=file.parent) as actor:
        actor.cmd(f"open 0 {file.name} rw")
        actor.cmd("mmap 0 0 0 4 shared")
        actor.cmd("tw 0 0 x")
        pid = actor.pid
        actor.kill()
        assert [task for task in collect_tasks(dev, None) if task.pid == pid] == []
        assert in_page_fault(pid) is False
        assert process_of(pid) == pid
        with pytest.raises((FileNotFoundError, ProcessLookupError)):
            list(maps.read(pid, dev))
        with pytest.raises(FileNotFoundError):
            read_comm(pid)


@pytest.mark.usefixtures("way")
def test_a_name_with_parentheses_is_parsed(file: Path) -> None:
    with Actor.spawn("a) R 1 (", cwd=file.parent) as actor:
        assert read_comm(actor.pid) == "a) R 1 ("
        assert [t.tid for t in read_threads(actor.pid)] == [actor.pid]
        assert not any(t.flags & PF_MCE_PROCESS for t in read_threads(actor.pid))
        actor.cmd(f"open 0 {file.name} rw")
        actor.cmd("mmap 0 0 0 1 shared")
        actor.cmd("tr 0 0")
        assert [task.comm for task in everybody(file) if task.pid == actor.pid] == ["a) R 1 ("]


@pytest.mark.parametrize("scan", [True, False])
def test_private_copies_are_listed_with_the_files_own_pages(
    file: Path, actor: Actor, monkeypatch: pytest.MonkeyPatch, scan: bool
) -> None:
    if not scan:
        monkeypatch.setattr(pagemap, "_PAGEMAP_SCAN", 0xDEAD)
    dev, ino = identity(file)
    actor.cmd("mmap 0 0 8 40 private")
    actor.cmd("mmap 1 0 0 64 shared")
    for page in (0, 1, 20):
        actor.cmd(f"tr 0 {page}")
    actor.cmd("tw 0 1 x")
    actor.cmd("tw 1 9 x")
    found = collect_tasks(dev, {ino: [Range(0, 64)]}, pages_of=partial(present_runs, copies=True))
    (task,) = [task for task in found if task.pid == actor.pid]
    private = Range(actor.addr(0), actor.addr(0, 40))
    assert {run.copies for run in task.present if run.vma == private} == {(Range(9, 10),)}
    assert {run.copies for run in task.present if run.vma != private} == {()}
    assert {run.vma for run in task.present} == {private, Range(actor.addr(1), actor.addr(1, 64))}


@pytest.mark.parametrize("name", ["x {dev} y", "x\n{dev} y", "x\r{dev} y", "{dev} (deleted)"])
def test_a_file_name_is_taken_for_no_device(tmp_path: Path, name: str) -> None:
    """/proc/PID/maps shows the name last: a device number in the name is not the mapping's."""
    path = tmp_path / name.format(dev="00:63")
    path.write_bytes(bytes(PAGE))
    with path.open("r+b") as opened, mmap.mmap(opened.fileno(), PAGE) as view:
        status = path.stat()
        assert list(maps.read(os.getpid(), (0, 0x63))) == []
        here = (os.major(status.st_dev), os.minor(status.st_dev))
        assert [vma.ino for vma in maps.read(os.getpid(), here) if vma.ino == status.st_ino] == [
            status.st_ino
        ]
        assert len(view) == PAGE
