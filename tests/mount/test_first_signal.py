"""The first signal of a process that loads in a loop is an exact memory failure, never a plain BUS_ADRERR."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.actor import TIMEOUT, compile_victim
from tests.support.mount import DaxMount

pytestmark = pytest.mark.mount

PAGES = 64
AO = "5 12"  # BUS_MCEERR_AO, si_addr_lsb


@contextmanager
def loaders(path: Path, processes: int, threads: int) -> Iterator[list[subprocess.Popen[str]]]:
    """Start processes, with several threads each, to load from every page of ``path``."""
    binary = compile_victim("loader")
    with ExitStack() as ends:
        made = []
        for _ in range(processes):
            one = subprocess.Popen([binary, path, str(threads)], stdout=subprocess.PIPE, text=True)
            ends.callback(one.wait, TIMEOUT)
            ends.callback(one.kill)
            made.append(one)
        for one in made:
            assert one.stdout is not None
            assert one.stdout.readline() == "ready\n"
        yield made


def first_signals(made: list[subprocess.Popen[str]]) -> list[str]:
    return [one.communicate(timeout=TIMEOUT)[0].strip() for one in made]


@pytest.mark.parametrize("again", range(3))
@pytest.mark.parametrize(("processes", "threads"), [(1, 8), (4, 1), (2, 4)])
def test_removal_is_signalled_before_any_access_fails(
    dax_mount: DaxMount, processes: int, threads: int, again: int
) -> None:
    path = dax_mount.make_file("f", PAGES)
    with loaders(path, processes, threads) as made:
        dax_mount.run("remove", dax_mount.path)
        assert first_signals(made) == [AO] * processes


def test_metadata_poison_is_signalled_before_any_access_fails(dax_mount: DaxMount) -> None:
    """One range holds metadata and a file: processes with a mapping of the file get AO, then the filesystem
    shuts down.
    """
    dax_mount.sound = False
    dax_mount.run("set", dax_mount.path, "early_kill=1")
    path = dax_mount.make_file("f", PAGES)
    with loaders(path, 2, 4) as made:
        dax_mount.inject("", (0, 1 << 30))
        first = first_signals(made)
    assert dax_mount.json("status", dax_mount.path)["state"] == "shut down"
    # A load of the poisoned page itself may come first: action required, and exact.
    assert set(first) <= {AO, "4 12"}


def test_a_stopped_victim_holds_a_removal_up_for_a_limited_time(dax_mount: DaxMount) -> None:
    path = dax_mount.make_file("f", PAGES)
    with loaders(path, 2, 1) as made:
        stopped, other = made
        os.kill(stopped.pid, signal.SIGSTOP)
        dax_mount.run("remove", dax_mount.path)
        assert first_signals([other]) == [AO]
        (left,) = [e for e in dax_mount.events("SignalSent") if e["result"] == "pending"]
        assert left["pid"] == stopped.pid
        assert dax_mount.json("status", dax_mount.path)["state"] == "removed"
