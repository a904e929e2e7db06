"""Figures computed from raw results."""

from __future__ import annotations

from typing import Any

import pytest

from daxemu.evaluate.metrics import cells, figures, losses, summary
from daxemu.evaluate.tender import WorkloadLife
from daxemu.evaluate.workloads.base import Mismatch
from tests.evaluate.results import PLAN, corruption, finished, result, signal


def test_figures_of_a_trial() -> None:
    found = figures(result())
    assert found.values == {
        "bytes_lost": 4096,
        "files_lost": 1,
        "silent": 0,
        "silent_bytes": 0,
        "told": 1,
        "killed": 1,
        "errors": 3,
        "unavailable": 0.05,
        "recovered": None,
        "found": 0,
        "throughput": 250,
        "relative": None,
        "space": None,
    }
    assert found.repairs == []
    assert found.handled == pytest.approx([0.003])


def test_reported_ranges_are_lost_and_unreported_ones_silent() -> None:
    def classified(*bad: Mismatch, **changed: Any) -> tuple[int, int]:
        lost, silent = losses(result(bad=list(bad), **changed))
        return sum(length for *_, length in lost), sum(length for *_, length in silent)

    said, unsaid = Mismatch("f", 7, 5000, 10, "wrong"), Mismatch("f", 7, 9000, 20, "wrong")
    assert classified(said, unsaid) == (10, 20)
    assert classified(Mismatch("g", 8, 5000, 10, "wrong")) == (0, 10), "another file"
    assert classified(Mismatch("g", 8, 5000, 10, "unreadable")) == (10, 0), "a read error is a report"
    assert classified(Mismatch("f", 7, -1, 99, "wrong")) == (99, 0), (
        "a row at an unknown place in a damaged file"
    )
    assert classified(Mismatch("g", 8, -1, 99, "wrong")) == (0, 99)
    assert classified(unsaid, state="shut down") == (20, 0), "a shutdown is a report"
    assert classified(unsaid, events=[finished(0.2, "lost", 0.1, [[7, 8192, 4096]])]) == (20, 0)
    lost_store = {"event": "StoreLost", "time": 0.2, "ino": 7, "path": "f", "offset": 8192, "length": 4096}
    assert classified(unsaid, events=[lost_store]) == (20, 0)


@pytest.mark.parametrize("how", [{"state": "removed"}, {"unmountable": "metadata is gone"}])
def test_a_removed_or_unmountable_device_loses_everything(how: dict[str, Any]) -> None:
    assert figures(result(bad=[], **how)).values["bytes_lost"] == 100_000


def test_figures_of_repairs_and_space() -> None:
    assert figures(result(events=[corruption(0.1, repaired=True)])).values["found"] == 1
    events = [
        finished(0.1, "recovered", 0.01, []),
        finished(0.2, "lost", 0.02, []),
        signal(0.1, 5),
        signal(0.2, 5),
    ]
    found = figures(result(events=events, repair={"strategy": "mirror", "space_bytes": 50_000}))
    assert found.repairs == [0.01, 0.02]
    assert found.values["recovered"] == 1
    assert found.values["space"] == 50
    assert found.values["told"] == 1, "one process, twice"


def test_only_deaths_by_sigbus_count_as_killed() -> None:
    assert (
        figures(result(lives=[WorkloadLife(0, 0.1, status=-9), WorkloadLife(0.1, 0.4, status=1)])).values[
            "killed"
        ]
        == 0
    )


def test_throughput_is_relative_to_the_baseline_of_the_same_repetition() -> None:
    half = [(0.0, 1, 10, 0), (0.4, 50, 500, 0)]
    twice = [(0.0, 1, 10, 0), (0.4, 200, 2000, 0)]
    results = [
        result("none", 0),
        result("none", 1, samples=twice),
        result("mirror", 0, samples=half),
        result("mirror", 1, samples=twice),
    ]
    none, mirror = cells(PLAN, results)
    assert (none.strategy, mirror.strategy) == ("none", "mirror")
    relative = mirror.metrics["relative"]
    assert relative is not None
    assert relative.value == 75
    assert relative.n == 2
    assert mirror.trials == 2
    (alone,) = cells(PLAN, [result("mirror", 0)])
    assert alone.metrics["relative"] is None, "no baseline to compare with"


def test_failed_trials_are_listed_and_not_counted() -> None:
    found = summary(PLAN, [result()], [result("mirror", failed="no such strategy")])
    assert found["failed"] == [{"trial": "mirror / dataset / pages / 0", "why": "no such strategy"}]
    assert [cell["strategy"] for cell in found["cells"]] == ["none"]
