"""Commands that no recording of ours has, in both modes: fdatasync, an unlinked file, a signal that is
unblocked, a file that a process has mapped twice.

Right values: those of mm/memory-failure.c on DAX.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conformance.compare import judge, normal
from tests.conformance.recording import DIRECT, MODES, Outcome, Scenario, Step
from tests.conformance.replay import playing
from tests.conformance.world import World
from tests.support.quick import quick_mount_at
from tests.support.zygote import shared_zygote

pytestmark = [
    pytest.mark.mount,
    pytest.mark.timeout(60),
    pytest.mark.skipif(os.geteuid() != 0, reason="direct mounts need root"),
]

POISON = ("inj", "poison page 1 of f (corrupt-pfn)")
DONE = {"ret": 0, "errno": "0"}
BEGIN = [
    ("-", "mkfile f pages 8 first A"),
    ("-", "early_kill 1"),
    ("p0", "open 0 f rw"),
    ("p0", "mmap 0 0 0 8 shared"),
    ("p0", "tr 0 1"),
]


def play(steps: list[tuple[str, str]], mode: str, directory: Path) -> list[Outcome]:
    """Play steps after BEGIN; return the outcome of each of them."""
    scenario = Scenario("made", "", tuple(Step(*step) for step in (*BEGIN, *steps)), "7.2")
    world = World(direct=mode == DIRECT)
    outcomes = []
    with (
        quick_mount_at(directory, shared_zygote(), direct=mode == DIRECT) as mount,
        playing(mount, scenario) as player,
    ):
        for index, step, outcome in player.play():
            outcomes.append(outcome)
            judge(index, step, outcome, world)
    return outcomes[len(BEGIN) :]


def codes(outcome: Outcome) -> list[tuple[str, str]]:
    return [(signal["code"], signal["addr"]) for signal in outcome.signals]


AO, AR = ("BUS_MCEERR_AO", "m0+0x1000"), ("BUS_MCEERR_AR", "m0+0x1000")


@pytest.mark.parametrize("mode", MODES, ids=("cache", "direct"))
def test_poison_of_an_unlinked_file_signals_the_process_that_has_the_file_mapped(
    mode: str, tmp_path: Path
) -> None:
    steps = [("p0", "tw 0 2 x"), ("p0", "unlink f"), POISON, ("p0", "fdatasync 0"), ("p0", "tr 0 1")]
    stored, unlinked, poisoned, synced, touched = play(steps, mode, tmp_path)
    assert (stored.res["ok"], unlinked.res, synced.res) == ("x", DONE, DONE)
    assert codes(poisoned) == [AO]
    assert codes(touched) == [AR]


@pytest.mark.parametrize("mode", MODES, ids=("cache", "direct"))
def test_a_blocked_signal_arrives_when_unblocked(mode: str, tmp_path: Path) -> None:
    steps = [("p0", "sig block"), POISON, ("p0", "sig pending"), ("p0", "sig unblock"), ("p0", "tr 0 1")]
    _, poisoned, pending, unblocked, touched = play(steps, mode, tmp_path)
    assert (codes(poisoned), pending.res["ret"], codes(unblocked)) == ([], 1, [AO])
    assert codes(touched) == [AR]


@pytest.mark.parametrize("mode", MODES, ids=("cache", "direct"))
def test_a_file_mapped_twice_has_a_log_line_for_each_mapping(mode: str, tmp_path: Path) -> None:
    steps = [
        ("p0", "mmap 1 0 1 2 shared"),
        ("p0", "tr 1 0"),
        POISON,
        ("p0", "tr 1 0"),
        ("p0", "tr 0 1"),
        ("p0", "tr 1 1"),
    ]
    _, _, poisoned, second, first, good = play(steps, mode, tmp_path)
    assert sum("Sending SIGBUS" in line for line in normal(poisoned).dmesg) == 2
    assert codes(second) == [("BUS_MCEERR_AR", "m1+0x0")]
    assert codes(first) == [AR]
    assert good.res["ok"] == "C"
