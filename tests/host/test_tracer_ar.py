"""The tracer on real processes: a failed page fault becomes BUS_MCEERR_AR."""

from __future__ import annotations

import os
import signal

import pytest

from daxemu.host.tracer.link import Armed, TracerLink
from daxemu.host.tracer.messages import Delivered, NotTaken
from daxemu.uapi import BUS_ADRERR, BUS_MCEERR_AR
from tests.host.tracee import Start, Tracee, consume, deliver, scenario, status_of, until


def test_ar_again_and_again() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        assert await tracee.ask("touch 5") == "byte 0"
        os.truncate(tracee.file, 0)
        for n in range(50):
            await consume(link, tracee, n * 4096 + 7)
        await tracee.free()
        assert await tracee.ask("touch 8191") == f"BUS {BUS_ADRERR} {tracee.map + 8191:x} 0 {tracee.pid}"

    scenario(play)


@pytest.mark.parametrize("how", ["block", "ignore", "default"])
def test_ar_is_forced(how: str) -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        assert await tracee.ask(how) == "done"
        os.truncate(tracee.file, 0)
        armed = await link.arm(tracee.pid, 30)
        assert isinstance(armed, Armed)
        await tracee.tell("touch 9")
        assert await armed.wait(30) == Delivered(
            armed.id, tracee.pid, BUS_MCEERR_AR, tracee.map + 9, armed.id
        )
        assert await tracee.process.wait() == -signal.SIGBUS

    scenario(play)


def test_ar_not_taken_lets_go() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        assert await tracee.ask("block") == "done"
        await tracee.tell("take 1000")
        await tracee.asleep_in(128)
        armed = await link.arm(tracee.pid, 0.01)
        assert isinstance(armed, Armed)
        assert await armed.wait(30) == NotTaken(armed.id)
        await tracee.free()
        await deliver(link, tracee, tracee.map)  # the request still waits
        assert await tracee.line() == f"TOOK 7 5 {tracee.map:x} 12"

    scenario(play)


def test_ar_in_a_stopped_process_not_taken_stays_stopped() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        os.kill(tracee.pid, signal.SIGSTOP)
        await until(lambda: status_of(tracee.pid).state == "T")
        armed = await link.arm(tracee.pid, 0.01)
        assert isinstance(armed, Armed)
        assert await armed.wait(30) == NotTaken(armed.id)
        await tracee.free()
        await until(lambda: status_of(tracee.pid).state == "T")  # on its way back into the group stop
        os.kill(tracee.pid, signal.SIGCONT)
        assert await tracee.ask("count") == "counted 0"

    scenario(play)


async def consume_armed(link: TracerLink, tracee: Tracee, arms: int) -> list[Delivered]:
    """Send several requests for one fault; return all reports."""
    armed = [await link.arm(tracee.pid, 30) for _ in range(arms)]
    assert await tracee.ask("touch 0") == f"BUS 4 {tracee.map:x} 12 {tracee.pid}"
    reports = []
    for one in armed:
        assert isinstance(one, Armed)
        report = await one.wait(30)
        assert isinstance(report, Delivered)
        assert report.id == one.id
        reports.append(report)
    return reports


def test_all_arms_of_one_fault_have_one_serial() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee, other = await start(), await start()
        serials = []
        for one in (tracee, other):
            os.truncate(one.file, 0)
        for one, arms in ((tracee, 3), (tracee, 1), (other, 2), (tracee, 2)):
            reports = await consume_armed(link, one, arms)
            assert len({report.serial for report in reports}) == 1
            assert [report.id == report.serial for report in reports] == [False] * (arms - 1) + [True]
            serials.append(reports[0].serial)
        assert len(set(serials)) == len(serials)

    scenario(play)


def test_a_new_tracer_does_not_repeat_a_serial() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        os.truncate(tracee.file, 0)
        serials = set()
        for _ in range(3):
            serials |= {report.serial for report in await consume_armed(link, tracee, 2)}
            assert link.pid is not None
            os.kill(link.pid, signal.SIGKILL)
            await until(lambda: link.pid is None)
        assert len(serials) == 3

    scenario(play)


def test_ao_and_ar_on_one_thread() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        os.truncate(tracee.file, 0)
        for n in range(20):
            armed = await link.arm(tracee.pid, 30)
            assert isinstance(armed, Armed)
            sent = [await link.send_ao(tracee.pid, tracee.pid, tracee.map + 4096 * k) for k in range(3)]
            await tracee.tell(f"touch {n}")
            seen = [await tracee.line() for _ in range(4)]  # the handler of the AO returns into the touch
            for pending in sent:
                assert isinstance(await pending.wait(30), Delivered)
            assert isinstance(await armed.wait(30), Delivered)
            assert [line for line in seen if line.startswith("BUS 4")] == [
                f"BUS 4 {tracee.map + n:x} 12 {tracee.pid}"
            ]
            assert [line for line in seen if line.startswith("BUS 5")] == [
                f"BUS 5 {tracee.map + 4096 * k:x} 12 {tracee.pid}" for k in range(3)
            ]

    scenario(play)
