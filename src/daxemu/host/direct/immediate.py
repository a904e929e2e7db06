"""Stores that are decided and answered at once, without a step of the event loop.

Purpose: speed. A copy at the store takes 0.55 ms by PageFaults (tasks, locks, and a replacement that is
registered before its move), and 0.2 ms here. Only the ordinary case is answered here. Every other event is
left to :class:`~daxemu.host.direct.faults.PageFaults`, which may decide the event again from the start.

The new block is mapped *in place*, by one call of the agent, and registered afterwards. In between, any touch
of the page is right: the block belongs to this file alone, and has its contents. No other part of the
supervisor runs in between, as long as the agent answers soon. An agent that does not is waited for by a task
that holds the locks. Poison may then come to the block before the registration, so the task looks
(:meth:`ImmediateAnswers._finish`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, suppress
from typing import NamedTuple, Protocol

from daxemu.errors import DaxemuError
from daxemu.fs.fault import FaultKind, FileRun
from daxemu.host.direct.agent import AgentReply
from daxemu.host.direct.changes import Changes, FileLocks
from daxemu.host.direct.errors import AddressSpaceChanging, AddressSpaceGone
from daxemu.host.direct.page_tables import PageTables
from daxemu.host.direct.table import Area, Space, Table
from daxemu.host.direct.userfaultfd import PageFault
from daxemu.host.run import zone
from daxemu.host.unexpected import Nursery, Unexpected
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, Block, Ino, page_align_down

WINDOW = 1 << 30
"""Blocks of a file that one fault may map."""


class FaultOps(Protocol):
    """The part of the filesystem that decides faults."""

    def fault(self, ino: Ino, block: Block, *, is_store: bool, limit: int) -> FileRun:
        """See MappedFiles.fault."""


class MediaOps(Protocol):
    """The part of the device that faults need (dax_device). Offsets are bytes of the device."""

    def is_poisoned(self, offset: int, length: int) -> bool:
        """See DaxDevice.is_poisoned."""

    def reserve(self, offset: int, length: int) -> None:
        """See DaxDevice.reserve."""

    def drop_strays(self, offset: int, length: int) -> None:
        """See DaxDevice.drop_strays."""


class _Store(NamedTuple):
    """Store to a page of a shared mapping. ``page``: its addresses; ``block``: the file block there."""

    space: Space
    area: Area
    page: Range
    block: Block


class ImmediateAnswers:
    """Answers ordinary stores. Belongs to the trio thread, whichever task calls."""

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
        on_store: Callable[[Ino], None],
    ) -> None:
        """``on_store`` is called after a store changed the blocks or times of a file."""
        self._fs = fs
        self._media = media
        self._table = table
        self._page_tables = page_tables
        self._changes = changes
        self._locks = locks
        self._nursery = nursery
        self._unexpected = unexpected
        self._on_store = on_store

    def answered(self, space: Space, event: PageFault) -> bool:
        """Answer an event, and return True; return False to leave the event to PageFaults.

        After False, a change of the file is noted, so PageFaults maps the page anew.
        """
        store = self._ordinary(space, event)
        if store is None:
            return False
        try:
            return self._decided(store, event)
        except AddressSpaceGone:
            return True
        except AddressSpaceChanging:
            return False
        except Exception as error:  # noqa: BLE001 - PageFaults answers the thread
            self._unexpected.report(f"a store at {event.address:#x} of process {space.tgid}", error)
            return False

    def _ordinary(self, space: Space, event: PageFault) -> _Store | None:
        """Return the store of an event: of one mapping, which nobody changes; otherwise None."""
        if not event.is_write or space.is_gone or not space.is_free:
            return None
        start = page_align_down(event.address)
        if (
            not zone.has(start) or space.locks
        ):  # a mapping in place needs a guard (outside); no store (populate)
            return None
        area = space.at(start)
        if area is None or not area.is_shared or not self._locks.is_free(area.ino):
            return None
        block = area.block_at(start)
        if not self._changes.is_settled(area.ino):
            return None
        mappers = self._table.mappers(area.ino, Range(block, block + 1))
        if len(mappers) != 1 or not self._page_tables.room(space):
            return None
        return _Store(space, area, Range(start, start + PAGE_SIZE), block)

    def _decided(self, store: _Store, event: PageFault) -> bool:
        space, area, page, block = store
        ino = area.ino
        with ExitStack() as held:
            held.enter_context(self._changes.following(ino))
            run = None
            with self._changes.own(ino) as changed, suppress(DaxemuError):
                run = self._fs.fault(ino, block, is_store=True, limit=WINDOW)
            if run is None or run.kind is not FaultKind.MAPPED:
                return self._left(ino, changed)
            device = (run.dev_block + block - run.file_block) * PAGE_SIZE
            if self._media.is_poisoned(device, PAGE_SIZE):
                return self._left(ino, changed)
            self._on_store(ino)
            if not changed and event.is_wp and page.start in space.shown and page.start not in space.zeros:
                # A repair strategy must know the first store to each block.
                seen = Range(block, block + 1) if run.is_watched else Range(run.file_block, run.file_end)
                return self._page_tables.unprotect_now(area, seen)
            if {*changed} != {Range(block, block + 1)}:
                return self._left(ino, changed)
            reply = self._page_tables.begin_in_place(area, page, device)
            if reply is None or (reply.results is not None and reply.results[0] < 0):  # too many VMAs
                return self._left(ino, changed)
            if reply.results is None or not self._registered(store):
                # Both locks are free: nothing has run since _ordinary() looked.
                held.enter_context(self._locks.taken(ino))
                space.lock.acquire_nowait()
                held.callback(space.lock.release)
                self._nursery.start_soon(self._finish, store, reply, device, held.pop_all())
        return True

    def _registered(self, store: _Store) -> bool:
        """Register a page that the agent has mapped, and wake. Return False if the kernel refuses now."""
        space, _, page, _ = store
        try:
            space.uffd.register(page.start, page.length)
        except AddressSpaceGone:
            raise
        except (OSError, DaxemuError):
            return False
        space.showing(page)
        space.wake(page)
        return True

    def _left(self, ino: Ino, changed: list[Range]) -> bool:
        """Leave an event to PageFaults, which follows the changes."""
        for blocks in changed:
            self._changes.note(ino, blocks)
        return False

    async def _finish(self, store: _Store, reply: AgentReply, device: int, held: ExitStack) -> None:
        """Wait for an agent that did not answer soon, and register the page.

        Until then a touch of the page is no event: a touch of a page that poison has taken away would make a
        page of zeros.
        """
        space, area, page, block = store
        with held, suppress(AddressSpaceGone):
            (result,) = await space.agent.completed(reply)
            if result < 0:  # too many VMAs: the old mapping is there
                self._changes.note(area.ino, Range(block, block + 1))
            else:
                await self._page_tables.register(space, page)
                space.showing(page)
                if self._media.is_poisoned(device, PAGE_SIZE):
                    self._media.drop_strays(device, PAGE_SIZE)
            space.wake(page)
