"""The emulated machine: construction of every part, and the table of verbs."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import msgspec
import trio

from daxemu import protocol as p
from daxemu.errors import InvalidArgument
from daxemu.fs.filesystem import Filesystem
from daxemu.host.fuse.extra_operations import ExtraOperations
from daxemu.host.fuse.gates import Gates
from daxemu.host.fuse.layouts import LayoutTable
from daxemu.host.fuse.open_files import OpenFiles
from daxemu.host.fuse.operations import Operations
from daxemu.host.fuse.session import Session
from daxemu.host.mappings import Upcalls
from daxemu.host.mount_parts import MakeMappings, MountParts
from daxemu.host.tracer.link import TracerLink
from daxemu.host.unexpected import Unexpected
from daxemu.internals_report import InternalsReport
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.pmem.pmem import Pmem
from daxemu.supervisor.clones import Clones
from daxemu.supervisor.consumption import Consumption
from daxemu.supervisor.event_log import EventLog
from daxemu.supervisor.failures import Failures
from daxemu.supervisor.internals import internals
from daxemu.supervisor.observation import Observation
from daxemu.supervisor.repairs import Repairs
from daxemu.supervisor.rule_actions import RuleActions
from daxemu.supervisor.rules import Rules
from daxemu.supervisor.scrub import Scrubber
from daxemu.supervisor.signals import Signals
from daxemu.supervisor.steps import Steps
from daxemu.supervisor.strategy_host import StrategyHost
from daxemu.supervisor.trace import Traces
from daxemu.supervisor.under_way import Counted, UnderWay
from daxemu.supervisor.verbs import files
from daxemu.supervisor.verbs.attach import Attachments
from daxemu.supervisor.verbs.madvise import MadviseInjection
from daxemu.supervisor.verbs.poison import Poison
from daxemu.supervisor.verbs.removal import remove
from daxemu.supervisor.verbs.repair import Repairing
from daxemu.supervisor.verbs.settings import Settings, settings_of
from daxemu.supervisor.verbs.status import status
from daxemu.supervisor.verbs.survey import survey

Verb = Callable[[Any], Awaitable[msgspec.Struct]]


class Machine:
    """One DEVICE mounted once. Belongs to the trio thread; methods that are not ``async`` are atomic.

    Constructed within the event loop, before the first request of the kernel is read.
    """

    def __init__(
        self,
        pmem: Pmem,
        mm: MemoryFailures,
        fs: Filesystem,
        session: Session,
        log: EventLog,
        strategy_host: StrategyHost,
        unexpected: Unexpected,
        tracer: TracerLink,
        nursery: trio.Nursery,
        *,
        make_mappings: MakeMappings,
        power_fail: Callable[[], Awaitable[object]],
        supplement_missing: str | None,
        has_layouts: bool,
    ) -> None:
        """``nursery`` runs tasks that outlive a request. ``make_mappings`` makes the implementation of the
        seam for mappings. ``power_fail`` ends the mount. ``supplement_missing``: the reason why the
        supplement is not loaded; None if loaded.
        ``has_layouts``: True if C may answer reads and writes of healthy bytes (fs/layouts.py).
        """
        emit = log.emit
        self.pmem, self.mm, self.fs, self.session, self.log = pmem, mm, fs, session, log
        self.strategy_host, self.tracer, self.unexpected = strategy_host, tracer, unexpected
        self._repairs = repairs = Repairs(pmem, fs, strategy_host, emit)
        self.supplement_missing = supplement_missing
        self.under_way = UnderWay()
        self._gates = gates = Gates()
        self._open_files = open_files = OpenFiles()
        self.nursery = unexpected.nursery(nursery)
        self._counted = Counted(self.nursery, self.under_way, but=("Signals._await_late",))

        # Failures: collect, revoke, signal.
        parts = MountParts(pmem, fs, session, open_files, gates, tracer, emit, self.nursery, unexpected)
        self.mappings = mappings = make_mappings(parts)
        signals = Signals(tracer, mappings.file_page, emit, self._counted)
        self.failures = Failures(mm, mappings, signals, repairs.failed, steps := Steps())
        self._consumption = Consumption(
            pmem, mm, self.failures, signals, mappings, repairs, self._counted, supplement_missing
        )
        on_access = self.under_way.counting("a load or read of poison", self._consumption.on_access)
        mappings.connect(Upcalls(on_access, self.failures.revoke_latent, self.failures.remember))

        # Requests of the kernel.
        self.operations = Operations(fs, on_access, self._consumption.on_write, mappings, open_files, gates)
        self.operations.contain(unexpected)
        self.layouts = LayoutTable(pmem.dax.memory(), self.operations) if has_layouts else None
        self._clones = Clones(fs, mappings, self.failures, open_files.writers, gates.io_lock)
        if supplement_missing is None:
            self._extra = ExtraOperations(
                fs,
                session.mount.dev,
                self._clones,
                mappings,
                self.operations.file_modified,
                open_files,
                gates,
                self.nursery,
                unexpected,
            )
        fs.on_shutdown.register(self._on_shutdown)

        # Requests of the control socket.
        self._repairing = Repairing(pmem, fs, self.failures, self._consumption, repairs, strategy_host, emit)
        self._poison = Poison(
            pmem,
            mm,
            fs,
            mappings,
            self.failures,
            self._consumption,
            strategy_host,
            self._repairing,
            emit,
        )
        self._madvise = MadviseInjection(pmem, mm, fs, mappings, self.failures, signals, emit)
        handle = mappings.system_calls(self._madvise.of_call)
        self._attachments = Attachments(handle, emit, self.nursery, unexpected)
        self.scrubber = Scrubber(self._scrub_in_background)
        table = settings_of(mm, fs, log, self.scrubber, strategy_host, self._repairing.choose)
        self._settings = Settings(table, emit)
        removal = partial(remove, pmem, mm, fs, self.failures, gates, self.scrubber, emit)
        self._remove = self.under_way.counting("the removal of the device", removal)
        sources = [self.operations.observe]
        if supplement_missing is None:
            sources.append(self._extra.observe)
        actions = RuleActions(fs, self._poison, self._remove, power_fail, self._counted)
        observation = Observation(sources, mappings)
        self._rules = Rules(fs, actions, observation, emit)
        self.traces = Traces(fs, observation, steps)
        self._verbs = self._table()

    def _table(self) -> dict[type, Verb]:
        """Return the verb of each type of request."""
        return {
            p.Inject: self.under_way.counting("an injection", self._poison.inject),
            p.Madvise: self.under_way.counting("a madvise(2)", self._madvise.madvise_inject_error),
            p.Attach: self._attachments.attach,
            p.Clear: self._poison.clear,
            p.Scrub: lambda _: self._poison.scrub(),
            p.Settle: lambda request: self.under_way.settle(request.patience),
            p.Repair: self._repairing.repair,
            p.Remove: self._remove,
            p.AddRule: self._rules.add,
            p.ListRules: self._rules.report,
            p.DeleteRules: self._rules.delete,
            p.GetBadblocks: lambda _: files.badblocks(self.pmem),
            p.Damaged: lambda _: files.damaged(self.fs),
            p.Map: lambda request: files.file_map(self.pmem, self.fs, request.ino),
            p.WhoMaps: lambda _: files.who_maps(self.mappings),
            p.Reflink: partial(files.reflink, self._clones),
            p.Survey: partial(survey, self.pmem, self.fs),
            p.Set: lambda request: self._settings.set(request.settings),
            p.Status: self._status,
            p.Internals: self._internals,
        }

    async def answer(self, request: p.AnyRequest) -> msgspec.Struct:
        """Execute a request and return the reply. Raises DaxemuError."""
        verb = self._verbs.get(type(request))
        if verb is None:
            raise InvalidArgument(f"cannot do {type(request).__name__} here")
        return await verb(request)

    async def _status(self, request: p.Status) -> msgspec.Struct:
        return status(
            self.pmem,
            self.mm,
            self.fs,
            self.session.mount,
            self._repairs,
            self.scrubber,
            self.tracer,
            self.log,
            self.layouts,
            settings=self._settings.show(),
            open_files=len(self._open_files),
            supplement=self.supplement_missing or "loaded",
        )

    async def _internals(self, request: p.Internals) -> msgspec.Struct:
        return self.internals()

    def internals(self) -> InternalsReport:
        """Return the tasks, turns, requests and threads that wait at this moment."""
        return internals(self.fs, self.mappings, self.failures, self.tracer)

    def _on_shutdown(self) -> None:
        """End a freeze, and revoke all pages, which mappings would go on serving.

        During a failure, the failure does the revoke, after the signals.
        """
        if self._gates.freeze is not None:
            self._gates.freeze.thaw()
        if not self.mm.is_handling:
            self._counted.start_soon(self.failures.revoke_everything)

    async def _scrub_in_background(self) -> None:
        with self.unexpected.caught("the background scrub"):
            await self._poison.scrub()
