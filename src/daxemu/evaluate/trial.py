"""One trial: a fresh machine, a workload on it, the faults of its plan, and what was left of the data.

    python -m daxemu.evaluate.trial     reads a Task as JSON from stdin, writes a Result as JSON to stdout

A process of its own, so that trials run beside each other, here or on another machine, and one that is killed
takes nothing with it.
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
from daxemu.evaluate.injector import Injected, Injector, files_of
from daxemu.evaluate.machine import TrialMachine, directories, ending
from daxemu.evaluate.plan import FaultPlan, Plan, parse
from daxemu.evaluate.tender import Life, Tender, ask_worker
from daxemu.evaluate.worker import Job
from daxemu.evaluate.workloads.base import Bad
from daxemu.uapi import PAGE_SIZE

MAX_EVENTS = 20_000
MAX_BAD = 20_000


class Key(msgspec.Struct, frozen=True, order=True):
    """Which trial of a plan. ``workload`` and ``faults`` by name."""

    strategy: str
    workload: str
    faults: str
    repetition: int

    def __str__(self) -> str:
        return f"{self.strategy} / {self.workload} / {self.faults} / {self.repetition}"


class Task(msgspec.Struct):
    """A trial to be made. ``plan``: the TOML text; ``directory`` and ``device``: where, and nothing is there
    yet.
    """

    plan: str
    key: Key
    directory: str = ""
    device: str = ""


class Result(msgspec.Struct, kw_only=True):
    """One line of the raw results. Times are seconds from the first operation of the workload."""

    key: Key
    fingerprint: str
    version: str = daxemu.__version__
    failed: str | None = None
    """Why there is no result: the machine could not be made, or the trial broke off."""
    wall: float = 0.0
    """Seconds that the trial took, all told."""
    seconds: float = 0.0
    samples: list[tuple[float, int, int, int]] = []
    lives: list[Life] = []
    down: float = 0.0
    last_error: str | None = None
    faults: list[Injected] = []
    scrubs: list[dict[str, Any]] = []
    events: list[dict[str, Any]] = []
    events_left_off: int = 0
    size: int = 0
    """Bytes of data there should be."""
    used: int = 0
    """Bytes of the device in use at the end, metadata included."""
    device: int = 0
    base_pfn: int = 0
    bad: list[Bad] = []
    bad_left_off: int = 0
    unmountable: str | None = None
    repair: dict[str, Any] = {}
    """``repair`` of ``daxemu status`` when the workload had ended."""
    state: str = ""


def make_trial(task: Task) -> Result:
    """Make a trial; what went wrong with the trial itself is in ``failed``. Raises nothing that a trial can
    meet.
    """
    plan = parse(task.plan)
    result = Result(key=task.key, fingerprint=plan.fingerprint(task.key.workload, task.key.faults))
    began = time.time()
    try:
        with directories(Path(task.directory), Path(task.device)):
            _Trial(plan, task, result).run()
    except (DaxemuError, OSError) as error:
        result.failed = f"{type(error).__name__}: {error}"
    result.wall = time.time() - began
    return result


class _Trial:
    def __init__(self, plan: Plan, task: Task, result: Result) -> None:
        self.plan = plan
        self.result = result
        key = task.key
        self.faults: FaultPlan = plan.faults_called(key.faults)
        directory = Path(task.directory)
        self.machine = TrialMachine(directory, Path(task.device), key.strategy)
        self.root = self.machine.mountpoint / "work"
        state = directory / "state"
        state.mkdir()
        self.job = Job(
            spec=plan.workload_called(key.workload),
            root=str(self.root),
            state=str(state),
            # The workload's, too, is the same on every strategy.
            seed=(plan.seed * 1_000_003 + key.repetition) & 0xFFFF_FFFF,
            seconds=plan.seconds,
        )

    def run(self) -> None:
        result, plan = self.result, self.plan
        self.machine.make(plan.device, early_kill=plan.early_kill)
        self.root.mkdir()
        result.size = ask_worker("prepare", self.job)[-1]["size"]
        tender = Tender(self.job)
        with self.machine.client() as client:
            injector = Injector(client, self.root, files_of(self.root), int(plan.device))
            try:
                tender.start()
                tender.running.wait()
                if not tender.began:
                    raise DaxemuError(f"the workload ended at once: {tender.lives[-1].said or 'no word why'}")
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
        """Read everything back, past an empty page cache; from a device that is gone nothing can be."""
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
        *bad, end = ask_worker("check", self.job)
        result.size = end["size"]
        result.bad = [Bad(**found) for found in bad[:MAX_BAD]]
        result.bad_left_off = len(bad) - len(result.bad)

    def _keep_events(self, began: float) -> None:
        events = self.machine.events()
        for event in events:
            event["time"] -= began
        self.result.events = events[:MAX_EVENTS]
        self.result.events_left_off = len(events) - len(self.result.events)


def main() -> int:
    """See the module."""
    # A trial that is told to end takes its machine away first.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ending)
    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    sys.stdout.buffer.write(msgspec.json.encode(make_trial(task)) + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
