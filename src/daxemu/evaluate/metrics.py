"""Figures of one trial, computed from its raw result, and of all trials in a report cell.

A report cell has the trials of one strategy on one workload under one fault plan.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import msgspec

from daxemu.evaluate.plan import Plan
from daxemu.evaluate.statistics import Estimate, mean, quantile
from daxemu.evaluate.trial import Result
from daxemu.ranges import RangeSet
from daxemu.uapi import page_align_down, page_align_up
from daxemu.units import PHYS_PFN

SIGBUS = 7


class Metric(msgspec.Struct, frozen=True):
    """Title, unit and explanation of a figure. ``more_is_better`` is None if neither direction is better."""

    title: str
    unit: str
    text: str
    more_is_better: bool | None = False


METRICS: dict[str, Metric] = {
    "bytes_lost": Metric("Bytes lost", "B", "bytes that are unreadable, or wrong and reported as lost"),
    "files_lost": Metric("Damaged files", "", "files with lost bytes"),
    "silent": Metric("Silent corruptions", "", "byte ranges with wrong content and no report"),
    "silent_bytes": Metric("Silent bytes", "B", "bytes with wrong content and no report"),
    "told": Metric("Processes signalled", "", "distinct processes sent SIGBUS"),
    "killed": Metric("Killed", "", "deaths of the workload by SIGBUS"),
    "errors": Metric("Failed operations", "", "operations that returned an error"),
    "unavailable": Metric("Unavailable", "s", "time in which no operation succeeded"),
    "recovered": Metric("Recovered", "", "failures without loss of data", more_is_better=True),
    "found": Metric("Corruptions found", "", "silent corruptions that a checksum found", more_is_better=True),
    "throughput": Metric("Throughput", "op/s", "operations per second, faults included", more_is_better=True),
    "relative": Metric(
        "Against baseline", "%", "throughput against the baseline in the same repetition", more_is_better=True
    ),
    "space": Metric("Space", "%", "bytes stored by the strategy, as a share of the data"),
}


class TrialFigures(msgspec.Struct, kw_only=True):
    """Figures of one trial; None for a figure that the trial could not measure."""

    values: dict[str, float | None]
    repairs: list[float]
    """Seconds of each repair, as reported in RepairFinished events."""
    handled: list[float]
    """Seconds from each injection to the end of the memory failure."""


def figures(result: Result) -> TrialFigures:
    """Compute the figures of one trial."""
    lost, silent = losses(result)
    finished = [e for e in result.events if e["event"] == "RepairFinished"]
    ops = result.samples[-1][1] if result.samples else 0
    space = result.repair.get("space_bytes")
    return TrialFigures(
        values={
            "bytes_lost": float(sum(length for _, _, length in lost)),
            "files_lost": float(len({path for path, _, _ in lost})),
            "silent": float(len(silent)),
            "silent_bytes": float(sum(length for _, _, length in silent)),
            "told": float(len({e["pid"] for e in result.events if e["event"] == "SignalSent"})),
            "killed": float(sum(life.status == -SIGBUS for life in result.lives)),
            "errors": float(result.samples[-1][3] if result.samples else 0),
            "unavailable": result.down,
            "recovered": float(sum(e["verdict"] == "recovered" for e in finished)) if finished else None,
            "found": float(sum(e["event"] == "CorruptionFound" for e in result.events)),
            "throughput": ops / result.seconds,
            "relative": None,
            "space": None if space is None or not result.size else 100.0 * space / result.size,
        },
        repairs=[float(e["seconds"]) for e in finished],
        handled=_handled(result),
    )


Lost = list[tuple[str, int, int]]
"""List of (path, offset, length) in bytes. Offset -1: somewhere in the file."""


def losses(result: Result) -> tuple[Lost, Lost]:
    """Return (lost, silently corrupted) ranges of a trial.

    A range is lost if a read failed or an event reported the range. Otherwise the corruption is silent. After
    a shutdown every mismatch counts as lost: the filesystem refused the stores with an error. On a removed or
    unmountable device all data is lost.
    """
    if result.state == "removed" or result.unmountable is not None:
        return [("(everything)", 0, result.size)], []
    said = reported(result)
    lost: Lost = []
    silent: Lost = []
    for mismatch in result.bad:
        known = said.get(mismatch.ino)
        if mismatch.state == "unreadable" or result.state == "shut down":
            known_lost = True
        elif mismatch.offset < 0:
            known_lost = known is not None
        else:
            known_lost = known is not None and known.overlaps(
                mismatch.offset, mismatch.offset + mismatch.length
            )
        (lost if known_lost else silent).append((mismatch.path, mismatch.offset, mismatch.length))
    return lost, silent


def reported(result: Result) -> dict[int, RangeSet]:
    """Return, by inode, the pages which an event of the trial reported as damaged or lost."""
    said: dict[int, RangeSet] = defaultdict(RangeSet)

    def add(ino: int, offset: int, length: int) -> None:
        start = page_align_down(offset)
        said[ino].add(start, page_align_up(offset + length))

    for event in result.events:
        if event["event"] in ("FileDamaged", "StoreLost"):
            add(event["ino"], event["offset"], event["length"])
        elif event["event"] == "RepairFinished":
            for ino, offset, length in event["lost"]:
                add(ino, offset, length)
    return said


def _handled(result: Result) -> list[float]:
    """Return seconds from each injection to the next MemoryFailureHandled of the same first page."""
    ends: dict[int, list[float]] = defaultdict(list)
    for event in result.events:
        if event["event"] == "MemoryFailureHandled":
            ends[event["pfn"]].append(event["time"])
    found = []
    for event in result.events:
        if event["event"] == "PoisonInjected" and not event.get("latent"):
            pfn = result.base_pfn + PHYS_PFN(event["offset"])
            after = [t for t in ends[pfn] if t >= event["time"]]
            if after:
                found.append(after[0] - event["time"])
    return found


class ReportCell(msgspec.Struct, kw_only=True):
    """All repetitions of one strategy on one workload under one fault plan."""

    strategy: str
    workload: str
    faults: str
    trials: int
    metrics: dict[str, Estimate | None]
    repair_median: Estimate | None
    repair_p99: Estimate | None
    handled_median: Estimate | None
    handled_p99: Estimate | None
    injected: float
    """Mean number of injected faults in a trial. Missed and refused faults do not count."""
    verdicts: dict[str, int]
    size: float
    """Mean number of bytes of data."""


def cells(plan: Plan, results: Sequence[Result]) -> list[ReportCell]:
    """Return one cell for each combination with at least one trial, in the plan's order."""
    by_key = {result.key: (result, figures(result)) for result in results}
    groups: dict[tuple[str, str, str], list[tuple[Result, TrialFigures]]] = defaultdict(list)
    for key, (result, found) in sorted(by_key.items()):
        base = by_key.get(msgspec.structs.replace(key, strategy=plan.baseline))
        if base is not None and base[1].values["throughput"]:
            own, theirs = found.values["throughput"], base[1].values["throughput"]
            assert own is not None
            assert theirs is not None
            found.values["relative"] = 100.0 * own / theirs
        groups[key.strategy, key.workload, key.faults].append((result, found))
    return [
        _cell(strategy, workload.label, faults.name, group)
        for faults in plan.faults
        for workload in plan.workload
        for strategy in plan.strategies
        if (group := groups.get((strategy, workload.label, faults.name)))
    ]


def _cell(strategy: str, workload: str, faults: str, group: list[tuple[Result, TrialFigures]]) -> ReportCell:
    metrics = {}
    for name in METRICS:
        values = [found.values[name] for _, found in group]
        metrics[name] = mean([v for v in values if v is not None and math.isfinite(v)], least=0.0)
    repairs = [found.repairs for _, found in group]
    handled = [found.handled for _, found in group]
    verdicts: dict[str, int] = defaultdict(int)
    for result, _ in group:
        for event in result.events:
            if event["event"] == "RepairFinished":
                verdicts[event["verdict"]] += 1
    hits = sum(sum(f.result == "injected" for f in result.faults) for result, _ in group)
    return ReportCell(
        strategy=strategy,
        workload=workload,
        faults=faults,
        trials=len(group),
        metrics=metrics,
        repair_median=quantile(repairs, 0.5),
        repair_p99=quantile(repairs, 0.99),
        handled_median=quantile(handled, 0.5),
        handled_p99=quantile(handled, 0.99),
        injected=hits / len(group),
        verdicts=dict(verdicts),
        size=sum(result.size for result, _ in group) / len(group),
    )


def summary(plan: Plan, results: Sequence[Result], failed: Sequence[Result]) -> dict[str, Any]:
    """Return all figures of a report as JSON-compatible builtins."""
    return {
        "plan": msgspec.to_builtins(plan, enc_hook=int),
        "modes": sorted({result.mode for result in results}),
        "versions": sorted({result.version for result in results}),
        "trials": len(results),
        "failed": [{"trial": str(result.key), "why": result.failed} for result in failed],
        "cells": [msgspec.to_builtins(cell) for cell in cells(plan, results)],
    }
