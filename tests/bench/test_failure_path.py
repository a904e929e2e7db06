"""Cost of a failure, and the cost that processes other than the victim add."""

from __future__ import annotations

import itertools
import resource
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from daxemu.client import Client
from tests.bench.contenders import compiled
from tests.bench.report import Line, interleaved, record
from tests.support.actor import compile_victim
from tests.support.core import core_at
from tests.support.mount import DaxMount, dax_mount_at

pytestmark = [pytest.mark.bench, pytest.mark.mount, pytest.mark.timeout(600)]

SECTION = "Failure path"
ROUNDS = 15
PAGE = 4096


def timed(action: Callable[[], object]) -> float:
    """Return the milliseconds of ``action``."""
    began = time.perf_counter()
    action()
    return (time.perf_counter() - began) * 1e3


class Crowd:
    """``count`` processes made by tests/victims/crowd.c. ``start``: words before its command."""

    def __init__(self, file: Path, count: int, kind: str, start: tuple[str | Path, ...] = ()) -> None:
        self._process = subprocess.Popen(
            [*start, compile_victim("crowd"), file, str(count), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._await()

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *exc: object) -> None:
        self._process.communicate()

    def _await(self) -> None:
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "ready\n"

    def members(self) -> list[str]:
        """Return the process ids."""
        pid = self._process.pid
        return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()

    def touch(self) -> None:
        """Make every victim touch its page again."""
        assert self._process.stdin is not None
        self._process.stdin.write("touch\n")
        self._process.stdin.flush()
        self._await()


@contextmanager
def crowds(made: DaxMount, **counts: int) -> Iterator[list[Crowd]]:
    """``victim`` and ``idle``: the number of processes of each kind."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(Crowd(made.path / "f", count, kind))
            for kind, count in counts.items()
            if count
        ]


def inject_and_clear(made: DaxMount, client: Client, victims: int) -> float:
    """Return the milliseconds in the supervisor, from the poison to the last of ``victims`` signals, by the
    times of the events.
    """
    ino = (made.path / "f").stat().st_ino
    before = client.request("status")["events"]
    client.request("inject", ino=ino, ranges=[[PAGE, PAGE]])
    count = client.request("status")["events"] - before
    with made.client() as log:
        events = list(itertools.islice(log.follow(before), count))
    client.request("clear", ino=ino, ranges=[[PAGE, PAGE]])
    signals = [event for event in events if event["event"] == "SignalSent"]
    assert len(signals) == victims
    assert {event["result"] for event in signals} <= {"delivered"}
    last = signals[-1] if signals else events[-1]
    return float((last["time"] - events[0]["time"]) * 1e3)


@pytest.mark.parametrize(("victims", "limit"), [(0, None), (1, None), (10, 1.0), (1000, 50.0)])
def test_inject_to_last_victim_signalled(tmp_path: Path, victims: int, limit: float | None) -> None:
    floor = compiled(Path(__file__).with_name("ptrace_floor.c"), tmp_path)
    took: dict[str, list[float]] = {"daxemu": [], "its ptrace calls alone, in C": []}
    with dax_mount_at(tmp_path) as made:
        made.make_file("f", 8)
        with crowds(made, victim=victims) as there, made.client() as client:
            for _ in range(5 if victims >= 1000 else ROUNDS):
                took["daxemu"].append(inject_and_clear(made, client, victims))
                for crowd in there:
                    crowd.touch()
                    told = subprocess.run([floor, *crowd.members()], capture_output=True, check=True)
                    took["its ptrace calls alone, in C"].append(float(told.stdout))
    name = f"inject to the last of {victims} victims signalled"
    figures = {side: statistics.median(each) for side, each in took.items() if each}
    record(Line(SECTION, name, "ms", figures, target=limit))


def test_cost_that_a_thousand_idle_processes_add(tmp_path: Path) -> None:
    found = {}
    with dax_mount_at(tmp_path) as made:
        made.make_file("f", 8)
        with crowds(made, victim=1) as (victim,), made.client() as client:

            def once() -> float:
                took = inject_and_clear(made, client, 1)
                victim.touch()
                return took

            found["alone"] = statistics.median(once() for _ in range(ROUNDS))
            with crowds(made, idle=1000):
                found["beside them"] = statistics.median(once() for _ in range(ROUNDS))
    added = found["beside them"] - found["alone"]
    record(Line(SECTION, "what 1,000 idle processes add to one victim's", "ms", {"daxemu": added}))


def removal(directory: Path, size: str, processes: int, files: int = 0) -> float:
    """Return the milliseconds until a removal is answered."""
    directory.mkdir()
    with dax_mount_at(directory, size) as made, ExitStack() as stack:
        made.make_file("f", 8)
        for number in range(files):
            stack.enter_context(open(made.path / f"open{number}", "wb"))
        with crowds(made, victim=processes), made.client() as client:
            return timed(lambda: client.request("remove"))


def test_removal_6_tib_against_6_gib(tmp_path: Path) -> None:
    rounds = itertools.count()
    figures = interleaved(
        {
            "6 TiB": lambda: removal(tmp_path / str(next(rounds)), "6T", 2),
            "6 GiB": lambda: removal(tmp_path / str(next(rounds)), "6G", 2),
        },
        ROUNDS,
    )
    line = Line(SECTION, "removal, 2 processes", "ms", figures, against="6 GiB", target=1 / 1.2)
    record(line)


@contextmanager
def many_open_files() -> Iterator[None]:
    """Lift the soft limit on open files."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_removal_with_much_open(tmp_path: Path) -> None:
    with many_open_files():
        took = statistics.median(removal(tmp_path / str(n), "6G", 100, 10_000) for n in range(3))
    name = "removal, 10,000 open files, 100 processes"
    record(Line(SECTION, name, "ms", {"daxemu": took}, target=500.0))


def test_the_per_page_way() -> None:
    """Call memory_failure() once for each pfn, as proposed in 2021; both ways without processes, in the core
    alone.
    """
    pages = 4096
    with core_at(size=64 << 20) as core:
        ino = core.file(data=bytes(pages * PAGE))
        (place,) = core.fs.device_ranges(ino, 0, pages * PAGE)
        first = core.pmem.pfn_of(place.start)

        def each() -> None:
            for pfn in range(first, first + pages):
                core.mm.action_result(core.mm.memory_failure(pfn, 1, 0), 0)

        per_page = timed(each) / pages
    with core_at(size=6 << 40) as core:
        core.file(data=bytes(PAGE))
        core.sound = False

        def whole() -> None:
            core.mm.removal(core.pmem.dax.base_pfn, core.pmem.dax.size // PAGE, core.pmem.dax.kill_dax)

        at_once = timed(whole)
    extrapolated = per_page * ((6 << 40) // PAGE)
    figures = {"one range": at_once, "a call per pfn": extrapolated}
    notes = {"a call per pfn": f"extrapolated from {pages} pages, {per_page * 1e3:.0f} us each"}
    name = "removal of 6 TiB, the core's part"
    record(Line(SECTION, name, "ms", figures, against="a call per pfn", notes=notes))


@pytest.mark.parametrize("victims", [0, 1])
def test_a_storm_of_10_000_ranges(tmp_path: Path, victims: int) -> None:
    ranges = [[2 * number * PAGE, PAGE] for number in range(10_000)]
    with dax_mount_at(tmp_path) as made:
        file = made.path / "f"
        file.write_bytes(bytes(20_000 * PAGE))
        ino = file.stat().st_ino
        with crowds(made, victim=victims), made.client() as client:
            took = timed(lambda: client.request("inject", ino=ino, ranges=ranges))
    name = f"10,000 ranges in one call, {victims} processes map the file"
    record(Line(SECTION, name, "ms", {"daxemu": took}))


@pytest.mark.parametrize("victims", [0, 1])
def test_sustained_injections_with_a_reader_of_the_events(tmp_path: Path, victims: int) -> None:
    """A client injects range after range; a second client follows the events and must see every event."""
    count = 2000 if not victims else 200
    with dax_mount_at(tmp_path) as made:
        file = made.path / "f"
        file.write_bytes(bytes(1000 * PAGE))
        ino = file.stat().st_ino
        seen = []

        def read() -> None:
            with made.client() as log:
                for event in log.follow(0):
                    if event["event"] == "MemoryFailureHandled":
                        seen.append(event["seq"])
                    if len(seen) == count:
                        return

        reader = threading.Thread(target=read)
        reader.start()
        with crowds(made, victim=victims), made.client() as client:
            began = time.perf_counter()
            for number in range(count):
                at = 16 + number % 984
                client.request("inject", ino=ino, ranges=[[at * PAGE, PAGE]])
                if at == 999:
                    client.request("clear", ino=ino, ranges=[[0, 1000 * PAGE]])
            reader.join()
            rate = count / (time.perf_counter() - began)
    assert len(seen) == count
    name = f"injections one by one, {victims} processes map the file, a reader of the events"
    goal = None if victims else 1000.0
    record(Line(SECTION, name, "/s", {"daxemu": rate}, more_is_better=True, target=goal))


def resident(client: Client, *, shared: bool = False) -> float:
    """Return the supervisor's memory in kB, with or without memory shared with other processes."""
    pid = client.request("status")["pid"]
    _, everything, of_files, *_ = map(int, Path(f"/proc/{pid}/statm").read_text().split())
    return (everything if shared else everything - of_files) * PAGE / 1e3


def test_memory_of_the_supervisor(tmp_path: Path) -> None:
    def idle(size: str, *, shared: bool = False) -> float:
        directory = tmp_path / f"{size}-{shared}"
        directory.mkdir()
        with dax_mount_at(directory, size) as made, made.client() as client:
            return resident(client, shared=shared)

    whole, small, large = idle("1T", shared=True), idle("1T"), idle("8T")
    with (
        dax_mount_at(tmp_path, "1G") as made,
        made.client() as client,
        many_open_files(),
        ExitStack() as stack,
    ):
        made.make_file("f", 8)
        before = resident(client)
        for number in range(5000):
            stack.enter_context(open(made.path / f"open{number}", "wb"))
        files = (resident(client) - before) / 5000
        before = resident(client)
        with crowds(made, victim=200):
            inject_and_clear(made, client, 200)
            mappings = (resident(client) - before) / 200
    for name, unit, figure, limit in (
        ("idle, all that is resident", "MB", whole / 1e3, 80.0),
        ("idle, without shared pages", "MB", small / 1e3, None),
        ("an open file, with its inode", "kB", files, None),
        ("a mapping process, at a failure", "kB", mappings, None),
        ("a TiB of device", "kB", (large - small) / 7, None),
    ):
        record(Line("Memory of the supervisor", name, unit, {"daxemu": figure}, target=limit))
