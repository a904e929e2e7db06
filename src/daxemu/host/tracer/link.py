"""Supervisor's end of the tracer: exact SIGBUS into unmodified processes, while the event loop never waits.

Counterpart in Linux: the view that callers have of kill_proc() in mm/memory-failure.c. ``tracer.process`` and
its parts define which signals are possible, and how. This module has the tracer process, its socket, and the
tasks that wait for a report.

States: no tracer process (at first, and after a tracer died) -> running. The next request starts a process.
When a tracer dies, the kernel lets its tracees go, and every open request gets ``Refused``.

Invariants:
- every request gets an id of its own, never used again, and exactly one outcome; ``on_report`` is called for
  each, whether or not a task waits;
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
from daxemu.host.proc import progress
from daxemu.host.proc.file_pages import FilePage
from daxemu.host.tracer.messages import (
    MAX_MESSAGE,
    MAX_PACKET,
    MOST_IN_PACKET,
    ArmAR,
    ArmedAck,
    Asleep,
    ForceAR,
    Gone,
    Hold,
    LetGo,
    MakeAgent,
    Outcome,
    Postponed,
    Refused,
    Report,
    Request,
    SendAO,
    TraceFork,
)
from daxemu.uapi import PAGE_SHIFT

log = logging.getLogger(__name__)

_DIED = "the tracer died"
_CLOSED = "the tracer was told to stop"
_SILENT = "the tracer did not answer in time"
_EXIT_PATIENCE = 5.0  # seconds for the tracer to let its threads go, when the link closes
_IDLE = 0.25  # seconds without a report: the tracer has no work that it can do
_GATHER = 0.1  # seconds from the first output of the tracer on stderr to the message in supervisor.log
_PIPE = 1 << 16  # bytes that a pipe holds
_LONGEST_QUEUE = 30.0  # seconds to wait for a request that others precede


class Pending:
    """Request without an outcome yet. No limit in time: its thread may be stopped or asleep in the kernel."""

    def __init__(self, id_: int, tid: int) -> None:
        self.id = id_
        self.tid = tid
        self.outcome: Outcome | None = None
        self.is_asleep = False
        """True if the request waits for its thread, which is stopped or asleep in the kernel."""
        self.limit: int | None = None
        """Number of stuck victims that have a tracer thread, if this victim has none because of the limit."""
        self._done = trio.Event()

    async def wait(self, timeout: float = math.inf) -> Outcome | None:  # noqa: ASYNC109
        """Return the outcome; None after ``timeout`` seconds without one. The request stays open, and the
        caller may wait again.
        """
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
    """Held thread whose next BUS_ADRERR becomes BUS_MCEERR_AR, or to which a BUS_MCEERR_AR is forced on the
    way to user mode.

    Outcome: ``Delivered``, ``NotTaken``, ``Gone`` or, if the tracer dies, ``Refused``. When one signal
    settles several requests of a thread, their ``Delivered`` have one ``serial``.
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
    """Process of a tracer, with its socket and open requests."""

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
        """Start the tracer; at the end let all threads go and stop the tracer.

        ``on_report`` is called in the trio thread with every outcome, in order. ``abort`` is the file that
        cuts the mount's connection: the tracer writes to ``abort`` if the supervisor is killed and lingers.
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
        """Process id of the tracer; None while no tracer runs."""
        return self._session.process.pid if self._session is not None and self._session.is_alive else None

    def describe_waiting(self) -> Iterator[str]:
        """Return the requests to the tracer without an outcome yet, for people."""
        waiting = self._session.waiting.values() if self._session is not None else ()
        for pending in waiting:
            yield f"{type(pending).__name__.lower()}: request {pending.id}, thread {pending.tid}"

    async def arm(
        self,
        tid: int,
        timeout: float = 1.0,  # noqa: ASYNC109
        page: FilePage | None = None,
        patience: float = math.inf,
    ) -> Armed | Refused | Gone:
        """Hold thread ``tid``, which is about to consume poison: force_sig_mceerr(BUS_MCEERR_AR).

        Once ``Armed``, fail the thread's page fault: the kernel then forces SIGBUS/BUS_ADRERR, whatever the
        thread's mask and handler, and the thread receives BUS_MCEERR_AR with the same address and lsb 12. The
        thread is let go unchanged, with ``NotTaken``, if no BUS_ADRERR comes within ``timeout`` seconds (the
        fault was interrupted, or a system call took the fault), or only a BUS_ADRERR for a page other than
        ``page``. ``patience``: see ``_answered``.
        """
        session = await self._running()
        armed = Armed(next(self._ids), tid)
        self._submit(session, ArmAR(armed.id, tid, timeout, page), armed)
        return await self._answered(armed, patience)

    async def force_ar(
        self,
        tgid: int,
        tid: int,
        addr: int,
        lsb: int = PAGE_SHIFT,
        *,
        fault: tuple[int, int, int] | None = None,
        patience: float = math.inf,
    ) -> Armed | Refused | Gone:
        """Signal thread ``tid``, which consumed poison in a system call, or in the page fault ``fault``
        (processes.place_of_fault()): force_sig_mceerr(BUS_MCEERR_AR).

        Once ``Armed``, the call may end: the signal arrives at the return of the call, before any instruction
        of the program. A thread that blocks or ignores SIGBUS dies of the signal. ``fault``: the page fault
        that the thread leaves for the signal, see ForceAR. ``patience``: see ``_answered``.
        """
        session = await self._running()
        armed = Armed(next(self._ids), tid)
        self._submit(session, ForceAR(armed.id, tgid, tid, addr, lsb, fault), armed)
        return await self._answered(armed, patience)

    async def hold(self, tgid: int, tid: int, patience: float = math.inf) -> Armed | Refused | Gone:
        """Stop thread ``tid``, which is in a system call, when the call returns. ``Armed`` leads to ``Held``,
        ``Gone`` or ``Refused``. A ``Held`` thread sleeps until :meth:`let_go`. ``patience``: see
        ``_answered``.
        """
        session = await self._running()
        armed = Armed(next(self._ids), tid)
        self._submit(session, Hold(armed.id, tgid, tid), armed)
        return await self._answered(armed, patience)

    async def let_go(
        self, tid: int, discard: Sequence[tuple[int, FilePage, int]], number: int, error: int
    ) -> Outcome | None:
        """Let a ``Held`` thread run, without its private copies of the pages at ``discard`` (address, page of
        the file, bytes). If system call ``number`` succeeded, the result becomes ``-error``; 0 leaves the
        result. Return ``Resumed``, ``Gone`` or ``Refused``.
        """
        session = await self._running()
        pending = Pending(next(self._ids), tid)
        areas, pages = [(at, length) for at, _, length in discard], [page for _, page, _ in discard]
        self._submit(session, LetGo(pending.id, tid, areas, pages, number, error), pending)
        return await pending.wait()

    async def send_ao(
        self, tgid: int, tid: int, addr: int, lsb: int = PAGE_SHIFT, page: FilePage | None = None
    ) -> Pending:
        """Signal thread ``tid`` of process ``tgid``, which maps poison: send_sig_mceerr(BUS_MCEERR_AO).

        ``addr`` is the virtual address in the process, ``lsb`` the binary logarithm of the lost range in
        bytes. Several signals to one thread arrive one after another, in the order of the calls, none lost.
        Outcome: ``Delivered`` (pending if the thread blocks SIGBUS), ``Ignored``, ``Refused`` or ``Gone``; no
        outcome as long as the process is stopped. ``page``: the page mapped at ``addr``, see SendAO.
        """
        session = await self._running()
        pending = Pending(next(self._ids), tid)
        self._submit(session, SendAO(pending.id, tgid, tid, addr, lsb, page), pending)
        return pending

    async def make_agent(self, request: MakeAgent | TraceFork) -> Armed | Refused | Gone:
        """Hold the thread of ``request``, whose id is replaced, to make an agent: see MakeAgent and
        TraceFork.

        Once ``Armed``, answer the thread's system call with -ERESTARTNOINTR. Outcome: ``AgentMade``,
        ``Refused``, ``Gone``, or ``NotTaken`` for a fork without a child.
        """
        session = await self._running()
        armed = Armed(next(self._ids), request.tid)
        self._submit(session, msgspec.structs.replace(request, id=armed.id), armed)
        return await armed._answer()

    def _submit(self, session: _Session, request: Request, pending: Pending) -> None:
        session.waiting[pending.id] = pending
        if session.is_alive:
            session.outgoing.send_nowait(request)
        else:
            self._finish(session, Refused(pending.id, _DIED))

    async def _running(self) -> _Session:
        if self._session is not None and self._session.is_alive:
            return self._session  # without a checkpoint: requests sent in a row go in one packet
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
            except ConnectionResetError:  # the tracer died with requests unread
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
        """Return the outcome of a request. Return None without an outcome ``patience`` seconds after
        ``since``, if the tracer has been idle lately or knows that the thread is asleep. The caller may ask
        again.

        A tracer, or a thread, that wants to run and gets no processor is not idle: see ``progress``.
        """
        deadline, limit = since + patience, since + _LONGEST_QUEUE
        ran: int | None = None
        while (outcome := await pending.wait(max(0.0, deadline - trio.current_time()))) is None:
            now = trio.current_time()
            is_first, is_starved = ran is None, progress.starves(pending.tid, ran)
            ran = progress.runtime(pending.tid)
            may_go_on = is_starved or (is_first and ran is not None) or self._has_work()
            if pending.is_asleep or now >= limit or (now >= self._heard_at + _IDLE and not may_go_on):
                return None
            deadline = min(limit, now + _IDLE)
        return outcome

    async def _answered(self, armed: Armed, patience: float) -> Armed | Refused | Gone:
        """Return the answer to a request. Return Refused without an answer after ``patience`` seconds, or
        later while the tracer is runnable: the tracer may have begun a moment ago, or get no processor.
        """
        since = trio.current_time()
        deadline, limit = since + patience, since + max(patience, _LONGEST_QUEUE)
        while True:
            with trio.move_on_at(deadline):
                return await armed._answer()
            now = trio.current_time()
            if now >= limit or not self._has_work():
                return Refused(armed.id, _SILENT)
            deadline = min(limit, now + _IDLE)

    def _has_work(self) -> bool:
        """Return True if the tracer is runnable."""
        return (tracer := self.pid) is not None and progress.runtime(tracer) is not None

    def _finish(self, session: _Session, outcome: Outcome) -> None:
        self._heard_at = trio.current_time()
        session.waiting.pop(outcome.id)._finish(outcome)
        if self._on_report is not None:
            self._on_report(outcome)


async def _write(session: _Session) -> None:
    encoder = msgspec.json.Encoder()
    async for request in session.queue:
        encoded = [encoder.encode(request)]
        size = len(encoded[0])
        with suppress(trio.WouldBlock):
            # Requests to make an agent are ten times as long as the others: 60 fill a packet.
            while len(encoded) < MOST_IN_PACKET and size < MAX_PACKET - MAX_MESSAGE:
                encoded.append(encoder.encode(session.queue.receive_nowait()))
                size += len(encoded[-1]) + 1
        try:
            await session.sock.send(b"[" + b",".join(encoded) + b"]")
        except (BrokenPipeError, ConnectionResetError):  # the reader sees the end, and settles all requests
            return


async def _relay(stderr: int) -> None:
    """Log stderr of the tracer. A pipe is used because supervisor.log may have been rotated since the tracer
    began. A full pipe drops data, so that the tracer never waits for the supervisor.
    """
    while True:
        await trio.lowlevel.wait_readable(stderr)
        await trio.sleep(_GATHER)  # a traceback arrives line by line
        if not _log_said(stderr):
            await trio.sleep_forever()  # end of the tracer: the socket reports the same


def _log_said(stderr: int) -> bool:
    """Log the content of the pipe as one message. Return False at the end of the pipe."""
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
    """Wait a limited time for the tracer, which ends by itself once its socket is closed; then kill the
    tracer.
    """
    with trio.CancelScope(shield=True):
        with trio.move_on_after(_EXIT_PATIENCE):
            await process.wait()
        if process.returncode is None:
            process.kill()
            await process.wait()
