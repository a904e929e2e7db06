"""Reverse map: device extent -> owners, and the reflink proxy (fs/xfs/libxfs/xfs_rmap.c).

A struct page has room for one owner. A block shared by reflink has many owners, so one object stands for all
of them: the *proxy*. A proxy is created when an extent is first shared. Every link to any part of the extent
holds the proxy, and the last link frees the proxy. An extent that was never shared has no proxy, and the only
link is the owner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from operator import attrgetter

import msgspec
from sortedcontainers import SortedDict

from daxemu.notifier import NotifierChain
from daxemu.ranges import BlockRange, IntervalIndex, Range, RangeSet, gaps_between, merged
from daxemu.uapi import Block, Ino

METADATA_INO: Ino = 0
"""Owner of the metadata blocks. No file has this number."""


class ReflinkProxy(msgspec.Struct, eq=False, gc=False):
    """Stands for all links of one shared device extent. ``refcount``: number of links with the proxy.

    ``number``: name of the proxy in the store, unique in a filesystem.
    """

    number: int
    refcount: int = 0


class Link(msgspec.Struct, eq=False, gc=False):
    """Claim of a file on ``length`` device blocks from ``dev_block`` on, for its blocks from ``file_block``
    on.

    Mutable by :class:`~daxemu.fs.extents.ExtentMap` only: both indexes of links depend on the fields.
    """

    ino: Ino
    file_block: Block
    dev_block: Block
    length: int
    proxy: ReflinkProxy | None = None

    @property
    def file_end(self) -> Block:
        return self.file_block + self.length

    @property
    def dev_end(self) -> Block:
        return self.dev_block + self.length

    def __repr__(self) -> str:
        shared = f" shared by {self.proxy.refcount}" if self.proxy else ""
        return f"<Link ino {self.ino} file {self.file_block} dev {self.dev_block} len {self.length}{shared}>"


class Owner(msgspec.Struct, frozen=True, order=True, gc=False):
    """An (inode, file range) that uses a part of a device range (``struct xfs_rmap_irec``). All in blocks."""

    ino: Ino
    file_block: Block
    dev_block: Block
    length: int


class Rmap:
    """All links of a filesystem, by device blocks."""

    def __init__(self, on_change: Callable[[Ino], None] = lambda ino: None) -> None:
        """``on_change`` is called with the inode number of each file whose links change."""
        self._on_change = on_change
        self._links: IntervalIndex[Link] = IntervalIndex(attrgetter("dev_block"), attrgetter("length"))
        self.link_count = 0
        self.dirty: dict[Ino, RangeSet] = {}
        """File blocks, by inode, whose links differ from the store."""
        self.marks = 0
        """Number of changed links since the last commit."""
        self.given_up = RangeSet()
        """Device blocks that lost a link since the last commit and still have another link.

        In the store the blocks are still shared, so the blocks count as shared until the next commit: a crash
        would restore the lost link.
        """
        self._next_proxy = 1
        self.on_remap: NotifierChain[[Ino, BlockRange]] = NotifierChain()
        """Called with the file blocks of a file that are on other device blocks than before, or on none, or
        that were not shared before.
        """

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links)

    # -- changes: for ExtentMap only, and `adopt` for a store

    def add(self, links: list[Link]) -> None:
        """Add new links of one file, in file order. Each link with a proxy counts as a reference."""
        if links:
            self._mark(links[0].ino, links[0].file_block, links[-1].file_end, len(links))
            self.adopt(links)

    def discard(self, links: list[Link]) -> None:
        """Remove links of one file, in file order. Each proxy loses one reference per link."""
        if links:
            self._mark(links[0].ino, links[0].file_block, links[-1].file_end, len(links))
        for link in links:
            self._links.discard(link)
            if link.proxy is not None:
                link.proxy.refcount -= 1
        self.link_count -= len(links)

    def reshape(self, link: Link, *, trim_front: int = 0, length: int) -> None:
        """Cut ``trim_front`` blocks off the front of ``link`` and set the length.

        The link object stays the same.
        """
        self._mark(link.ino, link.file_block, max(link.file_end, link.file_block + trim_front + length))
        if self._links.stays(link, link.dev_block + trim_front, length):
            link.length = length
        else:
            self._links.discard(link)
            link.file_block += trim_front
            link.dev_block += trim_front
            link.length = length
            self._links.add(link)

    def share(self, links: list[Link]) -> None:
        """Give a proxy to each of these links of one file, in file order, that has none."""
        alone = [link for link in links if link.proxy is None]
        for link in alone:
            link.proxy = ReflinkProxy(self._next_proxy, refcount=1)
            self._next_proxy += 1
        if alone:
            self._mark(alone[0].ino, alone[0].file_block, alone[-1].file_end, len(alone))

    def give_up(self, start: Block, end: Block, unused: list[BlockRange]) -> None:
        """Note the loss of a link to ``[start, end)``. All blocks but ``unused`` still have another link."""
        for part in gaps_between(unused, start, end):
            self.given_up.add(*part)

    def adopt(self, links: list[Link]) -> None:
        """Add links that the store already has."""
        self._links.update(links)
        self.link_count += len(links)
        for link in links:
            if link.proxy is not None:
                link.proxy.refcount += 1

    def reserve_proxies(self, below: int) -> None:
        """Use only numbers from ``below`` on for new proxies."""
        self._next_proxy = max(self._next_proxy, below)

    def _mark(self, ino: Ino, start: Block, end: Block, links: int = 1) -> None:
        """Mark a file's links in ``[start, end)`` for the next commit. Unchanged links may be included.
        ``links``: number of changed links.
        """
        self._on_change(ino)
        self.marks += links
        ranges = self.dirty.get(ino)
        if ranges is None:
            ranges = self.dirty[ino] = RangeSet()
        ranges.add(start, end)

    # -- queries

    def count(self, start: Block, end: Block) -> int:
        """Return the number of links that overlap ``[start, end)``."""
        return len(self._links.overlapping(start, end))

    def owners(self, start: Block, end: Block) -> list[Owner]:
        """Return every owner of device blocks ``[start, end)``, cut to the range."""
        owners: list[Owner] = []
        at = length = front = place = size = -1
        for link in self._links.overlapping(start, end):
            # Links that share an extent mostly have the same device blocks.
            if link.dev_block != at or link.length != length:
                at, length = link.dev_block, link.length
                front = start - at if at < start else 0
                place = at + front
                size = min(at + length, end) - place
            owners.append(Owner(link.ino, link.file_block + front, place, size))
        return owners

    def sharing(self, start: Block, end: Block) -> list[tuple[BlockRange, int]]:
        """Split ``[start, end)`` into runs used by the same number of links.

        Return each run with the number (0: free).
        """
        steps = SortedDict({start: 0, end: 0})
        for owner in self.owners(start, end):
            for block, step in ((owner.dev_block, 1), (owner.dev_block + owner.length, -1)):
                steps[block] = steps.get(block, 0) + step
        runs: list[tuple[BlockRange, int]] = []
        count = 0
        for block, following in pairwise(steps):
            count += steps[block]
            if runs and runs[-1][1] == count:
                runs[-1] = (Range(runs[-1][0].start, following), count)
            else:
                runs.append((Range(block, following), count))
        return runs

    def unreferenced(self, start: Block, end: Block) -> list[BlockRange]:
        """Return the parts of ``[start, end)`` without a link."""
        used = sorted((owner.dev_block, owner.dev_block + owner.length) for owner in self.owners(start, end))
        return list(gaps_between(merged(used), start, end))

    def shared_parts(self, link: Link, start: Block, end: Block) -> RangeSet:
        """Return the parts of ``[start, end)`` that another link uses as well, or used at the last commit.

        Precondition: all of the device blocks belong to ``link``.
        """
        shared = RangeSet()
        if link.proxy is None:
            return shared
        for part in self.given_up.overlapping(start, end):
            shared.add(*part)
        if link.proxy.refcount == 1:
            return shared
        for other in self._links.overlapping(start, end):
            if other is not link:
                shared.add(*Range(other.dev_block, other.dev_end).clip(start, end))
        return shared

    def is_shared(self, link: Link, block: Block) -> bool:
        """As shared_parts() for one device block of ``link``."""
        if link.proxy is None:
            return False
        if self.given_up.overlaps(block, block + 1):
            return True
        return link.proxy.refcount > 1 and any(
            other is not link for other in self._links.overlapping(block, block + 1)
        )

    def proxy_of(self, block: Block) -> ReflinkProxy | None:
        """Return the proxy of one device block; None if the block is free or was never shared."""
        for link in self._links.overlapping(block, block + 1):
            return link.proxy
        return None
