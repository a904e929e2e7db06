"""Report of an evaluation: one self-contained HTML file, and the same figures as JSON and CSV."""

from __future__ import annotations

import csv
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from daxemu.evaluate.campaign import Outputs
from daxemu.evaluate.metrics import METRICS, ReportCell, cells, figures, summary
from daxemu.evaluate.page import legend, page
from daxemu.evaluate.plan import FaultPlan, Plan, mean_faults
from daxemu.evaluate.plots import (
    Colors,
    colors,
    device_map,
    distributions,
    loss_against_overhead,
    outcome,
    seconds,
    timeline,
)
from daxemu.evaluate.statistics import Estimate
from daxemu.evaluate.trial import Result
from daxemu.events.mounts import Mode
from daxemu.sizes import counted, human
from daxemu.text import for_html

MOUNTED: dict[Mode, str] = {
    "page cache": "mounted in page-cache mode",
    "direct": "mounted for direct mappings (daxemu mount --direct), the workload under daxemu run",
}
MAPPED: dict[Mode, str] = {
    "page cache": "A page-cache mapping stands for a DAX mapping: a strategy sees a store through a mapping "
    "only when the page is written back. The measured cost and protection of such stores are an upper bound.",
    "direct": "A mapping is one of the media, as on DAX: a store through a mapping is on the media at once, "
    "and a strategy sees the store at the next msync or fsync.",
}
LATENCIES = ("repair_median", "repair_p99", "handled_median", "handled_p99")


def write_reports(plan: Plan, results: Sequence[Result], failed: Sequence[Result], outputs: Outputs) -> None:
    """Write REPORT.html, REPORT.json and REPORT.csv. Each file is replaced atomically (rename)."""
    _replace(outputs.json, json.dumps(summary(plan, results, failed), indent=1) + "\n")
    _write_csv(outputs.csv, cells(plan, results))
    _replace(outputs.html, html(plan, results, failed))


def _replace(path: Path, text: str) -> None:
    made = path.with_name(path.name + ".new")
    made.write_text(text, encoding="utf-8")
    made.replace(path)


def _write_csv(path: Path, found: Sequence[ReportCell]) -> None:
    columns = [*METRICS, *LATENCIES]
    made = path.with_name(path.name + ".new")
    with open(made, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        head = ["strategy", "workload", "faults", "trials", "injected"]
        writer.writerow(head + [f"{name}{part}" for name in columns for part in ("", "_low", "_high")])
        for cell in found:
            row: list[Any] = [cell.strategy, cell.workload, cell.faults, cell.trials, cell.injected]
            for name in columns:
                estimate = _estimate(cell, name)
                row += ["", "", ""] if estimate is None else [estimate.value, estimate.low, estimate.high]
            writer.writerow(row)
    made.replace(path)


def _estimate(cell: ReportCell, name: str) -> Estimate | None:
    found: Estimate | None = cell.metrics[name] if name in METRICS else getattr(cell, name)
    return found


def html(plan: Plan, results: Sequence[Result], failed: Sequence[Result]) -> str:
    """Return the report as one HTML document."""
    found = cells(plan, results)
    by = colors(plan.strategies)
    parts = [_opening(plan, results, failed), _in_short(plan, found, by)]
    for faults in plan.faults:
        here = [cell for cell in found if cell.faults == faults.name]
        if here:
            parts.append(_section(plan, faults, here, found, results, by))
    parts.append(_how_to_read(plan))
    return page(f"daxemu evaluate: {plan.name}", "".join(parts))


def _opening(plan: Plan, results: Sequence[Result], failed: Sequence[Result]) -> str:
    versions = ", ".join(sorted({result.version for result in results}))
    text = (
        f"<h1>{for_html(plan.name)}</h1><p>Repair strategies: {len(plan.strategies)}, on "
        f"{counted(len(plan.workload), 'workload')} under {counted(len(plan.faults), 'fault plan')}, in "
        f"{counted(len(results), 'trial')} of {plan.seconds:g} s, each on a fresh {human(plan.device)} "
        f"device, {MOUNTED[plan.mode]}. The faults were the same for every strategy "
        f"(seed {plan.seed}). Baseline: <b>{for_html(plan.baseline)}</b>. Made with daxemu "
        f"{for_html(versions)}, an emulator: its times are those of this machine, not of persistent "
        "memory.</p>"
    )
    if failed:
        rows = "".join(
            f"<li>{for_html(str(result.key))}: {for_html(result.failed or '')}</li>" for result in failed
        )
        how_many = counted(len(failed), "trial")
        text += f"<p class=warning>{how_many} without a result, in no figure:</p><ul>{rows}</ul>"
    return text


def _in_short(plan: Plan, found: Sequence[ReportCell], by: Colors) -> str:
    """Return the summary table: one row for each strategy.

    Losses are sums over the workloads of the mean loss in one trial. Slowdown and space are means.
    """
    names = ["bytes_lost", "silent", "killed", "unavailable"]
    faulty = [f.name for f in plan.faults if f.process]
    quiet = next((f.name for f in plan.faults if not f.process), None)
    overheads = {f: _overheads(found, quiet or f) for f in faulty or [quiet or ""]}
    head = "".join(f"<th colspan={len(names)}>{for_html(name)}</th>" for name in faulty)
    second = "".join(f"<th>{METRICS[name].title}</th>" for name in names) * len(faulty)
    rows = []
    for strategy in plan.strategies:
        mine = [cell for cell in found if cell.strategy == strategy]
        if not mine:
            continue
        slower = [e.value for by_cell in overheads.values() for (s, _), e in by_cell.items() if s == strategy]
        space = [e.value for cell in mine if (e := cell.metrics["space"]) is not None]
        tds = [_average(slower), _average(space)]
        for faults in faulty:
            here = [cell for cell in mine if cell.faults == faults]
            for name in names:
                values = [e.value for cell in here if (e := cell.metrics[name]) is not None]
                total = Estimate(sum(values), None, None, len(values)) if values else None
                tds.append(_value(total, METRICS[name].unit))
        swatch = f'<i style="background:{by[strategy]}"></i>'
        rows.append(f"<tr><th>{swatch}{for_html(strategy)}</th>{''.join(tds)}</tr>")
    where = "without faults" if quiet else "under faults"
    return (
        f"<section><h2>In short</h2><p>Slowdown ({where}, against the baseline) and space are means over the "
        "workloads. Losses are sums over the workloads of the mean loss in one trial.</p>"
        f"<div class=wide><table><thead><tr><th></th><th></th><th></th>{head}</tr>"
        f"<tr><th>Strategy</th><th>Slower</th><th>Space</th>{second}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _average(values: Sequence[float]) -> str:
    found = Estimate(sum(values) / len(values), None, None, len(values)) if values else None
    return _value(found, "%")


def _describe(plan: Plan, faults: FaultPlan) -> str:
    if not faults.process:
        return "No faults: the cost of each strategy in normal operation."
    words = []
    for p in faults.process:
        units = ", ".join(unit for unit, weight in p.unit.items() if weight)
        what = f"{p.kind}s" if p.kind.traits.whole_device else f"{p.kind} faults of {units} in {p.target}"
        words.append(f"{mean_faults(plan, p):.3g} {what} ({p.arrival}, found by {_found(p.detect)})")
    scrub = f"; a scrub every {faults.scrub_period:g} s" if faults.scrub_period else ""
    return "In a trial, on average: " + "; ".join(words) + scrub + "."


def _found(detect: str) -> str:
    return {"reported": "the hardware at once", "access": "access", "delay": "the hardware later"}.get(
        detect, "scrub"
    )


def _section(
    plan: Plan,
    faults: FaultPlan,
    here: Sequence[ReportCell],
    everything: Sequence[ReportCell],
    results: Sequence[Result],
    by: Colors,
) -> str:
    mine = [result for result in results if result.key.faults == faults.name]
    workloads = [w.label for w in plan.workload]
    parts = [
        f"<section><h2>Faults: {for_html(faults.name)}</h2><p>{for_html(_describe(plan, faults))}</p>",
        legend(by, workloads),
    ]
    quiet = next((f.name for f in plan.faults if not f.process), None)
    overhead = _overheads(everything, quiet or faults.name)
    if overhead and faults.process:
        where = f"without faults (plan {quiet!r})" if quiet else "under these faults"
        parts.append("<h3>Loss against overhead</h3>")
        parts.append(f"<p>Down and to the left is better. Slowdown is measured {for_html(where)}.</p>")
        parts.append(f"<figure>{loss_against_overhead(here, overhead, by)}</figure>")
    for workload in workloads:
        rows = [cell for cell in here if cell.workload == workload]
        if rows:
            parts.append(f"<h3>{for_html(workload)}</h3>{_table(rows, by, quiet=not faults.process)}")
    parts.append(_latencies(mine, by))
    parts.append(_trials(plan, mine))
    return "".join(parts) + "</section>"


def _overheads(everything: Sequence[ReportCell], faults: str) -> dict[tuple[str, str], Estimate]:
    found = {}
    for cell in everything:
        relative = cell.metrics["relative"]
        if cell.faults == faults and relative is not None:
            low = None if relative.high is None else 100 - relative.high
            high = None if relative.low is None else 100 - relative.low
            found[cell.strategy, cell.workload] = Estimate(100 - relative.value, low, high, relative.n)
    return found


def _table(rows: Sequence[ReportCell], by: Colors, *, quiet: bool) -> str:
    # Columns shown even if every value is zero.
    telling = () if quiet else ("bytes_lost", "silent", "killed", "unavailable")
    shown = [
        name
        for name in METRICS
        if any((e := _estimate(cell, name)) is not None and (e.value or name in telling) for cell in rows)
    ]
    shown_latencies = [name for name in LATENCIES if any(_estimate(cell, name) is not None for cell in rows)]
    titles = {
        "repair_median": "Repair, median",
        "repair_p99": "Repair, 99 %",
        "handled_median": "Handled, median",
        "handled_p99": "Handled, 99 %",
    }
    head = "".join(
        [f'<th title="{for_html(METRICS[name].text)}">{METRICS[name].title}</th>' for name in shown]
        + [f"<th>{titles[name]}</th>" for name in shown_latencies]
    )
    body = []
    for cell in rows:
        tds = [_value(_estimate(cell, name), METRICS[name].unit) for name in shown]
        tds += [_value(_estimate(cell, name), "s") for name in shown_latencies]
        swatch = f'<i style="background:{by[cell.strategy]}"></i>'
        body.append(
            f"<tr><th>{swatch}{for_html(cell.strategy)}</th><td>{cell.trials}</td>{''.join(tds)}</tr>"
        )
    return (
        f"<div class=wide><table><thead><tr><th>Strategy</th><th>Trials</th>{head}</tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _value(estimate: Estimate | None, unit: str) -> str:
    if estimate is None:
        return "<td class=none>none</td>"

    def show(value: float) -> str:
        if unit == "s":
            return seconds(value) if value else "0"
        if unit == "B":
            return human(round(value))
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"

    text = show(estimate.value) + (" %" if unit == "%" else "")
    if estimate.low is None or estimate.high is None:
        return f"<td>{text}</td>"
    if show(estimate.low) == show(estimate.high):
        return f"<td>{text}</td>"
    return f"<td>{text}<small>{show(estimate.low)} … {show(estimate.high)}</small></td>"


def _latencies(mine: Sequence[Result], by: Colors) -> str:
    repairs: dict[str, list[float]] = defaultdict(list)
    handled: dict[str, list[float]] = defaultdict(list)
    for result in mine:
        found = figures(result)
        repairs[result.key.strategy] += found.repairs
        handled[result.key.strategy] += found.handled
    parts = []
    if any(repairs.values()):
        parts.append("<h3>Duration of repairs</h3><figure>")
        parts.append(distributions(repairs, by, "from the failure to the strategy's verdict") + "</figure>")
    if any(handled.values()):
        parts.append("<h3>Duration of memory failures</h3><figure>")
        parts.append(distributions(handled, by, "from the injection to the end of its memory failure"))
        parts.append("</figure>")
    return "".join(parts)


def _trials(plan: Plan, mine: Sequence[Result]) -> str:
    parts = ["<h3>Each trial</h3><p>Hover over a mark for details. Open a line for timelines and map.</p>"]
    first = True
    for workload in (w.label for w in plan.workload):
        for repetition in range(plan.repetitions):
            group = [r for r in mine if (r.key.workload, r.key.repetition) == (workload, repetition)]
            if not group:
                continue
            opened = " open" if first and any(r.faults for r in group) else ""
            first = False
            timelines = "".join(
                f"<h4>{for_html(r.key.strategy)}: {for_html(outcome(r))}</h4><figure>{timeline(r)}</figure>"
                for r in group
            )
            maps = f"<h4>Map of the device</h4><figure>{device_map(group)}</figure>"
            if not any(r.faults for r in group):
                maps = ""
            parts.append(
                f"<details{opened}><summary>{for_html(workload)}, repetition {repetition + 1}</summary>"
                f"{maps}{timelines}</details>"
            )
    return "".join(parts)


def _how_to_read(plan: Plan) -> str:
    rows = "".join(f"<dt>{metric.title}</dt><dd>{for_html(metric.text)}</dd>" for metric in METRICS.values())
    return (
        "<section><h2>How to read this</h2><dl>" + rows + "</dl>"
        "<p>Below a value: its 95 % confidence interval, Student's t over trials for means, a bootstrap over "
        "trials and values for medians and 99th percentiles. No interval: too few observations. Timelines: "
        "<b class=bad>▮</b> fault or loss, <b class=good>▮</b> recovered, <b class=warn>▮</b> signal or "
        "other result, <b class=faint>▮</b> no data was affected. "
        f"{MAPPED[plan.mode]}</p>"
        "<h3>The plan</h3><details><summary>as read from the file</summary>"
        f"<pre>{for_html(_plan_text(plan))}</pre></details></section>"
    )


def _plan_text(plan: Plan) -> str:
    return json.dumps(summary(plan, [], [])["plan"], indent=1)
