"""Longest step of a supervisor's event loop: CPU time, wall time, and the units of work done in one step.

The supervisor counts for itself (``sabotage.measure_steps``); the test reads the report. CPU time does not
depend on what else the machine does; units of work do not depend on the machine.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

SLOW = 0.03
"""Seconds of CPU time after which the stacks of a step are sampled."""


class Steps(trio.abc.Instrument):
    """Writes the longest step so far, and the most units of work in one step, to a file of JSON."""

    def __init__(self, report: Path, *, sample: bool = False) -> None:
        self._report = report
        self._units: Counter[str] = Counter()
        self._most: dict[str, int] = {}
        self._cpu = self._wall = 0.0
        self._longest: dict[str, Any] = {"cpu_ms": 0.0, "wall_ms": 0.0, "task": "none"}
        self._stacks: Counter[str] = Counter()
        self._worst: list[Any] = []
        if sample:
            watched = threading.get_ident()
            threading.Thread(target=self._sample, args=(watched,), daemon=True).start()

    def count(self, unit: str, amount: int) -> None:
        """Count work of the step under way."""
        self._units[unit] += amount

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if os.path.exists("/tmp/loopm/reset"):
            os.unlink("/tmp/loopm/reset")
            self._longest = {"cpu_ms": 0.0, "wall_ms": 0.0, "task": "none"}
        self._units.clear()
        self._stacks.clear()
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
                "stacks": self._stacks.most_common(3),
            }
            is_new = True
        if is_new:
            scratch = self._report.with_suffix(".new")
            scratch.write_text(json.dumps({"longest": self._longest, "most": self._most}))
            scratch.rename(self._report)

    def _sample(self, watched: int) -> None:
        while True:
            time.sleep(0.01)
            if time.perf_counter() - self._wall > SLOW:
                frame = sys._current_frames().get(watched)
                names = [f"{s.name}:{s.lineno}" for s in traceback.extract_stack(frame)]
                self._stacks[" ".join(names[-8:])] += 1


def counted(steps: Steps, unit: str, cls: type, method: str, amount: Callable[..., int]) -> None:
    """Have each call of a method count ``amount(*arguments)`` units of work."""
    original = vars(cls)[method]

    @functools.wraps(original)
    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        steps.count(unit, amount(*args, **kwargs))
        return original(self, *args, **kwargs)

    setattr(cls, method, counting)
