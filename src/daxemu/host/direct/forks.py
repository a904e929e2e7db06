"""Forks of programs with direct mappings: the child has its agent before its first instruction.

Two ways lead there. The thread forks by the code of its agent, after one stop (``redirect``): the child tells
its process id, makes its agent, and waits until the supervisor knows it. Or the tracer holds the thread and
the child (``tracer.agent_maker``): for a program with seccomp(2) filters of its own, and for a thread that
the tracer has stopped for a signal.

A thread makes its fork again, in both ways. If the program has mappings of several mounts, each supervisor
sees the fork that the code of another agent makes, and passes it on (:meth:`Forks.is_repeated`).

Invariants:
- an address space has one fork under way at a time, so an event of a fork belongs to that fork;
- a child runs only when its space has its process id and its mappings are in the table.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence

import trio

from daxemu.errors import DaxemuError
from daxemu.host.direct import redirect
from daxemu.host.direct.address_space import AddressSpace, NotifiedCalls, Watcher
from daxemu.host.direct.agent import ProcessAgent
from daxemu.host.direct.descriptors import Limit
from daxemu.host.direct.errors import AddressSpaceGone
from daxemu.host.direct.making import AgentMaking, first_batch
from daxemu.host.direct.memory import shares_memory
from daxemu.host.direct.scarce import kill_child
from daxemu.host.direct.syscalls import MADV_DONTNEED, madvise
from daxemu.host.direct.userfaultfd import Forked, Userfaultfd
from daxemu.host.run import zone
from daxemu.host.run.seccomp import RESTART, NotifiedCall
from daxemu.host.tracer.messages import AgentMade, Outcome, Refused

log = logging.getLogger(__name__)

MOST_TRACED = 256
"""Ranges of pages that the child of a fork under the tracer does not get. Further ranges stay present."""

Ranges = Sequence[tuple[int, int]]
"""Addresses and lengths, in bytes."""


class Forks:
    """Forks in the address spaces of one mount and one run. Belongs to the trio thread."""

    def __init__(
        self,
        making: AgentMaking,
        watcher: Watcher,
        add: Callable[[AddressSpace], None],
        end: Callable[[AddressSpace], None],
    ) -> None:
        """``add``: serve the space of a child. ``end``: end a space."""
        self._making = making
        self._watcher = watcher
        self._add = add
        self._end = end
        self._under_way: set[trio.Event] = set()
        """Forks whose child has no space yet."""
        self._traced: set[int] = set()
        """Threads whose next fork is the one that is traced."""
        self._redirected: set[int] = set()
        """Threads that fork by the code of an agent."""

    def is_repeated(self, call: NotifiedCall) -> bool:
        """Return True for a fork that is made once more, by the code of an agent or under the tracer."""
        if call.tid in self._redirected and call.ip in zone.ARENAS:
            return True
        # After NotTaken the thread is not traced any more. The report may still be on its way.
        if call.tid in self._traced and self._making.is_traced_by_us(call.tid):
            self._traced.discard(call.tid)
            return True
        return False

    @property
    def is_under_way(self) -> bool:
        """True while a child has no space yet."""
        return bool(self._under_way)

    async def none_under_way(self) -> None:
        """Wait for all forks that are under way now."""
        for fork in tuple(self._under_way):
            await fork.wait()

    async def fork(self, run: NotifiedCalls, call: NotifiedCall, parent: AddressSpace, drop: Ranges) -> None:
        """Answer a fork of ``parent``; return when the child has a space, or there is no child.

        Raises AddressSpaceGone if the thread is dead, AgentRefused if it may not be traced.
        """
        async with parent.fork_turn:
            under_way = trio.Event()
            self._under_way.add(under_way)
            try:
                record = redirect.find_record(call.tid, self._making.place, run.filters)
                magic = zone.MAGIC if run.is_last(call) else 0
                agent, fd, limit = self._making.give_socket(run, call)
                parent.next_agent = agent
                # The tracer puts a limit back before the thread runs on.
                if record is None or limit is not None or not self._seize(run, call):
                    await self._trace(run, call, parent, agent, fd, limit, drop)
                else:
                    await self._redirect(call, parent, agent, fd, drop, record, magic)
            finally:
                self._traced.discard(call.tid)
                self._redirected.discard(call.tid)
                parent.next_agent = parent.child = None
                self._under_way.discard(under_way)
                under_way.set()

    def adopt(self, parent: AddressSpace, event: Forked) -> None:
        """Make the space of a child, from the event of its fork. The child does not run yet."""
        agent = parent.next_agent
        if agent is None or parent.child is not None:
            os.close(event.fd)
            log.warning("process %s made a child unseen: its memory is not protected", parent.tgid)
            return
        parent.child = AddressSpace(agent, Userfaultfd(event.fd))
        self._watcher.on_forked(parent, parent.child)

    # -- by the code of the agent

    def _seize(self, run: NotifiedCalls, call: NotifiedCall) -> bool:
        """Trace the thread, and have it stop. Return False if the thread is traced at this moment."""
        listener = os.dup(run.listener)
        try:
            redirect.seize(call.tid, listener, call.id)
        except OSError:
            return False
        finally:
            os.close(listener)
        run.restarted(call)
        self._redirected.add(call.tid)
        return True

    async def _redirect(
        self,
        call: NotifiedCall,
        parent: AddressSpace,
        agent: ProcessAgent,
        fd: int,
        drop: Ranges,
        record: redirect.ForkRecord,
        magic: int,
    ) -> None:
        agent.awaits_child()
        most = redirect.layout().most_drops
        try:
            if await redirect.redirect(call.tid, self._making.place, record, fd, drop[:most], magic):
                await agent.told.wait()
            if agent.tgid:
                await self._welcome(parent, agent, record, drop[most:])
                return
        except (DaxemuError, OSError) as why:
            if not isinstance(why, AddressSpaceGone):
                log.warning("the child of process %s is killed: %s", parent.tgid, why)
            if agent.tgid:
                kill_child(agent.tgid, parent.tgid)
        except BaseException:
            agent.close()
            raise
        if parent.child is not None:
            self._end(parent.child)
        agent.close()

    async def _welcome(
        self, parent: AddressSpace, agent: ProcessAgent, record: redirect.ForkRecord, drop: Ranges
    ) -> None:
        """Make the space of a child that waits, and let the child run. Raises AddressSpaceGone."""
        child = parent.child
        try:
            record.free_in(agent.tgid)
        except OSError as error:
            raise AddressSpaceGone(f"process {agent.tgid} has ended") from error
        if child is None:  # no range was registered, so the kernel sent no event
            child = AddressSpace(agent, await first_batch(agent))
            self._watcher.on_forked(parent, child)
        if drop:
            await agent.run([madvise(start, length, MADV_DONTNEED) for start, length in drop])
        await agent.settle(record.word)
        self._served(child)

    def _served(self, child: AddressSpace) -> None:
        self._add(child)
        if not shares_memory(child.tgid, child.agent.pid):
            self._end(child)  # execve(2) came first

    # -- under the tracer

    async def _trace(
        self,
        run: NotifiedCalls,
        call: NotifiedCall,
        parent: AddressSpace,
        agent: ProcessAgent,
        fd: int,
        limit: Limit | None,
        drop: Ranges,
    ) -> None:
        armed = await self._making.hold(agent, fd, limit, call, tuple(drop[:MOST_TRACED]))
        self._traced.add(call.tid)
        run.answer(call, RESTART)
        await self._complete(parent, agent, await armed.wait())

    async def _complete(self, parent: AddressSpace, agent: ProcessAgent, outcome: Outcome | None) -> None:
        """Make the space of the child, or forget the child."""
        child = parent.child
        if not isinstance(outcome, AgentMade):
            if isinstance(outcome, Refused):
                log.warning("the child of process %s was killed: %s", parent.tgid, outcome.reason)
            if child is not None:
                self._end(child)
            agent.close()
            return
        agent.tgid = outcome.tgid
        try:
            if child is None:  # no range was registered, so the kernel sent no event
                child = AddressSpace(agent, await first_batch(agent))
                self._watcher.on_forked(parent, child)
            else:
                await agent.settle()
        except AddressSpaceGone:
            agent.close()
            if child is not None:
                kill_child(outcome.tgid, parent.tgid)
                self._end(child)
            return
        self._served(child)
