"""Layouts: somebody else may read and write a file's healthy blocks without asking, until what a layout says
changes (fs/xfs/xfs_pnfs.c).

The filesystem remains the authority. It grants a layout after it has served a file itself, and breaks it
within the verb that changes anything of what it says: an extent, the size, who shares, poison anywhere. What
the holder wrote it reports before the filesystem is asked for anything else (``Filesystem.wrote``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from daxemu.fs.extents import ExtentMap
from daxemu.fs.inode import Inode
from daxemu.fs.privs import dentry_needs_remove_privs
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, Ino

MAX_FILES = 4096
"""Files that have layouts at the same time. One more, and all are broken; those in use get them anew."""


class Layout(NamedTuple):
    """Bytes ``[start, end)`` of file ``ino``, which is ``size`` long, are at byte ``device`` of the device,
    healthy. ``may_write``: a store there changes nothing but bytes and times, and the size if it ends beyond;
    what is there beyond the end is zero.
    """

    ino: Ino
    size: int
    start: int
    end: int
    device: int
    may_write: bool


class LayoutOps(Protocol):
    """Who holds layouts."""

    def grant(self, layout: Layout) -> None:
        """Here is one, beside others of the same file."""

    def grant_attributes(self, inode: Inode) -> None:
        """What stat(2) says of an inode holds until its layout is broken, or written to; that it has no
        capabilities, until its layout is broken.
        """

    def break_attributes(self, ino: Ino) -> None:
        """What stat(2) says of an inode no longer holds; its layouts do."""

    def break_layout(self, ino: Ino) -> None:
        """None of this file holds any more."""

    def break_all(self) -> None:
        """None holds any more."""


class Layouts:
    """The layouts of one filesystem that are out. Without a holder, none."""

    def __init__(self, dax: DaxDevice) -> None:
        self._dax = dax
        self._holder: LayoutOps | None = None
        self._out: set[Ino] = set()
        self._is_watched = False
        self._suspended = 0
        dax.before_poison = self.break_all

    @property
    def count(self) -> int:
        """How many files have a layout out."""
        return len(self._out)

    def hold(self, holder: LayoutOps | None) -> None:
        """Have somebody hold layouts from now on, or nobody."""
        self.break_all()
        self._holder = holder

    def watch(self, is_watched: bool) -> None:
        """Grant none while somebody must see each read and write."""
        self.break_all()
        self._is_watched = is_watched

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Within, none is granted: all requests come to the filesystem."""
        self.suspend()
        try:
            yield
        finally:
            self._suspended -= 1

    def suspend(self) -> None:
        """From now on none is granted."""
        self.break_all()
        self._suspended += 1

    def _whom(self, inode: Inode) -> LayoutOps | None:
        """Who is to be granted something of an inode; None if nobody may be."""
        if self._is_watched or self._suspended or self._holder is None:
            return None
        if inode.ino not in self._out:
            if len(self._out) >= MAX_FILES:
                self.break_all()
            self._out.add(inode.ino)
        return self._holder

    def grant(self, inode: Inode, extents: ExtentMap, offset: int, length: int) -> None:
        """Grant what a file has of the extents that were just read or written at ``offset``."""
        if (holder := self._whom(inode)) is None:
            return
        may_write = not dentry_needs_remove_privs(inode)
        for run in extents.runs(offset // PAGE_SIZE, -(-(offset + length) // PAGE_SIZE)):
            if (link := run.link) is None:
                continue
            delta = (link.file_block - link.dev_block) * PAGE_SIZE
            device = Range(link.dev_block * PAGE_SIZE, link.dev_end * PAGE_SIZE)
            for start, end in self._healthy(device):
                if start + delta < offset + length and offset < end + delta:
                    alone = may_write and link.proxy is None
                    holder.grant(Layout(inode.ino, inode.size, start + delta, end + delta, start, alone))

    def grant_attributes(self, inode: Inode) -> None:
        """Grant what stat(2) says of an inode."""
        if (holder := self._whom(inode)) is not None:
            holder.grant_attributes(inode)

    def _healthy(self, device: Range) -> Iterable[Range]:
        """The pages of these device bytes without poison."""
        if not self._dax.is_poisoned(device.start, device.length):
            return [device]
        return self._dax.poisoned_pages(device).gaps(*device)

    def break_attributes(self, ino: Ino) -> None:
        """What stat(2) says of an inode changed, and nothing else of what a layout says."""
        if self._holder is not None and ino in self._out:
            self._holder.break_attributes(ino)

    def break_layout(self, ino: Ino) -> None:
        """``break_layout()``: what the layout of a file says is about to change."""
        if self._holder is not None and ino in self._out:
            self._out.remove(ino)
            self._holder.break_layout(ino)

    def break_all(self) -> None:
        """As :meth:`break_layout`, for every file."""
        if self._holder is not None and self._out:
            self._out.clear()
            self._holder.break_all()
