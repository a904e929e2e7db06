"""A thread has run once it has had a processor for long enough to enter its signal handler."""

from __future__ import annotations

import os
import signal

import pytest

from daxemu.host.proc import progress
from daxemu.host.proc.progress import starves, wait_until_run
from tests.support.actor import Actor


def test_a_thread_asleep_or_gone_is_not_awaited() -> None:
    with Actor.spawn("p0") as p0:
        assert wait_until_run([p0.pid], 30) == []
        pid = p0.pid
    assert wait_until_run([pid], 30) == []


@pytest.mark.parametrize(
    ("runs", "left"), [([5, 5, 6, 400_000], [7]), ([5, 5, 500_005], []), ([5, None], [])]
)
def test_a_moment_in_the_kernel_is_not_enough(
    monkeypatch: pytest.MonkeyPatch, runs: list[int | None], left: list[int]
) -> None:
    """The last runtime stays."""
    looks = iter(runs)
    monkeypatch.setattr(progress, "runtime", lambda tid: next(looks, runs[-1]))
    assert wait_until_run([7], 0.1) == left


def test_a_thread_that_runs_does_not_starve() -> None:
    pid = os.fork()
    if not pid:
        while True:
            pass
    try:
        since = progress.runtime(pid)
        assert since is not None
        assert wait_until_run([pid], 30) == []
        assert not starves(pid, since)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
