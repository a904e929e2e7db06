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
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from daxemu.events import Outcome
from daxemu.host import pfn_mappings
from daxemu.host.mappings import Mappings
from daxemu.host.proc.progress import wait_until_run
from daxemu.mm.incident import Incident
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.mm.pmd import present_as_mapped, to_unmap
from daxemu.mm.to_kill import Task, ToKill, collect_procs, spare
from daxemu.ranges import RangeSet
from daxemu.supervisor.latent import Latent
from daxemu.supervisor.signals import Signals

HANDLER_PATIENCE = 1.0
"""Seconds a shutdown waits for the threads that were signalled to get a processor."""


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
    latent: list[Task] = field(default_factory=list)
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
    """Carries out incidents. Belongs to the trio thread."""

    def __init__(
        self,
        mm: MemoryFailures,
        mappings: Mappings,
        signals: Signals,
        repair: Repair = no_repair,
    ) -> None:
        self._mm = mm
        self._repair = repair
        self._mappings = mappings
        self._signals = signals
        self._latent = Latent()
        self._turns: list[_Turn] = []  # the failures under way, until their pages are unmapped
        self._signalling: list[_Turn] = []  # and those whose pages are
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
                delivered = await self._signals.kill_procs(to_kill, current)
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

    async def revoke_latent(self, incident: Incident, *, has_mutex: bool = False) -> None:
        """Revoke pages of latent poison, and remember which processes had pages present.

        On hardware the pages would stay mapped until a load consumes the poison, and the other processes
        would be signalled then. ``has_mutex``: the caller holds ``mf_mutex``.
        """

        def work() -> list[Task]:
            (tasks,) = self._mappings.collect([incident])
            tasks = present_as_mapped(incident, tasks)
            self._mappings.revoke(incident)
            return tasks

        async with nullcontext() if has_mutex else self.mf_mutex:
            tasks = await trio.to_thread.run_sync(work)
        self._latent.add(tasks)

    async def remember(self, incident: Incident) -> None:
        """As :meth:`revoke_latent`, without the revoke. Preconditions:

        - The caller holds ``mf_mutex``.
        - The caller revokes the pages next.
        """
        (tasks,) = await trio.to_thread.run_sync(self._mappings.collect, [incident])
        self._latent.add(tasks)

    def forget_latent(self, incident: Incident) -> None:
        """Forget which processes had pages of ``incident`` present: the poison was cleared."""
        self._latent.take(incident)

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
        # Latent poison in these pages is discovered now, however that came about.
        for turn in batch:
            turn.latent, turn.stage = self._latent.take(turn.incident), "collects and unmaps"
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
                to_kill = spare(turn.incident, to_kill, spared)
            turn.to_kill = to_kill + elsewhere

    def _victims(self, turn: _Turn, found: list[Task]) -> list[Task]:
        """Who had pages of the failure present: now, or when poison was hidden there; the consumer knows."""
        tasks = present_as_mapped(turn.incident, found)
        known = {task.pid for task in tasks} | {turn.consumer}
        tasks += [task for task in turn.latent if task.pid not in known and self._mappings.still_mapped(task)]
        return [task for task in tasks if task.pid != turn.consumer]

    async def holders(self, incident: Incident) -> list[Task]:
        """Who has pages of ``incident`` present, or had when poison was hidden there or it was collected;
        nothing is taken away.
        """
        turn = next((turn for turn in self._turns if turn.incident is incident), None)
        latent = self._latent.of(incident) if turn is None else turn.latent
        (tasks,) = await trio.to_thread.run_sync(self._mappings.collect, [incident])
        if turn is not None and turn.tasks is not None:
            return turn.tasks  # its pages may be gone by now
        return tasks + latent
