"""Pages of a file present in many processes, in one call of C (victims/collect.c)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from itertools import islice, takewhile
from typing import NamedTuple

from daxemu.host.proc import in_time
from daxemu.host.victims import as_argument, library
from daxemu.host.victims.structs import PROCESS, RUN, RUNS, SEARCH, WANTED
from daxemu.ranges import Range
from daxemu.uapi import Ino
from daxemu.units import DIV_ROUND_UP

_NOTHING, _FOUND, _ASK, _NOT_YET = range(4)
_ROOM = 1024  # runs, beside four for each process
_ENOUGH = 32  # processes for a thread to be worth its while


class Run(NamedTuple):
    """Consecutive pages of a file present in one mapping (see mm.to_kill.PresentRun)."""

    ino: Ino
    first: int
    nr_pages: int
    address: int
    vma_start: int
    vma_end: int
    writable: int


class Found(NamedTuple):
    """Process with wanted pages present. ``comm``: name; ``flags``: PF_* of the leader."""

    pid: int
    comm: bytes
    nr_threads: int
    flags: int
    runs: list[Run]


def collect(
    pids: Sequence[int], dev: tuple[int, int], wanted: Mapping[Ino, Sequence[Range]]
) -> tuple[list[Found | int], list[int]]:
    """Return the processes of ``pids`` with pages of ``wanted`` present, and the ids of the processes that
    are stuck (``in_time``).

    A bare process id among the first is left for a look by Python. With ``wanted`` empty, that is the id of
    each process that maps a file of ``dev``. Many processes are divided among all processors. Precondition:
    victims.MISSING is None.
    """
    ranges = b"".join(WANTED.pack(ino, *pages) for ino, each in wanted.items() for pages in each)

    parts = max(1, min(len(os.sched_getaffinity(0)), len(pids) // _ENOUGH))
    size = DIV_ROUND_UP(len(pids), parts)
    shares = [pids[at : at + size] for at in range(0, len(pids), size)] if pids else []
    return in_time.each(shares, lambda share: _Batch(share, dev, ranges))


class _Batch:
    """Walk in C over ``pids``. Keeps the memory that C uses: a thread may use the memory after the caller."""

    def __init__(self, pids: Sequence[int], dev: tuple[int, int], ranges: bytes) -> None:
        room = _ROOM + 4 * len(pids)
        self._count = len(pids)
        self._processes = bytearray(b"".join(PROCESS.pack(pid, _NOT_YET, 0, 0, 0, b"") for pid in pids))
        self._runs = bytearray(room * RUN.size)
        self._arguments = tuple(map(as_argument, (bytearray(ranges), self._processes, self._runs)))
        of_ranges, _, of_runs = self._arguments
        self._filled = bytearray(RUNS.pack(ctypes.addressof(of_runs), room, 0))
        self._search = SEARCH.pack(*dev, ctypes.addressof(of_ranges), len(ranges) // WANTED.size)

    def run(self) -> None:
        """Walk."""
        filled = as_argument(self._filled)
        library().daxemu_collect(self._search, self._arguments[1], self._count, filled)

    @property
    def done(self) -> int:
        """Return the number of processes that are finished."""
        verdicts = (verdict for _, verdict, *_ in PROCESS.iter_unpack(self._processes))
        return sum(1 for _ in takewhile(lambda verdict: verdict != _NOT_YET, verdicts))

    def found(self, count: int) -> list[Found | int]:
        """Return the findings at the first ``count`` processes. Precondition: ``count`` <= ``done``."""
        used = RUNS.unpack(self._filled)[2]
        runs = map(Run._make, RUN.iter_unpack(memoryview(self._runs)[: used * RUN.size]))
        looked: list[Found | int] = []
        processes = islice(PROCESS.iter_unpack(self._processes), count)
        for pid, verdict, nr_runs, nr_threads, flags, comm in processes:
            if verdict == _FOUND:
                mine = [next(runs) for _ in range(nr_runs)]
                looked.append(Found(pid, comm.partition(b"\0")[0], nr_threads, flags, mine))
            elif verdict == _ASK:
                looked.append(pid)
        return looked
