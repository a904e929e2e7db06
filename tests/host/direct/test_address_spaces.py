"""Address spaces: agents of real programs under the filter."""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from daxemu.host.direct.errors import AddressSpaceGone
from daxemu.host.direct.syscalls import Syscall, mmap_anonymous, munmap
from daxemu.host.direct.userfaultfd import PageFault
from daxemu.host.proc import status
from daxemu.host.tracer import ptrace
from daxemu.uapi import PAGE_SIZE
from tests.host.direct.supervised import Listener, Stage, agents, play
from tests.host.tracee import until

USER = 100_000 + os.getpid()
"""A user of this test run alone: RLIMIT_NPROC counts the processes of a user in the whole machine."""


def write_memory(pid: int, at: int, data: bytes) -> None:
    with open(f"/proc/{pid}/mem", "r+b", buffering=0) as memory:
        os.pwrite(memory.fileno(), data, at)


def files_of(pid: int) -> list[str]:
    """What the descriptors of a process are open for."""
    return [str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()]


def test_a_program_maps_the_media(mapper: str, media: Path) -> None:
    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        assert await program.ask(f"map {media} 4") == "at 0x200000000000"
        assert await program.ask("store 1 x") == "stored"
        assert os.pread(stage.supervisor.media, 1, PAGE_SIZE) == b"x"
        os.pwrite(stage.supervisor.media, b"y", 2 * PAGE_SIZE)
        assert await program.ask("load 2") == f"byte {ord('y')}"
        assert await program.ask("wait") == "wait -1 10"
        (space,) = stage.supervisor.spaces
        assert space.tgid == program.pid
        assert agents(media) == [space.agent.pid]
        assert await program.end() == 0
        await until(lambda: not agents(media))

    play(media, scene)


def test_a_thread_does_not_notice_that_it_makes_an_agent(mapper: str, media: Path) -> None:
    """Registers, errno, descriptors, mask, pending and queued signals, handlers, children: all as before."""

    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        expected = " ".join(
            (
                "zone 1 registers 1 errno 77 fds 1 mask 1 pending 111 queued 2 handlers 1",
                "wait -1 10 caught 0 reaper 0",
            )
        )
        assert await program.ask(f"state {media}") == expected

    play(media, scene)


def test_a_subreaper_gets_no_child(mapper: str, media: Path) -> None:
    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        assert await program.ask("reaper") == "done"
        assert (await program.ask(f"state {media}")).endswith("wait -1 10 caught 0 reaper 1")

    play(media, scene)


def test_a_stopped_program_gets_its_agent_and_stays_stopped(mapper: str, media: Path) -> None:
    """SIGSTOP comes while the thread waits for its first mapping."""

    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        handle, seen = stage.supervisor._handle, trio.Event()

        async def stop_first(run: Any, call: Any) -> None:
            if stage.supervisor._is_ours(call) and not seen.is_set():
                os.kill(program.pid, signal.SIGSTOP)
                seen.set()
            await handle(run, call)

        stage.supervisor._handle = stop_first  # type: ignore[method-assign]
        await program.tell(f"map {media} 1")
        await seen.wait()
        await until(lambda: bool(agents(media)))
        await until(lambda: status.read(program.pid).state == "T")
        os.kill(program.pid, signal.SIGCONT)
        assert await program.line() == "at 0x200000000000"

    play(media, scene)


@pytest.mark.parametrize("end", ["exit", "kill"])
def test_an_agent_ends_with_its_process(mapper: str, media: Path, end: str) -> None:
    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        await program.ask(f"map {media} 4")
        (space,) = stage.supervisor.spaces
        if end == "kill":
            program.process.kill()
        else:
            await program.end()
        await until(lambda: space.is_gone and not agents(media))
        assert stage.supervisor.gone == [space]
        with pytest.raises(AddressSpaceGone):
            await space.agent.run([munmap(0x200000000000, PAGE_SIZE)])

    play(media, scene)


def test_tasks_that_wait_are_woken_at_the_end(mapper: str, media: Path) -> None:
    """A batch that the agent cannot finish, and one behind it."""

    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        await program.ask(f"map {media} 4")
        (space,) = stage.supervisor.spaces
        raised = []

        async def wait(call: Syscall) -> None:
            try:
                await space.agent.run([call])
            except AddressSpaceGone as error:
                raised.append(error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait, Syscall(34, ()))  # pause(2)
            nursery.start_soon(wait, Syscall(34, ()))
            await trio.testing.wait_all_tasks_blocked(0.05)
            program.process.kill()
        assert len(raised) == 2
        await until(lambda: not agents(media))

    play(media, scene)


def test_a_process_whose_agent_never_answers_is_killed(
    mapper: str, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change of a file must not wait for a frozen process, and no stale mapping may stay."""
    monkeypatch.setattr("daxemu.host.direct.agent.ANSWER_PATIENCE", 0.2)

    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        await program.ask(f"map {media} 4")
        (space,) = stage.supervisor.spaces
        os.kill(space.agent.pid, signal.SIGSTOP)
        with pytest.raises(AddressSpaceGone):
            await space.agent.run([Syscall(39, ())])  # getpid(2)
        assert await program.process.wait() == -signal.SIGKILL
        await until(lambda: not agents(media))

    play(media, scene)


def test_a_batch_of_any_length_keeps_its_order(mapper: str, media: Path) -> None:
    """The third call of each triple fails: munmap of no whole page."""

    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        await program.ask(f"map {media} 4")
        (space,) = stage.supervisor.spaces
        at = 0x200100000000
        triple = [mmap_anonymous(at, PAGE_SIZE, 3), munmap(at, PAGE_SIZE), munmap(at + 1, PAGE_SIZE)]
        results: list[list[int]] = []

        async def run() -> None:
            results.append(await space.agent.run(triple * 100))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(run)
        assert results == [[at, 0, -22] * 100] * 3

    play(media, scene)


def test_a_cancelled_batch_does_not_shift_later_results(mapper: str, media: Path) -> None:
    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        await program.ask(f"map {media} 4")
        (space,) = stage.supervisor.spaces
        request = (ctypes.c_int64 * 2)(0, 50_000_000)  # nanosleep(2) reads it from the program's memory
        at = 0x200100000000
        await space.agent.run([mmap_anonymous(at, PAGE_SIZE, 3)])
        write_memory(program.pid, at, bytes(request))
        with trio.move_on_after(0.001) as scope:
            await space.agent.run([Syscall(35, (at, 0))])
        assert scope.cancelled_caught
        assert await space.agent.run([Syscall(39, ())]) == [space.agent.pid]

    play(media, scene)


def test_execve_ends_the_agent_and_the_next_program_gets_another(mapper: str, media: Path) -> None:
    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        await program.ask(f"map {media} 4")
        (space,) = stage.supervisor.spaces
        await program.tell(f"exec {mapper}")
        await until(lambda: space.is_gone and not agents(media))
        assert await program.ask("wait") == "wait -1 10"
        assert (await program.ask(f"map {media} 4")).startswith("at 0x2000")
        (other,) = stage.supervisor.spaces
        assert other is not space
        assert other.tgid == space.tgid == program.pid

    play(media, scene)


def test_a_failed_execve_leaves_the_agent(mapper: str, media: Path) -> None:
    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        await program.ask(f"map {media} 4")
        assert await program.ask("exec /nonexistent") == "exec 2"
        (space,) = stage.supervisor.spaces
        await trio.sleep(0.2)
        assert not space.is_gone
        assert await program.ask("store 0 a") == "stored"

    play(media, scene)


@pytest.mark.usefixtures("way")
def test_the_child_of_a_fork_has_an_agent_of_its_own(mapper: str, media: Path) -> None:
    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        await program.ask(f"map {media} 4")
        (space,) = stage.supervisor.spaces
        child = int((await program.ask("fork")).split()[1])
        copy = await stage.supervisor.spaces.settled(child)
        assert copy is not None
        assert stage.supervisor.forks == [(space, copy)]
        assert copy.tgid == child
        assert len(set(agents(media))) == 2
        assert await program.ask("store 3 c") == "stored"
        assert [event.tid for event in stage.supervisor.events if isinstance(event, PageFault)] == [child]
        assert await program.ask("wait") == "wait -1 10"
        assert (await program.ask(f"map {media} 1")).startswith("at 0x2000")
        assert not [name for pid in (child, program.pid) for name in files_of(pid) if "socket:" in name]
        os.kill(child, signal.SIGKILL)
        assert await program.line() == "child ended 9"
        await until(lambda: agents(media) == [space.agent.pid])

    play(media, scene)


@pytest.fixture(params=["by the code of an agent", "under the tracer"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The two ways of a fork: a program with a seccomp(2) filter of its own forks under the tracer."""
    if request.param == "under the tracer":
        monkeypatch.setattr(Listener, "filters", 0)
    return str(request.param)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize(
    ("command", "forks"), [("forks 10", 10), ("bomb 50", 50), ("threads 8 4", 32), ("stress 10", 10)]
)
def test_every_child_has_an_agent(mapper: str, media: Path, command: str, forks: int) -> None:
    """One after the other, 50 at once, from 8 threads, and while a thread faults."""

    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        stage.supervisor.protects = True
        await program.ask(f"map {media} 64")
        assert await program.ask(command) == "failures 0"
        assert len(stage.supervisor.forks) == forks
        assert await program.ask("wait") == "wait -1 10"
        (space,) = stage.supervisor.spaces
        await until(lambda: agents(media) == [space.agent.pid])

    play(media, scene, 100)


@pytest.mark.usefixtures("way")
def test_a_fork_without_registered_ranges_gives_the_child_a_userfaultfd(mapper: str, media: Path) -> None:
    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        at = int((await program.ask(f"map {media} 4")).split()[1], 16)
        (space,) = stage.supervisor.spaces
        assert await space.agent.run([munmap(at, 4 * PAGE_SIZE)]) == [0]
        await program.ask("fork")
        assert (await program.ask(f"map {media} 4")).startswith("at 0x2000")
        assert await program.ask("store 2 c") == "stored"
        ((_, child),) = stage.supervisor.forks
        assert child.uffd.fd != space.uffd.fd

    play(media, scene)


def test_the_child_of_a_vfork_uses_the_agent_of_its_parent(mapper: str, media: Path) -> None:
    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        await program.ask(f"map {media} 4")
        (space,) = stage.supervisor.spaces
        assert await program.ask("vfork") == "vfork 0"
        assert list(stage.supervisor.spaces) == [space]
        assert [each for each, _, _ in stage.supervisor.maps] == [space, space]

    play(media, scene)


def test_an_agent_made_by_the_child_of_a_vfork_belongs_to_the_parent(mapper: str, media: Path) -> None:
    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        assert await program.ask(f"vfork {media}") == "vfork 0"
        (space,) = stage.supervisor.spaces
        assert space.tgid == program.pid
        assert (await program.ask(f"map {media} 4")).startswith("at 0x2000")
        assert [each for each, _, _ in stage.supervisor.maps] == [space, space]
        assert await program.ask("load 0") == f"byte {ord('V')}"
        assert not space.is_gone
        assert await program.end() == 0
        await until(lambda: space.is_gone)

    play(media, scene)


def test_a_traced_program_is_refused_by_name(mapper: str, media: Path) -> None:
    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        assert await program.ask("wait") == "wait -1 10"
        ptrace.seize(program.pid)
        assert await program.ask(f"map {media} 4") == "error 19"
        ptrace.interrupt(program.pid)
        await trio.to_thread.run_sync(os.waitid, os.P_PID, program.pid, os.WSTOPPED | ptrace.WALL)
        ptrace.detach(program.pid)
        assert stage.supervisor.refusals == [
            f"process {os.getpid()} traces thread {program.pid}, and a thread has one tracer at a time"
        ]
        assert (await program.ask(f"map {media} 4")).startswith("at 0x2000")

    play(media, scene)


def test_a_process_without_room_for_an_agent_is_refused_once(mapper: str, media: Path) -> None:
    """RLIMIT_NOFILE leaves room for the file alone."""

    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        assert await program.ask("wait") == "wait -1 10"
        resource.prlimit(program.pid, resource.RLIMIT_NOFILE, (4, 4))
        assert await program.ask(f"map {media} 4") == "error 19"
        assert agents(media) == []

    play(media, scene)


def test_the_agent_that_is_killed_takes_its_program_along(mapper: str, media: Path) -> None:
    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        await program.ask(f"map {media} 4")
        (space,) = stage.supervisor.spaces
        os.kill(space.agent.pid, signal.SIGKILL)
        assert await program.process.wait() == -signal.SIGKILL
        assert stage.supervisor.gone == [space]

    play(media, scene)


@pytest.mark.usefixtures("way")
def test_a_fork_that_fails_leaves_nothing(mapper: str, media: Path) -> None:
    """RLIMIT_NPROC of another user than root: clone(2) says EAGAIN, to the tracer and to the program."""

    async def scene(stage: Stage) -> None:
        program = await stage.start("/usr/bin/setpriv", "--reuid", str(USER), "--clear-groups", mapper)
        assert await program.ask(f"map {media} 4") == "at 0x200000000000", stage.supervisor.refusals
        assert await program.ask("limit 1") == "done"
        assert await program.ask("fork") == "fork 11"
        assert not [name for name in files_of(program.pid) if "socket:" in name]
        assert await program.ask("limit 100") == "done"
        assert (await program.ask("fork")).startswith("child")
        assert len(stage.supervisor.forks) == 1

    media.touch()
    media.chmod(0o666)
    play(media, scene)


def test_a_program_without_room_for_an_agent_is_refused_and_may_try_again(mapper: str, media: Path) -> None:
    """RLIMIT_NPROC is reached by the first process of the agent."""

    async def scene(stage: Stage) -> None:
        program = await stage.start("/usr/bin/setpriv", "--reuid", str(USER), "--clear-groups", mapper)
        assert await program.ask("wait") == "wait -1 10"
        assert await program.ask("limit 1") == "done"
        assert await program.ask(f"map {media} 4") == "error 19"
        (refusal,) = stage.supervisor.refusals
        assert refusal.endswith("clone: Resource temporarily unavailable")
        assert await program.ask("limit 100") == "done"
        answer = await program.ask(f"map {media} 4")
        assert answer.startswith("at 0x2000"), stage.supervisor.refusals
        assert await program.ask("wait") == "wait -1 10"

    media.touch()
    media.chmod(0o666)
    play(media, scene)


def test_a_traced_program_cannot_fork_once_it_has_mappings(mapper: str, media: Path) -> None:
    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        await program.ask(f"map {media} 4")
        ptrace.seize(program.pid)
        assert await program.ask("fork") == "fork 11"
        program.process.kill()

    play(media, scene)


@pytest.mark.usefixtures("way")
def test_signals_during_forks_are_all_delivered(mapper: str, media: Path) -> None:
    """A timer interrupts forks at any place. Each fork is done once, and each child has its agent."""

    async def scene(stage: Stage) -> None:
        program = await stage.start(mapper)
        stage.supervisor.protects = True
        await program.ask(f"map {media} 64")
        answer = await program.ask("alarmed 20")
        assert answer.startswith("failures 0 signals ")
        assert int(answer.split()[-1]) > 20
        forks = [child for _, child in stage.supervisor.forks]
        assert len(forks) == 20
        assert all(child.tgid for child in forks)
        assert not [name for name in files_of(program.pid) if "socket:" in name]

    play(media, scene)


def test_a_static_program(media: Path, tmp_path: Path) -> None:
    async def scene(stage: Stage) -> None:
        program = await stage.start(str(binary))
        await program.ask(f"map {media} 64")
        assert await program.ask("store 1 x") == "stored"
        assert await program.ask("bomb 5") == "failures 0"

    binary = tmp_path / "mapper"
    source = Path(__file__).parents[2] / "victims/mapper.c"
    done = subprocess.run(["gcc", "-static", "-O1", "-pthread", "-o", binary, source], capture_output=True)
    if done.returncode:
        pytest.skip("no static C library")
    play(media, scene)


def test_python_threads_and_subprocesses(media: Path) -> None:
    script = """
import mmap, subprocess, sys, threading
def work(n):
    with open(sys.argv[1], "r+b") as file:
        at = mmap.mmap(file.fileno(), 16 * 4096)
    at[n * 4096] = 65 + n
    echo = subprocess.run(["/bin/echo", str(n)], capture_output=True).stdout.decode().strip()
    print(echo, at[n * 4096], flush=True)
threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
[t.start() for t in threads]
[t.join() for t in threads]
"""

    async def scene(stage: Stage) -> None:
        program = await stage.start(sys.executable, "-c", script, str(media))
        assert sorted([await program.line() for _ in range(4)]) == [f"{n} {65 + n}" for n in range(4)]
        assert await program.end() == 0
        assert len({space.agent.pid for space, _, _ in stage.supervisor.maps}) == 1
        await until(lambda: not agents(media))

    play(media, scene)
