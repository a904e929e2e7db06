"""Plan of an evaluation, in TOML, strictly parsed.

Unknown keys, contradictions and impossible rates are refused with the line number. docs/evaluate.md lists the
keys; the types below define them.
"""

from __future__ import annotations

import hashlib
import tomllib
from pathlib import Path
from typing import Any, Literal

import msgspec

from daxemu.errors import InvalidArgument
from daxemu.evaluate.plan_lines import line_of
from daxemu.evaluate.workloads.specs import AnyWorkload
from daxemu.events.mounts import Mode
from daxemu.failure_kind import FailureKind
from daxemu.malformed import NOT_TOML, explain, toml_line
from daxemu.sizes import human, parse_size
from daxemu.uapi import PAGE_SIZE, page_align_down

YEAR = 365.25 * 86400.0
"""Seconds in a year."""
MAX_FAULTS_PER_SECOND = 200.0
"""Maximum rate of injections on one machine. A failure with its signals takes milliseconds."""
MIN_DEVICE = 16 << 20
Target = Literal["files", "device", "metadata"]
"""What a fault hits."""
Detect = Literal["reported", "access", "delay", "scrub"]
"""How poison is found. Poison that is not reported at once is latent until then."""


class Bytes(int):
    """Size in bytes: a TOML integer, or a string such as "4K"."""


class FaultProcess(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Source of faults.

    Exactly one of ``rate``, ``fit_per_mbit``, ``expected`` and ``times`` gives the number.
    """

    kind: FailureKind = FailureKind.POISON
    arrival: Literal["poisson", "storm", "at"] = "poisson"
    rate: float | None = None
    """Faults (storms) per device and year."""
    fit_per_mbit: float | None = None
    """Faults (storms) per 10^9 hours and 2^20 bits."""
    expected: float | None = None
    """Mean number of faults (storms) in one trial, independent of field time."""
    acceleration: float = 1.0
    """Ratio of the fault rate in a trial to the rate in the field."""
    pareto: float | None = None
    """Shape (> 1) of a Pareto distributed factor, of mean 1, on a device's rate: few devices have most
    faults.
    """
    times: tuple[float, ...] = ()
    """Seconds of each fault, for arrival = "at"."""
    burst: float = 8.0
    """Mean number of faults in a storm."""
    within: float = 0.1
    """Duration of a storm in seconds."""
    spread: Bytes = Bytes(1 << 20)
    """Range in bytes around the first fault of a storm; all other faults of the storm lie inside."""
    unit: dict[str, float] = msgspec.field(default_factory=lambda: {"page": 1.0})
    """Weights of 256, 512, page, row, bank, device."""
    target: Target = "files"
    detect: Detect = "reported"
    delay: float | None = None
    """Mean seconds (exponential) until the hardware reports the poison, for detect = "delay"."""
    spill: Bytes = Bytes(0)
    """Unit in bytes for rounding out a reported range: healthy bytes beside the poison are given up, too."""


class FaultPlan(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Named set of fault sources. Rows and banks are runs of consecutive device bytes of the given sizes."""

    name: str
    process: tuple[FaultProcess, ...] = ()
    scrub_period: float | None = None
    """Seconds between address range scrubs; None: no scrub."""
    row: Bytes = Bytes(8 << 10)
    bank: Bytes | None = None
    """Bytes of a bank; None: a sixteenth of the device."""


class StrategyModel(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Model of a strategy in ``daxemu fleet``. evaluate/models.py has the models of known strategies."""

    group: int = 1
    """Number of units protecting each other; 1: no redundancy."""
    tolerates: int = 0
    """Number of units in a group that may fail at the same time: 0 or 1."""
    spacing: Bytes | None = None
    """Device bytes between neighbouring units of a group; None: device / group."""
    outside: bool = False
    """True if the other units are off this device: no fault of the device affects them."""
    grain: Bytes = Bytes(PAGE_SIZE)
    """Unit in bytes for rounding out losses."""
    exposed: float = 0.0
    """Share of the data without protection at any time, 0 to 1."""
    checksums: bool = False
    """True if the next scrub finds silent corruption."""
    fences: bool = False
    """True if the strategy gives up the whole device after a failure."""


class FleetPlan(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Fleet simulated by ``daxemu fleet``."""

    devices: int = 1000
    years: float = 5.0
    size: Bytes = Bytes(128 << 30)
    used: float = 0.5
    """Share of each device holding data."""
    repair_seconds: float = 60.0
    """Seconds from detection of a fault to the end of the repair, unless measured."""
    scrub_period: float = 86400.0
    """Seconds between scrubs in the field, in place of a trial's scrub period."""
    delay: float = 3600.0
    """Mean seconds until the hardware reports poison in the field, in place of a trial's delay."""
    access_period: float = 86400.0
    """Mean seconds until a program accesses latent poison."""
    model: dict[str, StrategyModel] = {}


class Plan(msgspec.Struct, forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Plan: strategies x workloads x faults x repetitions."""

    name: str
    strategies: tuple[str, ...]
    workload: tuple[AnyWorkload, ...]
    faults: tuple[FaultPlan, ...]
    seed: int = 1
    repetitions: int = 3
    seconds: float = 3.0
    """Seconds a trial's workload runs."""
    device: Bytes = Bytes(64 << 20)
    baseline: str = "none"
    early_kill: bool = False
    mode: Mode = "page cache"
    """Mode of every mount. On a direct mount all processes of the workload are under ``daxemu run``."""
    fleet: FleetPlan = FleetPlan()

    def fingerprint(self, workload: str, faults: str) -> str:
        """Return a hash of all options with an influence on a trial of this workload and these faults.

        More repetitions, strategies or workloads in a plan keep the fingerprints of earlier trials.
        """
        meaning: tuple[Any, ...] = (
            self.seed,
            self.seconds,
            int(self.device),
            self.early_kill,
            self.workload_called(workload),
            self.faults_called(faults),
        )
        if self.mode != "page cache":  # trials from before there were modes keep their fingerprints
            meaning += (self.mode,)
        text = msgspec.json.encode(msgspec.to_builtins(meaning, enc_hook=int), order="sorted")
        return hashlib.blake2b(text, digest_size=8).hexdigest()

    def workload_called(self, label: str) -> AnyWorkload:
        """Return the workload named ``label``."""
        return next(w for w in self.workload if w.label == label)

    def faults_called(self, name: str) -> FaultPlan:
        """Return the fault plan named ``name``."""
        return next(f for f in self.faults if f.name == name)


UNITS = ("256", "512", "page", "row", "bank", "device")


class _Refused(Exception):
    """A plan value is invalid. ``path``: keys and indices from the root of the plan to the value."""

    def __init__(self, path: list[str | int], text: str) -> None:
        super().__init__(text)
        self.path = path


def load(path: Path) -> Plan:
    """Read a plan from a file. Raises InvalidArgument with text ``FILE:LINE: reason``."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "is not UTF-8 text"
        raise InvalidArgument(f"{path}: {reason}") from error
    return parse(text, str(path))


def parse(text: str, name: str = "plan") -> Plan:
    """Parse a plan from TOML text; ``name`` stands for the file name.

    Raises InvalidArgument as :func:`load` does.
    """
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InvalidArgument(f"{name}:{toml_line(error, text)}: {NOT_TOML}") from error
    except RecursionError as error:
        raise InvalidArgument(f"{name}: nested too deeply: write it as docs/evaluate.md shows") from error
    try:
        plan = msgspec.convert(raw, Plan, dec_hook=_decode)
        _check(plan)
    except msgspec.ValidationError as error:
        where, what = explain(error)
        raise InvalidArgument(f"{name}:{line_of(text, where)}: {what}") from error
    except _Refused as error:
        raise InvalidArgument(f"{name}:{line_of(text, error.path)}: {error}") from error
    return plan


def _decode(kind: type, value: Any) -> Any:
    if kind is not Bytes:
        raise NotImplementedError
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise ValueError('a size is an integer, or text such as "4K"')
    try:
        return Bytes(parse_size(value) if isinstance(value, str) else value)
    except InvalidArgument as error:
        raise ValueError(str(error)) from error


def _check(plan: Plan) -> None:
    if plan.device < MIN_DEVICE or plan.device % PAGE_SIZE:
        raise _Refused(["device"], f"a device has at least {human(MIN_DEVICE)}, in whole pages")
    if not 0 < plan.seconds <= 86400:
        raise _Refused(["seconds"], "a trial lasts more than 0 and at most 86400 seconds")
    if plan.repetitions < 1:
        raise _Refused(["repetitions"], "at least one repetition")
    if plan.baseline not in plan.strategies:
        raise _Refused(
            ["baseline" if plan.baseline != "none" else "strategies"],
            f"the baseline {plan.baseline!r} is not among the strategies",
        )
    _distinct([*plan.strategies], ["strategies"], "strategy")
    for key, names in (
        ("workload", [w.name or w.kind for w in plan.workload]),
        ("faults", [f.name for f in plan.faults]),
    ):
        if not names:
            raise _Refused([key], f"no {key}")
        for index, name in enumerate(names):
            if name in names[:index]:
                raise _Refused([key, index], f"two of {key} are called {name!r}: give each a name")
    for index, workload in enumerate(plan.workload):
        if (why := workload.wrong(plan.device)) is not None:
            raise _Refused(["workload", index, why[0]], why[1])
    for index, faults in enumerate(plan.faults):
        _check_faults(plan, faults, ["faults", index])
    fleet = plan.fleet
    if fleet.devices < 1 or fleet.years <= 0 or not 0 < fleet.used <= 1 or fleet.size < MIN_DEVICE:
        raise _Refused(["fleet"], "a fleet has devices of some size, years, and 0 < used <= 1")
    if min(fleet.repair_seconds, fleet.scrub_period, fleet.delay, fleet.access_period) < 0:
        raise _Refused(["fleet"], "a time below 0")
    for name, model in fleet.model.items():
        if model.group < 1 or model.tolerates not in (0, 1) or model.tolerates >= model.group:
            raise _Refused(["fleet", "model", name], "tolerates is 0 or 1, and less than group")
        if not 0 <= model.exposed <= 1 or model.grain < 512:
            raise _Refused(["fleet", "model", name], "0 <= exposed <= 1, and a grain of 512 bytes or more")


def _distinct(names: list[str], path: list[str | int], what: str) -> None:
    if not names:
        raise _Refused(path, f"no {what}")
    for index, name in enumerate(names):
        if not name or name in names[:index]:
            raise _Refused(path, f"{what} {name!r} twice" if name else f"a {what} without a name")


def _check_faults(plan: Plan, faults: FaultPlan, path: list[str | int]) -> None:
    if not faults.name:
        raise _Refused([*path, "name"], "a fault plan needs a name")
    if faults.scrub_period is not None and not faults.scrub_period >= 0.05:
        raise _Refused([*path, "scrub_period"], "at least 0.05 seconds between scrubs: a scrub takes time")
    for index, process in enumerate(faults.process):
        _check_process(plan, faults, process, [*path, "process", index])


def _check_process(plan: Plan, faults: FaultPlan, p: FaultProcess, path: list[str | int]) -> None:
    def refuse(key: str, text: str) -> None:
        raise _Refused([*path, key], text)

    given = [key for key in ("rate", "fit_per_mbit", "expected") if getattr(p, key) is not None]
    if p.arrival == "at":
        if given:
            refuse(given[0], f'{given[0]} contradicts arrival = "at": times gives the number')
        if not p.times:
            refuse("arrival", 'arrival = "at" needs times')
        if any(not 0 <= t < plan.seconds for t in p.times):
            refuse("times", f"a time outside the trial: 0 to {plan.seconds:g} seconds")
    elif p.times:
        refuse("times", 'times needs arrival = "at"')
    elif len(given) != 1:
        refuse(given[1] if given else "arrival", "give exactly one of rate, fit_per_mbit, expected")
    for key in (*given, "acceleration"):
        if not 0 < getattr(p, key) < float("inf"):
            refuse(key, f"{key} must be above 0")
    if p.acceleration != 1.0 and (p.expected is not None or p.arrival == "at"):
        refuse("acceleration", "acceleration scales rate or fit_per_mbit: this process has neither")
    if p.pareto is not None and (p.pareto <= 1 or p.arrival == "at"):
        refuse("pareto", "a Pareto shape is above 1 (no mean otherwise), and scales a rate")
    if p.detect == "scrub" and faults.scrub_period is None:
        refuse("detect", 'detect = "scrub" needs the fault plan\'s scrub_period')
    if (p.detect == "delay") != (p.delay is not None):
        refuse("delay" if p.delay is not None else "detect", 'detect = "delay" and delay go together')
    if p.delay is not None and p.delay <= 0:
        refuse("delay", "delay is above 0 seconds")
    if p.kind.traits.instead:
        refuse("kind", f"{p.kind} is {p.kind.traits.instead}")
    if not p.kind.traits.is_poison and (p.detect != "reported" or p.spill):
        refuse(
            "detect" if p.detect != "reported" else "spill",
            f"{p.kind} is not poison: no range is reported",
        )
    if p.kind.traits.whole_device and p.target != "files":
        refuse("target", f"{p.kind} takes the whole device")
    if p.arrival == "storm" and (p.burst < 1 or p.within <= 0 or p.spread < PAGE_SIZE):
        refuse("burst", "a storm: burst >= 1, within > 0, spread of a page or more")
    _check_units(plan, faults, p, path)
    mean = mean_faults(plan, p)
    if mean > MAX_FAULTS_PER_SECOND * plan.seconds:
        refuse(
            given[0] if given else "times",
            f"{mean:.3g} faults in {plan.seconds:g} s do not fit: {MAX_FAULTS_PER_SECOND:g} a second at most",
        )


def _check_units(plan: Plan, faults: FaultPlan, p: FaultProcess, path: list[str | int]) -> None:
    for unit, weight in p.unit.items():
        if unit not in UNITS:
            raise _Refused([*path, "unit"], f"no unit {unit!r}: known units are {', '.join(UNITS)}")
        if not weight >= 0:
            raise _Refused([*path, "unit"], f"the weight of {unit} is negative")
        if p.target == "metadata" and unit in ("row", "bank", "device") and weight:
            raise _Refused([*path, "unit"], f"a {unit} is larger than the metadata")
        size = unit_bytes(unit, plan.device, faults)
        if size > plan.device or size % 256 or (size > PAGE_SIZE and size % PAGE_SIZE):
            key = unit if unit in ("row", "bank") else "process"
            raise _Refused([*path[:2], key], f"a {unit} of {human(size)} must fit the device, in whole pages")
    if not sum(p.unit.values()) > 0:
        raise _Refused([*path, "unit"], "the weights of the units add up to 0")
    if not 0 <= p.spill <= plan.device or p.spill % PAGE_SIZE:
        raise _Refused([*path, "spill"], "spill is a number of whole pages, at most the device")


def unit_bytes(unit: str, device: int, faults: FaultPlan) -> int:
    """Return the size of a unit in bytes, on a device of ``device`` bytes."""
    sizes = {
        "256": 256,
        "512": 512,
        "page": PAGE_SIZE,
        "row": faults.row,
        "bank": faults.bank if faults.bank is not None else page_align_down(device // 16),
        "device": device,
    }
    return int(sizes[unit])


def per_year(p: FaultProcess, device: int) -> float | None:
    """Return arrivals (faults, or storms) per device and year in the field.

    None if the plan gives no field rate.
    """
    if p.rate is not None:
        return p.rate
    if p.fit_per_mbit is not None:
        return p.fit_per_mbit * 1e-9 * (YEAR / 3600.0) * (device * 8 / (1 << 20))
    return None


def mean_arrivals(plan: Plan, p: FaultProcess) -> float:
    """Return the mean number of arrivals (faults, or storms) in one trial."""
    if p.arrival == "at":
        return float(len(p.times))
    if p.expected is not None:
        return p.expected
    yearly = per_year(p, plan.device)
    assert yearly is not None
    return yearly * p.acceleration * plan.seconds / YEAR


def mean_faults(plan: Plan, p: FaultProcess) -> float:
    """Return the mean number of faults in one trial."""
    return mean_arrivals(plan, p) * (p.burst if p.arrival == "storm" else 1.0)
