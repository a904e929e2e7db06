"""Count of recorded facts that daxemu repeats: signals, deaths, errnos, bytes, log lines and others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.conformance.compare import normal, repr_sorted
from tests.conformance.recording import Outcome

KINDS = (
    "steps",
    "signals",
    "deaths",
    "errnos",
    "bytes",
    "pages present",
    "log lines",
    "counters",
    "bad blocks",
)

_DEAD = ("died", "dead already")
"""Results that the deaths tell."""


@dataclass
class Tally:
    """Numbers of facts of each kind. ``more``: facts of daxemu that are not in the recording."""

    same: Counter[str] = field(default_factory=Counter)
    recorded: Counter[str] = field(default_factory=Counter)
    more: Counter[str] = field(default_factory=Counter)

    def step(self, expected: Outcome, ours: Outcome, *, is_same: bool) -> None:
        """Count one step. Counters that the kernel did not record are no fact of daxemu's either.

        ``expected``: the kernel's outcome, or the right outcome. ``is_same``: the step does not differ.
        """
        theirs, here = Counter(_facts(expected)), Counter(_facts(ours))
        if not normal(expected).counters:
            here = Counter({fact: n for fact, n in here.items() if fact[0] != "counters"})
        for of, facts in ((self.same, theirs & here), (self.recorded, theirs), (self.more, here - theirs)):
            for (kind, _), number in facts.items():
                of[kind] += number
        self.recorded["steps"] += 1
        self.same["steps"] += is_same
        self.more["steps"] += 0

    def add(self, other: Tally) -> None:
        """Add the numbers of another tally."""
        self.same += other.same
        self.recorded += other.recorded
        self.more += other.more


def _facts(outcome: Outcome) -> Iterator[tuple[str, str]]:
    """Yield (kind, fact) of an outcome."""
    plain = normal(outcome)
    yield from (("signals", repr_sorted(signal)) for signal in plain.signals)
    yield from (("deaths", repr_sorted(death)) for death in plain.deaths)
    yield from (("log lines", line) for line in plain.dmesg)
    yield from (("counters", f"{name} {more}") for name, more in plain.counters.items())
    if isinstance(plain.res, str) and plain.res not in _DEAD:
        yield "bad blocks", plain.res
    if not isinstance(plain.res, dict):
        return
    if "errno" in plain.res:
        yield "errnos", f"{plain.res['ret']} {plain.res['errno']}"
    if plain.res.get("pages") or "ok" in plain.res:
        yield "bytes", f"{plain.res.get('pages')} {plain.res.get('ok')}"
    if "present" in plain.res:
        yield "pages present", str(plain.res["present"])
