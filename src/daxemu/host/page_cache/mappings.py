"""Mappings of the kernel's page cache: the first implementation of the seam (host/mappings)."""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from functools import partial

import trio

from daxemu.fs.inode import Inode
from daxemu.host.mappings import Access, HardwareError, Upcalls
from daxemu.host.mount_parts import MountParts
from daxemu.host.observer import Observer
from daxemu.host.page_cache.invalidate_lock import InvalidateLock
from daxemu.host.page_cache.kernel_pages import KernelPages
from daxemu.host.page_cache.populating import Populating
from daxemu.host.proc.file_pages import FilePage
from daxemu.host.proc.present import (
    Mapped,
    PagesOf,
    collect_tasks,
    mapped_files,
    mapped_runs,
    maps_still,
    present_runs,
)
from daxemu.mm.incident import Incident, MappingRange
from daxemu.mm.to_kill import Task, shared_out
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SIZE, Ino
from daxemu.units import DIV_ROUND_UP, PFN_PHYS

log = logging.getLogger(__name__)

PASSES = 4
"""Passes of write-back over the source of a clone before its pages are revoked."""


class PageCacheMappings:
    """Mappings of files on a FUSE mount, which are mappings of the kernel's page cache.

    A shared mapping shows the page cache of its file. Two files that share blocks have two page caches, so a
    change of a file's blocks changes no mapping.
    """

    direct_io = False
    survive_shutdown = False

    def __init__(self, parts: MountParts) -> None:
        self._fs = parts.fs
        self._dev = parts.session.mount.dev
        self._open_files = parts.open_files
        self._pages = pages = KernelPages(parts.session)
        # Without struct pages, all pages of a mapping are present (VM_PFNMAP).
        self._pages_of: PagesOf = mapped_runs if parts.pmem.pgmap is None else present_runs
        self._likely: set[int] = set()
        """Process ids found by the last collection: likely victims of the next failure."""
        path_of = parts.fs.names.path_of
        self._populating = Populating(
            parts.tracer, self._dev, pages.revoke, path_of, parts.emit, parts.nursery
        )
        self._lock: InvalidateLock | None = None
        """Keeps pages out of the page cache while blocks become shared."""

    # -- presence

    def collect(self, incidents: Sequence[Incident]) -> list[list[Task]]:
        """See Mappings.collect. One walk of /proc serves all incidents; none if no file of them is open."""
        open_now = set(self._open_files.inodes())
        dev, skip = self._dev, frozenset({os.getpid()})
        if any(incident.whole_device for incident in incidents):
            return [collect_tasks(dev, None, skip, self._pages_of) if open_now else [] for _ in incidents]
        wanted: dict[Ino, RangeSet] = defaultdict(RangeSet)
        failed: list[list[tuple[Ino, Range]]] = [
            [
                (m.mapping, part)
                for m in incident.mappings
                if m.mapping in open_now
                for pages in m.around()
                for part in wanted[m.mapping].add(*pages)
            ]
            for incident in incidents
        ]
        if not wanted:
            return [[] for _ in incidents]
        pages_of = self._pages_of
        if pages_of is present_runs and any(m.pmds for incident in incidents for m in incident.mappings):
            pages_of = partial(present_runs, copies=True)
        ranges = {ino: list(pages) for ino, pages in wanted.items()}
        tasks = collect_tasks(dev, ranges, skip, pages_of, self._likely)
        self._likely = {task.pid for task in tasks}
        return shared_out(tasks, failed)

    def file_page(self, ino: Ino, index: int) -> FilePage:
        """See Mappings.file_page."""
        return FilePage(*self._dev, ino, index)

    def still_mapped(self, task: Task) -> bool:
        """See Mappings.still_mapped."""
        return maps_still(task, self._dev)

    def mapped_files(self) -> list[Mapped]:
        """See Mappings.mapped_files."""
        return list(mapped_files(self._dev))

    # -- removal of translations

    def revoke(self, incident: Incident) -> None:
        """See Mappings.revoke. One notification for each file range."""
        for pages in incident.mappings:
            self._pages.revoke(pages.mapping, PFN_PHYS(pages.index), PFN_PHYS(pages.count))

    def revoke_all(self) -> None:
        """See Mappings.revoke_all. One notification for each open file."""
        for ino in set(self._open_files.inodes()):
            self._pages.revoke(ino, 0, 0)

    # -- data and attributes that only the kernel has

    async def write_back(self, ino: Ino, *, has_mutex: bool = False) -> None:
        """See Mappings.write_back.

        A supervisor without root cannot open a file without a name. The pages of such a file are revoked
        instead, which includes the write-back, and the processes with pages present are remembered.
        """
        path = self._fs.names.path_bytes(ino)
        if not await trio.to_thread.run_sync(self._pages.write_back, ino, path):
            await self._upcalls.revoke_latent(_whole(self._fs.names.get(ino)), has_mutex=has_mutex)

    async def synced(self, ino: Ino | None = None) -> None:
        """See Mappings.synced."""

    def write_back_all(self) -> None:
        """See Mappings.write_back_all."""
        self._pages.write_back_all()

    def forget_attributes(self, ino: Ino) -> None:
        """See Mappings.forget_attributes."""
        self._pages.forget_attributes(ino)

    async def refresh_attributes(self, ino: Ino) -> None:
        """See Mappings.refresh_attributes."""
        self._pages.forget_attributes(ino)
        path = self._fs.names.path_bytes(ino)
        await trio.to_thread.run_sync(self._pages.refresh_attributes, ino, path)

    # -- requests that fill the page cache, or write its pages back

    async def before_read(self, ino: Ino, offset: int, length: int) -> None:
        """See Mappings.before_read. Waits for the invalidate lock."""
        if self._lock is not None:
            await self._lock.before_read(ino, offset, length)

    async def before_write(self, ino: Ino, offset: int, length: int, *, from_cache: bool) -> None:
        """See Mappings.before_write. Waits for the invalidate lock."""
        if self._lock is not None:
            await self._lock.before_write(ino, offset, length, from_cache=from_cache)

    async def serves_populate(
        self, access: Access, *, is_latent: bool, discover: Callable[[], object]
    ) -> bool:
        """See Mappings.serves_populate."""
        return await self._populating.passes(access, is_latent=is_latent, discover=discover)

    # -- changes of a file's blocks

    def is_settled(self, ino: Ino | None = None) -> bool:
        """See Mappings.is_settled. No mapping shows a block of the media."""
        return True

    async def settled(self, ino: Ino) -> None:
        """See Mappings.settled."""

    async def observe(self, observer: Observer | None) -> None:
        """See Mappings.observe. Every page fault that needs the filesystem is a request."""

    @asynccontextmanager
    async def sharing(self, source: Ino, taken: Range, target: Ino, replaced: Range) -> AsyncIterator[None]:
        """See Mappings.sharing.

        1. The target's pages are revoked, and no process gets a page back before the blocks are shared:
           write-back of an old page would overwrite the clone.
        2. The source's pages are written back until a pass finds no dirty page. Without this, the clone could
           have a store and lack an earlier one. The pages stay mapped, so that a failure finds the processes
           with the pages present.
        3. If no pass finds the source clean, the source's pages are revoked, too.
        """
        inode = self._fs.names.get(source)
        last_change = inode.ctime  # the file's i_version: every write-back changes it
        await self.write_back(source, has_mutex=True)
        with self._invalidate_lock() as lock:
            await lock.invalidate(self._pages.revoke, [(target, replaced)])
            if not await self._is_clean(lock, inode, last_change):
                await self._upcalls.remember(_whole(inode))
                await lock.invalidate(self._pages.revoke, [(source, taken)])
            yield

    async def _is_clean(self, lock: InvalidateLock, source: Inode, last_change: int) -> bool:
        """Write back the source until a pass finds no dirty page. Return False after PASSES passes."""
        for _ in range(PASSES):
            if source.ctime == last_change and lock.is_complete:
                return True
            last_change = source.ctime
            path = self._fs.names.path_bytes(source.ino)
            await lock.while_held(source.ino, partial(self._pages.write_back, source.ino, path))
        return source.ctime == last_change and lock.is_complete

    @contextmanager
    def _invalidate_lock(self) -> Iterator[InvalidateLock]:
        """Hold the invalidate lock (``mapping->invalidate_lock``) and suspend layouts during the context."""
        lock = self._lock = InvalidateLock()
        with self._fs.layouts.suspended():  # C would answer requests that must wait
            try:
                yield lock
            finally:
                self._lock = None
                lock.release()

    # -- life

    def system_calls(self, hardware_error: HardwareError) -> None:
        """See Mappings.system_calls."""

    def connect(self, upcalls: Upcalls) -> None:
        """See Mappings.connect."""
        self._upcalls = upcalls

    async def start(self) -> None:
        """See Mappings.start. Sets the limits of the page cache, which only root can change."""
        if not await trio.to_thread.run_sync(self._pages.tune, abandon_on_cancel=True):
            log.info("the page cache reads ahead and keeps less than it could: needs root, and Linux 6.2")

    async def stop(self) -> None:
        """See Mappings.stop. The kernel drops its pages with the mount."""

    def describe_held(self) -> Iterator[str]:
        """See Mappings.describe_held."""
        if self._lock is not None:
            yield from self._lock.describe_held()


def _whole(inode: Inode) -> Incident:
    """Return an incident of all pages of a file."""
    return Incident(0, 0, 0, 0, mappings=[MappingRange(inode.ino, 0, DIV_ROUND_UP(inode.size, PAGE_SIZE), 0)])
