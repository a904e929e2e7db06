"""Rules on a direct mount: each page that a program touches for the first time is an operation."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from daxemu.protocol import AddRule, ListRules
from daxemu.rule import InjectAction, parse_on
from daxemu.uapi import PAGE_SIZE
from tests.support.mount import DaxMount
from tests.support.pages import BIN

pytestmark = pytest.mark.mount
PAGES = 10
LOADS = """
import mmap, sys
file = open(sys.argv[1], "r+b")
mapping = mmap.mmap(file.fileno(), 0)
for page in range(10):
    print("load", page, chr(mapping[page * 4096]), flush=True)
"""
PROGRAM = f"""{LOADS}
for page in range(10):
    mapping[page * 4096] = ord("b")
    print("store", page, flush=True)
for page in range(10):
    assert mapping[page * 4096] == ord("b")
"""


def add(mount: DaxMount, on: str, **fields: Any) -> None:
    with mount.client() as client:
        client.ask(AddRule(parse_on(on), [InjectAction(**fields)]))


def matches(mount: DaxMount) -> list[int]:
    with mount.client() as client:
        return [rule.matched for rule in client.ask(ListRules()).rules]


@pytest.fixture
def path(dax_mount: DaxMount) -> Path:
    path = dax_mount.path / "db"
    path.write_bytes(b"a" * PAGES * PAGE_SIZE)
    return path


def play(mount: DaxMount, path: Path) -> tuple[int, list[str]]:
    """Run the program. Return its exit status, and what it printed."""
    command = [BIN / "daxemu", "run", mount.path, "--", sys.executable, "-c", PROGRAM, path]
    done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, text=True, timeout=60, check=False)
    return done.returncode, done.stdout.splitlines()


def test_the_fourth_page_that_is_loaded(dax_mount: DaxMount, path: Path) -> None:
    add(dax_mount, "load:db:4")
    assert play(dax_mount, path) == (-signal.SIGBUS, ["load 0 a", "load 1 a", "load 2 a"])
    (sent,) = dax_mount.events("SignalSent")
    assert (sent["code"], sent["address"] & 0xFFFFF) == (4, 3 * PAGE_SIZE)


def test_the_third_page_that_is_stored_to(dax_mount: DaxMount, path: Path) -> None:
    add(dax_mount, "store:db:3")
    status, lines = play(dax_mount, path)
    assert status == -signal.SIGBUS
    assert lines[-2:] == ["store 0", "store 1"]
    assert len(lines) == PAGES + 2


def test_each_page_counts_once_for_loads_and_once_for_stores(dax_mount: DaxMount, path: Path) -> None:
    for on in ("load:db:100", "store:db:100", "fault:db:100", "load:other:1"):
        add(dax_mount, on)
    assert play(dax_mount, path)[0] == 0
    assert matches(dax_mount) == [PAGES, PAGES, 2 * PAGES, 0]


def test_a_rule_reaches_pages_that_are_mapped_already(dax_mount: DaxMount, path: Path) -> None:
    program = PROGRAM.replace(LOADS, f"{LOADS}sys.stdin.readline()\n")
    command = [BIN / "daxemu", "run", dax_mount.path, "--", sys.executable, "-c", program, path]
    with subprocess.Popen(
        list(map(str, command)), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as running:
        assert running.stdin is not None
        assert running.stdout is not None
        for _ in range(PAGES):
            assert running.stdout.readline().startswith("load")
        add(dax_mount, "store:db:2")
        running.stdin.write("\n")
        running.stdin.flush()
        assert running.stdout.read().split() == ["store", "0"]
    assert running.returncode == -signal.SIGBUS
