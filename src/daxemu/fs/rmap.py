"""Device extent -> everything that uses it: the reverse map, and the reflink proxy
(fs/xfs/libxfs/xfs_rmap.c).

A page has room to name one owner. A block that several files share by reflink has many, so it needs an object
that stands for all of them: the *proxy*. It is made when an extent is first shared, every link to any part of
that extent holds it, and it goes with the last of them. An extent that was never shared has no proxy, and its
one link is its owner.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from sortedcontainers import SortedDict

from daxemu.ranges import IntervalIndex, Range, RangeSet
from daxemu.uapi import Block, Ino

METADATA_INO: Ino = 0
"""The owner of the blocks that hold the filesystem's own records; no file has this number."""


class ReflinkProxy:
    """Stands for all links of one shared device extent. ``refcount`` is how many there are.

    ``number`` is its name in the store; no two of a filesystem have the same.
    """

    __slots__ = ("number", "refcount")

    def __init__(self, number: int) -> None:
        self.number = number
        self.refcount = 0


class Link:
    """File ``ino``'s claim on device blocks ``[dev_block, dev_block + length)`` for its blocks from
    ``file_block`` on.

    Mutable, but only :class:`~daxemu.fs.extents.ExtentMap` may: both indexes that hold a link depend on its
    fields.
    """

    __slots__ = ("dev_block", "file_block", "ino", "length", "proxy")

    def __init__(
        self, ino: Ino, file_block: Block, dev_block: Block, length: int, proxy: ReflinkProxy | None = None
    ) -> None:
        self.ino = ino
        self.file_block = file_block
        self.dev_block = dev_block
        self.length = length
        self.proxy = proxy

    @property
    def file_end(self) -> Block:
        return self.file_block + self.length

    @property
    def dev_end(self) -> Block:
        return self.dev_block + self.length

    def __repr__(self) -> str:
        shared = f" shared by {self.proxy.refcount}" if self.proxy else ""
        return f"<Link ino {self.ino} file {self.file_block} dev {self.dev_block} len {self.length}{shared}>"


class Owner(NamedTuple):
    """One file's use of a part of a device range (``struct xfs_rmap_irec``); all in blocks."""

    ino: Ino
    file_block: Block
    dev_block: Block
    length: int


class Rmap:
    """All links of a filesystem, found by device blocks."""

    def __init__(self) -> None:
        self._links: IntervalIndex[Link] = IntervalIndex(
            lambda link: link.dev_block, lambda link: link.length
        )
        self.link_count = 0
        self.dirty: dict[Ino, RangeSet] = {}
        """File blocks, by file, whose links the store does not have as they are."""
        self.given_up = RangeSet()
        """Device blocks that lost a link since the last commit and still have another. The store still says
        that they are shared, so until it says otherwise they are: a crash would bring the lost link back.
        """
        self._next_proxy = 1

    def __iter__(self) -> Iterator[Link]:
        return iter(self._links)

    # -- changes: for ExtentMap only

    def add(self, link: Link) -> None:
        """File a new link. If it has a proxy, that gains a reference."""
        self._mark(link)
        self._links.add(link)
        self.link_count += 1
        if link.proxy is not None:
            link.proxy.refcount += 1

    def discard(self, link: Link) -> None:
        """Take a link out; its proxy loses a reference."""
        self._mark(link)
        self._links.discard(link)
        self.link_count -= 1
        if link.proxy is not None:
            link.proxy.refcount -= 1

    def reshape(self, link: Link, *, trim_front: int = 0, length: int) -> None:
        """Cut ``trim_front`` blocks off the front of ``link`` and make it ``length`` long; it stays the same
        link.
        """
        self._mark(link)
        if self._links.stays(link, link.dev_block + trim_front, length):
            link.length = length
        else:
            self._links.discard(link)
            link.file_block += trim_front
            link.dev_block += trim_front
            link.length = length
            self._links.add(link)
        self._mark(link)

    def share(self, link: Link) -> ReflinkProxy:
        """The proxy of ``link``, made now if the extent was never shared before."""
        if link.proxy is None:
            link.proxy = ReflinkProxy(self._next_proxy)
            link.proxy.refcount = 1
            self._next_proxy += 1
            self._mark(link)
        return link.proxy

    def give_up(self, start: Block, end: Block, unused: list[Range]) -> None:
        """A link to ``[start, end)`` is gone; all of it but ``unused`` has another."""
        for part in RangeSet(unused).gaps(start, end):
            self.given_up.add(*part)

    def adopt(self, links: list[Link]) -> None:
        """File links that a store has read, all of one file."""
        self._links.update(links)
        self.link_count += len(links)
        for link in links:
            if link.proxy is not None:
                link.proxy.refcount += 1

    def reserve_proxies(self, below: int) -> None:
        """Give no number below ``below`` to a new proxy."""
        self._next_proxy = max(self._next_proxy, below)

    def _mark(self, link: Link) -> None:
        ranges = self.dirty.get(link.ino)
        if ranges is None:
            ranges = self.dirty[link.ino] = RangeSet()
        ranges.add(link.file_block, link.file_block + link.length)

    # -- questions

    def owners(self, start: Block, end: Block) -> Iterator[Owner]:
        """Every use of device blocks ``[start, end)``, cut to it, through every file that shares them."""
        for link in self._links.overlapping(start, end):
            part = Range(link.dev_block, link.dev_end).clip(start, end)
            yield Owner(link.ino, link.file_block + part.start - link.dev_block, part.start, part.length)

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
        used = RangeSet(
            (owner.dev_block, owner.dev_block + owner.length) for owner in self.owners(start, end)
        )
        return list(used.gaps(start, end))

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
