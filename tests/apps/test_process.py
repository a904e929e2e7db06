"""Processes of programs: lines, limits, ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daxemu.apps.process import Ended, Process, TimedOut, describe

Start = Callable[..., Process]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function to start a shell script; kill every started process afterwards."""
    started = []

    def go(script: str, limit: float = 10.0) -> Process:
        started.append(Process(["sh", "-c", script], limit, tmp_path, dict(os.environ)))
        return started[-1]

    yield go
    for process in started:
        assert process.kill()


def test_until_returns_lines_up_to_a_match_and_lines_the_next_ones(start: Start) -> None:
    process = start("echo one; echo two; echo three; read line; echo got $line")
    assert process.until("two") == ["one", "two"]
    assert process.lines(1) == ["three"]
    process.send("it\n")
    assert process.until("got") == ["got it"]
    assert process.end() == 0


def test_stderr_precedes_later_stdout(start: Start) -> None:
    process = start("echo wrong >&2; echo done; sleep 60")
    assert process.until("done") == ["wrong", "done"]


def test_silence_times_out(start: Start) -> None:
    with pytest.raises(TimedOut, match=r"no output for 0\.2 s"):
        start("sleep 60", limit=0.2).until("anything")


def test_more_data_than_a_pipe_holds_passes_both_ways(start: Start) -> None:
    process = start("cat; echo end")
    process.send("a line\n" * 100_000)
    assert process.lines(100_000)[-1] == "a line"
    assert process.end() == 0


def test_a_process_that_reads_no_input_times_out(start: Start) -> None:
    with pytest.raises(TimedOut, match=r"no input accepted for 0\.2 s"):
        start("sleep 60", limit=0.2).send("a line\n" * 100_000)


def test_an_early_end_raises_ended_with_the_signal(start: Start) -> None:
    process = start("echo no newline at the end | tr -d '\\n'; kill -SEGV $$")
    with pytest.raises(Ended) as ended:
        process.until("anything")
    assert ended.value.status == -signal.SIGSEGV
    assert process.output == ["no newline at the end"]
    assert describe(-signal.SIGSEGV) == "killed by SIGSEGV"


def test_kill_ends_descendants_too(start: Start) -> None:
    process = start("setsid sh -c 'echo $$; sleep 60' & wait")
    (pid,) = process.lines(1)
    assert process.kill()
    state = Path("/proc", pid, "stat")
    deadline = time.monotonic() + 30
    while state.exists() and state.read_text().split()[2] not in "ZX":
        assert time.monotonic() < deadline, "the child lives"
        time.sleep(0.01)


def test_core_files_are_disabled(start: Start) -> None:
    process = start("ulimit -c")
    assert process.lines(1) == ["0"]
