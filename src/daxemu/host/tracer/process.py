"""Tracer: unmodified processes receive SIGBUS with exactly the siginfo of memory_failure().

Counterpart in Linux: kill_proc() of mm/memory-failure.c, force_sig_mceerr() and send_sig_mceerr() of
kernel/signal.c. Only a ptrace tracer can give another process si_code > 0. ptrace is bound to a thread, so
the tracer is a process: ``python -m daxemu.host.tracer.process FD``. FD is a SOCK_SEQPACKET socket, with the
messages of ``tracer.messages``. The supervisor's side is ``tracer.link``.

Purpose: the event loop, and all I/O (socket, waitpid, ptrace, clock). ``tracer.held_thread.HeldThread``
decides each stop, except in ordinary deliveries, which ``tracer.deliver_in_c`` carries out in C. The process
imports little, because each mount has a tracer.

States: serving; then, when the socket's other end has closed, letting every thread go, for a limited time.

Invariants:
- a thread is held exactly as long as a request for the thread is open; detaching happens only in a stop;
- neither stops nor requests starve the others: at most _BATCH of each per iteration;
- every request gets exactly one final report (``ArmedAck`` is not final), however late.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import secrets
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter, deque

import msgspec

from daxemu.host import victims
from daxemu.host.proc import file_pages
from daxemu.host.proc.status import find as find_status
from daxemu.host.tracer import injection, mourner, ptrace, siginfo
from daxemu.host.tracer.agent_maker import AgentMakers
from daxemu.host.tracer.beside import Besides
from daxemu.host.tracer.deliver_in_c import Deliveries, Taken, reap
from daxemu.host.tracer.held_thread import Discard, HeldThread, Phase, StopVerdict, as_mapped_now
from daxemu.host.tracer.messages import (
    MAX_PACKET,
    MOST_IN_PACKET,
    ArmAR,
    ArmedAck,
    Asleep,
    Delivered,
    ForceAR,
    Gone,
    Hold,
    Ignored,
    LetGo,
    MakeAgent,
    Outcome,
    Refused,
    Report,
    Request,
    Send,
    SendAO,
    TraceFork,
)
from daxemu.host.tracer.ptrace import ResumeStep, Stop, StopKind
from daxemu.host.tracer.siginfo import SIGBUS_BIT

_RETRY = 0.02  # seconds between looks at a pending SIGBUS: no event reports that signalfd(2) took the signal
_RETRY_FORK = 0.001  # seconds between looks at a thread that the supervisor traces: redirect.c
_SWEEP = 1.0  # seconds
_FAREWELL = 2.0  # seconds to let all threads go at the end
_BATCH = 256  # stops, or packets of requests, before the other kind is served
_DECODER = msgspec.json.Decoder(list[Request])
_ENCODER = msgspec.json.Encoder()


class Tracer:
    """I/O around ``HeldThread``: socket, waitpid, ptrace, clock. ``is_beside``: for one victim alone."""

    def __init__(self, sock: socket.socket, wakeup: int, *, is_beside: bool = False) -> None:
        self._is_beside = is_beside
        self._beside = Besides(lambda sock, wakeup: Tracer(sock, wakeup, is_beside=True))
        self._sock = sock
        self._wakeup = wakeup
        self._threads: dict[int, HeldThread] = {}
        self._injections: dict[int, injection.Injection] = {}
        self._outbox: deque[Report] = deque()
        self._makers = AgentMakers(self._outbox)
        self._after_makers: list[Request] = []  # for threads that make agents
        self._again: list[Request] = []  # for threads that the supervisor traces at this moment
        self._cookies = itertools.count(secrets.randbits(62) + 1)
        self._deliveries = None if is_beside or victims.MISSING is not None else Deliveries()
        self._stale_at = math.inf  # when these deliveries become ``Thread`` objects
        self._due = math.inf  # when ``_tick`` must look at all threads
        self._more = False  # more stops may have been reported: come back at once, after a look at the socket
        self._farewell: float | None = None  # set when the socket is closed: stop at that time at the latest

    def run(self) -> None:
        """Serve until the socket's other end closes, then let every thread go."""
        poller = select.poll()
        poller.register(self._wakeup, select.POLLIN)
        while self._farewell is None:
            self._beside.register(poller)
            poller.register(self._sock, select.POLLIN | (select.POLLOUT if self._outbox else 0))
            self._turn(poller)
            self._outbox.extend(self._beside.receive(poller))
            self._receive()
            self._flush()
        poller.unregister(self._sock)
        self._take_all_over()
        for thread in list(self._threads.values()):
            thread.retire()
            self._unpark(thread)
            self._nudge(thread)
        self._beside.close()
        while (self._threads or self._makers or self._beside.are_alive) and time.monotonic() < self._farewell:
            self._turn(poller)

    @property
    def is_idle(self) -> bool:
        """Return True if no thread is held."""
        return not self._threads and not self._makers

    def _turn(self, poller: select.poll) -> None:
        left = 0 if self._more else min(self._due, self._farewell or math.inf) - time.monotonic()
        poller.poll(None if left == math.inf else max(0, math.ceil(left * 1000)))
        with contextlib.suppress(BlockingIOError):  # woken by the socket or the clock, not by SIGCHLD
            os.read(self._wakeup, 4096)
            self._beside.ring()
        self._reap()
        self._tick(time.monotonic())

    def _receive(self) -> None:
        for _ in range(_BATCH):
            try:
                packet = self._sock.recv(MAX_PACKET)
            except BlockingIOError:
                return
            except ConnectionResetError:  # closed with reports unread
                packet = b""
            if not packet:
                self._farewell = time.monotonic() + _FAREWELL
                return
            for request in self._begin(_DECODER.decode(packet)):
                self._on_request(request)

    def _flush(self) -> None:
        """Send as many reports as the socket takes. Never waits: the peer may be waiting for the tracer to
        read.
        """
        while self._outbox:
            packet = list(itertools.islice(self._outbox, MOST_IN_PACKET))
            try:
                self._sock.send(_ENCODER.encode(packet))
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):  # the next recv() sees the end
                self._outbox.clear()
                return
            for _ in packet:
                self._outbox.popleft()

    def _begin(self, requests: list[Request]) -> list[Request]:
        """Begin ordinary deliveries in C; return the other requests, in order."""
        if self._deliveries is None:
            return requests
        times = Counter(request.tid for request in requests)
        begun: list[tuple[SendAO, int]] = []
        left: list[Request] = []
        for request in requests:
            held = (
                request.tid in self._threads or request.tid in self._deliveries or request.tid in self._beside
            )
            may = times[request.tid] == 1 and not held and len(begun) < self._deliveries.room
            if may and isinstance(request, SendAO):
                begun.append((request, next(self._cookies)))
            else:
                left.append(request)
        if begun and not self._deliveries:
            self._stale_at = time.monotonic() + _SWEEP
            self._due = min(self._due, self._stale_at)
        while begun:
            count = self._deliveries.begin(begun)
            left += (request for request, _ in begun[count : count + 1])
            begun = begun[count + 1 :]
        return left

    def _take_over(self, taken: Taken) -> None:
        """Continue, in Python, a delivery whose stop was not the expected one."""
        request = taken.request
        thread = self._threads[request.tid] = HeldThread(request.tid, interrupting=not taken.cookie)
        thread.cookie = taken.cookie
        if taken.cookie:
            thread.send(request)
        else:
            status = find_status(request.tid)
            self._want(thread, request, status is not None and status.tgid == request.tgid)
        self._schedule(thread)

    def _take_all_over(self) -> None:
        for taken in self._deliveries.take_all() if self._deliveries is not None else ():
            self._take_over(taken)
        self._stale_at = math.inf

    def _on_request(self, request: Request) -> None:
        reports = None
        if not self._is_beside:
            reports = self._beside.takes(request, is_held=request.tid in self._threads)
        if reports is not None:
            self._outbox.extend(reports)
            self._due = min(self._due, time.monotonic() + _SWEEP)
            return
        if request.tid in self._makers:
            self._after_makers.append(request)
            return
        if isinstance(request, LetGo):
            self._let_go(request)
            return
        if self._deliveries is not None and request.tid in self._deliveries:
            self._take_over(self._deliveries.take_over(request.tid))
        if request.tid not in self._threads and (held := self._hold(request)) is not True:
            if held is False:
                self._again.append(request)
                self._due = min(self._due, time.monotonic() + _RETRY_FORK)
            else:
                self._outbox.append(held)
            return
        if isinstance(request, MakeAgent | TraceFork):
            self._makers.begin(request)
            self._due = min(self._due, time.monotonic() + _SWEEP)
            return
        thread = self._threads.setdefault(request.tid, HeldThread(request.tid))
        self._want(thread, request)
        if isinstance(request, ArmAR | ForceAR | Hold):
            self._outbox.append(ArmedAck(request.id))  # leaves after the thread was interrupted
        self._nudge(thread)

    def _let_go(self, request: LetGo) -> None:
        thread = self._threads.get(request.tid)
        if thread is None or thread.parked is None:
            self._outbox.append(Gone(request.id))
            return
        tid = request.tid
        try:
            if request.error:
                injection.fail_call(tid, request.number, request.error)
        except OSError as error:
            if not ptrace.is_vanished(error):
                raise
        # Another thread may have mapped another file at this address.
        still = [
            Discard(*area)
            for area, page in zip(request.discard, request.pages, strict=True)
            if file_pages.page_at(tid, area[0]) == page
        ]
        status = thread.parked
        if (outcome := thread.let_go(request, still)) is not None:
            self._outbox.append(outcome)
        self._on_wait(tid, status)

    def _unpark(self, thread: HeldThread) -> None:
        """Let a parked thread go once no request asks for the thread any more."""
        if thread.parked is not None:
            status, thread.parked = thread.parked, None
            self._on_wait(thread.tid, status)

    def _want(self, thread: HeldThread, request: ArmAR | Send | Hold, is_its: bool = True) -> None:
        """Add a request to a held thread. ``is_its``: the thread is the one that the request names."""
        if isinstance(request, ArmAR):
            thread.arm(request.id, time.monotonic() + request.timeout, request.page)
        elif isinstance(request, Hold):
            thread.hold(request)
        elif is_its and (current := as_mapped_now(request)) is not None:
            thread.send(current)
        else:
            self._outbox.append(Gone(request.id))

    def _hold(self, request: ArmAR | Send | Hold | MakeAgent | TraceFork) -> Outcome | bool:
        """Seize the thread. Return True; False while the supervisor traces it; or the final report."""
        status = find_status(request.tid)
        if status is None or status.is_dead:
            return Gone(request.id)
        if not isinstance(request, ArmAR) and status.tgid != request.tgid:
            return Gone(request.id)
        if isinstance(request, SendAO) and siginfo.is_ignored(status):
            return Ignored(request.id)
        try:
            ptrace.seize(request.tid)
        except OSError as error:
            if ptrace.is_traced_by(request.tid, os.getppid()):
                return False
            if (reason := ptrace.refusal(request.tid, error)) is None:
                return Gone(request.id)
            signalled = isinstance(request, Send) and ptrace.send_plain(request.tgid, request.tid)
            return Refused(request.id, reason, signalled)
        return True

    def _reap(self) -> None:
        stops, waits = self._deliveries.reap(_BATCH) if self._deliveries is not None else reap(_BATCH)
        for wait in waits:
            if wait.sent is not None:
                sent = wait.sent
                self._outbox.append(Delivered(sent.id, sent.tid, sent.code, sent.addr, serial=sent.id))
                continue
            if wait.taken is not None:
                self._take_over(wait.taken)
            self._on_wait(wait.tid, wait.status)
        self._more = stops == _BATCH

    def _on_wait(self, tid: int, status: int) -> None:
        thread = self._threads.get(tid)
        try:
            if not os.WIFSTOPPED(status):
                self._drop(tid, os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0)
            elif status >> 16 == ptrace.EVENT_EXEC:
                self._drop(tid)
                self._drop(ptrace.event_message(tid))
                ptrace.detach(tid)
            elif tid in self._makers:
                if self._makers.on_stop(tid, status):
                    self._on_made(tid, status)
            elif thread is None:
                if not self._makers.is_early(tid, status):
                    ptrace.detach(tid, ptrace.classify(status)[1])
            elif thread.holds and thread.phase is Phase.NONE:
                self._outbox.extend(thread.park(status))
            else:
                self._on_stop(thread, ptrace.look(tid, status, thread.cookie))
        except OSError as error:
            if not ptrace.is_vanished(error):
                raise
            self._drop(tid)

    def _on_made(self, tid: int, status: int) -> None:
        """Go on with a thread in the last stop of its script."""
        if tid in self._threads:
            self._on_wait(tid, status)
        else:
            ptrace.detach(tid)
        requests, self._after_makers = self._after_makers, []
        for request in requests:
            self._on_request(request)

    def _on_stop(self, thread: HeldThread, stop: Stop) -> None:
        if thread.arms and (info := stop.info) is not None:
            if info.is_bus_adrerr:
                stop = stop._replace(page=file_pages.page_at(thread.tid, info.addr))
            elif (page := thread.arms[-1].page) is not None:
                # force_sig_info_to_task() merges with a pending SIGBUS: the fault's own siginfo is lost.
                thread.fault_at = file_pages.find_page(thread.tid, page, info.addr) or 0
        if (fault := thread.fault_of_next) is not None and stop.kind is not StopKind.SIGNAL:
            stop = stop._replace(has_left=injection.has_left(thread.tid, fault))
        if thread.phase is Phase.EXIT:
            stop = stop._replace(result=self._injections[thread.tid].result())
        while True:
            verdict = thread.decide(stop, next(self._cookies))
            try:
                refusal = self._carry_out(thread, verdict, stop.kind)
            except OSError:
                self._outbox.extend(Gone(report.id) for report in verdict.reports)
                raise
            self._outbox.extend(verdict.reports)
            if refusal is None:
                break
            dropped = thread.drop_head()
            if isinstance(dropped, Send):
                signalled = ptrace.send_plain(dropped.tgid, dropped.tid)
                self._outbox.append(Refused(dropped.id, refusal, signalled))
            else:
                os.kill(thread.tid, signal.SIGKILL)
                self._outbox.append(Refused(dropped.id, refusal, killed=True))
            stop = stop._replace(pending=stop.pending or isinstance(dropped, Send))
        self._schedule(thread)

    def _carry_out(self, thread: HeldThread, verdict: StopVerdict, kind: StopKind) -> str | None:
        """Carry out a verdict. Return the reason if the signal cannot be sent; the thread is still stopped
        then.
        """
        tid, step = thread.tid, verdict.step
        if verdict.undo:
            self._injections.pop(tid).undo()
        if verdict.kill:
            os.kill(tid, signal.SIGKILL)
        if kind is StopKind.TRAP:
            injection.restart_call(tid)
        if verdict.info is not None:
            ptrace.set_siginfo(tid, verdict.info)
        if step is ResumeStep.INJECT:
            try:
                self._injections[tid] = injection.begin(tid, thread.to_inject)
            except injection.CannotInject as why:
                return str(why)
        if step is ResumeStep.FORCE:
            ptrace.unblock(tid, signal.SIGBUS)
        if step in (ResumeStep.QUEUE, ResumeStep.FORCE):
            mark = siginfo.queued(signal.SIGBUS, thread.cookie)
            try:
                ptrace.tgsigqueue(thread.fifo[0].tgid, tid, signal.SIGBUS, mark)
            except PermissionError:  # CAP_SYS_PTRACE without CAP_KILL
                return "not permitted to signal it"
        if verdict.interrupt:
            ptrace.interrupt(tid)
        ptrace.resume(tid, step, verdict.sig)
        if step is ResumeStep.DETACH:
            del self._threads[tid]
        return None

    def _tick(self, now: float) -> None:
        """Check deadlines, and states that no event reports."""
        if now < self._due:
            return
        if now >= self._stale_at:
            self._take_all_over()
        self._due = now + _SWEEP if self._threads or self._makers or self._beside else self._stale_at
        reports, ready = self._beside.tick(now)
        self._outbox.extend(reports)
        again, self._again = self._again, []
        for request in (*ready, *again):
            self._on_request(request)
        for tid in self._makers:
            if (status := find_status(tid)) is None or status.tracer != threading.get_native_id():
                self._drop(tid)
        for thread in list(self._threads.values()):
            thread.expire(now)
            status = find_status(thread.tid)
            # A leader vanishes without a wait status when another thread of its process calls execve(2).
            if status is None or status.is_dead or status.tracer != threading.get_native_id():
                self._drop(thread.tid)
                continue
            self._outbox.extend(Asleep(id_) for id_ in thread.sleeps(status.state))
            pending = bool(status.pending & SIGBUS_BIT)
            if thread.retry_at is not None and thread.retry_at <= now:
                thread.retry_at = now + _RETRY if pending else None
            if thread.cookie and not pending and status.state != "t" and not thread.interrupting:
                self._interrupt(thread)  # lost: the event stop detects the loss
            self._nudge(thread)

    def _nudge(self, thread: HeldThread) -> None:
        if thread.wants_interrupt:
            self._interrupt(thread)
        self._schedule(thread)

    def _interrupt(self, thread: HeldThread) -> None:
        thread.interrupting = True
        try:
            ptrace.interrupt(thread.tid)
        except OSError as error:
            if not ptrace.is_vanished(error):
                raise
            self._drop(thread.tid)

    def _schedule(self, thread: HeldThread) -> None:
        if thread.tid in self._threads:
            self._due = min(self._due, thread.deadline(), time.monotonic() + _SWEEP)

    def _drop(self, tid: int, signal: int = 0) -> None:
        """Forget a thread that has ended. ``signal``: the signal that ended the thread; 0 if none did, or
        unknown.
        """
        self._injections.pop(tid, None)
        self._makers.drop(tid, signal)
        if (thread := self._threads.pop(tid, None)) is not None:
            self._outbox.extend(Gone(id_, signal, thread.fault_at) for id_ in thread.ids())
        elif self._deliveries is not None and tid in self._deliveries:
            self._outbox.append(Gone(self._deliveries.take_over(tid).request.id))


def main(argv: list[str]) -> None:
    """Serve the socket with number ``argv[1]``. ``argv[2]``: file that cuts the mount's connection."""
    if len(argv) > 2:
        with contextlib.suppress(OSError):  # not permitted
            # Opened now: the open file belongs to this connection, while another mount may get the number.
            abort = os.open(argv[2], os.O_WRONLY | os.O_CLOEXEC)
            threading.Thread(target=mourner.mourn, args=(os.getppid(), abort), daemon=True).start()
    # The tracer ends with the socket: dying in the middle of an injection would corrupt the victim's state.
    for sig in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(sig, signal.SIG_IGN)
    ours, theirs = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda _sig, _frame: None)  # without a handler the pipe stays silent
    with socket.socket(fileno=int(argv[1])) as sock:
        sock.setblocking(False)
        Tracer(sock, ours).run()


if __name__ == "__main__":
    main(sys.argv)
