"""Cost of protection: each strategy compared with no protection, on mounts of their own, in one run."""

from __future__ import annotations

import os
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.bench.report import Line, interleaved, record
from tests.support.mount import DaxMount, dax_mount_at

pytestmark = [pytest.mark.bench, pytest.mark.mount, pytest.mark.timeout(600)]

MIB = 1 << 20
FILE_MIB = 64
WRITES = 2000
ROUNDS = 5
STRATEGIES = {
    "none": "none",
    "mirror": "mirror",
    "parity": "parity",
    "parity, 512 B": "parity:slice=512,data=8",
    "async-parity": "async-parity:window=1",
    "quarantine": "quarantine",
}


@pytest.fixture(scope="module")
def mounts() -> Iterator[dict[str, DaxMount]]:
    """A mount with each strategy, with a file of random bytes."""
    data = os.urandom(FILE_MIB * MIB)
    with ExitStack() as stack:
        made = {}
        for name, strategy in STRATEGIES.items():
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            mount = stack.enter_context(dax_mount_at(directory, "1G", mount=False))
            mount.run("mount", mount.device, mount.path, "--repair", strategy)
            (mount.path / "f").write_bytes(data)
            made[name] = mount
        yield made


def race(mounts: dict[str, DaxMount], name: str, unit: str, work: Callable[[Path], float]) -> None:
    """Measure each strategy against ``none``."""
    found = interleaved({each: lambda m=mount: work(m.path / "f") for each, mount in mounts.items()}, ROUNDS)  # type: ignore[misc]
    for strategy in STRATEGIES:
        if strategy != "none":
            figures = {strategy: found[strategy], "none": found["none"]}
            record(Line("Repair", f"{name}, {strategy}", unit, figures, more_is_better=True, against="none"))


def per_second(path: Path, flags: int, work: Callable[[int], float]) -> float:
    fd = os.open(path, flags)
    try:
        began = time.perf_counter()
        amount = work(fd)
        return amount / (time.perf_counter() - began)
    finally:
        os.close(fd)


def test_random_writes(mounts: dict[str, DaxMount]) -> None:
    places = [random.Random(1).randrange(FILE_MIB * 256) * 4096 for _ in range(WRITES)]
    page = os.urandom(4096)

    def work(fd: int) -> float:
        for place in places:
            os.pwrite(fd, page, place)
        return len(places)

    race(mounts, "random 4 KiB write", "1/s", lambda path: per_second(path, os.O_RDWR, work))


def test_sequential_writes(mounts: dict[str, DaxMount]) -> None:
    chunk = os.urandom(MIB)

    def work(fd: int) -> float:
        for place in range(FILE_MIB):
            os.pwrite(fd, chunk, place * MIB)
        return FILE_MIB

    race(mounts, "sequential write, 1 MiB", "MiB/s", lambda path: per_second(path, os.O_RDWR, work))


def test_sequential_reads(mounts: dict[str, DaxMount]) -> None:
    def work(fd: int) -> float:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        for place in range(FILE_MIB):
            os.pread(fd, MIB, place * MIB)
        return FILE_MIB

    race(mounts, "sequential read, cold", "MiB/s", lambda path: per_second(path, os.O_RDONLY, work))


def test_space(mounts: dict[str, DaxMount]) -> None:
    for name, mount in mounts.items():
        kept = mount.json("status", mount.path)["repair"]["space_bytes"]
        share = {name: 100 * kept / (FILE_MIB * MIB)}
        record(Line("Repair", f"space, {name}", "% of the data", share))
