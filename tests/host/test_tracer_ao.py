"""The tracer on real processes: BUS_MCEERR_AO in any state of the thread, with any disposition of SIGBUS."""

from __future__ import annotations

import os
import signal

import pytest
import trio

from daxemu.host.tracer import ptrace
from daxemu.host.tracer.link import TracerLink
from daxemu.host.tracer.messages import Delivered, Ignored, Refused
from tests.host.tracee import Start, deliver, scenario, status_of, until

pytestmark = pytest.mark.usefixtures("way")


def test_ao_handler_sees_exact_siginfo() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        for lsb in (12, 21):
            await deliver(link, tracee, tracee.map + 0x3000, lsb)
            assert await tracee.line() == f"BUS 5 {tracee.map + 0x3000:x} {lsb} {tracee.pid}"
        await tracee.free()
        assert await tracee.ask("count") == "counted 0"  # read(2) was restarted

    scenario(play)


def test_ao_high_address() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        await deliver(link, tracee, 0xFFFF_FFFF_FFFF_F000)
        assert await tracee.line() == f"BUS 5 fffffffffffff000 12 {tracee.pid}"

    scenario(play)


def test_ao_to_the_second_of_three_threads() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        tids = [int((await tracee.ask("thread")).split()[1]) for _ in range(2)]
        await deliver(link, tracee, tracee.map, tid=tids[0])
        assert await tracee.line() == f"BUS 5 {tracee.map:x} 12 {tids[0]}"
        await tracee.free(tids[0])
        assert [status_of(tid).tracer for tid in (tracee.pid, *tids)] == [0, 0, 0]

    scenario(play)


def test_ao_waits_while_the_supervisor_traces_the_thread() -> None:
    """The supervisor traces a thread that forks, until the thread has stopped: host/direct/redirect.c."""

    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        ptrace.seize(tracee.pid)
        pending = await link.send_ao(tracee.pid, tracee.pid, tracee.map + 0x3000)
        assert await pending.wait(0.05) is None
        ptrace.interrupt(tracee.pid)
        await trio.to_thread.run_sync(os.waitid, os.P_PID, tracee.pid, os.WSTOPPED | ptrace.WALL)
        ptrace.detach(tracee.pid)
        assert isinstance(await pending.wait(10), Delivered)
        assert await tracee.line() == f"BUS 5 {tracee.map + 0x3000:x} 12 {tracee.pid}"
        await tracee.free()

    scenario(play)


def test_ao_blocked_then_taken() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        assert await tracee.ask("block") == "done"
        await deliver(link, tracee, tracee.map + 0x1000)
        assert await tracee.ask("take 10") == f"TOOK 7 5 {tracee.map + 0x1000:x} 12"
        await tracee.free()

    scenario(play)


def test_ao_blocked_then_unblocked() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        assert await tracee.ask("block") == "done"
        await deliver(link, tracee, tracee.map + 0x1000, 21)
        assert await tracee.ask("unblock") == f"BUS 5 {tracee.map + 0x1000:x} 21 {tracee.pid}"
        assert await tracee.line() == "done"

    scenario(play)


def test_ao_while_it_waits_in_sigtimedwait() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        assert await tracee.ask("block") == "done"
        for page in range(20):
            await tracee.tell("take 30")
            await tracee.asleep_in(128)
            await deliver(link, tracee, tracee.map + page * 4096)
            assert await tracee.line() == f"TOOK 7 5 {tracee.map + page * 4096:x} 12"

    scenario(play)


def test_ao_ignored_but_blocked_is_found_by_sigtimedwait() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        assert await tracee.ask("block") == "done"
        assert await tracee.ask("ignore") == "done"
        await tracee.tell("take 30")
        await tracee.asleep_in(128)
        await deliver(link, tracee, tracee.map)
        assert await tracee.line() == f"TOOK 7 5 {tracee.map:x} 12"

    scenario(play)


def test_ao_blocked_through_signalfd_and_epoll() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        assert await tracee.ask("block") == "done"
        await tracee.tell("epoll")
        await tracee.asleep_in(232)
        await deliver(link, tracee, tracee.map + 0x5000)
        assert await tracee.line() == f"EPOLL 5 {tracee.map + 0x5000:x} 12"

    scenario(play)


def test_ao_blocked_restarts_read_and_nanosleep() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        assert await tracee.ask("block") == "done"
        await tracee.asleep_in(0)
        await deliver(link, tracee, tracee.map)
        assert await tracee.ask("take 10") == f"TOOK 7 5 {tracee.map:x} 12"
        await tracee.tell("sleep 300")
        await tracee.asleep_in(35, 230)
        await deliver(link, tracee, tracee.map)
        assert await tracee.line() == "slept 0 1"

    scenario(play)


def test_ao_blocked_in_a_busy_thread_leaves_its_stack_alone() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        assert await tracee.ask("block") == "done"
        for n in range(1, 30):
            assert await tracee.ask(f"spin {n}") == "done"
            await deliver(link, tracee, tracee.map + n)
            os.kill(tracee.pid, signal.SIGRTMIN + 1)
            assert await tracee.line() == f"counted {n}"
            assert await tracee.ask("take 10") == f"TOOK 7 5 {tracee.map + n:x} 12"

    scenario(play)


def test_several_ao_blocked_none_lost() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        assert await tracee.ask("block") == "done"
        sent = [await link.send_ao(tracee.pid, tracee.pid, tracee.map + 4096 * n) for n in range(5)]
        for n in range(5):
            assert isinstance(await sent[n].wait(30), Delivered)
            assert await tracee.ask("take 30") == f"TOOK 7 5 {tracee.map + 4096 * n:x} 12"

    scenario(play)


def test_ao_blocked_under_a_seccomp_filter_does_not_kill() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        assert await tracee.ask("seccomp") == "done 0"
        assert await tracee.ask("block") == "done"
        outcome = await (await link.send_ao(tracee.pid, tracee.pid, tracee.map)).wait(30)
        took = await tracee.ask("take 10")
        if isinstance(outcome, Refused):  # no CAP_SYS_ADMIN, or a kernel without CONFIG_CHECKPOINT_RESTORE
            assert outcome.signalled
            assert took.startswith("TOOK 7 -6 ")
        else:
            assert isinstance(outcome, Delivered)
            assert took == f"TOOK 7 5 {tracee.map:x} 12"

    scenario(play)


def test_ao_ignored() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        assert await tracee.ask("ignore") == "done"
        pending = await link.send_ao(tracee.pid, tracee.pid, tracee.map)
        assert await pending.wait(30) == Ignored(pending.id)
        assert await tracee.ask("count") == "counted 0"

    scenario(play)


def test_ao_default_action_kills() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        assert await tracee.ask("default") == "done"
        await deliver(link, tracee, tracee.map)
        assert await tracee.process.wait() == -signal.SIGBUS

    scenario(play)


def test_ao_to_a_stopped_process_waits_for_sigcont() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        os.kill(tracee.pid, signal.SIGSTOP)
        await until(lambda: status_of(tracee.pid).state == "T")
        pending = await link.send_ao(tracee.pid, tracee.pid, tracee.map)
        await until(lambda: status_of(tracee.pid).tracer != 0)
        await link.arm(os.getpid() ^ 0x3FFFFF)  # a round trip: the tracer has handled all requests before
        assert pending.outcome is None
        await until(lambda: status_of(tracee.pid).state in "Tt")
        os.kill(tracee.pid, signal.SIGCONT)
        assert isinstance(await pending.wait(30), Delivered)
        assert await tracee.line() == f"BUS 5 {tracee.map:x} 12 {tracee.pid}"
        await tracee.free()

    scenario(play)


def test_twenty_ao_arrive_in_order() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        for _ in range(10):
            sent = [await link.send_ao(tracee.pid, tracee.pid, tracee.map + 4096 * n) for n in range(20)]
            for n in range(20):
                assert await tracee.line() == f"BUS 5 {tracee.map + 4096 * n:x} 12 {tracee.pid}"
                assert isinstance(await sent[n].wait(30), Delivered)
        await tracee.free()

    scenario(play)


@pytest.mark.parametrize("mask", ["block", "unblock"])
def test_other_signals_and_stops_are_unharmed(mask: str) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        assert await tracee.ask(mask) == "done"
        assert await tracee.ask("spin 4001") == "done"
        ended = trio.Event()

        async def storm() -> None:
            for n in range(4000):
                os.kill(tracee.pid, signal.SIGRTMIN + 1)  # a queued signal: each one counts
                if n % 50 == 0:
                    os.kill(tracee.pid, signal.SIGSTOP)
                    await trio.lowlevel.checkpoint()
                    os.kill(tracee.pid, signal.SIGCONT)
            ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(storm)
            for n in range(1 if mask == "block" else 20):
                await deliver(link, tracee, tracee.map + 4096 * n)
                if mask == "unblock":
                    assert await tracee.line() == f"BUS 5 {tracee.map + 4096 * n:x} 12 {tracee.pid}"
            await ended.wait()
        os.kill(tracee.pid, signal.SIGRTMIN + 1)
        assert await tracee.line() == "counted 4001"
        if mask == "block":
            assert await tracee.ask("take 10") == f"TOOK 7 5 {tracee.map:x} 12"

    scenario(play)
