"""Address spaces with direct mappings: one agent and one userfaultfd for each.

Counterpart in Linux: ``struct mm_struct``, from dup_mm() and exec_mmap() to exit_mm().

Purpose: an address space is found for each notified call, made at the first one, copied at a fork, and ended
at execve(2) and exit. Decisions about mappings and faults belong to the ``Watcher``.

Lookup: the process id names an address space until execve(2), so each lookup is confirmed by kcmp(2). The
child of a vfork shares the address space of its parent, and is found by kcmp(2) alone.

A thread that must be held is in a notified call. The supervisor answers -ERESTARTNOINTR, the tracer does its
work, and the thread makes the call again: :meth:`AddressSpaces.of` returns None, and finds the space the next
time.

Invariants:
- a process makes one agent at a time: the agent's socket is in the program for a moment;
- the child of a fork has its agent before its first instruction, or does not live (``forks``);
- a space whose agent was killed by others does not outlive the agent: its process is killed.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial

import trio

from daxemu.errors import DaxemuError
from daxemu.host.direct.address_space import AddressSpace, NotifiedCalls, Watcher
from daxemu.host.direct.bursts import Burst
from daxemu.host.direct.errors import AddressSpaceGone, AgentRefused
from daxemu.host.direct.forks import Forks
from daxemu.host.direct.making import AgentMaking, first_batch, raise_unless_made
from daxemu.host.direct.memory import owner_of, process_of, shares_memory
from daxemu.host.direct.scarce import kill_unfollowed, next_events
from daxemu.host.direct.userfaultfd import OUTSIDE, Event, Forked, Userfaultfd
from daxemu.host.proc import status
from daxemu.host.proc.procfs import read_whole
from daxemu.host.run.seccomp import CONTINUE, RESTART, Answer, NotifiedCall
from daxemu.host.tracer.link import TracerLink
from daxemu.host.unexpected import Nursery

log = logging.getLogger(__name__)

# /proc/TID/syscall: execve and execveat of asm/unistd_64.h, or on a processor
_MAYBE_EXECVE = (b"59", b"322", b"running")
_FIRST_LOOK, _LONGEST_LOOK = 0.001, 0.1
"""Seconds between looks at a thread in execve(2)."""
_LONGEST_WATCH = 60.0
"""Seconds. The lookup by the next notified call or the exit notices an execve(2) that takes longer."""


class AddressSpaces:
    """All address spaces with direct mappings of one mount. Belongs to the trio thread."""

    def __init__(
        self, link: TracerLink, nursery: Nursery, watcher: Watcher, media: int, void: int, index: int = 0
    ) -> None:
        """``media``, ``void``: descriptors, opened for reading and writing. ``index``: number of the mount's
        slice in ``zone.SLICES``; agents of several mounts in a process lie side by side. Raises Unsupported.
        """
        self._nursery = nursery
        self._watcher = watcher
        self._making = AgentMaking(link, nursery, media, void, index)
        self._forks = Forks(self._making, watcher, self._add, self.end)
        self._spaces: dict[int, AddressSpace] = {}
        self._in_the_making: dict[int, trio.Event] = {}
        self._failures: dict[int, DaxemuError] = {}
        """Reasons for the calls of threads that were answered RESTART, and got no agent."""

    def __iter__(self) -> Iterator[AddressSpace]:
        return iter(tuple(self._spaces.values()))

    @property
    def is_in_use(self) -> bool:
        """True while an address space lives or is made."""
        return bool(self._spaces or self._in_the_making or self._forks.is_under_way)

    async def of(self, run: NotifiedCalls, call: NotifiedCall) -> AddressSpace | None:
        """Return the address space of a call's thread, which still waits for its answer. Make the space first
        if there is none: then return None, the call is answered, and the thread will make the call again.

        Raises AddressSpaceGone if the thread is dead, AgentRefused with a reason for the user.
        """
        tgid = process_of(call.tid)
        found = await self.settled(call.tid)
        # The call may be made again before the failure is known: only now no agent is in the making.
        failure = self._failures.pop(call.tid, None)
        if found is None:
            if failure is not None:
                raise failure
            self._in_the_making[tgid] = trio.Event()
            try:
                await self._make(run, call, tgid)
            finally:
                self._in_the_making.pop(tgid).set()
        return found

    def find(self, tid: int) -> AddressSpace | None:
        """Return the address space of a thread; None if the thread has none, or its fork is not complete.
        Raises AddressSpaceGone if the thread is dead.
        """
        own = self._spaces.get(process_of(tid))
        if own is not None:
            if shares_memory(tid, own.agent.pid):
                return own
            self.end(own)
        return next((space for space in self if shares_memory(tid, space.agent.pid)), None)

    async def settled(self, tid: int) -> AddressSpace | None:
        """Return the address space of a thread as soon as its process does not make an agent, and is not the
        child of a fork under way. Raises AddressSpaceGone if the thread is dead.
        """
        found = self.find(tid)
        if found is None:
            await self._forks.none_under_way()
            while (found := self.find(tid)) is None:
                if (made := self._in_the_making.get(process_of(tid))) is None:
                    break
                await made.wait()
        return found

    async def forked(
        self,
        run: NotifiedCalls,
        call: NotifiedCall,
        parent: AddressSpace | None,
        drop: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Answer a fork(2) or a clone(2) without CLONE_VM, of a thread of ``parent``; None: without direct
        mappings. The child gets an agent, and no pages at the addresses ``drop`` (start, length). Without the
        right to trace the thread the fork fails with EAGAIN.
        """
        try:
            if parent is None or parent.is_gone or self._forks.is_repeated(call):
                run.answer(call, CONTINUE)
            else:
                await self._forks.fork(run, call, parent, drop)
        except AddressSpaceGone:
            run.answer(call, CONTINUE)
        except AgentRefused as why:
            log.warning("fork of process %s fails: %s", call.tid, why)
            run.answer(call, Answer(error=errno.EAGAIN))

    def is_repeated(self, call: NotifiedCall) -> bool:
        """Return True for a fork that the thread makes once more: :meth:`forked` has not returned yet."""
        return self._forks.is_repeated(call)

    async def executes(self, call: NotifiedCall) -> None:
        """Note an execve(2), before the call is answered with CONTINUE: its address space may end."""
        try:
            space = await self.settled(call.tid)
            if space is not None and space.tgid == process_of(call.tid):
                self._nursery.start_soon(self._watch_execve, space, call.tid)
        except AddressSpaceGone:
            return

    def end(self, space: AddressSpace) -> None:
        """End agent and userfaultfd of a space; wake all waiting tasks and threads. Idempotent."""
        if space.is_gone:
            return
        space.is_gone = True
        if self._spaces.get(space.tgid) is space:
            del self._spaces[space.tgid]
        for fd in (space.uffd.fd, space.outside.fd, space.process):
            if fd >= 0:
                trio.lowlevel.notify_closing(fd)
        space.uffd.close()
        space.outside.close()
        if space.process >= 0:
            os.close(space.process)
        self._watcher.on_gone(space)  # looks into the page tables, which the agent keeps
        space.agent.close()

    def close(self) -> None:
        """End all spaces. The programs run on."""
        for space in self:
            self.end(space)

    async def _make(self, run: NotifiedCalls, call: NotifiedCall, tgid: int) -> None:
        agent, fd, limit = self._making.give_socket(run, call)
        armed = await self._making.hold(agent, fd, limit, call)
        run.answer(call, RESTART)
        try:
            raise_unless_made(await armed.wait())
            agent.tgid = owner_of(call.tid)
            space = AddressSpace(agent, await first_batch(agent))
        except (DaxemuError, OSError) as why:
            agent.close()
            # Without a failure, a live thread would make the call for ever.
            if not isinstance(why, AddressSpaceGone) or _is_alive(call.tid):
                self._failures[call.tid] = AgentRefused(f"no agent in process {tgid}: {why}")
        else:
            self._add(space)

    def _add(self, space: AddressSpace) -> None:
        """Serve a space whose agent has made a batch."""
        try:
            space.process = os.pidfd_open(space.tgid)
        except ProcessLookupError:
            self.end(space)
            return
        except OSError:  # no descriptor is free
            kill_unfollowed(space.tgid)
            self.end(space)
            return
        self._spaces[space.tgid] = space
        space.agent.on_end(partial(self._on_loss, space))
        self._nursery.start_soon(self._await_exit, space)
        for uffd in (space.uffd, space.outside):
            if uffd.fd >= 0:
                self._nursery.start_soon(self._read_events, space, uffd)

    async def open_outside(self, space: AddressSpace) -> None:
        """Give a space a userfaultfd for mappings outside the zone, if the space has none. Precondition: no
        other task does. Raises AddressSpaceGone, and the exceptions of ProcessAgent.take_userfaultfd.
        """
        if space.outside.fd < 0:
            fd = await space.agent.take_userfaultfd()
            if space.is_gone:
                os.close(fd)
                raise AddressSpaceGone(f"process {space.tgid} has ended")
            space.outside.take(fd)
            space.outside.enable(OUTSIDE)
            space.agent.give(fd)
            self._nursery.start_soon(self._read_events, space, space.outside)

    async def _read_events(self, space: AddressSpace, uffd: Userfaultfd) -> None:
        burst = Burst()
        while not space.is_gone:
            try:
                found = await next_events(uffd, burst.readable)
            except trio.ClosedResourceError:
                return
            if not self._take(space, uffd, found):
                burst.end()

    def drain(self, space: AddressSpace) -> None:
        """Take the events of mappings outside the zone that have come. Without a free descriptor the event of
        a fork is left to the task that reads.
        """
        self._drain(space, space.outside)

    def read_events(self, space: AddressSpace) -> None:
        """Take all events that have come: see drain."""
        for uffd in (space.uffd, space.outside):
            self._drain(space, uffd)

    def _drain(self, space: AddressSpace, uffd: Userfaultfd) -> None:
        if uffd.fd >= 0:
            with suppress(OSError):
                self._take(space, uffd, uffd.read())

    def _take(self, space: AddressSpace, uffd: Userfaultfd, found: Sequence[Event]) -> bool:
        """Pass events on. Return True if all are answered already."""
        events: list[Event] = []
        is_answered = True
        for event in found:
            if isinstance(event, Forked):
                is_answered = False
                self._deliver(space, events)
                events = []
                self._forks.adopt(space, event, uffd)
            else:
                events.append(event)
        return self._deliver(space, events) and is_answered

    def _deliver(self, space: AddressSpace, events: list[Event]) -> bool:
        return not events or self._watcher.on_events(space, events)

    async def _await_exit(self, space: AddressSpace) -> None:
        if space.is_gone:  # before this task began: its descriptors may be others' by now
            return
        with suppress(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(space.process)
            self.end(space)

    def _on_loss(self, space: AddressSpace) -> None:
        if not space.is_gone:
            log.warning(
                "the agent of process %s was killed, or did not answer: the process is killed", space.tgid
            )
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(space.process, signal.SIGKILL)
            self.end(space)

    async def _watch_execve(self, space: AddressSpace, tid: int) -> None:
        """End the space once its process runs another program. A failed execve(2) ends the watch."""
        look = _FIRST_LOOK
        with trio.move_on_after(_LONGEST_WATCH):
            while True:
                await trio.sleep(look)
                look = min(2 * look, _LONGEST_LOOK)
                if space.is_gone:
                    return
                # A thread that is not the leader takes the leader's id.
                for each in (tid, space.tgid):
                    if _is_alive(each):
                        break
                else:
                    return
                if not shares_memory(each, space.agent.pid):
                    self.end(space)
                    return
                if each != tid or _call_of(tid) not in _MAYBE_EXECVE:
                    return


def _is_alive(tid: int) -> bool:
    found = status.find(tid)
    return found is not None and not found.is_dead


def _call_of(tid: int) -> bytes:
    try:
        return read_whole(f"/proc/{tid}/syscall").split(b" ", 1)[0].strip()
    except OSError:
        return b""
