"""Longest step of a supervisor's event loop: CPU time, wall time, and the units of work done in one step.

The supervisor counts for itself (``sabotage.measure_steps``); the test reads the report. CPU time does not
depend on what else the machine does; units of work do not depend on the machine.
"""

from __future__ import annotations

import functools
import json
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from daxemu.fs.inode_table import InodeTable
from daxemu.fs.listing import Listing
from daxemu.fs.namespace import Namespace
from daxemu.fs.rmap import Rmap
from daxemu.fs.store import Store
from daxemu.pmem.media import Media
from daxemu.ranges import RangeSet
from daxemu.supervisor.event_log import EventLog


class Steps(trio.abc.Instrument):
    """Writes the longest step so far, and the most units of work in one step, to a file of JSON."""

    def __init__(self, report: Path) -> None:
        self._report = report
        self._units: Counter[str] = Counter()
        self._most: dict[str, int] = {}
        self._cpu = self._wall = 0.0
        self._longest: dict[str, Any] = {"cpu_ms": 0.0, "wall_ms": 0.0, "task": "none"}

    def count(self, unit: str, amount: int) -> None:
        """Count work of the step under way."""
        self._units[unit] += amount

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        self._units.clear()
        self._cpu, self._wall = time.thread_time(), time.perf_counter()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if not self._cpu:
            return
        cpu, wall = time.thread_time() - self._cpu, time.perf_counter() - self._wall
        is_new = False
        for unit, amount in self._units.items():
            if amount > self._most.get(unit, 0):
                self._most[unit], is_new = amount, True
        if cpu * 1000 > self._longest["cpu_ms"]:
            self._longest = {
                "cpu_ms": cpu * 1000,
                "wall_ms": wall * 1000,
                "task": task.name,
                "units": dict(self._units),
            }
            is_new = True
        if is_new:
            scratch = self._report.with_suffix(".new")
            scratch.write_text(json.dumps({"longest": self._longest, "most": self._most}))
            scratch.rename(self._report)


def _one(*args: Any, **kwargs: Any) -> int:
    return 1


def _length(offset: int, length: int) -> int:
    return length


def rows_of(names: Namespace, rmap: Rmap, clean: bool = False) -> int:
    """Return the number of changed inodes, entries and links that a commit writes."""
    inodes = names.dirty_inodes | names.dirty_times | rmap.dirty.keys()
    return len(inodes) + len(names.dirty_entries) + rmap.marks


COUNTED: tuple[tuple[str, type, str, Callable[..., int]], ...] = (
    ("links", Rmap, "add", len),
    ("links", Rmap, "discard", len),
    ("bytes", Media, "reserve", _length),
    ("bytes", Media, "release", _length),
    ("events", EventLog, "emit", _one),
    ("lookups", RangeSet, "overlaps", _one),
    ("lookups", RangeSet, "add", _one),
    ("lookups", RangeSet, "remove", _one),
    ("lookups", Rmap, "owners", _one),
    ("lookups", Rmap, "sharing", _one),
    ("lookups", InodeTable, "path_of", _one),
    ("names", Listing, "add", _one),
    ("rows", Store, "commit", rows_of),
)
"""What is counted: unit, class, method, and how many units a call with these arguments stands for."""


def count_all(steps: Steps) -> None:
    """Have every method of COUNTED count."""
    for unit, cls, method, amount in COUNTED:
        _count(steps, unit, cls, method, amount)


def _count(steps: Steps, unit: str, cls: type, method: str, amount: Callable[..., int]) -> None:
    original = vars(cls)[method]

    @functools.wraps(original)
    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.count(unit, amount(*args, **kwargs))
        return original(self, *args, **kwargs)

    setattr(cls, method, counting)
