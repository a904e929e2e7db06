"""Means and quantiles with 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

_T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Student's t, two-sided 95 %, for 1 to 30 degrees of freedom."""
RESAMPLES = 1000


class Estimate(msgspec.Struct, frozen=True):
    """Estimate from ``n`` observations.

    ``low`` and ``high``: bounds with 95 % confidence; None if ``n`` is too small.
    """

    value: float
    low: float | None
    high: float | None
    n: int


def t95(freedom: int) -> float:
    """Return the two-sided 95 % quantile of Student's t. ``freedom``: degrees of freedom, 1 or more."""
    return _T95[freedom - 1] if freedom <= len(_T95) else 1.96 + 2.4 / freedom


def mean(values: Sequence[float], *, least: float = -math.inf) -> Estimate | None:
    """Return the mean with its t interval, cut off below at ``least``; None without values."""
    if not values:
        return None
    array = np.asarray(values, dtype=float)
    value = float(array.mean())
    if len(array) < 2:
        return Estimate(value, None, None, len(array))
    half = t95(len(array) - 1) * float(array.std(ddof=1)) / math.sqrt(len(array))
    return Estimate(value, max(value - half, least), value + half, len(array))


def quantile(groups: Sequence[Sequence[float]], at: float) -> Estimate | None:
    """Return a quantile of all values with a bootstrap interval; None without values.

    Each resampling draws groups (trials), then values within the groups. Fewer than 5 values have no
    interval.
    """
    filled = [np.asarray(group, dtype=float) for group in groups if len(group)]
    if not filled:
        return None
    pooled = np.concatenate(filled)
    value = float(np.quantile(pooled, at))
    if len(pooled) < 5:
        return Estimate(value, None, None, len(pooled))
    # A fixed seed: the same results must give the same report.
    rng = np.random.default_rng(12345)
    found = np.empty(RESAMPLES)
    for i in range(RESAMPLES):
        chosen = [filled[k] for k in rng.integers(0, len(filled), len(filled))]
        sample = np.concatenate([group[rng.integers(0, len(group), len(group))] for group in chosen])
        found[i] = np.quantile(sample, at)
    low, high = np.quantile(found, [0.025, 0.975])
    return Estimate(value, float(low), float(high), len(pooled))
