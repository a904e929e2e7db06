"""Speed of mappings on a direct mount, beside page-cache mode and tmpfs."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest

from tests.bench.contenders import PROGRAM_PATIENCE, compiled
from tests.bench.report import Line, interleaved, record
from tests.bench.test_failure_path import PAGE, Crowd, inject_and_clear
from tests.support.mount import DaxMount, dax_mount_at

pytestmark = [
    pytest.mark.bench,
    pytest.mark.mount,
    pytest.mark.timeout(900),
    pytest.mark.skipif(os.geteuid() != 0, reason="direct mappings need root"),
]

SECTION = "Direct mappings"
DIRECT, CACHE, TMPFS = "direct", "page cache", "tmpfs"
FLOOR = "its system calls alone, in C"
ROUNDS = 5
MIB = 1 << 20
LARGE_MIB, SMALL_MIB = 1024, 8
EXTENTS = 10_000
DAXEMU = (sys.executable, "-m", "daxemu")


@dataclass
class Side:
    """Place of files. ``start``: words before a command that maps the files."""

    path: Path
    start: tuple[str | Path, ...] = ()


class Sides:
    """The places under comparison, and the programs that map files there."""

    def __init__(self, directory: Path, places: dict[str, Side]) -> None:
        here = Path(__file__)
        self._programs = {
            name: compiled(here.with_name(f"{name}.c"), directory) for name in ("load", "direct")
        }
        self._floor = compiled(here.with_name("direct_floor.c"), directory, "-D_GNU_SOURCE", "-pthread")
        self.places = places

    def output(self, side: str, program: str, *words: str | int) -> str:
        """Run a program on one side; return its output. ``@`` in a word is the directory of the side."""
        place = self.places[side]
        command = [str(word).replace("@", str(place.path)) for word in words]
        done = subprocess.run(
            [*place.start, self._programs[program], *command],
            capture_output=True,
            text=True,
            timeout=PROGRAM_PATIENCE,
        )
        assert done.returncode == 0, f"{side}: {program} {command}: {done.stderr}"
        return done.stdout

    def seconds(self, side: str, program: str, *words: str | int) -> float:
        return float(self.output(side, program, *words))

    def _seconds_of_floor(self, *words: str) -> float:
        done = subprocess.run(
            [self._floor, *words], stdout=subprocess.PIPE, text=True, check=True, timeout=PROGRAM_PATIENCE
        )
        return float(done.stdout)

    def fill(self, name: str, mib: int) -> None:
        """Write a file on each side."""
        for place in self.places.values():
            with open(place.path / name, "wb") as file:
                for _ in range(mib):
                    file.write(b"a" * MIB)

    def race(
        self,
        name: str,
        unit: str,
        scale: float,
        measure: Callable[[str], float],
        *,
        target: float | None,
        against: str | None = TMPFS,
        among: tuple[str, ...] = (DIRECT, CACHE, TMPFS),
        floor: tuple[str, ...] = (),
    ) -> None:
        """Measure a line by turns, and record the figures. ``measure``: from a side to seconds. ``floor``:
        words for direct_floor.c.
        """
        sides = {side: partial(measure, side) for side in among}
        if floor:
            sides[FLOOR] = partial(self._seconds_of_floor, *floor)
        figures = interleaved(sides, ROUNDS)
        scaled = {side: value * scale for side, value in figures.items()}
        record(Line(SECTION, name, unit, scaled, against=against, target=target))


@contextmanager
def sides(*options: str, shm: Path = Path("/dev/shm")) -> Iterator[Sides]:
    """Return the three places below ``shm``. ``options``: more options of mkfs."""
    with ExitStack() as stack:
        mounts = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="daxemu-bench-")))
        plain = Path(tempfile.mkdtemp(prefix="daxemu-bench-", dir=shm))
        stack.callback(shutil.rmtree, plain)
        places = {}
        for name, more in ((DIRECT, ["--direct"]), (CACHE, [])):
            directory = mounts / f"{name} mount"
            directory.mkdir()
            made = stack.enter_context(dax_mount_at(directory, "4G", *options, mount=False, shm=shm))
            made.mount(*more)
            places[name] = Side(made.path, (*DAXEMU, "run", made.path, "--"))
        places[TMPFS] = Side(plain)
        yield Sides(mounts, places)


@pytest.fixture(scope="module")
def made() -> Iterator[Sides]:
    with sides() as found:
        found.fill("large", LARGE_MIB)
        found.fill("small", SMALL_MIB)
        yield found


@contextmanager
def huge_tmpfs() -> Iterator[Path]:
    """Mount a tmpfs whose files have 2 MiB pages."""
    with tempfile.TemporaryDirectory(prefix="daxemu-bench-huge-") as where:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "huge=always", "bench", where], check=True)
        try:
            yield Path(where)
        finally:
            subprocess.run(["umount", "-l", where], check=True)


def test_first_touch_with_4_kib_pages(made: Sides) -> None:
    made.race(
        "first load of each page, 1 GiB, 4 KiB pages",
        "ms",
        1e3,
        lambda side: made.seconds(side, "direct", "touch", "@/large"),
        target=1 / 8,
    )


def test_first_touch_with_2_mib_pages() -> None:
    with huge_tmpfs() as shm, sides("--align", "2M", shm=shm) as huge:
        huge.fill("large", LARGE_MIB)
        for side in (DIRECT, TMPFS):
            mapped, whole = huge.output(side, "direct", "pmd", "@/large").split()
            print(f"\n{side}: {mapped} of {whole} kB are mapped by PMDs")
        huge.race(
            "first load of each page, 1 GiB, 2 MiB pages",
            "ms",
            1e3,
            lambda side: huge.seconds(side, "direct", "touch", "@/large"),
            target=1 / 1.2,
            among=(DIRECT, TMPFS),
        )


def test_mapped_loads_and_stores(made: Sides) -> None:
    made.race(
        "loads and stores over 8 MiB, mapped and touched",
        "ms",
        1e3,
        lambda side: made.seconds(side, "load", "mapped", "@/small"),
        target=0.95,
    )


def test_persist(made: Sides) -> None:
    made.race(
        "store a byte and persist it",
        "us",
        1e6,
        lambda side: made.seconds(side, "direct", "persist", "@/small", 2000),
        target=1.0,
    )


def test_first_mmap_of_a_process(made: Sides) -> None:
    made.race(
        "first mmap of a process",
        "us",
        1e6,
        lambda side: made.seconds(side, "direct", "first", "@/small"),
        target=None,
    )


def test_mmap_of_a_file_on_the_mount(made: Sides) -> None:
    made.race(
        "mmap and munmap of a file of the mount",
        "us",
        1e6,
        lambda side: made.seconds(side, "direct", "map", "@/small", 200),
        target=None,
    )


def test_fork(made: Sides) -> None:
    made.race(
        "fork, exit, wait, with 8 MiB mapped",
        "us",
        1e6,
        lambda side: made.seconds(side, "direct", "fork", "@/small", 30),
        target=1 / 3,
    )


def test_copy_at_the_store(made: Sides) -> None:
    made.race(
        "copy at the store, a page (page cache: with msync)",
        "us",
        1e6,
        lambda side: made.seconds(
            side, "direct", "cow" if side == DIRECT else "cowsync", "@/small", "@/copy"
        ),
        target=50.0,
        against=None,
        among=(DIRECT, CACHE),
        floor=("agent",),
    )


def test_store_to_a_hole(made: Sides) -> None:
    made.race(
        "allocation at the store, a page",
        "us",
        1e6,
        lambda side: made.seconds(side, "direct", "hole", "@/hole", SMALL_MIB),
        target=None,
        floor=("agent",),
    )


def test_clone_of_a_mapped_file(made: Sides) -> None:
    made.race(
        "reflink of a mapped file of 1 GiB",
        "ms",
        1e3,
        lambda side: made.seconds(side, "direct", "clone", "@/large", "@/clone"),
        target=30.0,
        against=None,
        among=(DIRECT, CACHE),
        floor=("protect", str(LARGE_MIB)),
    )


def test_a_file_of_many_extents(made: Sides) -> None:
    for place in made.places.values():
        with open(place.path / "extents", "wb") as file:
            for first in (0, 1):  # no block follows its neighbour on the device
                for block in range(first, EXTENTS, 2):
                    os.pwrite(file.fileno(), b"e" * PAGE, block * PAGE)
    made.race(
        "map a file of 10,000 extents, load from each",
        "ms",
        1e3,
        lambda side: made.seconds(side, "direct", "touch", "@/extents"),
        target=100.0,
        against=None,
    )


@pytest.mark.parametrize(("victims", "limit"), [(10, 1.0), (1000, 50.0)])
def test_poison_to_the_last_victim(tmp_path: Path, victims: int, limit: float) -> None:
    figures = {}
    floors: list[float] = []
    floor = compiled(Path(__file__).with_name("ptrace_floor.c"), tmp_path)
    for name, options in ((DIRECT, ["--direct"]), (CACHE, [])):
        directory = tmp_path / name.replace(" ", "-")
        directory.mkdir()
        with dax_mount_at(directory, mount=False) as mount:
            mount.mount(*options)
            figures[name] = _poison(mount, victims, floor, floors)
    figures[FLOOR] = statistics.median(floors)
    name = f"poison to the last of {victims} victims signalled"
    record(Line(SECTION, name, "ms", figures, target=limit))


def _poison(mount: DaxMount, victims: int, floor: Path, floors: list[float]) -> float:
    """Return the milliseconds of daxemu; add those of the ptrace calls alone to ``floors``."""
    mount.make_file("f", 8)
    start = (*DAXEMU, "run", mount.path, "--")
    with Crowd(mount.path / "f", victims, "victim", start) as crowd, mount.client() as client:
        found = []
        for _ in range(3 if victims >= 1000 else 9):
            found.append(inject_and_clear(mount, client, victims))
            crowd.touch()
            alone = subprocess.run([floor, *crowd.members()], stdout=subprocess.PIPE, check=True)
            floors.append(float(alone.stdout))
    return statistics.median(found)
