"""Fuzz one parser with coverage feedback (atheris, libFuzzer): python -m tests.fuzz TARGET [SECONDS]

A failing input is written to build/fuzz/crash-*; add the input to the seeds with the fix.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
from pathlib import Path

import atheris

BUILD = Path(__file__).resolve().parents[2] / "build" / "fuzz"


def main(name: str, seconds: str = "60") -> None:
    """Fuzz in a child process, because libFuzzer ends its process with _exit(2); the parent cleans up."""
    with tempfile.TemporaryDirectory(prefix=f"daxemu-fuzz-{os.getpid()}-", dir="/dev/shm") as scratch:
        child = multiprocessing.Process(target=fuzz, args=(name, seconds, Path(scratch)))
        child.start()
        child.join()
    sys.exit(child.exitcode != 0)


def fuzz(name: str, seconds: str, scratch: Path) -> None:
    """Fuzz until ``seconds`` are over or an input breaks the target. Ends the process."""
    with atheris.instrument_imports(
        include=["daxemu.protocol", "daxemu.evaluate.plan", "daxemu.fs", "daxemu.pmem", "tomllib"]
    ):
        from tests.fuzz import targets
    targets.scratch = scratch
    target = targets.TARGETS[name]
    corpus = BUILD / name
    corpus.mkdir(parents=True, exist_ok=True)
    # Deep seeds take a second each under instrumentation; tests/fuzz/test_targets.py runs them.
    for number, seed in enumerate(seed for seed in target.seeds if len(seed) < 1000):
        (corpus / f"seed-{number}").write_bytes(seed)
    options = [f"-max_total_time={seconds}", f"-artifact_prefix={BUILD}/crash-{name}-", "-timeout=10"]
    atheris.Setup([sys.argv[0], *options, "-max_len=2048", "-verbosity=1", str(corpus)], target.run)
    atheris.Fuzz()


if __name__ == "__main__":
    main(*sys.argv[1:])
