"""fsck reports each broken invariant. Each is broken by hand in an otherwise sound filesystem."""

from __future__ import annotations

import stat
from collections.abc import Callable

import pytest

from daxemu.fs.fsck import fsck
from daxemu.fs.inode import ROOT_INO
from daxemu.fs.rmap import Link, ReflinkProxy
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE
from tests.support.core import Core, pages


class Sample:
    """/f of three blocks, /g sharing the first two, /h with a hole, /d/e a directory in a directory."""

    def __init__(self, core: Core) -> None:
        self.core, self.fs = core, core.fs
        core.sound = False
        self.f = core.file(b"f", pages("AB") + b"tail")
        self.g = core.file(b"g")
        self.fs.remap_file_range(self.f, 0, self.g, 0, 2 * PAGE_SIZE)
        self.h = core.file(b"h", pages("x"))
        self.fs.write(self.h, 5 * PAGE_SIZE, pages("y"))
        self.d = core.dir(b"d").ino
        self.e = core.dir(b"e", self.d).ino

    def link(self, ino: int, index: int = 0) -> Link:
        return list(self.fs.extents_of(ino))[index]

    def links(self, ino: int) -> list[Link]:
        return self.fs.extents_of(ino)._links


def lost_from_rmap(s: Sample) -> None:
    s.fs.rmap.discard([s.link(s.h)])


def stray_in_rmap(s: Sample) -> None:
    s.fs.rmap.add([Link(s.h, 100, 1500, 1)])
    s.fs.allocator.take(Range(1500, 1501))


def miscounted_rmap(s: Sample) -> None:
    s.fs.rmap.link_count += 1


def overlap_in_the_file(s: Sample) -> None:
    s.link(s.h, 1).file_block = 0


def wrong_order(s: Sample) -> None:
    s.links(s.h).reverse()


def empty_link(s: Sample) -> None:
    s.fs.rmap.reshape(s.link(s.h), length=0)


def link_of_another(s: Sample) -> None:
    s.link(s.h).ino = s.f


def outside_the_device(s: Sample) -> None:
    s.fs.rmap.reshape(s.link(s.h, 1), trim_front=0, length=5000)


def another_proxy(s: Sample) -> None:
    link = s.link(s.g)
    assert link.proxy is not None
    link.proxy.refcount -= 1
    link.proxy = ReflinkProxy(99)
    link.proxy.refcount = 1


def no_proxy(s: Sample) -> None:
    link = s.link(s.g)
    assert link.proxy is not None
    link.proxy.refcount -= 1
    link.proxy = None


def two_files_without_a_proxy(s: Sample) -> None:
    block = s.link(s.h).dev_block
    s.fs.extents_of(s.g).insert(10, block, 1)
    s.fs.names.get(s.g).size = 11 * PAGE_SIZE


def a_file_in_the_metadata(s: Sample) -> None:
    s.fs.extents_of(s.g).insert(10, 5, 1)  # the first superblock
    s.fs.names.get(s.g).size = 11 * PAGE_SIZE


def miscounted_proxy(s: Sample) -> None:
    proxy = s.link(s.g).proxy
    assert proxy is not None
    proxy.refcount += 1


def free_and_in_use(s: Sample) -> None:
    s.fs.allocator._free.add(s.link(s.h).dev_block, s.link(s.h).dev_end)


def leaked(s: Sample) -> None:
    s.fs.allocator.take(Range(1500, 1510))


def miscounted_blocks(s: Sample) -> None:
    s.fs.extents_of(s.h).blocks += 1


def dirt_beyond_the_end(s: Sample) -> None:
    (place,) = s.fs.device_ranges(s.f, 2 * PAGE_SIZE, 4)
    s.core.pmem.dax.direct_access(place.end, 1)[:] = b"!"


def directory_with_extents(s: Sample) -> None:
    s.fs.names.get(s.h).mode = stat.S_IFIFO | 0o644


def name_of_nothing(s: Sample) -> None:
    s.fs.names.directory(ROOT_INO)[1][b"ghost"] = 4711


def too_many_links(s: Sample) -> None:
    s.fs.names.get(s.h).nlink = 2


def too_few_links(s: Sample) -> None:
    s.fs.names.directory(ROOT_INO)[1][b"again"] = s.h


def wrong_directory_count(s: Sample) -> None:
    s.fs.names.get(s.d).nlink = 2


def wrong_parent(s: Sample) -> None:
    s.fs.names.get(s.e).parent = ROOT_INO


def unlinked_and_unused(s: Sample) -> None:
    del s.fs.names.directory(ROOT_INO)[1][b"h"]
    s.fs.names.get(s.h).nlink = 0


def no_root(s: Sample) -> None:
    del s.fs.names._inodes[ROOT_INO]
    for inode in list(s.fs.names):
        inode.nlink = 0
        s.fs.pin(inode)


def directories_in_a_ring(s: Sample) -> None:
    """All link counts are right, but the directories cannot be reached."""
    _, root = s.fs.names.directory(ROOT_INO)
    del root[b"d"]
    s.fs.names.get(ROOT_INO).nlink -= 1
    _, entries = s.fs.names.directory(s.e)
    entries[b"d"] = s.d
    s.fs.names.get(s.d).parent = s.e
    s.fs.names.get(s.e).nlink += 1


BROKEN: list[Callable[[Sample], None]] = [
    lost_from_rmap,
    stray_in_rmap,
    miscounted_rmap,
    overlap_in_the_file,
    wrong_order,
    empty_link,
    link_of_another,
    outside_the_device,
    another_proxy,
    no_proxy,
    two_files_without_a_proxy,
    a_file_in_the_metadata,
    miscounted_proxy,
    free_and_in_use,
    leaked,
    miscounted_blocks,
    dirt_beyond_the_end,
    directory_with_extents,
    name_of_nothing,
    too_many_links,
    too_few_links,
    wrong_directory_count,
    wrong_parent,
    unlinked_and_unused,
    no_root,
    directories_in_a_ring,
]


def test_fsck_of_a_sound_filesystem_is_empty(core: Core) -> None:
    assert fsck(Sample(core).fs) == []


@pytest.mark.parametrize("damage", BROKEN, ids=lambda damage: damage.__name__)
def test_fsck_reports_each_broken_invariant(core: Core, damage: Callable[[Sample], None]) -> None:
    sample = Sample(core)
    damage(sample)
    wrong = fsck(sample.fs)
    assert wrong
    assert all(line and "\n" not in line for line in wrong)
