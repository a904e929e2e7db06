"""From a failure to the verdict of the repair strategy."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from daxemu.errors import DaxemuError
from daxemu.events import Emit, RepairFinished
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.rmap import Owner
from daxemu.mm.memory_failure import Incident, Part, Task
from daxemu.pmem.pmem import Pmem
from daxemu.protocol import RepairReport
from daxemu.ranges import Range, RangeSet
from daxemu.repair.strategy import Failure, Verdict
from daxemu.supervisor.strategy_host import StrategyHost
from daxemu.units import PFN_PHYS, blocks_of


@dataclass(frozen=True)
class RepairResult:
    """The verdicts on an incident.

    ``spared``: pfns with recovered data, for which no process needs a signal. ``errors``: the parts of the
    incident for which the strategy failed.
    """

    spared: RangeSet = field(default_factory=RangeSet)
    errors: Mapping[Part, DaxemuError] = field(default_factory=dict)


class Repairs:
    """Asks the strategy of one machine (held by ``host``) about failures, and counts the verdicts."""

    def __init__(self, pmem: Pmem, fs: Filesystem, host: StrategyHost, emit: Emit) -> None:
        self._pmem = pmem
        self._fs = fs
        self._host = host
        self._emit = emit
        self.counters = dict.fromkeys(("recovered", "lost", "cannot", "failed"), 0)
        """Number of verdicts of each kind."""
        self._results: WeakKeyDictionary[Incident, RepairResult] = WeakKeyDictionary()

    @property
    def is_active(self) -> bool:
        """See StrategyHost.is_active."""
        return self._host.is_active

    def report(self) -> RepairReport:
        """Return the state of the strategy, and the number of verdicts of each kind."""
        host = self._host
        return RepairReport(
            host.text,
            **self.counters,
            space_bytes=host.space_bytes(),
            broken=host.broken,
            progress=host.progress,
        )

    def failed(self, incident: Incident, tasks: Sequence[Task]) -> RepairResult:
        """Ask the strategy about an incident. Further calls for the same incident return the same result.

        Precondition: the pages are revoked, or a read waits for the pages. ``tasks``: the processes that had
        the pages present.
        """
        if not self._host.is_active or incident.pre_remove:
            return RepairResult()
        if (known := self._results.get(incident)) is not None:
            return known
        spared, errors = RangeSet(), dict[Part, DaxemuError]()
        result = self._results[incident] = RepairResult(spared, errors)
        for part in incident.parts:
            first = part.pfn - self._pmem.dax.base_pfn
            blocks = Range(first, first + part.nr_pages).clip(0, self._fs.allocator.total)
            if part.error is None and blocks:
                verdict = self._repair(blocks, self._writable(incident, tasks))
                if verdict is None:
                    errors[part] = self._host.error()
                elif verdict.transparent:
                    for run in verdict.recovered:
                        spared.add(run.start + self._pmem.dax.base_pfn, run.end + self._pmem.dax.base_pfn)
        return result

    def repair_now(self, blocks: Range, mapped: Incident, tasks: Sequence[Task]) -> Verdict | None:
        """Ask the strategy about the poison in ``blocks``, also if asked before. None if the strategy failed.

        ``mapped``: the file ranges of the blocks. ``tasks``: processes with pages of these ranges present.
        """
        return self._repair(blocks, self._writable(mapped, tasks)) if self._host.is_active else Verdict()

    def _writable(self, incident: Incident, tasks: Sequence[Task]) -> RangeSet:
        """Return the device blocks of the incident that may hold stores that the strategy has not seen: those
        present in a writable mapping of ``tasks``. The filesystem knows each store through a direct mapping.
        """
        found, base = self._fs.mapped_stores.copy(), self._pmem.dax.base_pfn
        if self._pmem.media.is_direct:
            return found
        for task in tasks:
            for run in task.present:
                for failed in incident.mappings if run.writable else ():
                    part = Range(run.index, run.index + run.nr_pages).clip(
                        failed.index, failed.index + failed.count
                    )
                    if failed.mapping == run.mapping and part:
                        start = failed.pfn - base + part.start - failed.index
                        found.add(start, start + part.length)
        return found

    def _repair(self, blocks: Range, unseen: RangeSet) -> Verdict | None:
        began = time.perf_counter()
        failure, owners = self._failure(blocks, unseen)
        if not failure.blocks and not failure.copies:
            return Verdict()  # free blocks, or a simulated failure: nothing to repair
        verdict = self._host.verdict(failure)
        if not failure.blocks:
            return verdict
        word = "failed" if verdict is None else verdict.word(failure)
        self.counters[word] += 1
        self._emit(
            RepairFinished(
                strategy=self._host.text,
                pfn=blocks.start + self._pmem.dax.base_pfn,
                nr_pages=blocks.length,
                verdict=word,
                transparent=verdict is not None and verdict.transparent,
                seconds=time.perf_counter() - began,
                lost=_not_recovered(owners, verdict.recovered if verdict is not None else RangeSet()),
                reason=verdict.reason if verdict is not None else self._host.broken,
            )
        )
        return verdict

    def _failure(self, blocks: Range, unseen: RangeSet) -> tuple[Failure, list[Owner]]:
        volume = self._host.volume()
        poisoned = RangeSet(blocks_of(part) for part in volume.poison(blocks))
        used = tuple(part for run in volume.in_use(blocks) for part in poisoned.overlapping(*run))
        copies = tuple(position for run in poisoned for position in volume.reserved.positions(run))
        stale = RangeSet(part for run in used for part in self._host.stale(run))
        for run in used:  # no option makes a strategy trust a copy that is known to be too old
            for part in self._fs.mapped_stores.overlapping(*run):
                stale.add(*part.clip(*run))
        owners = [owner for run in used for owner in volume.owners(run)]
        return Failure(used, unseen, stale, copies), owners


def _not_recovered(owners: list[Owner], recovered: RangeSet) -> list[tuple[int, int, int]]:
    """Return (inode, offset, length) in bytes for every block of ``owners`` outside ``recovered``."""
    found = []
    for owner in owners:
        for part in recovered.gaps(owner.dev_block, owner.dev_block + owner.length):
            at = owner.file_block + part.start - owner.dev_block
            found.append((owner.ino, PFN_PHYS(at), PFN_PHYS(part.length)))
    return found
