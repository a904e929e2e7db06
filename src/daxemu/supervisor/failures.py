"""From a memory failure to its outcome: the order in which the decisions of the core reach real processes.

    core: memory_failure(range)           whose it is, which files (atomic)
    host: collect                         who has a page of it present      } worker thread,
    host: revoke                          nobody has                        } one incident at a time
    (mf_mutex)
    core: repair                          what the strategy makes good, nobody need be told of
    host: signal                          those who are to be told, all at once
    core: action_result                   counted, logged

Collect comes before revoke: addresses and presence are read off live mappings. Poison is in the media before
either, so a process that comes in between finds it by itself. Signals are sent outside the mutex: a process
that is stopped may take its time, and must not hold up the next failure.
"""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from daxemu.errors import DaxemuError
from daxemu.events import KILLED_BY_SIGBUS, Emit, Outcome, SignalSent
from daxemu.host import pfn_mappings
from daxemu.host.fuse.operations import PoisonedRead
from daxemu.host.mappings import Mappings
from daxemu.host.proc.file_pages import FilePage
from daxemu.host.proc.processes import comm_of, in_page_fault, process_of
from daxemu.host.proc.progress import wait_until_run
from daxemu.host.tracer.link import Armed, Pending, TracerLink
from daxemu.host.tracer.messages import Delivered, Gone, Ignored, NotTaken, Refused
from daxemu.host.tracer.messages import Outcome as Delivery
from daxemu.host.unexpected import Nursery
from daxemu.mm.incident import Incident
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.mm.pmd import present_as_mapped, to_unmap
from daxemu.mm.to_kill import Task, ToKill, collect_procs, spare
from daxemu.ranges import RangeSet
from daxemu.supervisor.hidden import Hidden
from daxemu.uapi import BUS_MCEERR_AO, BUS_MCEERR_AR, PAGE_SHIFT, PAGE_SIZE, Pfn

SIGNAL_PATIENCE = 2.0
"""Seconds a failure waits for a process to take its signal before it goes on; the signal stays on its way."""
HANDLER_PATIENCE = 1.0
"""Seconds a shutdown waits for the threads that were signalled to get a processor."""
ARM_PATIENCE = 1.0
"""Seconds a thread that consumed poison is kept waiting for the tracer."""

_MERGED = "merged with the SIGBUS that it has pending"
_POSTPONED = "the process is stopped or asleep in the kernel, as {} others for which the tracer waits"


class Signalled(NamedTuple):
    """Size of a failure's reach: SIGBUS sent, and distinct processes among their receivers."""

    signals: int
    processes: int


@dataclass(eq=False)
class _Turn:
    """A failure that waits for the mutex; ``to_kill`` is there once it has been seen to."""

    incident: Incident
    current: int | None
    consumer: int | None
    collected: Callable[[Sequence[Task]], None] | None = None
    """Called with the victims' processes before the first signal."""
    hidden: list[Task] = field(default_factory=list)
    tasks: list[Task] | None = None
    """Who had the pages present, known before they are taken away; those to whom they were hidden, too."""
    to_kill: list[ToKill] | None = None
    stage: str = "waits for mf_mutex"  # for people

    def is_plain(self) -> bool:
        """Whether others may be seen to with it: removal, what a load found, and what is mapped by 2 MiB,
        which other failures may be in as well, have their turns alone.
        """
        incident = self.incident
        by_pmd = any(hurt.pmds for hurt in incident.mappings)
        return self.consumer is None and not incident.whole_device and not by_pmd

    @property
    def concerns_processes(self) -> bool:
        """Whether anybody can have any of it mapped."""
        incident = self.incident
        return bool(incident.mappings or incident.pfn_mappings or incident.whole_device)


Repair = Callable[[Incident, Sequence[Task]], RangeSet]
"""Given an incident whose pages nobody has mapped any more, and who had: the pfns that are good again."""


def no_repair(incident: Incident, tasks: Sequence[Task]) -> RangeSet:
    """Nothing is."""
    return RangeSet()


class Failures:
    """Carries out incidents. Belongs to the trio thread; ``nursery`` runs what outlives a request."""

    def __init__(
        self,
        mm: MemoryFailures,
        mappings: Mappings,
        tracer: TracerLink,
        emit: Emit,
        nursery: Nursery,
        repair: Repair = no_repair,
    ) -> None:
        self._mm = mm
        self._repair = repair
        self._mappings = mappings
        self._tracer = tracer
        self._emit = emit
        self._nursery = nursery
        self._hidden = Hidden()
        self._turns: list[_Turn] = []  # the failures under way, until their pages are unmapped
        self._signalling: list[_Turn] = []  # and those whose pages are
        self._latest_arm: dict[int, int] = {}
        """The last request of each thread that consumes poison just now."""
        self._finders: set[int] = set()
        """Those of them whose load found it: a page fault asks more than once; the first is news."""
        self._forced: dict[int, int] = {}
        """Threads with a forced SIGBUS on its way."""
        self._waiting: list[_Turn] = []
        self.mf_mutex = trio.Lock()
        """Held while mappings are looked at and taken away: nobody else may take one away meanwhile."""

    async def handle(
        self,
        incident: Incident,
        current: int | None = None,
        consumer: int | None = None,
        *,
        collected: Callable[[Sequence[Task]], None] | None = None,
    ) -> tuple[Outcome, Signalled]:
        """See an incident through. Returns its outcome, with counts of signals and processes.

        ``current``: the thread that is in memory_failure() itself, in a system call. It is told at the end of
        that, whatever its policy, and not waited for. ``consumer``: the process whose load found poison that
        nobody knew of. Its page fault tells it; the others are told who had the page when it went bad.
        ``collected`` is called, in the trio thread, with the processes that were collected, before the first
        signal.
        """
        # Once begun it ends, whoever asked for it: half a failure would leave poison that can still be read.
        turn = _Turn(incident, current, consumer, collected)
        self._turns.append(turn)
        with trio.CancelScope(shield=True):
            try:
                to_kill = await self._in_turn(turn)
            finally:
                self._turns.remove(turn)
            try:
                turn.stage = "signals"
                self._signalling.append(turn)
                delivered = await self._kill_procs(to_kill, current)
                if incident.after_kill:
                    await trio.to_thread.run_sync(wait_until_run, delivered, HANDLER_PATIENCE)
                # The order of xfs_dax_notify_dev_failure(): kill first, then shut down. The other way round,
                # a victim's load meets BUS_ADRERR before its signal.
                if self._mm.conclude(incident):
                    await self.revoke_everything()  # the filesystem was shut down: from now on all is EIO
            finally:
                self._signalling.remove(turn)
        signalled = Signalled(len(to_kill), len({victim.task.pid for victim in to_kill}))
        return self._mm.action_result(incident, *signalled), signalled

    def describe_turns(self) -> Iterator[str]:
        """The failures under way, for people."""
        for turn in (*self._turns, *self._signalling):
            incident = turn.incident
            pages = f"pfn {incident.pfn:#x}+{incident.nr_pages}"
            yield f"{'the whole device' if incident.whole_device else pages}: {turn.stage}"

    async def hide(self, incident: Incident, *, has_mutex: bool = False) -> None:
        """Take away the pages of poison that nobody knows of, and remember who had them present.

        On hardware they would stay mapped until somebody's load meets the poison; only then are the others
        told. ``has_mutex``: the caller holds ``mf_mutex``.
        """

        def work() -> list[Task]:
            (tasks,) = self._mappings.collect([incident])
            tasks = present_as_mapped(incident, tasks)
            self._mappings.revoke(incident)
            return tasks

        async with nullcontext() if has_mutex else self.mf_mutex:
            tasks = await trio.to_thread.run_sync(work)
        self._hidden.add(tasks)

    async def remember(self, incident: Incident) -> None:
        """As :meth:`hide`, and the caller revokes the pages. Precondition: the caller holds ``mf_mutex``."""
        (tasks,) = await trio.to_thread.run_sync(self._mappings.collect, [incident])
        self._hidden.add(tasks)

    def forget_hidden(self, incident: Incident) -> None:
        """The poison that was hidden there is gone."""
        self._hidden.take(incident)

    async def revoke_everything(self) -> None:
        """After a shutdown all is EIO, what the page cache has too. Comes after the failure under way."""
        incident = Incident(0, 0, 0, 0, whole_device=True)
        async with self.mf_mutex:
            await trio.to_thread.run_sync(self._mappings.revoke, incident)

    async def _in_turn(self, turn: _Turn) -> list[ToKill]:
        """Collect and revoke, after the failures before it; those that wait by then are seen to together."""
        self._waiting.append(turn)
        try:
            async with self.mf_mutex:
                while turn.to_kill is None:
                    batch = list(itertools.takewhile(_Turn.is_plain, self._waiting)) or self._waiting[:1]
                    await self._collect_and_revoke(batch)
                    del self._waiting[: len(batch)]
        finally:
            if turn.to_kill is None:
                self._waiting.remove(turn)
        return turn.to_kill

    async def _collect_and_revoke(self, batch: list[_Turn]) -> None:
        # What was hidden is known from now on, however that came about.
        for turn in batch:
            turn.hidden, turn.stage = self._hidden.take(turn.incident), "collects and unmaps"
        early_kill = self._mm.sysctl_early_kill

        def work() -> list[tuple[list[Task], list[ToKill], list[ToKill]]]:
            collected = self._mappings.collect([turn.incident for turn in batch])
            chosen = []
            for turn, found in zip(batch, collected, strict=True):
                turn.tasks = tasks = self._victims(turn, found)
                to_kill = collect_procs(turn.incident, tasks, early_kill=early_kill, force_tid=turn.current)
                if not turn.incident.whole_device:  # that is revoked after the shutdown
                    self._mappings.revoke(to_unmap(turn.incident, to_kill))
                elsewhere = pfn_mappings.collect(turn.incident.pfn_mappings, early_kill=early_kill)
                chosen.append((tasks, to_kill, elsewhere))
            return chosen

        if any(turn.concerns_processes for turn in batch):
            chosen = await trio.to_thread.run_sync(work)
        else:
            chosen = [([], [], []) for _ in batch]
        for turn, (tasks, to_kill, elsewhere) in zip(batch, chosen, strict=True):
            if turn.collected is not None:
                turn.collected(tasks)
            if spared := self._repair(turn.incident, tasks):
                left = spare(turn.incident, tasks, spared)
                to_kill = collect_procs(turn.incident, left, early_kill=early_kill, force_tid=turn.current)
            turn.to_kill = to_kill + elsewhere

    def _victims(self, turn: _Turn, found: list[Task]) -> list[Task]:
        """Who had pages of the failure present: now, or when poison was hidden there; the consumer knows."""
        tasks = present_as_mapped(turn.incident, found)
        known = {task.pid for task in tasks} | {turn.consumer}
        tasks += [task for task in turn.hidden if task.pid not in known and self._mappings.still_mapped(task)]
        return [task for task in tasks if task.pid != turn.consumer]

    async def holders(self, incident: Incident) -> list[Task]:
        """Who has pages of ``incident`` present, or had when poison was hidden there or it was collected;
        nothing is taken away.
        """
        turn = next((turn for turn in self._turns if turn.incident is incident), None)
        hidden = self._hidden.of(incident) if turn is None else turn.hidden
        (tasks,) = await trio.to_thread.run_sync(self._mappings.collect, [incident])
        if turn is not None and turn.tasks is not None:
            return turn.tasks  # its pages may be gone by now
        return tasks + hidden

    # -- action optional

    async def _kill_procs(self, to_kill: list[ToKill], current: int | None) -> list[int]:
        """``kill_procs()``: every signal is on its way before any is waited for. Return the threads to which
        an AO was delivered.
        """
        sent = []
        for victims in _merging(to_kill):
            if victims[0].tid == current:
                for victim in victims:
                    await self._force(victim)
            else:
                sent.append((victims, await self._send_ao(victims[0])))
        since = trio.current_time()
        settled = [await self._settled(victims, pending, since) for victims, pending in sent]
        return [tid for tid in settled if tid is not None]

    async def _send_ao(self, victim: ToKill) -> Pending:
        return await self._tracer.send_ao(
            victim.task.pid, victim.tid, victim.address, victim.shift, self._page_of(victim)
        )

    async def _settled(self, victims: Sequence[ToKill], pending: Pending, since: float) -> int | None:
        """Wait for the SIGBUS of ``victims[0]``, with which the others merge. Return the thread to which an
        AO was delivered, or None. A thread that no longer has the page of the first gets the next.
        """
        for position, victim in enumerate(victims):
            if position:
                pending, since = await self._send_ao(victim), trio.current_time()
            outcome = await self._tracer.settled(pending, since, SIGNAL_PATIENCE)
            if outcome is None and pending.limit is not None:
                self._sent(victim, "pending", _POSTPONED.format(pending.limit))
            else:
                self._told(victim, outcome)
            if not isinstance(outcome, Gone):
                break
        for other in victims[position + 1 :]:
            self._sent(other, *(_explain(outcome) if isinstance(outcome, Ignored) else ("merged", _MERGED)))
        if outcome is None:
            self._nursery.start_soon(self._await_late, victims[position:], pending)
        return victim.tid if isinstance(outcome, Delivered) else None

    def _page_of(self, victim: ToKill) -> FilePage | None:
        """What it had at the address: it may have unmapped that, or moved it, before it is told."""
        for run in victim.task.present:
            if run.address <= victim.address < run.address + (run.nr_pages << PAGE_SHIFT):
                index = run.index + ((victim.address - run.address) >> PAGE_SHIFT)
                dev = victim.file.dev if victim.file is not None else self._mappings.dev
                return FilePage(*dev, run.mapping, index)
        return None

    def new_call(self, tid: int) -> None:
        """A thread is in another system call: what was forced on it in the last one was delivered at its
        return, whether or not that has been reported yet.
        """
        self._forced.pop(tid, None)

    async def _force(self, victim: ToKill) -> None:
        """``force_sig_mceerr(BUS_MCEERR_AR)``: it has no second one pending, as no SIGBUS has."""
        if victim.tid in self._forced:
            self._emit(_to_current(victim, "pending", _MERGED))
            return
        armed = await self._tracer.force_ar(victim.task.pid, victim.tid, victim.address, victim.shift)
        if isinstance(armed, Armed):
            self._forced[victim.tid] = armed.id
            self._emit(_to_current(victim, "delivered", None))
            self._nursery.start_soon(self._await_forced, victim, armed)
        else:
            self._emit(_to_current(victim, *_explain(armed)))

    async def _await_forced(self, victim: ToKill, armed: Pending) -> None:
        outcome = await armed.wait()
        if self._forced.get(victim.tid) == armed.id:
            del self._forced[victim.tid]
        if not isinstance(outcome, Delivered):
            self._emit(_to_current(victim, *_explain(outcome)))

    async def _await_late(self, victims: Sequence[ToKill], pending: Pending) -> None:
        for position, victim in enumerate(victims):
            if position:
                pending = await self._send_ao(victim)
            outcome = await pending.wait()
            self._told(victim, outcome)
            if not isinstance(outcome, Gone):
                return

    def _told(self, victim: ToKill, outcome: Delivery | None) -> None:
        self._sent(victim, *_explain(outcome))

    def _sent(self, victim: ToKill, result: str, reason: str | None) -> None:
        self._emit(
            SignalSent(
                pid=victim.task.pid,
                tid=victim.tid,
                comm=victim.task.comm,
                code=BUS_MCEERR_AO,
                address=victim.address,
                lsb=victim.shift,
                pfn=victim.pfn,
                result=result,
                reason=reason,
            )
        )

    # -- action required

    async def consumed(
        self, read: PoisonedRead, pfn: Pfn, supplement_missing: str | None, *, found: bool
    ) -> None:
        """A read met poison. If a thread waits for it in a page fault, see that its SIGBUS is a
        BUS_MCEERR_AR.

        Returns when the read may be answered. System calls get their EIO and no signal; so do requests for
        several pages, which are read-ahead: the kernel asks again for the one page that is wanted. ``found``:
        nobody knew of the poison before.
        """
        if read.length > PAGE_SIZE:
            return
        if not read.tid:
            if supplement_missing is not None:
                self._inexact(read, pfn, supplement_missing)
            return
        faulting = in_page_fault(read.tid)
        if faulting is False:
            return
        if faulting is None:
            self._inexact(read, pfn, "not permitted to look at the thread")
            return
        with trio.move_on_after(ARM_PATIENCE) as patience:
            page = FilePage(*self._mappings.dev, read.ino, read.offset >> PAGE_SHIFT)
            armed = await self._tracer.arm(read.tid, page=page)
        if patience.cancelled_caught:
            self._inexact(read, pfn, "the tracer did not answer in time")
        elif isinstance(armed, Refused):
            self._inexact(read, pfn, armed.reason)
        elif not isinstance(armed, Gone):
            # Who it is must be read while it waits: it may be dead before its signal is reported.
            pid = process_of(read.tid)
            victim = _ar(pid, read.tid, comm_of(pid), 0, pfn, "pending", None)
            if found:
                self._finders.add(read.tid)
            self._nursery.start_soon(self._await_ar, victim, armed)

    async def _await_ar(self, victim: SignalSent, armed: Pending) -> None:
        self._latest_arm[victim.tid] = armed.id
        outcome = await armed.wait()
        is_latest = self._latest_arm.get(victim.tid) == armed.id
        victim.current = victim.tid in self._finders
        if is_latest:
            del self._latest_arm[victim.tid]
            self._finders.discard(victim.tid)
        if isinstance(outcome, NotTaken):
            return  # it was interrupted, or only looked ahead: it touches the page again, or never
        # A page fault asks more than once: its one signal is logged for the last request.
        if isinstance(outcome, Delivered):
            if outcome.id != outcome.serial:
                return
            victim.address = outcome.addr
        elif not is_latest:
            return
        elif isinstance(outcome, Gone):
            victim.address = outcome.addr
        victim.result, victim.reason = _explain(outcome)
        self._emit(victim)

    def _inexact(self, read: PoisonedRead, pfn: Pfn, reason: str) -> None:
        pid = process_of(read.tid) if read.tid else 0
        self._emit(_ar(pid, read.tid, comm_of(pid), 0, pfn, "inexact", f"SIGBUS stays BUS_ADRERR: {reason}"))


def _merging(to_kill: Sequence[ToKill]) -> list[list[ToKill]]:
    """Victims in groups: the SIGBUS of the first of each group arrives, those of the others merge with it."""
    groups: list[list[ToKill]] = []
    for victim in to_kill:
        if victim.merges:
            groups[-1].append(victim)
        else:
            groups.append([victim])
    return groups


def _ar(pid: int, tid: int, comm: str, address: int, pfn: Pfn, result: str, reason: str | None) -> SignalSent:
    return SignalSent(
        pid=pid,
        tid=tid,
        comm=comm,
        code=BUS_MCEERR_AR,
        address=address,
        lsb=PAGE_SHIFT,
        pfn=pfn,
        result=result,
        reason=reason,
    )


def _to_current(victim: ToKill, result: str, reason: str | None) -> SignalSent:
    return SignalSent(
        pid=victim.task.pid,
        tid=victim.tid,
        comm=victim.task.comm,
        code=BUS_MCEERR_AR,
        address=victim.address,
        lsb=victim.shift,
        pfn=victim.pfn,
        result=result,
        reason=reason,
        current=True,
    )


def _explain(outcome: Delivery | None) -> tuple[str, str | None]:
    match outcome:
        case None:
            return "pending", "the process is stopped or asleep in the kernel"
        case Delivered():
            return "delivered", None
        case Ignored():
            return "ignored", None
        case Gone(signal=number):
            return "gone", KILLED_BY_SIGBUS if number == signal.SIGBUS else None
        case Refused(reason=reason):
            return "inexact", reason
        case NotTaken():
            return "gone", "it never came back to its fault"
    raise DaxemuError(f"unknown delivery {outcome!r}")
