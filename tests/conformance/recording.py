"""Recordings of real kernels beside this file (from shared/kernel, made as its README describes), and the
script of each scenario: the steps, with the kernel's outcome of each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

RECORDINGS = Path(__file__).parent / "recordings"
KERNELS = ("6.1", "6.12", "7.2")
CONFIG = "xfs-dax"
"""Reflink and rmapbt: the filesystem with daxemu's features."""
OTHER_CONFIGS = ("xfs-dax-normap", "ext4-dax")

MODES = ("page cache", "direct")
"""Modes of a mount: mappings of the page cache, or of the media (``mount --direct``)."""
DIRECT = MODES[1]

_NOT_PLAYED = re.compile(r"unpoison|kernel stack|SIGKILL|all mappers killed|is the unbind|1\.5 s later|note$")


Records = tuple[dict[str, Any], ...]


@dataclass(frozen=True)
class Outcome:
    """Outcome of one step, in the recordings' form."""

    res: Any = None
    signals: Records = ()
    deaths: Records = ()
    dmesg: tuple[str, ...] = ()
    counters: dict[str, str] = field(default_factory=dict)

    @classmethod
    def recorded(cls, step: dict[str, Any]) -> Outcome:
        return cls(
            step.get("res"),
            tuple(step.get("signals", ())),
            tuple(step.get("deaths", ())),
            tuple(step.get("dmesg", ())),
            step.get("counters", {}),
        )


@dataclass(frozen=True)
class Step:
    """One command. ``expected`` is the reference kernel's outcome; None for set-up that was not recorded."""

    who: str
    do: str
    expected: Outcome | None = None

    @property
    def key(self) -> tuple[str, str]:
        return canonical(self.who, self.do)

    def __str__(self) -> str:
        return f"{self.who}: {self.do}"


@dataclass(frozen=True)
class Scenario:
    id: str
    text: str
    steps: tuple[Step, ...]
    reference: str
    """Kernel whose recording is the reference."""


def canonical(who: str, do: str) -> tuple[str, str]:
    """The same for a step's name in a script and in a recording."""
    return ("host", "unbind") if "unbind" in do and "finished" not in do else (who, do)


def last_touched(steps: Sequence[Step]) -> int:
    """Return the page of ``f`` touched last in ``steps``, where a machine check strikes."""
    mapped: dict[tuple[str, str], int] = {}
    page = 0
    for step in steps:
        match step.do.split():
            case ["mmap", number, _, first, *_]:
                mapped[step.who, number] = int(first)
            case ["tr" | "tw", number, touched, *_]:
                page = mapped.get((step.who, number), 0) + int(touched)
    return page


def reference_of(scenario: str) -> str:
    """Return the newest kernel. Exception: removal on 7.2 never returns, so 6.12 is the reference."""
    return "6.12" if scenario.startswith("n") else KERNELS[-1]


@cache
def load(kernel: str, config: str = CONFIG) -> dict[str, dict[str, Any]]:
    """The scenarios of one recording, by id."""
    recorded = json.loads((RECORDINGS / f"{kernel}-{config}.json").read_text())
    return {scenario["id"]: scenario for scenario in recorded["scenarios"]}


@cache
def scenarios() -> dict[str, Scenario]:
    """Return all scenarios: every command of the script, each with the reference kernel's outcome."""
    scripts = json.loads((RECORDINGS / "scripts.json").read_text())
    return {name: _scenario(name, script) for name, script in scripts.items()}


def _scenario(name: str, script: dict[str, Any]) -> Scenario:
    """Merge the script's commands and the recording's, in order: a script lacks steps not survived by all
    kernels.
    """
    reference = reference_of(name)
    left = [Step(s["who"], s["do"]) for s in script["steps"]]
    steps: list[Step] = []
    for recorded in load(reference)[name]["steps"]:
        step = Step(recorded["who"], recorded["do"], Outcome.recorded(recorded))
        at = next((i for i, s in enumerate(left) if s.key == step.key), None)
        if at is not None:
            steps += [s for s in left[:at] if played(s)]
            del left[: at + 1]
        if played(step):
            steps.append(step)
    steps += [s for s in left if played(s)]
    return Scenario(name, script["text"], tuple(steps), reference)


def played(step: Step) -> bool:
    """Return True if the step has an effect here: notes, stacks and clean-up of the kernel have none."""
    return not _NOT_PLAYED.search(step.do)


def outcomes(scenario: Scenario, kernel: str, config: str = CONFIG) -> dict[int, Outcome]:
    """Return another kernel's outcomes of ``scenario``, by index of the step; steps not recorded there are
    left out.
    """
    recorded = load(kernel, config).get(scenario.id)
    if recorded is None:
        return {}
    found: dict[int, Outcome] = {}
    rest = [(canonical(s["who"], s["do"]), Outcome.recorded(s)) for s in recorded["steps"]]
    for index, step in enumerate(scenario.steps):
        at = next((i for i, (key, _) in enumerate(rest) if key == step.key), None)
        if step.expected is not None and at is not None:
            found[index] = rest[at][1]
            del rest[: at + 1]
    return found
