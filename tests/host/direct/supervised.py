"""Programs with direct mappings of a plain file: the test plays the supervisor of a mount.

A program runs under the filter of ``daxemu run``. Its mmap of the file ``Supervisor.path`` becomes a mapping
of that file in the zone, made by the agent. A missing page is allocated, a write-protected one is released.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from daxemu.host.direct.address_space import AddressSpace
from daxemu.host.direct.address_spaces import AddressSpaces
from daxemu.host.direct.errors import AddressSpaceChanging, AddressSpaceGone, AgentRefused
from daxemu.host.direct.syscalls import mmap_media
from daxemu.host.direct.userfaultfd import Event, PageFault
from daxemu.host.proc import status
from daxemu.host.run import seccomp, zone
from daxemu.host.run.filters import Nr
from daxemu.host.run.seccomp import CONTINUE, Answer, NotifiedCall
from daxemu.host.tracer.link import TracerLink
from daxemu.uapi import PAGE_SIZE

_STUB = """
import os, socket, sys
from daxemu.host.run import filters, seccomp
sock = socket.socket(fileno=int(sys.argv[1]))
listener = seccomp.install(filters.direct())
socket.send_fds(sock, [b"x"], [listener])
os.close(listener)
sock.close()
os.execv(sys.argv[2], sys.argv[2:])
"""


class Listener:
    """The calls of one program: what ``AttachedRun`` is for a mount."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def add_fd(self, call: NotifiedCall, fd: int, *, number: int | None = None) -> int:
        return seccomp.add_fd(self.fd, call, fd, number=number)

    filters = 1 + status.read("self").seccomp_filters

    @property
    def listener(self) -> int:
        return self.fd

    def is_last(self, call: NotifiedCall) -> bool:
        return True

    def restarted(self, call: NotifiedCall) -> None:
        pass

    def answer(self, call: NotifiedCall, answer: Answer) -> bool:
        return seccomp.answer(self.fd, call, answer)


class Supervisor:
    """Watcher, and answers to all notified calls."""

    def __init__(self, link: TracerLink, nursery: trio.Nursery, path: Path) -> None:
        self.path = path
        self.link = link
        self.media = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        self._void = os.memfd_create("void", os.MFD_CLOEXEC)
        self.spaces = AddressSpaces(link, nursery, self, self.media, self._void)
        self._nursery = nursery
        self._at = zone.SLICES[0].start
        self.events: list[Event] = []
        self.forks: list[tuple[AddressSpace, AddressSpace]] = []
        self.gone: list[AddressSpace] = []
        self.calls: list[int] = []
        self.refusals: list[str] = []
        self.maps: list[tuple[AddressSpace, int, int]] = []
        self.protects = False

    # -- Watcher

    def on_events(self, space: AddressSpace, events: Sequence[Event]) -> bool:
        self.events += events
        for event in events:
            assert isinstance(event, PageFault)
            page = event.address & -PAGE_SIZE
            try:
                if event.is_wp:
                    space.uffd.write_protect(page, PAGE_SIZE, False)
                else:
                    offset = page - next(at for _, at, n in self.maps if at <= page < at + n * PAGE_SIZE)
                    os.posix_fallocate(self.media, offset, PAGE_SIZE)
                    space.uffd.wake(page, PAGE_SIZE)
            except AddressSpaceGone:
                continue
            except AddressSpaceChanging:  # a fork, whose event is still to be read
                self._nursery.start_soon(self._release, space, page)
        return False

    async def _release(self, space: AddressSpace, page: int) -> None:
        while not space.is_gone:
            try:
                space.uffd.write_protect(page, PAGE_SIZE, False)
            except AddressSpaceChanging:
                await trio.sleep(0.001)
            except AddressSpaceGone:
                return
            else:
                return

    def on_forked(self, parent: AddressSpace, child: AddressSpace) -> None:
        self.forks.append((parent, child))

    def on_gone(self, space: AddressSpace) -> None:
        self.gone.append(space)

    # -- calls

    async def serve(self, fd: int) -> None:
        """Answer the calls of a listener until the last of its programs has ended."""
        run = Listener(fd)
        poll = select.epoll()
        poll.register(fd, 1)
        try:
            while True:
                await trio.lowlevel.wait_readable(poll.fileno())
                ((_, what),) = poll.poll(0) or [(fd, 1)]
                if what & 0x10:
                    return
                call = seccomp.receive(fd)
                if call is not None:
                    self.calls.append(call.nr)
                    self._nursery.start_soon(self._handle, run, call)
        finally:
            poll.close()
            os.close(fd)

    async def _handle(self, run: Listener, call: NotifiedCall) -> None:
        if call.nr in (Nr.FORK, Nr.CLONE):
            parent = None if self.spaces.is_repeated(call) else await self.spaces.settled(call.tid)
            await self.spaces.forked(run, call, parent)
            return
        if call.nr in (Nr.EXECVE, Nr.EXECVEAT):
            await self.spaces.executes(call)
        if call.nr != Nr.MMAP or not self._is_ours(call):
            run.answer(call, CONTINUE)
            return
        try:
            space = await self.spaces.of(run, call)
            if space is not None:
                run.answer(call, await self._map(space, call))
        except AgentRefused as why:
            self.refusals.append(str(why))
            run.answer(call, Answer(error=errno.ENODEV))
        except AddressSpaceGone:
            return

    def _is_ours(self, call: NotifiedCall) -> bool:
        try:
            return Path(f"/proc/{call.tid}/fd/{call.args[4] & 0xFFFFFFFF}").readlink() == self.path
        except OSError:
            return False

    async def _map(self, space: AddressSpace, call: NotifiedCall) -> Answer:
        length, prot, offset = call.args[1], call.args[2], call.args[5]
        pages = -(-length // PAGE_SIZE)
        at, self._at = self._at, self._at + (pages + 1) * PAGE_SIZE
        (result,) = await space.agent.run([mmap_media(at, pages * PAGE_SIZE, prot, True, offset)])
        if result < 0:
            return Answer(error=-result)
        self.maps.append((space, at, pages))
        space.uffd.register(at, pages * PAGE_SIZE)
        if self.protects:
            space.uffd.write_protect(at, pages * PAGE_SIZE, True)
        return Answer(value=at)


class Program:
    """A program under the filter, that is told and asked by lines."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self._rest = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    async def line(self) -> str:
        assert self.process.stdout is not None
        with trio.fail_after(60):
            while b"\n" not in self._rest:
                chunk = await self.process.stdout.receive_some()
                assert chunk, f"the program ended: {self._rest!r}"
                self._rest += chunk
        line, self._rest = self._rest.split(b"\n", 1)
        return line.decode()

    async def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send_all(command.encode() + b"\n")

    async def ask(self, command: str) -> str:
        await self.tell(command)
        return await self.line()

    async def end(self) -> int:
        assert self.process.stdin is not None
        await self.process.stdin.aclose()
        return await self.process.wait()


class Stage:
    """A supervisor, and the programs under it."""

    def __init__(self, supervisor: Supervisor, nursery: trio.Nursery) -> None:
        self.supervisor = supervisor
        self._nursery = nursery
        self._programs: list[Program] = []

    async def start(self, *command: str) -> Program:
        ours, theirs = socket.socketpair()
        process = await trio.lowlevel.open_process(
            [sys.executable, "-c", _STUB, str(theirs.fileno()), *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        program = Program(process)
        self._programs.append(program)
        _, fds, _, _ = await trio.to_thread.run_sync(socket.recv_fds, ours, 1, 1)
        ours.close()
        self._nursery.start_soon(self.supervisor.serve, fds[0])
        return program

    async def close(self) -> None:
        for program in self._programs:
            if program.process.returncode is None:
                program.process.kill()
            with trio.move_on_after(10):
                await program.process.wait()


@asynccontextmanager
async def _stage(path: Path) -> AsyncIterator[Stage]:
    async with trio.open_nursery() as nursery, TracerLink.open() as link:
        supervisor = Supervisor(link, nursery, path)
        stage = Stage(supervisor, nursery)
        try:
            yield stage
        finally:
            with trio.CancelScope(shield=True):
                await stage.close()
                supervisor.spaces.close()
            nursery.cancel_scope.cancel()


def play(path: Path, scene: Callable[[Stage], Awaitable[None]], seconds: float = 60) -> None:
    """Run a scene with a media file of 256 pages."""
    with path.open("wb") as file:
        file.truncate(256 * PAGE_SIZE)

    async def main() -> None:
        with trio.fail_after(seconds):
            async with _stage(path) as stage:
                await scene(stage)

    trio.run(main)


def agents(media: Path) -> list[int]:
    """Return the agents for a media file that are not zombies."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            comm = Path(f"/proc/{pid}/comm").read_bytes()
            is_its = Path(f"/proc/{pid}/fd/1").readlink() == media  # a zombie has no descriptors
        except OSError:
            continue
        if comm == b"daxemu-agent\n" and is_its:
            found.append(int(pid))
    return found
