"""Arithmetic of the benchmarks' report; the committed page is made of the committed figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.bench import report
from tests.bench.report import FIGURES, PAGE, Line, Report, interleaved, load, merged, page, regressions


def speed(ours: float, theirs: float, target: float | None = 1.0) -> Line:
    """A line where more is better."""
    return Line("s", "read", "MB/s", {"we": ours, "they": theirs}, True, "they", target)


def cost(ours: float, theirs: float) -> Line:
    """A line where less is better."""
    return Line("s", "stat", "us", {"we": ours, "they": theirs}, against="they", target=0.7)


def limit(value: float) -> Line:
    """A line with nothing to compare with."""
    return Line("s", "mount", "s", {"we": value}, target=2.0)


def test_a_ratio_says_how_many_times_as_good() -> None:
    assert speed(500, 1000).ratio == 0.5
    assert cost(2, 3).ratio == 1.5
    assert limit(1).ratio is None


def test_targets() -> None:
    assert speed(1000, 1000).met
    assert speed(999, 1000).met is False
    assert cost(10, 7).met
    assert cost(10, 6.9).met is False
    assert limit(2).met
    assert limit(2.1).met is False
    assert speed(1, 1000, target=None).met is None


def test_without_the_other_side_nothing_is_judged() -> None:
    alone = Line("s", "reflink", "ms", {"we": 1.0}, against="xfs", target=1.0, notes={"xfs": "no mkfs.xfs"})
    assert alone.ratio is None
    assert alone.met is None
    assert "(no mkfs.xfs)" in report.tables(Report("m", [alone]))


def test_sides_take_turns_in_another_order_each_round() -> None:
    order: list[str] = []
    values = {"a": iter([3.0, 1.0, 2.0]), "b": iter([5.0, 5.0, 8.0])}

    def turn(side: str) -> float:
        order.append(side)
        return next(values[side])

    found = interleaved({side: lambda side=side: turn(side) for side in values}, 3)  # type: ignore[misc]
    assert found == {"a": 2.0, "b": 5.0}
    assert order == ["a", "b", "b", "a", "a", "b"]


def test_a_ratio_that_fell_by_more_than_a_quarter_is_a_regression() -> None:
    old = Report("m", [speed(1000, 1000), cost(1, 1), limit(1)])
    assert regressions(old, Report("other", [speed(76, 100), cost(1.3, 1), limit(1.9)])) == []
    (found,) = regressions(old, Report("m", [speed(74, 100), cost(1.3, 1)]))
    assert "read" in found
    assert "ratio 0.74, was 1.00" in found


def test_a_limit_no_longer_kept_is_a_regression_but_one_never_kept_is_not() -> None:
    assert len(regressions(Report("m", [limit(1)]), Report("m", [limit(3)]))) == 1
    assert regressions(Report("m", [limit(2.5)]), Report("m", [limit(3)])) == []


def test_check_fails_on_a_regression_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(report, "LATEST", tmp_path / "latest.json")
    monkeypatch.setattr(report, "FIGURES", tmp_path / "figures.json")
    monkeypatch.setattr(report, "PAGE", tmp_path / "page.md")
    report.record(speed(900, 1000))
    assert report.main("accept") == 0
    assert "0.90 x they" in (tmp_path / "page.md").read_text()
    assert report.main("check") == 0
    assert "1 targets missed" in capsys.readouterr().out
    report.record(speed(100, 1000))
    assert report.main("show") == 0
    assert report.main("check") == 1
    assert "ratio 0.10, was 0.90" in capsys.readouterr().out


def test_a_line_measured_again_replaces_the_old_one() -> None:
    both = merged(Report("m", [speed(1, 1), limit(1)]), [speed(2, 1)])
    assert both.lines == [speed(2, 1), limit(1)]


def test_the_committed_page_is_made_of_the_committed_figures() -> None:
    assert PAGE.read_text() == page(load(FIGURES)), "run: make bench-accept"
