"""Verbs in pieces: at each yield the filesystem is sound, and the file is as the verb's docstring says."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from daxemu.errors import FsError, MediaError, NoSpace
from daxemu.fs import pieces
from daxemu.fs.allocator import Allocator
from daxemu.fs.fsck import fsck
from daxemu.fs.inode import ROOT_INO
from daxemu.pmem.inject import inject, uninject
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE, PAGE_SIZE, Ino
from tests.support.core import Core

LINKS = 40
PUNCH, ZERO = FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, FALLOC_FL_ZERO_RANGE


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "PIECE_LINKS", 8)
    monkeypatch.setattr(pieces, "PIECE_BLOCKS", 16)
    monkeypatch.setattr("daxemu.fs.filesystem.PIECE_LINKS", 8)
    monkeypatch.setattr("daxemu.fs.inodegc.MANY", 8)


def fragmented(core: Core, name: bytes = b"f") -> Ino:
    """A file of LINKS blocks, each followed by a hole."""
    ino = core.file(name)
    for number in range(LINKS):
        core.fs.write(ino, number * 2 * PAGE_SIZE, b"x" * PAGE_SIZE)
    return ino


def test_a_truncated_file_is_shorter_and_whole_at_each_step(core: Core) -> None:
    ino = fragmented(core)
    sizes = []
    for _ in core.fs.set_size_in_pieces(ino, 100):
        sizes.append(core.fs.names.get(ino).size)
        assert fsck(core.fs) == []
        assert core.read(ino)[-PAGE_SIZE * 2 :].count(b"x"[0]) == PAGE_SIZE
    assert len(sizes) == LINKS // 8 - 1
    assert sizes == sorted(sizes, reverse=True)
    assert core.read(ino) == b"x" * 100


def test_a_truncation_into_poison_changes_nothing(core: Core) -> None:
    ino = fragmented(core)
    core.poison(ino, 0)
    with pytest.raises(MediaError):
        core.fs.set_size(ino, 100)
    assert core.fs.names.get(ino).size == (LINKS * 2 - 1) * PAGE_SIZE
    assert core.fs.extents_of(ino).blocks == LINKS


@pytest.mark.parametrize("mode", [0, PUNCH, ZERO])
def test_fallocate_has_done_a_prefix_at_each_step(core: Core, mode: int) -> None:
    ino = fragmented(core)
    size = core.fs.names.get(ino).size
    steps = 0
    for _ in core.fs.fallocate_in_pieces(ino, mode, 0, size):
        steps += 1
        assert fsck(core.fs) == []
        assert core.fs.names.get(ino).size == size
    assert steps >= 4
    assert core.fs.extents_of(ino).blocks == {0: 2 * LINKS - 1, PUNCH: 0, ZERO: 2 * LINKS - 1}[mode]
    assert core.read(ino).count(b"x"[0]) == (0 if mode else LINKS * PAGE_SIZE)


@pytest.mark.parametrize("mode", [PUNCH, ZERO])
def test_a_poisoned_edge_at_the_end_refuses_before_anything_changes(core: Core, mode: int) -> None:
    ino = fragmented(core)
    core.poison(ino, 2 * LINKS - 2)
    with pytest.raises(MediaError):
        core.fs.fallocate(ino, mode, 0, core.fs.names.get(ino).size - 10)
    assert core.fs.read(ino, 0, PAGE_SIZE) == b"x" * PAGE_SIZE
    assert core.fs.extents_of(ino).blocks == LINKS


def test_a_preallocation_that_fails_in_the_middle_makes_its_holes_again(
    core: Core, monkeypatch: pytest.MonkeyPatch
) -> None:
    ino = fragmented(core)
    allocate, calls = Allocator.allocate_for, 0

    def failing(self: Allocator, *args: object, **kwargs: bool) -> list[Range]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise NoSpace("the memory behind the device is full")
        return allocate(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(Allocator, "allocate_for", failing)
    with pytest.raises(NoSpace):
        core.fs.fallocate(ino, 0, 0, 4 * LINKS * PAGE_SIZE)
    assert core.fs.extents_of(ino).blocks == LINKS
    assert core.fs.names.get(ino).size == (2 * LINKS - 1) * PAGE_SIZE


@pytest.fixture
def woken(core: Core) -> Iterator[list[bool]]:
    """A task that releases blocks only when the test does. One element for each time it was woken."""
    calls: list[bool] = []
    with core.fs.reclaimer.served(lambda: calls.append(True)):
        yield calls


def test_an_unlinked_file_of_many_links_goes_in_pieces(core: Core, woken: list[bool]) -> None:
    free = core.fs.allocator.free_blocks
    ino = fragmented(core)
    core.fs.unlink(ROOT_INO, b"f")
    assert woken == [True]
    steps = 1
    while core.fs.inactivate():
        steps += 1
        assert fsck(core.fs) == []
        with pytest.raises(FsError) as refused:
            core.fs.open(core.fs.names.get(ino))
        assert refused.value.errno == errno.ESTALE
    assert steps == LINKS // 8
    assert core.fs.names.find(ino) is None
    core.fs.commit()
    assert core.fs.allocator.free_blocks >= free - 2


def test_a_full_device_takes_what_an_unlinked_file_still_has(core: Core, woken: list[bool]) -> None:
    fragmented(core)
    core.fs.commit()
    core.fs.unlink(ROOT_INO, b"f")
    left = core.fs.allocator.free_blocks
    core.fs.fallocate(core.file(b"g"), 0, 0, (left + LINKS - 8) * PAGE_SIZE)
    assert not core.fs.inodegc.is_busy


def test_settled_blocks_are_free_once_drained_and_not_before(core: Core, woken: list[bool]) -> None:
    allocator = core.fs.allocator
    ino = core.file(b"f", b"y" * 64 * PAGE_SIZE)
    (part,) = core.fs.device_ranges(ino, 0, 64 * PAGE_SIZE)
    core.fs.unlink(ROOT_INO, b"f")
    core.fs.commit()
    assert woken == [True]
    assert bytes(core.pmem.dax.direct_access(part.start, 1)) == b"y"
    assert allocator.used_in(Range(part.start // PAGE_SIZE, part.end // PAGE_SIZE)) == 64
    assert allocator.drain(blocks=16)
    assert allocator.used_in(Range(part.start // PAGE_SIZE, part.end // PAGE_SIZE)) == 48
    assert not allocator.drain()
    assert fsck(core.fs) == []


def test_usable_blocks_are_free_ones_without_bad_sectors_in_every_state(
    core: Core, woken: list[bool]
) -> None:
    allocator = core.fs.allocator

    def check() -> None:
        bad = RangeSet(
            (r.start // PAGE_SIZE, -(-r.end // PAGE_SIZE))
            for r in core.pmem.badblocks.overlapping_bytes(0, core.pmem.dax.size)
        )
        free = allocator.free_ranges()
        good = sum(part.length for run in free for part in bad.gaps(*run))
        assert allocator.usable_blocks == good

    ino = core.file(b"f", b"z" * 32 * PAGE_SIZE)
    (part,) = core.fs.device_ranges(ino, 0, 32 * PAGE_SIZE)
    inject(core.pmem, part.start, 3 * PAGE_SIZE)
    inject(core.pmem, part.end - 512, 5 * PAGE_SIZE)
    check()
    core.fs.unlink(ROOT_INO, b"f")
    check()
    uninject(core.pmem, part.start, 512)
    check()
    core.fs.commit()
    check()
    inject(core.pmem, part.start + 9 * PAGE_SIZE, 512)
    check()
    allocator.drain(blocks=10)
    check()
    allocator.drain()
    check()
    core.file(b"g", b"g" * 40 * PAGE_SIZE)
    check()
    uninject(core.pmem, 0, core.pmem.dax.size)
    check()
    assert allocator.usable_blocks == allocator.free_blocks
