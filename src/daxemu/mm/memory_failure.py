"""memory_failure() for device memory: driver of each page, victims, outcome (mm/memory-failure.c).

All of the module is decisions over values: no function reads /proc, unmaps or signals. Addresses and offsets
are bytes, indexes and counts are pages.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from daxemu.errors import Busy, DaxemuError, NoDevice, Unsupported
from daxemu.events import Emit, MemoryFailureHandled, Outcome, OutsideKernelControl, PageType
from daxemu.mm.incident import FileId, Incident, IncidentDraft, MappingRange, Part, PfnMapping
from daxemu.mm.pagemap import DevPagemap
from daxemu.mm.pfn_space import PfnAddressSpace, PfnAddressSpaces
from daxemu.mm.to_kill import (
    PresentRun,
    Task,
    Thread,
    ToKill,
    collect_procs,
    collect_procs_pfn,
    find_early_kill_thread,
    task_early_kill,
)
from daxemu.ranges import Range, RangeSet, merged
from daxemu.uapi import MF_MEM_PRE_REMOVE, PAGE_SIZE, U64_MAX, Ino, Pfn

__all__ = [
    "FileId",
    "Incident",
    "MappingRange",
    "MemoryFailures",
    "Part",
    "PfnMapping",
    "PresentRun",
    "Task",
    "Thread",
    "ToKill",
    "collect_procs",
    "collect_procs_pfn",
    "find_early_kill_thread",
    "task_early_kill",
]
"""The interface of mm/memory-failure.c: also the values of ``incident`` and the choices of ``to_kill``."""

_NO_ERRORS: Mapping[Part, DaxemuError] = {}


class MemoryFailures:
    """The machine's memory-failure state: pagemaps, pfn address spaces, the sysctl, the counters.

    The kernel keeps this state in global variables. An object allows several machines in one process.
    """

    def __init__(
        self,
        emit: Emit,
        *,
        is_hosted: bool = False,
        on_count: Callable[[Mapping[Outcome, int]], None] = lambda counters: None,
    ) -> None:
        """``is_hosted``: a host executes each incident and calls :meth:`conclude` after the signals.
        ``on_count`` is called with the counters after a change.
        """
        self.sysctl_early_kill = False
        self.counters: dict[Outcome, int] = dict.fromkeys(Outcome, 0)
        self._emit = emit
        self._on_count = on_count
        self._is_hosted = is_hosted
        self.pfn_spaces = PfnAddressSpaces()
        self._pagemaps: list[DevPagemap] = []
        self._serial = itertools.count(1)
        self._current: IncidentDraft | None = None

    # -- dev_pagemap

    def memremap_pages(self, pgmap: DevPagemap) -> None:
        """Register a pagemap. Raises Busy (-EBUSY) if a range overlaps a registered pagemap."""
        for other in self._pagemaps:
            for mine, theirs in itertools.product(pgmap.ranges, other.ranges):
                if mine.clip(*theirs):
                    raise Busy(f"{pgmap.name}: pfns {mine.start:#x}-{mine.end:#x} belong to {other.name}")
        self._pagemaps.append(pgmap)

    def memunmap_pages(self, pgmap: DevPagemap) -> None:
        """Unregister a pagemap."""
        self._pagemaps.remove(pgmap)

    # -- the failure

    def memory_failure(self, pfn: Pfn, nr_pages: int, flags: int) -> Incident:
        """``memory_failure()`` for a range, up to the point where processes must be looked at.

        Each driver is called once for each of its parts of the range: pagemaps first, then pfn address spaces
        for the pages without struct pages. The incident holds the work for ``host``. The parts of the
        incident hold the answers of the drivers. The caller must pass the incident to :meth:`action_result`.
        Pages of no driver are logged as outside kernel control, and belong to no part. Raises NoDevice
        (-ENXIO) if no page of the range has a driver.

        A poisoned page is handled like any other page. The kernel's "already poisoned page" is for pages of
        the kernel's own allocator. The kernel's code for DAX and for pages without struct pages does not test
        PG_hwpoison.
        """
        draft = self.draft(pfn, nr_pages, flags)
        with self.during(draft):
            handled = RangeSet()
            for pgmap in self._pagemaps:
                for part in pgmap.overlapping(pfn, pfn + nr_pages):
                    handled.add(*part)
                self._memory_failure_dev_pagemap(draft, pgmap, pfn, nr_pages)
            for gap in list(handled.gaps(pfn, pfn + nr_pages)):
                for space, part in self.pfn_spaces.overlapping(*gap):
                    handled.add(*part)
                    self._memory_failure_pfn(draft, space, part.start, part.length)
        for gap in handled.gaps(pfn, pfn + nr_pages):
            self._emit(OutsideKernelControl(pfn=gap.start, nr_pages=gap.length))
        if not draft.parts:
            raise NoDevice(f"pfn {pfn:#x}+{nr_pages}: memory outside kernel control")
        return draft.complete()

    def dev_pagemap_failure(self, pgmap: DevPagemap, flags: int = 0) -> Incident:
        """Fail all data pages of a pagemap. The driver is called once for each range of the pagemap.

        Counterpart of ``dev_pagemap_failure()``, proposed in 2021 for the removal of a device.
        """
        first, last = pgmap.ranges[0], pgmap.ranges[-1]
        draft = self.draft(first.start, sum(r.length for r in pgmap.ranges), flags)
        with self.during(draft):
            self._memory_failure_dev_pagemap(draft, pgmap, first.start, last.end - first.start, data=True)
        return draft.complete()

    def _memory_failure_dev_pagemap(
        self, draft: IncidentDraft, pgmap: DevPagemap, pfn: Pfn, nr_pages: int, *, data: bool = False
    ) -> None:
        """``memory_failure_dev_pagemap()``. With ``data``, skip the device's metadata space (the altmap)."""
        if not data:
            for altmap in pgmap.altmap_overlapping(pfn, pfn + nr_pages):
                error = NoDevice(f"{pgmap.name}: device metadata space is not recoverable")
                draft.parts.append(Part(PageType.DAX, altmap.start, altmap.length, error))
        for span in pgmap.pfn_valid(pfn, pfn + nr_pages):
            failed: DaxemuError | None = None
            try:
                if pgmap.ops is None:
                    raise Unsupported(f"{pgmap.name}: no ->memory_failure")
                pgmap.ops.memory_failure(pgmap, span.start, span.length, draft.flags)
            except Unsupported as error:
                # mf_generic_kill_procs() uses the page's own mapping. In daxemu only the holder knows
                # mappings, so dax_lock_folio() finds nothing to lock, and no process is signalled.
                failed = Busy(f"{error}, and the generic handler knows of no mapping")
            except DaxemuError as error:
                failed = error
            draft.parts.append(Part(PageType.DAX, span.start, span.length, failed))
        if pgmap.memmap is not None and not draft.flags & MF_MEM_PRE_REMOVE:
            # SetPageHWPoison() of mf_dax_kill_procs(): only pages of files, each page once.
            pages = {(each.pfn, each.pfn + each.count) for each in draft.mappings}
            pgmap.memmap.set_hwpoison(*merged(sorted(pages)))

    def _memory_failure_pfn(
        self, draft: IncidentDraft, space: PfnAddressSpace, pfn: Pfn, nr_pages: int
    ) -> None:
        """``memory_failure_pfn()``."""
        assert space.ops is not None
        draft.pfn_mappings += space.ops.pfn_to_pgoff(space, pfn, nr_pages)
        failed: DaxemuError | None = None
        try:
            space.ops.failure(space, pfn, nr_pages)
        except DaxemuError as error:
            failed = error
        draft.parts.append(Part(PageType.PFN_MAP, pfn, nr_pages, failed))

    def removal(self, pfn: Pfn, nr_pages: int, notify: Callable[[], None]) -> Incident:
        """Return the incident of the removal of a whole device. ``notify`` tells the holder of the device."""
        draft = self.draft(pfn, nr_pages, MF_MEM_PRE_REMOVE)
        draft.parts.append(Part(PageType.DAX, pfn, nr_pages))
        with self.during(draft):
            notify()
        return draft.complete()

    def draft(self, pfn: Pfn, nr_pages: int, flags: int) -> IncidentDraft:
        """Return an incident to be completed, with the next serial number."""
        return IncidentDraft(next(self._serial), pfn, nr_pages, flags)

    @property
    def is_handling(self) -> bool:
        """True while a driver's ``->memory_failure`` runs. The incident then is not executed yet."""
        return self._current is not None

    def during(self, draft: IncidentDraft) -> _Current:
        """Return a context. Inside, ``mf_dax_kill_procs`` adds to ``draft``."""
        return _Current(self, draft)

    def mf_dax_kill_procs(
        self, mapping: Ino, index: int, count: int, pfn: Pfn, flags: int, pmds: tuple[Range, ...] = ()
    ) -> None:
        """Record a failed file range. Called by the filesystem from within ``->notify_failure``.

        ``index`` and ``count`` are pages of the file. A ``count`` of U64_MAX stands for every mapping of the
        device. ``pmds`` as in MappingRange. Precondition: a failure is being handled. Raises RuntimeError
        otherwise.
        """
        if self._current is None:
            raise RuntimeError("mf_dax_kill_procs() outside of a memory failure")
        if count >= U64_MAX // PAGE_SIZE:
            self._current.whole_device = True
        else:
            self._current.mappings.append(MappingRange(mapping, index, count, pfn, pmds))

    def after_kill(self, action: Callable[[], None]) -> None:
        """Run ``action`` after the victims of the failure under way are signalled.

        Without a host, or outside a failure, ``action`` runs at once. Counterpart in Linux: a
        ``->notify_failure`` that shuts the filesystem down after mf_dax_kill_procs().
        """
        if self._current is None or not self._is_hosted:
            action()
        else:
            self._current.after_kill.append(action)

    def conclude(self, incident: Incident) -> bool:
        """Run the actions deferred by :meth:`after_kill`. Return True if any ran."""
        with self.during(IncidentDraft(incident.serial, incident.pfn, incident.nr_pages, incident.flags)):
            for action in incident.after_kill:
                action()
        return bool(incident.after_kill)

    @contextmanager
    def one_count(self) -> Iterator[None]:
        """Context in which all changes of counters count as one: ``on_count`` is called once, at the end."""
        on_count, self._on_count = self._on_count, lambda counters: None
        try:
            yield
        finally:
            self._on_count = on_count
            on_count(self.counters)

    def action_result(
        self,
        incident: Incident,
        signals: int,
        processes: int = 0,
        errors: Mapping[Part, DaxemuError] = _NO_ERRORS,
    ) -> Outcome:
        """``action_result()``: count and log each part. Return the worst outcome.

        ``signals``: number of signals sent to ``processes`` processes, for all parts together. ``errors``:
        parts that a driver handled, and whose repair failed. Pages without struct pages are logged, not
        counted: no node has counters for such pages.
        """
        if incident.pre_remove:
            return Outcome.RECOVERED  # always, and neither counted nor logged: see mf_dax_kill_procs()
        worst = Outcome.RECOVERED
        for part in incident.parts:
            error = part.error or errors.get(part)
            outcome = Outcome.FAILED if error is not None else Outcome.RECOVERED
            if error is not None:
                worst = Outcome.FAILED
            if part.page_type is not PageType.PFN_MAP:
                self.counters[outcome] += 1
            self._emit(
                MemoryFailureHandled(
                    pfn=part.pfn,
                    nr_pages=part.nr_pages,
                    page_type=part.page_type.value,
                    outcome=outcome,
                    told=signals,
                    signals=signals,
                    processes=processes,
                    files=_files(incident, part),
                    error=str(error) if error else None,
                )
            )
        self._on_count(self.counters)
        return worst


def _files(incident: Incident, part: Part) -> int:
    """Return the number of files with pages in ``part``."""
    pages = Range(part.pfn, part.pfn + part.nr_pages)
    failed: list[MappingRange | PfnMapping] = [*incident.mappings, *incident.pfn_mappings]
    named = {
        each.mapping if isinstance(each, MappingRange) else each.file
        for each in failed
        if pages.clip(each.pfn, each.pfn + each.count)
    }
    return len(named)


class _Current:
    """Context with ``draft`` as the target of ``mf_dax_kill_procs``."""

    def __init__(self, failures: MemoryFailures, draft: IncidentDraft) -> None:
        self._failures = failures
        self._draft = draft
        self._outer: IncidentDraft | None = None

    def __enter__(self) -> IncidentDraft:
        self._outer, self._failures._current = self._failures._current, self._draft
        return self._draft

    def __exit__(self, *exc: object) -> None:
        self._failures._current = self._outer
