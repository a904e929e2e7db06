"""System calls and events of programs with direct mappings, from all runs of ``daxemu run`` on one mount.

Each run has address spaces of its own, because each run has another slice of the zone for the mount.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from functools import partial

from daxemu.host.direct import outside
from daxemu.host.direct.address_space import AddressSpace
from daxemu.host.direct.address_spaces import AddressSpaces
from daxemu.host.direct.calls import (
    MAP_ANONYMOUS,
    MAP_FIXED,
    MAP_FIXED_NOREPLACE,
    MAP_PRIVATE,
    MAP_TYPE,
    Calls,
    open_file,
)
from daxemu.host.direct.dontfork import before_fork
from daxemu.host.direct.errors import AddressSpaceGone, AgentRefused
from daxemu.host.direct.faults import PageFaults
from daxemu.host.direct.limits import locks_future
from daxemu.host.direct.locking import held
from daxemu.host.direct.planner import RESERVE
from daxemu.host.direct.table import Space, Table
from daxemu.host.direct.userfaultfd import Event, PageFault, Unmapped
from daxemu.host.mount_parts import MountParts
from daxemu.host.proc import status
from daxemu.host.run import zone
from daxemu.host.run.attached import AttachedRun, refused
from daxemu.host.run.filters import Nr
from daxemu.host.run.seccomp import CONTINUE, Answer, NotifiedCall
from daxemu.ranges import Range, merged

_FIXED_ELSEWHERE = (
    "MAP_FIXED at addresses of another mount or of agents, which have "
    f"{zone.START:#x} to {zone.END:#x}: map elsewhere"
)


class Service:
    """Answers calls, and passes events on. Belongs to the trio thread."""

    def __init__(
        self,
        table: Table,
        faults: PageFaults,
        calls: Calls,
        parts: MountParts,
        media: int,
    ) -> None:
        """``media``: descriptor of the media, opened for reading and writing."""
        self._table = table
        self._faults = faults
        self._calls = calls
        self._parts = parts
        self._media = media
        self._void = os.memfd_create("daxemu-void", os.MFD_CLOEXEC)
        self._runs: dict[AttachedRun, _RunSpaces] = {}

    async def handle(self, run: AttachedRun, call: NotifiedCall) -> Answer | None:
        """Decide a call: see host.run.attached.Handle."""
        return await self._of(run).handle(run, call)

    def close(self) -> None:
        """End all agents."""
        for each in self._runs.values():
            each.spaces.close()
        os.close(self._void)

    @property
    def runs(self) -> int:
        """Number of attached runs, and of ended runs with programs that still have direct mappings."""
        self._forget_finished()
        return len(self._runs)

    def _forget_finished(self) -> None:
        """Forget each run whose helper and address spaces have ended: nothing follows from it any more."""
        self._runs = {
            run: each for run, each in self._runs.items() if not run.is_closed or each.spaces.is_in_use
        }

    def _of(self, run: AttachedRun) -> _RunSpaces:
        found = self._runs.get(run)
        if found is None:
            self._forget_finished()
            found = _RunSpaces(run.zone, self._table, self._faults, self._calls, self._parts)
            found.spaces = AddressSpaces(
                self._parts.tracer,
                self._parts.nursery,
                found,
                self._media,
                self._void,
                zone.SLICES.index(run.zone),
            )
            self._runs[run] = found
        return found


def _not_trusted(tid: int) -> str | None:
    """Return the reason to refuse direct mappings to a thread; None for root and the supervisor's user.

    The agent shares the memory of its program, and has the whole media open: the program can make the agent
    read and write the files of all users.
    """
    found = status.find(tid)
    if found is None or found.euid in (0, os.geteuid()):
        return None
    return (
        f"the program runs as uid {found.euid}, and direct mappings give a program the whole device: "
        f"run it as root or uid {os.geteuid()}, or mount without --direct"
    )


class _RunSpaces:
    """Address spaces of one run: the Watcher of ``spaces``."""

    spaces: AddressSpaces

    def __init__(
        self,
        given: range,
        table: Table,
        faults: PageFaults,
        calls: Calls,
        parts: MountParts,
    ) -> None:
        middle = given.start + len(given) // 2
        self._zone, self._scratch = Range(given.start, middle - RESERVE), Range(middle, given.stop)
        self._table = table
        self._faults = faults
        self._calls = calls
        self._parts = parts
        self._known: dict[AddressSpace, Space] = {}

    async def handle(self, run: AttachedRun, call: NotifiedCall) -> Answer | None:
        """Decide a call. None: the call is answered, or the thread makes it again."""
        try:
            match call.nr:
                case Nr.EXECVE | Nr.EXECVEAT:
                    await self.spaces.executes(call)
                    return CONTINUE
                case Nr.FORK | Nr.CLONE:
                    await self._fork(run, call)
                    return None
                case Nr.MMAP if not call.args[3] & MAP_ANONYMOUS:
                    return await self._mmap(run, call)
            space = self._space(await self.spaces.settled(call.tid))
            return await self._calls.answer(call, space, simulated=run.is_simulated)
        except AddressSpaceGone:
            return CONTINUE  # the thread is dead
        except AgentRefused as why:
            return refused(call, str(why), self._parts.emit)

    async def _mmap(self, run: AttachedRun, call: NotifiedCall) -> Answer | None:
        try:
            file = open_file(call.tid, call.args[4] & 0xFFFFFFFF)
        except OSError:
            return CONTINUE  # EBADF, or a dead thread
        if not run.is_waiting(call):
            return Answer(error=errno.EINTR)
        if error := self._calls.check_mmap(call, file):
            return Answer(error=error)
        if (reason := _not_trusted(call.tid)) is not None:
            is_private = call.args[3] & MAP_TYPE == MAP_PRIVATE
            return CONTINUE if is_private else refused(call, reason, self._parts.emit)
        is_fixed = call.args[3] & (MAP_FIXED | MAP_FIXED_NOREPLACE)
        where = Range(call.args[0], call.args[0] + call.args[1])
        is_ours = self._zone.start <= where.start < self._zone.end or outside.is_outside(where)
        if is_fixed and not is_ours:
            return refused(call, _FIXED_ELSEWHERE, self._parts.emit)
        space = self._space(await self.spaces.of(run, call))
        return None if space is None else await self._calls.mmap(call, file, space)

    async def _fork(self, run: AttachedRun, call: NotifiedCall) -> None:
        """Answer a fork(2). No mapping of the parent changes between its copy and the copy of the table.

        The child gets no page of a shared mapping, as in vma_needs_copy(): without this, fork(2) copies the
        page tables of mappings with a userfaultfd.
        """
        if self.spaces.is_repeated(call):
            run.answer(call, CONTINUE)
            return
        parent = await self.spaces.settled(call.tid)
        space = self._space(parent)
        if space is None:
            run.answer(call, CONTINUE)
            return
        async with held(space.lock):
            try:
                await before_fork(space)
            except OSError:  # vm.max_map_count: the child would get what it must not have
                run.answer(call, Answer(error=errno.ENOMEM))
                return
            shared = (
                part
                for area in space.areas.values()
                if area.is_shared
                for part in space.unforked.gaps(*area.addresses)
            )
            drop = [(part.start, part.length) for part in merged(shared)]
            await self.spaces.forked(run, call, parent, drop)

    def _space(self, found: AddressSpace | None) -> Space | None:
        """Return the mappings of an address space, which may be new."""
        if found is None:
            return None
        space = self._known.get(found)
        if space is None:
            space = self._known[found] = self._new(found)
            self._table.add_space(space)
        return space

    def _new(self, found: AddressSpace) -> Space:
        space = Space(
            found.agent,
            found.uffd,
            self._zone,
            self._scratch,
            found.outside,
            partial(self.spaces.open_outside, found),
            partial(self.spaces.drain, found),
            partial(self.spaces.read_events, found),
        )
        if found.agent.pid:  # the child of a fork locks nothing
            space.locks = space.locks_future = locks_future(found.agent.pid, found.agent.memory)
            space.populates = space.locks_future
        return space

    # -- Watcher

    def on_events(self, space: AddressSpace, events: Sequence[Event]) -> bool:
        """See Watcher.on_events."""
        mine = self._space(space)
        assert mine is not None
        is_answered = True
        for event in events:
            if isinstance(event, PageFault):
                is_answered &= self._faults.take(mine, event)
            elif isinstance(event, Unmapped):
                outside.unmapped(self._table, mine, Range(event.start, event.end))
        return is_answered

    def on_forked(self, parent: AddressSpace, child: AddressSpace) -> None:
        """See Watcher.on_forked."""
        known = self._space(parent)
        assert known is not None
        self._known[child] = self._new(child)
        self._table.fork(known, self._known[child])

    def on_gone(self, space: AddressSpace) -> None:
        """See Watcher.on_gone."""
        known = self._known.pop(space, None)
        if known is not None:
            self._table.drop_space(known)
