"""The tracer's decisions, without processes."""

from __future__ import annotations

import signal

from daxemu.host.tracer import siginfo
from daxemu.host.tracer.held_thread import HeldThread, StopVerdict
from daxemu.host.tracer.messages import Delivered, SendAO
from daxemu.host.tracer.ptrace import ResumeStep, Stop, StopKind
from daxemu.uapi import BUS_ADRERR, BUS_MCEERR_AO, BUS_MCEERR_AR


def _ao(id_: int) -> SendAO:
    return SendAO(id_, 1, 2, 0x1000 * id_)


def _cookie_stop(cookie: int) -> Stop:
    return Stop(
        StopKind.SIGNAL, signal.SIGBUS, siginfo.SigInfo(signal.SIGBUS, siginfo.SI_QUEUE, cookie, 0, 0)
    )


def _fault_stop(addr: int) -> Stop:
    return Stop(StopKind.SIGNAL, signal.SIGBUS, siginfo.parse(siginfo.bus_error(BUS_ADRERR, addr, 0)))


def test_decide_queue_then_replace_then_detach() -> None:
    thread = HeldThread(2)
    thread.fifo.append(_ao(1))
    assert thread.wants_interrupt
    assert thread.decide(Stop(StopKind.TRAP), 77).step is ResumeStep.QUEUE
    verdict = thread.decide(_cookie_stop(77), 78)
    assert (verdict.step, verdict.sig) == (ResumeStep.DETACH, signal.SIGBUS)
    assert verdict.info == siginfo.bus_error(BUS_MCEERR_AO, 0x1000, 12)
    assert verdict.reports == (Delivered(1, 2, BUS_MCEERR_AO, 0x1000, serial=1),)


def test_decide_a_dropped_cookie_is_sent_again() -> None:
    thread = HeldThread(2)
    thread.fifo.append(_ao(1))
    thread.decide(Stop(StopKind.TRAP), 77)
    foreign = Stop(StopKind.SIGNAL, signal.SIGBUS, siginfo.SigInfo(signal.SIGBUS, 0, 0, 0, 0), pending=False)
    verdict = thread.decide(foreign, 78)
    assert (verdict.step, verdict.info, verdict.interrupt) == (ResumeStep.CONT, None, True)
    assert thread.decide(Stop(StopKind.TRAP), 79).step is ResumeStep.QUEUE


def test_decide_a_signal_before_the_injected_call_undoes_it() -> None:
    thread = HeldThread(2)
    thread.fifo.append(_ao(1))
    assert thread.decide(Stop(StopKind.TRAP, blocked=True), 1).step is ResumeStep.INJECT
    verdict = thread.decide(Stop(StopKind.SIGNAL, signal.SIGUSR1), 2)
    assert verdict == StopVerdict(ResumeStep.CONT, signal.SIGUSR1, undo=True, interrupt=True)
    assert thread.decide(Stop(StopKind.TRAP, blocked=True), 3).step is ResumeStep.INJECT
    assert thread.decide(Stop(StopKind.SYSCALL), 4).step is ResumeStep.SYSCALL
    verdict = thread.decide(Stop(StopKind.SYSCALL, result=0), 5)
    assert (verdict.undo, verdict.step, verdict.interrupt) == (True, ResumeStep.CONT, True)
    assert verdict.reports == (Delivered(1, 2, BUS_MCEERR_AO, 0x1000, serial=1),)
    assert thread.decide(Stop(StopKind.TRAP, blocked=True, pending=True), 6).step is ResumeStep.DETACH


def test_decide_a_late_fault_beats_the_expired_arm() -> None:
    thread = HeldThread(2)
    thread.arm(5, deadline=1.0)
    thread.expire(2.0)
    verdict = thread.decide(Stop(StopKind.TRAP, pending=True), 1)
    assert (verdict.step, verdict.interrupt, verdict.reports) == (ResumeStep.CONT, False, ())
    verdict = thread.decide(_fault_stop(0x5008), 2)
    assert verdict.reports == (Delivered(5, 2, BUS_MCEERR_AR, 0x5008, serial=5),)
    assert verdict.step is ResumeStep.DETACH


def test_decide_the_last_of_several_arms_gives_the_serial() -> None:
    thread = HeldThread(2)
    for id_ in (5, 8, 9):
        thread.arm(id_, deadline=1.0)
    thread.fifo.append(_ao(3))
    verdict = thread.decide(_fault_stop(0x5008), 1)
    assert verdict.reports == tuple(Delivered(id_, 2, BUS_MCEERR_AR, 0x5008, serial=9) for id_ in (5, 8, 9))
    assert thread.ids() == [3]
    thread.arm(10, deadline=1.0)
    verdict = thread.decide(_fault_stop(0x5008), 2)
    assert verdict.reports == (Delivered(10, 2, BUS_MCEERR_AR, 0x5008, serial=10),)
