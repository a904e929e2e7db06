"""Counts for users name their unit: processes or signals."""

from __future__ import annotations

import pytest

from tests.support.actor import Actor
from tests.support.scene import PAGE, PAGES, Scene, ask, letter

pytestmark = pytest.mark.mount

BAD = 3


def two_processes(scene: Scene) -> list[Actor]:
    """Two processes of two threads each; each process has two mappings of ``f`` with page BAD present."""
    actors = scene.mappers(2, touch=[BAD], before=["threads n"])
    for actor in actors:
        ask(actor, f"mmap 1 0 0 {PAGES} shared")
        assert actor.cmd(f"tr 1 {BAD}").ok == letter(BAD)
    return actors


def test_an_injection_counts_processes_and_signals(early: Scene) -> None:
    two_processes(early)
    (outcome,) = early.poison(BAD)
    assert (outcome["processes"], outcome["signals"], outcome["told"]) == (2, 4, 4)
    assert len(early.mount.events("SignalSent")) == 4
    (handled,) = early.mount.events("MemoryFailureHandled")
    assert (handled["processes"], handled["signals"], handled["told"]) == (2, 4, 4)


def test_the_command_says_what_it_counts(early: Scene) -> None:
    two_processes(early)
    path = early.mount.path / "f"
    said = early.mount.run("inject", path, "--offset", BAD * PAGE, "--length", PAGE)
    assert said.strip().endswith("Recovered, 2 processes signalled (4 signals)")
    again = early.mount.run("inject", path, "--offset", BAD * PAGE, "--length", PAGE)
    assert again.strip().endswith("Recovered, 0 processes signalled")


def test_a_removal_sends_each_process_one_signal(scene: Scene) -> None:
    two_processes(scene)
    said = scene.mount.run("remove", scene.mount.path)
    assert said.strip().endswith("in one call: 2 processes signalled")
    (removed,) = scene.mount.events("DeviceRemoved")
    assert (removed["processes"], removed["signals"], removed["told"]) == (2, 2, 2)
    assert len(scene.mount.events("SignalSent")) == 2
    assert "was removed, 2 processes signalled" in scene.mount.run("log", scene.mount.path)
