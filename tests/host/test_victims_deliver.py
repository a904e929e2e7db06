"""Deliveries that C completes, and deliveries handed back: real processes, with a script for a tracer."""

from __future__ import annotations

import sys

import pytest
import trio

from daxemu.host import victims
from daxemu.host.proc.file_pages import FilePage
from daxemu.host.tracer.link import TracerLink
from daxemu.host.tracer.messages import Delivered, Gone
from daxemu.uapi import BUS_MCEERR_AO
from tests.host.tracee import Start, Tracee, scenario, tracees

pytestmark = pytest.mark.skipif(victims.MISSING is not None, reason=f"{victims.MISSING}")

# Delivers to each process given, and prints the end of each delivery. Threads handed back are let go.
SCRIPT = """
import sys, time
from daxemu.host.tracer import ptrace
from daxemu.host.proc.file_pages import FilePage
from daxemu.host.tracer.messages import SendAO
from daxemu.host.tracer.deliver_in_c import Deliveries
pids = [int(word) for word in sys.argv[1:]]
deliveries = Deliveries()
requests = [(SendAO(n, pid, pid, 0x5000 + n, 12), 1000 + n) for n, pid in enumerate(pids)]
assert deliveries.begin(requests) == len(pids)
while deliveries:
    for wait in deliveries.reap(8)[1]:
        if wait.sent:
            print("sent", wait.sent.id)
        else:
            print("taken", wait.taken.request.id, wait.taken.cookie)
            ptrace.detach(wait.tid, ptrace.classify(wait.status)[1])
    time.sleep(0.001)
"""


async def ends(*running: Tracee) -> list[str]:
    command = [sys.executable, "-c", SCRIPT, *(str(tracee.pid) for tracee in running)]
    done = await trio.run_process(command, capture_stdout=True)
    return sorted(done.stdout.decode().splitlines())


def test_ordinary_deliveries_are_never_handed_back() -> None:
    async def main() -> None:
        with trio.fail_after(60):
            async with tracees() as start:
                running = [await start() for _ in range(20)]
                assert await ends(*running) == sorted(f"sent {n}" for n in range(20))
                for n, tracee in enumerate(running):
                    assert await tracee.line() == f"BUS 5 {0x5000 + n:x} 12 {tracee.pid}"
                    assert await tracee.ask("count") == "counted 0"

    trio.run(main)


@pytest.mark.parametrize("how", ["block", "ignore"])
def test_other_deliveries_are_handed_back_without_a_signal(how: str) -> None:
    async def main() -> None:
        with trio.fail_after(60):
            async with tracees() as start:
                usual, unusual = await start(), await start()
                assert (await unusual.ask(how)).startswith("done")
                assert await ends(usual, unusual) == ["sent 0", "taken 1 0"]
                assert await unusual.ask("count") == "counted 0"
                assert await usual.line() == f"BUS 5 5000 12 {usual.pid}"

    trio.run(main)


def page_of(tracee: Tracee, pgoff: int) -> FilePage:
    there = tracee.file.stat()
    return FilePage(there.st_dev >> 8, there.st_dev & 0xFF, there.st_ino, pgoff)


def test_the_page_must_be_mapped_at_the_signal() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        for asked, page, told in ((3, 3, 3), (3, 4, 4), (3, 1 << 20, None)):
            address = tracee.map + (asked << 12)
            pending = await link.send_ao(tracee.pid, tracee.pid, address, 12, page_of(tracee, page))
            outcome = await pending.wait(30)
            if told is None:
                assert outcome == Gone(pending.id)
                continue
            there = tracee.map + (told << 12)
            assert outcome == Delivered(pending.id, tracee.pid, BUS_MCEERR_AO, there, pending.id)
            assert await tracee.line() == f"BUS 5 {there:x} 12 {tracee.pid}"

    scenario(play)


def test_another_processs_thread_is_not_signalled() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee, other = await start(), await start()
        pending = await link.send_ao(other.pid, tracee.pid, 0)
        assert await pending.wait(30) == Gone(pending.id)
        await tracee.free()
        assert await tracee.ask("count") == await other.ask("count") == "counted 0"

    scenario(play)


def test_a_second_request_waits_for_the_first() -> None:
    """The requests come in two packets, the second while the first is under way in C."""

    async def play(link: TracerLink, start: Start) -> None:
        crowd = [await start() for _ in range(30)]
        sent = []
        for turn in range(3):
            sent += [(turn, tracee, await link.send_ao(tracee.pid, tracee.pid, turn)) for tracee in crowd]
            await trio.lowlevel.checkpoint()
        for turn, tracee, pending in sent:
            assert await pending.wait(30) == Delivered(
                pending.id, tracee.pid, BUS_MCEERR_AO, turn, pending.id
            )
            assert await tracee.line() == f"BUS 5 {turn:x} 12 {tracee.pid}"

    scenario(play)


def test_a_thread_that_cannot_be_seized_delays_no_other() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        first, last = await start(), await start()
        tids = [first.pid, 1 << 22, last.pid]
        told, gone, told_too = [await link.send_ao(tid, tid, 0x7000) for tid in tids]
        assert await gone.wait(30) == Gone(gone.id)
        for tracee, pending in ((first, told), (last, told_too)):
            assert await pending.wait(30) == Delivered(
                pending.id, tracee.pid, BUS_MCEERR_AO, 0x7000, pending.id
            )
            assert await tracee.line() == f"BUS 5 7000 12 {tracee.pid}"

    scenario(play)
