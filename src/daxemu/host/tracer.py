"""The tracer: makes unmodified processes receive SIGBUS with exactly the siginfo memory_failure() would give.

Counterpart in Linux: kill_proc() of mm/memory-failure.c, force_sig_mceerr() and send_sig_mceerr() of
kernel/signal.c. Only a ptrace tracer can give another process si_code > 0. ptrace is bound to a thread, so
this is a process of its own: ``python -m daxemu.host.tracer FD``; FD is a SOCK_SEQPACKET socket, each packet
a JSON message (``Request`` in, ``Report`` out). The supervisor's side is ``tracer_link``.

How a signal gets its siginfo:
- **AR**: the supervisor has the thread seized, then fails its page fault. The kernel forces BUS_ADRERR; in
  the signal-delivery-stop code and lsb are replaced, the address is already right.
- **AO**: seize, interrupt. In the event stop mask and pending set cannot change under us (and
  rt_sigtimedwait(2) has put back the mask it lifts while it sleeps, which /proc shows lifted). SIGBUS not
  blocked: queue one with a cookie, replace the siginfo in its signal-delivery-stop. Blocked: nothing will
  ever stop for it, so the thread is made to queue it to itself (``ptrace.Injection``). SIGBUS is a legacy
  signal, a second one is dropped while one is pending: hence a FIFO per thread.

States of a held thread (``Thread``): running, LISTENing in a group-stop, or between the stops of an injection
(``phase``). A stop goes in with ``decide``, one ``Verdict`` comes out; ``Tracer`` does the I/O.

Invariants:
- a thread is held exactly as long as a request for it is open; detaching happens only in a stop;
- a signal that is not ours goes on unchanged, in the very stop that reported it; so does a group-stop;
- any stop may swallow an INTERRUPT, so every stop decides anew whether one is wanted;
- a cookie that is neither pending nor seen again was dropped in favour of a foreign SIGBUS: it is sent again;
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
import time
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import msgspec

from daxemu.host import ptrace, siginfo
from daxemu.host.ptrace import Kind, Step, Stop
from daxemu.host.siginfo import SIGBUS_BIT, SigInfo
from daxemu.uapi import BUS_MCEERR_AO, BUS_MCEERR_AR, PAGE_SHIFT


class _Message(msgspec.Struct, tag=True, frozen=True):
    id: int


class ArmAR(_Message, frozen=True):
    """The next BUS_ADRERR of ``tid`` within ``timeout`` seconds is consumed poison."""

    tid: int
    timeout: float = 1.0


class SendAO(_Message, frozen=True):
    """Tell ``tid`` of process ``tgid`` of poison at its virtual address ``addr``, ``2**lsb`` bytes."""

    tgid: int
    tid: int
    addr: int
    lsb: int = PAGE_SHIFT


class ArmedAck(_Message, frozen=True):
    """The thread is held: its fault may be failed now."""


class Refused(_Message, frozen=True):
    """Not possible, for a reason to show. ``signalled``: it was sent a plain SIGBUS instead."""

    reason: str
    signalled: bool = False


class Delivered(_Message, frozen=True):
    """Handed over: the thread handles it now, or has it pending because it blocks SIGBUS, or dies of it."""

    tid: int
    code: int
    addr: int


class NotTaken(_Message, frozen=True):
    """No SIGBUS came in time; the thread is let go."""


class Gone(_Message, frozen=True):
    """The thread exited, or called execve(2), before."""


class Ignored(_Message, frozen=True):
    """The process ignores SIGBUS, so an AO does not exist for it."""


Request = ArmAR | SendAO
Outcome = Delivered | Refused | NotTaken | Gone | Ignored
Report = ArmedAck | Outcome

_RETRY = 0.02  # seconds between looks at a pending SIGBUS: nothing tells when signalfd(2) takes it
_SWEEP = 1.0  # seconds
_FAREWELL = 2.0  # seconds to let go of everything at the end
_BATCH = 256  # stops, or requests, before the other side gets its turn
_DECODER = msgspec.json.Decoder(Request)
_ENCODER = msgspec.json.Encoder()

Phase = Enum("Phase", ["NONE", "ENTER", "EXIT"])  # where an injection is


class Verdict(NamedTuple):
    """What to do in a stop, in this order: ``undo`` an injection, set ``info``, INTERRUPT, ``step``."""

    step: Step
    sig: int = 0
    info: bytes | None = None
    undo: bool = False
    interrupt: bool = False
    reports: tuple[Outcome, ...] = ()


@dataclass
class _Arm:
    id: int
    deadline: float
    expired: bool = False


@dataclass
class Thread:
    """One held thread: what is wanted of it, and the decisions. Pure: no I/O, no clock."""

    tid: int
    arms: list[_Arm] = field(default_factory=list)
    fifo: deque[SendAO] = field(default_factory=deque)
    cookie: int = 0  # of the SIGBUS under way, for the head of the FIFO
    phase: Phase = Phase.NONE
    interrupting: bool = False
    listening: bool = False
    arriving: bool = False  # a SIGBUS is about to stop it: an INTERRUPT now would come before, for ever
    retry_at: float | None = None  # blocked, and one is pending already: look again then

    @property
    def idle(self) -> bool:
        """Whether nothing is wanted, so that it must be let go."""
        return not self.arms and not self.fifo

    @property
    def wants_interrupt(self) -> bool:
        """Whether only an event stop gets us on."""
        if self.interrupting or self.arriving or self.phase is not Phase.NONE:
            return False
        if self.idle or any(arm.expired for arm in self.arms):
            return True
        return bool(self.fifo) and not self.cookie and not self.listening and self.retry_at is None

    def arm(self, id_: int, deadline: float) -> None:
        """Take the next BUS_ADRERR until ``deadline`` for consumed poison."""
        self.arms.append(_Arm(id_, deadline))

    def decide(self, stop: Stop, new_cookie: int) -> Verdict:
        """A stop in, what to do out."""
        self.interrupting = self.listening = self.arriving = False
        if stop.kind is Kind.SYSCALL:
            return self._on_syscall(stop)
        undo = self.phase is not Phase.NONE  # something came before the injected call: undone, tried again
        self.phase = Phase.NONE
        verdict = self._on_signal(stop) if stop.kind is Kind.SIGNAL else self._on_event(stop, new_cookie)
        self.interrupting = verdict.step in (Step.CONT, Step.LISTEN) and self.wants_interrupt
        return verdict._replace(undo=undo, interrupt=self.interrupting)

    def expire(self, now: float) -> None:
        """Mark the arms whose time has passed; the next event stop settles them."""
        for arm in self.arms:
            arm.expired = arm.expired or arm.deadline <= now

    def drop_head(self) -> SendAO:
        """Forget the oldest AO, which could not be sent; the stop must be decided again."""
        self.phase, self.cookie = Phase.NONE, 0
        return self.fifo.popleft()

    def retire(self) -> None:
        """Want nothing any more, except to give a SIGBUS that is under way its siginfo."""
        self.arms, self.fifo = [], deque(list(self.fifo)[:1] if self.cookie else [])

    def ids(self) -> list[int]:
        """The requests that are open."""
        return [arm.id for arm in self.arms] + [ao.id for ao in self.fifo]

    def _on_syscall(self, stop: Stop) -> Verdict:
        if self.phase is Phase.ENTER:
            self.phase = Phase.EXIT
            return Verdict(Step.SYSCALL)
        # What was interrupted is restarted only on the way through signal handling: INTERRUPT leads there.
        self.phase, self.interrupting = Phase.NONE, True
        verdict = Verdict(Step.CONT, undo=True, interrupt=True)
        if not self.fifo:  # retired meanwhile
            return verdict
        ao = self.fifo.popleft()
        if stop.result:
            return verdict._replace(reports=(Refused(ao.id, f"kernel: {os.strerror(-stop.result)}"),))
        return verdict._replace(reports=(Delivered(ao.id, self.tid, BUS_MCEERR_AO, ao.addr),))

    def _on_signal(self, stop: Stop) -> Verdict:
        info: bytes | None = None
        reports: tuple[Outcome, ...] = ()
        if stop.info is not None and stop.sig == signal.SIGBUS:
            info, reports = self._on_sigbus(stop.info)
            self.retry_at = None
        if self.cookie and not stop.pending:
            self.cookie = 0
        return Verdict(Step.DETACH if self.idle else Step.CONT, stop.sig, info, reports=reports)

    def _on_sigbus(self, info: SigInfo) -> tuple[bytes | None, tuple[Outcome, ...]]:
        if self.arms and info.is_bus_adrerr:
            # All arms of a thread are for the same fault: it may ask for its page more than once.
            reports = tuple(Delivered(arm.id, self.tid, BUS_MCEERR_AR, info.addr) for arm in self.arms)
            self.arms.clear()
            return siginfo.bus_error(BUS_MCEERR_AR, info.addr, PAGE_SHIFT), reports
        if self.cookie and info.code == siginfo.SI_QUEUE and info.value == self.cookie:
            self.cookie = 0
            ao = self.fifo.popleft()
            done = Delivered(ao.id, self.tid, BUS_MCEERR_AO, ao.addr)
            return siginfo.bus_error(BUS_MCEERR_AO, ao.addr, ao.lsb), (done,)
        return None, ()

    def _on_event(self, stop: Stop, new_cookie: int) -> Verdict:
        if self.cookie and not stop.pending:
            self.cookie = 0
        self.arriving = stop.pending and not stop.blocked
        reports: list[Outcome] = []
        if not self.arriving:
            reports += (NotTaken(arm.id) for arm in self.arms if arm.expired)
            self.arms = [arm for arm in self.arms if not arm.expired]
        if stop.kind is Kind.GROUP:
            self.listening = not self.idle
            step = Step.LISTEN if self.listening else Step.DETACH
        else:
            step = self._next_ao(stop, new_cookie, reports)
        return Verdict(step, reports=tuple(reports))

    def _next_ao(self, stop: Stop, new_cookie: int, reports: list[Outcome]) -> Step:
        if not self.cookie and stop.ignored and not stop.blocked:
            reports += (Ignored(ao.id) for ao in self.fifo)
            self.fifo.clear()
        if self.idle:
            return Step.DETACH
        if not self.fifo or self.cookie or self.arriving:
            return Step.CONT
        if not stop.blocked:
            self.cookie = new_cookie
            return Step.QUEUE
        if stop.pending:
            self.retry_at = 0.0  # the next tick sets the time
            return Step.CONT
        self.phase = Phase.ENTER
        return Step.INJECT

    def deadline(self) -> float:
        """When somebody must look at it again, stop or no stop."""
        times = [arm.deadline for arm in self.arms if not arm.expired]
        if self.retry_at is not None:
            times.append(self.retry_at)
        return min(times, default=math.inf)


class Tracer:
    """The I/O around ``Thread``: socket, waitpid, ptrace, clock."""

    def __init__(self, sock: socket.socket, wakeup: int) -> None:
        self._sock = sock
        self._wakeup = wakeup
        self._threads: dict[int, Thread] = {}
        self._injections: dict[int, ptrace.Injection] = {}
        self._outbox: deque[Report] = deque()
        self._cookies = itertools.count(secrets.randbits(62) + 1)
        self._due = math.inf  # when ``_tick`` must look at all threads
        self._farewell: float | None = None  # set when the socket is closed: stop at that time at the latest

    def run(self) -> None:
        """Serve until the socket's other end closes, then let every thread go."""
        poller = select.poll()
        poller.register(self._wakeup, select.POLLIN)
        while self._farewell is None:
            poller.register(self._sock, select.POLLIN | (select.POLLOUT if self._outbox else 0))
            self._turn(poller)
            self._receive()
            self._flush()
        poller.unregister(self._sock)
        for thread in list(self._threads.values()):
            thread.retire()
            self._nudge(thread)
        while self._threads and time.monotonic() < self._farewell:
            self._turn(poller)

    def _turn(self, poller: select.poll) -> None:
        left = min(self._due, self._farewell or math.inf) - time.monotonic()
        poller.poll(None if left == math.inf else max(0, math.ceil(left * 1000)))
        with contextlib.suppress(BlockingIOError):  # nobody rang: it was the socket or the clock
            os.read(self._wakeup, 4096)
        self._reap()
        self._tick(time.monotonic())

    def _receive(self) -> None:
        for _ in range(_BATCH):
            try:
                packet = self._sock.recv(1 << 16)
            except BlockingIOError:
                return
            except ConnectionResetError:  # closed with our reports unread
                packet = b""
            if not packet:
                self._farewell = time.monotonic() + _FAREWELL
                return
            self._on_request(_DECODER.decode(packet))

    def _flush(self) -> None:
        """Send what the socket takes. Never waits: the peer may be waiting for us to read."""
        while self._outbox:
            try:
                self._sock.send(_ENCODER.encode(self._outbox[0]))
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):  # the next recv() sees the end
                self._outbox.clear()
                return
            self._outbox.popleft()

    def _on_request(self, request: Request) -> None:
        if request.tid not in self._threads and (refused := self._hold(request)) is not None:
            self._outbox.append(refused)
            return
        thread = self._threads.setdefault(request.tid, Thread(request.tid))
        if isinstance(request, ArmAR):
            thread.arm(request.id, time.monotonic() + request.timeout)
            self._outbox.append(ArmedAck(request.id))
        else:
            thread.fifo.append(request)
        self._nudge(thread)

    def _hold(self, request: Request) -> Outcome | None:
        """Seize the thread; or the final report, if that is not to be."""
        status = siginfo.read_status(request.tid)
        if status is None or status.is_dead:
            return Gone(request.id)
        if isinstance(request, SendAO) and status.tgid != request.tgid:
            return Gone(request.id)
        if isinstance(request, SendAO) and siginfo.is_ignored(status):
            return Ignored(request.id)
        try:
            ptrace.seize(request.tid)
        except OSError as error:
            if (reason := ptrace.refusal(request.tid, error)) is None:
                return Gone(request.id)
            signalled = isinstance(request, SendAO) and ptrace.send_plain(request.tgid, request.tid)
            return Refused(request.id, reason, signalled)
        return None

    def _reap(self) -> None:
        for _ in range(_BATCH):
            try:
                tid, status = os.waitpid(-1, os.WNOHANG | ptrace.WALL)
            except ChildProcessError:
                return
            if tid == 0:
                return
            self._on_wait(tid, status)
        self._due = 0.0  # there may be more: come back at once, after a look at the socket

    def _on_wait(self, tid: int, status: int) -> None:
        thread = self._threads.get(tid)
        try:
            if not os.WIFSTOPPED(status):
                self._drop(tid)
            elif status >> 16 == ptrace.EVENT_EXEC:
                self._drop(tid)
                self._drop(ptrace.event_message(tid))
                ptrace.detach(tid)
            elif thread is None:
                ptrace.detach(tid, ptrace.classify(status)[1])
            else:
                self._on_stop(thread, ptrace.look(tid, status, want_masks=thread.cookie != 0))
        except OSError as error:
            if not ptrace.is_vanished(error):
                raise
            self._drop(tid)

    def _on_stop(self, thread: Thread, stop: Stop) -> None:
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
            ao = thread.drop_head()
            self._outbox.append(Refused(ao.id, refusal, ptrace.send_plain(ao.tgid, ao.tid)))
            stop = stop._replace(pending=True)
        self._schedule(thread)

    def _carry_out(self, thread: Thread, verdict: Verdict, kind: Kind) -> str | None:
        """Do it; or the reason why the AO cannot be sent, with the thread still stopped."""
        tid, step = thread.tid, verdict.step
        if verdict.undo:
            self._injections.pop(tid).undo()
        if kind is Kind.TRAP:
            ptrace.mend_eintr(tid)
        if verdict.info is not None:
            ptrace.set_siginfo(tid, verdict.info)
        if step is Step.INJECT:
            ao = thread.fifo[0]
            info = siginfo.bus_error(BUS_MCEERR_AO, ao.addr, ao.lsb)
            try:
                self._injections[tid] = ptrace.Injection(tid, ptrace.status_of_held(tid), signal.SIGBUS, info)
            except ptrace.CannotInject as why:
                return str(why)
        if step is Step.QUEUE:
            mark = siginfo.queued(signal.SIGBUS, thread.cookie)
            try:
                ptrace.tgsigqueue(thread.fifo[0].tgid, tid, signal.SIGBUS, mark)
            except PermissionError:  # CAP_SYS_PTRACE without CAP_KILL
                return "not permitted to signal it"
        if verdict.interrupt:
            ptrace.interrupt(tid)
        ptrace.resume(tid, step, verdict.sig)
        if step is Step.DETACH:
            del self._threads[tid]
        return None

    def _tick(self, now: float) -> None:
        """Deadlines, and what no event tells of."""
        if now < self._due:
            return
        self._due = now + _SWEEP if self._threads else math.inf
        for thread in list(self._threads.values()):
            thread.expire(now)
            status = siginfo.read_status(thread.tid)
            # A leader vanishes without a wait status when another thread of its process calls execve(2).
            if status is None or status.is_dead or status.tracer != os.getpid():
                self._drop(thread.tid)
                continue
            pending = bool(status.pending & SIGBUS_BIT)
            if thread.retry_at is not None and thread.retry_at <= now:
                thread.retry_at = now + _RETRY if pending else None
            if thread.cookie and not pending and status.state != "t" and not thread.interrupting:
                self._interrupt(thread)  # lost: the event stop finds that out
            self._nudge(thread)

    def _nudge(self, thread: Thread) -> None:
        if thread.wants_interrupt:
            self._interrupt(thread)
        self._schedule(thread)

    def _interrupt(self, thread: Thread) -> None:
        thread.interrupting = True
        try:
            ptrace.interrupt(thread.tid)
        except OSError as error:
            if not ptrace.is_vanished(error):
                raise
            self._drop(thread.tid)

    def _schedule(self, thread: Thread) -> None:
        if thread.tid in self._threads:
            self._due = min(self._due, thread.deadline(), time.monotonic() + _SWEEP)

    def _drop(self, tid: int) -> None:
        """Forget a thread that is no more."""
        self._injections.pop(tid, None)
        if (thread := self._threads.pop(tid, None)) is not None:
            self._outbox.extend(Gone(id_) for id_ in thread.ids())


def main(argv: list[str]) -> None:
    """Serve the socket whose number is ``argv[1]``."""
    # The socket's end is our end; dying in the middle of an injection would hurt the victim.
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
