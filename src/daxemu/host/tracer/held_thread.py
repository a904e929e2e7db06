"""Held thread of the tracer: the open requests, and the decision for each stop.

Purpose: the decisions, without I/O and without a clock. A stop goes in with ``HeldThread.decide``, a
``StopVerdict`` comes out; ``tracer.process`` carries the verdict out.

How a signal gets its siginfo:
- **AR**: the supervisor has the thread seized, then fails the thread's page fault. The kernel forces
  BUS_ADRERR. In the signal-delivery-stop the tracer replaces code and lsb; the address is already right.
- **AO**: seize, interrupt. In the event stop neither the signal mask nor the pending set can change, and
  rt_sigtimedwait(2) has put back the mask lifted during its sleep (/proc shows the lifted mask). SIGBUS not
  blocked: queue a SIGBUS with a cookie, replace the siginfo in the signal-delivery-stop. SIGBUS blocked: no
  stop will follow, so the thread is made to queue the SIGBUS to itself (``injection``). SIGBUS is a legacy
  signal: the kernel drops a second SIGBUS while one is pending, hence a FIFO per thread.
- **Forced AR** (``ForceAR``): the same for a thread in a system call, and first in the FIFO. SIGBUS blocked
  or ignored: the thread is made to set the default action, the mask is lifted, and the thread dies, as in
  force_sig_info_to_task(). A thread in a page fault (``ForceAR.fault``) can leave the fault before the stop:
  such a thread gets no signal, because SIGBUS may be blocked only for the handler of the first.
- **Hold**: no signal. The thread stays in the first stop after the system call (``parked``) until ``LetGo``.
  Then the thread drops private copies by an injected madvise(2) (``injection``), and runs.

States of a ``HeldThread``: running, LISTENing in a group-stop (``listening``), or between the stops of an
injection (``phase``).

Invariants:
- a foreign signal goes on unchanged, in the very stop that reported it; so does a group-stop;
- any stop may swallow an INTERRUPT, so every stop decides anew whether an INTERRUPT is wanted;
- a cookie neither pending nor seen again was dropped in favour of a foreign SIGBUS, and is sent again;
- one SIGBUS settles all open arms for one page, or one AO, or no request;
- ``DETACH`` is only decided when no request is open any more (``idle``).
"""

from __future__ import annotations

import math
import os
import signal
from collections import deque
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

import msgspec

from daxemu.host.proc import file_pages
from daxemu.host.proc.file_pages import FilePage
from daxemu.host.tracer import siginfo
from daxemu.host.tracer.messages import (
    Delivered,
    ForceAR,
    Held,
    Hold,
    Ignored,
    LetGo,
    NotTaken,
    Outcome,
    Refused,
    Resumed,
    Send,
    SendAO,
)
from daxemu.host.tracer.ptrace import ResumeStep, Stop, StopKind
from daxemu.host.tracer.siginfo import SigInfo
from daxemu.uapi import BUS_MCEERR_AR, PAGE_SHIFT, page_align_down

Phase = Enum("Phase", ["NONE", "ENTER", "EXIT"])  # progress of an injection


class StopVerdict(NamedTuple):
    """Actions in one stop, in this order: ``undo`` an injection, ``kill`` the process, set ``info``,
    INTERRUPT, ``step``.
    """

    step: ResumeStep
    sig: int = 0
    info: bytes | None = None
    undo: bool = False
    interrupt: bool = False
    reports: tuple[Outcome, ...] = ()
    kill: bool = False


@dataclass
class _Arm:
    id: int
    deadline: float
    page: FilePage | None = None
    expired: bool = False

    def is_for(self, page: FilePage | None) -> bool:
        return self.page == page or None in (self.page, page)


class Discard(NamedTuple):
    """Private copies that a thread must drop: ``length`` bytes from virtual address ``address`` on."""

    address: int
    length: int


@dataclass
class _Return:
    """Work for a held thread (``Hold``) after LetGo: the private copies still to drop."""

    id: int
    discard: deque[Discard]


@dataclass
class HeldThread:
    """Held thread: open requests and decisions. Pure: no I/O, no clock."""

    tid: int
    arms: list[_Arm] = field(default_factory=list)
    fifo: deque[Send] = field(default_factory=deque)
    cookie: int = 0  # of the SIGBUS under way, for the head of the FIFO
    phase: Phase = Phase.NONE
    is_default: bool = False  # the tracer gave SIGBUS its default action, for the head of the FIFO
    interrupting: bool = False
    listening: bool = False
    arriving: bool = False  # a SIGBUS is about to stop the thread: an INTERRUPT would always come first
    retry_at: float | None = None  # SIGBUS is blocked and pending already: look again at this time
    holds: list[int] = field(default_factory=list)  # requests that wait for the system call to return
    fault_at: int = 0  # page of a fault whose SIGBUS merged with a pending SIGBUS: address in bytes
    parked: int | None = None  # wait status of the stop in which the thread stays until LetGo
    returns: _Return | None = None  # LetGo came, but the thread has copies to drop yet
    asleep: set[int] = field(default_factory=set)  # requests that were reported as Asleep

    @property
    def idle(self) -> bool:
        """Return True if no request is open, so that the thread must be let go."""
        return not (self.arms or self.fifo or self.holds or self.returns or self.parked is not None)

    @property
    def wants_interrupt(self) -> bool:
        """Return True if only an event stop leads on."""
        if self.interrupting or self.arriving or self.phase is not Phase.NONE or self.parked is not None:
            return False
        if self.idle or self.holds or any(arm.expired for arm in self.arms):
            return True
        if self.returns is not None:
            return not self.listening
        return bool(self.fifo) and not self.cookie and not self.listening and self.retry_at is None

    @property
    def fault_of_next(self) -> tuple[int, int, int] | None:
        """``ForceAR.fault`` of the next signal; None between the stops of an injection, too, which has other
        registers.
        """
        head = self.fifo[0] if self.fifo and self.phase is Phase.NONE else None
        return head.fault if isinstance(head, ForceAR) else None

    def arm(self, id_: int, deadline: float, page: FilePage | None = None) -> None:
        """Turn the next BUS_ADRERR for ``page`` before ``deadline`` into consumed poison."""
        self.arms.append(_Arm(id_, deadline, page))

    def send(self, request: Send) -> None:
        """Queue a signal. A forced AR goes ahead of queued AOs, but not ahead of a delivery in progress."""
        if not isinstance(request, ForceAR):
            self.fifo.append(request)
            return
        under_way = bool(self.cookie) or self.phase is not Phase.NONE
        self.fifo.insert(int(under_way), request)
        self.retry_at = None

    def hold(self, request: Hold) -> None:
        """Stop at the next chance, and stay."""
        self.holds.append(request.id)

    def park(self, status: int) -> tuple[Outcome, ...]:
        """Stay in the stop of this wait status. Preconditions: ``holds`` is not empty, and no injection is
        under way.
        """
        self.parked, self.interrupting, holds = status, False, self.holds
        self.holds = []
        return tuple(Held(id_) for id_ in holds)

    def let_go(self, request: LetGo, discard: list[Discard]) -> Outcome | None:
        """Run again, once the pages of ``discard`` are dropped; a later verdict then has the outcome. The
        stop in which the thread is parked must be decided next.
        """
        self.parked = None
        if not discard:
            return Resumed(request.id)
        self.returns = _Return(request.id, deque(discard))
        return None

    @property
    def to_inject(self) -> Discard | Send:
        """Return the system call that the thread must make next. Precondition: INJECT was decided."""
        return self.returns.discard[0] if self.returns is not None else self.fifo[0]

    def decide(self, stop: Stop, new_cookie: int) -> StopVerdict:
        """Decide a stop. ``new_cookie`` marks the SIGBUS, if a SIGBUS is to be queued."""
        self.interrupting = self.listening = self.arriving = False
        if stop.kind is StopKind.SYSCALL:
            return self._on_syscall(stop)
        undo = self.phase is not Phase.NONE  # another stop came before the injected call: undo, try again
        self.phase = Phase.NONE
        verdict = self._on_signal(stop) if stop.kind is StopKind.SIGNAL else self._on_event(stop, new_cookie)
        self.interrupting = verdict.step in (ResumeStep.CONT, ResumeStep.LISTEN) and self.wants_interrupt
        return verdict._replace(undo=undo, interrupt=self.interrupting)

    def expire(self, now: float) -> None:
        """Mark the arms whose deadline has passed; the next event stop settles these arms."""
        for arm in self.arms:
            arm.expired = arm.expired or arm.deadline <= now

    def drop_head(self) -> Send | _Return:
        """Drop the head of the FIFO, which could not be carried out; the stop must be decided again."""
        self.phase = Phase.NONE
        if (returns := self.returns) is not None:
            self.returns = None
            return returns
        self.cookie, self.is_default = 0, False
        return self.fifo.popleft()

    def retire(self) -> None:
        """Drop all requests, but still give a SIGBUS under way the right siginfo."""
        self.arms, self.fifo = [], deque(list(self.fifo)[:1] if self.cookie else [])
        self.holds, self.returns = [], None

    def ids(self) -> list[int]:
        """Ids of the open requests."""
        returns = [self.returns.id] if self.returns is not None else []
        return [arm.id for arm in self.arms] + [ao.id for ao in self.fifo] + self.holds + returns

    def sleeps(self, state: str) -> list[int]:
        """Return the requests that wait for the thread, if the thread is asleep, each request once.
        ``state``: the letter of the thread in /proc/TID/stat.
        """
        if state in "Rt" and not self.listening:
            return []
        new = [request.id for request in self.fifo if request.id not in self.asleep]
        self.asleep.update(new)
        return new

    def deadline(self) -> float:
        """Time at which the tracer must look at the thread again, with or without a stop."""
        times = [arm.deadline for arm in self.arms if not arm.expired]
        if self.retry_at is not None:
            times.append(self.retry_at)
        return min(times, default=math.inf)

    def _on_syscall(self, stop: Stop) -> StopVerdict:
        if self.phase is Phase.ENTER:
            self.phase = Phase.EXIT
            return StopVerdict(ResumeStep.SYSCALL)
        # The kernel restarts an interrupted system call only in signal handling: INTERRUPT leads there.
        self.phase, self.interrupting = Phase.NONE, True
        verdict = StopVerdict(ResumeStep.CONT, undo=True, interrupt=True)
        if self.returns is not None:
            return verdict._replace(reports=self._discarded(stop.result), kill=stop.result != 0)
        if not self.fifo:  # retired meanwhile
            return verdict
        if isinstance(self.fifo[0], ForceAR) and not stop.result:
            self.is_default = True
            return verdict
        ao = self.fifo.popleft()
        if stop.result:
            return verdict._replace(reports=(Refused(ao.id, f"kernel: {os.strerror(-stop.result)}"),))
        return verdict._replace(reports=(self._delivered(ao),))

    def _discarded(self, result: int) -> tuple[Outcome, ...]:
        """The result of one madvise(2)."""
        assert self.returns is not None
        self.returns.discard.popleft()
        if not result and self.returns.discard:
            return ()
        done, self.returns = self.returns, None
        if result:
            return (Refused(done.id, f"kernel: {os.strerror(-result)}", killed=True),)
        return (Resumed(done.id),)

    def _on_signal(self, stop: Stop) -> StopVerdict:
        info: bytes | None = None
        reports: tuple[Outcome, ...] = ()
        if stop.info is not None and stop.sig == signal.SIGBUS:
            info, reports = self._on_sigbus(stop.info, stop.page)
            self.retry_at = None
        if self.cookie and not stop.pending:
            self.cookie = 0
        return StopVerdict(
            ResumeStep.DETACH if self.idle else ResumeStep.CONT, stop.sig, info, reports=reports
        )

    def _on_sigbus(self, info: SigInfo, page: FilePage | None) -> tuple[bytes | None, tuple[Outcome, ...]]:
        arms = [arm for arm in self.arms if arm.is_for(page)] if info.is_bus_adrerr else []
        if arms:
            # All arms for a page are for the same fault, which may ask for its page more than once.
            serial = arms[-1].id
            reports = tuple(Delivered(arm.id, self.tid, BUS_MCEERR_AR, info.addr, serial) for arm in arms)
            self.arms = [arm for arm in self.arms if arm not in arms]
            return siginfo.bus_error(BUS_MCEERR_AR, info.addr, PAGE_SHIFT), reports
        if self.cookie and info.is_queued_with(self.cookie):
            self.cookie, self.is_default = 0, False
            sent = self.fifo.popleft()
            return siginfo.bus_error(sent.code, sent.addr, sent.lsb), (self._delivered(sent),)
        if info.is_bus_adrerr and not self.cookie and self.fault_of_next is not None:
            head = self.fifo[0]
            if page_align_down(info.addr) == page_align_down(head.addr):  # the page fault failed meanwhile
                self.is_default = False
                return siginfo.bus_error(head.code, info.addr, head.lsb), (
                    self._delivered(self.fifo.popleft()),
                )
        return None, ()

    def _delivered(self, sent: Send) -> Delivered:
        return Delivered(sent.id, self.tid, sent.code, sent.addr, serial=sent.id)

    def _on_event(self, stop: Stop, new_cookie: int) -> StopVerdict:
        if self.cookie and not stop.pending:
            self.cookie = 0
        self.arriving = stop.pending and not stop.blocked
        reports: list[Outcome] = []
        if not self.arriving:
            reports += (NotTaken(arm.id) for arm in self.arms if arm.expired)
            self.arms = [arm for arm in self.arms if not arm.expired]
        if stop.kind is StopKind.GROUP:
            self.listening = not self.idle
            step = ResumeStep.LISTEN if self.listening else ResumeStep.DETACH
        else:
            step = self._next(stop, new_cookie, reports)
        return StopVerdict(step, reports=tuple(reports))

    def _next(self, stop: Stop, new_cookie: int, reports: list[Outcome]) -> ResumeStep:
        if not self.cookie and stop.ignored and not stop.blocked:
            reports += (Ignored(ao.id) for ao in self.fifo if isinstance(ao, SendAO))
            self.fifo = deque(forced for forced in self.fifo if isinstance(forced, ForceAR))
        if stop.has_left and not self.cookie and not self.arriving:
            reports.append(NotTaken(self.fifo.popleft().id))
        if self.idle:
            return ResumeStep.DETACH
        if self.returns is not None and not self.arriving:
            self.phase = Phase.ENTER
            return ResumeStep.INJECT
        if not self.fifo or self.cookie or self.arriving:
            return ResumeStep.CONT
        if isinstance(self.fifo[0], ForceAR) and (stop.blocked or stop.ignored):
            return self._force(new_cookie)
        if not stop.blocked:
            self.cookie = new_cookie
            return ResumeStep.QUEUE
        if stop.pending:
            self.retry_at = 0.0  # the next tick sets the time
            return ResumeStep.CONT
        self.phase = Phase.ENTER
        return ResumeStep.INJECT

    def _force(self, new_cookie: int) -> ResumeStep:
        if self.is_default:
            self.cookie = new_cookie
            return ResumeStep.FORCE
        self.phase = Phase.ENTER
        return ResumeStep.INJECT


def as_mapped_now(request: Send) -> Send | None:
    """Return the request with the present address of its page; None if the page is not mapped any more.

    Precondition: the thread is held, so that a later execve(2) does not go unnoticed.
    """
    if not isinstance(request, SendAO) or request.page is None:
        return request
    address = file_pages.find_page(request.tgid, request.page, request.addr)
    return msgspec.structs.replace(request, addr=address) if address is not None else None
