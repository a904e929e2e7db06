"""Layouts: grants to read and write healthy blocks of a file without a call to the filesystem (xfs_pnfs.c).

The filesystem remains the authority. A layout is granted after the filesystem itself has served a request of
the file. A verb that changes an extent, the size or the sharing breaks the layouts of the file. Poison
anywhere breaks all layouts. The holder reports writes before any other call to the filesystem
(``Filesystem.wrote``). Counterpart in Linux: fs/xfs/xfs_pnfs.c.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from daxemu.fs.extents import ExtentMap
from daxemu.fs.inode import Inode
from daxemu.fs.privs import dentry_needs_remove_privs
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, Ino
from daxemu.units import DIV_ROUND_UP

MAX_FILES = 4096
"""Maximum of files with layouts at a time.

At one more file all layouts are broken; used files get new ones.
"""


class Layout(NamedTuple):
    """Bytes ``[start, end)`` of file ``ino`` are at byte ``device`` of the device, without poison.

    ``size``: the file size in bytes. ``may_write``: a store there changes only bytes, times, and the size if
    the store ends beyond; mapped bytes beyond the end are zero.
    """

    ino: Ino
    size: int
    start: int
    end: int
    device: int
    may_write: bool


class LayoutOps(Protocol):
    """The holder of layouts."""

    def grant(self, layout: Layout) -> None:
        """Add a layout of a file. Other layouts of the same file stay valid."""

    def grant_attributes(self, inode: Inode) -> None:
        """Grant the answer of stat(2) for an inode, and the fact that the inode has no capabilities.

        The answer holds until the layout is broken or written to, the other fact until the layout is broken.
        """

    def break_attributes(self, ino: Ino) -> None:
        """Revoke the answer of stat(2) for an inode. Layouts of the inode stay valid."""

    def break_layout(self, ino: Ino) -> None:
        """Revoke all layouts of a file."""

    def break_all(self) -> None:
        """Revoke all layouts."""


class Layouts:
    """The granted layouts of one filesystem. Without a holder no layout is granted."""

    def __init__(self, dax: DaxDevice) -> None:
        self._dax = dax
        self._holder: LayoutOps | None = None
        self._out: set[Ino] = set()
        self._is_watched = False
        self._withheld: Callable[[Ino], bool] | None = None
        self._suspended = 0
        self.exposed: set[Ino] = set()
        """Files with direct mappings: bytes of the last block beyond the end may be other than zero, so no
        layout goes beyond the end.
        """

    @property
    def count(self) -> int:
        """Number of files with a granted layout."""
        return len(self._out)

    def hold(self, holder: LayoutOps | None) -> None:
        """Set the holder of layouts; None for no holder."""
        self.break_all()
        self._holder = holder

    def watch(self, is_watched: bool) -> None:
        """Grant no layout while ``is_watched``: a repair strategy must see each read and write."""
        self.break_all()
        self._is_watched = is_watched

    def withhold(self, withheld: Callable[[Ino], bool] | None) -> None:
        """Grant no layout of files that ``withheld`` names; None: of no file is it withheld."""
        self.break_all()
        self._withheld = withheld

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Context without layouts: all requests come to the filesystem."""
        self.suspend()
        try:
            yield
        finally:
            self._suspended -= 1

    def suspend(self) -> None:
        """Break all layouts, and grant none from now on."""
        self.break_all()
        self._suspended += 1

    def _whom(self, inode: Inode) -> LayoutOps | None:
        """Return the holder for a grant on ``inode``; None if no grant is allowed."""
        if self._is_watched or self._suspended or self._holder is None:
            return None
        if self._withheld is not None and self._withheld(inode.ino):
            return None
        if inode.ino not in self._out:
            if len(self._out) >= MAX_FILES:
                self.break_all()
            self._out.add(inode.ino)
        return self._holder

    def grant(self, inode: Inode, extents: ExtentMap, offset: int, length: int) -> None:
        """Grant the extents of the bytes just read or written at ``offset``."""
        if (holder := self._whom(inode)) is None:
            return
        may_write = not dentry_needs_remove_privs(inode)
        for run in extents.runs(offset // PAGE_SIZE, DIV_ROUND_UP(offset + length, PAGE_SIZE)):
            if (link := run.link) is None:
                continue
            delta = (link.file_block - link.dev_block) * PAGE_SIZE
            device = Range(link.dev_block * PAGE_SIZE, link.dev_end * PAGE_SIZE)
            for start, end in self._healthy(device):
                file_end = min(end + delta, inode.size) if inode.ino in self.exposed else end + delta
                if start + delta < min(offset + length, file_end) and offset < file_end:
                    alone = may_write and link.proxy is None
                    holder.grant(Layout(inode.ino, inode.size, start + delta, file_end, start, alone))

    def grant_attributes(self, inode: Inode) -> None:
        """Grant the answer of stat(2) for an inode."""
        if (holder := self._whom(inode)) is not None:
            holder.grant_attributes(inode)

    def _healthy(self, device: Range) -> Iterable[Range]:
        """Return the pages of these device bytes without poison."""
        if not self._dax.is_poisoned(device.start, device.length):
            return [device]
        return self._dax.poisoned_pages(device).gaps(*device)

    def break_attributes(self, ino: Ino) -> None:
        """Revoke the answer of stat(2) for ``ino``. Called when only attributes change."""
        if self._holder is not None and ino in self._out:
            self._holder.break_attributes(ino)

    def break_layout(self, ino: Ino) -> None:
        """``break_layout()``: revoke the layouts of ``ino``.

        Called before the content of a layout changes.
        """
        if self._holder is not None and ino in self._out:
            self._out.remove(ino)
            self._holder.break_layout(ino)

    def break_all(self) -> None:
        """Revoke the layouts of every file, as :meth:`break_layout`."""
        if self._holder is not None and self._out:
            self._out.clear()
            self._holder.break_all()
