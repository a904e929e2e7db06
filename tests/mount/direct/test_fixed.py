"""Mappings at addresses that the program chooses: MAP_FIXED outside the zone, and hints.

The steps are in tests/victims/fixed.c.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.actor import compile_victim
from tests.support.forwarded import eventually
from tests.support.mount import DAXEMU, DaxMount

pytestmark = [pytest.mark.mount, pytest.mark.timeout(120)]

LIMIT = 60
"""Time limit of a program in seconds. A hang fails the test."""
PAGE = 4096
STEPS = ("reservation", "parts", "moves", "fork", "protection", "hint", "advice", "churn")


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
