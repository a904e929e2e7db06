"""Plots of a report: loss against overhead, distributions of durations, timelines, device maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from daxemu.evaluate.metrics import ReportCell, losses
from daxemu.evaluate.statistics import Estimate
from daxemu.evaluate.svg import PALETTE, Scale, Svg, decade_ticks, doubling_ticks, round_ticks
from daxemu.evaluate.trial import Result
from daxemu.sizes import counted, human
from daxemu.uapi import PAGE_SIZE
from daxemu.units import PHYS_PFN

MAX_MARKS = 400
"""Maximum number of marks in one lane of a timeline. More marks overlap."""

Colors = Mapping[str, str]


def colors(strategies: Sequence[str]) -> Colors:
    """Return a colour for each strategy."""
    return {name: PALETTE[i % len(PALETTE)] for i, name in enumerate(strategies)}


def seconds(value: float) -> str:
    """Return a duration as text: in s, ms or µs. ``value`` is in seconds."""
    for scale, unit in ((1.0, "s"), (1e-3, "ms")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def loss_against_overhead(
    cells: Sequence[ReportCell], overhead: Mapping[tuple[str, str], Estimate], by: Colors
) -> str:
    """Plot bytes lost in a trial against slowdown: one point for each strategy and workload.

    ``overhead``: slowdown to the baseline in per cent, by (strategy, workload).
    """
    shown = [c for c in cells if c.metrics["bytes_lost"] is not None and (c.strategy, c.workload) in overhead]
    drawing = Svg(760, 380, "bytes lost against slowdown, a point for each strategy and workload")
    slow = [overhead[c.strategy, c.workload] for c in shown]
    lost = [found for c in shown if (found := c.metrics["bytes_lost"]) is not None]
    right = max([10.0, *(min(e.high or e.value, 100.0) for e in slow)])
    left = min([0.0, *(max(e.low if e.low is not None else e.value, -50.0) for e in slow)])
    top = max([4096.0, *(e.high if e.high is not None else e.value for e in lost)])
    x, y = Scale(left, right, 80, 740), Scale(0, top, 320, 20, knee=512)
    for tick in round_ticks(left, right):
        drawing.line(x(tick), 20, x(tick), 320, "grid")
        drawing.text(x(tick), 338, f"{tick:g} %", "middle")
    for tick in doubling_ticks(top, 1024):
        drawing.line(80, y(tick), 740, y(tick), "grid")
        drawing.text(74, y(tick) + 4, human(int(tick)), "end")
    drawing.text(410, 366, "slower than the baseline", "middle")
    drawing.text(18, 170, "bytes lost in a trial", "middle", turn=True)
    workloads = sorted({c.workload for c in cells})
    for cell, across, up in zip(shown, slow, lost, strict=True):
        color = by[cell.strategy]
        at = (x(min(max(across.value, left), right)), y(up.value))
        if across.low is not None and across.high is not None:
            drawing.line(x(max(across.low, left)), at[1], x(min(across.high, right)), at[1], "whisker", color)
        if up.low is not None and up.high is not None:
            drawing.line(at[0], y(up.low), at[0], y(up.high), "whisker", color)
        title = (
            f"{cell.strategy}, {cell.workload}: {human(round(up.value))} lost, {across.value:.1f} % slower "
            f"({cell.trials} trials)"
        )
        drawing.mark(*at, workloads.index(cell.workload), color, title)
    return str(drawing)


def distributions(values: Mapping[str, Sequence[float]], by: Colors, what: str) -> str:
    """Plot cumulative distributions of durations, one curve for each strategy. The x axis is logarithmic.

    ``values``: seconds, by strategy; at least one strategy must have a value.
    """
    shown = {name: np.sort(np.asarray(found)) for name, found in values.items() if len(found)}
    drawing = Svg(760, 300, f"distribution of {what}, by strategy")
    high = max(float(found[-1]) for found in shown.values()) * 1.05
    low = max(min(float(found[0]) for found in shown.values()), 1e-5)
    x, y = Scale(0, high, 60, 740, knee=low / 2), Scale(0, 1, 250, 15)
    for tick in decade_ticks(low, high):
        drawing.line(x(tick), 15, x(tick), 250, "grid")
        drawing.text(x(tick), 268, seconds(tick), "middle")
    for tick in (0.0, 0.5, 0.99):
        drawing.line(60, y(tick), 740, y(tick), "grid")
        drawing.text(54, y(tick) + 4, f"{tick * 100:g} %", "end")
    drawing.text(400, 292, what, "middle")
    for name, found in shown.items():
        points: list[tuple[float, float]] = [(x(0), y(0))]
        for i, value in enumerate(found):
            points += [(x(value), y(i / len(found))), (x(value), y((i + 1) / len(found)))]
        drawing.path([*points, (x(high), y(1))], "curve", by[name])
    return str(drawing)


def timeline(result: Result) -> str:
    """Plot one trial over time: faults, signals, repairs, lives of the workload, operations per second."""
    drawing = Svg(760, 152, f"timeline of {result.key}")
    x = Scale(0, result.seconds, 90, 750)
    for tick in round_ticks(0, result.seconds, 6):
        drawing.line(x(tick), 8, x(tick), 132, "grid")
        drawing.text(x(tick), 147, f"{tick:g} s", "middle" if tick < result.seconds * 0.98 else "end")
    lanes = {name: 14 + 24 * i for i, name in enumerate(("faults", "signals", "repairs", "workload", "op/s"))}
    for name, top in lanes.items():
        drawing.text(84, top + 13, name, "end")
    for fault in result.faults[:MAX_MARKS]:
        drawn = fault.fault
        css = {"injected": "bad", "missed": "faint", "refused": "warn"}[fault.result]
        outcome_text = f", {fault.outcome}" if fault.outcome else ""
        where = f" {fault.path}" if fault.path else ""
        what = f"{drawn.kind} {drawn.unit}{where} {human(fault.length)}"
        title = f"{drawn.time:.3f} s: {what}: {fault.result}{outcome_text}"
        drawing.rect(x(drawn.time) - 1, lanes["faults"], 3, 16, css, title)
    for scrub in result.scrubs:
        drawing.rect(x(scrub["time"]), lanes["faults"] + 16, 6, 3, "scrub", f"scrub at {scrub['time']:.3f} s")
    events = [e for e in result.events if 0 <= e["time"] <= result.seconds]
    for event in [e for e in events if e["event"] == "SignalSent"][:MAX_MARKS]:
        title = f"{event['time']:.3f} s: SIGBUS code {event['code']} to {event['comm']}: {event['result']}"
        drawing.rect(x(event["time"]) - 1, lanes["signals"], 3, 16, "warn", title)
    for event in [e for e in events if e["event"] == "RepairFinished"][:MAX_MARKS]:
        css = {"recovered": "good", "lost": "bad"}.get(event["verdict"], "warn")
        title = (
            f"{event['time']:.3f} s: {event['strategy']} {event['verdict']} in {seconds(event['seconds'])}"
        )
        drawing.rect(x(event["time"]) - 1, lanes["repairs"], 3, 16, css, title)
    for event in [e for e in events if e["event"] == "CorruptionFound"][:MAX_MARKS]:
        how = f"corruption found by {event['by']}{', repaired' if event['repaired'] else ''}"
        css = "good" if event["repaired"] else "warn"
        drawing.rect(x(event["time"]) - 1, lanes["repairs"], 3, 16, css, f"{event['time']:.3f} s: {how}")
    for life in result.lives:
        end = min(life.end, result.seconds)
        served = end if life.first is None else min(max(life.first, 0.0), end)
        how = f"killed by signal {-life.status}" if life.status < 0 else f"exit {life.status}"
        title = f"began at {life.start:.2f} s, served from {served:.2f}, ended at {life.end:.2f} s: {how}"
        for start, until, css in ((max(life.start, 0.0), served, "faint"), (served, end, "alive")):
            if until > start:
                drawing.rect(x(start), lanes["workload"] + 4, x(until) - x(start), 8, css, title)
        if life.status and life.end < result.seconds:
            drawing.rect(x(life.end) - 1, lanes["workload"], 3, 16, "bad", f"died at {life.end:.2f} s")
    _rate(drawing, result, x, lanes["op/s"])
    return str(drawing)


def _rate(drawing: Svg, result: Result, x: Scale, top: float) -> None:
    rates = []
    for before, after in pairwise(result.samples):
        if after[0] > before[0] and 0 <= after[0] <= result.seconds:
            rates.append((after[0], (after[1] - before[1]) / (after[0] - before[0])))
    if rates:
        y = Scale(0, max(rate for _, rate in rates) or 1.0, top + 18, top)
        drawing.path([(x(t), y(rate)) for t, rate in rates], "curve", "currentColor")


def device_map(results: Sequence[Result]) -> str:
    """Plot one row for each strategy: injected ranges on the device, coloured by verdict.

    The map covers the part of the device up to the last fault or the last used byte.
    """
    drawing = Svg(760, 18.0 + 22 * len(results) + 18, "map of the device, a row for each strategy")
    size = _part_of_interest(results)
    x = Scale(0, size, 130, 750)
    for row, result in enumerate(results):
        top = 8.0 + 22 * row
        drawing.text(124, top + 12, result.key.strategy, "end")
        drawing.rect(130, top, 620, 16, "media")
        verdicts = {e["pfn"]: e["verdict"] for e in result.events if e["event"] == "RepairFinished"}
        owners = {e["pfn"]: e["files"] for e in result.events if e["event"] == "MemoryFailureHandled"}
        for fault in result.faults[: MAX_MARKS * 2]:
            if fault.result != "injected":
                continue
            pfn = result.base_pfn + PHYS_PFN(fault.offset)
            verdict = verdicts.get(pfn, "")
            css = "good" if verdict == "recovered" else "faint" if owners.get(pfn) == 0 else "bad"
            title = (
                f"{human(fault.offset)} + {human(fault.length)}: {fault.fault.kind} {fault.fault.unit}"
                f"{', ' + verdict if verdict else ''}{', no file affected' if css == 'faint' else ''}"
            )
            width = max(x(fault.offset + fault.length) - x(fault.offset), 2.0)
            drawing.rect(x(fault.offset), top, width, 16, css, title)
    bottom = 8.0 + 22 * len(results)
    for part in range(5):
        at = size * part // 4
        anchor = "middle" if part < 4 else "end"
        drawing.text(x(at), bottom + 14, human(at), anchor)
    return str(drawing)


def _part_of_interest(results: Sequence[Result]) -> int:
    """Return the number of device bytes to show.

    The device size is halved as long as the map still holds every fault and the used bytes.
    """
    size = max(max(result.device for result in results), PAGE_SIZE)
    needed = max(
        max((f.offset + f.length for r in results for f in r.faults if f.result == "injected"), default=0),
        max(result.used for result in results),
    )
    while size // 2 >= max(needed, PAGE_SIZE):
        size //= 2
    return size


def outcome(result: Result) -> str:
    """Summarize a trial in a few words: bytes lost, silent corruptions, deaths, state of the mount."""
    lost, silent = losses(result)
    words = [f"{human(sum(length for *_, length in lost))} lost" if lost else "nothing lost"]
    if silent:
        words.append(counted(len(silent), "silent corruption"))
    deaths = sum(life.status != 0 for life in result.lives)
    if deaths:
        words.append(counted(deaths, "death"))
    if result.state != "mounted":
        words.append(result.state)
    return ", ".join(words)
