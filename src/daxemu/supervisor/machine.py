"""The emulated machine: device, filesystem, mount and tracer wired together, and what can be asked of it."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Literal

import msgspec
import trio

from daxemu.errors import InvalidArgument, NoDevice
from daxemu.events import DeviceRemoved, Outcome, PoisonCleared, PoisonInjected, SettingChanged
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.inode import ROOT_INO
from daxemu.host.extra_operations import ExtraOperations
from daxemu.host.mappings import Mappings
from daxemu.host.mountinfo import printable
from daxemu.host.operations import Operations, PoisonedRead
from daxemu.host.session import Session
from daxemu.host.tasks import process_of
from daxemu.host.tracer_link import TracerLink
from daxemu.mm.memory_failure import MappingRange, MemoryFailures
from daxemu.pmem.inject import check_range, failed_pages, inject_all, scrub, uninject
from daxemu.pmem.pmem import Pmem
from daxemu.ranges import Range
from daxemu.supervisor import protocol as p
from daxemu.supervisor.event_log import EventLog
from daxemu.supervisor.failures import Failures
from daxemu.supervisor.madvise import madvise_inject_error
from daxemu.uapi import MF_ACTION_REQUIRED, PAGE_SHIFT, PAGE_SIZE, SECTOR_SIZE, Ino, page_align_down


class Machine:
    """One DEVICE mounted once. All methods belong to the trio thread; those that are not ``async`` are
    atomic.
    """

    def __init__(
        self,
        pmem: Pmem,
        mm: MemoryFailures,
        fs: Filesystem,
        session: Session,
        log: EventLog,
        supplement_missing: str | None,
    ) -> None:
        self.pmem = pmem
        self.mm = mm
        self.fs = fs
        self.session = session
        self.log = log
        self.operations = Operations(fs, self._on_poison, session.forget_attributes)
        self._supplement_missing = supplement_missing
        self._failures: Failures | None = None
        self._tracer: TracerLink | None = None
        self._nursery: trio.Nursery | None = None
        self._mappings: Mappings | None = None

    def start(self, mappings: Mappings, tracer: TracerLink, nursery: trio.Nursery) -> None:
        """Give it what needs a running event loop. Precondition of everything below."""
        self._mappings = mappings
        self._tracer = tracer
        self._nursery = nursery
        self._failures = Failures(self.mm, mappings, tracer, self.log.emit, nursery)
        self.fs.on_shutdown = lambda: nursery.start_soon(self.failures.revoke_everything)
        if self._supplement_missing is None:
            self._extra = ExtraOperations(
                self.fs, self.session.mount.dev, self._clone, self._write_back, nursery
            )

    @property
    def failures(self) -> Failures:
        assert self._failures is not None
        return self._failures

    # -- poison

    async def inject(self, request: p.Inject) -> p.Injected:
        """Poison each range, one memory failure each. Nothing is changed unless all ranges are good.

        Raises InvalidArgument, NoDevice.
        """
        self.check_present()
        found, holes = await self._resolve(request.ino, request.ranges)
        done = inject_all(self.pmem, found, latent=request.latent)
        for bad in done:
            self.log.emit(PoisonInjected(offset=bad.start, length=bad.length, latent=request.latent))
        results = [p.PoisonedRange(0, 0, 0, 0, "", 0)] * len(done)
        async with trio.open_nursery() as nursery:
            for index, bad in enumerate(done):
                nursery.start_soon(self._fail, bad, request.latent, results, index)
        return p.Injected(results, done != found, holes)

    async def _fail(self, bad: Range, latent: bool, results: list[p.PoisonedRange], index: int) -> None:
        pfn, nr_pages = failed_pages(self.pmem, bad)
        if latent:
            await self._hide(bad)
            outcome, told = "latent", 0
        else:
            result, told = await self.failures.handle(self.mm.memory_failure(pfn, nr_pages, 0))
            outcome = result.value
            if self.fs.shutdown_reason is not None:
                await self.failures.revoke_everything()  # from the answer on, all is EIO
        results[index] = p.PoisonedRange(bad.start, bad.length, pfn, nr_pages, outcome, told)

    async def _hide(self, bad: Range) -> None:
        """Latent poison: pages that are mapped now must come and ask, or a load would never meet it."""
        pfn, nr_pages = failed_pages(self.pmem, bad)
        incident = self.mm.removal(pfn, nr_pages)
        for owner in self.fs.rmap.owners(bad.start >> PAGE_SHIFT, -(-bad.end >> PAGE_SHIFT)):
            if owner.ino >= ROOT_INO:
                incident.mappings.append(MappingRange(owner.ino, owner.file_block, owner.length, pfn))
        await self.failures.hide(incident)

    async def _on_poison(self, read: PoisonedRead) -> None:
        """A read met poison: make the consumer's signal exact, and see to poison that nobody knew of."""
        bad = read.error.ranges[0] if read.error.ranges else Range(0, 0)
        pfn, _ = failed_pages(self.pmem, bad)
        found = False
        for part in read.error.ranges:
            if self.pmem.badblocks.set(part.start // SECTOR_SIZE, part.length // SECTOR_SIZE):
                found = True
                incident = self.mm.memory_failure(*failed_pages(self.pmem, part), MF_ACTION_REQUIRED)
                # Not awaited: it revokes the very page that this read has locked until it is answered.
                assert self._nursery is not None
                consumer = process_of(read.tid) if read.tid else -1
                self._nursery.start_soon(self.failures.handle, incident, None, consumer)
        await self.failures.consumed(read, pfn, self._supplement_missing, found=found)

    async def clear(self, request: p.Clear) -> p.Cleared:
        """Make ranges healthy; their poisoned sectors read as zeros. Raises InvalidArgument, NoDevice."""
        self.check_present()
        found, _ = await self._resolve(request.ino, request.ranges)
        cleared: list[Range] = []
        for part in found:
            for good in uninject(self.pmem, part.start, part.length):
                self.log.emit(PoisonCleared(offset=good.start, length=good.length, by="request"))
                cleared.append(good)
        self.fs.adopt_cleared(cleared)
        return p.Cleared([(r.start, r.length) for r in cleared], sum(r.length for r in cleared))

    def scrub(self) -> p.Cleared:
        """Find latent poison: badblocks only, no signals. Raises NoDevice."""
        self.check_present()
        found = scrub(self.pmem)
        return p.Cleared([(r.start, r.length) for r in found], sum(r.length for r in found))

    async def device_page(self, ino: Ino, offset: int) -> int | None:
        """The device offset of the page of a file that holds byte ``offset``; None for a hole."""
        for attempt in range(2):
            if found := self._file_ranges(ino, [(offset, 1)]):
                return page_align_down(found[0].start)
            if attempt == 0:
                await self._write_back(ino)
        return None

    async def _resolve(self, ino: Ino | None, ranges: list[tuple[int, int]]) -> tuple[list[Range], int]:
        """Device byte ranges of what was asked for, and how many bytes of it are holes. Raises
        InvalidArgument.
        """
        if not ranges:
            raise InvalidArgument("no range given")
        if ino is None:
            for offset, length in ranges:
                check_range(offset, length, self.pmem.dax.size, "the device")
            return [Range(offset, offset + length) for offset, length in ranges], 0
        size = self.fs.names.regular(ino)[0].size
        for offset, length in ranges:
            check_range(offset, length, size, self.fs.names.path_of(ino))
        found = self._file_ranges(ino, ranges)
        holes = sum(length for _, length in ranges) - sum(r.length for r in found)
        if holes:
            # What was stored through a mapping has no place on the media before it is written back.
            await self._write_back(ino)
            found = self._file_ranges(ino, ranges)
            holes = sum(length for _, length in ranges) - sum(r.length for r in found)
        if not found:
            raise InvalidArgument("the range is a hole: there is no media behind it")
        return found, holes

    def _file_ranges(self, ino: Ino, ranges: list[tuple[int, int]]) -> list[Range]:
        return [found for offset, length in ranges for found in self.fs.device_ranges(ino, offset, length)]

    async def _write_back(self, ino: Ino) -> None:
        """Have a file's dirty pages written back to us, and leave them mapped."""
        path = self.fs.names.path_bytes(ino)
        if path is None:
            # Without a name nobody can open it again. Taking the pages away writes them back, too.
            await trio.to_thread.run_sync(self.session.revoke, ino, 0, 0)
        else:
            await trio.to_thread.run_sync(self.session.write_back, path)

    def check_present(self) -> None:
        """Raises NoDevice after a removal."""
        if not self.pmem.dax.alive:
            raise NoDevice("the device was removed: daxemu umount, then mount it again")

    # -- removal

    async def remove(self) -> p.Removed:
        """Surprise removal: kill_dax(), one notification for the whole range, everybody who maps it is told.

        Raises NoDevice if it is gone already.
        """
        self.check_present()
        was_idle = self.pmem.dax.dax_is_idle()
        incident = self.mm.removal(self.pmem.pages.start, self.pmem.pages.length)
        with self.mm.during(incident):
            self.pmem.dax.kill_dax()
        _, told = await self.failures.handle(incident)
        self.log.emit(DeviceRemoved(device=self.pmem.name, told=told))
        return p.Removed(told, was_idle)

    # -- files

    async def reflink(self, request: p.Reflink) -> p.Shared:
        """Share blocks between files. What the page cache has of either is written back first, as for
        FICLONE.
        """
        return p.Shared(
            await self._clone(
                request.src, request.src_offset, request.dst, request.dst_offset, request.length
            )
        )

    async def _clone(self, src: Ino, src_offset: int, dst: Ino, dst_offset: int, length: int) -> int:
        self.fs.check_alive()
        await self._write_back(src)
        shared = self.fs.remap_file_range(src, src_offset, dst, dst_offset, length)
        if shared:
            # A revoke while the kernel asks for the new size would make it drop the answer, and a page fault
            # never asks again: so the size is brought to the kernel under the mutex.
            async with self.failures.mf_mutex:
                await trio.to_thread.run_sync(self.session.revoke, dst, dst_offset, shared)
                await trio.to_thread.run_sync(self._stat, self.fs.names.path_bytes(dst))
        return shared

    def _stat(self, path: bytes | None) -> None:
        """Have the kernel ask for a file's attributes. From a worker thread only."""
        if path is not None:
            with suppress(OSError):
                os.lstat(os.fsencode(self.session.mount.mountpoint) + path)

    def map(self, ino: Ino) -> p.FileMap:
        """The extents of a file, holes included. Raises InvalidArgument if it is no regular file."""
        inode, extents = self.fs.names.regular(ino)
        runs = extents.lookup(0, -(-inode.size // PAGE_SIZE)) if inode.size else []
        found = []
        for run in runs:
            offset, length = run.file_block << PAGE_SHIFT, run.length << PAGE_SHIFT
            if run.link is None:
                found.append(p.Extent(offset, length, None, None, 0, False))
                continue
            base = offset - (run.dev_block << PAGE_SHIFT)
            for part, shared_by in self.fs.rmap.sharing(run.dev_block, run.dev_block + run.length):
                device, size = part.start << PAGE_SHIFT, part.length << PAGE_SHIFT
                poisoned = self.pmem.dax.is_poisoned(device, size)
                pfn = self.pmem.pfn_of(device)
                found.append(p.Extent(base + device, size, device, pfn, shared_by, poisoned))
        return p.FileMap(ino, self.fs.names.path_of(ino), inode.size, found)

    def damaged(self) -> p.DamagedList:
        """Files and ranges that lost data, by path."""
        return p.DamagedList([p.DamagedRange(d.ino, d.path, d.offset, d.length) for d in self.fs.damaged()])

    def badblocks(self) -> p.BadblockList:
        """The known bad sectors."""
        bad = self.pmem.badblocks
        return p.BadblockList([(r.start, r.length) for r in bad], bad.count)

    # -- settings and state

    def set(self, wanted: dict[str, str]) -> p.Done:
        """Change settings. Raises InvalidArgument for one there is not or a value it cannot have; none is
        changed then.
        """
        settings: dict[str, tuple[tuple[str, str], Callable[[str], None]]] = {
            "early_kill": (("0", "1"), self._set_early_kill),
            "lost_store": (("silent", "eio"), self._set_lost_store),
        }
        for name, value in wanted.items():
            if name not in settings:
                raise InvalidArgument(f"no setting {name!r}: there are {', '.join(sorted(settings))}")
            if value not in settings[name][0]:
                raise InvalidArgument(f"{name}={value}: must be {' or '.join(settings[name][0])}")
        for name, value in wanted.items():
            settings[name][1](value)
            self.log.emit(SettingChanged(name=name, value=value))
        return p.Done()

    def _set_early_kill(self, value: str) -> None:
        self.mm.sysctl_early_kill = value == "1"

    def _set_lost_store(self, value: str) -> None:
        self.fs.lost_store_is_eio = value == "eio"

    def status(self) -> p.StatusReport:
        """What this machine is and how it fares."""
        state: Literal["mounted", "shut down", "removed"] = "mounted"
        if not self.pmem.dax.alive:
            state = "removed"
        elif self.fs.shutdown_reason is not None:
            state = "shut down"
        usage = self.fs.statfs()
        tracer = self._tracer.pid if self._tracer is not None else None
        return p.StatusReport(
            device=printable(self.session.mount.device),
            mountpoint=printable(self.session.mount.mountpoint),
            pid=os.getpid(),
            state=state,
            reason=self.fs.shutdown_reason,
            size=self.pmem.dax.size,
            base_pfn=self.pmem.dax.base_pfn,
            struct_pages=self.pmem.pgmap is not None,
            blocks=usage.blocks,
            free_blocks=usage.free,
            inodes=usage.files,
            extents=self.fs.rmap.link_count,
            open_files=len(self.operations.open_files),
            badblocks=self.pmem.badblocks.count,
            poisoned_sectors=self.pmem.media.poison.total,
            settings={
                "early_kill": "1" if self.mm.sysctl_early_kill else "0",
                "lost_store": "eio" if self.fs.lost_store_is_eio else "silent",
            },
            counters={outcome.value.lower(): self.mm.counters[outcome] for outcome in Outcome},
            events=self.log.emitted,
            supplement=self._supplement_missing or "loaded",
            tracer=f"pid {tracer}" if tracer is not None else "not running",
        )

    async def answer(self, request: p.Request) -> msgspec.Struct:
        """Do what a request asks. Raises DaxemuError."""
        match request:
            case p.Inject():
                return await self.inject(request)
            case p.Madvise():
                return await madvise_inject_error(self, request)
            case p.Clear():
                return await self.clear(request)
            case p.Scrub():
                return self.scrub()
            case p.GetBadblocks():
                return self.badblocks()
            case p.Damaged():
                return self.damaged()
            case p.Map(ino=ino):
                return self.map(ino)
            case p.Reflink():
                return await self.reflink(request)
            case p.Remove():
                return await self.remove()
            case p.Status():
                return self.status()
            case p.Set(settings=settings):
                return self.set(settings)
        raise InvalidArgument(f"cannot do {type(request).__name__} here")


def open_core(pmem: Pmem, log: EventLog, owner: tuple[int, int]) -> tuple[MemoryFailures, Filesystem]:
    """The core of a machine on ``pmem``. Raises CorruptMetadata, Busy, NoSpace."""
    mm = MemoryFailures(log.emit)
    pmem.make_struct_pages()
    pmem.attach(mm)
    sysfs = pmem.show_in_sysfs()
    mm.on_count = lambda: sysfs.show_counters(mm.counters)
    return mm, Filesystem(pmem.dax, mm, log.emit, owner=owner)
