"""FUSE requests of every kind, well-formed and damaged, into host/fuse/answers.c."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import time

import pytest

from daxemu.host.fuse import supplement

pytestmark = pytest.mark.skipif(
    not supplement.READS, reason="libfuse before 3.14: answers.c reads no requests"
)

SECONDS = float(os.environ.get("DAXEMU_FUZZ_SECONDS", "0"))
ROUNDS = 3000


def _fuzz(seed: int) -> int:
    """Fuzz in a separate process: a crash of C does not end the test run. Return the number of requests that
    C answered.
    """
    code = f"from tests.fuzz.answers import fuzz; print(fuzz({seed}, {ROUNDS}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, f"seed {seed}: exit {done.returncode}\n{done.stderr}"
    return int(done.stdout)


def test_requests() -> None:
    assert _fuzz(1) > ROUNDS


@pytest.mark.skipif(not SECONDS, reason="make fuzz: DAXEMU_FUZZ_SECONDS says for how long")
@pytest.mark.timeout(0)
def test_more_requests() -> None:
    until = time.monotonic() + SECONDS
    while time.monotonic() < until:
        _fuzz(random.getrandbits(32))
