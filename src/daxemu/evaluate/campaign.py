"""Campaign: all trials of a plan, their raw results, and continuation after an interruption."""

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
from daxemu.evaluate.trial import Key, Result, TrialRequest


class Outputs:
    """Paths of a report, in one directory: REPORT.html, .json, .csv, .trials.jsonl (raw results)."""

    def __init__(self, report: Path) -> None:
        """Derive all paths from ``report``, with or without .html.

        Raises InvalidArgument if the name is empty or a directory, or if the parent directory does not exist.
        """
        base = report.with_suffix("") if report.suffix == ".html" else report
        if not base.name or base.is_dir() or not base.absolute().parent.is_dir():
            raise InvalidArgument(f"{report}: give the name of a file in a directory that exists")
        self.html, self.json, self.csv, self.trials = (
            base.with_name(base.name + suffix) for suffix in (".html", ".json", ".csv", ".trials.jsonl")
        )


def keys(plan: Plan) -> list[Key]:
    """Return the keys of all trials of a plan.

    The strategies of one comparison follow one another directly, so other load on the machine affects all of
    them alike.
    """
    return [
        Key(strategy, workload.label, faults.name, repetition)
        for repetition, faults, workload, strategy in itertools.product(
            range(plan.repetitions), plan.faults, plan.workload, plan.strategies
        )
    ]


class Campaign:
    """Trials of ``plan``; results are appended to ``path`` as trials end. A context manager.

    ``text``: the plan's TOML text.
    """

    def __init__(self, plan: Plan, text: str, path: Path) -> None:
        """Open ``path`` and read earlier results. Raises Busy if another evaluation has ``path`` open."""
        self.plan = plan
        self._text = text
        self._file: IO[bytes] = open(path, "a+b")  # noqa: SIM115 - lives as long as this object
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.close()
            raise Busy(f"another evaluation is writing to {path}: give another -o") from error
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
            self._file.write(b"\n")  # a truncated line: the writer was killed

    def _ends_well(self) -> bool:
        self._file.seek(-1, os.SEEK_END)
        return self._file.read(1) == b"\n"

    def left(self) -> list[TrialRequest]:
        """Return requests for all trials without a successful result. Failed trials are repeated."""
        return [
            TrialRequest(self._text, key)
            for key in keys(self.plan)
            if (made := self.results.get(key)) is None or made.failed is not None
        ]

    def run(self, scheduler: Scheduler, done: Callable[[Result], None]) -> None:
        """Run all remaining trials; call ``done`` with each result.

        An interruption keeps finished results.
        """
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
        """Return successful results in the plan's order."""
        made = (self.results.get(key) for key in keys(self.plan))
        return [result for result in made if result is not None and result.failed is None]

    def failed(self) -> list[Result]:
        """Return trials without a result."""
        return [result for result in self.results.values() if result.failed is not None]


def read_results(lines: Iterable[bytes]) -> Iterable[Result]:
    """Parse raw result lines; skip lines which do not parse, such as a truncated one."""
    for line in lines:
        try:
            yield msgspec.json.decode(line, type=Result)
        except msgspec.MsgspecError:
            continue
