"""Cost of the filters of daxemu run for system calls that concern no direct mount."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.bench.contenders import compiled
from tests.bench.report import Line, interleaved, record

pytestmark = [
    pytest.mark.bench,
    pytest.mark.timeout(600),
    pytest.mark.skipif(os.geteuid() != 0, reason="direct mappings need root"),
]

SECTION = "Programs under daxemu run"
BARE, SMALL, DIRECT = "without", "page cache", "direct"
FLOOR = "a notification alone, in C"
ROUNDS = 7
START = """
import sys
from daxemu.host.run import helper
from daxemu.host.run.runner import execute
helper.mounts = lambda process: []
kind, *command = sys.argv[1:]
execute(command, None, lambda *_: 0, (lambda *_: False) if kind == "direct" else None)
"""


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    here, directory = Path(__file__), tmp_path_factory.mktemp("calls")
    compiled(here.with_name("direct_floor.c"), directory, "-D_GNU_SOURCE", "-pthread")
    return compiled(here.with_name("calls.c"), directory)


def microseconds(calls: Path, side: str, words: list[str]) -> float:
    start = [] if side == BARE else [sys.executable, "-c", START, side]
    done = subprocess.run([*start, calls, *words], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout) * 1e6


def of_a_notification(floor: Path, file: str) -> float:
    done = subprocess.run([floor, "mmap", file], stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout) * 1e6


@pytest.mark.parametrize(
    ("name", "words", "target"),
    [
        ("getppid", ["getppid", "3000"], 0.95),
        ("madvise", ["madvise", "2000"], 0.95),
        ("mmap, anonymous", ["anonymous", "20000"], 0.9),
        ("mmap of a file elsewhere", ["file", "5000", "/usr/bin/env"], 1 / 3),
        ("mmap of a file in tmpfs", ["file", "5000", "/dev/shm/calls"], 1 / 3),
        ("fork, exit, wait", ["fork", "300"], 1 / 3),
        ("spawn of /bin/true, wait", ["exec", "300"], 1 / 3),
    ],
)
def test_calls_not_concerned(calls: Path, name: str, words: list[str], target: float) -> None:
    file = Path("/dev/shm/calls")
    file.write_bytes(bytes(4096))
    try:
        sides = {side: partial(microseconds, calls, side, words) for side in (DIRECT, SMALL, BARE)}
        if words[0] == "file":
            sides[FLOOR] = partial(of_a_notification, calls.with_name("direct_floor"), words[-1])
        figures = interleaved(sides, ROUNDS)
    finally:
        file.unlink()
    # Any filter, even today's, costs each system call 40 ns in the kernel.
    against = SMALL if name in ("getppid", "madvise") else BARE
    record(Line(SECTION, name, "us", figures, against=against, target=target))
