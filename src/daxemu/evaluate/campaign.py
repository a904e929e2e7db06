"""All trials of a plan: which are still to be made, their raw results, and going on after an interruption."""

from __future__ import annotations

import fcntl
import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import IO

import msgspec

from daxemu.errors import Busy, InvalidArgument
from daxemu.evaluate.plan import Plan
from daxemu.evaluate.scheduler import Scheduler
from daxemu.evaluate.trial import Key, Result, Task


class Outputs:
    """The files of a report, all beside each other: REPORT.html, .json, .csv, .trials.jsonl (the raw
    results).
    """

    def __init__(self, report: Path) -> None:
        """``report``: with or without .html. Raises InvalidArgument."""
        base = report.with_suffix("") if report.suffix == ".html" else report
        if not base.name or base.is_dir() or not base.absolute().parent.is_dir():
            raise InvalidArgument(f"{report}: give the name of a file in a directory that exists")
        self.html, self.json, self.csv, self.trials = (
            base.with_name(base.name + suffix) for suffix in (".html", ".json", ".csv", ".trials.jsonl")
        )


def keys(plan: Plan) -> list[Key]:
    """Every trial of a plan. The strategies of one comparison come one after another, so that whatever else
    the machine does meets them alike.
    """
    return [
        Key(strategy, workload.label, faults.name, repetition)
        for repetition, faults, workload, strategy in itertools.product(
            range(plan.repetitions), plan.faults, plan.workload, plan.strategies
        )
    ]


class Campaign:
    """The trials of ``plan`` (``text`` is its TOML), kept in ``path`` as they end. A context manager."""

    def __init__(self, plan: Plan, text: str, path: Path) -> None:
        """Raises Busy when another evaluation writes there."""
        self.plan = plan
        self._text = text
        self._file: IO[bytes] = open(path, "a+b")  # noqa: SIM115 - lives as long as this object
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise Busy(f"{path} is being written to by another evaluation: give another -o") from error
        self.results: dict[Key, Result] = {}
        self._read()

    def __enter__(self) -> Campaign:
        return self

    def __exit__(self, *exc: object) -> None:
        self._file.close()

    def _read(self) -> None:
        self._file.seek(0)
        wanted = {key: self.plan.fingerprint(key.workload, key.faults) for key in keys(self.plan)}
        for result in read_results(self._file):
            if wanted.get(result.key) == result.fingerprint:
                self.results[result.key] = result
        if self._file.tell() and not self._ends_well():
            self._file.write(b"\n")  # half a line: whoever wrote it was killed

    def _ends_well(self) -> bool:
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) == b"\n"

    def left(self) -> list[Task]:
        """What is still to be made; what failed is tried again."""
        return [
            Task(self._text, key)
            for key in keys(self.plan)
            if (made := self.results.get(key)) is None or made.failed is not None
        ]

    def run(self, scheduler: Scheduler, done: Callable[[Result], None]) -> None:
        """Make them all, telling ``done`` of each. When interrupted, what is done is kept."""
        try:
            for result in scheduler.results(self.left()):
                self._keep(result)
                done(result)
        finally:
            scheduler.stop()

    def _keep(self, result: Result) -> None:
        self.results[result.key] = result
        self._file.write(msgspec.json.encode(result) + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def good(self) -> list[Result]:
        """Results, less the failed trials, in the order of the plan."""
        made = (self.results.get(key) for key in keys(self.plan))
        return [result for result in made if result is not None and result.failed is None]

    def failed(self) -> list[Result]:
        """Trials that gave no result."""
        return [result for result in self.results.values() if result.failed is not None]


def read_results(lines: Iterable[bytes]) -> Iterable[Result]:
    """The results in raw lines; a line that is none, such as half of one, is passed over."""
    for line in lines:
        try:
            yield msgspec.json.decode(line, type=Result)
        except msgspec.MsgspecError:
            continue
