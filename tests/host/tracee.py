"""Driver of tests/victims/tracee.c: the tracer's signals as an unmodified program sees them, to the byte.

A file on /dev/shm that is mapped and then truncated gives real SIGBUS/BUS_ADRERR on touch, so AR needs no
FUSE here.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from daxemu.host.proc import status
from daxemu.host.proc.status import ThreadStatus
from daxemu.host.tracer.link import Armed, TracerLink
from daxemu.host.tracer.messages import Delivered
from daxemu.uapi import BUS_MCEERR_AO, BUS_MCEERR_AR
from tests.support.actor import compile_victim


async def until(condition: Callable[[], bool]) -> None:
    """Poll for a condition without a kernel event."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.001)


class Tracee:
    """A running tracee."""

    def __init__(self, process: trio.Process, file: Path) -> None:
        self.process = process
        self.file = file
        self.map = 0
        self._rest = b""

    @property
    def pid(self) -> int:
        return self.process.pid

    async def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        await self.process.stdin.send_all(command.encode() + b"\n")

    async def line(self) -> str:
        assert self.process.stdout is not None
        while b"\n" not in self._rest:
            chunk = await self.process.stdout.receive_some()
            assert chunk, f"the tracee ended: {self._rest!r}"
            self._rest += chunk
        line, self._rest = self._rest.split(b"\n", 1)
        return line.decode()

    async def ask(self, command: str) -> str:
        await self.tell(command)
        return await self.line()

    async def asleep_in(self, *calls: int) -> None:
        """Wait until the main thread sleeps in one of these system calls; no event reports the sleep."""
        await until(lambda: syscall_of(self.pid) in calls)

    async def free(self, tid: int = 0) -> None:
        """Wait until the process is not traced: detaching follows the report of a delivery by an instant."""
        await until(lambda: status_of(tid or self.pid).tracer == 0)


def syscall_of(tid: int) -> int:
    word = Path(f"/proc/{tid}/syscall").read_text().split()[0]
    return int(word) if word.isdigit() else -1


def status_of(tid: int) -> ThreadStatus:
    return status.read(tid)


Start = Callable[[], Awaitable[Tracee]]


@asynccontextmanager
async def tracees() -> AsyncIterator[Start]:
    """Function that starts tracees; all tracees end with the test."""
    program = compile_victim("tracee")
    running: list[Tracee] = []

    async def start() -> Tracee:
        file = Path(f"/dev/shm/daxemu-test-{os.getpid()}-{len(running)}")
        await trio.Path(file).write_bytes(bytes(1 << 20))
        process = await trio.lowlevel.open_process(
            [program, file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        tracee = Tracee(process, file)
        running.append(tracee)
        tracee.map = int((await tracee.line()).split()[1], 16)
        return tracee

    try:
        yield start
    finally:
        with trio.CancelScope(shield=True):
            for tracee in running:
                tracee.process.kill()
                await tracee.process.wait()
                tracee.file.unlink(missing_ok=True)


def scenario(play: Callable[[TracerLink, Start], Awaitable[None]]) -> None:
    """Run one scenario with a tracer, under a limit that only a hang reaches."""

    async def main() -> None:
        with trio.fail_after(60):
            async with tracees() as start, TracerLink.open() as link:
                await play(link, start)

    trio.run(main)


async def deliver(link: TracerLink, tracee: Tracee, addr: int, lsb: int = 12, tid: int = 0) -> None:
    """Run one AO from the request to the report; the caller asks the tracee about the signal."""
    pending = await link.send_ao(tracee.pid, tid or tracee.pid, addr, lsb)
    assert await pending.wait(30) == Delivered(pending.id, tid or tracee.pid, BUS_MCEERR_AO, addr, pending.id)


async def consume(link: TracerLink, tracee: Tracee, offset: int) -> None:
    """Run one AR, from the request to the signal in the tracee. The file must be truncated."""
    armed = await link.arm(tracee.pid, 30)
    assert isinstance(armed, Armed)
    addr = tracee.map + offset
    assert await tracee.ask(f"touch {offset}") == f"BUS 4 {addr:x} 12 {tracee.pid}"
    assert await armed.wait(30) == Delivered(armed.id, tracee.pid, BUS_MCEERR_AR, addr, armed.id)
