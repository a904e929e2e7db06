"""Direct mappings of the media: the second implementation of the seam (host/mappings).

Stores of processes are on the media at once, so nothing is written back. A change of a file's blocks makes
the old addresses lazy in every process (``settled``). Poison takes the page from every process by one punch
of the media (pmem/media); this module looks before, which processes had the page present.

Lock order: the lock of a file (FileLocks), then ``Space.lock``. No task holds two of a kind, but for
``sharing``, which holds two files.
"""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress

import trio

from daxemu.errors import DaxemuError, MediaError
from daxemu.fs.fault import FaultKind, FileRun
from daxemu.fs.mapped_files import SHOWN_AT_ONCE
from daxemu.fs.rmap import Owner
from daxemu.host.direct.calls import Calls
from daxemu.host.direct.changes import Changes, FileLocks
from daxemu.host.direct.faults import PageFaults, Touch
from daxemu.host.direct.locking import held
from daxemu.host.direct.memory import thread_of
from daxemu.host.direct.page_tables import PageTables
from daxemu.host.direct.populate import MOST_HOLES
from daxemu.host.direct.presence import AreaToScan, Presence, collected, wanted_of
from daxemu.host.direct.service import Service
from daxemu.host.direct.table import Area, Table
from daxemu.host.fuse import notifications
from daxemu.host.mappings import Access, Answer, HardwareError, Upcalls
from daxemu.host.mount_parts import MountParts
from daxemu.host.observer import Observer
from daxemu.host.proc.file_pages import NOWHERE, FilePage
from daxemu.host.proc.present import Mapped
from daxemu.host.run.attached import Handle
from daxemu.mm.incident import Incident
from daxemu.mm.to_kill import PresentRun, Task
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SIZE, Ino
from daxemu.units import DIV_ROUND_UP, PHYS_PFN, blocks_of, bytes_of_blocks

SYNC_INTERVAL = 5.0
"""Seconds between two write-backs of stores without an msync(2), as in dirty_writeback_centisecs."""


_WHOLE = Range(0, 1 << 52)
"""Blocks of any file."""


class DirectMappings:
    """Mappings of the media in the address spaces of programs under ``daxemu run``. See host.mappings."""

    direct_io = True
    survive_shutdown = True

    def __init__(self, parts: MountParts) -> None:
        self._fs = fs = parts.fs
        self._parts = parts
        self._media = media = parts.pmem.dax.memory()
        found = os.fstat(media.fd)
        self._file = os.major(found.st_dev), os.minor(found.st_dev), found.st_ino
        self._upcalls: Upcalls | None = None
        self._changes = Changes(fs.allocator)
        self._locks = FileLocks()
        self.table = Table(self._pin, self._unpin, self._stored)
        self.page_tables = PageTables(self.table, media.offset)
        # Without struct pages, all pages of a mapping are present (VM_PFNMAP).
        self.presence = Presence(self.table, pfn_map=parts.pmem.pgmap is None)
        self.faults = PageFaults(
            fs,
            fs.dax,
            self.table,
            self.page_tables,
            self._changes,
            self._locks,
            parts.nursery,
            parts.unexpected,
            self._on_poison,
            self.forget_attributes,
            parts.tracer,
        )
        self._service: Service | None = None

    def calls(self, hardware_error: HardwareError) -> Calls:
        """Return the answers to system calls on address spaces of this mount."""
        return Calls(
            self._fs,
            self.table,
            self.page_tables,
            self._locks,
            self.settled,
            self.synced,
            self._readable,
            self.faults.are_wanted,
            hardware_error,
        )

    def system_calls(self, hardware_error: HardwareError) -> Handle:
        """See Mappings.system_calls."""
        self._service = Service(
            self.table,
            self.faults,
            self.calls(hardware_error),
            self._parts,
            self._media.fd,
        )
        return self._service.handle

    async def observe(self, observer: Observer | None) -> None:
        """See Mappings.observe. Files that the observer wants become lazy."""
        self.faults.observer = observer
        for ino in self.table.files() if observer is not None else ():
            if observer is not None and observer.wants(ino):
                async with self._locks.held(ino):
                    await self.page_tables.hide_blocks(ino, _WHOLE)

    def _pin(self, ino: Ino) -> None:
        """Keep the blocks of a file without a name while the file is mapped: a mapping holds a file open."""
        with suppress(DaxemuError):
            self._fs.open(self._fs.names.get(ino))
        self._parts.open_files.mapped(ino)

    def _unpin(self, ino: Ino) -> None:
        if self._fs.mapped_stores:
            self._parts.nursery.start_soon(self.synced, ino)
        self._parts.open_files.unmapped(ino)
        with suppress(DaxemuError):
            self._fs.release(ino)

    def _stored(self, ino: Ino) -> None:
        """Set the times of a file that a program may have stored to."""
        with suppress(DaxemuError):
            self._fs.stored(ino)
            self.forget_attributes(ino)

    # -- the filesystem's answers

    async def _on_poison(self, touch: Touch, area: Area, run: FileRun) -> Answer:
        """Ask the supervisor about an access to poison."""
        block = area.block_at(touch.page.start)
        device = (run.dev_block + block - run.file_block) * PAGE_SIZE
        try:
            self._fs.dax.check_readable(device, PAGE_SIZE)
        except MediaError as error:
            access = Access(
                area.ino,
                block * PAGE_SIZE,
                PAGE_SIZE,
                thread_of(touch.event.tid, touch.space.tgid, touch.space.agent.pid),
                error,
                touch.event.address,
                touch.is_store,
                area.addresses if area.is_shared else None,
                lambda: self.faults.has_left(touch),
            )
            assert self._upcalls is not None
            return await self._upcalls.on_access(access)
        return Answer.AGAIN

    def _before_punch(self, part: Range) -> None:
        """Note which processes have pages of device bytes present: all processes lose the pages next."""
        for owner in self._fs.rmap.owners(*blocks_of(part)):
            self.presence.remember(owner.ino, Range(owner.file_block, owner.file_block + owner.length))

    # -- Translations

    def collect(self, incidents: Sequence[Incident]) -> list[list[Task]]:
        """See Mappings.collect."""
        wanted, pages = wanted_of(incidents)
        all_files = any(incident.whole_device for incident in incidents)

        def look() -> tuple[list[AreaToScan], list[tuple[int, PresentRun]]]:
            files = None if all_files else wanted
            return self.presence.seen(self._in_media(files)), self.presence.take_remembered(files)

        seen, remembered = trio.from_thread.run_sync(look)
        return collected(self.presence, incidents, pages, seen, remembered)

    def _in_media(self, wanted: dict[Ino, RangeSet] | None) -> dict[Ino, RangeSet] | None:
        """Return the wanted blocks without those that poison took out of the media: _before_punch() has noted
        which processes had these present.
        """
        if wanted is None or not self._fs.dax.has_poison or self._parts.pmem.pgmap is None:
            return wanted
        return {
            ino: RangeSet(part for blocks in ranges for part in self._healthy(ino, blocks))
            for ino, ranges in wanted.items()
        }

    def still_mapped(self, task: Task) -> bool:
        """See Mappings.still_mapped."""
        return trio.from_thread.run_sync(self.presence.still_maps, task)

    def file_page(self, ino: Ino, index: int) -> FilePage:
        """See Mappings.file_page: the page of the media."""
        with suppress(DaxemuError):
            for run in self._fs.runs(ino, Range(index, index + 1)):
                if run.kind is FaultKind.MAPPED:
                    return FilePage(*self._file, PHYS_PFN(self._media.offset) + run.dev_block)
        return NOWHERE

    def revoke(self, incident: Incident) -> None:
        """See Mappings.revoke. Poisoned pages are gone from every process already."""
        trio.from_thread.run(self._revoke, incident)

    async def _revoke(self, incident: Incident) -> None:
        for pages in incident.mappings:
            blocks = Range(pages.index, pages.index + pages.count)
            async with self._locks.held(pages.mapping):
                for part in self._healthy(pages.mapping, blocks):
                    await self.page_tables.hide_blocks(pages.mapping, part)

    def _healthy(self, ino: Ino, blocks: Range) -> list[Range]:
        """Return the blocks of a mapped file that are not poison."""
        found: list[Range] = []
        if not self.table.mappers(ino, blocks):
            return found
        with suppress(DaxemuError):
            for run in self._fs.runs(ino, blocks):
                if run.kind is FaultKind.MAPPED:
                    device = bytes_of_blocks(Range(run.dev_block, run.dev_block + run.length))
                    delta = run.file_block - run.dev_block
                    good = self._fs.dax.poisoned_pages(device).gaps(*device)
                    found += [Range(*(at // PAGE_SIZE + delta for at in part)) for part in good]
        return found

    def _readable(self, ino: Ino, blocks: Range) -> list[Range]:
        """Return the blocks that a call brings in: holes and healthy blocks, up to known poison. A block with
        latent poison is left out: no process can have the block present.
        """
        found: list[Range] = []
        holes = 0
        with suppress(DaxemuError):
            for run in self._fs.runs(ino, blocks):
                if run.kind is FaultKind.HOLE:
                    holes += run.length
                    found += [Range(run.file_block, run.file_end)] if holes <= MOST_HOLES else []
                elif run.kind is FaultKind.MAPPED:
                    device = bytes_of_blocks(Range(run.dev_block, run.dev_block + run.length))
                    known = next(
                        iter(self._fs.dax.badblocks.overlapping_bytes(device.start, device.length)), None
                    )
                    end = device.end if known is None else known.outer(PAGE_SIZE).start
                    delta = run.file_block - run.dev_block
                    for part in self._fs.dax.poisoned_pages(device).gaps(device.start, end):
                        found.append(Range(*(at // PAGE_SIZE + delta for at in part)))
                    if known is not None:
                        break
        return found

    def revoke_all(self) -> None:
        """See Mappings.revoke_all. From now on every access is SIGBUS with BUS_ADRERR."""
        trio.from_thread.run(self._revoke_all)

    async def _revoke_all(self) -> None:
        for space in self.table.spaces():
            with suppress(DaxemuError, OSError):
                async with held(space.lock):
                    await self.page_tables.end(space)

    def mapped_files(self) -> list[Mapped]:
        """See Mappings.mapped_files."""
        return trio.from_thread.run_sync(self.presence.mapped_files)

    # -- data and attributes

    async def write_back(self, ino: Ino, *, has_mutex: bool = False) -> None:
        """See Mappings.write_back: the stores are on the media."""

    async def synced(self, ino: Ino | None = None) -> None:
        """See Mappings.synced: protect the pages, so the next store is an event, then show the contents."""
        if ino is not None:
            for area in self.table.areas_of(ino):
                self.table.stored(area.space, area.addresses)
        for part in list(self._fs.mapped_stores):
            for low in range(part.start, part.end, SHOWN_AT_ONCE):
                piece = Range(low, min(low + SHOWN_AT_ONCE, part.end))
                for owner in list(self._fs.rmap.owners(*piece)):
                    if ino in (None, owner.ino):
                        await self._synced(owner)

    async def _synced(self, owner: Owner) -> None:
        """Show the blocks of a file, if the file still has the blocks. A block of several files is
        write-protected everywhere.
        """
        async with self._locks.held(owner.ino):
            blocks = Range(owner.file_block, owner.file_block + owner.length)
            device = Range(owner.dev_block, owner.dev_block + owner.length)
            if owner not in list(self._fs.rmap.owners(*device)):
                return  # changed meanwhile: the next call finds the new owner
            await self.page_tables.protect_blocks(owner.ino, blocks)
            if self._fs.shutdown_reason is None:
                self._fs.mapped_stores_end(device)

    async def _sync_now_and_then(self) -> None:
        """Show stores every SYNC_INTERVAL seconds, as the kernel writes dirty pages back."""
        while True:
            await trio.sleep(SYNC_INTERVAL)
            with self._parts.unexpected.caught("the periodic write-back of stores through mappings"):
                await self.synced()

    def stored_to(self) -> Iterator[tuple[Ino, Range]]:
        """See fs.fault.MappingOps."""
        for ino in self.table.files():
            for area in self.table.areas_of(ino):
                for part in area.space.shown.overlapping(*area.addresses) if area.is_shared else ():
                    start = area.block_at(part.start)
                    yield ino, Range(start, start + PHYS_PFN(part.length))

    def write_back_all(self) -> None:
        """See Mappings.write_back_all."""

    def forget_attributes(self, ino: Ino) -> None:
        """See Mappings.forget_attributes."""
        notifications.invalidate_attributes(self._parts.session.fd, ino)

    async def refresh_attributes(self, ino: Ino) -> None:
        """See Mappings.refresh_attributes."""
        notifications.invalidate_attributes(self._parts.session.fd, ino)

    async def before_read(self, ino: Ino, offset: int, length: int) -> None:
        """See Mappings.before_read."""

    async def before_write(self, ino: Ino, offset: int, length: int, *, from_cache: bool) -> None:
        """See Mappings.before_write."""

    async def serves_populate(
        self, access: Access, *, is_latent: bool, discover: Callable[[], object]
    ) -> bool:
        """See Mappings.serves_populate: a touch waits in the userfaultfd, so no system call loops."""
        return False

    # -- changes

    def on_changed(self, ino: Ino, blocks: Range) -> None:
        """See Mappings.on_changed."""
        if self.table.is_mapped(ino):
            self._changes.note(ino, blocks)

    changed = on_changed  # the filesystem's name of the upcall

    def is_settled(self, ino: Ino | None = None) -> bool:
        """See Mappings.is_settled."""
        return self._changes.is_settled(ino)

    async def settled(self, ino: Ino) -> None:
        """See Mappings.settled."""
        while not self._changes.is_settled(ino):
            async with self._locks.held(ino):
                with self._changes.taken(ino) as changed:
                    for blocks in changed:
                        await self._hide(ino, blocks)

    async def _hide(self, ino: Ino, blocks: Range) -> None:
        """Make changed blocks lazy; beyond the end of the file also private copies (truncate_pagecache())."""
        inode = self._fs.names.find(ino)
        end = DIV_ROUND_UP(inode.size, PAGE_SIZE) if inode is not None else 0
        if inside := blocks.clip(0, end):
            await self.page_tables.hide_blocks(ino, inside)
        if beyond := blocks.clip(end, max(end, blocks.end)):
            await self.page_tables.hide_blocks(ino, beyond, keep_copies=False)

    @asynccontextmanager
    async def sharing(self, source: Ino, taken: Range, target: Ino, replaced: Range) -> AsyncIterator[None]:
        """See Mappings.sharing. The blocks of the source stay present, but write-protected."""
        async with self._locks.held(source, target):
            await self.page_tables.hide_blocks(target, blocks_of(replaced))
            await self.page_tables.protect_blocks(source, blocks_of(taken))
            # The source's mappings stay right. In one file, mappings of the replaced blocks must follow.
            unnoted = self._changes.unnoted(source) if source != target else nullcontext()
            with self._changes.following(target), unnoted:
                yield
        await self.settled(target)

    async def follow(self) -> None:
        """Bring mappings up to date after changes that no request waits for. Runs until cancelled."""
        while True:
            await self._changes.has_changes.wait()
            for ino in self._changes.files():
                with self._parts.unexpected.caught(f"the mappings of inode {ino}"):
                    await self.settled(ino)

    # -- life

    def connect(self, upcalls: Upcalls) -> None:
        """See Mappings.connect."""
        self._upcalls = upcalls

    async def start(self) -> None:
        """See Mappings.start."""
        self._fs.follow(self)
        self._fs.dax.before_punch.register(self._before_punch)
        self._parts.nursery.start_soon(self.follow)
        self._parts.nursery.start_soon(self._sync_now_and_then)

    async def stop(self) -> None:
        """See Mappings.stop. Every access from now on is SIGBUS with BUS_ADRERR."""
        self._fs.follow(None)
        await self._revoke_all()
        if self._fs.shutdown_reason is None:
            for part in list(self._fs.mapped_stores):
                self._fs.mapped_stores_end(part)
        if self._service is not None:
            self._service.close()

    def describe_held(self) -> Iterator[str]:
        """See Mappings.describe_held."""
        if self.faults.waiting:
            yield f"{self.faults.waiting} page faults of direct mappings wait for an answer"
        if self._service is not None and (runs := self._service.runs):
            yield f"runs of daxemu run that have direct mappings or may get some: {runs}"
