"""The tracer, action required without a fault: force_sig_mceerr() to a thread in a system call."""

from __future__ import annotations

import signal

import pytest

from daxemu.host.tracer import siginfo
from daxemu.host.tracer.held_thread import HeldThread
from daxemu.host.tracer.link import Armed, TracerLink
from daxemu.host.tracer.messages import Delivered, ForceAR, Gone, Ignored, NotTaken, Refused, SendAO
from daxemu.host.tracer.ptrace import ResumeStep, Stop, StopKind
from daxemu.uapi import BUS_ADRERR, BUS_MCEERR_AO, BUS_MCEERR_AR
from tests.host.tracee import Start, deliver, scenario

pytestmark = pytest.mark.usefixtures("way")


def test_the_handler_sees_it() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        armed = await link.force_ar(tracee.pid, tracee.pid, tracee.map + 0x3000)
        assert isinstance(armed, Armed)
        assert await armed.wait(30) == Delivered(
            armed.id, tracee.pid, BUS_MCEERR_AR, tracee.map + 0x3000, armed.id
        )
        assert await tracee.line() == f"BUS 4 {tracee.map + 0x3000:x} 12 {tracee.pid}"
        await tracee.free()
        assert await tracee.ask("count") == "counted 0"

    scenario(play)


@pytest.mark.parametrize(
    "words", [["block"], ["ignore"], ["default"], ["ignore", "block"], ["seccomp", "block"]]
)
def test_it_dies_where_it_does_not_listen(words: list[str]) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        for word in words:
            assert (await tracee.ask(word)).startswith("done")
        armed = await link.force_ar(tracee.pid, tracee.pid, tracee.map)
        assert isinstance(armed, Armed)
        assert isinstance(await armed.wait(30), Delivered)
        assert await tracee.process.wait() == -signal.SIGBUS

    scenario(play)


def test_a_pending_sigbus_kills_once_it_is_unblocked() -> None:
    """SIGBUS is a legacy signal: a second SIGBUS merges with the first, and the unblocked SIGBUS
    kills, too.
    """

    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        assert await tracee.ask("block") == "done"
        await deliver(link, tracee, tracee.map)
        waiting = await link.send_ao(tracee.pid, tracee.pid, tracee.map + 0x1000)
        armed = await link.force_ar(tracee.pid, tracee.pid, tracee.map)
        assert isinstance(armed, Armed)
        assert isinstance(await armed.wait(30), Gone)
        assert await waiting.wait(30) == Gone(waiting.id, signal.SIGBUS)
        assert await tracee.process.wait() == -signal.SIGBUS

    scenario(play)


def test_forcing_a_signal_on_a_dead_process_reports_gone() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        tracee.process.kill()
        await tracee.process.wait()
        assert isinstance(await link.force_ar(tracee.pid, tracee.pid, 0), Gone)

    scenario(play)


@pytest.mark.parametrize("words", [[], ["block"], ["ignore"]])
def test_a_thread_that_has_left_its_page_fault_gets_no_signal(words: list[str]) -> None:
    """A handler of SIGBUS blocks SIGBUS: a second signal for the same touch would kill the process."""

    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        for word in words:
            assert (await tracee.ask(word)).startswith("done")
        armed = await link.force_ar(tracee.pid, tracee.pid, tracee.map, fault=(0x1000, 0x2000, 0))
        assert isinstance(armed, Armed)
        assert await armed.wait(30) == NotTaken(armed.id)
        await tracee.free()
        assert await tracee.ask("count") == "counted 0"

    scenario(play)


# -- the decisions


def _cookie_stop(cookie: int) -> Stop:
    return Stop(
        StopKind.SIGNAL, signal.SIGBUS, siginfo.SigInfo(signal.SIGBUS, siginfo.SI_QUEUE, cookie, 0, 0)
    )


def test_a_forced_signal_comes_first() -> None:
    thread = HeldThread(2)
    thread.send(SendAO(1, 1, 2, 0x1000))
    thread.send(SendAO(2, 1, 2, 0x2000))
    assert thread.decide(Stop(StopKind.TRAP), 77).step is ResumeStep.QUEUE
    thread.send(ForceAR(3, 1, 2, 0x3000))
    assert [sent.id for sent in thread.fifo] == [1, 3, 2]
    assert thread.decide(_cookie_stop(77), 78).info == siginfo.bus_error(BUS_MCEERR_AO, 0x1000, 12)
    thread.send(ForceAR(4, 1, 2, 0x4000))
    assert [sent.id for sent in thread.fifo] == [4, 3, 2]
    assert thread.decide(Stop(StopKind.TRAP), 79).step is ResumeStep.QUEUE
    assert thread.decide(_cookie_stop(79), 80).info == siginfo.bus_error(BUS_MCEERR_AR, 0x4000, 12)


def test_default_action_then_mask_then_signal() -> None:
    thread = HeldThread(2)
    thread.send(SendAO(1, 1, 2, 0x1000))
    thread.send(ForceAR(2, 1, 2, 0x2000))
    verdict = thread.decide(Stop(StopKind.TRAP, ignored=True), 1)
    assert (verdict.step, verdict.reports) == (ResumeStep.INJECT, (Ignored(1),))
    assert thread.decide(Stop(StopKind.SYSCALL), 2).step is ResumeStep.SYSCALL
    verdict = thread.decide(Stop(StopKind.SYSCALL, result=0), 3)
    assert (verdict.undo, verdict.step, verdict.interrupt, verdict.reports) == (
        True,
        ResumeStep.CONT,
        True,
        (),
    )
    assert thread.decide(Stop(StopKind.TRAP, blocked=True), 4).step is ResumeStep.FORCE
    verdict = thread.decide(_cookie_stop(4), 5)
    assert verdict.reports == (Delivered(2, 2, BUS_MCEERR_AR, 0x2000, serial=2),)
    assert verdict.step is ResumeStep.DETACH


def test_the_default_action_cannot_be_had() -> None:
    thread = HeldThread(2)
    thread.send(ForceAR(1, 1, 2, 0x1000))
    thread.decide(Stop(StopKind.TRAP, blocked=True), 1)
    thread.decide(Stop(StopKind.SYSCALL), 2)
    (report,) = thread.decide(Stop(StopKind.SYSCALL, result=-1), 3).reports
    assert isinstance(report, Refused)
    assert thread.idle


FAULT = (0x7000, 0x400, 5)


def _failed_fault(address: int) -> Stop:
    info = siginfo.parse(siginfo.bus_error(BUS_ADRERR, address, 0))
    return Stop(StopKind.SIGNAL, signal.SIGBUS, info)


def test_a_page_fault_that_fails_first_gives_the_signal() -> None:
    thread = HeldThread(2)
    thread.send(ForceAR(1, 1, 2, 0x1000, fault=FAULT))
    assert thread.fault_of_next == FAULT
    assert thread.decide(Stop(StopKind.TRAP, pending=True), 1).step is ResumeStep.CONT
    verdict = thread.decide(_failed_fault(0x1008), 2)
    assert verdict.info == siginfo.bus_error(BUS_MCEERR_AR, 0x1008, 12)
    assert verdict.reports == (Delivered(1, 2, BUS_MCEERR_AR, 0x1000, serial=1),)
    assert verdict.step is ResumeStep.DETACH


def test_a_failed_page_fault_of_another_page_stays_as_it_is() -> None:
    thread = HeldThread(2)
    thread.send(ForceAR(1, 1, 2, 0x1000, fault=FAULT))
    assert thread.decide(Stop(StopKind.TRAP, pending=True), 1).step is ResumeStep.CONT
    verdict = thread.decide(_failed_fault(0x2000), 2)
    assert (verdict.info, verdict.reports, verdict.interrupt) == (None, (), True)
    verdict = thread.decide(Stop(StopKind.TRAP, blocked=True, has_left=True), 3)
    assert (verdict.step, verdict.reports) == (ResumeStep.DETACH, (NotTaken(1),))


def test_in_its_page_fault_a_thread_that_blocks_sigbus_dies() -> None:
    thread = HeldThread(2)
    thread.send(ForceAR(1, 1, 2, 0x1000, fault=FAULT))
    assert thread.decide(Stop(StopKind.TRAP, blocked=True), 1).step is ResumeStep.INJECT
    assert thread.fault_of_next is None
