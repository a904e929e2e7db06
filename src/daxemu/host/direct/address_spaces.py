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
- a process makes its agent, or forks, one after the other: the agent's socket is in the program for a moment,
  and an event of a fork belongs to the one fork under way;
- the child of a fork has its agent before its first instruction, or does not live;
- a space whose agent was killed by others does not outlive the agent: its process is killed.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import platform
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from typing import Protocol

import trio

from daxemu.errors import DaxemuError
from daxemu.host.direct import code, descriptors
from daxemu.host.direct.agent import ProcessAgent
from daxemu.host.direct.errors import AddressSpaceGone, AgentRefused
from daxemu.host.direct.userfaultfd import Event, Forked, Userfaultfd
from daxemu.host.proc import stat, status
from daxemu.host.proc.procfs import read_whole
from daxemu.host.run import zone
from daxemu.host.run.seccomp import CONTINUE, Answer, NotifiedCall
from daxemu.host.tracer.link import Armed, TracerLink
from daxemu.host.tracer.messages import AgentMade, MakeAgent, Outcome, Refused, TraceFork
from daxemu.host.unexpected import Nursery
from daxemu.uapi import PAGE_SIZE

log = logging.getLogger(__name__)

RESTART = Answer(error=513)
"""ERESTARTNOINTR of linux/errno.h: the thread makes the call again, if the tracer has interrupted it."""

ARENA_SIZE = 1 << 20
"""Bytes of the arenas slice that each mount has: place for its agent in every address space."""

_NR_KCMP = {"x86_64": 312}.get(platform.machine(), 272)  # asm/unistd.h
_KCMP_VM = 1  # uapi/linux/kcmp.h
# /proc/TID/syscall: execve and execveat of asm/unistd_64.h, or on a processor
_MAYBE_EXECVE = (b"59", b"322", b"running")
_FIRST_LOOK, _LONGEST_LOOK = 0.001, 0.1
"""Seconds between looks at a thread in execve(2)."""
_LONGEST_WATCH = 60.0
"""Seconds. The lookup by the next notified call or the exit notices an execve(2) that takes longer."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


class NotifiedCalls(Protocol):
    """The calls of one ``daxemu run``: ``host.run.attached.AttachedRun``."""

    def add_fd(self, call: NotifiedCall, fd: int, *, number: int | None = None) -> int:
        """Copy a descriptor into the process that waits."""

    def answer(self, call: NotifiedCall, answer: Answer) -> bool:
        """Let the call return."""


class AddressSpace:
    """Memory of one process. ``is_gone``: ended, with agent and userfaultfd."""

    def __init__(self, agent: ProcessAgent, uffd: Userfaultfd) -> None:
        self.agent = agent
        self.uffd = uffd
        self.is_gone = False
        self._fork_turn = trio.Lock()
        self._next_agent: ProcessAgent | None = None
        """Agent of the child, while a fork is under way."""
        self._child: AddressSpace | None = None
        """Child of the fork under way, once its event was read."""
        self._process = -1
        """pidfd of the process."""

    @property
    def tgid(self) -> int:
        """Process id; 0 for the child of a fork that is not complete yet."""
        return self.agent.tgid


class Watcher(Protocol):
    """Decides faults. Every method is called in the trio thread, and must not wait."""

    def on_events(self, space: AddressSpace, events: Sequence[Event]) -> None:
        """Take events of the userfaultfd, in order; no ``Forked`` is among them."""

    def on_forked(self, parent: AddressSpace, child: AddressSpace) -> None:
        """Copy what is known of ``parent``: ``child`` has the same mappings, in place of any event before
        this call and none after. The agent of ``child`` may be used from now on; batches wait until the agent
        is made.
        """

    def on_gone(self, space: AddressSpace) -> None:
        """Forget the space: its process has ended or runs another program."""


class AddressSpaces:
    """All address spaces with direct mappings of one mount. Belongs to the trio thread."""

    def __init__(
        self, link: TracerLink, nursery: Nursery, watcher: Watcher, media: int, void: int, index: int = 0
    ) -> None:
        """``media``, ``void``: descriptors, opened for reading and writing. ``index``: number of the mount's
        slice in ``zone.SLICES``; agents of several mounts in a process lie side by side. Raises Unsupported.
        """
        self._link = link
        self._nursery = nursery
        self._watcher = watcher
        self._fds = (media, void)
        self._place = zone.ARENAS.start + index * ARENA_SIZE
        self._code = code.agent_code()
        self._spaces: dict[int, AddressSpace] = {}
        self._making: dict[int, trio.Event] = {}
        self._forks: set[trio.Event] = set()
        """Forks whose child may run already, but has no space yet."""
        self._repeating: set[int] = set()
        """Threads whose next fork is the one that is traced."""
        self._failures: dict[int, DaxemuError] = {}
        """Reasons for the calls of threads that were answered RESTART, and got no agent."""

    def __iter__(self) -> Iterator[AddressSpace]:
        return iter(tuple(self._spaces.values()))

    async def of(self, run: NotifiedCalls, call: NotifiedCall) -> AddressSpace | None:
        """Return the address space of a call's thread, which still waits for its answer. Make the space first
        if there is none: then return None, the call is answered, and the thread will make the call again.

        Raises AddressSpaceGone if the thread is dead, AgentRefused with a reason for the user.
        """
        tgid = _process_of(call.tid)
        found = await self.settled(call.tid)
        # The call may be made again before the failure is known: only now no agent is in the making.
        failure = self._failures.pop(call.tid, None)
        if found is None:
            if failure is not None:
                raise failure
            self._making[tgid] = trio.Event()
            try:
                await self._make(run, call, tgid)
            finally:
                self._making.pop(tgid).set()
        return found

    def find(self, tid: int) -> AddressSpace | None:
        """Return the address space of a thread; None if the thread has none, or its fork is not complete.
        Raises AddressSpaceGone if the thread is dead.
        """
        own = self._spaces.get(_process_of(tid))
        if own is not None:
            if _shares_memory(tid, own.agent.pid):
                return own
            self.end(own)
        return next((space for space in self if _shares_memory(tid, space.agent.pid)), None)

    async def settled(self, tid: int) -> AddressSpace | None:
        """Return the address space of a thread as soon as its process does not make an agent, and is not the
        child of a fork under way. Raises AddressSpaceGone if the thread is dead.
        """
        found = self.find(tid)
        if found is None:
            for fork in tuple(self._forks):
                await fork.wait()
            while (found := self.find(tid)) is None:
                if (made := self._making.get(_process_of(tid))) is None:
                    break
                await made.wait()
        return found

    async def forked(
        self, run: NotifiedCalls, call: NotifiedCall, drop: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Answer a fork(2) or a clone(2) without CLONE_VM. The child of a process with direct mappings gets
        an agent, and no pages at the addresses ``drop`` (start, length). Without the right to trace the
        thread the fork fails with EAGAIN.
        """
        try:
            # After NotTaken the thread is not traced any more. The report may still be on its way.
            if call.tid in self._repeating and self._is_traced_by_us(call.tid):
                self._repeating.discard(call.tid)
                run.answer(call, CONTINUE)
                return
            parent = await self.settled(call.tid)
            if parent is None:
                run.answer(call, CONTINUE)
                return
            async with parent._fork_turn:
                await self._fork(run, call, parent, tuple(drop))
        except AddressSpaceGone:
            run.answer(call, CONTINUE)
        except AgentRefused as why:
            log.warning("fork of process %s fails: %s", call.tid, why)
            run.answer(call, Answer(error=errno.EAGAIN))

    async def executes(self, call: NotifiedCall) -> None:
        """Note an execve(2), before the call is answered with CONTINUE: its address space may end."""
        try:
            space = await self.settled(call.tid)
            if space is not None and space.tgid == _process_of(call.tid):
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
        for fd in (space.uffd.fd, space._process):
            if fd >= 0:
                trio.lowlevel.notify_closing(fd)
        space.uffd.close()
        if space._process >= 0:
            os.close(space._process)
        space.agent.close()
        self._watcher.on_gone(space)

    def close(self) -> None:
        """End all spaces. The programs run on."""
        for space in self:
            self.end(space)

    async def _make(self, run: NotifiedCalls, call: NotifiedCall, tgid: int) -> None:
        agent, armed = await self._begin(run, call, tgid, MakeAgent)
        run.answer(call, RESTART)
        try:
            _raise_unless_made(await armed.wait())
            agent.tgid = _owner_of(call.tid)
            space = AddressSpace(agent, await _first_batch(agent))
        except AddressSpaceGone:
            agent.close()
        except (DaxemuError, OSError) as why:
            agent.close()
            self._failures[call.tid] = AgentRefused(f"no agent in process {tgid}: {why}")
        else:
            self._add(space)

    async def _fork(
        self,
        run: NotifiedCalls,
        call: NotifiedCall,
        parent: AddressSpace,
        drop: tuple[tuple[int, int], ...],
    ) -> None:
        agent, armed = await self._begin(run, call, parent.tgid, partial(TraceFork, drop=drop))
        under_way = trio.Event()
        self._forks.add(under_way)
        parent._next_agent = agent
        self._repeating.add(call.tid)
        run.answer(call, RESTART)
        try:
            await self._complete(parent, agent, await armed.wait())
        finally:
            self._repeating.discard(call.tid)
            parent._next_agent = parent._child = None
            self._forks.discard(under_way)
            under_way.set()

    async def _complete(self, parent: AddressSpace, agent: ProcessAgent, outcome: Outcome | None) -> None:
        """Make the space of the child, or forget the child."""
        child = parent._child
        if not isinstance(outcome, AgentMade):
            if isinstance(outcome, Refused):
                log.warning("the child of process %s was killed: %s", parent.tgid, outcome.reason)
            if child is not None:
                self.end(child)
            agent.close()
            return
        agent.tgid = outcome.tgid
        try:
            if child is None:  # no range was registered, so the kernel sent no event
                child = AddressSpace(agent, await _first_batch(agent))
                self._watcher.on_forked(parent, child)
            else:
                await agent.settle()
        except AddressSpaceGone:
            agent.close()
            if child is not None:
                self.end(child)
            return
        self._add(child)
        if not _shares_memory(child.tgid, agent.pid):
            self.end(child)  # execve(2) came first

    async def _begin(
        self,
        run: NotifiedCalls,
        call: NotifiedCall,
        tgid: int,
        kind: Callable[..., MakeAgent | TraceFork],
    ) -> tuple[ProcessAgent, Armed]:
        """Give the process the socket of an agent, and hold the thread."""
        self._refuse_traced(call.tid)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        agent = ProcessAgent(ours, self._fds)
        try:
            with theirs:
                fd, limit = descriptors.add_socket(run.add_fd, call, tgid, theirs.fileno())
            length = PAGE_SIZE + code.MEMORY
            request = kind(0, tgid, call.tid, fd, self._place, length, self._code, zone.MAGIC, limit)
            armed = await self._link.make_agent(request)
            if not isinstance(armed, Armed):
                _raise_unless_made(armed)
                raise AssertionError(armed)
        except FileNotFoundError:
            agent.close()
            raise AddressSpaceGone(f"thread {call.tid} does not wait any more") from None
        except OSError as error:
            agent.close()
            raise AgentRefused(f"process {tgid} has no free descriptor (RLIMIT_NOFILE): {error}") from error
        except BaseException:
            agent.close()
            raise
        self._nursery.start_soon(agent.serve)
        return agent, armed

    def _refuse_traced(self, tid: int) -> None:
        found = status.find(tid)
        if found is None or not found.tracer or _process_of(found.tracer) == self._link.pid:
            return
        raise AgentRefused(
            f"process {found.tracer} traces thread {tid}, and a thread has one tracer at a time"
        )

    def _is_traced_by_us(self, tid: int) -> bool:
        found = status.find(tid)
        return found is not None and bool(found.tracer) and _process_of(found.tracer) == self._link.pid

    def _add(self, space: AddressSpace) -> None:
        """Serve a space whose agent has made a batch."""
        try:
            space._process = os.pidfd_open(space.tgid)
        except ProcessLookupError:
            self.end(space)
            return
        self._spaces[space.tgid] = space
        for task in (self._read_events, self._await_exit, self._await_loss):
            self._nursery.start_soon(task, space)

    async def _read_events(self, space: AddressSpace) -> None:
        while not space.is_gone:
            try:
                await trio.lowlevel.wait_readable(space.uffd.fd)
            except trio.ClosedResourceError:
                return
            self.read_events(space)

    def read_events(self, space: AddressSpace) -> None:
        """Pass on the events that have come. No event: nothing happens."""
        events: list[Event] = []
        for event in space.uffd.read() if not space.is_gone else ():
            if isinstance(event, Forked):
                self._deliver(space, events)
                events = []
                self._adopt(space, event)
            else:
                events.append(event)
        self._deliver(space, events)

    def _deliver(self, space: AddressSpace, events: list[Event]) -> None:
        if events:
            self._watcher.on_events(space, events)

    def _adopt(self, parent: AddressSpace, event: Forked) -> None:
        agent = parent._next_agent
        if agent is None or parent._child is not None:
            os.close(event.fd)
            log.warning("process %s made a child unseen: its memory is not protected", parent.tgid)
            return
        parent._child = AddressSpace(agent, Userfaultfd(event.fd))
        self._watcher.on_forked(parent, parent._child)

    async def _await_exit(self, space: AddressSpace) -> None:
        if space.is_gone:  # before this task began: its descriptors may be others' by now
            return
        with suppress(trio.ClosedResourceError):
            await trio.lowlevel.wait_readable(space._process)
            self.end(space)

    async def _await_loss(self, space: AddressSpace) -> None:
        await space.agent.ended.wait()
        if not space.is_gone:
            log.warning(
                "the agent of process %s was killed, or did not answer: the process is killed", space.tgid
            )
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(space._process, signal.SIGKILL)
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
                    found = status.find(each)
                    if found is not None and not found.is_dead:
                        break
                else:
                    return
                if not _shares_memory(each, space.agent.pid):
                    self.end(space)
                    return
                if each != tid or _call_of(tid) not in _MAYBE_EXECVE:
                    return


async def _first_batch(agent: ProcessAgent) -> Userfaultfd:
    uffd = Userfaultfd(await agent.take_userfaultfd())
    try:
        uffd.enable()
    except BaseException:
        uffd.close()
        raise
    return uffd


def _raise_unless_made(outcome: Outcome | None) -> None:
    """Raise AgentRefused or AddressSpaceGone for any other outcome than AgentMade."""
    if isinstance(outcome, Refused):
        raise AgentRefused(outcome.reason)
    if not isinstance(outcome, AgentMade):
        raise AddressSpaceGone("the thread has ended")


def _process_of(tid: int) -> int:
    found = status.find(tid)
    if found is None:
        raise AddressSpaceGone(f"thread {tid} has ended")
    return found.tgid


def _owner_of(tid: int) -> int:
    """Return the process whose memory a thread uses: its own, or the outermost ancestor with the same memory.

    A child of vfork(2) ends, or executes a program, before its parent: the address space is the parent's.
    """
    tgid = _process_of(tid)
    with suppress(OSError):  # the process ends at this moment
        while (parent := stat.read(tgid).parent) > 1 and _shares_memory(tgid, parent):
            tgid = parent
    return tgid


def _shares_memory(tid: int, agent: int) -> bool:
    """Return True if a thread has the address space of an agent. A dead thread has none."""
    return bool(agent) and int(_libc.syscall(_NR_KCMP, tid, agent, _KCMP_VM, 0, 0)) == 0


async def kill(tgid: int, agent: int) -> None:
    """Kill the process with the address space of an agent, and wait for the end of its last thread."""
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(tgid)
        try:
            if _shares_memory(tgid, agent):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                await trio.lowlevel.wait_readable(pidfd)
        finally:
            os.close(pidfd)


def _call_of(tid: int) -> bytes:
    try:
        return read_whole(f"/proc/{tid}/syscall").split(b" ", 1)[0].strip()
    except OSError:
        return b""
