"""The supervisor's end of the tracer: exact SIGBUS into unmodified processes, and the event loop never waits.

Counterpart in Linux: the callers' view of kill_proc() in mm/memory-failure.c. What can be told to a thread,
and how, is in ``tracer`` and its parts; here are its process, its socket and who waits for which report.

States: no tracer process (at first, and after it died) -> running. A process is started by the next request.
When one dies, the kernel lets its tracees go, and every request it had gets ``Refused``.

Invariants:
- every request gets an id of its own, never used again, and exactly one outcome; ``on_report`` is called for
  each, whether or not somebody waits;
- sending never waits for the tracer: packets queue here without bound, and reading goes on meanwhile;
- all methods belong to the trio thread that opened the link.
"""

from __future__ import annotations

import itertools
import logging
import math
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import msgspec
import trio

import daxemu
from daxemu.host.proc.file_pages import FilePage
from daxemu.host.tracer.messages import (
    MAX_PACKET,
    MOST_IN_PACKET,
    ArmAR,
    ArmedAck,
    Asleep,
    ForceAR,
    Gone,
    Hold,
    LetGo,
    Outcome,
    Postponed,
    Refused,
    Report,
    Request,
    SendAO,
)
from daxemu.uapi import PAGE_SHIFT

log = logging.getLogger(__name__)

_DIED = "the tracer died"
_CLOSED = "the tracer was told to stop"
_EXIT_PATIENCE = 5.0  # seconds for the tracer to let its threads go, when the link closes
_IDLE = 0.25  # seconds without a report: it has nothing to do that it can do
_GATHER = 0.1  # seconds from the first words of the tracer on stderr to the message in our log
_PIPE = 1 << 16  # bytes that a pipe holds
_LONGEST_QUEUE = 30.0  # seconds that a request is waited for because others come before it


class Pending:
    """A request on its way; for any length of time, if its thread is stopped or asleep in the kernel."""

    def __init__(self, id_: int, tid: int) -> None:
        self.id = id_
        self.tid = tid
        self.outcome: Outcome | None = None
        self.is_asleep = False
        """Whether the request waits for its thread, which is stopped or asleep in the kernel."""
        self.limit: int | None = None
        """Stuck victims at most that the tracer waits for at the same time, if this one is beyond that."""
        self._done = trio.Event()

    async def wait(self, timeout: float = math.inf) -> Outcome | None:  # noqa: ASYNC109
        """What came of it; None if nothing did within ``timeout`` seconds: it goes on, one may wait again."""
        if self.outcome is None:
            with trio.move_on_after(timeout):
                await self._done.wait()
        return self.outcome

    def _acknowledge(self) -> None:
        """Only arms care."""

    def _finish(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self._done.set()


class Armed(Pending):
    """A held thread whose next BUS_ADRERR becomes BUS_MCEERR_AR, or which gets one on its way to user mode.

    Comes to ``Delivered``, ``NotTaken``, ``Gone`` or, if the tracer dies, ``Refused``. When several of
    one thread come to the same signal, their ``Delivered`` have one ``serial``.
    """

    def __init__(self, id_: int, tid: int) -> None:
        super().__init__(id_, tid)
        self._answered = trio.Event()
        self._is_held = False

    async def _answer(self) -> Armed | Refused | Gone:
        await self._answered.wait()
        if not self._is_held and isinstance(self.outcome, Refused | Gone):
            return self.outcome
        return self

    def _acknowledge(self) -> None:
        self._is_held = True
        self._answered.set()

    def _finish(self, outcome: Outcome) -> None:
        super()._finish(outcome)
        self._answered.set()


class _Session:
    """One tracer process."""

    def __init__(self, process: trio.Process, sock: trio.socket.SocketType, stderr: int) -> None:
        self.process = process
        self.sock = sock
        self.stderr = stderr
        self.is_alive = True
        self.waiting: dict[int, Pending] = {}
        self.outgoing, self.queue = trio.open_memory_channel[Request](math.inf)


class TracerLink:
    """A tracer, for one supervisor. Open with ``async with TracerLink.open() as link``."""

    def __init__(
        self, nursery: trio.Nursery, on_report: Callable[[Outcome], None] | None, abort: Path | None
    ) -> None:
        self._nursery = nursery
        self._abort = abort
        self._on_report = on_report
        self._ids = itertools.count(1)
        self._heard_at = -math.inf
        self._session: _Session | None = None
        self._starting = trio.Lock()

    @classmethod
    @asynccontextmanager
    async def open(
        cls, on_report: Callable[[Outcome], None] | None = None, *, abort: Path | None = None
    ) -> AsyncIterator[TracerLink]:
        """Start the tracer; at the end let all threads go and stop it.

        ``on_report`` is called in the trio thread with every outcome, in their order. ``abort`` is
        the file that cuts the mount's connection: the tracer writes to it should we be killed and linger.
        """
        async with trio.open_nursery() as nursery:
            link = cls(nursery, on_report, abort)
            await link._running()
            try:
                yield link
            finally:
                nursery.cancel_scope.cancel()

    @property
    def pid(self) -> int | None:
        """The tracer's process id; None while there is none."""
        return self._session.process.pid if self._session is not None and self._session.is_alive else None

    def describe_waiting(self) -> Iterator[str]:
        """The requests to the tracer without an outcome yet, for people."""
        waiting = self._session.waiting.values() if self._session is not None else ()
        for pending in waiting:
            yield f"{type(pending).__name__.lower()}: request {pending.id}, thread {pending.tid}"

    async def arm(
        self,
        tid: int,
        timeout: float = 1.0,  # noqa: ASYNC109
        page: FilePage | None = None,
    ) -> Armed | Refused | Gone:
        """Hold thread ``tid``, which is about to consume poison: force_sig_mceerr(BUS_MCEERR_AR).

        Once ``Armed``, fail its page fault: the SIGBUS/BUS_ADRERR that the kernel then forces, whatever the
        thread's mask and handler, reaches it as BUS_MCEERR_AR with the same address and lsb 12. If none comes
        within ``timeout`` seconds (it was interrupted, or a system call took the fault), or only one that is
        not for ``page``, the thread is let go untouched: ``NotTaken``.
        """
        session = await self._running()
        armed = Armed(next(self._ids), tid)
        self._submit(session, ArmAR(armed.id, tid, timeout, page), armed)
        return await armed._answer()

    async def force_ar(self, tgid: int, tid: int, addr: int, lsb: int = PAGE_SHIFT) -> Armed | Refused | Gone:
        """Tell thread ``tid``, which is in a system call, of its poison: force_sig_mceerr(BUS_MCEERR_AR).

        Once ``Armed``, the call may end: the signal comes at its return, before any instruction of the
        program. A thread that blocks or ignores SIGBUS dies of it.
        """
        session = await self._running()
        armed = Armed(next(self._ids), tid)
        self._submit(session, ForceAR(armed.id, tgid, tid, addr, lsb), armed)
        return await armed._answer()

    async def hold(self, tgid: int, tid: int) -> Armed | Refused | Gone:
        """Have thread ``tid``, which is in a system call, stop at its return. ``Armed`` comes to ``Held``,
        ``Gone`` or ``Refused``. A ``Held`` thread sleeps until :meth:`let_go`.
        """
        session = await self._running()
        armed = Armed(next(self._ids), tid)
        self._submit(session, Hold(armed.id, tgid, tid), armed)
        return await armed._answer()

    async def let_go(
        self, tid: int, discard: Sequence[tuple[int, FilePage, int]], number: int, error: int
    ) -> Outcome | None:
        """Let a ``Held`` thread run, without its private copies of the pages at ``discard`` (address, page of
        the file, bytes). If system call ``number`` succeeded, its result becomes ``-error``; 0 leaves it.
        Returns ``Resumed``, ``Gone`` or ``Refused``.
        """
        session = await self._running()
        pending = Pending(next(self._ids), tid)
        areas, pages = [(at, length) for at, _, length in discard], [page for _, page, _ in discard]
        self._submit(session, LetGo(pending.id, tid, areas, pages, number, error), pending)
        return await pending.wait()

    async def send_ao(
        self, tgid: int, tid: int, addr: int, lsb: int = PAGE_SHIFT, page: FilePage | None = None
    ) -> Pending:
        """Tell thread ``tid`` of process ``tgid`` of poison it has mapped: send_sig_mceerr(BUS_MCEERR_AO).

        ``addr`` is the virtual address in that process, ``lsb`` the binary logarithm of the lost range in
        bytes. Several for one thread arrive one after another, in this order, none lost. Comes to
        ``Delivered`` (also when the thread blocks SIGBUS: then it is pending), ``Ignored``, ``Refused`` or
        ``Gone``; to nothing as long as the process is stopped. ``page``: what is at ``addr``, see SendAO.
        """
        session = await self._running()
        pending = Pending(next(self._ids), tid)
        self._submit(session, SendAO(pending.id, tgid, tid, addr, lsb, page), pending)
        return pending

    def _submit(self, session: _Session, request: Request, pending: Pending) -> None:
        session.waiting[pending.id] = pending
        if session.is_alive:
            session.outgoing.send_nowait(request)
        else:
            self._finish(session, Refused(pending.id, _DIED))

    async def _running(self) -> _Session:
        if self._session is not None and self._session.is_alive:
            return self._session  # without a checkpoint: what is sent in a row goes in one packet
        async with self._starting:
            session = self._session
            if session is None or not session.is_alive:
                session = self._session = await self._start()
            return session

    async def _start(self) -> _Session:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        sock = trio.socket.from_stdlib_socket(ours)
        said, stderr = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            with theirs:
                session = _Session(await _start_process(theirs.fileno(), stderr, self._abort), sock, said)
        except BaseException:
            sock.close()
            os.close(said)
            raise
        finally:
            os.close(stderr)
        self._nursery.start_soon(self._serve, session)
        return session

    async def _serve(self, session: _Session) -> None:
        reason = _CLOSED
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_write, session)
                nursery.start_soon(_relay, session.stderr)
                await self._read(session)
                reason = _DIED
                nursery.cancel_scope.cancel()
        finally:
            session.is_alive = False
            session.sock.close()
            for id_ in list(session.waiting):
                self._finish(session, Refused(id_, reason))
            await _stop_process(session.process)
            _log_said(session.stderr)
            os.close(session.stderr)

    async def _read(self, session: _Session) -> None:
        decoder = msgspec.json.Decoder(list[Report])
        while True:
            try:
                packet = await session.sock.recv(MAX_PACKET)
            except ConnectionResetError:  # it died with requests unread
                return
            if not packet:
                return
            for report in decoder.decode(packet):
                if isinstance(report, ArmedAck):
                    session.waiting[report.id]._acknowledge()
                elif isinstance(report, Asleep | Postponed):
                    if (pending := session.waiting.get(report.id)) is not None:
                        pending.is_asleep = True
                        pending.limit = report.limit if isinstance(report, Postponed) else None
                else:
                    self._finish(session, report)

    async def settled(self, pending: Pending, since: float, patience: float) -> Outcome | None:
        """What came of a request. None if nothing did within ``patience`` seconds of ``since``, and the
        tracer has been idle lately, or knows the thread to be asleep. One may ask again.
        """
        deadline, limit = since + patience, since + _LONGEST_QUEUE
        while (outcome := await pending.wait(max(0.0, deadline - trio.current_time()))) is None:
            now = trio.current_time()
            if pending.is_asleep or now >= min(limit, self._heard_at + _IDLE):
                return None
            deadline = min(limit, now + _IDLE)
        return outcome

    def _finish(self, session: _Session, outcome: Outcome) -> None:
        self._heard_at = trio.current_time()
        session.waiting.pop(outcome.id)._finish(outcome)
        if self._on_report is not None:
            self._on_report(outcome)


async def _write(session: _Session) -> None:
    encoder = msgspec.json.Encoder()
    async for request in session.queue:
        requests = [request]
        with suppress(trio.WouldBlock):
            while len(requests) < MOST_IN_PACKET:
                requests.append(session.queue.receive_nowait())
        try:
            await session.sock.send(encoder.encode(requests))
        except (BrokenPipeError, ConnectionResetError):  # the reader sees the end too, and tells everyone
            return


async def _relay(stderr: int) -> None:
    """Log what the tracer writes to stderr: supervisor.log may be another file by then than when the tracer
    began. The pipe takes no more than it holds, so that the tracer never waits for us.
    """
    while True:
        await trio.lowlevel.wait_readable(stderr)
        await trio.sleep(_GATHER)  # a traceback comes line by line
        if not _log_said(stderr):
            await trio.sleep_forever()  # its end: the socket tells the same


def _log_said(stderr: int) -> bool:
    """Log as one message what is in the pipe. Return False at the end of the pipe."""
    try:
        said = os.read(stderr, _PIPE)
    except BlockingIOError:
        return True
    if said:
        log.warning("the tracer said:", extra={"details": said.decode(errors="surrogateescape")})
    return bool(said)


async def _start_process(fd: int, stderr: int, abort: Path | None) -> trio.Process:
    # From "/", lest it keep a mount busy; -P, lest modules be taken from there.
    root = str(Path(daxemu.__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    return await trio.lowlevel.open_process(
        [sys.executable, "-P", "-m", "daxemu.host.tracer.process", str(fd), *([str(abort)] if abort else [])],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        pass_fds=[fd],
        start_new_session=True,
        cwd="/",
        env={**os.environ, "PYTHONPATH": path},
    )


async def _stop_process(process: trio.Process) -> None:
    """Its socket is closed, so it ends by itself; but we do not wait for ever."""
    with trio.CancelScope(shield=True):
        with trio.move_on_after(_EXIT_PATIENCE):
            await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
