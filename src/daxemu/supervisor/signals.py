"""SIGBUS for the victims of a failure, and the event ``SignalSent`` for each of them.

- AO (action optional): for threads with a failed page present. All AOs are queued before the first wait.
- AR (action required): the kernel's own SIGBUS of a thread that consumed poison, with an exact code and lsb.
- Forced AR: for the thread that is itself in memory_failure(), at the return of its madvise(2).

Counterpart in Linux: kill_procs() and kill_proc() in mm/memory-failure.c. Addresses are bytes.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import trio

from daxemu.errors import DaxemuError
from daxemu.events import KILLED_BY_SIGBUS, Emit, SignalSent
from daxemu.host.mappings import Access, Answer
from daxemu.host.proc.file_pages import FilePage
from daxemu.host.proc.processes import (
    comm_of,
    in_page_fault,
    place_of_fault,
    process_of,
    tracer_of,
)
from daxemu.host.tracer.link import Armed, Pending, TracerLink
from daxemu.host.tracer.messages import MOST_IN_PACKET, Delivered, Gone, Ignored, NotTaken, Refused
from daxemu.host.tracer.messages import Outcome as Delivery
from daxemu.host.unexpected import Nursery
from daxemu.mm.to_kill import ToKill
from daxemu.uapi import BUS_MCEERR_AO, BUS_MCEERR_AR, PAGE_SHIFT, Ino, Pfn
from daxemu.units import PFN_PHYS, PHYS_PFN

SIGNAL_PATIENCE = 2.0
"""Seconds that a failure waits for the delivery of an AO. After that the signal stays queued."""
ARM_PATIENCE = 1.0
"""Seconds that the read of a thread that consumed poison waits for a tracer without work."""
_SAME_CALL = 1.0
"""Seconds within which a second event of a thread at an address is of the same system call."""
_MOST_QUEUED = 16
"""Events of one thread that wait for its last signal: more come only from a system call."""
_LOOKS, _LOOK = 5, 0.0005
"""Number of looks, and seconds between two, at a thread that does not sleep in its page fault yet."""

_MERGED = "merged with the SIGBUS that it has pending"
_POSTPONED = "the process is stopped or asleep in the kernel, as {} others for which the tracer waits"


@dataclass(frozen=True)
class _Signal:
    """One SIGBUS and its receiver. ``lsb``: log2 of the size of the failed memory in bytes."""

    pid: int
    tid: int
    comm: str
    code: int
    address: int
    lsb: int
    pfn: Pfn
    current: bool = False
    """True if the receiver itself discovered the poison."""


class Signals:
    """Has the tracer send SIGBUS, and emits the result of each signal. Belongs to the trio thread..

    ``nursery`` runs tasks that outlive a request. ``file_page``: see Mappings.file_page.
    """

    def __init__(
        self, tracer: TracerLink, file_page: Callable[[Ino, int], FilePage], emit: Emit, nursery: Nursery
    ) -> None:
        self._tracer = tracer
        self._file_page = file_page
        self._emit = emit
        self._nursery = nursery
        self._latest_arm: dict[int, int] = {}
        """Threads that consume poison now, and the last request to the tracer for each."""
        self._finders: set[int] = set()
        """Threads whose access discovered the poison. One page fault sends several reads, or events."""
        self._in_call: dict[int, tuple[int | None, float]] = {}
        """Threads that were in a system call at an event of a direct mapping: the address, and the time."""
        self._forced: dict[int, int] = {}
        """Threads with a forced SIGBUS on its way, and the request to the tracer for each."""
        self._leaving: dict[int, trio.Event] = {}
        """Threads that leave a page fault in a direct mapping for a forced SIGBUS: one signal at a time. The
        event is set at the report of the tracer.
        """
        self._queued: Counter[int] = Counter()
        """Number of events of each thread that wait for an earlier signal of the thread."""

    def _sent(self, sent: _Signal, result: str, reason: str | None) -> None:
        self._emit(
            SignalSent(
                pid=sent.pid,
                tid=sent.tid,
                comm=sent.comm,
                code=sent.code,
                address=sent.address,
                lsb=sent.lsb,
                pfn=sent.pfn,
                result=result,
                reason=reason,
                current=sent.current,
            )
        )

    # -- action optional

    async def kill_procs(self, to_kill: Sequence[ToKill], current: int | None) -> list[int]:
        """Signal the victims, as kill_procs() does. Return the ids of the threads with a delivered AO.

        Every signal is queued before the first wait for a delivery. ``current``: id of the thread that is
        itself in memory_failure(). That thread gets a forced AR.
        """
        sent = []
        pages: dict[tuple[Ino, int], FilePage] = {}
        for victims in _merging(to_kill):
            if victims[0].tid == current:
                for victim in victims:
                    await self._force(victim)
            else:
                sent.append((victims, await self._send_ao(victims[0], pages)))
                if len(sent) % MOST_IN_PACKET == 0:
                    await trio.lowlevel.checkpoint()  # the tracer begins with a full packet meanwhile
        since = trio.current_time()
        settled = [await self._settled(victims, pending, since) for victims, pending in sent]
        return [tid for tid in settled if tid is not None]

    async def _send_ao(self, victim: ToKill, pages: dict[tuple[Ino, int], FilePage] | None = None) -> Pending:
        page = self._page_of(victim, {} if pages is None else pages)
        return await self._tracer.send_ao(victim.task.pid, victim.tid, victim.address, victim.shift, page)

    async def _settled(self, victims: Sequence[ToKill], pending: Pending, since: float) -> int | None:
        """Wait for the AO of one thread.. Return the id of the thread if the AO was delivered, or else None.

        ``victims``: failed pages of the thread.. The AO of ``victims[0]`` was queued; those of the others
        merge with that AO. If the thread no longer maps the page of one victim, the AO of the next is sent.
        """
        for position, victim in enumerate(victims):
            if position:
                pending, since = await self._send_ao(victim), trio.current_time()
            outcome = await self._tracer.settled(pending, since, SIGNAL_PATIENCE)
            if outcome is None and pending.limit is not None:
                self._sent(_ao(victim), "pending", _POSTPONED.format(pending.limit))
            else:
                self._sent(_ao(victim), *_explain(outcome))
            if not isinstance(outcome, Gone):
                break
        for other in victims[position + 1 :]:
            merged = _explain(outcome) if isinstance(outcome, Ignored) else ("merged", _MERGED)
            self._sent(_ao(other), *merged)
        if outcome is None:
            self._nursery.start_soon(self._await_late, victims[position:], pending)
        return victim.tid if isinstance(outcome, Delivered) else None

    async def _await_late(self, victims: Sequence[ToKill], pending: Pending) -> None:
        for position, victim in enumerate(victims):
            if position:
                pending = await self._send_ao(victim)
            outcome = await pending.wait()
            self._sent(_ao(victim), *_explain(outcome))
            if not isinstance(outcome, Gone):
                return

    def _page_of(self, victim: ToKill, pages: dict[tuple[Ino, int], FilePage]) -> FilePage | None:
        """Return the file page at the victim's address; None if no present run holds the address. ``pages``:
        pages of a file already looked up for other victims, by index.

        The tracer looks the page up again: the process may unmap or move the page before the signal.
        """
        for run in victim.task.present:
            if run.address <= victim.address < run.address + PFN_PHYS(run.nr_pages):
                index = run.index + PHYS_PFN(victim.address - run.address)
                if victim.file is not None:
                    return FilePage(*victim.file.dev, run.mapping, index)
                if (run.mapping, index) not in pages:
                    pages[run.mapping, index] = self._file_page(run.mapping, index)
                return pages[run.mapping, index]
        return None

    # -- action required, forced

    def new_call(self, tid: int) -> None:
        """Note that a thread is in a new system call.

        A signal forced on the thread in the last call was delivered at the return of that call. The report of
        the tracer may come later.
        """
        self._forced.pop(tid, None)

    async def _force(self, victim: ToKill) -> None:
        """Force an AR, as force_sig_mceerr(BUS_MCEERR_AR) does. A thread has at most one SIGBUS pending."""
        forced = _Signal(
            victim.task.pid,
            victim.tid,
            victim.task.comm,
            BUS_MCEERR_AR,
            victim.address,
            victim.shift,
            victim.pfn,
            current=True,
        )
        if victim.tid in self._forced:
            self._sent(forced, "pending", _MERGED)
            return
        armed = await self._tracer.force_ar(victim.task.pid, victim.tid, victim.address, victim.shift)
        if isinstance(armed, Armed):
            self._forced[victim.tid] = armed.id
            self._sent(forced, "delivered", None)
            self._nursery.start_soon(self._await_forced, forced, armed)
        else:
            self._sent(forced, *_explain(armed))

    async def _await_forced(self, forced: _Signal, armed: Pending) -> None:
        outcome = await armed.wait()
        if self._forced.get(forced.tid) == armed.id:
            del self._forced[forced.tid]
        if not isinstance(outcome, Delivered):
            self._sent(forced, *_explain(outcome))

    # -- action required, of a consumer

    async def consumed(
        self,
        access: Access,
        pfn: Pfn,
        supplement_missing: str | None,
        *,
        found: bool,
        shift: int = PAGE_SHIFT,
    ) -> Answer:
        """Have the tracer make the SIGBUS of a thread in a page fault over poison a BUS_MCEERR_AR.

        Return when the access may be answered. System calls get EIO and no signal. Requests for several pages
        get EIO and no signal, too: these are read-ahead, and the kernel sends another request for the one
        page of a fault. ``found``: True if the read discovered the poison. ``shift``: log2 of the size of
        the failed memory, for a page fault in a direct mapping.
        """
        if access.is_read_ahead:
            return Answer.ERROR
        if not access.tid:
            if supplement_missing is not None:
                self._inexact(access, pfn, supplement_missing)
            return Answer.ERROR
        faulting = in_page_fault(access.tid)
        if faulting is False:
            return Answer.WAKE if self._may_have_left(access) else Answer.ERROR
        if faulting is None:
            self._inexact(access, pfn, "not permitted to look at the thread")
            return Answer.ERROR
        if access.address is not None:
            return await self._leaves_fault(access, access.address, pfn, found=found, shift=shift)
        page = self._file_page(access.ino, PHYS_PFN(access.offset))
        armed = await self._tracer.arm(access.tid, page=page, patience=ARM_PATIENCE)
        if isinstance(armed, Refused):
            self._inexact(access, pfn, armed.reason)
        elif not isinstance(armed, Gone):
            # The name is read while the thread waits: the thread may be dead at the report of the tracer.
            consumer = _ar(access, pfn)
            if found:
                self._finders.add(access.tid)
            self._nursery.start_soon(self._await_ar, consumer, armed)
        return Answer.ERROR

    def _may_have_left(self, access: Access) -> bool:
        """Return True at the first event of a thread that is in a system call: the event may be of a page
        fault that the thread has left for the handler of another signal. The caller wakes the thread, and
        the access of a system call is another event.
        """
        if access.address is None:
            return False
        now = trio.current_time()
        before, since = self._in_call.pop(access.tid, (None, 0.0))
        if before == access.address and now - since < _SAME_CALL:
            return False
        self._in_call = {tid: seen for tid, seen in self._in_call.items() if now - seen[1] < _SAME_CALL}
        self._in_call[access.tid] = access.address, now
        return True

    async def _leaves_fault(
        self, access: Access, address: int, pfn: Pfn, *, found: bool, shift: int
    ) -> Answer:
        """Force an AR on a thread that waits in a page fault of its own until a signal comes. The access must
        fail if the tracer cannot.

        A thread in user mode has few events at a time. In a system call, a thread that the tracer interrupts
        makes one event after another, does not sleep, and takes no signal until the access fails. The event
        number _MOST_QUEUED makes the access fail.

        A thread that does not sleep has left the page fault for another signal, or is about to sleep there: a
        thread that is woken touches the page again. A thread that waits in another page fault is not woken:
        with three threads at one page, each wake-up would lead to three more.
        """
        if self._queued[access.tid] >= _MOST_QUEUED:
            return Answer.ERROR
        self._queued[access.tid] += 1
        try:
            while (earlier := self._leaving.get(access.tid)) is not None:
                await earlier.wait()  # the report of the last signal may come after the next touch
        finally:
            self._queued[access.tid] -= 1
            if not self._queued[access.tid]:
                del self._queued[access.tid]
        left = self._leaving[access.tid] = trio.Event()
        armed: Armed | Gone | Refused | None = None
        try:
            if found:
                self._finders.add(access.tid)
            place = await _asleep_at(access.tid)
            if access.has_left():
                return Answer.SIGNALLED
            if place is None:
                return Answer.WAKE
            if (other := tracer_of(access.tid)) not in (0, self._tracer.pid):
                # A forced signal would be a plain one. The failed access gives BUS_ADRERR with the address.
                self._inexact(access, pfn, f"process {other} traces the thread")
                return Answer.ERROR
            consumer = replace(_ar(access, pfn), address=address, lsb=shift)
            armed = await self._tracer.force_ar(
                consumer.pid, consumer.tid, address, shift, fault=place, patience=ARM_PATIENCE
            )
            if isinstance(armed, Armed):
                self._nursery.start_soon(self._await_leaving, consumer, armed, left)
                return Answer.SIGNALLED
            if isinstance(armed, Refused):
                self._inexact(access, pfn, armed.reason)
            return Answer.ERROR
        finally:
            if not isinstance(armed, Armed):
                self._has_left(access.tid, left)

    def _has_left(self, tid: int, left: trio.Event) -> None:
        if self._leaving.get(tid) is left:
            del self._leaving[tid]
        left.set()

    async def _await_leaving(self, consumer: _Signal, armed: Pending, left: trio.Event) -> None:
        outcome = await armed.wait()
        self._has_left(consumer.tid, left)
        if not isinstance(outcome, NotTaken):
            is_finder = consumer.tid in self._finders
            self._finders.discard(consumer.tid)
            self._sent(replace(consumer, current=is_finder), *_explain(outcome))

    async def _await_ar(self, consumer: _Signal, armed: Pending) -> None:
        tid = consumer.tid
        self._latest_arm[tid] = armed.id
        outcome = await armed.wait()
        is_latest = self._latest_arm.get(tid) == armed.id
        consumer = replace(consumer, current=tid in self._finders)
        if is_latest:
            del self._latest_arm[tid]
            self._finders.discard(tid)
        if isinstance(outcome, NotTaken):
            return  # interrupted, or read-ahead: the thread may touch the page again
        # One page fault sends several reads. The event for its one signal is emitted for the last arm.
        if isinstance(outcome, Delivered):
            if outcome.id != outcome.serial:
                return
            consumer = replace(consumer, address=outcome.addr)
        elif not is_latest:
            return
        elif isinstance(outcome, Gone):
            consumer = replace(consumer, address=outcome.addr)
        self._sent(consumer, *_explain(outcome))

    def _inexact(self, access: Access, pfn: Pfn, reason: str) -> None:
        self._sent(_ar(access, pfn), "inexact", f"SIGBUS stays BUS_ADRERR: {reason}")


async def _asleep_at(tid: int) -> tuple[int, int, int] | None:
    """Return the place of the page fault of a thread, which may be about to sleep; None if the thread does
    not sleep.
    """
    for _ in range(_LOOKS):
        if (place := place_of_fault(tid)) is not None:
            return place
        await trio.sleep(_LOOK)
    return None


def _merging(to_kill: Sequence[ToKill]) -> list[list[ToKill]]:
    """Return the victims in groups: the SIGBUS of the first arrives, the SIGBUSes of the others merge."""
    groups: list[list[ToKill]] = []
    for victim in to_kill:
        if victim.merges:
            groups[-1].append(victim)
        else:
            groups.append([victim])
    return groups


def _ao(victim: ToKill) -> _Signal:
    return _Signal(
        victim.task.pid,
        victim.tid,
        victim.task.comm,
        BUS_MCEERR_AO,
        victim.address,
        victim.shift,
        victim.pfn,
    )


def _ar(access: Access, pfn: Pfn) -> _Signal:
    """Return the signal of a consumer. The address is 0 until the kernel has forced SIGBUS on the thread.."""
    pid = process_of(access.tid) if access.tid else 0
    return _Signal(pid, access.tid, comm_of(pid), BUS_MCEERR_AR, 0, PAGE_SHIFT, pfn)


def _explain(outcome: Delivery | None) -> tuple[str, str | None]:
    """Return result and reason of ``SignalSent`` for a delivery; None is a delivery that has not ended."""
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
