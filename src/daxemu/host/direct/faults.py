"""Page faults of direct mappings: events of userfaultfds, decided by the filesystem.

Counterpart in Linux: dax_iomap_fault() in fs/dax.c. The thread waits in the kernel from the event to the
wake-up. Steps of a decision, under the lock of the file:

1. The filesystem decides: allocates a hole, copies a shared block, or names the blocks that are there.
2. Every other mapping of a changed block becomes lazy: from now on no process shows the old block.
3. The run is mapped where the thread touched it, and the thread is woken.

Poison is decided without the lock, because a repair strategy may wait: see :meth:`PageFaults._consume`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

import trio

from daxemu.errors import DaxemuError, NoSpace
from daxemu.fs.fault import FaultKind, FileRun
from daxemu.host.direct import planner
from daxemu.host.direct.changes import Changes, FileLocks
from daxemu.host.direct.errors import AddressSpaceGone, NotRegistered
from daxemu.host.direct.immediate import WINDOW, FaultOps, ImmediateAnswers, MediaOps
from daxemu.host.direct.locking import held
from daxemu.host.direct.page_tables import PageTables
from daxemu.host.direct.planner import MappingPiece, Shows
from daxemu.host.direct.populate import is_populating
from daxemu.host.direct.table import Area, Space, Table
from daxemu.host.direct.userfaultfd import PageFault
from daxemu.host.mappings import Answer
from daxemu.host.observer import Observer, Operation
from daxemu.host.proc.file_pages import FilePage
from daxemu.host.proc.processes import in_page_fault, process_of
from daxemu.host.tracer.link import Armed
from daxemu.host.tracer.messages import Gone, Held, Outcome, Refused
from daxemu.host.unexpected import Nursery, Unexpected
from daxemu.ranges import Range
from daxemu.rule import Op
from daxemu.uapi import PAGE_SIZE, Block, Ino, page_align_down

MARKED = 0.01
"""Seconds that a page stays SIGBUS after a failed access. Then the next access is decided anew."""
HOLD_PATIENCE = 0.2
"""Seconds that a system call waits for a tracer without work, before its access to poison fails."""
RETURN_PATIENCE = 1.0
"""Seconds that a page stays SIGBUS for a held thread whose system call does not return."""
SPACE_PATIENCE = 1.0
"""Seconds that a store to a full device waits for freed blocks that processes may still have mapped. Without
such blocks the store fails at once.
"""


class Touch(NamedTuple):
    """Access to a page. ``page``: addresses of the page. ``event``: event of the userfaultfd."""

    space: Space
    page: Range
    event: PageFault

    @property
    def is_store(self) -> bool:
        return self.event.is_write or self.event.is_wp


class Holder(Protocol):
    """The part of the tracer that stops a thread at the end of its system call: ``TracerLink``."""

    async def hold(self, tgid: int, tid: int, patience: float) -> Armed | Refused | Gone:
        """See TracerLink.hold."""

    async def let_go(
        self, tid: int, discard: Sequence[tuple[int, FilePage, int]], number: int, error: int
    ) -> Outcome | None:
        """See TracerLink.let_go."""


Poisoned = Callable[[Touch, Area, FileRun], Awaitable[Answer]]
"""Decide about an access to poison."""


class _Call:
    """System call of a thread that touched poison. ``armed``: the thread will stop at the end of the call."""

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self.armed: Armed | None = None
        self.is_held = trio.Event()
        """Set once ``armed`` is known."""
        self.has_returned = trio.Event()
        self.marked = 0
        """Pages that are not lazy again yet."""
        self.is_clean = trio.Event()

    @property
    def has_ended(self) -> bool:
        """True if the thread has left the call: an event of the call is out of date."""
        return self.armed is not None and self.armed.outcome is not None


class PageFaults:
    """Decides and answers page faults. Belongs to the trio thread."""

    def __init__(
        self,
        fs: FaultOps,
        media: MediaOps,
        table: Table,
        page_tables: PageTables,
        changes: Changes,
        locks: FileLocks,
        nursery: Nursery,
        unexpected: Unexpected,
        on_poison: Poisoned,
        on_store: Callable[[Ino], None],
        tracer: Holder,
    ) -> None:
        """``nursery`` runs what follows an answer. ``on_poison`` decides about an access to poison.
        ``on_store`` is called after a store changed the blocks or times of a file.
        """
        self._fs = fs
        self._media = media
        self._table = table
        self._page_tables = page_tables
        self._changes = changes
        self._locks = locks
        self._nursery = nursery
        self._unexpected = unexpected
        self._on_poison = on_poison
        self._on_store = on_store
        self._tracer = tracer
        self._calls: dict[int, _Call] = {}
        """The system call that touches poison, of each thread."""
        self._immediate = ImmediateAnswers(
            fs, media, table, page_tables, changes, locks, nursery, unexpected, on_store
        )
        self.observer: Observer | None = None
        """Told about each page fault of the files that it wants."""
        self.waiting = 0
        """Number of events without an answer yet."""
        self._latest: dict[int, Touch] = {}
        """The latest event of each thread that has one without an answer."""

    def take(self, space: Space, event: PageFault) -> bool:
        """Answer one event at once, and return True; or in a task of its own."""
        self._latest.pop(event.tid, None)
        area = space.at(page_align_down(event.address))
        is_wanted = area is not None and self.are_wanted(area.ino)
        if not is_wanted and self._immediate.answered(space, event):
            return True
        self._begin(space, event)
        return False

    def are_wanted(self, ino: Ino) -> bool:
        """Return whether each page fault of a file is an operation: its pages are mapped one by one."""
        return self.observer is not None and self.observer.wants(ino)

    def _operation(self, touch: Touch) -> Operation | None:
        """Return the page fault as an operation for the observer; None if nobody wants it."""
        area = touch.space.at(touch.page.start)
        if area is None or not self.are_wanted(area.ino):
            return None
        offset = area.block_at(touch.page.start) * PAGE_SIZE
        op = Op.STORE if touch.is_store and area.is_shared else Op.LOAD
        return Operation(op, touch.event.tid, area.ino, offset=offset, length=PAGE_SIZE)

    def _begin(self, space: Space, event: PageFault) -> None:
        """Start a task that answers one event."""
        start = page_align_down(event.address)
        touch = self._latest[event.tid] = Touch(space, Range(start, start + PAGE_SIZE), event)
        self._nursery.start_soon(self._handle, touch)

    async def _handle(self, touch: Touch) -> None:
        """Answer one event. The thread never waits for ever: after an unexpected error its access fails."""
        space, page, event = touch
        self.waiting += 1
        try:
            operation, observer = self._operation(touch), self.observer
            if operation is None or observer is None:
                await self._decide(touch)
            else:
                await observer.before(operation)
                began = time.monotonic()
                await self._decide(touch)
                await observer.after(operation, time.monotonic() - began, 0)
        except AddressSpaceGone:
            return
        except NotRegistered:  # the program changed its mappings behind the filter
            with suppress(NotRegistered, AddressSpaceGone):
                space.wake(page)
        except Exception as error:  # noqa: BLE001 - a thread must not wait for ever
            self._unexpected.report(f"a page fault at {event.address:#x} of process {space.tgid}", error)
            await self._give_up(touch)
        finally:
            self.waiting -= 1
            if self._latest.get(event.tid) is touch:
                del self._latest[event.tid]

    def has_left(self, touch: Touch) -> bool:
        """Return whether the thread has left the page fault of an event, and waits in another one: another
        signal interrupted the fault, or the page came back. Precondition: the thread was seen asleep before.
        """
        touch.space.read_events()
        return self._latest.get(touch.event.tid) is not touch

    async def _decide(self, touch: Touch) -> None:
        space, page, _ = touch
        may_wait = True
        while (area := space.at(page.start)) is not None:
            try:
                async with self._locks.held(area.ino):
                    poison = await self._decide_locked(touch, area.ino, may_wait=may_wait)
            except NoSpace:
                may_wait = False
                with trio.move_on_after(SPACE_PATIENCE):
                    await self._changes.all_settled()
                continue
            if poison is None or not await self._consume(touch, area, poison):
                return
        space.wake(page)  # unmapped meanwhile

    async def _decide_locked(self, touch: Touch, ino: Ino, *, may_wait: bool) -> FileRun | None:
        """Decide a fault and answer the event; but return the run if the block is poison.

        Raises NoSpace with ``may_wait``, if freed blocks are not reused yet.
        """
        space, page, _ = touch
        area = space.at(page.start)
        if area is None or area.ino != ino:
            space.wake(page)  # another mapping is there now: the thread touches the page again
            return None
        block = area.block_at(page.start)
        is_store = touch.is_store and area.is_shared
        if is_store and space.locks and is_populating(touch.event.tid):
            is_store = self._is_hole(ino, block)
        run = None
        may_free = may_wait and self._changes.may_free
        with self._changes.following(ino):
            with self._changes.own(ino) as changed:
                try:
                    is_wanted = self.are_wanted(ino)
                    run = self._fs.fault(ino, block, is_store=is_store, limit=1 if is_wanted else WINDOW)
                    if is_wanted and not is_store:  # the first store is another page fault
                        run = run._replace(is_watched=True)
                except NoSpace:
                    if may_free:
                        raise
                except DaxemuError:
                    pass  # the access fails
            for blocks in changed:
                await self._page_tables.hide_blocks(ino, blocks, but=(space, page))
            if run is not None and self._is_poison(run, block):
                return run
            if is_store and run is not None:
                self._on_store(ino)
            is_stale = bool(changed) or self._changes.is_noted(ino, block)
            async with held(space.lock):
                now = space.at(page.start)
                if now is None or now.ino != ino or now.block_at(page.start) != block:
                    space.wake(page)
                elif run is None:
                    await self._fail(now, touch)
                else:
                    await self._answer(now, touch, run, is_stale=is_stale)
        return None

    def _is_hole(self, ino: Ino, block: Block) -> bool:
        """Return True if a file has no block. A page of zeros is private memory of the process: the kernel
        brings it in for writing only, so the hole is allocated.
        """
        with suppress(DaxemuError):
            return self._fs.fault(ino, block, is_store=False, limit=1).kind is FaultKind.HOLE
        return True

    def _is_poison(self, run: FileRun, block: Block) -> bool:
        return run.kind is FaultKind.MAPPED and self._media.is_poisoned(_device(run, block), PAGE_SIZE)

    async def _answer(self, area: Area, touch: Touch, run: FileRun, *, is_stale: bool) -> None:
        """Map what the filesystem decided. Precondition: ``Space.lock`` is held."""
        space, page, _ = touch
        is_shown = page.start in space.shown
        if run.kind is FaultKind.BEYOND_EOF:
            await self._page_tables.show([MappingPiece(area, page, Shows.VOID)])
        elif run.kind is FaultKind.HOLE and is_shown and page.start not in space.zeros:
            # The void, for an earlier event before the file grew: UFFDIO_COPY there is EFAULT.
            await self._page_tables.hide(space, page)
        elif run.kind is FaultKind.HOLE:
            await self._zeros(area, touch)
        elif not is_shown:
            gap = space.shown.gap_around(page.start, area.addresses)
            pieces = list(planner.media_pieces(area, [run]))
            await self._page_tables.show([p.cut(part) for p in pieces if (part := p.addresses.clip(*gap))])
        elif is_stale or page.start in space.zeros:
            pieces = list(planner.media_pieces(area, [run]))
            await self._page_tables.show([p.cut(page) for p in pieces if p.addresses.clip(*page)])
        elif touch.event.is_wp and run.is_watched and area.is_shared:
            await self._page_tables.unprotect(space, page)
        elif touch.event.is_wp:
            mine = area.addresses_of(Range(run.file_block, run.file_end))
            for part in list(space.shown.overlapping(*mine)):
                for media in list(space.zeros.gaps(*part)):
                    await self._page_tables.unprotect(space, media)
        else:  # another thread's event had the page mapped, or the media had no memory there
            self._media.reserve(_device(run, area.block_at(page.start)), PAGE_SIZE)
            if run.is_watched and area.is_shared:  # a repair strategy's page may have come back writable
                await self._page_tables.protect(space, page)
            space.wake(page)

    async def _zeros(self, area: Area, touch: Touch) -> None:
        """Show zeros for a hole: to a load, or as a private copy."""
        space, page, event = touch
        is_copy = touch.is_store and not area.is_shared
        if is_copy and event.is_wp:
            await self._page_tables.unprotect(space, page)
        else:
            await self._page_tables.zeros(area, page, protected=not is_copy)
        if is_copy:
            space.hiding(page)
            space.copied.add(*page)

    # -- accesses that fail

    async def _consume(self, touch: Touch, area: Area, run: FileRun) -> bool:
        """Decide about an access to poison. Return True if the access can be decided anew: the poison is
        repaired.

        A thread in user mode leaves its page fault for a signal (Answer.SIGNALLED): the next touch is a new
        event. The access of a system call fails with EFAULT, by UFFDIO_POISON, which leaves a marker in the
        page table: each access to the page fails without an event. The tracer holds the thread at the end of
        the call until the page is lazy again. Without a tracer the page is lazy MARKED seconds later.
        """
        space, page, event = touch
        call = self._calls.get(event.tid)
        if call is None:
            answer = await self._on_poison(touch, area, run)
            if answer is Answer.WAKE:
                space.wake(page)
            if answer is not Answer.ERROR:
                return answer is Answer.AGAIN
            if in_page_fault(event.tid) is False and process_of(event.tid) != os.getpid():
                call = self._calls[event.tid] = _Call(event.tid)
                self._nursery.start_soon(self._hold, call)
        if call is not None:
            await call.is_held.wait()
        async with held(space.lock):
            if space.at(page.start) is None or (call is not None and call.has_ended):
                space.wake(page)
            else:
                await self._mark(touch, call)
        return False

    async def _hold(self, call: _Call) -> None:
        """Have the tracer stop the thread of a failed call at the end of the call, until all pages that the
        call touched are lazy again. From the interrupt on the thread does not sleep in its page fault: events
        come until the page is marked.
        """
        tid = call.tid
        armed = None
        try:
            armed = await self._tracer.hold(process_of(tid), tid, HOLD_PATIENCE)
        finally:
            call.armed = armed if isinstance(armed, Armed) else None
            call.is_held.set()
        if call.armed is None:
            del self._calls[tid]
            return
        outcome = await call.armed.wait(RETURN_PATIENCE)
        call.has_returned.set()
        outcome = outcome or await call.armed.wait()
        while call.marked:
            call.is_clean = trio.Event()
            await call.is_clean.wait()
        del self._calls[tid]
        if isinstance(outcome, Held):
            await self._tracer.let_go(tid, [], -1, 0)

    async def _fail(self, area: Area, touch: Touch) -> None:
        """Let an access fail with BUS_ADRERR: no space, or no filesystem. Precondition: ``Space.lock``."""
        await self._page_tables.show([MappingPiece(area, touch.page, Shows.VOID)])
        self._nursery.start_soon(self._decide_anew, touch)

    async def _mark(self, touch: Touch, call: _Call | None = None) -> None:
        """Let an access fail by a marker. Precondition: ``Space.lock`` is held. ``call``: the system call
        that makes the access.
        """
        space, page, _ = touch
        # A marker of write-protection would be EEXIST.
        await self._page_tables.unprotect(space, page, wake=False)
        space.showing(page)
        await self._page_tables.mark_poison(space, page)
        if call is not None and call.armed is not None:
            call.marked += 1
        self._nursery.start_soon(self._decide_anew, touch, call)

    async def _decide_anew(self, touch: Touch, call: _Call | None = None) -> None:
        """Have the next access to a page decided anew: before the thread of ``call`` leaves the kernel, or
        some time after this access failed.
        """
        is_held = call is not None and call.armed is not None
        if call is not None and is_held:
            await call.has_returned.wait()
        else:
            await trio.sleep(MARKED)
        try:
            with suppress(AddressSpaceGone):
                async with held(touch.space.lock):
                    await self._page_tables.hide(touch.space, touch.page)
        finally:
            if call is not None and is_held:
                call.marked -= 1
                call.is_clean.set()

    async def _give_up(self, touch: Touch) -> None:
        """Let an access fail after an unexpected error, by the means that need least.

        A block that the page still shows may be another file's, too: a store must not reach the block.
        """
        with suppress(DaxemuError, OSError):
            async with held(touch.space.lock):
                if await self._page_tables.hide_or_end(touch.space, touch.page):
                    await self._mark(touch)


def _device(run: FileRun, block: Block) -> int:
    """Return the byte of the device with a file block of a run."""
    return (run.dev_block + block - run.file_block) * PAGE_SIZE
