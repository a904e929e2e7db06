"""Device extent -> everything that uses it: the reverse map, and the reflink proxy
(fs/xfs/libxfs/xfs_rmap.c).

A page has room to name one owner. A block that several files share by reflink has many, so it needs an object
that stands for all of them: the *proxy*. It is made when an extent is first shared, every link to any part of
that extent holds it, and it goes with the last of them. An extent that was never shared has no proxy, and its
one link is its owner.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from operator import attrgetter

import msgspec
from sortedcontainers import SortedDict

from daxemu.ranges import IntervalIndex, Range, RangeSet, gaps_between, merged
from daxemu.uapi import Block, Ino

METADATA_INO: Ino = 0
"""The owner of the blocks that hold the filesystem's own records; no file has this number."""


class ReflinkProxy(msgspec.Struct, eq=False, gc=False):
    """Stands for all links of one shared device extent. ``refcount`` is how many there are.

    ``number`` is its name in the store; no two of a filesystem have the same.
    """

    number: int
    refcount: int = 0


class Link(msgspec.Struct, eq=False, gc=False):
    """File ``ino``'s claim on device blocks ``[dev_block, dev_block + length)`` for its blocks from
    ``file_block`` on.

    Mutable, but only :class:`~daxemu.fs.extents.ExtentMap` may: both indexes that hold a link depend on its
    fields.
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
    """One file's use of a part of a device range (``struct xfs_rmap_irec``); all in blocks."""

    ino: Ino
    file_block: Block
    dev_block: Block
    length: int


class Rmap:
    """All links of a filesystem, found by device blocks."""

    def __init__(self) -> None:
        self._links: IntervalIndex[Link] = IntervalIndex(attrgetter("dev_block"), attrgetter("length"))
        self.link_count = 0
        self.dirty: dict[Ino, RangeSet] = {}
        """File blocks, by file, whose links the store does not have as they are."""
        self.marks = 0
        """Changes of links since the last commit."""
        self.given_up = RangeSet()
        """Device blocks that lost a link since the last commit and still have another. The store still says
        that they are shared, so until it says otherwise they are: a crash would bring the lost link back.
        """
        self._next_proxy = 1
        self.on_change: Callable[[Ino], None] = lambda ino: None
        """Told which file's links change."""

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links)

    # -- changes: for ExtentMap only, and `adopt` for a store

    def add(self, links: list[Link]) -> None:
        """File new links of one file, in its order. Those with a proxy are a reference to it."""
        if links:
            self._mark(links[0].ino, links[0].file_block, links[-1].file_end)
            self.adopt(links)

    def discard(self, links: list[Link]) -> None:
        """Take links of one file out, in its order; each proxy loses a reference for each."""
        if links:
            self._mark(links[0].ino, links[0].file_block, links[-1].file_end)
        for link in links:
            self._links.discard(link)
            if link.proxy is not None:
                link.proxy.refcount -= 1
        self.link_count -= len(links)

    def reshape(self, link: Link, *, trim_front: int = 0, length: int) -> None:
        """Cut ``trim_front`` blocks off the front of ``link`` and make it ``length`` long; it stays the same
        link.
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
        """See that each of these links of one file, in its order, has a proxy."""
        alone = [link for link in links if link.proxy is None]
        for link in alone:
            link.proxy = ReflinkProxy(self._next_proxy, refcount=1)
            self._next_proxy += 1
        if alone:
            self._mark(alone[0].ino, alone[0].file_block, alone[-1].file_end)

    def give_up(self, start: Block, end: Block, unused: list[Range]) -> None:
        """A link to ``[start, end)`` is gone; all of it but ``unused`` has another."""
        for part in gaps_between(unused, start, end):
            self.given_up.add(*part)

    def adopt(self, links: list[Link]) -> None:
        """File links that the store has as they are."""
        self._links.update(links)
        self.link_count += len(links)
        for link in links:
            if link.proxy is not None:
                link.proxy.refcount += 1

    def reserve_proxies(self, below: int) -> None:
        """Give no number below ``below`` to a new proxy."""
        self._next_proxy = max(self._next_proxy, below)

    def _mark(self, ino: Ino, start: Block, end: Block) -> None:
        """Have the next commit write a file's links anew in ``[start, end)``; what has not changed may be
        among them.
        """
        self.on_change(ino)
        self.marks += 1
        ranges = self.dirty.get(ino)
        if ranges is None:
            ranges = self.dirty[ino] = RangeSet()
        ranges.add(start, end)

    def mark_all(self, ino: Ino) -> None:
        """Have the next commit write all links of a file anew."""
        self._mark(ino, 0, 1 << 52)

    # -- questions

    def count(self, start: Block, end: Block) -> int:
        """How many links have a part of ``[start, end)``."""
        return len(self._links.overlapping(start, end))

    def owners(self, start: Block, end: Block) -> list[Owner]:
        """Every use of device blocks ``[start, end)``, cut to it, through every file that shares them."""
        owners: list[Owner] = []
        at = length = front = place = size = -1
        for link in self._links.overlapping(start, end):
            # Those that share an extent are mostly alike.
            if link.dev_block != at or link.length != length:
                at, length = link.dev_block, link.length
                front = start - at if at < start else 0
                place = at + front
                size = min(at + length, end) - place
            owners.append(Owner(link.ino, link.file_block + front, place, size))
        return owners

    def sharing(self, start: Block, end: Block) -> list[tuple[Range, int]]:
        """``[start, end)`` in runs that the same number of links use, with that number; 0 where it is
        free.
        """
        steps = SortedDict({start: 0, end: 0})
        for owner in self.owners(start, end):
            for block, step in ((owner.dev_block, 1), (owner.dev_block + owner.length, -1)):
                steps[block] = steps.get(block, 0) + step
        runs: list[tuple[Range, int]] = []
        count = 0
        for block, following in pairwise(steps):
            count += steps[block]
            if runs and runs[-1][1] == count:
                runs[-1] = (Range(runs[-1][0].start, following), count)
            else:
                runs.append((Range(block, following), count))
        return runs

    def unreferenced(self, start: Block, end: Block) -> list[Range]:
        """The parts of ``[start, end)`` that no link uses."""
        used = sorted((owner.dev_block, owner.dev_block + owner.length) for owner in self.owners(start, end))
        return list(gaps_between(merged(used), start, end))

    def shared_parts(self, link: Link, start: Block, end: Block) -> RangeSet:
        """The parts of device blocks ``[start, end)``, all of them ``link``'s, that another link uses as
        well, or did when the store was last written.
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

    def proxy_of(self, block: Block) -> ReflinkProxy | None:
        """The proxy that stands for one device block; None if it is free or was never shared."""
        for link in self._links.overlapping(block, block + 1):
            return link.proxy
        return None
