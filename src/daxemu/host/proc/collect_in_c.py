"""Pages of a file present in many processes, in one call of C (victims/collect.c)."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from typing import NamedTuple

from daxemu.host.victims import as_argument, library
from daxemu.host.victims.structs import PROCESS, RUN, RUNS, SEARCH, WANTED
from daxemu.ranges import Range
from daxemu.uapi import Ino
from daxemu.units import DIV_ROUND_UP

_NOTHING, _FOUND, _ASK = range(3)
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
) -> list[Found | int]:
    """Return the processes of ``pids`` with pages of ``wanted`` present. A bare process id in the result is
    left for a look by Python. With ``wanted`` empty, return the id of each process that maps a file of
    ``dev``.

    Many processes are divided among all processors. Precondition: victims.MISSING is None.
    """
    ranges = b"".join(WANTED.pack(ino, *pages) for ino, each in wanted.items() for pages in each)
    parts = min(len(os.sched_getaffinity(0)), len(pids) // _ENOUGH)
    if parts < 2:
        return _collect(pids, dev, ranges)
    size = DIV_ROUND_UP(len(pids), parts)
    shares = [pids[at : at + size] for at in range(0, len(pids), size)]
    with ThreadPoolExecutor(parts) as pool:
        return [found for each in pool.map(_collect, shares, repeat(dev), repeat(ranges)) for found in each]


def _collect(pids: Sequence[int], dev: tuple[int, int], ranges: bytes) -> list[Found | int]:
    room = _ROOM + 4 * len(pids)
    processes = bytearray(b"".join(PROCESS.pack(pid, _ASK, 0, 0, 0, b"") for pid in pids))
    runs = bytearray(room * RUN.size)
    of_ranges, of_processes, of_runs = (as_argument(each) for each in (bytearray(ranges), processes, runs))
    filled = bytearray(RUNS.pack(ctypes.addressof(of_runs), room, 0))
    search = SEARCH.pack(*dev, ctypes.addressof(of_ranges), len(ranges) // WANTED.size)
    library().daxemu_collect(search, of_processes, len(pids), as_argument(filled))
    used = RUNS.unpack(filled)[2]
    each = map(Run._make, RUN.iter_unpack(memoryview(runs)[: used * RUN.size]))
    looked: list[Found | int] = []
    for pid, verdict, nr_runs, nr_threads, flags, comm in PROCESS.iter_unpack(processes):
        if verdict == _FOUND:
            mine = [next(each) for _ in range(nr_runs)]
            looked.append(Found(pid, comm.partition(b"\0")[0], nr_threads, flags, mine))
        elif verdict == _ASK:
            looked.append(pid)
    return looked
