"""Direct mappings in the test's own process: real mappings of real media, real userfaultfds, no mount.

A ``Space`` needs an agent in another process only because the program does not know of daxemu. Here the test
makes the system calls itself, in a worker thread. Several spaces of one process stand for several processes:
each has addresses and a userfaultfd of its own.
"""

from __future__ import annotations

import ctypes
import errno
import math
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from types import SimpleNamespace
from typing import TypeVar, cast

import trio
import trio.from_thread

from daxemu.events import Event
from daxemu.fs.inode import Inode
from daxemu.host.direct import userfaultfd
from daxemu.host.direct.agent import AgentReply
from daxemu.host.direct.calls import MAP_SHARED, OpenFile
from daxemu.host.direct.mappings import DirectMappings
from daxemu.host.direct.syscalls import MEDIA_FD, VOID_FD, Syscall
from daxemu.host.direct.table import Space
from daxemu.host.direct.userfaultfd import PageFault
from daxemu.host.fuse.open_files import OpenFiles
from daxemu.host.mappings import Access, Answer, Upcalls
from daxemu.host.mount_parts import MountParts
from daxemu.host.run import zone
from daxemu.host.run.filters import Nr
from daxemu.host.run.seccomp import Answer as Reply
from daxemu.host.run.seccomp import NotifiedCall
from daxemu.host.tracer.messages import Refused
from daxemu.host.unexpected import Unexpected
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE, Ino
from tests.support.core import Core

READ, WRITE = 1, 2
BOTH = READ | WRITE
LIMIT = 60
"""Seconds for one call of HostInThread. A longer call hangs."""
T = TypeVar("T")
_PIPE = 1 << 16
_MMAP = 9

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.read.argtypes = libc.write.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
libc.read.restype = libc.write.restype = ctypes.c_ssize_t


class OwnAgent:
    """Makes the calls of a batch in this process."""

    def __init__(self, media: int, void: int) -> None:
        self.pid = self.tgid = os.getpid()
        self._fds = {MEDIA_FD: media, VOID_FD: void}
        self.calls = 0
        self._turn = trio.Lock()

    async def run(self, batch: Sequence[Syscall]) -> list[int]:
        """See Agent.run."""
        self.calls += len(batch)
        async with self._turn:  # an agent makes batches in their order
            return await trio.to_thread.run_sync(lambda: [self._call(call) for call in batch])

    def begin(self, batch: Sequence[Syscall]) -> AgentReply | None:
        """See Agent.begin."""
        self.calls += len(batch)
        reply = AgentReply()
        reply.results = [self._call(call) for call in batch]
        return reply

    async def completed(self, reply: AgentReply) -> list[int]:
        """See Agent.completed."""
        assert reply.results is not None
        return reply.results

    @property
    def guard_fd(self) -> int:
        """See Agent.guard_fd."""
        return -1

    def bequeath(self, ranges: Sequence[Range]) -> None:
        """See Agent.bequeath. No mapping of a test is outside the zone."""
        assert not ranges

    def _call(self, call: Syscall) -> int:
        args = [*call.args, *[0] * (6 - len(call.args))]
        if call.number == _MMAP:
            low = args[4] & 0xFFFFFFFF
            args[4] = self._fds.get(low, -1)
        result: int = libc.syscall(ctypes.c_long(call.number), *(ctypes.c_long(each) for each in args))
        return result if result != -1 else -ctypes.get_errno()


class NoTracer:
    """Holds no thread."""

    async def hold(self, tgid: int, tid: int, patience: float) -> Refused:
        """See Holder.hold."""
        return Refused(0, "no tracer")


class Process:
    """One address space of a test. Addresses are bytes."""

    def __init__(self, host: Host, space: Space) -> None:
        self._host = host
        self.space = space
        self.pipe = os.pipe()

    async def call(self, nr: int, *args: int) -> int:
        """Make a notified call; return its value or -errno. A call that must go on to the kernel does."""
        call = NotifiedCall(1, os.getpid(), nr, (*args, *[0] * (6 - len(args))))  # type: ignore[arg-type]
        answer = await self._host.calls.answer(call, self.space)
        return await self._carried_out(answer, call)

    async def _carried_out(self, answer: Reply, call: NotifiedCall) -> int:
        if not answer.proceed:
            return -answer.error if answer.error else answer.value
        longs = [ctypes.c_long(each) for each in call.args]
        result = await trio.to_thread.run_sync(lambda: libc.syscall(ctypes.c_long(call.nr), *longs))
        return result if result != -1 else -ctypes.get_errno()

    async def mmap(
        self,
        ino: Ino,
        pages: int,
        prot: int = BOTH,
        flags: int = MAP_SHARED,
        page: int = 0,
        address: int = 0,
        mode: int = os.O_RDWR,
    ) -> int:
        """Map pages of a file; return the address or -errno."""
        call = NotifiedCall(
            1, os.getpid(), Nr.MMAP, (address, pages * PAGE_SIZE, prot, flags, 3, page * PAGE_SIZE)
        )
        file = OpenFile(ino, mode)
        if error := self._host.calls.check_mmap(call, file):
            return -error
        answer = await self._host.calls.mmap(call, file, self.space)
        return -answer.error if answer.error else answer.value

    async def load(self, address: int, length: int = 1) -> bytes | None:
        """Load bytes; None if the access fails (EFAULT: in user mode it would be SIGBUS)."""

        def work() -> bytes | None:
            assert length <= _PIPE
            if libc.write(self.pipe[1], address, length) < 0:
                assert ctypes.get_errno() == errno.EFAULT, os.strerror(ctypes.get_errno())
                return None
            return os.read(self.pipe[0], length)

        return await trio.to_thread.run_sync(work, abandon_on_cancel=True)

    async def store(self, address: int, data: bytes) -> bool:
        """Store bytes; return False if the access fails."""

        def work() -> bool:
            os.write(self.pipe[1], data)
            done = libc.read(self.pipe[0], address, len(data))
            if done < 0:
                assert ctypes.get_errno() == errno.EFAULT, os.strerror(ctypes.get_errno())
                os.read(self.pipe[0], len(data))
            return bool(done == len(data))

        return await trio.to_thread.run_sync(work, abandon_on_cancel=True)

    async def letters(self, address: int, pages: int) -> str:
        """Return the first letter of each page: "." for a zero, "!" for an access that fails."""
        found = [await self.load(address + index * PAGE_SIZE) for index in range(pages)]
        return "".join("!" if each is None else "." if each == b"\0" else each.decode() for each in found)


class Host:
    """The supervisor's part: mappings of one core, and the address spaces."""

    def __init__(self, core: Core, nursery: trio.Nursery) -> None:
        self.core = core
        self.fs = core.fs
        self.unexpected: list[Event] = []
        unexpected = Unexpected(self.unexpected.append)
        self._media = os.open(core.path / "media", os.O_RDWR)
        self._void = os.memfd_create("void")
        self._nursery = nursery
        self.accesses: list[Access] = []
        self.answers: list[Answer] = []
        self._null = os.open(os.devnull, os.O_RDWR)
        parts = SimpleNamespace(
            fs=core.fs,
            pmem=core.pmem,
            nursery=nursery,
            unexpected=unexpected,
            session=SimpleNamespace(fd=self._null),
            open_files=OpenFiles(),
            tracer=NoTracer(),
        )
        self.mappings = DirectMappings(cast(MountParts, parts))
        self.calls = self.mappings.calls(self._hardware_error)
        self.mappings.connect(Upcalls(self._on_access, self._revoke_latent, self._remember))
        self.injected: list[tuple[Ino, int, int]] = []
        self._slices = iter(zone.SLICES)
        self.processes: list[Process] = []

    def process(self) -> Process:
        """Make an address space without mappings."""
        part = next(self._slices)
        half = part.start + (part.stop - part.start) // 2
        uffd = userfaultfd.create()
        uffd.enable()
        space = Space(
            OwnAgent(self._media, self._void),
            uffd,
            Range(part.start, half),
            Range(half, part.stop),
        )
        self.mappings.table.add_space(space)
        self._nursery.start_soon(self._serve, space)
        self.processes.append(Process(self, space))
        return self.processes[-1]

    async def _serve(self, space: Space) -> None:
        while not space.is_gone:
            try:
                await trio.lowlevel.wait_readable(space.uffd.fd)
            except trio.ClosedResourceError:
                return
            for event in space.uffd.read():
                if isinstance(event, PageFault):
                    self.mappings.faults.take(space, event)

    async def write(self, ino: Ino, offset: int, data: bytes) -> None:
        """write(2): returns once every mapping shows the bytes."""
        self.fs.write(ino, offset, data)
        await self.mappings.settled(ino)

    async def truncate(self, ino: Ino, size: int) -> None:
        """truncate(2)."""
        self.fs.set_size(ino, size)
        await self.mappings.settled(ino)

    async def fallocate(self, ino: Ino, mode: int, offset: int, length: int) -> None:
        """fallocate(2)."""
        self.fs.fallocate(ino, mode, offset, length)
        await self.mappings.settled(ino)

    async def clone(self, source: Ino, target: Ino) -> None:
        """FICLONE."""
        whole = Range(0, 1 << 40)
        async with self.mappings.sharing(source, whole, target, whole):
            self.fs.remap_file_range(source, 0, target, 0, 0)

    def inode(self, ino: Ino) -> Inode:
        return self.fs.names.get(ino)

    async def _on_access(self, access: Access) -> Answer:
        self.accesses.append(access)
        return self.answers.pop(0) if self.answers else Answer.ERROR

    async def _revoke_latent(self, incident: object, *, has_mutex: bool = False) -> None:
        raise AssertionError("no latent poison here")

    async def _remember(self, incident: object) -> None:
        raise AssertionError("nothing to remember here")

    async def _hardware_error(
        self, tid: int, address: int, ino: Ino, offset: int, length: int, *, soft: bool, simulated: bool
    ) -> int:
        self.injected.append((ino, offset, length))
        return 0

    async def close(self) -> None:
        """Unmap everything."""
        await self.mappings.stop()
        for process in self.processes:
            for area in list(process.space.areas.values()):
                await process.call(Nr.MUNMAP, area.addresses.start, area.addresses.length)
        assert self.unexpected == []

    def end(self) -> None:
        """Close every descriptor. Threads that still wait for a page go on."""
        for process in self.processes:
            trio.lowlevel.notify_closing(process.space.uffd.fd)
            process.space.uffd.close()
            self.mappings.table.drop_space(process.space)
            os.close(process.pipe[0])
            os.close(process.pipe[1])
        for fd in (self._media, self._void, self._null):
            os.close(fd)


@asynccontextmanager
async def host_of(core: Core, seconds: float = 20) -> AsyncIterator[Host]:
    """Serve direct mappings of a core during the context. A test that takes longer than ``seconds`` fails."""
    async with trio.open_nursery() as nursery:
        host = Host(core, nursery)
        try:
            with trio.fail_after(seconds):
                await host.mappings.start()
                yield host
                await host.close()
        finally:
            host.end()
            nursery.cancel_scope.cancel()


class HostInThread:
    """A Host whose event loop has a thread of its own, for a test without an event loop.

    Until :meth:`close`, every use of the core is a call of :meth:`do` or :meth:`now`: the core belongs to one
    thread.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._is_ready = threading.Event()
        self._is_over = trio.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        assert self._is_ready.wait(LIMIT), "the event loop did not start"

    def _serve(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:  # noqa: BLE001 - close() raises it
            self._error = error
        finally:
            self._is_ready.set()

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with host_of(self._core, math.inf) as self.host:
            self._is_ready.set()
            await self._is_over.wait()

    def do(self, call: Callable[..., Awaitable[T]], *args: object) -> T:
        """Return what an async function returns in the event loop."""

        async def in_time() -> T:
            try:
                with trio.fail_after(LIMIT):
                    return await call(*args)
            except trio.TooSlowError as error:
                held = list(self.host.mappings.describe_held())
                raise AssertionError(f"{call} did not return in {LIMIT} s: {held}") from error

        return trio.from_thread.run(in_time, trio_token=self._token)

    def now(self, call: Callable[..., T], *args: object) -> T:
        """Return what a function returns in the event loop."""
        return trio.from_thread.run_sync(call, *args, trio_token=self._token)

    def close(self) -> None:
        """End the event loop. Raises the error that ended it before."""
        with suppress(trio.RunFinishedError):
            self.now(self._is_over.set)
        self._thread.join(LIMIT)
        assert not self._thread.is_alive(), "the event loop did not end"
        if self._error is not None:
            raise self._error
