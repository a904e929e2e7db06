"""Faults drawn from a plan: time, place, size, detection.

The draw depends on (plan seed, fault plan, repetition) alone, so every strategy and every workload has the
same faults. The place of a "files" fault is a fraction of the workload's bytes, of a "metadata" fault a
fraction of the filesystem's own bytes. The injector resolves a place to device bytes when the fault is due.
"""

from __future__ import annotations

import zlib

import msgspec
import numpy as np

from daxemu.evaluate.plan import Detect, FaultPlan, FaultProcess, Plan, Target, mean_arrivals, unit_bytes
from daxemu.failure_kind import FailureKind
from daxemu.uapi import SECTOR_SIZE
from daxemu.units import round_down, round_up


class Fault(msgspec.Struct, frozen=True):
    """A fault of a trial. Times are seconds from the start of the workload, sizes are bytes.

    ``place`` is in [0, 1) of the target's bytes. ``found``: time of the hardware's own report; None if the
    hardware does not report the fault.
    """

    time: float
    kind: FailureKind
    target: Target
    unit: str
    place: float
    length: int
    detect: Detect
    found: float | None
    spill: int
    seed: int
    shift: int = 0
    """Offset in bytes from ``place``, for all faults of a storm after the first."""


def generator(*key: int | str) -> np.random.Generator:
    """Return a random generator with an independent stream for each key."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.default_rng(np.random.SeedSequence(words))


def draw(plan: Plan, faults: FaultPlan, repetition: int) -> list[Fault]:
    """Draw the faults of one trial, sorted by time."""
    found: list[Fault] = []
    for index, process in enumerate(faults.process):
        rng = generator(plan.seed, faults.name, repetition, index)
        found += _draw_process(plan, faults, process, rng)
    return sorted(found, key=lambda fault: fault.time)


def pareto_factors(rng: np.random.Generator, shape: float, count: int) -> np.ndarray:
    """Draw ``count`` Pareto distributed factors of mean 1 for the fault rates of devices.

    ``shape`` must be above 1.
    """
    scale = (shape - 1.0) / shape
    factors: np.ndarray = scale * (1.0 + rng.pareto(shape, count))
    return factors


def _draw_process(plan: Plan, faults: FaultPlan, p: FaultProcess, rng: np.random.Generator) -> list[Fault]:
    times, shifts, parents = _arrivals(plan, p, rng)
    places = rng.random(len(times))[parents]
    names = [unit for unit, weight in p.unit.items() if weight > 0]
    weights = np.array([p.unit[name] for name in names])
    units = rng.choice(len(names), len(times), p=weights / weights.sum())
    delays = rng.exponential(p.delay, len(times)) if p.delay is not None else np.zeros(len(times))
    seeds = rng.integers(0, 1 << 31, len(times))
    made = []
    for i, time in enumerate(times):
        unit = names[units[i]]
        found = None
        if p.kind.traits.is_poison and p.detect in ("reported", "delay"):
            found = float(time + delays[i])
        made.append(
            Fault(
                time=float(time),
                kind=p.kind,
                target=p.target,
                unit=unit,
                place=float(places[i]),
                length=unit_bytes(unit, plan.device, faults),
                detect=p.detect,
                found=found,
                spill=int(p.spill),
                seed=int(seeds[i]),
                shift=int(shifts[i]),
            )
        )
    return made


def _arrivals(
    plan: Plan, p: FaultProcess, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return arrival times, byte shifts and parents.

    The parent of a fault is the index of the first fault in the same storm. A shift is the distance from the
    parent's place.
    """
    if p.arrival == "at":
        times = np.sort(np.array(p.times, dtype=float))
        return times, np.zeros(len(times), dtype=np.int64), np.arange(len(times))
    mean = mean_arrivals(plan, p)
    if p.pareto is not None:
        mean *= float(pareto_factors(rng, p.pareto, 1)[0])
    times = np.sort(rng.random(rng.poisson(mean)) * plan.seconds)
    if p.arrival == "poisson":
        return times, np.zeros(len(times), dtype=np.int64), np.arange(len(times))
    sizes = rng.geometric(1.0 / p.burst, len(times))
    parents = np.repeat(np.cumsum(sizes) - sizes, sizes)
    after = rng.random(int(sizes.sum())) * p.within
    shifts = rng.integers(0, p.spread, len(after)) - p.spread // 2
    first = np.arange(len(after)) == parents
    after[first], shifts[first] = 0.0, 0
    spread_times = np.repeat(times, sizes) + after
    inside = spread_times < plan.seconds
    # Faults after the end of the trial are dropped. The first fault of a storm is always before the end, so
    # each parent index stays valid.
    kept = np.flatnonzero(inside)
    renumbered = np.cumsum(inside) - 1
    return spread_times[kept], shifts[kept], renumbered[parents[kept]]


def span(fault: Fault, at: int, device: int) -> tuple[int, int]:
    """Return device bytes (offset, length) of a fault at device byte ``at``.

    The range has whole units, rounded out to ``spill``. The smallest unit of the media is a 512-byte sector:
    a 256-byte fault takes the whole sector.
    """
    grain = max(fault.length, SECTOR_SIZE)
    start = round_down(at, grain)
    end = start + grain
    if fault.spill:
        start = round_down(start, fault.spill)
        end = round_up(end, fault.spill)
    return start, min(end, device) - start


def scrubs(faults: FaultPlan, seconds: float) -> list[float]:
    """Return the times of a trial's scrubs, in seconds."""
    if faults.scrub_period is None:
        return []
    count = int(seconds / faults.scrub_period)
    return [faults.scrub_period * (i + 1) for i in range(count)]
