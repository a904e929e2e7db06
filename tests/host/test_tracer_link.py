"""Link to the tracer: end, restart, and many requests at once."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import trio

from daxemu.host.proc import progress
from daxemu.host.tracer.beside import LIMIT
from daxemu.host.tracer.link import Armed, TracerLink
from daxemu.host.tracer.messages import Delivered, Gone, Refused, TraceFork
from tests.host.tracee import Start, Tracee, consume, deliver, scenario, status_of, tracees, until

pytestmark = pytest.mark.usefixtures("way")


def test_tracer_killed_then_restarted() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        armed = await link.arm(tracee.pid, 1000)
        assert isinstance(armed, Armed)
        first = link.pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        outcome = await armed.wait(30)
        assert isinstance(outcome, Refused)
        assert outcome.reason == "the tracer died"
        await deliver(link, tracee, tracee.map)
        assert await tracee.line() == f"BUS 5 {tracee.map:x} 12 {tracee.pid}"
        assert link.pid != first

    scenario(play)


@pytest.mark.parametrize("busy", [True, False])
def test_a_tracer_that_gets_no_processor_is_awaited(monkeypatch: pytest.MonkeyPatch, busy: bool) -> None:
    """The tracer stands still for longer than the patience. A tracer that wants to run is awaited."""
    monkeypatch.setattr(progress, "runtime", lambda tid: 0 if busy else None)

    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        assert link.pid is not None
        os.kill(link.pid, signal.SIGSTOP)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(continue_later, link.pid)
                armed = await link.arm(tracee.pid, 1000, patience=0.05)
                pending = await link.send_ao(tracee.pid, tracee.pid, tracee.map)
                outcome = await link.settled(pending, trio.current_time(), 0.05)
        finally:
            os.kill(link.pid, signal.SIGCONT)
        if busy:
            assert isinstance(armed, Armed)
            assert isinstance(outcome, Delivered)
        else:
            assert isinstance(armed, Refused)
            assert armed.reason == "the tracer did not answer in time"
            assert outcome is None

    async def continue_later(pid: int) -> None:
        await trio.sleep(1.0)
        os.kill(pid, signal.SIGCONT)

    scenario(play)


def test_closing_lets_everything_go() -> None:
    async def main() -> None:
        with trio.fail_after(60):
            async with tracees() as start:
                running, stopped = await start(), await start()
                os.kill(stopped.pid, signal.SIGSTOP)
                async with TracerLink.open() as link:
                    pid = link.pid
                    assert isinstance(await link.arm(running.pid, 1000), Armed)
                    await link.send_ao(stopped.pid, stopped.pid, 0)
                    await until(lambda: status_of(stopped.pid).tracer != 0)
                with pytest.raises(ProcessLookupError):
                    os.kill(pid or 0, 0)
                assert status_of(running.pid).tracer == status_of(stopped.pid).tracer == 0
                assert await running.ask("count") == "counted 0"
                os.kill(stopped.pid, signal.SIGCONT)
                assert await stopped.ask("count") == "counted 0"

    trio.run(main)


def test_fifty_tracees_at_once_and_a_callback_for_each() -> None:
    outcomes: list[object] = []

    async def main() -> None:
        with trio.fail_after(60):
            async with tracees() as start, TracerLink.open(outcomes.append) as link:
                all_of_them = [await start() for _ in range(50)]
                for tracee in all_of_them:
                    os.truncate(tracee.file, 0)

                async def one(tracee: Tracee) -> None:
                    await deliver(link, tracee, tracee.map + 1)
                    assert (await tracee.line()).startswith("BUS 5 ")
                    await consume(link, tracee, 4096)

                async with trio.open_nursery() as nursery:
                    for tracee in all_of_them:
                        nursery.start_soon(one, tracee)

    trio.run(main)
    assert len(outcomes) == 100
    assert all(isinstance(outcome, Delivered) for outcome in outcomes)


def test_thousands_in_flight_do_not_deadlock() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        gone = [await link.send_ao(1 << 22, 1 << 22, n) for n in range(5000)]
        for pending in gone:
            assert await pending.wait(30) == Gone(pending.id)

    scenario(play)


def test_what_the_tracer_writes_to_stderr_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """The last output of an ending tracer is logged, too, such as a traceback."""

    def said() -> list[str]:
        return [record.details for record in caplog.records if record.name == "daxemu.host.tracer.link"]  # type: ignore[attr-defined]

    async def main() -> None:
        with trio.fail_after(60):
            async with TracerLink.open() as link:
                stderr = os.open(f"/proc/{link.pid}/fd/2", os.O_WRONLY)
                try:
                    os.write(stderr, b"first\nwords \xff\n")
                    await until(lambda: said() == ["first\nwords \udcff\n"])
                    os.write(stderr, b"last words\n")
                finally:
                    os.close(stderr)

    trio.run(main)
    assert said()[1:] == ["last words\n"]


def threads_of(link: TracerLink) -> int:
    return len(list(Path(f"/proc/{link.pid}/task").iterdir()))


def test_more_stuck_victims_than_threads_for_them() -> None:
    """Victims beyond the limit are postponed; none of them delays a running victim."""
    stuck = LIMIT + 4

    async def play(link: TracerLink, start: Start) -> None:
        tracees = [await start() for _ in range(stuck)]
        running = await start()
        for tracee in tracees:
            os.kill(tracee.pid, signal.SIGSTOP)
        await until(lambda: all(status_of(tracee.pid).state == "T" for tracee in tracees))
        pending = [await link.send_ao(tracee.pid, tracee.pid, tracee.map) for tracee in tracees]
        await until(lambda: all(each.is_asleep for each in pending))
        assert sorted(each.limit or 0 for each in pending) == [0] * LIMIT + [LIMIT] * (stuck - LIMIT)
        await deliver(link, running, running.map)
        assert all(each.outcome is None for each in pending)
        assert threads_of(link) == 1 + LIMIT
        for tracee in reversed(tracees):
            os.kill(tracee.pid, signal.SIGCONT)
            assert await tracee.line() == f"BUS 5 {tracee.map:x} 12 {tracee.pid}"
        for each in pending:
            assert isinstance(await each.wait(30), Delivered)
        await until(lambda: threads_of(link) == 1)

    scenario(play)


def test_requests_of_any_size_in_a_row_reach_the_tracer() -> None:
    """A request with the code of an agent is long: fewer of them fit into a packet."""

    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        drop = ((1 << 46, 1 << 30),) * 256
        request = TraceFork(0, 1 << 22, 1 << 22, 0, 0, 0, bytes(600), 0, drop=drop)
        async with trio.open_nursery() as nursery:
            for _ in range(200):
                nursery.start_soon(link.make_agent, request)
        await deliver(link, tracee, tracee.map)
        assert await tracee.line() == f"BUS 5 {tracee.map:x} 12 {tracee.pid}"

    scenario(play)
