"""Racers against memory failures on one mount: bursts of all at once, and checks in between, while all hold
still.

Only the pages in BAD of each file ever fail, and no page of files whose names begin with "healthy". Files
whose names begin with "still" belong to the holders.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Self

from daxemu.client import Client
from daxemu.errors import InvalidArgument
from daxemu.host.proc import maps
from daxemu.host.proc.mountinfo import mount_of
from daxemu.host.proc.pagemap import Pagemap
from daxemu.uapi import BUS_ADRERR, BUS_MCEERR_AO, BUS_MCEERR_AR, PAGE_SHIFT
from tests.support.mount import clear_away
from tests.support.quick import QuickMount
from tests.support.racer import KINDS, PATIENCE, PageRead, Place, Racer, Seen

PAGE = 4096
COMMON = 32
BAD = [page for page in range(COMMON) if page % 4 in (1, 2)]
VERBS = ("inject", "second", "clear")
WRITTEN_FROM = ("io",)
"""Files that system calls take from: after the EFAULT of poison, a load from a direct mapping is BUS_ADRERR
for 10 ms (faults.MARKED).
"""
AT_ONCE = 5
"""Racers that run in one burst; with more, none gets much done."""
SHORT = ("truncate",)
"""Files that have an end within what is mapped of them: there BUS_ADRERR is no poison."""
COPIED = ("cow-from", "cow-to")
"""Files with shared blocks that are stored to: the copy of poison fails with BUS_ADRERR on a direct mount
(dax_iomap_copy_around()).
"""
MOST_DESCRIPTORS = 24
"""Number of descriptors, or threads, that a working supervisor may have beyond those at its start."""


def letter(page: int) -> str:
    return chr(ord("a") + page % 26)


class Injector:
    """Poisons and clears pages of any existing files, until told to stop."""

    def __init__(self, path: Path, seed: int) -> None:
        self._path = path
        self._rng = random.Random(seed)
        self.count: Counter[str] = Counter()

    def run(self, stop: threading.Event) -> None:
        with Client(mount_of(self._path), patience=PATIENCE) as client:
            while not stop.is_set():
                self._once(client)

    def _once(self, client: Client) -> None:
        rng = self._rng
        names = [n for n in os.listdir(self._path) if not n.startswith(("healthy", "still"))]
        if not names:
            return  # the mount is gone
        name = rng.choice(names)
        try:
            ino = (self._path / name).stat().st_ino
        except FileNotFoundError:
            return
        most = COMMON if name == "common" else 16
        pages = rng.sample([page for page in BAD if page < most], rng.randint(1, 3))
        ranges = [[page * PAGE, PAGE] for page in pages]
        verb = rng.choice(VERBS)
        if verb == "second":
            ranges += ranges  # each range is a failure of its own, and all of a request go on at once
        try:
            client.request("clear" if verb == "clear" else "inject", ino=ino, ranges=ranges)
        except InvalidArgument:  # the file has no such page now, or is gone
            self.count["refused"] += 1
        else:
            self.count[verb] += 1


class EventCheck:
    """Follows events.jsonl: the numbers have no gap, every failure ends, every signal has a known result."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._read = self._seq = 0
        self.kinds: Counter[str] = Counter()
        self.sent: Counter[tuple[int, int, str]] = Counter()
        """SignalSent by process, code and result."""

    def update(self) -> list[str]:
        """Read new events; return the errors found."""
        wrong = []
        with self._path.open("rb") as file:
            file.seek(self._read)
            whole, end, _ = file.read().rpartition(b"\n")
        self._read += len(whole) + len(end)
        for line in whole.splitlines():
            event = json.loads(line)
            self._seq = 1 if event["event"] == "Mounted" else self._seq + 1
            if event["seq"] != self._seq:
                wrong.append(f"event {event['seq']} comes where {self._seq} should be")
                self._seq = event["seq"]
            self.kinds[event["event"]] += 1
            if event["event"] == "SignalSent":
                self.sent[event["pid"], event["code"], event["result"]] += 1
                if event["result"] not in ("delivered", "gone", "pending", "merged"):
                    wrong.append(f"a signal was {event['result']}: {event}")
            if event["event"] == "MemoryFailureHandled" and event["outcome"] != "Recovered":
                wrong.append(f"a failure was {event['outcome']}: {event}")
        return wrong


class Races:
    """All racers on one mount. A context manager: the racers end before the mount does."""

    def __init__(self, mount: QuickMount, directory: Path, seed: int) -> None:
        self.mount = mount
        self.racers: list[Racer] = []
        self._stack = ExitStack()
        self._directory = directory
        self._seed = seed
        self._injectors = [Injector(mount.path, seed + number) for number in range(2)]
        self._events = EventCheck(mount.device / "events.jsonl")
        self._seen: dict[int, Counter[int]] = defaultdict(Counter)
        self._size: tuple[int, int] | None = None
        self._next: deque[Racer] = deque()

    def __enter__(self) -> Self:
        fill(self.mount.path / "common", COMMON)
        for number, kind in enumerate(KINDS):
            signals = self._directory / f"{kind}.signals"
            racer = Racer(kind, self._seed * 100 + number, self.mount, signals)
            self.racers.append(self._stack.enter_context(racer))
        self._next.extend(random.Random(self._seed).sample(self.racers, len(self.racers)))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of races of each kind."""
        done: Counter[str] = sum((injector.count for injector in self._injectors), Counter())
        return {**{racer.kind: racer.rounds for racer in self.racers}, **{verb: done[verb] for verb in VERBS}}

    # -- bursts

    def burst(self, seconds: float, meanwhile: Callable[[], object]) -> None:
        """Run some of the racers, each in turn, and the injectors for a time, with ``meanwhile`` again and
        again; then all hold still. Raises Hang.
        """
        stop = threading.Event()
        deadline = time.monotonic() + seconds
        for _ in range(AT_ONCE):
            self._next.rotate(-1)
            self._next[-1].say("run")
        with ThreadPoolExecutor(len(self._injectors)) as pool:
            running = [pool.submit(injector.run, stop) for injector in self._injectors]
            try:
                while time.monotonic() < deadline and not any(each.done() for each in running):
                    meanwhile()
            finally:
                stop.set()
            for racer in self.racers:
                racer.say("park")
            for racer in self.racers:
                racer.parked()
            for each in running:
                each.result(PATIENCE)

    # -- conditions while all hold still

    def why_not(self) -> list[str]:
        """Return the errors found. Precondition: a burst has ended."""
        with Client(mount_of(self.mount.path), patience=PATIENCE) as client:
            books = Books(client)
            wrong = [text for racer in self.racers for text in self._why_present(racer, books)]
            for racer in self.racers:
                wrong += [text for page in racer.verify() if (text := _why_not_page(page, books))]
                wrong += [f"{racer.kind}: {text}" for text in self._why_not_signals(racer)]
                wrong += racer.wrongs
            wrong += self._why_not_accounted()
            status = client.request("status")
            wrong += self._why_grown(status["pid"])
            client.request("clear", ranges=[[0, status["size"]]])
        return wrong

    def _why_present(self, racer: Racer, books: Books) -> list[str]:
        """Return poison that a racer could still read without a fault."""
        if self.mount.is_direct:
            return self._why_media_present(racer, books)
        wrong = []
        with Pagemap(racer.pid) as pagemap:
            for vma in maps.read(racer.pid, mount_of(self.mount.path).dev):
                for run in pagemap.present_in(vma.start, vma.end):
                    first = vma.pgoff + ((run.start - vma.start) >> PAGE_SHIFT)
                    wrong += [
                        f"{racer.kind}: page {page} of inode {vma.ino} is poison and present"
                        for page in range(first, first + (run.length >> PAGE_SHIFT))
                        if books.is_bad(vma.ino, page)
                    ]
        return wrong

    def _why_media_present(self, racer: Racer, books: Books) -> list[str]:
        """The same for the pages of the media that the racer maps."""
        media = (self.mount.device / "media").stat()
        wrong = []
        with Pagemap(racer.pid) as pagemap:
            for vma in maps.read(racer.pid, (os.major(media.st_dev), os.minor(media.st_dev))):
                for run in pagemap.present_in(vma.start, vma.end) if vma.ino == media.st_ino else ():
                    first = vma.pgoff + ((run.start - vma.start) >> PAGE_SHIFT)
                    wrong += [
                        f"{racer.kind}: page {page} of the media is poison and present"
                        for page in range(first, first + (run.length >> PAGE_SHIFT))
                        if books.is_poison(page)
                    ]
        return wrong

    def _why_not_signals(self, racer: Racer) -> list[str]:
        wrong = []
        for seen in racer.seen():
            self._seen[seen.pid][seen.code] += 1
            if text := why_not_signal(seen, is_direct=self.mount.is_direct):
                wrong.append(f"{text}: {seen}")
        return wrong

    def _why_not_accounted(self) -> list[str]:
        """Compare each racer's signals with the log; a report may take a moment."""
        deadline = time.monotonic() + PATIENCE
        wrong = self._events.update()
        while differing := list(self._differing()):
            if time.monotonic() > deadline:
                return wrong + differing
            time.sleep(0.01)
            wrong += self._events.update()
        return wrong

    def _differing(self) -> Iterator[str]:
        for racer in self.racers:
            for code in (BUS_MCEERR_AO, BUS_MCEERR_AR):
                sent, got = self._events.sent[racer.pid, code, "delivered"], self._seen[racer.pid][code]
                if sent != got:
                    yield f"{racer.kind} got {got} signals of code {code}, the log says {sent}"

    def _why_grown(self, pid: int) -> list[str]:
        size = len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task"))
        self._size = self._size or size
        if any(now > before + MOST_DESCRIPTORS for now, before in zip(size, self._size, strict=True)):
            return [f"the supervisor's descriptors and threads grew from {self._size} to {size}"]
        return []

    def failures(self) -> tuple[int, int, int]:
        """Return the number of failures, found latent ones included; the number that ended, by the event log;
        and the number that ended well, by the counters.
        """
        with Client(mount_of(self.mount.path), patience=PATIENCE) as client:
            counters = client.request("status")["counters"]
        kinds = self._events.kinds
        return kinds["PoisonInjected"], kinds["MemoryFailureHandled"], counters["recovered"]


class Books:
    """Poison as the supervisor reports it."""

    def __init__(self, client: Client) -> None:
        self._client = client
        sectors = client.request("badblocks")["ranges"]
        self._bad = {page for first, count in sectors for page in range(first >> 3, (first + count + 7) >> 3)}
        self._files: dict[int, tuple[int, dict[int, int]]] = {}

    def _file(self, ino: int) -> tuple[int, dict[int, int]]:
        """Return the size of a file, and the device offset of each page."""
        if ino not in self._files:
            found = self._client.request("map", ino=ino)
            pages = {}
            for extent in found["extents"]:
                if extent["device_offset"] is not None:
                    delta = (extent["device_offset"] - extent["offset"]) >> PAGE_SHIFT
                    first = extent["offset"] >> PAGE_SHIFT
                    pages.update(
                        {p: p + delta for p in range(first, first + (extent["length"] >> PAGE_SHIFT))}
                    )
            self._files[ino] = found["size"], pages
        return self._files[ino]

    def is_poison(self, page: int) -> bool:
        """Return whether a page of the device has poison."""
        return page in self._bad

    def is_bad(self, ino: int, page: int) -> bool:
        return self._file(ino)[1].get(page) in self._bad

    def is_beyond(self, ino: int, page: int) -> bool:
        return page * PAGE >= self._file(ino)[0]


def _why_not_page(read: PageRead, books: Books) -> str | None:
    if books.is_beyond(read.ino, read.page):
        good = read.fault is not None and read.fault[0] == BUS_ADRERR
    elif books.is_bad(read.ino, read.page):
        good = read.fault == (BUS_MCEERR_AR, PAGE_SHIFT, read.address)
    else:
        good = read.byte in (letter(read.page), "0")
    return (
        None if good else f"a load of {'bad' if books.is_bad(read.ino, read.page) else 'good'} memory: {read}"
    )


def why_not_signal(seen: Seen, *, is_direct: bool) -> str | None:
    """Check that the signal was possible: for poison in a mapping of the process, of which it had touched a
    page.
    """
    if seen.signo != signal.SIGBUS or seen.code not in (BUS_ADRERR, BUS_MCEERR_AR, BUS_MCEERR_AO):
        return "no signal of a memory failure"
    if not seen.places:
        return "an address that it never mapped"
    if seen.code == BUS_ADRERR:
        if any(p.live and _may_be_short_or_copied(p, is_direct) for p in seen.places):
            return None
        return "a fault without a reason"
    if seen.lsb != PAGE_SHIFT:
        return "not the size of a page"
    if seen.code == BUS_MCEERR_AR and not seen.sync:
        return "action required, but it did nothing"
    if not any(_can_be_bad(place) for place in seen.places):
        return "memory that never was poison"
    return None


def _may_be_short_or_copied(place: Place, is_direct: bool) -> bool:
    return place.file in SHORT or (is_direct and place.file in (*COPIED, *WRITTEN_FROM) and place.page in BAD)


def why_not_last_signal(seen: Seen) -> str | None:
    """The same at the end of the mount: any page may fail then, and every process is signalled."""
    if seen.signo != signal.SIGBUS or seen.code not in (BUS_ADRERR, BUS_MCEERR_AR, BUS_MCEERR_AO):
        return "no signal of a memory failure"
    return None if any(place.touched for place in seen.places) else "nothing that it ever touched"


def why_not_log(mount: QuickMount) -> list[str]:
    """Return unexpected messages of the supervisor, or of the tracer."""
    text = (mount.device / "supervisor.log").read_text()
    return [text[-4000:]] if "Traceback" in text else []


def _can_be_bad(place: Place) -> bool:
    return place.touched and place.page in BAD and not place.file.startswith("healthy")


def fill(path: Path, pages: int) -> Path:
    path.write_bytes(b"".join(letter(page).encode() * PAGE for page in range(pages)))
    return path


def report_hang(error: Exception, mount: QuickMount, pids: Sequence[int]) -> str:
    """Report the state of every process involved; then release the waiting processes."""
    with suppress(ProcessLookupError):
        os.kill(mount.pid, signal.SIGUSR1)
        time.sleep(0.5)  # the log is written later, or not at all
    lines = [str(error), (mount.device / "supervisor.log").read_text()[-20000:]]
    for pid in (mount.pid, *pids):
        with suppress(OSError):
            for tid in os.listdir(f"/proc/{pid}/task"):
                facts = [
                    _read(f"/proc/{pid}/task/{tid}/{name}") for name in ("comm", "wchan", "syscall", "stack")
                ]
                lines.append(f"{pid}/{tid} {' | '.join(facts)}")
    clear_away(mount.path)
    return "\n".join(lines)


def _read(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        return str(error)
