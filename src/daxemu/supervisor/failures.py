"""From a memory failure to its outcome. A turn is the time of one incident under the lock ``mf_mutex``.

    core: memory_failure(range)     names the owners and their file ranges (atomic; before the turn)
    host: collect                   finds processes with a failed page present   } one worker thread,
    core: collect_procs             chooses the threads to signal (victims)      } under mf_mutex
    host: revoke                    unmaps the failed pages in every process     }
    strategy: repair                spares victims of recovered pages            } event loop, under mf_mutex
    host: signal                    queues a SIGBUS for every victim (mf_mutex is released)
    core: action_result             counts, logs and publishes the outcome

Collect comes before revoke, because addresses and presence are read from live mappings. The media is poisoned
before both: a process whose page fault brings a failed page in between collect and revoke consumes the poison
in that page fault. Signals are sent after the release of the mutex, so that a stopped victim does not delay
the next failure.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import trio

from daxemu.errors import DaxemuError
from daxemu.events import Outcome
from daxemu.host import pfn_mappings
from daxemu.host.mappings import Translations
from daxemu.host.proc.progress import wait_until_run
from daxemu.mm.incident import Incident
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.mm.pmd import present_as_mapped, to_unmap
from daxemu.mm.to_kill import Task, ToKill, collect_procs, spare
from daxemu.supervisor.latent import Latent
from daxemu.supervisor.repairs import RepairResult
from daxemu.supervisor.signals import Signals
from daxemu.supervisor.steps import Steps, Stopwatch

HANDLER_PATIENCE = 5.0
"""Seconds that a shutdown waits for the threads with a delivered AO to run their handlers."""


class Signalled(NamedTuple):
    """Number of signals (SIGBUS) sent for a failure, and number of distinct processes that received any."""

    signals: int
    processes: int


class Handled(NamedTuple):
    """Result of an incident. ``error``: the error of the first part that failed, or None."""

    outcome: Outcome
    signalled: Signalled
    error: DaxemuError | None


@dataclass(eq=False)
class _Turn:
    """One incident's time under the mutex. ``to_kill`` (the victims) is None until the turn is over."""

    incident: Incident
    current: int | None  # id of the thread that is itself in memory_failure()
    consumer: int | None  # id of the process whose load discovered latent poison
    collected: Callable[[Sequence[Task]], None] | None = None
    """Called with the collected processes before the first signal."""
    latent: list[Task] = field(default_factory=list)
    """Processes that had failed pages present when latent poison was injected in the pages."""
    tasks: list[Task] | None = None
    """Processes with failed pages present, those of ``latent`` included. Set before the revoke."""
    to_kill: list[ToKill] | None = None
    repair: RepairResult = field(default_factory=RepairResult)
    number: int = 0
    """Number in traces."""
    stage: str = "waits for mf_mutex"  # shown by status --internals

    def is_plain(self) -> bool:
        """Return True if other plain turns may share one collect with this turn.

        Three kinds of incident are collected alone:

        - a removal;
        - a discovery by a load;
        - a failure in pages mapped by PMDs: another failure may be in the same PMD.
        """
        incident = self.incident
        by_pmd = any(mapping.pmds for mapping in incident.mappings)
        return self.consumer is None and not incident.whole_device and not by_pmd

    @property
    def concerns_processes(self) -> bool:
        """Return True if a process can have a failed page mapped."""
        incident = self.incident
        return bool(incident.mappings or incident.pfn_mappings or incident.whole_device)


_UNHANDLED = Handled(Outcome.FAILED, Signalled(0, 0), None)

Repair = Callable[[Incident, Sequence[Task]], RepairResult]
"""Repair of an incident, called after the revoke. The tasks are the processes that had the pages present."""


def no_repair(incident: Incident, tasks: Sequence[Task]) -> RepairResult:
    """Return the result of a machine without a repair strategy."""
    return RepairResult()


class Failures:
    """Executes incidents: collect, revoke, repair, signal. Belongs to the trio thread."""

    def __init__(
        self,
        mm: MemoryFailures,
        mappings: Translations,
        signals: Signals,
        repair: Repair = no_repair,
        steps: Steps | None = None,
    ) -> None:
        self._mm = mm
        self._repair = repair
        self._mappings = mappings
        self._signals = signals
        self._steps = steps or Steps()
        self._latent = Latent()
        self._turns: list[_Turn] = []  # failures before the end of their turn
        self._signalling: list[_Turn] = []  # failures after their turn, until the last signal is settled
        self._waiting: list[_Turn] = []  # failures that wait for mf_mutex
        self.mf_mutex = trio.Lock()
        """Held from collect to revoke.

        If another incident could revoke pages before the collect, no process would have these pages present,
        and the collect would find no victim.
        """

    async def handle(
        self,
        incident: Incident,
        current: int | None = None,
        consumer: int | None = None,
        *,
        collected: Callable[[Sequence[Task]], None] | None = None,
    ) -> Handled:
        """Execute an incident: collect, revoke, repair, signal. Return outcome, counts and error.

        - ``current``: id of the thread that is itself in memory_failure(), by madvise(2). The thread gets a
          forced AR at the return of the system call, under the early policy and under the late policy.
        - ``consumer``: id of the process whose load discovered latent poison. The page fault signals the
          consumer. The victims are the other processes that had the page present at the injection.
        - ``collected``: called in the trio thread with the collected processes, before the first signal.
        """
        (handled,) = await self._execute([_Turn(incident, current, consumer, collected)])
        return handled

    async def handle_all(self, incidents: Sequence[Incident]) -> list[Handled]:
        """Execute incidents, each as :meth:`handle` does, in turns that follow each other. Return the results
        in the same order.

        A task is started only for an incident with victims: 190,000 failures of free blocks are handled in
        one loop.
        """
        return await self._execute([_Turn(incident, None, None) for incident in incidents])

    async def _execute(self, turns: Sequence[_Turn]) -> list[Handled]:
        # Shielded from cancellation: a cancel before the revoke would leave failed pages mapped, so that
        # processes could load their old bytes.
        self._turns += turns
        began = time.time()
        for turn in turns:
            turn.number = self._steps.next_number()
        handled: list[Handled] = [_UNHANDLED] * len(turns)

        async def finish(index: int, turn: _Turn) -> None:
            handled[index] = await self._signal(turn)

        with trio.CancelScope(shield=True):
            try:
                await self._in_turn(turns)
            finally:
                for turn in turns:
                    self._turns.remove(turn)
            async with trio.open_nursery() as nursery:
                with self._mm.one_count():
                    for index, turn in enumerate(turns):
                        if turn.to_kill or turn.incident.after_kill:
                            nursery.start_soon(finish, index, turn)
                        else:
                            handled[index] = self._conclude(turn)
        for turn, result in zip(turns, handled, strict=True):
            self._steps.took(turn.incident, turn.number, "memory_failure", began, result.outcome.value)
        return handled

    async def _signal(self, turn: _Turn) -> Handled:
        """Signal the victims of a turn that is over. Return the result of the incident."""
        incident = turn.incident
        try:
            turn.stage = "signals"
            began = time.time()
            self._signalling.append(turn)
            delivered = await self._signals.kill_procs(turn.to_kill or (), turn.current)
            sent = f"{len(turn.to_kill or ())} signals"
            self._steps.took(incident, turn.number, "kill_procs", began, sent)
            if incident.after_kill:
                await trio.to_thread.run_sync(wait_until_run, delivered, HANDLER_PATIENCE)
            # As xfs_dax_notify_dev_failure(): kill, then shut down. After a shutdown a victim's load ends
            # in BUS_ADRERR, which must not come before the AO.
            if self._mm.conclude(incident):
                await self.revoke_everything(is_removed=incident.whole_device)
        finally:
            self._signalling.remove(turn)
        return self._conclude(turn)

    def _conclude(self, turn: _Turn) -> Handled:
        """Count, log and publish the outcome of a turn whose victims are signalled."""
        to_kill, errors = turn.to_kill or (), turn.repair.errors
        signalled = Signalled(len(to_kill), len({victim.task.pid for victim in to_kill}))
        outcome = self._mm.action_result(turn.incident, *signalled, errors)
        return Handled(outcome, signalled, turn.incident.error or next(iter(errors.values()), None))

    def describe_turns(self) -> Iterator[str]:
        """Yield a line for each failure under way, for ``status --internals``: its pages and its stage."""
        for turn in (*self._turns, *self._signalling):
            incident = turn.incident
            pages = f"pfn {incident.pfn:#x}+{incident.nr_pages}"
            yield f"{'the whole device' if incident.whole_device else pages}: {turn.stage}"

    async def revoke_latent(self, incident: Incident, *, has_mutex: bool = False) -> None:
        """Collect and revoke pages of latent poison. Remember which processes had the pages present.

        On hardware the pages stay mapped until a load consumes the poison. Then the other processes with the
        pages mapped are signalled. ``has_mutex``: True if the caller holds ``mf_mutex``.
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
        """Remember which processes have the pages of ``incident`` present, without a revoke.

        Preconditions:

        - The caller holds ``mf_mutex``.
        - The caller revokes the pages next.
        """
        (tasks,) = await trio.to_thread.run_sync(self._mappings.collect, [incident])
        self._latent.add(tasks)

    def forget_latent(self, incident: Incident) -> None:
        """Forget which processes had pages of ``incident`` present: the poison was cleared."""
        self._latent.take(incident)

    async def revoke_everything(self, *, is_removed: bool = False) -> None:
        """Revoke all pages of all open files after a shutdown, once ``mf_mutex`` is free.

        Every new access must end in EIO. Pages of the media stay mapped, unless the device is removed.
        """
        if self._mappings.survive_shutdown and not is_removed:
            return
        async with self.mf_mutex:
            await trio.to_thread.run_sync(self._mappings.revoke_all)

    async def _in_turn(self, turns: Sequence[_Turn]) -> None:
        """Collect and revoke in arrival order. Plain turns in a row share a collect."""
        self._waiting += turns
        try:
            async with self.mf_mutex:
                while any(turn.to_kill is None for turn in turns):
                    batch = list(itertools.takewhile(_Turn.is_plain, self._waiting)) or self._waiting[:1]
                    await self._collect_and_revoke(batch)
                    del self._waiting[: len(batch)]
        finally:
            for turn in turns:
                if turn.to_kill is None:
                    self._waiting.remove(turn)

    async def _collect_and_revoke(self, batch: list[_Turn]) -> None:
        # Each of these failures discovers the latent poison in its pages: the remembered processes become
        # victims.
        for turn in batch:
            turn.latent, turn.stage = self._latent.take(turn.incident), "collects and unmaps"
        early_kill = self._mm.sysctl_early_kill
        watch = Stopwatch()

        def work() -> list[tuple[list[Task], list[ToKill], list[ToKill]]]:
            with watch.timed("collect_procs"):
                collected = self._mappings.collect([turn.incident for turn in batch])
            chosen = []
            for turn, found in zip(batch, collected, strict=True):
                turn.tasks = tasks = self._victims(turn, found)
                to_kill = collect_procs(turn.incident, tasks, early_kill=early_kill, force_tid=turn.current)
                if not turn.incident.whole_device:  # a whole device is revoked after the shutdown
                    with watch.timed("unmap_mapping_range"):
                        self._mappings.revoke(to_unmap(turn.incident, to_kill))
                elsewhere = pfn_mappings.collect(turn.incident.pfn_mappings, early_kill=early_kill)
                chosen.append((tasks, to_kill, elsewhere))
            return chosen

        if any(turn.concerns_processes for turn in batch):
            chosen = await trio.to_thread.run_sync(work)
        else:
            chosen = [([], [], []) for _ in batch]
        for step in watch.steps:
            self._steps.lasted(batch[0].incident, batch[0].number, *step)
        for turn, (tasks, to_kill, elsewhere) in zip(batch, chosen, strict=True):
            if turn.collected is not None:
                turn.collected(tasks)
            began = time.time()
            turn.repair = self._repair(turn.incident, tasks)
            self._steps.took(turn.incident, turn.number, "repair", began)
            if turn.repair.spared:
                to_kill = spare(turn.incident, to_kill, turn.repair.spared)
            turn.to_kill = to_kill + elsewhere

    def _victims(self, turn: _Turn, found: list[Task]) -> list[Task]:
        """Return the processes with failed pages present now, or at the injection of latent poison.

        A process remembered from the injection must still have the pages mapped. The consumer is left out,
        because the page fault signals the consumer.
        """
        tasks = present_as_mapped(turn.incident, found)
        known = {task.pid for task in tasks} | {turn.consumer}
        tasks += [task for task in turn.latent if task.pid not in known and self._mappings.still_mapped(task)]
        return [task for task in tasks if task.pid != turn.consumer]

    async def holders(self, incident: Incident) -> list[Task]:
        """Return the processes with pages of ``incident`` present, without a revoke.

        - An incident that was collected already: the processes of that collect.
        - Any other incident: the processes that have pages present now, and the processes that had pages
          present at the injection of latent poison.
        """
        turn = next((turn for turn in self._turns if turn.incident is incident), None)
        latent = self._latent.of(incident) if turn is None else turn.latent
        (tasks,) = await trio.to_thread.run_sync(self._mappings.collect, [incident])
        if turn is not None and turn.tasks is not None:
            return turn.tasks  # the pages may be revoked by now
        return tasks + latent
