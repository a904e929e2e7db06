"""Worker process: runs one workload on one mount.

Separate from the trial, because a SIGBUS may kill the worker.

    python -m daxemu.evaluate.worker prepare|run|check JSON

Output: one JSON object a line on stdout. ``run`` prints cumulative totals (``ops``, ``bytes``, ``errors``,
``down``). ``check`` prints each mismatching range, then the size of all expected data in bytes.
"""

from __future__ import annotations

import importlib
import json
import random
import sys
import time
from pathlib import Path
from typing import Any

import msgspec

from daxemu.evaluate.workloads.base import Workload
from daxemu.evaluate.workloads.specs import AnyWorkload

SAMPLE_SECONDS = 0.05

RUNS = {
    "command": ("command", "CommandRun"),
    "fileserver": ("fileserver", "FileServerRun"),
    "kvstore": ("kvstore", "KvStoreRun"),
    "sqlite": ("sqlite", "SqliteRun"),
    "dataset": ("dataset", "DatasetRun"),
    "snapshots": ("snapshots", "SnapshotsRun"),
    "log": ("append_log", "AppendLogRun"),
}
"""Module and class for each workload kind. Only the module of the requested kind is imported."""


class Job(msgspec.Struct):
    """Job of a worker process.

    The first life of a workload (``life`` 0) runs for ``seconds``. A later life, after a death, runs until
    the epoch time ``until``.
    """

    spec: AnyWorkload
    root: str
    state: str
    seed: int
    seconds: float = 0.0
    until: float = 0.0
    life: int = 0


def workload_of(job: Job) -> Workload:
    """Return the workload of a job, not opened yet."""
    module, name = RUNS[job.spec.kind]
    made: Workload = getattr(importlib.import_module(f"daxemu.evaluate.workloads.{module}"), name)(
        job.spec, Path(job.root), Path(job.state), job.seed
    )
    return made


def _say(**what: Any) -> None:
    sys.stdout.write(json.dumps(what) + "\n")
    sys.stdout.flush()


def run(job: Job, workload: Workload) -> None:
    """Run operations until the time is up, and print totals every SAMPLE_SECONDS.

    ``down``: seconds from a failed operation to the next successful one. In a life after a death, ``down``
    counts only from the first successful operation on.
    """
    if job.life:
        workload.begin_again()
    opened = False
    rng = random.Random(f"{job.seed} {job.life}")
    done: dict[str, Any] = {"ops": 0, "bytes": 0, "errors": 0, "down": 0.0, "error": None, "first": None}
    failed_at: float | None = None
    said = 0.0
    until = job.until if job.life else time.time() + job.seconds
    while (now := time.time()) < until:
        try:
            if not opened:
                workload.open()
                opened = True
            done["bytes"] += workload.step(rng)
        except workload.failures as error:
            done["errors"] += 1
            done["error"] = str(error)
            if failed_at is None and (done["first"] is not None or not job.life):
                failed_at = now
            # An operation that fails at once must not become a busy loop.
            time.sleep(0.001)
        else:
            done["ops"] += 1
            after = time.time()
            if failed_at is not None:
                done["down"] += after - failed_at
                failed_at = None
            if done["first"] is None:
                done["first"] = after
                said = 0.0
        if now - said >= SAMPLE_SECONDS:
            said = now
            _say(t=now, **done)
    end = time.time()
    if failed_at is not None:
        done["down"] += end - failed_at
    _say(t=end, **done, end=True)


def check(workload: Workload) -> None:
    """Read all data back; print each mismatch, then the totals."""
    wrong_bytes = 0
    for mismatch in workload.check():
        wrong_bytes += mismatch.length
        _say(**mismatch._asdict())
    _say(end=True, size=workload.size(), bad=wrong_bytes)


def main(arguments: list[str]) -> int:
    """Run one phase: prepare, run or check. Return the exit status: 2 for an unknown phase."""
    phase, text = arguments
    job = msgspec.json.decode(text, type=Job)
    workload = workload_of(job)
    if phase == "prepare":
        workload.prepare()
        _say(end=True, size=workload.size())
    elif phase == "run":
        run(job, workload)
    elif phase == "check":
        check(workload)
    else:
        print(f"no phase {phase!r}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
