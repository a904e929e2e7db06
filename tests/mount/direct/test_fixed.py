"""Mappings at addresses that the program chooses: MAP_FIXED outside the zone, and hints.

The steps are in tests/victims/fixed.c.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daxemu.uapi import BUS_MCEERR_AO, BUS_MCEERR_AR
from tests.host.direct.supervised import agents
from tests.support.actor import compile_victim
from tests.support.forwarded import eventually
from tests.support.mount import DAXEMU, DaxMount

pytestmark = [pytest.mark.mount, pytest.mark.timeout(120)]

LIMIT = 60
"""Time limit of a program in seconds. A hang fails the test."""
PAGE = 4096
STEPS = (
    "reservation",
    "parts",
    "moves",
    "fork",
    "protection",
    "hint",
    "advice",
    "churn",
    "future",
    "limits",
    "times",
)


@pytest.fixture
def program() -> Path:
    return compile_victim("fixed")


def argv(mount: DaxMount, program: Path, step: str) -> list[str]:
    files = [mount.make_file(name, 16) for name in "fghi"]
    return [*DAXEMU, "run", str(mount.path), "--", str(program), step, *map(str, files)]


@pytest.mark.parametrize("step", STEPS)
def test_step(dax_mount: DaxMount, program: Path, step: str) -> None:
    done = subprocess.run(argv(dax_mount, program, step), capture_output=True, text=True, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stderr
    assert not dax_mount.events("UnexpectedError")
    assert not dax_mount.events("DirectMappingRefused")


@contextmanager
def waiting(mount: DaxMount, program: Path) -> Iterator[subprocess.Popen[str]]:
    """A program that has loaded page d of a file, and loads each page that it is asked for."""
    words = argv(mount, program, "wait")
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True, bufsize=1) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()
            yield process
        finally:
            process.kill()


def load(process: subprocess.Popen[str], page: str) -> str:
    """Return the letter of a page, or the signal of the load, as words."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(page + "\n")
    return process.stdout.readline().strip()


def test_poison_is_signalled_by_its_address(dax_mount: DaxMount, program: Path) -> None:
    """AR of a load, with the address of the byte, and AO of a page that is present."""
    with waiting(dax_mount, program) as process:
        dax_mount.run("set", dax_mount.path, "early_kill=1")
        dax_mount.inject("f", (4 * PAGE, PAGE))
        assert load(process, "e") == f"{int(signal.SIGBUS)} {BUS_MCEERR_AR} {4 * PAGE + 5} 12"
        assert load(process, "d") == "D"
        dax_mount.inject("f", (3 * PAGE, PAGE))
        assert eventually(lambda: len(dax_mount.events("SignalSent")) == 2)
        sent = [(each["code"], each["result"]) for each in dax_mount.events("SignalSent")]
        assert sent == [(BUS_MCEERR_AR, "delivered"), (BUS_MCEERR_AO, "delivered")]
        assert load(process, "f") == "F"


def test_a_load_after_a_failed_system_call_is_ar(dax_mount: DaxMount, program: Path) -> None:
    """The marker by which the call fails is gone before the thread leaves the kernel."""
    words = argv(dax_mount, program, "calls")
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "mapped\n"
        dax_mount.inject("f", (3 * PAGE, PAGE))
        assert (process.communicate("\n", timeout=LIMIT)[0], process.returncode) == ("ok\n", 0)
    assert not dax_mount.events("UnexpectedError")


def test_calls_bring_in_pages_up_to_poison(dax_mount: DaxMount, program: Path) -> None:
    words = argv(dax_mount, program, "populate")
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        dax_mount.inject("f", (3 * PAGE, PAGE))
        assert (process.communicate("\n", timeout=LIMIT)[0], process.returncode) == ("ok\n", 0)
    assert not dax_mount.events("UnexpectedError")


def test_after_the_supervisor_was_killed_every_access_is_sigbus(dax_mount: DaxMount, program: Path) -> None:
    dax_mount.sound = False
    with waiting(dax_mount, program) as process:
        os.kill(dax_mount.json("status", dax_mount.path)["pid"], signal.SIGKILL)
        assert eventually(lambda: not agents(dax_mount.device / "media"))
        for page in "dep":
            number, code, offset, _ = load(process, page).split()
            assert (int(number), int(code), int(offset)) == (signal.SIGBUS, 2, (ord(page) - 97) * PAGE + 5)


def test_after_a_removal_every_access_is_sigbus(dax_mount: DaxMount, program: Path) -> None:
    dax_mount.sound = False
    with waiting(dax_mount, program) as process:
        dax_mount.umount("--force")
        for page in "dep":
            assert load(process, page).split()[:2] == [str(int(signal.SIGBUS)), "2"]
