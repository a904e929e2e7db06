"""Faults drawn from a plan: when, where, how much, and how they come to light.

What is drawn depends on (plan seed, fault plan, repetition) alone, so that every strategy and every workload
meets the same. A fault in "files" has a place as a fraction of the workload's bytes, one in "metadata" of the
filesystem's own; trials look up which bytes of the device that is when it happens.
"""

from __future__ import annotations

import zlib
from typing import Literal

import msgspec
import numpy as np

from daxemu.evaluate.plan import FaultPlan, FaultProcess, Plan, mean_arrivals, unit_bytes
from daxemu.uapi import SECTOR_SIZE


class Fault(msgspec.Struct, frozen=True):
    """One event of a trial. Times are seconds from the start of its workload, sizes bytes.

    ``place`` is in [0, 1) of the target's bytes. ``found``: when the hardware reports it by itself; None if
    it does not.
    """

    time: float
    kind: Literal["poison", "silent", "removal"]
    target: Literal["files", "device", "metadata"]
    unit: str
    place: float
    length: int
    detect: Literal["reported", "access", "delay", "scrub"]
    found: float | None
    spill: int
    seed: int
    shift: int = 0
    """Bytes from ``place``: of a storm's later faults."""


def generator(*key: int | str) -> np.random.Generator:
    """A stream of random numbers of its own for each key."""
    words = [zlib.crc32(part.encode()) if isinstance(part, str) else part for part in key]
    return np.random.default_rng(np.random.SeedSequence(words))


def draw(plan: Plan, faults: FaultPlan, repetition: int) -> list[Fault]:
    """The faults of one trial, in the order of their time."""
    found: list[Fault] = []
    for index, process in enumerate(faults.process):
        rng = generator(plan.seed, faults.name, repetition, index)
        found += _draw_process(plan, faults, process, rng)
    return sorted(found, key=lambda fault: fault.time)


def pareto_factors(rng: np.random.Generator, shape: float, count: int) -> np.ndarray:
    """Factors of mean 1 on devices' rates, Pareto distributed."""
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
        if p.kind == "poison" and p.detect in ("reported", "delay"):
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
    """Times, distances in bytes from the place of the first of the same storm, and which one that is."""
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
    # Those after the end of the trial are dropped; a first one never is, so parents stay in place.
    kept = np.flatnonzero(inside)
    renumbered = np.cumsum(inside) - 1
    return spread_times[kept], shifts[kept], renumbered[parents[kept]]


def span(fault: Fault, at: int, device: int) -> tuple[int, int]:
    """Device bytes (offset, length) of a fault whose place is device byte ``at``: whole units, with its
    spill.

    The media's grain is a sector: 256 bytes take the 512 around them.
    """
    grain = max(fault.length, SECTOR_SIZE)
    start = at // grain * grain
    end = start + grain
    if fault.spill:
        start = start // fault.spill * fault.spill
        end = -(-end // fault.spill) * fault.spill
    return start, min(end, device) - start


def scrubs(faults: FaultPlan, seconds: float) -> list[float]:
    """When a trial scrubs."""
    if faults.scrub_period is None:
        return []
    count = int(seconds / faults.scrub_period)
    return [faults.scrub_period * (i + 1) for i in range(count)]
