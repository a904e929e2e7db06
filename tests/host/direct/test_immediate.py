"""Stores that are answered without a step of the event loop, and the agents that do not answer soon."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence

import pytest
import trio

from daxemu.fs.fault import FaultKind
from daxemu.host.direct.agent import AgentReply
from daxemu.host.direct.errors import AddressSpaceChanging
from daxemu.host.direct.syscalls import Syscall
from daxemu.pmem import inject
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, Ino
from tests.support.core import Core, core_at, pages
from tests.support.own_space import Host, OwnAgent, Process, host_of

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="userfaultfd(2) needs root")


@pytest.fixture
def core() -> Iterator[Core]:
    """Core of a direct mount: poison takes the page out of the media."""
    with core_at(is_direct=True) as made:
        yield made


def run(core: Core, test: Callable[[Host], Awaitable[None]]) -> None:
    async def main() -> None:
        async with host_of(core) as host:
            await test(host)

    trio.run(main)


class LateAgent(OwnAgent):
    """Makes a call at once, and answers when ``go`` is set. ``begun``: set while a call has no answer."""

    def __init__(self, other: OwnAgent) -> None:
        super().__init__(*other._fds.values())
        self.begun, self.go = trio.Event(), trio.Event()
        self.refuses = False

    def begin(self, batch: Sequence[Syscall]) -> AgentReply | None:
        reply = AgentReply()
        self._results = [-errno.ENOMEM] if self.refuses else [self._call(call) for call in batch]
        self.refuses = False
        self.begun.set()
        return reply

    async def completed(self, reply: AgentReply) -> list[int]:
        await self.go.wait()
        return self._results


async def shared_page(core: Core, host: Host) -> tuple[Process, Ino, int]:
    """Map a file of two pages with a clone, both present. Return the process, the file and the address."""
    ino = core.file(data=pages("ab"))
    core.clone(ino, b"clone")
    process = host.process()
    at = await process.mmap(ino, 2)
    assert await process.letters(at, 2) == "ab"
    return process, ino, at


async def late(core: Core, host: Host) -> tuple[Process, Ino, int, LateAgent]:
    process, ino, at = await shared_page(core, host)
    assert isinstance(process.space.agent, OwnAgent)
    agent = process.space.agent = LateAgent(process.space.agent)
    return process, ino, at, agent


def block_of(core: Core, ino: Ino, page: int) -> int:
    (run,) = core.fs.runs(ino, Range(page, page + 1))
    assert run.kind is FaultKind.MAPPED
    return run.dev_block


def test_a_copy_at_a_store_is_one_call_of_the_agent(core: Core) -> None:
    async def test(host: Host) -> None:
        process, ino, at = await shared_page(core, host)
        agent = process.space.agent
        assert isinstance(agent, OwnAgent)
        before = agent.calls
        assert await process.store(at, b"x")
        assert agent.calls == before + 1
        assert core.read(ino)[:2] == b"xa"

    run(core, test)


def test_a_store_to_a_hole_is_one_call_of_the_agent(core: Core) -> None:
    async def test(host: Host) -> None:
        ino = core.file()
        core.fs.set_size(ino, 2 * PAGE_SIZE)
        process = host.process()
        at = await process.mmap(ino, 2)
        agent = process.space.agent
        assert isinstance(agent, OwnAgent)
        before = agent.calls
        assert await process.store(at + PAGE_SIZE, b"x")
        assert agent.calls == before + 1
        assert core.read(ino)[PAGE_SIZE:][:2] == b"x\0"
        assert await process.letters(at, 2) == ".x"

    run(core, test)


def test_the_copy_is_registered(core: Core) -> None:
    """A clone write-protects the copy, and poison of the copy is an event."""

    async def test(host: Host) -> None:
        process, ino, at = await shared_page(core, host)
        assert await process.store(at, b"x")
        other = core.file(b"other")
        await host.clone(ino, other)
        assert await process.store(at, b"y")
        assert core.read(other)[:1] == b"x"
        core.poison(ino, 0)
        assert await process.letters(at, 2) == "!b"
        assert len(host.accesses) == 1

    run(core, test)


def test_a_clone_waits_for_a_late_agent(core: Core) -> None:
    async def test(host: Host) -> None:
        process, ino, at, agent = await late(core, host)
        other = core.file(b"other")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(process.store, at, b"x")
            await agent.begun.wait()
            nursery.start_soon(host.clone, ino, other)
            await trio.sleep(0.05)
            assert core.fs.names.get(other).size == 0
            agent.go.set()
        assert core.read(ino)[:2] == b"xa"
        cloned = bytes(core.read(other)[:2])
        assert cloned in (b"aa", b"xa")
        assert await process.store(at, b"y")
        assert core.read(other)[:2] == cloned

    run(core, test)


def test_poison_beside_a_late_agent_leaves_no_page_of_zeros(core: Core) -> None:
    async def test(host: Host) -> None:
        process, ino, at, agent = await late(core, host)
        stored: list[bool] = []

        async def store() -> None:
            stored.append(await process.store(at, b"x"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(store)
            await agent.begun.wait()
            inject.inject(core.pmem, block_of(core, ino, 0) * PAGE_SIZE, PAGE_SIZE)
            # No userfaultfd has the page now, so tmpfs makes one.
            assert ctypes.string_at(at, 1) == b"\0"
            assert core.pmem.dax.strays() != []
            agent.go.set()
        assert core.pmem.dax.strays() == []
        assert stored == [False]
        assert await process.letters(at, 2) == "!b"

    run(core, test)


def test_a_refused_call_of_a_late_agent_is_decided_anew(core: Core) -> None:
    async def test(host: Host) -> None:
        process, ino, at, agent = await late(core, host)
        agent.refuses = True
        agent.go.set()
        assert await process.store(at, b"x")
        assert core.read(ino)[:2] == b"xa"
        assert await process.letters(at, 2) == "xb"

    run(core, test)


def test_a_refused_call_is_decided_anew(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel has no more VMAs for the process."""

    async def test(host: Host) -> None:
        process, ino, at = await shared_page(core, host)
        refused = AgentReply()
        refused.results = [-errno.ENOMEM]
        monkeypatch.setattr(process.space.agent, "begin", lambda batch: refused)
        assert await process.store(at, b"x")
        assert core.read(ino)[:2] == b"xa"
        assert await process.letters(at, 2) == "xb"

    run(core, test)


def test_a_registration_beside_a_fork_is_made_again(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(host: Host) -> None:
        process, ino, at = await shared_page(core, host)
        register, refusals = process.space.uffd.register, iter([None, None])

        def refusing(start: int, length: int) -> None:
            if next(refusals, start) is None:
                raise AddressSpaceChanging("a fork is not finished")
            register(start, length)

        monkeypatch.setattr(process.space.uffd, "register", refusing)
        assert await process.store(at, b"x")
        assert next(refusals, None) is None
        other = core.file(b"other")
        await host.clone(ino, other)
        assert await process.store(at, b"y")
        assert core.read(other)[:1] == b"x"

    run(core, test)
