"""Plays one scenario on a fresh mount and judges every step."""

from __future__ import annotations

import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from daxemu.uapi import PMD_SIZE
from tests.conformance.compare import Difference, judge, judge_other
from tests.conformance.recording import (
    CONFIG,
    DIRECT,
    KERNELS,
    MODES,
    OTHER_CONFIGS,
    Outcome,
    Scenario,
    outcomes,
)
from tests.conformance.replay import NotYet, by_pmd, not_yet, playing
from tests.conformance.tally import Tally
from tests.conformance.world import World
from tests.support.quick import QuickMount, quick_mount_at
from tests.support.zygote import Zygote

Column = tuple[str, str]
"""Kernel and configuration of a recording."""
COLUMNS: tuple[Column, ...] = (
    *((kernel, CONFIG) for kernel in KERNELS),
    *((KERNELS[-1], config) for config in OTHER_CONFIGS),
)


@dataclass
class Verdict:
    """Result of a scenario, against each recording."""

    scenario: Scenario
    mode: str = MODES[0]
    differences: list[Difference] = field(default_factory=list)
    """From the reference kernel."""
    columns: dict[Column, list[Difference] | None] = field(default_factory=dict)
    """From each; None where the scenario was not run."""
    not_yet: str | None = None
    tally: Tally = field(default_factory=Tally)
    """Facts of the reference that are repeated here."""
    right: Tally = field(default_factory=Tally)
    """Facts of the outcomes that the reasons demand."""

    def count(self, kernel: Outcome, ours: Outcome, found: Difference | None) -> None:
        """Count the facts of one step. ``found``: the difference from the reference."""
        self.tally.step(kernel, ours, is_same=found is None)
        right = kernel if found is None else found.right
        self.right.step(right, ours, is_same=found is None or found.right == found.ours)

    @property
    def reasons(self) -> list[str]:
        return sorted({reason for found in self.differences for reason in found.reasons})

    @property
    def unexplained(self) -> list[Difference]:
        return [found for found in self.differences if not found.explained]


def run(scenario: Scenario, zygote: Zygote, directory: Path, mode: str = MODES[0]) -> Verdict:
    """Play a scenario in a mode. A command that an actor cannot carry out is an exception."""
    verdict = Verdict(scenario, mode)
    verdict.not_yet = not_yet(scenario)
    if verdict.not_yet is not None:
        return verdict
    ours: dict[int, Outcome] = {}
    judged: dict[int, Difference] = {}
    direct = mode == DIRECT
    world = World(direct=direct)
    with _mount(scenario, zygote, directory, direct=direct) as mount:
        mount.sound = not any("superblock" in step.do for step in scenario.steps)
        try:
            with playing(mount, scenario) as player:
                for index, step, outcome in player.play():
                    ours[index] = outcome
                    found = judge(index, step, outcome, world)
                    if found is not None:
                        judged[index] = found
                    if step.expected is not None:
                        verdict.count(step.expected, outcome, found)
        except NotYet as missing:
            verdict.not_yet = str(missing)
            return verdict
    verdict.differences = list(judged.values())
    for column in COLUMNS:
        verdict.columns[column] = _against(scenario, column, ours, judged, direct=direct)
    return verdict


@contextmanager
def _mount(
    scenario: Scenario, zygote: Zygote, directory: Path, *, direct: bool
) -> Generator[QuickMount, None, None]:
    """Mount a fresh device. A direct mount has 2 MiB pages only on a tmpfs with huge pages."""
    if not by_pmd(scenario):
        with quick_mount_at(directory, zygote, direct=direct) as mount:
            yield mount
    elif not direct:
        with quick_mount_at(directory, zygote, align=PMD_SIZE) as mount:
            yield mount
    else:
        with (
            huge_tmpfs(directory / "huge") as where,
            quick_mount_at(directory, zygote, align=PMD_SIZE, direct=True, where=where) as mount,
        ):
            yield mount


@contextmanager
def huge_tmpfs(where: Path) -> Generator[Path, None, None]:
    """Mount a tmpfs whose files have pages of 2 MiB. Needs root."""
    where.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "huge=always", "daxemu-test", where], check=True)
    try:
        yield where
    finally:
        subprocess.run(["umount", "-l", where], check=True)


def _against(
    scenario: Scenario,
    column: Column,
    ours: dict[int, Outcome],
    judged: dict[int, Difference],
    *,
    direct: bool,
) -> list[Difference] | None:
    theirs = outcomes(scenario, *column)
    if not theirs:
        return None
    if column == (scenario.reference, CONFIG):
        return list(judged.values())
    found = (
        judge_other(index, scenario.steps[index], other, ours[index], judged.get(index), direct=direct)
        for index, other in theirs.items()
        if index in ours
    )
    return [difference for difference in found if difference is not None]
