"""Costs that do not depend on processes: the reverse map, mounting, making a device. All but mkfs in CPU
time.
"""

from __future__ import annotations

import gc
import random
import stat
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path

import pytest

from daxemu.fs.extents import ExtentMap
from daxemu.fs.inode import ROOT_INO
from daxemu.fs.rmap import Rmap
from daxemu.ranges import Range
from tests.bench.report import Line, record
from tests.support.core import ROOT, Core, core_at
from tests.support.mount import daxemu

pytestmark = [pytest.mark.bench, pytest.mark.timeout(900)]

SECTION = "Scale"
EXTENTS, FILES, SHARERS = 1_000_000, 100, 100
GAP = 3  # blocks from one extent to the next; each has two


def spent(action: Callable[[], object]) -> float:
    """Return the seconds of CPU time of ``action``."""
    began = time.process_time()
    action()
    return time.process_time() - began


def resident() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.fixture(scope="module")
def rmap() -> Iterator[tuple[Rmap, list[ExtentMap], float]]:
    """A million extents in a hundred files, and the bytes per extent. 100 files share a thousand extents."""
    before = resident()
    rmap = Rmap()
    maps = [ExtentMap(ino, rmap) for ino in range(2, 2 + FILES)]
    place = 0
    for extents in maps:
        for number in range(EXTENTS // FILES):
            extents.insert(number * GAP, place, 2)
            place += GAP
    size = (resident() - before) / EXTENTS
    for ino in range(SHARERS - 1):
        ExtentMap(1000 + ino, rmap).clone_from(maps[0], 0, 1000 * GAP, 0)
    gc.freeze()
    yield rmap, maps, size
    gc.unfreeze()


def lookup(rmap: Rmap, extents: range, owners: int) -> float:
    """Microseconds to find all owners of a block, the median over random ones."""
    rng = random.Random(1)
    took = []
    for _ in range(2000):
        block = rng.choice(extents) * GAP
        began = time.perf_counter()
        found = rmap.owners(block, block + 1)
        took.append(time.perf_counter() - began)
        assert len(found) == owners
    return statistics.median(took) * 1e6


def test_lookup(rmap: tuple[Rmap, list[ExtentMap], float]) -> None:
    alone, shared = lookup(rmap[0], range(1000, EXTENTS), 1), lookup(rmap[0], range(1000), SHARERS)
    record(Line(SECTION, "rmap: the owner of one of 1,000,000 extents", "us", {"daxemu": alone}, target=20.0))
    record(Line(SECTION, "rmap: all 100 owners of a shared extent", "us", {"daxemu": shared}, target=20.0))


def test_memory(rmap: tuple[Rmap, list[ExtentMap], float]) -> None:
    record(Line(SECTION, "rmap: memory of an extent", "bytes", {"daxemu": rmap[2]}, target=300.0))


def test_clone(rmap: tuple[Rmap, list[ExtentMap], float]) -> None:
    made, removed = [], []
    for number, source in zip(range(7), cycle(rmap[1][1:]), strict=False):
        clone = ExtentMap(5000 + number, rmap[0])
        made.append(spent(partial(clone.clone_from, source, 0, 30_000, 0)) * 1e3)
        removed.append(spent(partial(clone.remove, 0, 30_000)) * 1e3)
    name = "clone of a file of 10,000 extents"
    record(Line(SECTION, name, "ms", {"daxemu": statistics.median(made)}, target=50.0))
    record(Line(SECTION, "removal of that clone", "ms", {"daxemu": statistics.median(removed)}))


def fill(core: Core, files: int) -> None:
    """Make ``files`` files with a block each, a thousand in a directory."""
    free = max(core.fs.allocator.free_ranges(), key=lambda run: run.length)
    core.fs.allocator.take(Range(free.start, free.start + files))
    for number in range(files):
        if number % 1000 == 0:
            parent = core.dir(b"d%d" % number).ino
        inode = core.fs.mknod(parent, b"file%d" % number, stat.S_IFREG | 0o644, 0, ROOT)
        core.fs.extents_of(inode.ino).insert(0, free.start + number, 1)
        inode.size = 4096
    core.fs.commit()


@pytest.mark.parametrize(("files", "limit"), [(100_000, 2.0), (1_000_000, 10.0)])
def test_mount(files: int, limit: float) -> None:
    """Loading all files of a device, the longest part of a mount."""
    with core_at(size=64 << 30) as core:
        core.sound = False
        fill(core, files)
        core.close()
        took = spent(core.open)
        assert core.fs.names.lookup(ROOT_INO, b"d0").is_dir
        record(Line(SECTION, f"mount of {files:,} files", "s", {"daxemu": took}, target=limit))


def test_mkfs(tmp_path: Path) -> None:
    took = []
    for number in range(5):
        began = time.perf_counter()
        daxemu("mkfs", tmp_path / str(number), "--size", "6T")
        took.append(time.perf_counter() - began)
    record(Line(SECTION, "daxemu mkfs --size 6T", "s", {"daxemu": statistics.median(took)}, target=1.0))
