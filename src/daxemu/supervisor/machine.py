"""The emulated machine: device, filesystem, mount and tracer wired together, and what can be asked of it."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Literal

import msgspec
import trio

from daxemu import protocol as p
from daxemu.errors import InvalidArgument, NoDevice
from daxemu.events import (
    DaxActiveAtRemove,
    DeviceRemoved,
    NotifyFailure,
    Outcome,
    PoisonCleared,
    PoisonInjected,
    ScrubFound,
    SettingChanged,
    SilentlyCorrupted,
)
from daxemu.failure_kind import FailureKind
from daxemu.fs.data_ops import Origin
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.inode import ROOT_INO
from daxemu.fs.pmd_fault import pmd_ranges
from daxemu.host.fuse.extra_operations import ExtraOperations
from daxemu.host.fuse.freeze import Freeze
from daxemu.host.fuse.layouts import LayoutTable
from daxemu.host.fuse.operations import Answer, Operations, PoisonedRead
from daxemu.host.fuse.session import Session
from daxemu.host.mappings import Mappings
from daxemu.host.proc.mountinfo import printable
from daxemu.host.tracer.link import TracerLink
from daxemu.host.unexpected import GuardedNursery, Unexpected
from daxemu.mm.memory_failure import Incident, MappingRange, MemoryFailures
from daxemu.pmem.inject import (
    check_range,
    corrupt_in_pieces,
    failed_pages,
    inject_all,
    scrub_in_pieces,
    uninject,
)
from daxemu.pmem.pmem import Pmem
from daxemu.ranges import Range
from daxemu.repair.strategy import Verdict
from daxemu.supervisor import questions
from daxemu.supervisor.clones import Clones
from daxemu.supervisor.consumption import Consumption
from daxemu.supervisor.event_log import EventLog
from daxemu.supervisor.failures import Failures
from daxemu.supervisor.madvise import madvise_inject_error
from daxemu.supervisor.populate import Populating
from daxemu.supervisor.repairs import Repairs
from daxemu.supervisor.scrub import Scrubber
from daxemu.supervisor.settings import log_size, one_of, seconds, size_text
from daxemu.supervisor.survey import survey_in_pieces
from daxemu.supervisor.under_way import Counted, UnderWay
from daxemu.uapi import PAGE_SHIFT, PAGE_SIZE, SECTOR_SIZE, Ino, page_align_down

BATCH = 128
"""Ranges of one request that are poisoned in one step."""
CLEARED = 16 << 20
"""Bytes that are cleared in one step: the host takes them back and gives files zeros, 10 ms."""


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
        repairs: Repairs,
    ) -> None:
        self.repairs = repairs
        self.pmem = pmem
        self.mm = mm
        self.fs = fs
        self.session = session
        self.log = log
        self.unexpected = Unexpected(log.emit)
        self.under_way = UnderWay()
        self.consumption = Consumption(self)
        met = self.consumption
        self.operations = Operations(fs, self._on_read, met.on_write, session.forget_attributes)
        self.operations.contain(self.unexpected)
        self.clones = Clones(self)
        self.scrubber = Scrubber(self._scrub_in_background)
        self.supplement_missing = supplement_missing
        self.layouts: LayoutTable | None = None
        """Who holds layouts; None if nobody does."""
        self._failures: Failures | None = None
        self._populating: Populating | None = None
        self._tracer: TracerLink | None = None
        self._nursery: GuardedNursery | None = None
        self._mappings: Mappings | None = None

    @property
    def tracer(self) -> TracerLink | None:
        """The tracer; None before ``start``."""
        return self._tracer

    def start(self, mappings: Mappings, tracer: TracerLink, nursery: trio.Nursery) -> None:
        """Give it what needs a running event loop. Precondition of everything below."""
        self._mappings = mappings
        self._tracer = tracer
        self._nursery = guarded = self.unexpected.nursery(nursery)
        counted = Counted(guarded, self.under_way, but=("Failures._await_late",))
        self._failures = Failures(self.mm, mappings, tracer, self.log.emit, counted, self.repairs.failed)
        self._populating = Populating(
            tracer, mappings.dev, self.session.revoke, self.fs.names.path_of, self.log.emit, guarded
        )
        self.fs.on_shutdown = self._on_shutdown
        self.mm.is_hosted = True
        self.operations.write_back = self.write_back
        if self.supplement_missing is None:
            self._extra = ExtraOperations(
                self.fs,
                self.session.mount.dev,
                self.clones,
                self.write_back,
                self.operations.file_modified,
                self.session.forget_attributes,
                self.operations.open_files,
                guarded,
                self.unexpected,
            )

    async def _on_read(self, read: PoisonedRead) -> Answer:
        with self.under_way.one("a load or read of poison"):
            return await self.consumption.on_read(read)

    def _on_shutdown(self) -> None:
        """The page cache must not go on answering; but who had something mapped is told first."""
        if self.operations.freeze is not None:
            self.operations.freeze.thaw()
        if not self.mm.is_handling:
            Counted(self.nursery, self.under_way).start_soon(self.failures.revoke_everything)

    @property
    def nursery(self) -> GuardedNursery:
        """For what outlives a request."""
        assert self._nursery is not None
        return self._nursery

    @property
    def failures(self) -> Failures:
        assert self._failures is not None
        return self._failures

    @property
    def populating(self) -> Populating:
        assert self._populating is not None
        return self._populating

    # -- poison

    async def inject(self, request: p.Inject) -> p.Injected:
        """Poison each range, one memory failure each. Nothing is changed unless all ranges are good.

        More than BATCH ranges of the device are poisoned and handled in batches, each of them at one moment.
        Raises InvalidArgument, NoDevice, NoSpace.
        """
        self.check_present()
        found, holes = await self._resolve(request.ino, request.ranges)
        latent = (kind := request.failure_kind) is FailureKind.LATENT
        if kind is FailureKind.SILENT:
            return await self._corrupt(found, holes, request.seed)
        self.pmem.dax.make_room_for_poison(len(found))
        total = p.Injected([], False, holes)
        for first in range(0, len(found), BATCH):
            self.check_present()
            results, rounded = await self._inject_batch(found[first : first + BATCH], latent=latent)
            total.ranges += results
            total.rounded |= rounded
        return total

    async def _inject_batch(self, found: list[Range], *, latent: bool) -> tuple[list[p.PoisonedRange], bool]:
        done = []
        for bad, part in self._poison(found, latent=latent):
            self.log.emit(PoisonInjected(offset=bad.start, length=bad.length, latent=latent))
            failure = None if latent else self.mm.memory_failure(*failed_pages(self.pmem, bad), 0)
            if failure is not None:
                self.consumption.failing.append((bad, failure))
            self.consumption.forget(bad)
            done.append((bad, part, failure))
        results = [p.PoisonedRange(0, 0, 0, 0, "", 0, 0, 0)] * len(done)
        async with trio.open_nursery() as nursery:
            for index, (bad, _, failure) in enumerate(done):
                nursery.start_soon(self._fail, bad, failure, results, index)
        return results, any(bad != part for bad, part, _ in done)

    def _poison(self, found: list[Range], *, latent: bool) -> Iterator[tuple[Range, Range]]:
        """Make ranges bad; each as it is then, and as it was asked for.

        All at once, but one by one where there are 2 MiB pages: whether a page is part of one when it fails
        depends on what was bad before.
        """
        one_by_one = self.pmem.dax.align != PAGE_SIZE
        for batch in [[part] for part in found] if one_by_one else [found]:
            yield from zip(inject_all(self.pmem, batch, latent=latent), batch, strict=True)

    async def _fail(
        self, bad: Range, failure: Incident | None, results: list[p.PoisonedRange], index: int
    ) -> None:
        pfn, nr_pages = failed_pages(self.pmem, bad)
        if failure is None:
            await self._hide(bad)
            outcome, (signals, processes) = FailureKind.LATENT.value, (0, 0)
        else:
            try:
                result, (signals, processes) = await self.failures.handle(failure)
            finally:
                self.consumption.failing.remove((bad, failure))
            outcome = result.value
        results[index] = p.PoisonedRange(
            bad.start, bad.length, pfn, nr_pages, outcome, signals, signals, processes
        )

    async def _corrupt(self, found: list[Range], holes: int, seed: int) -> p.Injected:
        """Change bytes on the media, and have whoever maps them see it."""
        results = []
        for part in found:
            incident = self._unreported(part)
            await self.failures.hide(incident)  # what is dirty there is written back before, not after
            for _ in corrupt_in_pieces(self.pmem, part.start, part.length, seed):
                await trio.lowlevel.checkpoint()
            self.log.emit(SilentlyCorrupted(offset=part.start, length=part.length))
            await self.failures.hide(incident)
            pfn, nr_pages = failed_pages(self.pmem, part)
            silent = FailureKind.SILENT.value
            results.append(p.PoisonedRange(part.start, part.length, pfn, nr_pages, silent, 0, 0, 0))
        return p.Injected(results, False, holes)

    async def _hide(self, bad: Range) -> None:
        """Latent poison: pages that are mapped now must come and ask, or a load would never meet it."""
        await self.failures.hide(self._unreported(bad))

    def _unreported(self, bad: Range) -> Incident:
        """The pages of files that hold any byte of ``bad``; not a failure, as nobody knows of it."""
        pfn, nr_pages = failed_pages(self.pmem, bad)
        incident = self.mm.removal(pfn, nr_pages)
        for owner in self.fs.rmap.owners(bad.start >> PAGE_SHIFT, -(-bad.end >> PAGE_SHIFT)):
            if owner.ino >= ROOT_INO:
                pmds = pmd_ranges(self.fs.dax, self.fs.rmap, self.fs.names, owner, bad)
                first = self.pmem.dax.base_pfn + owner.dev_block
                hurt = MappingRange(owner.ino, owner.file_block, owner.length, first, pmds)
                incident.mappings.append(hurt)
        return incident

    async def clear(self, request: p.Clear) -> p.Cleared:
        """Make ranges healthy; their poisoned sectors read as zeros. Raises InvalidArgument, NoDevice."""
        self.check_present()
        found, _ = await self._resolve(request.ino, request.ranges)
        cleared: list[tuple[int, int]] = []
        for part in found:
            # Between two batches sectors may go bad: those behind the last batch stay so.
            for some in self.pmem.dax.poisoned_in_pieces(part, BATCH):
                for bad in _of_at_most(some, CLEARED):
                    self.check_present()
                    cleared += [(r.start, r.length) for r in self._clear_batch(bad)]
                    await trio.lowlevel.checkpoint()
        return p.Cleared(cleared, sum(length for _, length in cleared))

    def _clear_batch(self, bad: list[Range]) -> list[Range]:
        cleared: list[Range] = []
        with self.pmem.dax.clearing(bad), self.pmem.badblocks.one_change():
            for part in bad:
                blocks = [_blocks_of(*part)]
                self.repairs.store_begins(blocks, Origin.SYSCALL)
                for good in uninject(self.pmem, part.start, part.length):
                    self.log.emit(PoisonCleared(offset=good.start, length=good.length, by="request"))
                    self.failures.forget_hidden(self._unreported(good))
                    cleared.append(good)
                self.repairs.store_done(blocks, Origin.SYSCALL)
        self.fs.adopt_cleared(cleared)
        return cleared

    async def scrub(self) -> p.Cleared:
        """Find latent poison: badblocks only, no signals; and have the repair strategy look at everything.
        Raises NoDevice.
        """
        self.check_present()
        found: list[tuple[int, int]] = []
        for part in scrub_in_pieces(self.pmem, BATCH):
            for new in part:
                self.log.emit(ScrubFound(offset=new.start, length=new.length))
                await self._repair_now(new)
                found.append((new.start, new.length))
            await trio.lowlevel.checkpoint()
        await self.repairs.scrub()
        return p.Cleared(found, sum(length for _, length in found))

    async def _scrub_in_background(self) -> None:
        with self.unexpected.caught("the background scrub"):
            await self.scrub()

    async def device_page(self, ino: Ino, offset: int) -> int | None:
        """The device offset of the page of a file that holds byte ``offset``; None for a hole."""
        for attempt in range(2):
            if found := await self._file_ranges(ino, [(offset, 1)]):
                return page_align_down(found[0].start)
            if attempt == 0:
                await self.write_back(ino)
        return None

    async def _resolve(self, ino: Ino | None, ranges: list[tuple[int, int]]) -> tuple[list[Range], int]:
        """Device byte ranges of what was asked for, and how many bytes of it are holes. Raises
        InvalidArgument.
        """
        if not ranges:
            raise InvalidArgument("no range given: give at least one [offset, length]")
        size = self.pmem.dax.size if ino is None else self.fs.names.regular(ino)[0].size
        what = "the device" if ino is None else self.fs.names.path_of(ino)
        asked: list[Range] = []
        async for part in _in_pieces(ranges):
            for offset, length in part:
                check_range(offset, length, size, what)
                asked.append(Range(offset, offset + length))
        if ino is None:
            return asked, 0
        found = await self._file_ranges(ino, ranges)
        holes = sum(length for _, length in ranges) - sum(r.length for r in found)
        if holes:
            # What was stored through a mapping has no place on the media before it is written back.
            await self.write_back(ino)
            found = await self._file_ranges(ino, ranges)
            holes = sum(length for _, length in ranges) - sum(r.length for r in found)
        if not found:
            raise InvalidArgument(
                "the range is a hole, with no media behind it: write there first, or see daxemu map FILE"
            )
        return found, holes

    async def _file_ranges(self, ino: Ino, ranges: list[tuple[int, int]]) -> list[Range]:
        """Device byte ranges of ranges of a file. Up to BATCH ranges with up to BATCH extents each are
        looked up at one moment; of more, each BATCH is where the file has it at its moment.
        """
        found: list[Range] = []
        async for part in _in_pieces(ranges):
            for offset, length in part:
                end = offset + length
                while offset < end:
                    extents = self.fs.extents_of(ino)
                    last = extents.piece(offset // PAGE_SIZE, -(-end // PAGE_SIZE), BATCH)
                    stop = min(end, last * PAGE_SIZE)
                    found += self.fs.device_ranges(ino, offset, stop - offset)
                    offset = stop
                    if offset < end:
                        await trio.lowlevel.checkpoint()
        return found

    async def write_back(self, ino: Ino, *, has_mutex: bool = False) -> None:
        """Have a file's dirty pages written back to us, and leave them mapped.

        Where the file cannot be opened (one without a name, and no root) the pages are revoked, which writes
        them back too; the processes that had them present are remembered. ``has_mutex``: the caller holds
        ``mf_mutex``.
        """
        path = self.fs.names.path_bytes(ino)
        if not await trio.to_thread.run_sync(self.session.write_back, ino, path):
            await self.failures.hide(self.whole_file(ino), has_mutex=has_mutex)

    def whole_file(self, ino: Ino) -> Incident:
        """All pages of a file, as if they failed: what to collect and to revoke."""
        pages = -(-self.fs.names.get(ino).size // PAGE_SIZE)
        return Incident(0, 0, 0, 0, mappings=[MappingRange(ino, 0, pages, 0)])

    def check_present(self) -> None:
        """Raises NoDevice after a removal."""
        if self.pmem.dax.is_leaving:
            raise NoDevice("the device was removed: daxemu umount, then mount it again")

    # -- removal

    async def remove(self) -> p.Removed:
        """Surprise removal: kill_dax(), one notification for the whole range, everybody who maps it is told.

        As xfs_dax_notify_dev_failure(): freeze, kill, shut down, thaw. No access fails before every victim is
        signalled, or SIGNAL_PATIENCE is over. Raises NoDevice if it is gone already.
        """
        self.check_present()
        was_idle = self.pmem.dax.dax_is_idle()
        if not was_idle:
            self.log.emit(DaxActiveAtRemove(device=self.pmem.name))
        incident = self.mm.removal(self.pmem.pages.start, self.pmem.pages.length)
        self.scrubber.stop()
        with self._frozen() as freeze:
            with self.mm.during(incident):
                self.pmem.dax.pre_remove()
            _, (signals, processes) = await self.failures.handle(incident, collected=freeze.admit)
        self.pmem.dax.kill_dax()
        self.pmem.detach(self.mm)
        device = self.pmem.name
        self.log.emit(DeviceRemoved(device=device, told=signals, signals=signals, processes=processes))
        return p.Removed(signals, was_idle, signals, processes)

    @contextmanager
    def _frozen(self) -> Iterator[Freeze]:
        """Hold reads and writes back until the filesystem is shut down, or the context ends."""
        freeze = self.operations.freeze = Freeze()
        with self.fs.layouts.suspended():  # or C would answer them
            try:
                yield freeze
            finally:
                freeze.thaw()

    # -- files

    async def reflink(self, request: p.Reflink) -> p.Shared:
        """Share blocks between files, as FICLONERANGE does."""
        return p.Shared(
            await self.clones.clone(
                request.src, request.src_offset, request.dst, request.dst_offset, request.length
            )
        )

    async def badblocks(self) -> p.BadblockList:
        """See questions.badblocks()."""
        return await questions.badblocks(self.pmem)

    # -- repair

    async def repair(self, request: p.Repair) -> p.Repaired:
        """Choose a strategy, if one is given, and have it see to everything that is known to be bad.

        Raises InvalidArgument, NoDevice, and what the strategy refuses with.
        """
        self.check_present()
        if request.strategy is not None:
            await self._choose(request.strategy)
            self.log.emit(SettingChanged(name="repair", value=request.strategy))
        total, reason = p.Repaired(self.repairs.text, 0, 0, 0, None), None
        for part in self.pmem.badblocks.in_pieces(BATCH):
            for bad in part:
                verdict = await self._repair_now(Range(bad.start * SECTOR_SIZE, bad.end * SECTOR_SIZE))
                if verdict is not None:
                    total.recovered += verdict.recovered.total
                    total.lost += verdict.lost.total
                    reason = verdict.reason or reason
            await trio.lowlevel.checkpoint()
        for lost in self.fs.damaged_in_pieces():
            total.left += sum(_blocks_of(bad.offset, bad.offset + bad.length).length for bad in lost)
            await trio.lowlevel.checkpoint()
        total.reason = reason
        return total

    async def _choose(self, strategy: str) -> None:
        await trio.to_thread.run_sync(self.repairs.check, strategy)
        await self.repairs.attach(strategy)
        self.consumption.forget(Range(0, self.pmem.dax.size))

    async def _repair_now(self, bad: Range) -> Verdict | None:
        """Ask the strategy about device bytes that are known to be bad."""
        if not self.repairs.is_active:
            return None
        mapped = self._unreported(bad)
        return self.repairs.repair_now(_blocks_of(*bad), mapped, await self.failures.holders(mapped))

    # -- settings and state

    async def set(self, wanted: dict[str, str]) -> p.Done:
        """Change settings. Raises InvalidArgument for one there is not or a value it cannot have; none is
        changed then.
        """
        settings: dict[str, Callable[[str], Callable[[], None]]] = {
            "early_kill": self._early_kill,
            "log_size": self._log_size,
            "lost_store": self._lost_store,
            "scrub_interval": self._scrub_interval,
        }
        changes: list[Callable[[], None]] = []
        for name, value in wanted.items():
            if name != "repair" and name not in settings:
                known = ", ".join(sorted(["repair", *settings]))
                raise InvalidArgument(f"no setting {name!r}: there are {known}")
            try:
                changes += [settings[name](value)] if name in settings else []
            except InvalidArgument as error:
                raise InvalidArgument(f"{name}={value}: {error}") from error
        if "repair" in wanted:  # the one that takes its time, and can fail
            await self._choose(wanted["repair"])
        for change in changes:
            change()
        for name, value in wanted.items():
            self.log.emit(SettingChanged(name=name, value=value))
        return p.Done()

    def _early_kill(self, text: str) -> Callable[[], None]:
        value = one_of(text, "0", "1") == "1"
        return lambda: setattr(self.mm, "sysctl_early_kill", value)

    def _lost_store(self, text: str) -> Callable[[], None]:
        value = one_of(text, "silent", "eio") == "eio"
        return lambda: setattr(self.fs, "lost_store_is_eio", value)

    def _log_size(self, text: str) -> Callable[[], None]:
        value = log_size(text)
        return lambda: setattr(self.log, "limit", value)

    def _scrub_interval(self, text: str) -> Callable[[], None]:
        return partial(self.scrubber.set, seconds(text))

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
            scrubs=self.scrubber.scrubs,
            settings={
                "early_kill": "1" if self.mm.sysctl_early_kill else "0",
                "log_size": size_text(self.log.limit),
                "lost_store": "eio" if self.fs.lost_store_is_eio else "silent",
                "repair": self.repairs.text,
                "scrub_interval": f"{self.scrubber.interval:.12g}",
            },
            repair=self.repairs.report(),
            counters={outcome.value.lower(): self.mm.counters[outcome] for outcome in Outcome},
            events=self.log.emitted,
            supplement=self.supplement_missing or "loaded",
            layouts="off" if self.layouts is None else f"{self.layouts.answered} requests answered",
            tracer=f"pid {tracer}" if tracer is not None else "not running",
        )

    async def answer(self, request: p.AnyRequest) -> msgspec.Struct:
        """Do what a request asks. Raises DaxemuError."""
        match request:
            case p.Inject():
                with self.under_way.one("an injection"):
                    return await self.inject(request)
            case p.Madvise():
                with self.under_way.one("a madvise(2)"):
                    return await madvise_inject_error(self, request)
            case p.Clear():
                return await self.clear(request)
            case p.Settle():
                return await self.under_way.settle(request.patience)
            case p.Scrub():
                return await self.scrub()
            case p.Repair():
                return await self.repair(request)
            case p.GetBadblocks():
                return await self.badblocks()
            case p.Damaged():
                return await questions.damaged(self.fs)
            case p.Map(ino=ino):
                return await questions.file_map(self.pmem, self.fs, ino)
            case p.Reflink():
                return await self.reflink(request)
            case p.Remove():
                with self.under_way.one("the removal of the device"):
                    return await self.remove()
            case p.Status():
                return self.status()
            case p.Survey():
                return await questions.result_of(survey_in_pieces(self.pmem, self.fs, request))
            case p.Set(settings=settings):
                return await self.set(settings)
        raise InvalidArgument(f"cannot do {type(request).__name__} here")


async def _in_pieces(ranges: list[tuple[int, int]]) -> AsyncIterator[list[tuple[int, int]]]:
    """Yield BATCH ranges at a time; the tasks that wait have their turn in between."""
    for first in range(0, len(ranges), BATCH):
        if first:
            await trio.lowlevel.checkpoint()
        yield ranges[first : first + BATCH]


def _of_at_most(ranges: list[Range], length: int) -> Iterator[list[Range]]:
    """``ranges`` in lists of at most ``length`` bytes, each; a longer range in several."""
    some: list[Range] = []
    left = length
    for part in ranges:
        while part:
            some.append(part.clip(part.start, part.start + left))
            part, left = Range(some[-1].end, part.end), left - some[-1].length
            if not left:
                yield some
                some, left = [], length
    if some:
        yield some


def _span(part: Range) -> tuple[int, int]:
    return part.start, part.length


def _blocks_of(start: int, end: int) -> Range:
    """The blocks that hold bytes ``[start, end)``."""
    return Range(start >> PAGE_SHIFT, -(-end >> PAGE_SHIFT))


def open_core(pmem: Pmem, log: EventLog, owner: tuple[int, int]) -> tuple[MemoryFailures, Filesystem]:
    """The core of a machine on ``pmem``. Raises CorruptMetadata, Busy, NoSpace."""
    mm = MemoryFailures(log.emit)
    pmem.dax.on_notify = lambda offset, length, flags: log.emit(
        NotifyFailure(offset=offset, length=length, flags=flags)
    )
    pmem.make_struct_pages()
    pmem.attach(mm)
    sysfs = pmem.show_in_sysfs()
    mm.on_count = lambda: sysfs.show_counters(mm.counters)
    return mm, Filesystem(pmem.dax, mm, log.emit, owner=owner)
