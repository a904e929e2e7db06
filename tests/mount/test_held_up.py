"""A victim that cannot take its signal holds up itself alone."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from tests.support.actor import Actor
from tests.support.mount import PATIENCE
from tests.support.scene import PAGE, Scene, ao, ar, consumes, told

pytestmark = pytest.mark.mount

BAD = 1
FREEZER = Path("/sys/fs/cgroup/freezer")


@contextmanager
def frozen_v1(actor: Actor) -> Iterator[None]:
    """In a frozen cgroup of version 1."""
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
def stopped(actor: Actor) -> Iterator[None]:
    os.kill(actor.pid, signal.SIGSTOP)
    until(lambda: state(actor) in "Tt")
    yield
    os.kill(actor.pid, signal.SIGCONT)


@contextmanager
def stopped_and_frozen(actor: Actor) -> Iterator[None]:
    """Where ptrace(PTRACE_SEIZE) sleeps until the thaw."""
    os.kill(actor.pid, signal.SIGSTOP)
    until(lambda: state(actor) in "Tt")
    with frozen_v1(actor):
        yield


def state(actor: Actor) -> str:
    return Path(f"/proc/{actor.pid}/stat").read_text().rpartition(") ")[2][0]


def until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("held", [stopped, frozen_v1, stopped_and_frozen])
def test_the_others_are_signalled_exactly(
    early: Scene, held: Callable[[Actor], AbstractContextManager[None]]
) -> None:
    stuck = early.mapper("p0", touch=[BAD])
    others = [early.mapper(f"p{n}", touch=[BAD]) for n in range(1, 4)]
    with held(stuck):
        early.poison(BAD)
        for other in others:
            assert told(other) == [ao(BAD)]
            consumes(other, f"tr 0 {BAD}", ar(BAD))
        early.poison(BAD + 1)
        (result,) = [e["result"] for e in early.signal_events(stuck)][:1]
        assert result == "pending"
    signal_ = stuck.wait_signal()
    assert (signal_.code, signal_.addr) == ("BUS_MCEERR_AO", f"m0+{BAD * PAGE:#x}")
    until(lambda: "delivered" in [e["result"] for e in early.signal_events(stuck)])
