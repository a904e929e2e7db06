"""Tracers beside the main one: a thread of the tracer process for each victim whose PTRACE_SEIZE may sleep.

ptrace(2) sleeps in the kernel for a stopped victim in a frozen cgroup of version 1, and for a victim in
execve(2). A thread of its own for such a victim leaves the other victims to the main thread. At most
``LIMIT`` victims have a thread. A request for any further victim is postponed, with a report to the
supervisor (``Postponed``): once a second the main thread checks whether the victim can be seized without a
sleep, or whether a thread has ended.

All methods belong to the main thread of the tracer, except ``Beside._run``. Times are seconds of
time.monotonic().
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import msgspec

from daxemu.host.tracer import ptrace
from daxemu.host.tracer.messages import (
    MAX_PACKET,
    ArmedAck,
    Asleep,
    Postponed,
    Refused,
    Report,
    Request,
    SendAO,
)

LIMIT = 32
"""Victims with a tracer of their own at the same time."""

_PATIENCE = 1.0  # seconds for a request before it is reported as Asleep
_REQUESTS = msgspec.json.Encoder()
_REPORTS = msgspec.json.Decoder(list[Report])


class Serving(Protocol):
    """A tracer for one thread: ``tracer.Tracer``."""

    @property
    def is_idle(self) -> bool:
        """Return True if no thread is held."""

    def run(self) -> None:
        """Serve until the socket's other end closes."""


Start = Callable[[socket.socket, int], Serving]
"""Make a tracer that serves a socket; the descriptor wakes the tracer up when a tracee stops."""


class Beside:
    """HeldThread with a tracer of its own, for one victim."""

    def __init__(self, start: Start) -> None:
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        for end in (self.sock, theirs):
            end.setblocking(False)
        wakeup, self._bell = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._tracer = start(theirs, wakeup)
        self._open: dict[int, float] = {}
        """Arrival time of each request without an outcome; infinity once reported as Asleep."""
        self.thread = threading.Thread(target=self._run, args=(theirs, wakeup), daemon=True)
        self.thread.start()

    def _run(self, theirs: socket.socket, wakeup: int) -> None:
        try:
            with theirs:
                self._tracer.run()
        finally:
            os.close(wakeup)

    @property
    def is_done(self) -> bool:
        """Return True if every request has its outcome and the victim is detached."""
        return not self._open and (self._tracer.is_idle or not self.thread.is_alive())

    def send(self, request: Request) -> None:
        """Send a request to the tracer beside."""
        self._open[request.id] = time.monotonic()
        self.sock.send(_REQUESTS.encode([request]))

    def ring(self) -> None:
        """Wake the tracer beside: a tracee has stopped, perhaps the victim."""
        with contextlib.suppress(BlockingIOError, BrokenPipeError):
            os.write(self._bell, b"\0")

    def receive(self) -> list[Report]:
        """Return the reports that have arrived. Never blocks."""
        reports: list[Report] = []
        with contextlib.suppress(BlockingIOError, ConnectionResetError):
            while packet := self.sock.recv(MAX_PACKET):
                reports += _REPORTS.decode(packet)
        if not self.thread.is_alive():
            reports += (Refused(id_, "the tracer's thread ended") for id_ in self._open)
        for report in reports:
            if not isinstance(report, ArmedAck | Asleep):
                self._open.pop(report.id, None)
        return reports

    def asleep(self, now: float) -> list[Asleep]:
        """Return an Asleep for each request without an outcome after ``_PATIENCE``, once a request."""
        late = [id_ for id_, since in self._open.items() if now - since >= _PATIENCE]
        self._open.update((id_, math.inf) for id_ in late)
        return [Asleep(id_) for id_ in late]

    def close(self) -> None:
        """Let the victim go, and end."""
        self.sock.close()
        if self._bell >= 0:
            self.ring()
            os.close(self._bell)
            self._bell = -1


class Besides:
    """The tracers beside, at most ``LIMIT``, and the requests that are postponed because of the limit."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._by_tid: dict[int, Beside] = {}
        self._postponed: dict[int, list[Request]] = {}
        """Requests by thread, the longest postponed thread first."""

    def __contains__(self, tid: int) -> bool:
        return tid in self._by_tid or tid in self._postponed

    def __bool__(self) -> bool:
        return bool(self._by_tid or self._postponed)

    @property
    def are_alive(self) -> bool:
        """Return True if any thread runs or sleeps in the kernel."""
        return any(beside.thread.is_alive() for beside in self._by_tid.values())

    def takes(self, request: Request, *, is_held: bool) -> list[Report] | None:
        """Take a request for a victim that must not be seized by the main thread. Return the reports to send
        at once; None if the main thread must serve the request. ``is_held``: the main thread has seized the
        victim.
        """
        tid = request.tid
        if (beside := self._by_tid.get(tid)) is not None:
            beside.send(request)
            return []
        if (waiting := self._postponed.get(tid)) is None:
            if is_held or not isinstance(request, SendAO) or not ptrace.may_sleep(tid):
                return None
            if len(self._by_tid) < LIMIT:
                self._begin(tid, [request])
                return []
            waiting = self._postponed[tid] = []
        waiting.append(request)
        return [Postponed(request.id, LIMIT)]

    def _begin(self, tid: int, requests: list[Request]) -> None:
        beside = self._by_tid[tid] = Beside(self._start)
        for request in requests:
            beside.send(request)

    def tick(self, now: float) -> tuple[list[Report], list[Request]]:
        """Return the reports to send, and the postponed requests that the main thread may serve by now."""
        reports: list[Report] = [late for beside in self._by_tid.values() for late in beside.asleep(now)]
        ready: list[Request] = []
        for tid in list(self._postponed):
            if not ptrace.may_sleep(tid):
                ready += self._postponed.pop(tid)
            elif len(self._by_tid) < LIMIT:
                self._begin(tid, self._postponed.pop(tid))
        return reports, ready

    def register(self, poller: select.poll) -> None:
        """Have ``poller`` wake up for reports."""
        for beside in self._by_tid.values():
            poller.register(beside.sock, select.POLLIN)

    def ring(self) -> None:
        """Wake all: a tracee of any of them has stopped."""
        for beside in self._by_tid.values():
            beside.ring()

    def receive(self, poller: select.poll) -> Iterator[Report]:
        """Yield the reports that have arrived, and close each tracer without anything to do."""
        for tid, beside in list(self._by_tid.items()):
            yield from beside.receive()
            if beside.is_done:
                poller.unregister(beside.sock)
                beside.close()
                del self._by_tid[tid]

    def close(self) -> None:
        """Have every victim let go."""
        for beside in self._by_tid.values():
            beside.close()
