"""Consumption of poison by a load, a store or read(2), and writes that cover part of a poisoned page.

The repair strategy is asked first. If the strategy recovers the data, the access is tried again, and no
process is signalled. Belongs to the trio thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import trio

from daxemu.errors import MediaError
from daxemu.host.mappings import Access, Answer, Mappings
from daxemu.host.proc.processes import process_of
from daxemu.host.unexpected import Nursery
from daxemu.mm.memory_failure import Incident, MemoryFailures
from daxemu.mm.pmd import mapping_shift
from daxemu.pmem.inject import failed_pages
from daxemu.pmem.pmem import Pmem
from daxemu.ranges import Range, RangeSet
from daxemu.supervisor.failures import Failures
from daxemu.supervisor.repairs import Repairs
from daxemu.supervisor.signals import Signals
from daxemu.uapi import MF_ACTION_REQUIRED, PAGE_SHIFT, PAGE_SIZE, page_align_down
from daxemu.units import PHYS_PFN, sectors_of


class Consumption:
    """Decides about accesses to poison.

    ``failing``: device bytes with a failure under way, and the incident of each.
    """

    def __init__(
        self,
        pmem: Pmem,
        mm: MemoryFailures,
        failures: Failures,
        signals: Signals,
        mappings: Mappings,
        repairs: Repairs,
        tasks: Nursery,
        supplement_missing: str | None,
    ) -> None:
        """``tasks`` runs the failures of discovered poison. ``supplement_missing``: the reason
        why reads do not name their thread; None if reads name the thread.
        """
        self._pmem = pmem
        self._mm = mm
        self._failures = failures
        self._signals = signals
        self._mappings = mappings
        self._repairs = repairs
        self._tasks = tasks
        self._supplement_missing = supplement_missing
        self._asking = trio.Lock()
        self.failing: list[tuple[Range, Incident]] = []
        self._unrecovered: dict[Range, Incident] = {}
        """Device bytes of latent poison that the strategy did not recover, and the incident of each."""

    async def on_access(self, access: Access) -> Answer:
        """Return the answer to an access that failed: a read(2), a load, or a store through a direct mapping.

        For an access to poison: ask the strategy, start the failure of latent poison, and have the tracer
        make the consumer's signal exact.
        """
        error = access.error
        ranges = error.ranges if isinstance(error, MediaError) else ()
        if isinstance(error, MediaError) and await self._recover(error):
            return Answer.AGAIN
        poisoned_bytes = sum(part.outer(PAGE_SIZE).length for part in ranges)
        if not ranges or access.length <= max(poisoned_bytes, PAGE_SIZE):
            badblocks = self._pmem.badblocks
            is_latent = bool(ranges) and not any(
                any(badblocks.overlapping_bytes(part.start, part.length)) for part in ranges
            )
            discover = partial(self._discover, ranges, -1)
            if await self._mappings.serves_populate(access, is_latent=is_latent, discover=discover):
                return Answer.ZEROS
        if isinstance(error, MediaError):
            found = self._discover(ranges, process_of(access.tid) if access.tid else -1)
            pfn, _ = failed_pages(self._pmem, ranges[0] if ranges else Range(0, 0))
            return await self._signals.consumed(
                access, pfn, self._supplement_missing, found=bool(found), shift=_shift(access, found)
            )
        return Answer.ERROR

    def _discover(self, ranges: Sequence[Range], consumer: int) -> list[Incident]:
        """Add poison to badblocks, and start a failure for latent poison. Return the incidents.

        ``ranges``: device bytes. ``consumer``: id of the process that the page fault signals; -1 if none.
        """
        found: list[Incident] = []
        for part in ranges:
            sectors = sectors_of(part)
            if self._pmem.badblocks.set(sectors.start, sectors.length):
                # Not awaited: the failure revokes a page that the kernel keeps locked until this read is
                # answered.
                for incident in self._incidents(part):
                    found.append(incident)
                    self._tasks.start_soon(self._failures.handle, incident, None, consumer)
        return found

    async def on_write(self, error: MediaError) -> bool:
        """Ask the strategy about a write over part of a poisoned page. Return True to try the write again.

        No signal is sent.
        """
        return await self._recover(error)

    def forget(self, part: Range) -> None:
        """Allow another question to the strategy about device bytes: poison or strategy are new."""
        for known in [known for known in self._unrecovered if known.clip(*part)]:
            del self._unrecovered[known]

    def _failure(self, part: Range) -> Incident:
        return self._mm.memory_failure(*failed_pages(self._pmem, part), MF_ACTION_REQUIRED)

    def _incidents(self, part: Range) -> list[Incident]:
        """Return the incidents of poison just discovered in device bytes.

        Bytes that the strategy was asked about keep their incident. The rest gets new incidents.
        """
        asked = {known: incident for known, incident in self._unrecovered.items() if known.clip(*part)}
        self.forget(part)
        return [*asked.values(), *map(self._failure, RangeSet(asked).gaps(*part))]

    async def _recover(self, error: MediaError) -> bool:
        """Ask the strategy. Return True if all of the poison was recovered.

        The strategy is asked about new poison only, once. No page is revoked, because a read must not wait
        for a revoke. Pages that other processes have present hold the recovered data.
        """
        if not self._repairs.is_active or not error.ranges:
            return False
        async with self._asking:
            for part in error.ranges:
                if self._pmem.dax.is_poisoned(part.start, part.length) and not await self._is_recovered(part):
                    return False
        return True

    async def _is_recovered(self, part: Range) -> bool:
        if any(known.clip(*part) for known in self._unrecovered):
            return False
        if any(self._pmem.badblocks.overlapping_bytes(part.start, part.length)):
            latest = reversed(self.failing)
            under_way = next((incident for failed, incident in latest if failed.clip(*part)), None)
            return under_way is not None and await self._ask(under_way, part)
        incident = self._failure(part)
        if not await self._ask(incident, part):
            self._unrecovered[part] = incident
            return False
        self._mm.action_result(incident, 0)
        return True

    async def _ask(self, incident: Incident, part: Range) -> bool:
        """Ask the strategy about an incident. Return True if the device bytes ``part`` were recovered."""
        tasks = await self._failures.holders(incident)
        pfn, nr_pages = failed_pages(self._pmem, part)
        is_spared = self._repairs.failed(incident, tasks).spared.covers(pfn, pfn + nr_pages)
        # The bytes may have been poisoned again during the collect.
        return is_spared and not self._pmem.dax.is_poisoned(part.start, part.length)


def _shift(access: Access, found: Sequence[Incident]) -> int:
    """Return log2 of the size in bytes that the signal of a consumer names.

    The machine check of a load that finds poison names the mapping of the page. A page fault over known
    poison names a page (dax_fault_return()).
    """
    if access.address is None or access.vma is None:
        return PAGE_SHIFT
    index, address = PHYS_PFN(access.offset), page_align_down(access.address)
    shifts = (mapping_shift(incident, access.ino, index, address, access.vma) for incident in found)
    return max(shifts, default=PAGE_SHIFT)
