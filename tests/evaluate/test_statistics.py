"""Confidence intervals: coverage and edge cases."""

from __future__ import annotations

import numpy as np
import pytest

from daxemu.evaluate.statistics import mean, quantile, t95


def test_a_t_interval_covers_the_mean_in_95_of_100() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(2000):
        found = mean(list(rng.normal(10, 3, 4)))
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 10 <= found.high
    assert 0.93 < hits / 2000 < 0.97


def test_few_values_have_no_interval() -> None:
    assert mean([]) is None
    one = mean([3.0])
    assert one is not None
    assert (one.value, one.low, one.high, one.n) == (3.0, None, None, 1)
    few = quantile([[1.0, 2.0]], 0.5)
    assert few is not None
    assert few.low is None
    assert quantile([[], []], 0.5) is None


def test_an_interval_is_cut_off_at_least() -> None:
    found = mean([0.0, 0.0, 10.0], least=0.0)
    assert found is not None
    assert found.low == 0.0


def test_t_approaches_the_normal_quantile() -> None:
    assert [t95(n) for n in (1, 2, 30)] == [12.706, 4.303, 2.042]
    assert t95(100) == pytest.approx(1.984, abs=0.002)
    assert t95(10_000) == pytest.approx(1.960, abs=0.001)


def test_a_quantile_has_a_repeatable_interval() -> None:
    rng = np.random.default_rng(2)
    groups = [list(rng.exponential(1.0, 200)) for _ in range(6)]
    found = quantile(groups, 0.5)
    assert found is not None
    assert found.low is not None
    assert found.high is not None
    assert found.low < np.log(2) < found.high
    assert found.high - found.low < 0.3
    assert quantile(groups, 0.5) == found, "the same values give the same interval"
