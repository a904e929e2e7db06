"""fleet: simulated loss of each repair strategy on many devices over years."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from daxemu.cli.common import NumberRange, WholeRange, emit, json_option, table
from daxemu.errors import InvalidArgument
from daxemu.malformed import NOT_JSON, why_not_text
from daxemu.sizes import human

if TYPE_CHECKING:
    from daxemu.evaluate.fleet import Chunk, Totals
    from daxemu.evaluate.fleet_check import Comparison
    from daxemu.evaluate.plan import Plan

FILE = click.Path(path_type=Path, dir_okay=False, exists=True)
HEADER = (
    "FAULTS",
    "STRATEGY",
    "LOST/DEV/YEAR",
    "LOW",
    "HIGH",
    "DAMAGED",
    "SILENT",
    "REPAIRED",
    "SLOWER",
    "SPACE",
)


@click.command()
@click.argument("plan", type=FILE, metavar="PLAN.toml")
@click.option("--costs", type=FILE, help="REPORT.json of an evaluation: measured costs of each strategy.")
@click.option("--devices", type=WholeRange(1), help="NumberRange of devices. Default: the number in PLAN.")
@click.option("--years", type=NumberRange(0, min_open=True), help="Years. Default: the years in PLAN.")
@click.option("--faults", "only", metavar="NAME", help="Simulate only this fault plan.")
@click.option("--scheduler", metavar="ADDRESS", help="Simulate on this Dask cluster; the result is the same.")
@click.option(
    "--check", type=FILE, help="REPORT.json: simulate the trials of this report, and compare the results."
)
@json_option
def fleet(
    plan: Path,
    costs: Path | None,
    devices: int | None,
    years: float | None,
    only: str | None,
    scheduler: str | None,
    check: Path | None,
    as_json: bool,
) -> None:
    """Simulate a fleet: expected loss and repair traffic of each strategy of PLAN, on thousands of devices
    over years, at the rates of the fault plans of PLAN (without acceleration).

    Bytes are for each device and year, with a 95 % interval. DAMAGED is the part of the devices that lost
    data. With --check, exit status 1 means that simulation and emulator do not agree.

    \b
    Example:
      daxemu fleet examples/compare_strategies.toml --costs report.json --devices 10000
    """
    from daxemu.evaluate.plan import load

    loaded, text = load(plan), plan.read_text()
    if check is not None:
        from daxemu.evaluate.fleet_check import compare, disagreements

        compared = list(compare(loaded, text, _report(check, loaded)))
        found = [_compared(c) for c in compared]
        emit({"comparisons": found, "mode": loaded.mode}, as_json, lambda: _comparison_table(compared))
        sys.exit(1 if disagreements(compared) else 0)
    rows = _simulate(loaded, text, _report(costs, loaded) if costs else None, devices, years, only, scheduler)
    emit({"fleet": rows, "mode": loaded.mode}, as_json, lambda: table([_row(row) for row in rows], HEADER))


def _report(path: Path, plan: Plan) -> dict[str, Any]:
    """Read REPORT.json. Raises InvalidArgument for another file, or a report of another mode than the plan's.

    A repair strategy costs and saves something else on a direct mount.
    """
    try:
        report = json.loads(path.read_text())
        if not isinstance(report, dict) or "cells" not in report:
            raise InvalidArgument(f"{path}: no key 'cells': give a REPORT.json of daxemu evaluate")
    except (ValueError, RecursionError) as error:
        reason = why_not_text(error, NOT_JSON)
        raise InvalidArgument(f"{path}: {reason}: give a REPORT.json of daxemu evaluate") from error
    made = report.get("plan", {}).get("mode", "page cache")
    if made != plan.mode:
        raise InvalidArgument(
            f'{path} is of mode "{made}", the plan of "{plan.mode}": give a report of that mode'
        )
    return report


def _simulate(
    plan: Plan,
    text: str,
    report: dict[str, Any] | None,
    devices: int | None,
    years: float | None,
    only: str | None,
    scheduler: str | None,
) -> list[dict[str, Any]]:
    from daxemu.evaluate.fleet import chunks, field_world, run
    from daxemu.evaluate.models import Costs, measured
    from daxemu.evaluate.plan import YEAR

    names = [f.name for f in plan.faults if f.process and only in (None, f.name)]
    if not names:
        raise InvalidArgument(f"no fault plan {only!r}" if only else "the plan has no faults to simulate")
    world = field_world(plan)
    if years is not None:
        world = world._replace(seconds=years * YEAR)
    span = world.seconds / YEAR
    costs = {s: measured(report, s) if report else Costs() for s in plan.strategies}
    compute = _cluster(scheduler)
    rows = []
    for name in names:
        totals = run(chunks(plan, text, name, costs, world, devices or plan.fleet.devices), compute)
        for strategy in plan.strategies:
            rows.append(
                _figures(
                    name, strategy, totals[strategy], span, costs[strategy].slower, costs[strategy].space
                )
            )
    return rows


def _cluster(address: str | None) -> Callable[[Sequence[Chunk]], Iterable[dict[str, Totals]]] | None:
    if address is None:
        return None
    from daxemu.evaluate.fleet import over_dask
    from daxemu.evaluate.scheduler import connect

    return over_dask(connect(address))


def _figures(
    faults: str, strategy: str, totals: Totals, years: float, slower: float | None, space: float | None
) -> dict[str, Any]:
    lost = totals.mean_lost(years)
    return {
        "faults": faults,
        "strategy": strategy,
        "devices": totals.devices,
        "years": years,
        "lost": lost.value,
        "lost_low": lost.low,
        "lost_high": lost.high,
        "hurt": totals.damaged / totals.devices,
        "silent": totals.silent / totals.devices / years,
        "traffic": totals.traffic / totals.devices / years,
        "slower": slower,
        "space": space,
    }


def _row(row: dict[str, Any]) -> tuple[str, ...]:
    def per_cent(value: float | None) -> str:
        return "-" if value is None else f"{value:.1f}%"

    return (
        row["faults"],
        row["strategy"],
        *(_bytes(row[key]) for key in ("lost", "lost_low", "lost_high")),
        f"{row['hurt'] * 100:.2f}%",
        _bytes(row["silent"]),
        _bytes(row["traffic"]),
        per_cent(row["slower"]),
        per_cent(row["space"]),
    )


def _bytes(value: float) -> str:
    return human(round(value)) if value >= 10 else f"{value:.3g}"


def _compared(found: Comparison) -> dict[str, Any]:
    return {
        "strategy": found.strategy,
        "workload": found.workload,
        "faults": found.faults,
        "simulated": found.simulated.value,
        "emulated": found.emulated.value,
        "error": found.error,
        "agree": found.agree,
    }


def _comparison_table(found: Sequence[Comparison]) -> list[str]:
    rows = [
        (
            c.faults,
            c.workload,
            c.strategy,
            _bytes(c.simulated.value),
            _bytes(c.emulated.value),
            _bytes(c.error),
            "yes" if c.agree else "NO",
        )
        for c in found
    ]
    return table(rows, ("FAULTS", "WORKLOAD", "STRATEGY", "SIMULATED", "EMULATED", "ERROR", "AGREE"))
