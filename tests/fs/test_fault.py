"""Faults of direct mappings: Filesystem.fault() and Filesystem.runs(), and reports to MappingOps."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from daxemu.errors import MediaError, NoSpace, Shutdown
from daxemu.fs.fault import FaultKind, FileRun
from daxemu.fs.filesystem import Filesystem
from daxemu.ranges import Range
from daxemu.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, HPAGE_PMD_NR, PAGE_SIZE, PMD_SIZE, Ino
from tests.support.core import Core, core_at, pages
from tests.support.followed import Followed
from tests.support.layouts import Holder

HOLE, MAPPED, BEYOND_EOF = FaultKind.HOLE, FaultKind.MAPPED, FaultKind.BEYOND_EOF
PUNCH = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE


def media_of(core: Core, run: FileRun) -> bytes:
    return bytes(core.fs.dax.direct_access(run.dev_block * PAGE_SIZE, run.length * PAGE_SIZE))


@pytest.fixture
def sparse(core: Core) -> Ino:
    """A file of blocks AB, a hole of two, C, and half a block D."""
    ino = core.file(data=pages("ABxxC") + b"D" * 2048)
    core.fs.fallocate(ino, PUNCH, 2 * PAGE_SIZE, 2 * PAGE_SIZE)
    core.fs.commit()
    return ino


def test_the_runs_of_a_range_have_no_gaps(core: Core, sparse: Ino) -> None:
    first = core.fs.extents_of(sparse).lookup(0, 1)[0].dev_block
    assert list(core.fs.runs(sparse, Range(1, 9))) == [
        FileRun(MAPPED, 1, 1, first + 1),
        FileRun(HOLE, 2, 2),
        FileRun(MAPPED, 4, 2, first + 4),
        FileRun(BEYOND_EOF, 6, 3),
    ]
    assert list(core.fs.runs(sparse, Range(7, 8))) == [FileRun(BEYOND_EOF, 7, 1)]


def test_links_that_continue_on_the_device_are_one_run(core: Core) -> None:
    ino = core.file(data=pages("ABCD"))
    clone = core.clone(ino, b"clone")
    core.fs.set_size(clone, PAGE_SIZE)  # the clone shares one block of four
    core.fs.commit()
    first = core.fs.extents_of(ino).lookup(0, 1)[0].dev_block
    assert list(core.fs.runs(ino, Range(0, 4))) == [
        FileRun(MAPPED, 0, 1, first, is_shared=True),
        FileRun(MAPPED, 1, 3, first + 1),
    ]


@pytest.mark.parametrize(
    ("block", "limit", "expected"),
    [
        (0, 1, (MAPPED, 0, 1)),
        (1, 16, (MAPPED, 0, 2)),
        (3, 16, (HOLE, 2, 2)),
        (3, 1, (HOLE, 3, 1)),
        (5, 4, (MAPPED, 4, 2)),
        (6, 16, (BEYOND_EOF, 6, 10)),
        (40, 8, (BEYOND_EOF, 40, 8)),
    ],
)
def test_a_load_fault_names_the_run_around_the_block(
    core: Core, sparse: Ino, block: int, limit: int, expected: tuple[FaultKind, int, int]
) -> None:
    run = core.fs.fault(sparse, block, is_store=False, limit=limit)
    assert (run.kind, run.file_block, run.length) == expected
    assert core.fs.extents_of(sparse).blocks == 4


def test_a_store_fault_allocates_one_block_of_a_hole(core: Core, sparse: Ino) -> None:
    followed = Followed(core.fs)
    run = core.fs.fault(sparse, 3, is_store=True, limit=1)
    assert (run.kind, run.file_block, run.length, run.is_shared) == (MAPPED, 3, 1, False)
    assert media_of(core, run) == bytes(PAGE_SIZE)
    assert followed.since(sparse) == {3}
    assert core.fs.fault(sparse, 2, is_store=False, limit=1).kind is HOLE


def test_a_store_fault_copies_one_shared_block(core: Core) -> None:
    ino = core.file(data=pages("AB"))
    clone = core.clone(ino, b"clone")
    before = core.fs.fault(ino, 1, is_store=False, limit=16)
    assert before == FileRun(MAPPED, 0, 2, before.dev_block, is_shared=True)
    followed = Followed(core.fs)
    run = core.fs.fault(ino, 1, is_store=True, limit=16)
    assert (run.file_block, run.length, run.is_shared) == (1, 1, False)
    assert run.dev_block != before.dev_block + 1
    assert media_of(core, run) == pages("B")
    assert followed.since(ino) == {1}
    assert core.fs.fault(clone, 1, is_store=False, limit=1).dev_block == before.dev_block + 1


def test_a_block_given_up_by_its_other_owner_is_shared_until_the_commit(core: Core) -> None:
    ino = core.file(data=pages("A"))
    clone = core.clone(ino, b"clone")
    core.fs.set_size(clone, 0)
    assert core.fs.fault(ino, 0, is_store=False, limit=1).is_shared
    core.fs.commit()
    assert not core.fs.fault(ino, 0, is_store=False, limit=1).is_shared


def test_a_store_fault_on_a_block_of_its_own_changes_no_extent(core: Core, sparse: Ino) -> None:
    followed = Followed(core.fs)
    before = core.fs.fault(sparse, 0, is_store=False, limit=4)
    assert core.fs.fault(sparse, 0, is_store=True, limit=4) == before
    assert followed.seen == {}


def test_a_store_fault_sets_the_times_and_a_load_fault_does_not(core: Core, sparse: Ino) -> None:
    inode = core.fs.names.get(sparse)
    inode.mtime = inode.ctime = 1
    core.fs.fault(sparse, 0, is_store=False, limit=1)
    core.fs.fault(sparse, 40, is_store=True, limit=1)
    assert (inode.mtime, inode.ctime) == (1, 1)
    core.fs.fault(sparse, 0, is_store=True, limit=1)
    assert inode.mtime == inode.ctime > 1


def test_poison_of_an_own_block_is_mapped_and_of_a_shared_block_refuses_the_copy(core: Core) -> None:
    ino = core.file(data=pages("AB"))
    core.poison(ino, 0)
    assert core.fs.fault(ino, 0, is_store=True, limit=1).kind is MAPPED
    clone = core.clone(ino, b"clone")
    before = core.fs.extents_of(ino).lookup(0, 1)[0].dev_block
    with pytest.raises(MediaError):
        core.fs.fault(ino, 0, is_store=True, limit=1)
    assert core.fs.fault(clone, 0, is_store=False, limit=1).dev_block == before
    assert core.fs.extents_of(ino).lookup(0, 1)[0].dev_block == before


def test_poison_of_a_block_that_is_shared_only_until_the_commit_is_mapped(core: Core) -> None:
    ino = core.file(data=pages("AB"))
    clone = core.clone(ino, b"clone")
    core.fs.commit()
    core.poison(ino, 0)
    core.fs.write(clone, 0, pages("C"))
    assert core.fs.fault(ino, 0, is_store=True, limit=1).is_shared
    core.fs.commit()
    assert not core.fs.fault(ino, 0, is_store=True, limit=1).is_shared


def test_a_full_device_refuses_a_store_fault_and_changes_nothing(core: Core) -> None:
    ino = core.file()
    core.fs.set_size(ino, 4 * PAGE_SIZE)
    core.fs.fallocate(core.file(b"full"), 0, 0, core.fs.statfs().available * PAGE_SIZE)
    followed = Followed(core.fs)
    with pytest.raises(NoSpace):
        core.fs.fault(ino, 0, is_store=True, limit=1)
    assert core.fs.extents_of(ino).blocks == 0
    assert followed.since(ino) == set()


def test_a_full_device_needs_no_copy_for_the_last_owner_of_a_block(core: Core) -> None:
    ino = core.file(data=pages("A"))
    clone = core.clone(ino, b"clone")
    core.fs.fallocate(core.file(b"full"), 0, 0, core.fs.statfs().available * PAGE_SIZE)
    core.fs.set_size(clone, 0)
    run = core.fs.fault(ino, 0, is_store=True, limit=1)
    assert media_of(core, run) == pages("A")


def test_a_fault_after_a_shutdown_is_refused(core: Core, sparse: Ino) -> None:
    core.fs.shutdown("a test")
    core.sound = False
    with pytest.raises(Shutdown):
        core.fs.fault(sparse, 0, is_store=False, limit=1)
    with pytest.raises(Shutdown):
        core.fs.runs(sparse, Range(0, 1))


# -- 2 MiB


@pytest.fixture
def huge() -> Iterator[Core]:
    with core_at(size=32 * PMD_SIZE, align=PMD_SIZE) as made:
        yield made


def test_a_store_fault_allocates_2_mib_where_dax_maps_2_mib(huge: Core) -> None:
    ino = huge.file()
    huge.fs.set_size(ino, 2 * PMD_SIZE + PAGE_SIZE)
    run = huge.fs.fault(ino, HPAGE_PMD_NR + 7, is_store=True, limit=HPAGE_PMD_NR)
    assert (run.file_block, run.length) == (HPAGE_PMD_NR, HPAGE_PMD_NR)
    assert run.dev_block % HPAGE_PMD_NR == 0


@pytest.mark.parametrize(
    ("block", "limit"), [(7, 1), (2 * HPAGE_PMD_NR, HPAGE_PMD_NR), (HPAGE_PMD_NR + 1, 512)]
)
def test_a_store_fault_allocates_one_block_where_dax_falls_back(huge: Core, block: int, limit: int) -> None:
    """A mapping of less than 2 MiB; the end of the file within the 2 MiB; a block in the 2 MiB already."""
    ino = huge.file()
    huge.fs.set_size(ino, 2 * PMD_SIZE + PAGE_SIZE)
    huge.fs.write(ino, PMD_SIZE, b"x")
    run = huge.fs.fault(ino, block, is_store=True, limit=limit)
    assert huge.fs.extents_of(ino).blocks == 2
    assert run.file_block <= block < run.file_end


# -- reports


@pytest.mark.parametrize(
    ("verb", "expected"),
    [
        (lambda fs, ino: fs.set_size(ino, PAGE_SIZE), {1, 2, 3, 4, 5}),
        (lambda fs, ino: fs.set_size(ino, 8 * PAGE_SIZE), {6, 7}),
        (lambda fs, ino: fs.fallocate(ino, PUNCH, PAGE_SIZE, PAGE_SIZE), {1}),
        (lambda fs, ino: fs.fallocate(ino, 0, 0, 4 * PAGE_SIZE), {2, 3}),
        (lambda fs, ino: fs.fallocate(ino, 16, 0, PAGE_SIZE), {0}),
        (lambda fs, ino: fs.write(ino, 2 * PAGE_SIZE, b"x"), {2}),
        (lambda fs, ino: fs.write(ino, 0, b"x"), set()),
        (lambda fs, ino: fs.write(ino, 7 * PAGE_SIZE, b"x"), {6, 7}),
        (lambda fs, ino: fs.unlink(1, b"f"), {0, 1, 2, 3, 4, 5}),
    ],
)
def test_a_verb_reports_the_blocks_that_it_moves(
    core: Core, sparse: Ino, verb: Callable[[Filesystem, Ino], object], expected: set[int]
) -> None:
    followed = Followed(core.fs)
    verb(core.fs, sparse)
    assert followed.since(sparse) == expected


def test_a_clone_reports_both_files(core: Core) -> None:
    ino, other = core.file(data=pages("ABCD")), core.file(b"other", pages("xyz"))
    followed = Followed(core.fs)
    core.fs.remap_file_range(ino, PAGE_SIZE, other, 2 * PAGE_SIZE, 2 * PAGE_SIZE)
    assert followed.seen == {ino: {1, 2}, other: {2, 3}}


def test_a_write_to_a_shared_block_reports_the_block(core: Core) -> None:
    ino = core.file(data=pages("ABCD"))
    core.clone(ino, b"clone")
    followed = Followed(core.fs)
    core.fs.write(ino, 2 * PAGE_SIZE, b"x")
    assert followed.since(ino) == {2}


# -- the end of a mapped file


def store(core: Core, ino: Ino, offset: int, data: bytes) -> None:
    """Store through a direct mapping."""
    run = core.fs.fault(ino, offset // PAGE_SIZE, is_store=True, limit=1)
    at = run.dev_block * PAGE_SIZE + offset % PAGE_SIZE
    core.fs.dax.direct_access(at, len(data))[:] = data


GROWTH = [
    lambda fs, ino: fs.set_size(ino, 2 * PAGE_SIZE),
    lambda fs, ino: fs.write(ino, 2 * PAGE_SIZE - 1, b"\0"),
    lambda fs, ino: fs.fallocate(ino, 0, 0, 2 * PAGE_SIZE),
]


@pytest.mark.parametrize("grow", GROWTH)
def test_a_store_beyond_the_end_is_not_seen_after_the_file_grows(
    core: Core, grow: Callable[[Filesystem, Ino], object]
) -> None:
    ino = core.file(data=b"A" * 100)
    store(core, ino, 50, b"m" * 200)
    grow(core.fs, ino)
    assert core.read(ino) == b"A" * 50 + b"m" * 50 + bytes(2 * PAGE_SIZE - 100)


@pytest.mark.parametrize("grow", GROWTH)
def test_a_mapped_file_does_not_grow_over_poison_in_its_last_block(
    core: Core, grow: Callable[[Filesystem, Ino], object]
) -> None:
    """xfs_zero_range() fails."""
    ino = core.file(data=b"A" * 100)
    store(core, ino, 50, b"m" * 200)
    core.poison(ino, 0)
    with pytest.raises(MediaError):
        grow(core.fs, ino)
    assert core.fs.names.get(ino).size == 100


def test_a_clone_has_no_store_beyond_the_end_either(core: Core) -> None:
    ino = core.file(data=b"A" * 100)
    store(core, ino, 50, b"m" * 200)
    clone = core.clone(ino, b"clone")
    core.fs.set_size(clone, 300)
    assert core.read(clone) == b"A" * 50 + b"m" * 50 + bytes(200)


@pytest.mark.parametrize("save", [True, False])
def test_a_store_beyond_the_end_is_gone_after_a_mount(core: Core, save: bool) -> None:
    ino = core.file(data=b"A" * 100)
    core.fs.commit()
    store(core, ino, 50, b"m" * 200)
    core.close(save=save)
    core.open()
    core.fs.set_size(ino, 300)
    assert core.read(ino) == b"A" * 50 + b"m" * 50 + bytes(200)


def test_no_layout_goes_beyond_the_end_of_a_mapped_file(core: Core) -> None:
    holder = Holder(core.fs)
    ino = core.file(data=b"A" * 100)
    core.read(ino)
    assert holder.runs[ino][0].end == PAGE_SIZE
    core.fs.fault(ino, 0, is_store=True, limit=1)
    assert ino not in holder.runs
    core.read(ino)
    assert holder.runs[ino][0].end == 100
