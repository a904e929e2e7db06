"""System calls that populate or lock a mapping over unreadable bytes. The call of the thread must return.

On DAX the kernel does not repeat the failed fault: mmap(MAP_POPULATE), MAP_LOCKED and mlockall(2) ignore the
failure, mlock(2) returns ENOMEM, and the next load is a SIGBUS. With the page cache the kernel requests the
page without an end (host/page_cache/populate). Therefore the thread gets a page of zeros, revoked everywhere
as soon as the thread has the page present:

    host: hold                  the thread will stop at the return of its system call
    answer                      zeros
    host: wait_until_present    } worker thread
    host: having_present        } other processes that may have loaded zeros
    host: revoke                } unmaps the page in every process
    host: let_go                copies in private mappings are dropped, mlock(2) returns ENOMEM

A thread that the tracer cannot hold would load the zeros. The process of such a thread is killed. Belongs to
the trio thread.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from errno import ENOMEM

import trio

from daxemu.events import Emit, FaultRepeated, PopulateFailed
from daxemu.host.mappings import Access
from daxemu.host.page_cache import populate
from daxemu.host.page_cache.populate import PopulatedArea
from daxemu.host.page_cache.populate import PopulatingCall as Call
from daxemu.host.proc.processes import comm_of, process_of
from daxemu.host.tracer.link import Armed, TracerLink
from daxemu.host.tracer.messages import Gone, Held, Refused, Resumed
from daxemu.host.unexpected import Nursery
from daxemu.mm.to_kill import Task
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, Ino
from daxemu.units import PHYS_PFN

Revoke = Callable[[Ino, int, int], None]

_HOLD_PATIENCE = 1.0  # seconds for a tracer without other work to hold a thread
_PATIENCE = 1.0  # seconds for a thread to map the page of zeros; otherwise the kernel requests the page again
_LOOKS = 20  # most looks at a thread that has sent a request and is not asleep yet
_LOOK_INTERVAL = 0.001  # seconds
_REPEATS = 100  # failures of one page in a row for a thread until the first event; then x 10
_MOST_COUNTED = 1024  # threads


@dataclass(eq=False)
class _Populate:
    """System call in which a thread got zeros for unreadable pages."""

    pid: int
    tid: int
    comm: str
    call: Call
    ino: Ino
    ready: trio.Event = field(default_factory=trio.Event)
    armed: Armed | None = None
    refusal: str | None = None
    """The reason why the thread is not held, or None."""
    exposed: set[int] = field(default_factory=set)
    """Other processes that had a page of zeros present."""
    fails: bool = False
    """True if a fault on DAX would have failed. DAX maps latent poison without a read."""
    pages: list[Range] = field(default_factory=list)
    areas: list[PopulatedArea] = field(default_factory=list)
    revoking: int = 0
    all_revoked: trio.Event = field(default_factory=trio.Event)

    @property
    def is_over(self) -> bool:
        """True once the system call has returned."""
        return self.armed is not None and self.armed.outcome is not None


class Populating:
    """Ends system calls that populate over unreadable pages. ``path_of`` names a file for events."""

    def __init__(
        self,
        tracer: TracerLink,
        dev: tuple[int, int],
        revoke: Revoke,
        path_of: Callable[[Ino], str],
        emit: Emit,
        nursery: Nursery,
    ) -> None:
        self._tracer = tracer
        self._dev = dev
        self._revoke = revoke
        self._path_of = path_of
        self._emit = emit
        self._nursery = nursery
        self._calls: dict[int, _Populate] = {}
        self._repeats: dict[int, tuple[Ino, int, int]] = {}
        """Last failed request of each thread: inode, offset in bytes, number of times in a row."""

    async def passes(self, read: Access, *, is_latent: bool, discover: Callable[[], object]) -> bool:
        """Return True if a failed read must be answered with zeros, so that a populating call can return.

        Precondition: no page of the request is readable, or the request is for one page. ``discover`` is
        called for latent poison under a private mapping: for the private copy the kernel itself reads the
        poison.
        """
        if not read.tid or (call := await _call_of(read.tid)) is None:
            self._count(read)
            return False
        pages = Range(read.offset, read.offset + read.length).outer(PAGE_SIZE)
        pid = process_of(read.tid)
        indices = Range(*(PHYS_PFN(at) for at in pages))

        def work() -> tuple[list[PopulatedArea], list[Task]]:
            areas = populate.areas_without(pid, self._dev, read.ino, indices)
            return areas, populate.others_mapping(pid, self._dev, read.ino, indices)

        areas, others = await trio.to_thread.run_sync(work)
        now = await self._held(read, pid, call)
        if now.refusal is not None:
            self._kill(now, pages, f"the thread cannot be held: {now.refusal}")
            return False
        copies = any(area.copies for area in areas)
        if is_latent and copies:
            discover()
        now.fails |= copies or not is_latent
        now.pages.append(pages)
        now.areas += areas
        now.revoking += 1
        self._nursery.start_soon(self._take_back, now, pages, areas, others)
        return True

    async def _held(self, read: Access, pid: int, call: Call) -> _Populate:
        now = self._calls.get(read.tid)
        if now is not None and not now.is_over:
            await now.ready.wait()
            return now
        now = self._calls[read.tid] = _Populate(pid, read.tid, comm_of(pid), call, read.ino)
        try:
            armed = await self._tracer.hold(pid, read.tid, _HOLD_PATIENCE)
            if isinstance(armed, Armed):
                now.armed = armed
                self._nursery.start_soon(self._let_go, now, armed)
            else:
                del self._calls[read.tid]
                now.refusal = _why_not(armed)
        finally:
            now.ready.set()
        return now

    async def _take_back(
        self, now: _Populate, pages: Range, areas: list[PopulatedArea], others: list[Task]
    ) -> None:
        """Revoke the pages of zeros once the thread has them present."""

        def work() -> list[int]:
            populate.wait_until_present(now.pid, areas, lambda: now.is_over, _PATIENCE)
            exposed = populate.having_present(others)
            self._revoke(now.ino, pages.start, pages.length)
            return exposed

        now.exposed.update(await trio.to_thread.run_sync(work))
        now.revoking -= 1
        if not now.revoking:
            now.all_revoked.set()

    async def _let_go(self, now: _Populate, armed: Armed) -> None:
        """Wait for the return of the system call. Then drop private copies of zeros, and set the result."""
        outcome = await armed.wait()
        while now.revoking:
            now.all_revoked = trio.Event()
            await now.all_revoked.wait()
        if self._calls.get(now.tid) is now:
            del self._calls[now.tid]
        if not isinstance(outcome, Held):
            self._tell(now, "gone", outcome.reason if isinstance(outcome, Refused) else None)
            return
        copies = await trio.to_thread.run_sync(lambda: list(populate.copied(now.pid, now.areas)))
        fails = now.fails and now.call.name in populate.SAYS_ENOMEM
        done = await self._tracer.let_go(now.tid, copies, now.call.number, ENOMEM if fails else 0)
        if isinstance(done, Resumed):
            if now.fails or now.exposed:
                self._tell(now, "ENOMEM" if fails else "ignored", None)
        elif isinstance(done, Refused):
            why = f"a private copy cannot be dropped: {done.reason}"
            if done.killed:
                self._tell(now, "killed", why)
            else:
                self._kill(now, now.pages[0], why)
        else:
            self._tell(now, "gone", None)

    def _kill(self, now: _Populate, pages: Range, why: str) -> None:
        """Send SIGKILL: no other signal ends the call or keeps the process from loading the zeros."""
        if not now.pages:
            now.pages.append(pages)
        try:
            os.kill(now.pid, signal.SIGKILL)
        except ProcessLookupError:
            self._tell(now, "gone", None)
        except PermissionError:
            self._tell(now, "endless", f"{why}, nor may the process be killed")
        else:
            self._tell(now, "killed", why)

    def _tell(self, now: _Populate, result: str, reason: str | None) -> None:
        first = min(pages.start for pages in now.pages)
        self._emit(
            PopulateFailed(
                pid=now.pid,
                tid=now.tid,
                comm=now.comm,
                call=now.call.name,
                ino=now.ino,
                path=self._path_of(now.ino),
                offset=first,
                length=max(pages.end for pages in now.pages) - first,
                result=result,
                reason=reason,
                exposed=tuple(sorted(now.exposed)),
            )
        )

    def _count(self, read: Access) -> None:
        """Emit FaultRepeated at ``_REPEATS`` requests of a thread for one page, then at each tenfold."""
        ino, offset, times = self._repeats.pop(read.tid, (read.ino, read.offset, 0))
        times = times + 1 if (ino, offset) == (read.ino, read.offset) else 1
        self._repeats[read.tid] = (read.ino, read.offset, times)
        if len(self._repeats) > _MOST_COUNTED:
            del self._repeats[next(iter(self._repeats))]
        if read.tid and _is_milestone(times):
            pid = process_of(read.tid)
            self._emit(
                FaultRepeated(
                    pid=pid,
                    tid=read.tid,
                    comm=comm_of(pid),
                    ino=read.ino,
                    path=self._path_of(read.ino),
                    offset=read.offset,
                    times=times,
                )
            )


def _is_milestone(times: int) -> bool:
    while times > _REPEATS and times % 10 == 0:
        times //= 10
    return times == _REPEATS


def _why_not(armed: Refused | Gone) -> str:
    return armed.reason if isinstance(armed, Refused) else "the thread is gone"


async def _call_of(tid: int) -> Call | None:
    for _ in range(_LOOKS):
        if (asleep := populate.look(tid)) is not None:
            return asleep.call
        await trio.sleep(_LOOK_INTERVAL)
    return None
