"""A 6 TiB device costs the same as a 6 GiB device: counted in calls, not in time."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest

from daxemu.fs.fsck import fsck
from daxemu.fs.inode import ROOT_INO
from daxemu.mm.memory_failure import PresentRun, Task, Thread, collect_procs
from daxemu.pmem import inject
from daxemu.ranges import Range
from daxemu.uapi import MF_MEM_PRE_REMOVE, PAGE_SIZE, U64_MAX, Ino
from tests.support.core import Core, core_at

SMALL, LARGE = 6 << 30, 6 << 40


class Calls:
    """Count of every call, in Python and C, within the block."""

    def __init__(self) -> None:
        self.count = 0

    def __enter__(self) -> Calls:
        sys.setprofile(self._see)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, argument: Any) -> None:
        self.count += event in ("call", "c_call")


def largest_free(core: Core) -> Range:
    return max(core.fs.allocator.free_ranges(), key=lambda run: run.length)


def a_huge_file(core: Core) -> Ino:
    """A file of nearly half the device, without reserved blocks: no machine has memory for so many."""
    ino = core.file(b"huge")
    run = largest_free(core)
    run = Range(run.start, run.end - 1000)
    core.fs.allocator.take(run)
    core.fs.extents_of(ino).insert(0, run.start, run.length)
    core.fs.names.get(ino).size = run.length * PAGE_SIZE
    core.clone(ino, b"clone")
    core.fs.commit()
    return ino


def place_of(core: Core) -> Range:
    (place,) = core.fs.device_ranges(core.fs.names.lookup(ROOT_INO, b"huge").ino, 0, 1 << 60)
    return place


def size_of(core: Core, name: bytes = b"huge") -> tuple[Ino, int]:
    inode = core.fs.names.lookup(ROOT_INO, name)
    return inode.ino, inode.size


def fail_everything(core: Core) -> None:
    place = place_of(core)
    incident = core.mm.memory_failure(core.pmem.pfn_of(place.start), place.length // PAGE_SIZE, 0)
    assert [m.count for m in incident.mappings] == [place.length // PAGE_SIZE] * 2
    core.mm.action_result(incident, 0)


def collect_everything(core: Core) -> None:
    ino, size = size_of(core)
    incident = core.mm.removal(core.pmem.dax.base_pfn, size // PAGE_SIZE, lambda: None)
    run = PresentRun(ino, 0, size // PAGE_SIZE, 1 << 40, 12)
    task = Task(1, "p0", (Thread(1, 0),), (run,))
    assert len(collect_procs(incident, [task], early_kill=True)) == 1


def poison_and_clear_everything(core: Core) -> None:
    place = place_of(core)
    inject.inject(core.pmem, place.start, place.length, latent=True)
    assert inject.scrub(core.pmem) == [place]
    assert len(core.fs.damaged()) == 2
    assert core.fs.statfs().available > 0
    assert inject.uninject(core.pmem, place.start, place.length) == [place]


def write_in_the_midst(core: Core) -> None:
    ino, size = size_of(core, b"clone")
    core.fs.write(ino, size // 2 // PAGE_SIZE * PAGE_SIZE, bytes(2 * PAGE_SIZE))


def ask(core: Core) -> None:
    ino, size = size_of(core)
    assert core.fs.seek(ino, 0, 4) == size
    assert len(core.fs.device_ranges(ino, 0, size)) == 1
    assert core.fs.rmap.unreferenced(0, core.fs.allocator.total)
    core.fs.statfs()


def share(core: Core) -> None:
    ino, size = size_of(core)
    core.fs.remap_file_range(ino, 0, ino, size, size)


def truncate(core: Core) -> None:
    core.fs.set_size(size_of(core)[0], PAGE_SIZE)


def unlink_and_commit(core: Core) -> None:
    core.fs.unlink(ROOT_INO, b"huge")
    core.fs.unlink(ROOT_INO, b"clone")
    core.fs.commit()


def allocate(core: Core) -> None:
    core.file(b"new", bytes(100 * PAGE_SIZE))


def unmount_and_mount(core: Core) -> None:
    core.fs.unlink(ROOT_INO, b"huge")  # a mount would reserve it
    core.fs.unlink(ROOT_INO, b"clone")
    core.reopen()


def remove(core: Core) -> None:
    core.sound = False
    pages = core.pmem.dax.size // PAGE_SIZE
    incident = core.mm.removal(core.pmem.dax.base_pfn, pages, core.pmem.dax.kill_dax)
    assert incident.whole_device


def check(core: Core) -> None:
    assert fsck(core.fs) == []


OPERATIONS: list[Callable[[Core], None]] = [
    fail_everything,
    collect_everything,
    poison_and_clear_everything,
    write_in_the_midst,
    ask,
    share,
    truncate,
    unlink_and_commit,
    allocate,
    unmount_and_mount,
    remove,
    check,
]


def calls_of(operation: Callable[[Core], None], size: int) -> int:
    with core_at(size=size) as core:
        a_huge_file(core)
        with Calls() as calls:
            operation(core)
        return calls.count


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_a_thousand_times_the_size_is_the_same_work(operation: Callable[[Core], None]) -> None:
    small, large = calls_of(operation, SMALL), calls_of(operation, LARGE)
    assert small > 5
    assert abs(large - small) <= 20 + small // 20


def test_the_counter_counts() -> None:
    with Calls() as few:
        [abs(n) for n in range(10)]
    with Calls() as many:
        [abs(n) for n in range(1000)]
    assert few.count < 30
    assert many.count >= 1000


class Counted:
    """A holder with nothing but counters."""

    def __init__(self) -> None:
        self.told: list[tuple[int, int, int]] = []

    def before_poison(self) -> None:
        """No grant depends on the health of the media."""

    def notify_failure(self, offset: int, length: int, flags: int) -> None:
        self.told.append((offset, length, flags))


def test_a_failure_of_all_6_tib_is_one_call_of_the_holder_and_so_is_removal() -> None:
    with core_at(size=LARGE) as core:
        core.without_filesystem()
        holder = Counted()
        core.pmem.dax.hold(holder)
        core.mm.memory_failure(core.pmem.dax.base_pfn, LARGE // PAGE_SIZE, 0)
        core.pmem.dax.kill_dax()
        assert holder.told == [(0, LARGE, 0), (0, U64_MAX, MF_MEM_PRE_REMOVE)]


def test_a_device_of_6_tib_takes_megabytes() -> None:
    with core_at(size=LARGE) as core:
        core.file(data=b"x")
        core.fs.commit()
        assert sum(file.stat().st_blocks * 512 for file in core.path.iterdir()) < 8 << 20
