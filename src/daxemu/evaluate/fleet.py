"""Fleet simulation: bytes lost and moved by each strategy, on many devices over years.

Monte Carlo, vectorised over all faults of many devices. The faults are the same for every strategy. A second
failure in a group counts if the first is not yet found and repaired. A third failure in the same window
counts as two pairs, a slight overestimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from daxemu.errors import InvalidArgument
from daxemu.evaluate.faults import generator, pareto_factors
from daxemu.evaluate.models import Costs, model_of
from daxemu.evaluate.plan import (
    YEAR,
    FaultPlan,
    FaultProcess,
    Plan,
    StrategyModel,
    mean_arrivals,
    parse,
    per_year,
    unit_bytes,
)
from daxemu.evaluate.statistics import Estimate
from daxemu.failure_kind import FailureKind
from daxemu.uapi import PAGE_SIZE

CHUNK = 500
"""Devices simulated at a time, also in one Dask task. Part of the seed: another value draws other faults."""

KINDS = tuple(FailureKind)
"""A kind's index is its number in arrays."""
IS_POISON = np.array([kind.traits.is_poison for kind in KINDS])
WHOLE_DEVICE = np.array([kind.traits.whole_device for kind in KINDS])


class World(NamedTuple):
    """Duration in seconds, device size in bytes, share of used bytes.

    ``field``: rates per year and times of the fleet; otherwise rates and times of a trial.
    """

    seconds: float
    size: int
    used: float
    field: bool


class Faults(NamedTuple):
    """All faults of a chunk, sorted by device and time: arrays of equal length; seconds and device bytes."""

    device: np.ndarray
    time: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    kind: np.ndarray
    latency: np.ndarray
    """Seconds until the fault is found."""
    lucky: np.ndarray
    """Uniform in [0, 1): compared with ``exposed`` to decide if the fault falls on unprotected data."""
    data: np.ndarray
    """Share of the fault's bytes holding data."""


class Totals(msgspec.Struct):
    """Totals of one strategy over some devices. Totals of different devices can be added."""

    devices: int = 0
    lost: float = 0.0
    lost_squared: float = 0.0
    damaged: int = 0
    """Number of devices with any loss."""
    silent: float = 0.0
    traffic: float = 0.0

    def add(self, other: Totals) -> None:
        """Add the totals of other devices."""
        for field in self.__struct_fields__:
            setattr(self, field, getattr(self, field) + getattr(other, field))

    def mean_lost(self, per: float = 1.0) -> Estimate:
        """Return mean bytes lost in a device, divided by ``per``, with a normal 95 % interval."""
        value = self.lost / self.devices
        spread = max(self.lost_squared / self.devices - value**2, 0.0)
        half = 1.96 * math.sqrt(spread / self.devices)
        return Estimate(value / per, max(value - half, 0.0) / per, (value + half) / per, self.devices)


class Chunk(msgspec.Struct):
    """Devices to simulate, with everything a remote worker needs."""

    plan: str
    faults: str
    strategies: list[str]
    costs: dict[str, Costs]
    number: int
    devices: int
    world: World


def field_world(plan: Plan) -> World:
    """Return the world of the plan's fleet."""
    return World(plan.fleet.years * YEAR, int(plan.fleet.size), plan.fleet.used, True)


def chunks(
    plan: Plan,
    text: str,
    faults: str,
    costs: dict[str, Costs],
    world: World,
    devices: int,
    strategies: Sequence[str] | None = None,
) -> Iterator[Chunk]:
    """Split the devices into chunks, for the given strategies (default: all of the plan).

    Raises InvalidArgument if the fault plan gives no field rate, or for an unknown strategy.
    """
    chosen = list(plan.strategies if strategies is None else strategies)
    for process in plan.faults_called(faults).process:
        if world.field and per_year(process, world.size) is None:
            raise InvalidArgument(
                f"fault plan {faults!r} has no rate or fit_per_mbit: a fleet needs a rate per year"
            )
    for strategy in chosen:
        model_of(plan, strategy, costs.get(strategy, Costs()))
    for number, first in enumerate(range(0, devices, CHUNK)):
        count = min(CHUNK, devices - first)
        yield Chunk(text, faults, chosen, costs, number, count, world)


def simulate(chunk: Chunk) -> dict[str, Totals]:
    """Simulate one chunk for all its strategies."""
    plan = parse(chunk.plan)
    drawn = draw_chunk(plan, plan.faults_called(chunk.faults), chunk)
    return {
        strategy: play(plan, drawn, chunk, strategy, chunk.costs.get(strategy, Costs()))
        for strategy in chunk.strategies
    }


def run(
    work: Iterable[Chunk], compute: Callable[[Sequence[Chunk]], Iterable[dict[str, Totals]]] | None = None
) -> dict[str, Totals]:
    """Simulate all chunks and add up the totals.

    ``compute`` runs the chunks elsewhere, for example on a cluster.
    """
    todo = list(work)
    totals: dict[str, Totals] = {}
    for part in compute(todo) if compute is not None else map(simulate, todo):
        for strategy, found in part.items():
            totals.setdefault(strategy, Totals()).add(found)
    return totals


def draw_chunk(plan: Plan, faults: FaultPlan, chunk: Chunk) -> Faults:
    """Draw the faults of all devices of a chunk."""
    parts = []
    for index, process in enumerate(faults.process):
        rng = generator(plan.seed, "fleet", faults.name, index, chunk.number)
        parts.append(_draw_process(plan, faults, process, rng, chunk))
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)] if parts else [np.zeros(0)] * 8
    order = np.lexsort((columns[1], columns[0]))
    return Faults(*(column[order] for column in columns))


def _draw_process(
    plan: Plan, faults: FaultPlan, p: FaultProcess, rng: np.random.Generator, chunk: Chunk
) -> Faults:
    world = chunk.world
    if world.field:
        yearly = per_year(p, world.size)
        assert yearly is not None
        mean = yearly * world.seconds / YEAR
    else:
        mean = mean_arrivals(plan, p)
    means = np.full(chunk.devices, mean)
    if p.pareto is not None:
        means *= pareto_factors(rng, p.pareto, chunk.devices)
    fixed = np.full(chunk.devices, len(p.times))
    counts = fixed if p.arrival == "at" else rng.poisson(means)
    device = np.repeat(np.arange(chunk.devices), counts)
    time = rng.random(len(device)) * world.seconds
    if p.arrival == "at":
        time = np.tile(np.asarray(p.times, dtype=float), chunk.devices)
    place = rng.random(len(device)) * world.size
    if p.arrival == "storm":
        sizes = rng.geometric(1.0 / p.burst, len(device))
        device, time, place = np.repeat(device, sizes), np.repeat(time, sizes), np.repeat(place, sizes)
        time = time + rng.random(len(device)) * p.within
        place = np.clip(place + (rng.random(len(device)) - 0.5) * p.spread, 0, world.size - 1)
    names = [unit for unit, weight in p.unit.items() if weight > 0]
    weights = np.array([p.unit[name] for name in names])
    lengths = np.array([max(unit_bytes(name, world.size, faults), 512) for name in names], dtype=np.int64)
    length = lengths[rng.choice(len(names), len(device), p=weights / weights.sum())]
    offset = place.astype(np.int64) // length * length
    if p.spill:
        end = -(-(offset + length) // int(p.spill)) * int(p.spill)
        offset = offset // int(p.spill) * int(p.spill)
        length = end - offset
    length = np.minimum(length, world.size - offset)
    used = 1.0 if p.target == "files" and not world.field else world.used
    if p.target == "metadata":
        used = 0.0  # metadata has two replicas: no file loses data
    return Faults(
        device,
        time,
        offset,
        length,
        np.full(len(device), KINDS.index(p.kind)),
        _latencies(plan, faults, p, rng, len(device), world),
        rng.random(len(device)),
        np.full(len(device), used),
    )


def _latencies(
    plan: Plan, faults: FaultPlan, p: FaultProcess, rng: np.random.Generator, count: int, world: World
) -> np.ndarray:
    """Return seconds until each fault is found."""
    scrub = plan.fleet.scrub_period if world.field else (faults.scrub_period or world.seconds)
    if not (p.kind.traits.is_poison or p.kind.traits.whole_device) or p.detect == "scrub":
        return rng.random(count) * scrub
    if p.detect == "delay":
        assert p.delay is not None
        return rng.exponential(plan.fleet.delay if world.field else p.delay, count)
    if p.detect == "access":
        return rng.exponential(plan.fleet.access_period if world.field else world.seconds, count)
    return np.zeros(count)


def play(plan: Plan, faults: Faults, chunk: Chunk, strategy: str, costs: Costs) -> Totals:
    """Compute the totals of one strategy under the given faults."""
    model = model_of(plan, strategy, costs)
    world = chunk.world
    repair = costs.repair_seconds if costs.repair_seconds is not None else plan.fleet.repair_seconds
    grain = int(model.grain)
    start = faults.offset // grain * grain
    length = np.minimum(-(-(faults.offset + faults.length) // grain) * grain, world.size) - start
    data = _data_bytes(faults, length, generator(plan.seed, "data", chunk.number))
    gone = WHOLE_DEVICE[faults.kind]
    silent = ~IS_POISON[faults.kind] & ~gone
    unseen = silent & (not model.checksums)
    seen = ~unseen & ~gone
    everything = world.size * world.used
    lost = np.zeros(len(data))
    if model.fences:
        lost[seen] = everything
    elif not model.tolerates:
        lost[seen] = data[seen]
    else:
        lost = np.where(seen, _lost_in_groups(model, world, faults, start, length, data, seen, repair), 0.0)
    if not model.outside:
        lost[gone] = everything
    per_device = np.bincount(faults.device.astype(np.int64), weights=lost, minlength=chunk.devices)
    per_device = np.minimum(per_device, everything)
    repaired = data * seen * (lost < data)
    return Totals(
        devices=chunk.devices,
        lost=float(per_device.sum()),
        lost_squared=float((per_device**2).sum()),
        damaged=int((per_device > 0).sum()),
        # A silent corruption is wrong in its own bytes only: not rounded out.
        silent=float((data * faults.length / np.maximum(length, 1))[unseen].sum()),
        # A rebuild reads all other units of the group and writes one unit.
        traffic=float(repaired.sum() * model.group) if model.tolerates else 0.0,
    )


def _data_bytes(faults: Faults, length: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return the number of data bytes in each fault. A page is used or free as a whole."""
    pages = np.maximum(length // PAGE_SIZE, 1)
    found: np.ndarray = rng.binomial(pages, faults.data) * (length / pages)
    return found


def _lost_in_groups(
    model: StrategyModel,
    world: World,
    faults: Faults,
    start: np.ndarray,
    length: np.ndarray,
    data: np.ndarray,
    seen: np.ndarray,
    repair: float,
) -> np.ndarray:
    """Return bytes lost by each fault, where one failed unit of a group can be rebuilt."""
    lost = np.where(faults.lucky < model.exposed, data, 0.0)
    if model.outside:
        return lost
    spacing = int(model.spacing) if model.spacing is not None else world.size // model.group
    # A fault larger than the distance between units of a group takes both units.
    lost = np.where(length > spacing, data, lost)
    end = faults.time + faults.latency + repair
    stripe, inside = start // (spacing * model.group), start % spacing
    unit = start // spacing
    # A mirrored pair loses one block of data; a stripe loses two, or fewer if one of them is parity.
    weight = 1.0 if model.group == 2 else 2.0 * (model.group - 1) / model.group
    for lag in range(1, len(lost)):
        first, second = slice(None, -lag), slice(lag, None)
        # Faults of a device are sorted by time: no overlapping pair at this lag, none at longer lags.
        together = (faults.device[first] == faults.device[second]) & (faults.time[second] < end[first])
        if not together.any():
            break
        both = together & (stripe[first] == stripe[second]) & (unit[first] != unit[second])
        both &= seen[first] & seen[second]
        low = np.maximum(inside[first], inside[second])
        high = np.minimum(inside[first] + length[first], inside[second] + length[second])
        shared = np.where(both, np.maximum(high - low, 0), 0) * weight * faults.data[second]
        lost[second] = np.maximum(lost[second], shared)
    return lost


def over_dask(client: Any) -> Callable[[Sequence[Chunk]], Iterator[dict[str, Totals]]]:
    """Return a ``compute`` function for run(), running chunks on a Dask cluster."""

    def compute(todo: Sequence[Chunk]) -> Iterator[dict[str, Totals]]:
        for text in client.gather(
            client.map(simulate_json, [msgspec.json.encode(c) for c in todo], pure=False)
        ):
            yield msgspec.json.decode(text, type=dict[str, Totals])

    return compute


def simulate_json(chunk: bytes) -> bytes:
    """Simulate a chunk on a Dask worker. Argument and result are JSON."""
    return msgspec.json.encode(simulate(msgspec.json.decode(chunk, type=Chunk)))
