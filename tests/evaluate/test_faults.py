"""Fault generators: repeatable draws, rates, whole units."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daxemu.evaluate.faults import Fault, draw, generator, pareto_factors, scrubs, span
from tests.evaluate.plans import plan_with

PROCESSES = (
    "expected = 20",
    "expected = 20\npareto = 1.5",
    'expected = 3\narrival = "storm"',
    'arrival = "at"\ntimes = [0.5, 0.1]',
    'expected = 10\ndetect = "delay"\ndelay = 0.2',
    'expected = 10\nkind = "silent"\nunit = { 256 = 1, row = 1 }\ntarget = "device"',
)


@given(seed=st.integers(0, 2**32 - 1), repetition=st.integers(0, 50), process=st.sampled_from(PROCESSES))
@settings(deadline=None, max_examples=60)
def test_the_same_seed_gives_the_same_faults(seed: int, repetition: int, process: str) -> None:
    plan = plan_with(process, top=f"seed = {seed}\n")
    again = plan_with(process, top=f"seed = {seed}\n")
    found = draw(plan, plan.faults[0], repetition)
    assert found == draw(again, again.faults[0], repetition)
    times = [fault.time for fault in found]
    assert times == sorted(times)
    assert all(0 <= t < plan.seconds for t in times)
    assert all(0 <= fault.place < 1 for fault in found)
    assert all(fault.found is None or fault.found >= fault.time for fault in found)


def test_other_seeds_and_repetitions_give_other_faults() -> None:
    one, two = plan_with("expected = 20", top="seed = 1\n"), plan_with("expected = 20", top="seed = 2\n")
    assert draw(one, one.faults[0], 0) != draw(two, two.faults[0], 0)
    assert draw(one, one.faults[0], 0) != draw(one, one.faults[0], 1)


def counts(process: str, trials: int = 400) -> list[int]:
    plan = plan_with(process)
    return [len(draw(plan, plan.faults[0], i)) for i in range(trials)]


@pytest.mark.parametrize("mean", [0.5, 5.0, 40.0])
def test_a_poisson_process_has_the_given_rate(mean: float) -> None:
    found = np.array(counts(f"expected = {mean}"))
    # Mean and variance of a Poisson distribution are equal. Tolerance: five standard errors of each.
    assert abs(found.mean() - mean) < 5 * math.sqrt(mean / len(found))
    assert abs(found.var() - mean) < 5 * mean * math.sqrt(2 / len(found)) + 5 * math.sqrt(mean / len(found))


def test_faults_of_a_storm_are_close_in_time_and_place() -> None:
    plan = plan_with('arrival = "storm"\nexpected = 2\nburst = 6.0\nspread = "64K"\nwithin = 0.01')
    drawn = [draw(plan, plan.faults[0], i) for i in range(300)]
    total = sum(map(len, drawn)) / len(drawn)
    # Faults of a storm after the end of the trial are dropped.
    assert 12 * 0.8 < total < 12 * 1.2
    for faults in drawn:
        by_place: dict[float, list[Fault]] = {}
        for fault in faults:
            by_place.setdefault(fault.place, []).append(fault)
        for storm in by_place.values():
            assert storm[-1].time - storm[0].time < 0.01
            assert min(abs(fault.shift) for fault in storm) == 0
            assert all(abs(fault.shift) <= 32 << 10 for fault in storm)


def test_pareto_gives_few_devices_most_faults_and_keeps_the_mean() -> None:
    factors = np.sort(pareto_factors(generator(1), 1.5, 200_000))
    assert factors.mean() == pytest.approx(1.0, rel=0.1)
    assert np.median(factors) < 0.6
    worst = factors[-len(factors) // 10 :].sum() / factors.sum()
    assert worst > 0.4
    plain, skewed = counts("expected = 10"), counts("expected = 10\npareto = 1.2")
    assert np.var(skewed) > 3 * np.var(plain)


def test_detection_times_follow_detect() -> None:
    def one(process: str) -> Fault:
        plan = plan_with(process, faults="scrub_period = 0.5\n")
        return draw(plan, plan.faults[0], 0)[0]

    assert one("expected = 20").found == one("expected = 20").time
    assert one('expected = 20\ndetect = "access"').found is None
    assert one('expected = 20\ndetect = "scrub"').found is None
    plan = plan_with('expected = 100\ndetect = "delay"\ndelay = 0.25')
    waits = [
        f.found - f.time for i in range(20) for f in draw(plan, plan.faults[0], i) if f.found is not None
    ]
    assert np.mean(waits) == pytest.approx(0.25, rel=0.15)
    assert scrubs(plan_with("expected = 1", "scrub_period = 0.7\n").faults[0], 3.0) == pytest.approx(
        [0.7, 1.4, 2.1, 2.8]
    )


@given(
    at=st.integers(0, (64 << 20) - 1),
    unit=st.sampled_from(["256", "512", "page", "row", "bank", "device"]),
    spill=st.sampled_from([0, 4096, 65536]),
)
@settings(deadline=None)
def test_a_span_is_a_whole_unit_around_the_place(at: int, unit: str, spill: int) -> None:
    plan = plan_with(f"expected = 5\nunit = {{ {unit} = 1 }}\nspill = {spill}")
    fault = next(f for i in range(50) for f in draw(plan, plan.faults[0], i))
    offset, length = span(fault, at, plan.device)
    assert offset <= at < offset + length <= plan.device
    grain = max(fault.length, 512, spill)
    assert length % min(grain, 512) == 0
    assert length in {grain, grain + spill} or offset + length == plan.device
    assert offset % 512 == 0
    if spill:
        assert offset % spill == 0
