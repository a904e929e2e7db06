"""Comparison of the fleet simulation with the emulator: the same plan, run both ways.

Only workloads with constant data are compared. A workload that rewrites data clears latent poison before the
poison is consumed, which the simulation does not model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from daxemu.errors import InvalidArgument
from daxemu.evaluate.fleet import World, chunks, run
from daxemu.evaluate.models import measured
from daxemu.evaluate.plan import Plan
from daxemu.evaluate.statistics import Estimate

CONSTANT_DATA = ("dataset",)
DEVICES = 20_000
"""Number of simulated trials.

Far above the number of emulated trials, so the emulated trials dominate the error.
"""


class Comparison(msgspec.Struct, frozen=True):
    """Bytes lost in a trial, simulated and emulated."""

    strategy: str
    workload: str
    faults: str
    simulated: Estimate
    emulated: Estimate

    @property
    def error(self) -> float:
        """Return the allowed difference in bytes: both 95 % half intervals, added in quadrature."""
        halves = [
            (e.high - e.low) / 2
            for e in (self.simulated, self.emulated)
            if e.low is not None and e.high is not None
        ]
        return math.hypot(*halves)

    @property
    def agree(self) -> bool:
        """True if the two values differ by at most ``error``."""
        return abs(self.simulated.value - self.emulated.value) <= self.error


def compare(plan: Plan, text: str, report: dict[str, Any]) -> Iterator[Comparison]:
    """Yield a comparison for each report cell with constant data.

    Raises InvalidArgument without such a cell.
    """
    cells = [c for c in report["cells"] if _has_constant_data(plan, c["workload"]) and c["trials"] > 1]
    faulty = {faults.name for faults in plan.faults if faults.process}
    cells = [c for c in cells if c["faults"] in faulty and c["strategy"] in plan.strategies]
    if not cells:
        raise InvalidArgument(
            "nothing to compare: the report needs a workload of kind "
            f"{' or '.join(CONSTANT_DATA)}, faults, and two repetitions or more"
        )
    costs = {strategy: measured(report, strategy) for strategy in plan.strategies}
    for cell in cells:
        used = min(cell["size"] / plan.device, 1.0)
        world = World(plan.seconds, int(plan.device), used, False)
        strategy = cell["strategy"]
        totals = run(chunks(plan, text, cell["faults"], costs, world, DEVICES, [strategy]))
        simulated = totals[strategy].mean_lost()
        yield Comparison(strategy, cell["workload"], cell["faults"], simulated, _whole(cell))


def _has_constant_data(plan: Plan, workload: str) -> bool:
    return any(w.label == workload and w.kind in CONSTANT_DATA for w in plan.workload)


def _whole(cell: dict[str, Any]) -> Estimate:
    """Return the symmetric interval of a cell about its mean. A report cuts the lower bound off at 0."""
    found = cell["metrics"]["bytes_lost"]
    value, high = found["value"], found["high"]
    return Estimate(value, 2 * value - high, high, found["n"])


def disagreements(found: Sequence[Comparison]) -> list[Comparison]:
    """Return the comparisons outside the allowed error."""
    return [comparison for comparison in found if not comparison.agree]
