"""The helper of a ``daxemu run`` stopped or killed, on a real direct mount: nothing else waits or hangs."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.forwarded import helper_of
from tests.support.mount import DAXEMU, PATIENCE, DaxMount

pytestmark = pytest.mark.mount

_OBEYS = """
import mmap, os, sys
file = open("f", "r+b")
maps = []
def map():
    maps.append(mmap.mmap(file.fileno(), 4 * 4096))
    return chr(maps[-1][0])
def store():
    maps[0][4096] = 90
    return chr(maps[0][4096])
def fork():
    if not (pid := os.fork()):
        os._exit(maps[0][0] != 65)
    return os.wait()[1]
print("ready", flush=True)
for line in sys.stdin:
    try:
        print(globals()[line.strip()](), flush=True)
    except OSError as error:
        print("errno", error.errno, flush=True)
"""
_ENODEV, _ENOSYS = "errno 19", "errno 38"


class Program:
    """A program under ``daxemu run`` that does one step for each line."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.helper = helper_of(process)

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def has_said(self, patience: float) -> bool:
        """Wait for a line."""
        assert self.process.stdout is not None
        return bool(select.select([self.process.stdout], [], [], patience)[0])

    def hear(self) -> str:
        assert self.has_said(PATIENCE), "the program hangs"
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, word: str) -> str:
        self.tell(word)
        return self.hear()

    @contextmanager
    def stopped_helper(self) -> Iterator[None]:
        os.kill(self.helper, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.helper, signal.SIGCONT)


@contextmanager
def program(mount: DaxMount) -> Iterator[Program]:
    argv = [*DAXEMU, "run", str(mount.path), "--", sys.executable, "-c", _OBEYS]
    process = subprocess.Popen(argv, cwd=mount.path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Program(process)
    finally:
        process.kill()
        process.communicate(timeout=PATIENCE)


def test_a_stopped_helper_delays_its_program_alone(dax_mount: DaxMount) -> None:
    dax_mount.make_file("f", 4)
    with program(dax_mount) as one, program(dax_mount) as other:
        assert (one.ask("map"), other.ask("map")) == ("A", "A")
        with one.stopped_helper():
            one.tell("map")
            assert other.ask("store") == "Z"
            assert (other.ask("map"), other.ask("fork")) == ("A", "0")
            dax_mount.inject("f", (8192, 4096))
            os.truncate(dax_mount.path / "f", 8192)
            os.truncate(dax_mount.path / "f", 16384)
            assert not one.has_said(0)
        assert one.hear() == "A"
        assert one.ask("fork") == "0"


def test_a_mount_ends_while_a_helper_is_stopped(dax_mount: DaxMount) -> None:
    dax_mount.make_file("f", 4)
    with program(dax_mount) as one:
        assert one.ask("map") == "A"
        with one.stopped_helper():
            one.tell("map")
            dax_mount.umount("--force")
        assert one.hear() == _ENODEV


def test_a_program_ends_while_its_helper_is_stopped(dax_mount: DaxMount) -> None:
    dax_mount.make_file("f", 4)
    with program(dax_mount) as one:
        assert one.ask("map") == "A"
        with one.stopped_helper():
            one.tell("map")
            one.process.kill()
            assert one.process.wait(PATIENCE) == -signal.SIGKILL


@pytest.mark.parametrize("word", ["map", "fork"])
@pytest.mark.parametrize("delay", [0, 2, 5, 10, 20])
def test_a_killed_helper_ends_calls_and_no_mapping(dax_mount: DaxMount, word: str, delay: int) -> None:
    """At any moment of a call, the first mmap(2) included: the call is done, or ENOSYS."""
    dax_mount.make_file("f", 4)
    with program(dax_mount) as one:
        if word == "fork":
            assert one.ask("map") == "A"
        one.tell(word)
        time.sleep(delay / 1000)
        os.kill(one.helper, signal.SIGKILL)
        said = one.hear()
        assert said in (_ENOSYS, "A" if word == "map" else "0")
        assert one.ask("fork") == _ENOSYS
        if word == "fork" or said == "A":
            assert one.ask("store") == "Z"
            assert (dax_mount.path / "f").read_bytes()[4096:4097] == b"Z"
    assert dax_mount.events("UnexpectedError") == []
