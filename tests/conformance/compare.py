"""Judge a step: the kernel's outcome, changed by each rule in turn into the right outcome, must equal
daxemu's outcome.

The reasons are those of docs/fidelity.md. Each rule of rules.py applies one reason, and only where the world
shows the condition: a page is poison, a block is shared, an earlier difference left other bytes. A remaining
difference is UNEXPLAINED; so is an outcome equal to the kernel's where the media would not have allowed it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from tests.conformance.recording import Outcome, Step
from tests.conformance.rules import CACHE, RULES, UNMAPPED, neighbours_told, place_of
from tests.conformance.world import World

OTHER = "not the reference"
UNEXPLAINED = "UNEXPLAINED"

NOISE = re.compile(
    r"Injecting memory failure|mce: |Soft offlining"  # the cause of the failure, not its effect
    r"|FS: (Please unmount|User initiated|Metadata I/O Error)"  # XFS's own words for being shut down
)
COUNTED = ("total", "ignored", "failed", "delayed", "recovered")
"""node0/memory_failure/*; HardwareCorrupted is of /proc/meminfo."""


@dataclass(frozen=True)
class Difference:
    """Step whose outcome differs from the kernel's. ``right`` is the outcome that the rules expect."""

    index: int
    step: Step
    kernel: Outcome
    right: Outcome
    ours: Outcome
    reasons: tuple[str, ...]

    @property
    def explained(self) -> bool:
        return UNEXPLAINED not in self.reasons

    def __str__(self) -> str:
        said = [f"{self.step}: {', '.join(self.reasons)}", f"  kernel {brief(self.kernel)}"]
        if not self.explained:
            said.append(f"  right  {brief(self.right)}")
        return "\n".join([*said, f"  daxemu {brief(self.ours)}"])


def judge(index: int, step: Step, ours: Outcome, world: World) -> Difference | None:
    """Compare a step with the reference kernel's, then update the world. None: no difference."""
    difference = None
    reason = None
    if step.expected is not None:
        kernel, here = normal(step.expected), normal(ours)
        if step.who not in ("inj", "host"):  # the kernel's were read after failures only
            here = replace(here, counters={})
        right, reasons = _right(step, kernel, world)
        if right != here:
            is_cache = not world.direct and neighbours_told(step, right, here, world) == right
            extra = CACHE if is_cache else UNEXPLAINED
            reasons = (extra,) if extra == UNEXPLAINED else (*reasons, extra)
        reason = reasons[0] if reasons else None
        if not reasons and _faults(step.expected) != _faults(ours):
            reasons = (_of_faults(step, ours, world),)
        if reasons:
            difference = Difference(index, step, kernel, right, here, reasons)
    world.after(step, ours, reason)
    return difference


def _of_faults(step: Step, ours: Outcome, world: World) -> str:
    """Return the reason of page faults that the kernel did not take, or took and daxemu did not."""
    if not world.direct:
        return CACHE
    return UNMAPPED if _faults(ours) and place_of(step) in world.unmapped else UNEXPLAINED


def judge_other(
    index: int, step: Step, other: Outcome, ours: Outcome, found: Difference | None, *, direct: bool = False
) -> Difference | None:
    """Compare the same step with a kernel other than the reference; ``found`` is the result of ``judge``.
    ``direct``: played on a direct mount.
    """
    assert step.expected is not None
    kernel, reference, here = normal(other), normal(step.expected), normal(ours)
    if not counted(other):
        reference, here = (replace(o, counters={}) for o in (reference, here))
    if kernel == here and _faults(other) == _faults(ours):
        return None
    reasons = found.reasons if found is not None else ()
    if kernel != reference:
        reasons = (*reasons, OTHER)
    return Difference(index, step, kernel, reference, here, reasons or (UNEXPLAINED if direct else CACHE,))


def _right(step: Step, kernel: Outcome, world: World) -> tuple[Outcome, tuple[str, ...]]:
    """Apply the rules to the kernel's outcome; return the right outcome, and the reasons of the rules that
    changed it.
    """
    right = kernel
    reasons: list[str] = []
    for rule in RULES:
        turned = rule(step, right, world)
        changed = right if turned is None else normal(turned[0])
        if turned is not None and changed != right:
            reasons += [reason for reason in turned[1].split(" + ") if reason not in reasons]
            right = changed
    return right, tuple(reasons)


def counted(outcome: Outcome) -> bool:
    """Return True if the kernel has the counters at all: 6.1 does not."""
    return not outcome.counters or any(name in COUNTED for name in outcome.counters)


def normal(outcome: Outcome) -> Outcome:
    """Drop differences between two runs of one kernel, too."""
    return Outcome(
        _normal_res(outcome.res),
        tuple(sorted(outcome.signals, key=repr_sorted)),
        tuple(sorted(outcome.deaths, key=repr_sorted)),
        tuple(sorted(line for line in map(_normal_line, outcome.dmesg) if not NOISE.match(line))),
        {name: more for name, more in sorted(outcome.counters.items()) if name in COUNTED},
    )


def repr_sorted(record: dict[str, Any]) -> str:
    return repr(sorted(record.items()))


def _normal_res(res: Any) -> Any:
    if isinstance(res, dict) and "ok" in res:
        return {"ok": res["ok"]}
    if isinstance(res, dict) and "present" in res:
        return {"present": res["present"]}
    return res


def _faults(outcome: Outcome) -> bool:
    return isinstance(outcome.res, dict) and bool(outcome.res.get("faults"))


_LINES: tuple[tuple[str, str], ...] = (
    (r"^(XFS|EXT4-fs|daxemu) \([^)]*\): ", "FS: "),
    (r"^FS: Corruption of on-disk metadata.*Shutting down.*", "FS: corrupt metadata, shutting down"),
    (r"^nd_pmem [^:]*: ", "nd_pmem: "),
    (r"^WARNING: fs/dax\.c.*", "WARNING: fs/dax.c"),
)


def _normal_line(line: str) -> str:
    for pattern, text in _LINES:
        line = re.sub(pattern, text, line)
    return line


def brief(outcome: Outcome) -> str:
    """Return a difference as one line."""
    parts = [str(outcome.res)]
    for s in outcome.signals:
        lsb = f" lsb {s['lsb']}" if "lsb" in s else ""
        parts.append(f"{s['who']}.{s['thread']} {s['code']} {s['addr']}{lsb} ({s['how']})")
    parts += [f"{d['who']} died: {d.get('signal', d.get('exit'))}" for d in outcome.deaths]
    parts += [f"{line!r}" for line in outcome.dmesg]
    if outcome.counters:
        parts.append(str(outcome.counters))
    return "; ".join(parts)
