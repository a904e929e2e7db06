"""A victim without progress towards its signal delays no other victim."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.actor import Actor, compile_victim
from tests.support.mount import PATIENCE
from tests.support.scene import FAR, PAGE, Scene, ao, ar, consumes, second_tracer, signals_of

pytestmark = pytest.mark.mount

BAD = 1
FREEZER = Path("/sys/fs/cgroup/freezer")
UNIFIED = (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified"))


@contextmanager
def frozen_v1(actor: Actor) -> Iterator[None]:
    """Freeze a process in a cgroup of version 1."""
    group = FREEZER / f"daxemu-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no freezer cgroup of version 1 to be had: {error}")
    try:
        (group / "cgroup.procs").write_text(str(actor.pid))
        (group / "freezer.state").write_text("FROZEN")
        until(lambda: (group / "freezer.state").read_text() == "FROZEN\n")
        yield
    finally:
        (group / "freezer.state").write_text("THAWED")
        os.kill(actor.pid, signal.SIGCONT)
        (FREEZER / "cgroup.procs").write_text(str(actor.pid))
        group.rmdir()


@contextmanager
def frozen_v2(actor: Actor) -> Iterator[None]:
    """Freeze a process in a cgroup of version 2."""
    home = next((root for root in UNIFIED if (root / "cgroup.procs").exists()), None)
    if home is None:
        pytest.skip("no cgroup of version 2 to be had")
    group = home / f"daxemu-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup of version 2 to be had: {error}")
    try:
        (group / "cgroup.procs").write_text(str(actor.pid))
        (group / "cgroup.freeze").write_text("1")
        until(lambda: "frozen 1" in (group / "cgroup.events").read_text())
        yield
    finally:
        (group / "cgroup.freeze").write_text("0")
        (home / "cgroup.procs").write_text(str(actor.pid))
        until(lambda: "populated 0" in (group / "cgroup.events").read_text())
        group.rmdir()


@contextmanager
def stopped(actor: Actor) -> Iterator[None]:
    os.kill(actor.pid, signal.SIGSTOP)
    until(lambda: state(actor) in "Tt")
    try:
        yield
    finally:
        os.kill(actor.pid, signal.SIGCONT)


@contextmanager
def stopped_and_frozen(actor: Actor) -> Iterator[None]:
    """Stop and freeze a process: PTRACE_SEIZE sleeps until the thaw."""
    os.kill(actor.pid, signal.SIGSTOP)
    until(lambda: state(actor) in "Tt")
    with frozen_v1(actor):
        yield


def state(actor: Actor | subprocess.Popen[str]) -> str:
    return Path(f"/proc/{actor.pid}/stat").read_text().rpartition(") ")[2][0]


def until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("held", [stopped, frozen_v1, frozen_v2, stopped_and_frozen])
def test_the_others_are_signalled_exactly(
    early: Scene, held: Callable[[Actor], AbstractContextManager[None]]
) -> None:
    stuck = early.mapper("p0", touch=[BAD])
    others = [early.mapper(f"p{n}", touch=[BAD]) for n in range(1, 4)]
    with held(stuck):
        early.poison(BAD)
        for other in others:
            assert signals_of(other) == [ao(BAD)]
            consumes(other, f"tr 0 {BAD}", ar(BAD))
        early.poison(BAD + 1)
        (result,) = [e["result"] for e in early.signal_events(stuck)][:1]
        assert result == "pending"
    signal_ = stuck.wait_signal()
    assert (signal_.code, signal_.addr) == ("BUS_MCEERR_AO", f"m0+{BAD * PAGE:#x}")
    until(lambda: "delivered" in [e["result"] for e in early.signal_events(stuck)])


@contextmanager
def started(program: str, path: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Start a program of tests/victims, wait for "ready"; the program runs until stdin ends."""
    command: list[str | Path] = [compile_victim(program), path, *arguments]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("held", [stopped, frozen_v2, stopped_and_frozen])
def test_beside_a_storm_of_faults(
    early: Scene, held: Callable[[Actor], AbstractContextManager[None]]
) -> None:
    """inject returns while the victim is stuck: each verb has ``PATIENCE``; the other victim is signalled."""
    storm, bad = BAD + FAR, BAD
    stuck, other = early.mapper("p0", touch=[bad]), early.mapper("p1", touch=[bad])
    early.poison(storm)
    with ExitStack() as peekers:
        for _ in range(8):
            peekers.enter_context(started("peeker", early.mount.path / "f", str(storm)))
        with held(stuck):
            early.poison(bad)
            assert signals_of(other) == [ao(bad)]
            assert [e["result"] for e in early.signal_events(stuck)] == ["pending"]
        assert stuck.wait_signal().code == "BUS_MCEERR_AO"


def test_a_victim_in_vfork(early: Scene) -> None:
    """A victim in vfork(2) takes the signal when the child has ended. The child, which shares the mm, and
    other victims take the signal at once.
    """
    path = early.mount.path / "f"
    with started("waiter", path, str(BAD), "vfork") as stuck:
        until(lambda: state(stuck) == "D")
        other = early.mapper("p1", touch=[BAD])
        early.poison(BAD)
        assert signals_of(other) == [ao(BAD)]
        assert state(stuck) == "D"
        assert stuck.communicate(timeout=PATIENCE)[0] == "5\n5\n"


def test_a_victim_whose_leader_has_ended(early: Scene) -> None:
    """collect_procs() finds no mm of the leader: no AO. The thread's own load is AR."""
    path = early.mount.path / "f"
    with started("waiter", path, str(BAD), "leader") as stuck:
        until(lambda: state(stuck) == "Z")
        other = early.mapper("p1", touch=[BAD])
        early.poison(BAD)
        assert signals_of(other) == [ao(BAD)]
        assert stuck.communicate(timeout=PATIENCE)[0].splitlines()[-1] == "4"


def test_a_victim_stopped_by_a_debugger(early: Scene) -> None:
    """SIGBUS is queued without siginfo, and the event says so; no other victim waits."""
    traced, other = early.mapper("p0", touch=[BAD]), early.mapper("p1", touch=[BAD])
    with second_tracer(traced.pid):
        os.kill(traced.pid, signal.SIGSTOP)
        until(lambda: state(traced) in "tT")
        early.poison(BAD)
        assert signals_of(other) == [ao(BAD)]
        assert [e["result"] for e in early.signal_events(traced)] == ["inexact"]
    os.kill(traced.pid, signal.SIGCONT)
    assert traced.wait_signal().sig == "SIGBUS"
