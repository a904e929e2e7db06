"""Models of known strategies: the few numbers that the fleet simulation needs.

The numbers are promises of the strategies, not measurements. [fleet.model.NAME] in a plan replaces a model. A
report of ``daxemu evaluate`` given as costs replaces ``exposed`` and the repair time by measured values.
"""

from __future__ import annotations

from typing import Any

import msgspec

from daxemu.errors import InvalidArgument
from daxemu.evaluate.plan import Bytes, Plan, StrategyModel

MODELS: dict[str, StrategyModel] = {
    "none": StrategyModel(),
    "zero": StrategyModel(),
    "punch": StrategyModel(),
    "quarantine": StrategyModel(grain=Bytes(512)),
    "mirror": StrategyModel(group=2, tolerates=1),
    # Neighbouring pages form a stripe: a failed row takes several pages of the same stripe.
    "parity": StrategyModel(group=9, tolerates=1, checksums=True, spacing=Bytes(4096)),
    "async-parity": StrategyModel(group=9, tolerates=1, checksums=True, exposed=0.05, spacing=Bytes(4096)),
    "reread": StrategyModel(group=2, tolerates=1, outside=True),
    "fence": StrategyModel(fences=True),
}


class Costs(msgspec.Struct, frozen=True):
    """Measured costs of a strategy; None: not measured."""

    slower: float | None = None
    """Slowdown against the baseline, in per cent."""
    space: float | None = None
    """Space for redundancy, in per cent of the data."""
    repair_seconds: float | None = None
    exposed: float | None = None
    """Share of failures without recovery, 0 to 1."""


def model_of(plan: Plan, strategy: str, costs: Costs) -> StrategyModel:
    """Return the model of a strategy; options in the name are ignored.

    Raises InvalidArgument for an unknown strategy.
    """
    found = plan.fleet.model.get(strategy) or MODELS.get(strategy.partition(":")[0])
    if found is None:
        raise InvalidArgument(
            f"no model for strategy {strategy!r}: describe the strategy in [fleet.model.{strategy!r}]"
        )
    if costs.exposed is not None and found.tolerates and strategy not in plan.fleet.model:
        found = msgspec.structs.replace(found, exposed=costs.exposed)
    return found


def measured(report: dict[str, Any], strategy: str) -> Costs:
    """Return the costs of a strategy from a report, over all cells of the strategy.

    ``report``: REPORT.json of ``daxemu evaluate``.
    """
    cells = [cell for cell in report["cells"] if cell["strategy"] == strategy]
    quiet = {f["name"] for f in report["plan"]["faults"] if not f["process"]}

    def average(name: str, chosen: list[dict[str, Any]]) -> float | None:
        values = [cell["metrics"][name]["value"] for cell in chosen if cell["metrics"][name] is not None]
        return sum(values) / len(values) if values else None

    undisturbed = [cell for cell in cells if cell["faults"] in quiet] or cells
    relative = average("relative", undisturbed)
    medians = [cell["repair_median"]["value"] for cell in cells if cell["repair_median"] is not None]
    verdicts: dict[str, int] = {}
    for cell in cells:
        for verdict, count in cell["verdicts"].items():
            verdicts[verdict] = verdicts.get(verdict, 0) + count
    total = sum(verdicts.values())
    return Costs(
        slower=None if relative is None else 100.0 - relative,
        space=average("space", cells),
        repair_seconds=max(medians) if medians else None,
        exposed=None if not total else 1.0 - verdicts.get("recovered", 0) / total,
    )
