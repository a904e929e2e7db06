"""The verbs ``inject``, ``clear`` and ``scrub``."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import trio

from daxemu import protocol as p
from daxemu.events import Emit, Outcome, PoisonCleared, PoisonInjected, ScrubFound, SilentlyCorrupted
from daxemu.failure_kind import FailureKind
from daxemu.fs.data_ops import Origin
from daxemu.fs.filesystem import Filesystem
from daxemu.host.mappings import Mappings
from daxemu.mm.incident import Incident
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.pmem.inject import corrupt_in_pieces, failed_pages, inject_all, scrub_in_pieces, uninject
from daxemu.pmem.pmem import Pmem
from daxemu.ranges import Range
from daxemu.supervisor import incidents
from daxemu.supervisor.consumption import Consumption
from daxemu.supervisor.failures import Failures, Signalled
from daxemu.supervisor.strategy_host import StrategyHost
from daxemu.supervisor.verbs.device_ranges import BATCH, check_present, resolve
from daxemu.supervisor.verbs.repair import Repairing
from daxemu.uapi import PAGE_SIZE
from daxemu.units import blocks_of

CLEARED = 16 << 20
"""Bytes cleared in one step of the event loop: 10 ms, in which the host frees pages and supplies zeros."""


class Poison:
    """Poisons, clears and scrubs the media. Belongs to the trio thread."""

    def __init__(
        self,
        pmem: Pmem,
        mm: MemoryFailures,
        fs: Filesystem,
        mappings: Mappings,
        failures: Failures,
        consumption: Consumption,
        strategy_host: StrategyHost,
        repairing: Repairing,
        emit: Emit,
    ) -> None:
        self._pmem = pmem
        self._mm = mm
        self._fs = fs
        self._mappings = mappings
        self._failures = failures
        self._consumption = consumption
        self._strategy_host = strategy_host
        self._repairing = repairing
        self._emit = emit

    async def inject(self, request: p.Inject, *, on_poisoned: Callable[[], None] | None = None) -> p.Injected:
        """Poison the ranges, and handle one memory failure for each. An invalid range refuses all ranges.
        ``on_poisoned`` is called when the media of the first BATCH ranges has the failure, before any page is
        revoked.

        More than BATCH ranges of the device are poisoned and handled in batches, each batch at one moment.
        Raises InvalidArgument, NoDevice, NoSpace.
        """
        check_present(self._pmem)
        found, holes = await resolve(self._pmem, self._fs, self._mappings, request.ino, request.ranges)
        latent = (kind := request.failure_kind) is FailureKind.LATENT
        if kind is FailureKind.SILENT:
            parts = [Range(*part) for part in found]
            return await self._corrupt(parts, holes, request.seed, on_poisoned)
        self._pmem.dax.make_room_for_poison(len(found))
        total = p.Injected([], False, holes)
        for first in range(0, len(found), BATCH):
            check_present(self._pmem)
            batch = [Range(*part) for part in found[first : first + BATCH]]
            results, rounded = await self._inject_batch(batch, on_poisoned, latent=latent)
            total.ranges += results
            total.rounded |= rounded
        return total

    async def _inject_batch(
        self, found: list[Range], on_poisoned: Callable[[], None] | None, *, latent: bool
    ) -> tuple[list[p.PoisonedRange], bool]:
        poisoned: list[Range] = []
        is_rounded = False
        failures: list[Incident] = []
        for area, part in self._poison(found, latent=latent):
            self._emit(PoisonInjected(offset=area.start, length=area.length, latent=latent))
            if not latent:
                failures.append(self._mm.memory_failure(*failed_pages(self._pmem, area), 0))
                self._consumption.failing.append((area, failures[-1]))
            self._consumption.forget(area)
            poisoned.append(area)
            is_rounded |= area != part
        if on_poisoned is not None:
            on_poisoned()
        if latent:
            return [await self._revoke_latent(area) for area in poisoned], is_rounded
        await trio.lowlevel.checkpoint()
        try:
            handled = await self._failures.handle_all(failures)
        finally:
            for failing in zip(poisoned, failures, strict=True):
                self._consumption.failing.remove(failing)
        results = zip(poisoned, handled, strict=True)
        return [self._result(area, *done[:2]) for area, done in results], is_rounded

    def _poison(self, found: list[Range], *, latent: bool) -> Iterator[tuple[Range, Range]]:
        """Poison ranges of device bytes. Yield each range as poisoned, and as requested.

        All ranges are poisoned at once, except on a device with 2 MiB pages: earlier bad blocks decide if a
        page is part of a 2 MiB page at its failure, so the ranges are poisoned one by one.
        """
        one_by_one = self._pmem.dax.align != PAGE_SIZE
        for batch in [[part] for part in found] if one_by_one else [found]:
            yield from zip(inject_all(self._pmem, batch, latent=latent), batch, strict=True)

    async def _revoke_latent(self, poisoned: Range) -> p.PoisonedRange:
        """Revoke the pages of latent poison, and remember which processes had the pages present."""
        incident = incidents.of_device_range(self._pmem, self._fs, poisoned)
        if incident.mappings:
            await self._failures.revoke_latent(incident)
        else:
            await trio.lowlevel.checkpoint()
        return self._result(poisoned, FailureKind.LATENT, Signalled(0, 0))

    def _result(self, poisoned: Range, outcome: Outcome | FailureKind, done: Signalled) -> p.PoisonedRange:
        pages = failed_pages(self._pmem, poisoned)
        return p.PoisonedRange(poisoned.start, poisoned.length, *pages, outcome.value, done.signals, *done)

    async def _corrupt(
        self, found: list[Range], holes: int, seed: int, on_poisoned: Callable[[], None] | None
    ) -> p.Injected:
        """Change bytes on the media, and revoke their pages so that processes load the new bytes."""
        results = []
        for part in found:
            incident = incidents.of_device_range(self._pmem, self._fs, part)
            if on_poisoned is None:
                await self._failures.revoke_latent(incident)  # dirty pages are written back before the change
            for _ in corrupt_in_pieces(self._pmem, part.start, part.length, seed):
                await trio.lowlevel.checkpoint()
            self._emit(SilentlyCorrupted(offset=part.start, length=part.length))
            if on_poisoned is not None:
                on_poisoned()
            await self._failures.revoke_latent(incident)
            results.append(self._result(part, FailureKind.SILENT, Signalled(0, 0)))
        return p.Injected(results, False, holes)

    async def clear(self, request: p.Clear) -> p.Cleared:
        """Clear poison: cleared sectors read as zeros. Raises InvalidArgument, NoDevice."""
        check_present(self._pmem)
        found, _ = await resolve(self._pmem, self._fs, self._mappings, request.ino, request.ranges)
        cleared: list[tuple[int, int]] = []
        for part in (Range(*part) for part in found):
            # Sectors may be poisoned between two batches. New poison before the next batch is not cleared.
            for some in self._pmem.dax.poisoned_in_pieces(part, BATCH):
                for poisoned in _of_at_most(some, CLEARED):
                    check_present(self._pmem)
                    cleared += [(r.start, r.length) for r in self._clear_batch(poisoned)]
                    await trio.lowlevel.checkpoint()
        return p.Cleared(cleared, sum(length for _, length in cleared))

    def _clear_batch(self, poisoned: list[Range]) -> list[Range]:
        cleared: list[Range] = []
        with self._pmem.dax.clearing(poisoned), self._pmem.badblocks.one_change():
            for part in poisoned:
                blocks = [blocks_of(part)]
                self._strategy_host.store_begins(blocks, Origin.SYSCALL)
                for good in uninject(self._pmem, part.start, part.length):
                    self._emit(PoisonCleared(offset=good.start, length=good.length, by="request"))
                    self._failures.forget_latent(incidents.of_device_range(self._pmem, self._fs, good))
                    cleared.append(good)
                self._strategy_host.store_done(blocks, Origin.SYSCALL)
        self._fs.adopt_cleared(cleared)
        return cleared

    async def scrub(self) -> p.Cleared:
        """Turn latent poison into bad blocks, without signals, and ask the repair strategy about each.

        Then the strategy scrubs all blocks. Raises NoDevice.
        """
        check_present(self._pmem)
        found: list[tuple[int, int]] = []
        for part in scrub_in_pieces(self._pmem, BATCH):
            for new in part:
                self._emit(ScrubFound(offset=new.start, length=new.length))
                await self._repairing.repair_now(new)
                found.append((new.start, new.length))
            await trio.lowlevel.checkpoint()
        await self._strategy_host.scrub()
        return p.Cleared(found, sum(length for _, length in found))


def _of_at_most(ranges: list[Range], length: int) -> Iterator[list[Range]]:
    """Yield ``ranges`` in lists of at most ``length`` bytes each. A longer range is split between lists."""
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
