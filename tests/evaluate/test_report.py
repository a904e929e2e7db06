"""Report: one self-contained, complete HTML file, safe against odd names."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from daxemu.errors import InvalidArgument
from daxemu.evaluate.campaign import Outputs
from daxemu.evaluate.metrics import METRICS
from daxemu.evaluate.plan import parse
from daxemu.evaluate.report import html, write_reports
from daxemu.evaluate.svg import Scale, decade_ticks, doubling_ticks, round_ticks
from tests.evaluate.results import PLAN, TEXT, corruption, finished, result

CORRUPT = corruption(0.2, repaired=False)
RESULTS = [
    result("none", 0),
    result("none", 1),
    result("mirror", 0, events=[finished(0.12, "recovered", 0.004, []), CORRUPT], bad=[]),
    result("mirror", 1, events=[finished(0.12, "lost", 0.002, [[7, 0, 4096]])], state="shut down"),
]
VOID = {"meta", "br"}


class Checker(HTMLParser):
    """Parser asserting that every opened element is closed, in order.

    ``fetched``: references to other files.
    """

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.seen: dict[str, int] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "srcset", "data")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] = self.seen.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def checked(text: str) -> Checker:
    checker = Checker()
    checker.feed(text)
    checker.close()
    assert checker.open == []
    return checker


def test_the_page_is_complete_and_loads_nothing() -> None:
    text = html(PLAN, RESULTS, [])
    found = checked(text)
    assert found.fetched == []
    assert "script" not in found.seen
    assert not re.search(r"url\(|@import|https?:", text)
    # Four timelines, two maps, loss against overhead, repairs, failures; and the legend's shape.
    assert found.seen["svg"] == 4 + 2 + 3 + 1
    assert found.seen["tr"] == (2 + 2) + (1 + 2)


def test_the_timeline_shows_corruption_found_by_a_checksum() -> None:
    assert "corruption found by scrub" in html(PLAN, RESULTS, [])


def test_names_are_escaped() -> None:
    plan = parse(TEXT.replace('"small"', '"<script>alert(1)</script> & Co"'))
    text = html(plan, RESULTS, [result("mirror", 1, failed="<b>why</b>")])
    assert "script" not in checked(text).seen
    assert "&lt;script&gt;" in text
    assert "&lt;b&gt;why&lt;/b&gt;" in text


def test_one_trial_makes_a_report() -> None:
    checked(html(PLAN, [result(events=[], faults=[], samples=[], lives=[])], []))


def test_json_and_csv_have_the_same_figures(tmp_path: Path) -> None:
    outputs = Outputs(tmp_path / "r.html")
    write_reports(PLAN, RESULTS, [], outputs)
    report = json.loads(outputs.json.read_text())
    with open(outputs.csv, newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(report["cells"]) == 2
    for row, cell in zip(rows, report["cells"], strict=True):
        for name in METRICS:
            found = cell["metrics"][name]
            assert row[name] == ("" if found is None else str(found["value"]))
    assert {path.name for path in tmp_path.iterdir()} == {"r.html", "r.json", "r.csv"}


@pytest.mark.parametrize("name", ["nowhere/r.html", ".", "there"])
def test_an_invalid_report_path_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "there").mkdir()
    with pytest.raises(InvalidArgument, match="give the name of a file"):
        Outputs(tmp_path / name)


def test_axis_ticks_and_scales() -> None:
    assert round_ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert round_ticks(-3, 12) == [0, 5, 10]
    assert round_ticks(1, 1) == [1]
    assert doubling_ticks(4096, 1024) == [0, 1024, 2048, 4096]
    assert decade_ticks(0.002, 0.1) == pytest.approx([0.002, 0.005, 0.01, 0.02, 0.05, 0.1])
    assert decade_ticks(1e-6, 10) == pytest.approx([10.0**n for n in range(-6, 2)])
    bent = Scale(0, 1024, 0, 100, knee=1)
    assert bent(0) == 0
    assert bent(1023) == pytest.approx(100, abs=0.1)
    assert bent(31) == pytest.approx(50, abs=0.1)
