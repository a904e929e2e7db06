"""Campaigns: remaining trials, kept results, continuation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from daxemu.errors import Busy
from daxemu.evaluate.campaign import Campaign, keys
from daxemu.evaluate.plan import parse
from daxemu.evaluate.trial import Key, Result, TrialRequest
from tests.evaluate.results import PLAN, TEXT, result


class Instead:
    """Scheduler without machines: yields results made by hand, interrupted after ``after`` results."""

    def __init__(self, after: int = 1000, failing: str = "") -> None:
        self.after = after
        self.failing = failing
        self.made: list[Key] = []
        self.stops = 0

    def results(self, requests: Sequence[TrialRequest]) -> Iterator[Result]:
        for request in requests:
            if len(self.made) == self.after:
                raise KeyboardInterrupt
            self.made.append(request.key)
            why = "broke" if request.key.strategy == self.failing else None
            yield result(request.key.strategy, request.key.repetition, failed=why)

    def stop(self) -> None:
        self.stops += 1


def run(path: Path, scheduler: Instead, text: str = TEXT) -> tuple[int, int]:
    """Run a campaign; return the number of good and of failed results."""
    with Campaign(parse(text), text, path) as campaign:
        try:
            campaign.run(scheduler, lambda result: None)
        finally:
            assert scheduler.stops == 1
        return len(campaign.good()), len(campaign.failed())


def test_keys_have_every_combination_once_with_strategies_adjacent() -> None:
    found = keys(PLAN)
    assert [(key.strategy, key.repetition) for key in found] == [
        ("none", 0),
        ("mirror", 0),
        ("none", 1),
        ("mirror", 1),
    ]


def test_an_interrupted_campaign_continues(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    first = Instead(after=3)
    with pytest.raises(KeyboardInterrupt):
        run(path, first)
    second = Instead()
    assert run(path, second) == (4, 0)
    assert first.made + second.made == keys(PLAN)
    third = Instead()
    assert run(path, third) == (4, 0)
    assert third.made == []


def test_failed_trials_are_repeated(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    assert run(path, Instead(failing="mirror")) == (2, 2)
    again = Instead()
    assert run(path, again) == (4, 0)
    assert {key.strategy for key in again.made} == {"mirror"}


def test_more_repetitions_keep_results_and_other_faults_do_not(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    run(path, Instead())
    more = Instead()
    run(path, more, TEXT.replace("repetitions = 2", "repetitions = 3"))
    assert {key.repetition for key in more.made} == {2}
    other = Instead()
    text = TEXT.replace("expected = 30", "expected = 31")
    with Campaign(parse(text), text, path) as campaign:
        assert len(campaign.left()) == 4
        assert campaign.good() == []
    assert other.made == []


def test_a_truncated_line_costs_one_trial(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    run(path, Instead())
    data = path.read_bytes()
    path.write_bytes(data[: -len(data.splitlines()[-1]) // 2])
    again = Instead()
    assert run(path, again) == (4, 0)
    assert again.made == keys(PLAN)[-1:]
    assert run(path, Instead()) == (4, 0)


def test_a_second_campaign_on_the_same_file_is_refused(tmp_path: Path) -> None:
    with Campaign(PLAN, TEXT, tmp_path / "t.jsonl"), pytest.raises(Busy, match="another evaluation"):
        Campaign(PLAN, TEXT, tmp_path / "t.jsonl")


def test_a_result_survives_json(tmp_path: Path) -> None:
    made = result("mirror", 1)
    assert msgspec.json.decode(msgspec.json.encode(made), type=Result) == made
