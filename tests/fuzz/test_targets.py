"""Every parser against its seeds and some thousand mutations; make fuzz goes further."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.mutate import mutated
from tests.fuzz.targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_seeds(name: str) -> None:
    for seed in TARGETS[name].seeds:
        TARGETS[name].run(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_mutations(name: str) -> None:
    """Mutations of short seeds only: the deep seeds cost a millisecond each."""
    rng = random.Random(name)
    run, seeds, rounds = TARGETS[name]
    short = [seed for seed in seeds if len(seed) < 1000]
    for _ in range(rounds):
        data = mutated(rng, rng.choice(short))
        try:
            run(data)
        except Exception as error:
            raise AssertionError(f"{name} of {data!r}") from error


def test_libfuzzer_leaves_no_directory() -> None:
    """LibFuzzer ends the process with _exit(2)."""
    pytest.importorskip("atheris")
    command = [sys.executable, "-m", "tests.fuzz", "poison", "1"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        _, said = process.communicate()
    assert process.returncode == 0, said
    assert "DONE" in said
    assert not list(Path("/dev/shm").glob(f"daxemu-fuzz-{process.pid}-*"))
