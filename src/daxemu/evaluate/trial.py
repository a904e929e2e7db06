"""Trial: a fresh machine, a workload, the faults of the plan, and a check of the data afterwards.

    python -m daxemu.evaluate.trial     TrialRequest as JSON on stdin, Result as JSON on stdout

A separate process: trials run in parallel, here or on other machines, and a killed trial affects no other.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

import daxemu
from daxemu.errors import DaxemuError
from daxemu.evaluate.faults import draw, scrubs
from daxemu.evaluate.injector import FaultRecord, Injector, files_of
from daxemu.evaluate.machine import TrialMachine, directories, ending
from daxemu.evaluate.plan import FaultPlan, Plan, parse
from daxemu.evaluate.tender import Tender, WorkloadLife, ask_worker
from daxemu.evaluate.worker import Job
from daxemu.evaluate.workloads.base import Mismatch
from daxemu.events.mounts import Mode
from daxemu.uapi import PAGE_SIZE

MAX_EVENTS = 20_000
MAX_MISMATCHES = 20_000


class Key(msgspec.Struct, frozen=True, order=True):
    """Key of a trial in a plan. ``workload`` and ``faults`` are names."""

    strategy: str
    workload: str
    faults: str
    repetition: int

    def __str__(self) -> str:
        return f"{self.strategy} / {self.workload} / {self.faults} / {self.repetition}"


class TrialRequest(msgspec.Struct):
    """Request for a trial.

    ``plan``: TOML text. ``directory``, ``device``: paths for the trial; must not exist yet.
    """

    plan: str
    key: Key
    directory: str = ""
    device: str = ""


class Result(msgspec.Struct, kw_only=True):
    """Result of a trial, one line of the raw results. Times: seconds from the workload's first operation."""

    key: Key
    fingerprint: str
    version: str = daxemu.__version__
    mode: Mode = "page cache"
    """Mode of the mount, as ``daxemu status`` said."""
    failed: str | None = None
    """Reason for a missing result: the machine could not be made, or the trial broke off."""
    wall: float = 0.0
    """Duration of the whole trial in seconds."""
    seconds: float = 0.0
    samples: list[tuple[float, int, int, int]] = []
    lives: list[WorkloadLife] = []
    down: float = 0.0
    last_error: str | None = None
    faults: list[FaultRecord] = []
    scrubs: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    events_left_off: int = 0
    size: int = 0
    """Bytes of expected data."""
    used: int = 0
    """Bytes of the device in use at the end, metadata included."""
    device: int = 0
    base_pfn: int = 0
    bad: list[Mismatch] = []
    bad_left_off: int = 0
    unmountable: str | None = None
    repair: dict[str, Any] = {}
    """``repair`` of ``daxemu status``, read when the workload had ended."""
    state: str = ""


def make_trial(request: TrialRequest) -> Result:
    """Run a trial. A failure of the trial itself is returned in ``failed``, not raised."""
    plan = parse(request.plan)
    result = Result(key=request.key, fingerprint=plan.fingerprint(request.key.workload, request.key.faults))
    began = time.time()
    try:
        with directories(Path(request.directory), Path(request.device)):
            _Trial(plan, request, result).run()
    except (DaxemuError, OSError) as error:
        result.failed = f"{type(error).__name__}: {error}"
    result.wall = time.time() - began
    return result


class _Trial:
    def __init__(self, plan: Plan, request: TrialRequest, result: Result) -> None:
        self.plan = plan
        self.result = result
        key = request.key
        self.faults: FaultPlan = plan.faults_called(key.faults)
        directory = Path(request.directory)
        self.machine = TrialMachine(directory, Path(request.device), key.strategy, plan.mode)
        self.root = self.machine.mountpoint / "work"
        state = directory / "state"
        state.mkdir()
        self.job = Job(
            spec=plan.workload_called(key.workload),
            root=str(self.root),
            state=str(state),
            # The workload's seed is the same for every strategy, too.
            seed=(plan.seed * 1_000_003 + key.repetition) & 0xFFFF_FFFF,
            seconds=plan.seconds,
        )

    def run(self) -> None:
        result, plan = self.result, self.plan
        self.machine.make(plan.device, early_kill=plan.early_kill)
        result.mode = self.machine.status().get("mode", "page cache")
        self.root.mkdir()
        result.size = ask_worker("prepare", self.job, self.machine.wrapper)[-1]["size"]
        tender = Tender(self.job, self.machine.wrapper)
        with self.machine.client() as client:
            injector = Injector(client, self.root, files_of(self.root), int(plan.device))
            try:
                tender.start()
                tender.running.wait()
                if not tender.began:
                    raise DaxemuError(f"the workload ended at once: {tender.lives[-1].said or 'no error'}")
                faults = draw(plan, self.faults, result.key.repetition)
                injector.run(faults, scrubs(self.faults, plan.seconds), tender.began, tender.until)
                tender.join()
            finally:
                tender.stop()
                tender.join()
        result.faults, result.scrubs = injector.injected, injector.scrubbed
        result.seconds, result.down = plan.seconds, tender.down()
        result.lives, result.last_error = tender.lives, tender.last_error
        result.samples = [(t - tender.began, *rest) for t, *rest in tender.samples]  # type: ignore[misc]
        for life in result.lives:
            life.start -= tender.began
            life.end -= tender.began
            if life.first is not None:
                life.first -= tender.began
        if any(life.hung for life in result.lives):
            raise DaxemuError("the workload hung")
        self._verify()
        self._keep_events(tender.began)

    def _verify(self) -> None:
        """Read all data back with an empty page cache. A removed device is not checked."""
        result = self.result
        status = self.machine.status()
        result.state = status["state"]
        result.used = (status["blocks"] - status["free_blocks"]) * PAGE_SIZE
        result.device = status["size"]
        result.base_pfn = status["base_pfn"]
        result.repair = status.get("repair") or {}
        if result.state == "removed":
            return
        try:
            self.machine.again()
        except DaxemuError as error:
            result.unmountable = str(error)
            return
        *mismatches, end = ask_worker("check", self.job, self.machine.wrapper)
        result.size = end["size"]
        result.bad = [Mismatch(**found) for found in mismatches[:MAX_MISMATCHES]]
        result.bad_left_off = len(mismatches) - len(result.bad)

    def _keep_events(self, began: float) -> None:
        events = self.machine.events()
        for event in events:
            event["time"] -= began
        self.result.events = events[:MAX_EVENTS]
        self.result.events_left_off = len(events) - len(self.result.events)


def main() -> int:
    """Run one trial from stdin to stdout."""
    # SIGTERM and SIGINT: the trial removes its machine before the process ends.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ending)
    request = msgspec.json.decode(sys.stdin.buffer.read(), type=TrialRequest)
    sys.stdout.buffer.write(msgspec.json.encode(make_trial(request)) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
