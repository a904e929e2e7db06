"""File offset -> device extent: the block map of a file, kept in step with the reverse map (xfs_bmap.c).

All positions and lengths are blocks. Counterpart in Linux: fs/xfs/libxfs/xfs_bmap.c.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator
from operator import attrgetter

import msgspec

from daxemu.fs.rmap import Link, ReflinkProxy, Rmap
from daxemu.ranges import Range, merged, paired
from daxemu.uapi import Block, Ino

_file_block, _length = attrgetter("file_block"), attrgetter("length")


class Mapping(msgspec.Struct, frozen=True, gc=False):
    """A run of a file and its device extent (``struct iomap``). A hole has no ``link``."""

    file_block: Block
    length: int
    link: Link | None

    @property
    def dev_block(self) -> Block:
        """The first device block of the run. Precondition: the run is not a hole."""
        assert self.link is not None
        inside = self.file_block - self.link.file_block
        return self.link.dev_block + inside if inside else self.link.dev_block


class ExtentMap:
    """The links of file ``ino``, in file order and disjoint.

    Only this class changes a link or the reverse map.
    """

    __slots__ = ("_links", "_rmap", "blocks", "ino")

    def __init__(self, ino: Ino, rmap: Rmap) -> None:
        self.ino = ino
        self.blocks = 0
        """Number of mapped blocks, without holes: the source of st_blocks."""
        self._rmap = rmap
        self._links: list[Link] = []

    def __len__(self) -> int:
        return len(self._links)

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links)

    def _index_after(self, block: Block) -> int:
        """Return the index of the first link with an end after ``block``."""
        index = bisect_right(self._links, block, key=_file_block)
        if index and self._links[index - 1].file_end > block:
            return index - 1
        return index

    def lookup(self, start: Block, end: Block) -> list[Mapping]:
        """Return ``[start, end)`` of the file as mapped runs and holes, in order, without gaps."""
        return list(self.runs(start, end))

    def runs(self, start: Block, end: Block) -> Iterator[Mapping]:
        """As :meth:`lookup`, one run at a time.

        Precondition: the map does not change during the iteration.
        """
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

    def around(self, block: Block, within: Range) -> Mapping:
        """Return the link or the hole at ``block``, cut to ``within``. Precondition: ``block`` is inside."""
        index = self._index_after(block)
        after = self._links[index] if index < len(self._links) else None
        if after is not None and after.file_block <= block:
            whole = Range(after.file_block, after.file_end).clip(*within)
            return Mapping(whole.start, whole.length, after)
        start = self._links[index - 1].file_end if index else 0
        hole = Range(start, after.file_block if after is not None else within.end).clip(*within)
        return Mapping(hole.start, hole.length, None)

    def piece(self, start: Block, end: Block, links: int) -> Block:
        """Return where the first piece of ``[start, end)`` ends. A piece has at most ``links`` links."""
        last = self._index_after(start) + links - 1
        return min(end, self._links[last].file_end) if last + 1 < len(self._links) else end

    def count(self, start: Block, end: Block) -> int:
        """Return the number of links with blocks in ``[start, end)``."""
        first = self._index_after(start)
        return max(0, bisect_left(self._links, end, key=_file_block) - first)

    def last_piece(self, start: Block, links: int) -> Block:
        """Return where the last piece of the file from block ``start`` on begins. A piece has at most
        ``links`` links.
        """
        before = len(self._links) - links
        return max(start, self._links[before].file_block) if before > 0 else start

    def holes(self, start: Block, end: Block) -> list[Range]:
        """Return the blocks of ``[start, end)`` that are holes."""
        return [
            Range(run.file_block, run.file_block + run.length)
            for run in self.runs(start, end)
            if run.link is None
        ]

    def goal(self, block: Block) -> Block | None:
        """Return the device block to continue the file contiguously at ``block``; None after a hole."""
        before = self.lookup(max(0, block - 1), block)
        return before[0].dev_block + 1 if before and before[0].link is not None else None

    def insert(self, file_block: Block, dev_block: Block, length: int) -> None:
        """Map a hole of the file to unused device blocks.

        Preconditions:
        - The file has a hole at ``[file_block, file_block + length)``.
        - No link has any of the device blocks.
        """
        index = self._index_after(file_block)
        self.blocks += length
        self._rmap.on_remap.call_chain(self.ino, Range(file_block, file_block + length))
        if index:
            before = self._links[index - 1]
            # Growing keeps a sequentially written file at one link. A shared link does not grow: the proxy
            # would then stand for blocks that were never shared.
            if before.file_end == file_block and before.dev_end == dev_block and before.proxy is None:
                self._rmap.reshape(before, length=before.length + length)
                return
        link = Link(self.ino, file_block, dev_block, length)
        self._links.insert(index, link)
        self._rmap.add([link])

    def fill(self, holes: Iterable[Range], fresh: Iterable[Range]) -> None:
        """Map ``holes`` of the file to the unused device blocks ``fresh``, of the same total length."""
        for hole, run in paired(holes, fresh):
            self.insert(hole.start, run.start, run.length)

    def remove(self, start: Block, end: Block) -> list[Range]:
        """Make ``[start, end)`` of the file a hole. Return the device blocks left without a link."""
        first = self._index_after(start)
        last = max(first, bisect_left(self._links, end, key=_file_block))
        if start >= end or first == last:
            return []
        self._rmap.on_remap.call_chain(
            self.ino, Range(self._links[first].file_block, self._links[last - 1].file_end).clip(start, end)
        )
        freed: list[Range] = []
        shared: list[tuple[Range, ReflinkProxy]] = []
        for link in self._links[first:last]:
            cut = Range(link.file_block, link.file_end).clip(start, end)
            delta = link.dev_block - link.file_block
            blocks = Range(cut.start + delta, cut.end + delta)
            self.blocks -= cut.length
            if link.proxy is None:
                freed.append(blocks)
            else:
                shared.append((blocks, link.proxy))
        self._cut(first, last, start, end)
        freed += merged(sorted(blocks for blocks, proxy in shared if not proxy.refcount))
        for blocks in merged(sorted(blocks for blocks, proxy in shared if proxy.refcount)):
            unused = self._rmap.unreferenced(*blocks)
            self._rmap.give_up(*blocks, unused)
            freed += unused
        return freed

    def _cut(self, first: int, last: int, start: Block, end: Block) -> None:
        """Remove file blocks ``[start, end)`` from the links ``[first, last)``.

        Precondition: each link overlaps.
        """
        head, tail = self._links[first], self._links[last - 1]
        if head.file_block < start:
            first += 1
            if head.file_end > end:
                back = head.file_end - end
                rest = Link(self.ino, end, head.dev_end - back, back, head.proxy)
                self._links.insert(first, rest)
                self._rmap.add([rest])
            self._rmap.reshape(head, length=start - head.file_block)
        if tail.file_end > end:
            last -= 1
            self._rmap.reshape(tail, trim_front=end - tail.file_block, length=tail.file_end - end)
        self._rmap.discard(self._links[first:last])
        del self._links[first:last]

    def clone_from(self, source: ExtentMap, src_start: Block, length: int, dst_start: Block) -> None:
        """Share ``length`` blocks of ``source`` from ``src_start`` on at ``dst_start``. Holes stay holes.

        Preconditions:
        - This map has a hole at the destination.
        - The two ranges do not overlap if ``source`` is this map.
        """
        runs = [(run, run.link) for run in source.runs(src_start, src_start + length) if run.link is not None]
        for run, _ in runs:
            self._rmap.on_remap.call_chain(source.ino, Range(run.file_block, run.file_block + run.length))
        self._rmap.share([link for _, link in runs])
        delta = dst_start - src_start
        # A clone of a whole file reuses the int objects of the source: a hundred owners are found faster so.
        links = [
            Link(
                self.ino,
                run.file_block + delta if delta else run.file_block,
                run.dev_block,
                run.length,
                link.proxy,
            )
            for run, link in runs
        ]
        at = self._index_after(dst_start)
        self._links[at:at] = links
        self._rmap.add(links)
        self.blocks += sum(link.length for link in links)
        for link in links:
            self._rmap.on_remap.call_chain(self.ino, Range(link.file_block, link.file_end))

    def adopt(self, links: list[Link]) -> None:
        """Take over links read from the store. The store adds the links to the reverse map.

        Preconditions:
        - This map is empty.
        - The links are in order and disjoint.
        """
        self._links = links
        self.blocks = sum(map(_length, links))
