"""Tender: time without service, and restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from daxemu.evaluate.tender import Tender, WorkloadLife
from daxemu.evaluate.worker import Job
from daxemu.evaluate.workloads.specs import Command


def down(*lives: WorkloadLife) -> float:
    tender = Tender(Job(Command(command="true"), "/nowhere", "/nowhere", 1, seconds=10.0))
    tender.began = 0.0
    tender.lives = list(lives)
    return tender.down()


def test_down_adds_up_time_without_service() -> None:
    assert down(WorkloadLife(-1, 10, first=0.0)) == 0
    assert down(WorkloadLife(-1, 10, first=0.0, down=2.5)) == 2.5
    assert down(WorkloadLife(-1, 3, first=0.0, status=-7), WorkloadLife(3, 10, first=3.5)) == 0.5
    assert down(
        WorkloadLife(-1, 3, first=0.0, down=1.0, status=-7),
        WorkloadLife(3, 4, status=-7),
        WorkloadLife(4, 10, first=4.25),
    ) == pytest.approx(2.25), "a life without a successful operation is part of the gap"
    assert down(WorkloadLife(-1, 3, first=0.0, status=-7), WorkloadLife(3, 10)) == 7


def test_the_workload_is_restarted_after_each_death_until_the_time_is_up(tmp_path: Path) -> None:
    for name in ("root", "state"):
        (tmp_path / name).mkdir()
    # The command kills the worker process itself.
    second = "{ touch ../died; kill -BUS $PPID; }"
    spec = Command(command=f"test -e ../died || {{ test -e ../once && {second}; touch ../once; }}")
    tender = Tender(Job(spec, str(tmp_path / "root"), str(tmp_path / "state"), 1, seconds=1.5))
    tender.start()
    tender.running.wait()
    tender.join()
    assert [life.status for life in tender.lives] == [-7, 0]
    first, second_life = tender.lives
    # On a busy machine the second life may begin too late for an operation.
    back = tender.until if second_life.first is None else second_life.first
    assert tender.down() == pytest.approx(max(back - first.end, 0.0))
