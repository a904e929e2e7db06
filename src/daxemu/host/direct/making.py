"""Making of agents, as far as the supervisor goes: the socket in the program, and the thread that is held."""

from __future__ import annotations

from daxemu.host.direct import code
from daxemu.host.direct.address_space import NotifiedCalls
from daxemu.host.direct.agent import ProcessAgent
from daxemu.host.direct.descriptors import Limit, add_socket
from daxemu.host.direct.errors import AddressSpaceGone, AgentRefused
from daxemu.host.direct.memory import process_of
from daxemu.host.direct.userfaultfd import Userfaultfd
from daxemu.host.proc import status
from daxemu.host.run import zone
from daxemu.host.run.seccomp import NotifiedCall
from daxemu.host.tracer.link import Armed, TracerLink
from daxemu.host.tracer.messages import AgentMade, MakeAgent, Outcome, Refused, TraceFork
from daxemu.host.unexpected import Nursery
from daxemu.uapi import PAGE_SIZE

ARENA_SIZE = 1 << 20
"""Bytes of the arenas slice that each mount has: place for its agent in every address space."""


class AgentMaking:
    """Parts shared by all agents of one mount and one run. ``place``: address of the code of an agent."""

    def __init__(self, link: TracerLink, nursery: Nursery, media: int, void: int, index: int) -> None:
        """See AddressSpaces."""
        self._link = link
        self._nursery = nursery
        self._fds = (media, void)
        self._code = code.agent_code()
        self.place = zone.ARENAS.start + index * ARENA_SIZE

    def give_socket(self, run: NotifiedCalls, call: NotifiedCall) -> tuple[ProcessAgent, int, Limit | None]:
        """Give the process of a call the socket of an agent; return this end, which is served, the descriptor
        in the process, and the limit that the tracer must put back. Raises AddressSpaceGone, AgentRefused.
        """
        found = status.find(call.tid)
        if found is None:
            raise AddressSpaceGone(f"thread {call.tid} has ended")
        self._refuse_traced(call.tid, found.tracer)
        agent, theirs = ProcessAgent.pair(self._fds)
        agent.memory = self.place + PAGE_SIZE
        tgid = found.tgid
        try:
            with theirs:
                fd, limit = add_socket(run.add_fd, call, tgid, theirs.fileno())
        except FileNotFoundError:
            agent.close()
            raise AddressSpaceGone(f"thread {call.tid} does not wait any more") from None
        except OSError as error:
            agent.close()
            raise AgentRefused(f"process {tgid} has no free descriptor (RLIMIT_NOFILE): {error}") from error
        self._nursery.start_soon(agent.serve)
        return agent, fd, limit

    async def hold(
        self,
        agent: ProcessAgent,
        fd: int,
        limit: Limit | None,
        call: NotifiedCall,
        drop: tuple[tuple[int, int], ...] | None = None,
    ) -> Armed:
        """Have the tracer hold the thread of a call, which has the socket ``fd`` of ``agent``. ``limit``: see
        give_socket.

        ``drop``: the thread forks, and its child makes the agent; None: the thread makes the agent. Raises
        AddressSpaceGone, AgentRefused; then the agent is closed.
        """
        length = PAGE_SIZE + code.MEMORY
        common = (0, process_of(call.tid), call.tid, fd, self.place, length, self._code, zone.MAGIC, limit)
        request = MakeAgent(*common) if drop is None else TraceFork(*common, drop=drop)
        try:
            armed = await self._link.make_agent(request)
            if not isinstance(armed, Armed):
                raise_unless_made(armed)
                raise AssertionError(armed)
        except BaseException:
            agent.close()
            raise
        return armed

    def is_traced_by_us(self, tid: int) -> bool:
        """Return True if the tracer process traces a thread."""
        found = status.find(tid)
        return found is not None and self._is_ours(found.tracer)

    def _is_ours(self, tracer: int) -> bool:
        return bool(tracer) and process_of(tracer) == self._link.pid

    def _refuse_traced(self, tid: int, tracer: int) -> None:
        if not tracer or self._is_ours(tracer):
            return
        raise AgentRefused(f"process {tracer} traces thread {tid}, and a thread has one tracer at a time")


async def first_batch(agent: ProcessAgent, uffd: Userfaultfd | None = None) -> Userfaultfd:
    """Make the first batch of an agent whose address space has no userfaultfd; return the userfaultfd:
    ``uffd``, which was closed until now, or a new one.
    """
    uffd = uffd or Userfaultfd()
    uffd.take(await agent.take_userfaultfd())
    try:
        uffd.enable()
    except BaseException:
        uffd.close()
        raise
    return uffd


def raise_unless_made(outcome: Outcome | None) -> None:
    """Raise AgentRefused or AddressSpaceGone for any other outcome than AgentMade."""
    if isinstance(outcome, Refused):
        raise AgentRefused(outcome.reason)
    if not isinstance(outcome, AgentMade):
        raise AddressSpaceGone("the thread has ended")
