"""File offset -> device extent: one file's block map (fs/xfs/libxfs/xfs_bmap.c), kept in step with the
reverse map.

All positions and lengths are blocks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from operator import attrgetter
from typing import NamedTuple

from daxemu.fs.rmap import Link, Rmap
from daxemu.ranges import Range, paired
from daxemu.uapi import Block, Ino

_file_block = attrgetter("file_block")


class Mapping(NamedTuple):
    """A run of a file, and where it is (``struct iomap``). A hole has no ``link``."""

    file_block: Block
    length: int
    link: Link | None

    @property
    def dev_block(self) -> Block:
        """Where the run starts on the device. Precondition: not a hole."""
        assert self.link is not None
        return self.link.dev_block + self.file_block - self.link.file_block


class ExtentMap:
    """The links of file ``ino``, in file order and disjoint. The only code that changes a link or the reverse
    map.
    """

    __slots__ = ("_links", "_rmap", "blocks", "ino")

    def __init__(self, ino: Ino, rmap: Rmap) -> None:
        self.ino = ino
        self.blocks = 0
        """Blocks mapped, holes not counted: what st_blocks is made of."""
        self._rmap = rmap
        self._links: list[Link] = []

    def __len__(self) -> int:
        return len(self._links)

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links)

    def _index_after(self, block: Block) -> int:
        """Index of the first link that ends after ``block``."""
        index = bisect_right(self._links, block, key=_file_block)
        if index and self._links[index - 1].file_end > block:
            return index - 1
        return index

    def lookup(self, start: Block, end: Block) -> list[Mapping]:
        """``[start, end)`` of the file as mapped runs and holes, in order, without gaps."""
        return list(self.runs(start, end))

    def runs(self, start: Block, end: Block) -> Iterator[Mapping]:
        """As :meth:`lookup`, one by one. Precondition: nobody changes the map meanwhile."""
        at, index = start, self._index_after(start)
        while at < end:
            if index == len(self._links) or self._links[index].file_block >= end:
                yield Mapping(at, end - at, None)
                return
            link = self._links[index]
            if at < link.file_block:
                yield Mapping(at, link.file_block - at, None)
                at = link.file_block
            run_end = min(link.file_end, end)
            yield Mapping(at, run_end - at, link)
            at = run_end
            index += 1

    def goal(self, block: Block) -> Block | None:
        """Where on the device what the file has before ``block`` goes on; None after a hole, or nothing."""
        before = self.lookup(max(0, block - 1), block)
        return before[0].dev_block + 1 if before and before[0].link is not None else None

    def insert(self, file_block: Block, dev_block: Block, length: int) -> None:
        """Map a hole of the file to blocks nobody else uses.

        Preconditions: the file has a hole there; no link has any of the blocks.
        """
        index = self._index_after(file_block)
        self.blocks += length
        if index:
            before = self._links[index - 1]
            # Growing keeps a sequentially written file at one link. A shared link does not grow: its proxy
            # would come to stand for blocks that were never shared.
            if before.file_end == file_block and before.dev_end == dev_block and before.proxy is None:
                self._rmap.reshape(before, length=before.length + length)
                return
        link = Link(self.ino, file_block, dev_block, length)
        self._links.insert(index, link)
        self._rmap.add(link)

    def fill(self, holes: Iterable[Range], fresh: Iterable[Range]) -> None:
        """Map ``holes`` of the file to device blocks that nobody else uses, and that are as many."""
        for hole, run in paired(holes, fresh):
            self.insert(hole.start, run.start, run.length)

    def remove(self, start: Block, end: Block) -> list[Range]:
        """Make ``[start, end)`` of the file a hole. Returns the device blocks that nobody uses any more."""
        if start >= end:
            return []
        index = self._index_after(start)
        freed: list[Range] = []
        while index < len(self._links) and self._links[index].file_block < end:
            link = self._links[index]
            cut = Range(link.file_block, link.file_end).clip(start, end)
            dev_start = link.dev_block + cut.start - link.file_block
            index += self._cut(index, link, cut)
            self.blocks -= cut.length
            if link.proxy is None:
                freed.append(Range(dev_start, dev_start + cut.length))
            else:
                unused = self._rmap.unreferenced(dev_start, dev_start + cut.length)
                self._rmap.give_up(dev_start, dev_start + cut.length, unused)
                freed += unused
        return freed

    def _cut(self, index: int, link: Link, cut: Range) -> int:
        """Take ``cut`` (in file blocks) out of ``link``; returns how many links stay at or before its
        place.
        """
        front, back = cut.start - link.file_block, link.file_end - cut.end
        if front and back:
            tail = Link(self.ino, cut.end, link.dev_end - back, back, link.proxy)
            self._rmap.reshape(link, length=front)
            self._rmap.add(tail)
            self._links.insert(index + 1, tail)
            return 1
        if front:
            self._rmap.reshape(link, length=front)
            return 1
        if back:
            self._rmap.reshape(link, trim_front=cut.length, length=back)
            return 1
        self._rmap.discard(link)
        del self._links[index]
        return 0

    def clone_from(self, source: ExtentMap, src_start: Block, length: int, dst_start: Block) -> None:
        """Share ``source``'s blocks ``[src_start, src_start + length)`` at ``dst_start`` here; holes stay
        holes.

        Precondition: there is a hole here, and the two ranges do not overlap if ``source`` is this very map.
        """
        for run in source.lookup(src_start, src_start + length):
            if run.link is None:
                continue
            proxy = self._rmap.share(run.link)
            link = Link(self.ino, dst_start + run.file_block - src_start, run.dev_block, run.length, proxy)
            self._links.insert(self._index_after(link.file_block), link)
            self._rmap.add(link)
            self.blocks += run.length

    def adopt(self, links: list[Link]) -> None:
        """Take over links read from a store. Precondition: this map is empty, they are in order and
        disjoint.
        """
        self._links = links
        self.blocks = sum(link.length for link in links)
        self._rmap.adopt(links)
