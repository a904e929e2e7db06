"""Misbehaving strategies: each is a verdict, and no misbehaviour harms the filesystem."""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from daxemu.errors import DaxemuError, InvalidArgument
from daxemu.events import Outcome, RepairStrategyFailed
from daxemu.fs.fsck import fsck
from daxemu.ranges import Range, RangeSet
from daxemu.repair import registry
from daxemu.repair.strategy import Failure, Strategy, Verdict
from daxemu.supervisor import strategy_host
from daxemu.uapi import PAGE_SIZE
from tests.support.repairing import Repairing, repairing


class Bad(Strategy):
    """Strategy with the behaviour chosen by the test for each call."""

    name = "bad"
    watches = True
    behaviour: Any = None
    where = "failed"

    def _do(self, where: str) -> Any:
        return type(self).behaviour(self) if type(self).where == where else None

    def failed(self, failure: Failure) -> Verdict:
        answer: Verdict = self._do("failed")
        return answer

    def mounted(self, *, after_crash: bool) -> None:
        self._do("mounted")

    def store_done(self, blocks: Any, origin: Any) -> None:
        self._do("store_done")

    def freed(self, blocks: Range) -> None:
        self._do("freed")

    def verify(self, blocks: Range) -> None:
        self._do("verify")


def loop(strategy: Bad) -> None:
    while True:
        pass


def sleep(strategy: Bad) -> None:
    time.sleep(60)


def relocate_for_ever(strategy: Bad) -> None:
    """Never outside of the filesystem's own code for long."""
    (blocks,) = list(strategy.volume.in_use())[:1]
    while True:
        strategy.volume.relocate(blocks, strategy.volume.salvage(blocks)[0])


def crash(strategy: Bad) -> None:
    raise ZeroDivisionError


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Iterator[Repairing]:
    point = EntryPoint("bad", f"{__name__}:Bad", registry.GROUP)
    monkeypatch.setattr(registry, "entry_points", lambda group, name="bad": [point] if name == "bad" else [])
    monkeypatch.setattr(strategy_host, "HOOK_LIMIT", 0.2)
    monkeypatch.setattr(Bad, "behaviour", lambda strategy: None)
    monkeypatch.setattr(Bad, "where", "nowhere")
    with repairing("bad") as made:
        yield made


@pytest.mark.parametrize("behaviour", [loop, sleep, relocate_for_ever, crash, lambda strategy: 7])
def test_a_verdict_that_never_comes_is_failed(
    made: Repairing, monkeypatch: pytest.MonkeyPatch, behaviour: Any
) -> None:
    ino = made.core.file(data=b"x" * 3 * PAGE_SIZE)
    other = made.core.file(b"other", b"y" * PAGE_SIZE)
    monkeypatch.setattr(Bad, "where", "failed")
    monkeypatch.setattr(Bad, "behaviour", behaviour)
    finished = made.fail(made.at(ino, PAGE_SIZE), 512)
    assert finished is not None
    assert finished.verdict == "failed"
    assert made.repairs.counters["failed"] == 1
    assert made.core.mm.counters[Outcome.FAILED] == 1
    (event,) = [e for e in made.core.events if isinstance(e, RepairStrategyFailed)]
    assert event.strategy == "bad"
    assert made.repairs.report().broken
    assert made.core.read(other) == b"y" * PAGE_SIZE
    assert fsck(made.core.fs) == []
    again = made.fail(made.at(other, 0), 512)
    assert again is not None
    assert again.verdict == "failed"


@pytest.mark.parametrize(
    "verdict",
    [
        lambda f: Verdict(recovered=RangeSet(f.blocks)),
        lambda f: Verdict(lost=RangeSet([(0, 1)])),
        lambda f: Verdict(recovered=RangeSet([(9999, 10000)])),
        lambda f: Verdict(recovered=RangeSet(f.blocks), lost=RangeSet(f.blocks)),
    ],
    ids=["not-readable", "not-asked", "past-the-end", "both"],
)
def test_nonsense_is_failed(made: Repairing, monkeypatch: pytest.MonkeyPatch, verdict: Any) -> None:
    ino = made.core.file(data=b"x" * 3 * PAGE_SIZE)
    monkeypatch.setattr(Bad, "failed", lambda self, failure: verdict(failure))
    finished = made.fail(made.at(ino, PAGE_SIZE), 512)
    assert finished is not None
    assert finished.verdict == "failed"


@pytest.mark.parametrize("behaviour", [loop, crash])
@pytest.mark.parametrize("where", ["store_done", "verify", "freed"])
def test_data_goes_on_without_it(
    made: Repairing, monkeypatch: pytest.MonkeyPatch, where: str, behaviour: Any
) -> None:
    monkeypatch.setattr(Bad, "where", where)
    monkeypatch.setattr(Bad, "behaviour", behaviour)
    ino = made.core.file(data=b"x" * 3 * PAGE_SIZE)
    assert made.core.read(ino) == b"x" * 3 * PAGE_SIZE
    made.core.fs.set_size(ino, PAGE_SIZE)
    made.core.fs.commit()
    assert made.host.broken is not None
    assert made.host.broken.startswith(where)
    assert made.core.read(ino) == b"x" * PAGE_SIZE
    assert fsck(made.core.fs) == []


@pytest.mark.parametrize("behaviour", [loop, crash])
def test_one_that_cannot_begin_refuses_the_mount(
    made: Repairing, monkeypatch: pytest.MonkeyPatch, behaviour: Any
) -> None:
    monkeypatch.setattr(Bad, "where", "mounted")
    monkeypatch.setattr(Bad, "behaviour", behaviour)
    monkeypatch.setattr(strategy_host, "BEGIN_LIMIT", 0.2)
    with pytest.raises(DaxemuError, match="bad"):
        made.choose("bad")
    assert made.host.text == "none"
    made.choose("zero")
    assert made.host.text == "zero"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("nope", "no repair strategy 'nope'; known strategies: async-parity, "),
        ("zero:x=1", "its options are: none"),
        ("parity:slice", "not key=value"),
        ("parity:slice=1,slice=2", "given twice"),
        ("parity:slice=1000", "must be 512, 1024, 2048 or 4096"),
        ("parity:data=1", "from 2 to 64"),
        ("parity:slice=x", "slice"),
        ("parity:mapped=maybe", "mapped"),
        ("async-parity:window=0", "window"),
        ("broken", "no repair strategy"),
        ("reread", "absolute path of a directory"),
        ("reread:path=/nowhere", "absolute path of a directory"),
        ("", "no repair strategy ''"),
    ],
)
def test_an_unusable_strategy_is_refused(made: Repairing, text: str, complaint: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        made.choose(text)
    assert complaint in str(caught.value)
    assert "\n" not in str(caught.value)
    assert made.host.text == "bad", "a refusal changes nothing"


def test_another_strategy_takes_nothing_over(made: Repairing) -> None:
    """Blocks written without the mirror would be restored wrongly."""
    made.choose("mirror")
    ino = made.core.file(data=b"a" * PAGE_SIZE)
    made.choose("none")
    assert made.repairs.report().space_bytes == 0
    assert not any((made.core.path / "repair").iterdir())
    made.core.fs.write(ino, 0, b"b" * PAGE_SIZE)
    made.choose("mirror")
    made.fail(made.at(ino, 0), 512)
    assert made.core.read(ino) == b"b" * PAGE_SIZE
