"""Time without service, over a workload's lives."""

from __future__ import annotations

from pathlib import Path

import pytest

from daxemu.evaluate.tender import Life, Tender
from daxemu.evaluate.worker import Job
from daxemu.evaluate.workloads.specs import Command


def down(*lives: Life) -> float:
    tender = Tender(Job(Command(command="true"), "/nowhere", "/nowhere", 1, seconds=10.0))
    tender.began = 0.0
    tender.lives = list(lives)
    return tender.down()


def test_time_without_service() -> None:
    assert down(Life(-1, 10, first=0.0)) == 0
    assert down(Life(-1, 10, first=0.0, down=2.5)) == 2.5
    assert down(Life(-1, 3, first=0.0, status=-7), Life(3, 10, first=3.5)) == 0.5
    assert down(
        Life(-1, 3, first=0.0, down=1.0, status=-7), Life(3, 4, status=-7), Life(4, 10, first=4.25)
    ) == pytest.approx(2.25), "a life in which nothing succeeded belongs to the gap"
    assert down(Life(-1, 3, first=0.0, status=-7), Life(3, 10)) == 7


def test_it_is_started_again_after_each_death_until_its_time_is_up(tmp_path: Path) -> None:
    for name in ("root", "state"):
        (tmp_path / name).mkdir()
    # The worker's own process is killed by the command it runs.
    second = "{ touch ../died; kill -BUS $PPID; }"
    spec = Command(command=f"test -e ../died || {{ test -e ../once && {second}; touch ../once; }}")
    tender = Tender(Job(spec, str(tmp_path / "root"), str(tmp_path / "state"), 1, seconds=1.5))
    tender.start()
    tender.running.wait()
    tender.join()
    assert [life.status for life in tender.lives] == [-7, 0]
    first, second_life = tender.lives
    # On a busy machine the second one may begin too late to do anything.
    back = tender.until if second_life.first is None else second_life.first
    assert tender.down() == pytest.approx(max(back - first.end, 0.0))
