"""What raw results mean."""

from __future__ import annotations

from typing import Any

import pytest

from daxemu.evaluate.metrics import cells, figures, losses, summary
from daxemu.evaluate.tender import Life
from daxemu.evaluate.workloads.base import Bad
from tests.evaluate.results import PLAN, corruption, finished, result, signal


def test_a_trial_in_figures() -> None:
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


def test_what_somebody_told_of_is_lost_and_what_nobody_did_is_silent() -> None:
    def sorted_out(*bad: Bad, **changed: Any) -> tuple[int, int]:
        lost, silent = losses(result(bad=list(bad), **changed))
        return sum(length for *_, length in lost), sum(length for *_, length in silent)

    said, unsaid = Bad("f", 7, 5000, 10, "wrong"), Bad("f", 7, 9000, 20, "wrong")
    assert sorted_out(said, unsaid) == (10, 20)
    assert sorted_out(Bad("g", 8, 5000, 10, "wrong")) == (0, 10), "another file"
    assert sorted_out(Bad("g", 8, 5000, 10, "unreadable")) == (10, 0), "the error tells"
    assert sorted_out(Bad("f", 7, -1, 99, "wrong")) == (99, 0), "a row, somewhere in a damaged file"
    assert sorted_out(Bad("g", 8, -1, 99, "wrong")) == (0, 99)
    assert sorted_out(unsaid, state="shut down") == (20, 0), "the shutdown tells"
    assert sorted_out(unsaid, events=[finished(0.2, "lost", 0.1, [[7, 8192, 4096]])]) == (20, 0)
    lost_store = {"event": "StoreLost", "time": 0.2, "ino": 7, "path": "f", "offset": 8192, "length": 4096}
    assert sorted_out(unsaid, events=[lost_store]) == (20, 0)


@pytest.mark.parametrize("how", [{"state": "removed"}, {"unmountable": "metadata is gone"}])
def test_a_device_that_is_gone_loses_everything(how: dict[str, Any]) -> None:
    assert figures(result(bad=[], **how)).values["bytes_lost"] == 100_000


def test_repairs_and_space() -> None:
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


def test_deaths_by_anything_else_are_not_killed_by_a_failure() -> None:
    assert figures(result(lives=[Life(0, 0.1, status=-9), Life(0.1, 0.4, status=1)])).values["killed"] == 0


def test_throughput_is_against_the_baseline_of_the_same_repetition() -> None:
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


def test_failed_trials_are_told_and_not_counted() -> None:
    found = summary(PLAN, [result()], [result("mirror", failed="no such strategy")])
    assert found["failed"] == [{"trial": "mirror / dataset / pages / 0", "why": "no such strategy"}]
    assert [cell["strategy"] for cell in found["cells"]] == ["none"]
