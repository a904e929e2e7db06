"""The tracer on real processes: threads without PTRACE_SEIZE, and ending threads."""

from __future__ import annotations

import subprocess
import sys

import pytest
import trio

from daxemu.host.tracer.link import Armed, TracerLink
from daxemu.host.tracer.messages import Gone, Refused
from tests.host.tracee import Start, scenario

pytestmark = pytest.mark.usefixtures("way")


def test_already_traced() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        code = (
            f"from daxemu.host.tracer import ptrace; ptrace.seize({tracee.pid}); print(flush=True); input()"
        )
        other = await trio.lowlevel.open_process(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        try:
            assert other.stdout is not None
            await other.stdout.receive_some()
            refused = await link.arm(tracee.pid)
            assert isinstance(refused, Refused)
            assert refused.reason.startswith(f"already traced by PID {other.pid} (python")
            assert not refused.signalled
            outcome = await (await link.send_ao(tracee.pid, tracee.pid, tracee.map)).wait(30)
            assert isinstance(outcome, Refused)
            assert outcome.signalled
        finally:
            other.kill()
            await other.wait()
        assert (await tracee.line()).startswith("BUS -6 ")

    scenario(play)


def test_gone() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        armed = await link.arm(tracee.pid, 1000)
        assert isinstance(armed, Armed)
        await tracee.tell("quit")
        assert await armed.wait(30) == Gone(armed.id)
        assert await tracee.process.wait() == 0
        assert isinstance(await link.arm(tracee.pid), Gone)
        pending = await link.send_ao(tracee.pid, tracee.pid, 0)
        assert await pending.wait(30) == Gone(pending.id)

    scenario(play)


def test_exec_in_a_thread_ends_them_all() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        tids = [tracee.pid] + [int((await tracee.ask(word)).split()[1]) for word in ("thread", "exec")]
        held = [await link.arm(tid, 1000) for tid in tids]
        await tracee.tell("")
        for armed in held:
            assert isinstance(armed, Armed)
            assert await armed.wait(30) == Gone(armed.id)
        assert (await tracee.line()).startswith("ready")
        await tracee.free()

    scenario(play)


def test_exec_in_an_unheld_thread_ends_the_held_leader() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        await tracee.ask("exec")
        armed = await link.arm(tracee.pid, 1000)
        assert isinstance(armed, Armed)
        await tracee.tell("")
        assert await armed.wait(30) == Gone(armed.id)  # the kernel does not report this: the sweep finds it
        assert (await tracee.line()).startswith("ready")

    scenario(play)


def test_exec_of_a_single_thread() -> None:
    async def play(link: TracerLink, start: Start) -> None:
        tracee = await start()
        armed = await link.arm(tracee.pid, 1000)
        assert isinstance(armed, Armed)
        assert (await tracee.ask("execself")).startswith("ready")
        assert await armed.wait(30) == Gone(armed.id)
        await tracee.free()

    scenario(play)
