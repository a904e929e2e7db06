"""Fleet simulation against results worked out on paper, and against itself."""

from __future__ import annotations

import math

import pytest

from daxemu.errors import InvalidArgument
from daxemu.evaluate.fleet import Totals, World, chunks, field_world, run
from daxemu.evaluate.fleet_check import Comparison
from daxemu.evaluate.models import Costs, measured, model_of
from daxemu.evaluate.plan import YEAR, parse
from daxemu.evaluate.statistics import Estimate

STRATEGIES = '["none", "quarantine", "mirror", "parity", "async-parity", "reread", "fence"]'


def fleet_text(process: str, fleet: str = "", faults: str = "") -> str:
    return (
        f'name = "p"\nstrategies = {STRATEGIES}\n[[workload]]\nkind = "kvstore"\n'
        f'[[faults]]\nname = "f"\n{faults}[[faults.process]]\n{process}\n'
        f'[fleet]\nsize = "1G"\nyears = 2.0\nused = 0.5\n{fleet}\n'
    )


def simulate(text: str, devices: int = 4000, costs: dict[str, Costs] | None = None) -> dict[str, Totals]:
    plan = parse(text)
    return run(chunks(plan, text, "f", costs or {}, field_world(plan), devices))


def within(found: Estimate, expected: float) -> bool:
    """Return True if a value is within five standard errors; an interval has two."""
    assert found.low is not None
    assert found.high is not None
    return abs(found.value - expected) <= 2.5 * (found.high - found.low) / 2 + 1e-9


def test_without_redundancy_each_fault_costs_its_pages() -> None:
    found = simulate(fleet_text("rate = 3\nunit = { 512 = 0.5, row = 0.5 }"))
    # 3 faults a year, 2 years, half of the bytes are data. A failed sector costs its page, except under
    # quarantine, which saves the other sectors.
    assert within(found["none"].mean_lost(), 6 * 0.5 * (4096 + 8192) / 2)
    assert within(found["quarantine"].mean_lost(), 6 * 0.5 * (512 + 8192) / 2)
    assert found["none"].traffic == 0
    assert found["mirror"].lost == found["reread"].lost == 0
    expected_damaged = 1 - math.exp(-6 * (0.5 * 0.5 + 0.5 * 0.75))
    assert found["none"].damaged / 4000 == pytest.approx(expected_damaged, abs=0.03)


def test_a_mirror_loses_data_when_both_copies_fail_in_one_window() -> None:
    # Rows of 64 MiB in 1 GiB: eight places in each half. The window is half a year.
    text = fleet_text(
        "rate = 1.0\nunit = { row = 1 }", fleet=f"repair_seconds = {YEAR / 2}", faults='row = "64M"\n'
    ).replace("strategies", 'device = "4G"\nstrategies')
    found = simulate(text, devices=20_000)
    # Ordered pairs (i, then j within the window w) in T years: rate^2 (T w - w^2 / 2). j hits the mirror of i
    # with probability 1/16.
    rate, years, window = 1.0, 2.0, 0.5
    pairs = rate**2 * (years * window - window**2 / 2)
    expected = pairs / 16 * 0.5 * (64 << 20)
    assert found["mirror"].mean_lost().value == pytest.approx(expected, rel=0.08)
    none = found["none"].mean_lost().value
    assert none == pytest.approx(2 * 0.5 * (64 << 20), rel=0.03)


def test_a_fault_as_large_as_a_group_loses_the_group() -> None:
    found = simulate(fleet_text("rate = 1\nunit = { device = 1 }"))
    assert found["mirror"].lost == pytest.approx(found["none"].lost)
    assert found["reread"].lost == 0
    removed = simulate(fleet_text('rate = 1\nkind = "removal"'))
    expected = (1 - math.exp(-2)) * (512 << 20)
    for strategy in ("none", "mirror", "fence"):
        assert removed[strategy].mean_lost().value == pytest.approx(expected, rel=0.05)
    assert removed["reread"].lost == 0


def test_only_checksums_find_silent_corruption() -> None:
    found = simulate(fleet_text('rate = 2\nkind = "silent"\ntarget = "device"'))
    assert found["mirror"].silent / 4000 == pytest.approx(2 * 2 * 0.5 * 4096, rel=0.1)
    assert found["parity"].silent == 0
    sectors = simulate(fleet_text('rate = 2\nkind = "silent"\nunit = { 512 = 1 }'))
    for strategy in ("none", "quarantine", "mirror"):
        assert sectors[strategy].silent / 4000 == pytest.approx(2 * 2 * 0.5 * 512, rel=0.1)
    assert found["parity"].traffic > 0


def test_exposed_data_is_lost_and_measured_costs_replace_promises() -> None:
    text = fleet_text("rate = 3")
    promised = simulate(text)
    none = promised["none"].lost
    assert promised["async-parity"].lost == pytest.approx(0.05 * none, rel=0.25)
    costs = {"mirror": Costs(exposed=0.5, repair_seconds=1.0)}
    assert simulate(text, costs=costs)["mirror"].lost == pytest.approx(0.5 * none, rel=0.1)
    fenced = promised["fence"].mean_lost().value
    assert fenced == pytest.approx((1 - math.exp(-6)) * (512 << 20), rel=0.01)


def test_traffic_counts_bytes_read_and_written_by_rebuilds() -> None:
    found = simulate(fleet_text("rate = 3"))
    repaired = 6 * 0.5 * 4096
    assert found["mirror"].traffic / 4000 == pytest.approx(2 * repaired, rel=0.05)
    assert found["parity"].traffic / 4000 == pytest.approx(9 * repaired, rel=0.05)


def test_the_same_seed_gives_the_same_fleet_and_more_devices_keep_the_first() -> None:
    text = fleet_text("rate = 3\npareto = 1.5")
    assert simulate(text, 700) == simulate(text, 700)
    plan = parse(text)
    few = list(chunks(plan, text, "f", {}, field_world(plan), 700))
    many = list(chunks(plan, text, "f", {}, field_world(plan), 1700))
    assert [chunk.devices for chunk in many] == [500, 500, 500, 200]
    assert few[0] == many[0]


def test_a_plan_without_field_rates_simulates_trials_only() -> None:
    text = fleet_text("expected = 10\nunit = { page = 1 }")
    plan = parse(text)
    with pytest.raises(InvalidArgument, match="no rate or fit_per_mbit"):
        simulate(text)
    world = World(plan.seconds, int(plan.device), 0.25, False)
    found = run(chunks(plan, text, "f", {}, world, 2000))
    assert found["none"].mean_lost().value == pytest.approx(10 * 4096, rel=0.05), "all in files"


def test_an_unknown_strategy_needs_a_model() -> None:
    text = fleet_text("rate = 1").replace('"fence"', '"mine"')
    with pytest.raises(InvalidArgument, match=r"\[fleet.model.'mine'\]"):
        simulate(text)
    described = text + "[fleet.model.mine]\ngroup = 3\ntolerates = 1\n"
    assert simulate(described)["mine"].lost == 0
    plan = parse(fleet_text("rate = 1"))
    assert model_of(plan, "parity:data=4", Costs()).group == 9, "options of a strategy are ignored"


def test_measured_costs_come_from_a_report() -> None:
    def cell(faults: str, relative: float, verdicts: dict[str, int]) -> dict[str, object]:
        return {
            "strategy": "mirror",
            "faults": faults,
            "metrics": {"relative": {"value": relative}, "space": {"value": 100.0}},
            "repair_median": {"value": 0.002} if verdicts else None,
            "verdicts": verdicts,
        }

    report = {
        "plan": {"faults": [{"name": "quiet", "process": []}, {"name": "f", "process": [{}]}]},
        "cells": [cell("quiet", 80.0, {}), cell("f", 10.0, {"recovered": 9, "lost": 1})],
    }
    found = measured(report, "mirror")
    assert (found.slower, found.space, found.repair_seconds) == (20.0, 100.0, 0.002)
    assert found.exposed == pytest.approx(0.1)
    assert measured(report, "none") == Costs()


def test_values_agree_within_both_errors() -> None:
    def comparison(value: float) -> Comparison:
        return Comparison(
            "none", "w", "f", Estimate(100, 97, 103, 9), Estimate(value, value - 4, value + 4, 3)
        )

    assert comparison(104).error == 5
    assert comparison(104).agree
    assert not comparison(106).agree
