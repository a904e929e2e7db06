"""Tender: keeps one workload running during a trial.

After each death the tender starts a new life of the workload, as a service manager would.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from daxemu.errors import DaxemuError
from daxemu.evaluate.worker import Job

PATIENCE = 120.0
"""Seconds over the planned time until a workload counts as hung."""
MAX_LIVES = 100


def worker(phase: str, job: Job, wrapper: Sequence[str] = ()) -> list[str]:
    """Return the command line of a worker process. ``wrapper``: the command in front."""
    return [
        *wrapper,
        sys.executable,
        "-m",
        "daxemu.evaluate.worker",
        phase,
        msgspec.json.encode(job).decode(),
    ]


def ask_worker(phase: str, job: Job, wrapper: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Run phase ``prepare`` or ``check`` to the end; return the printed JSON objects. ``wrapper``: the
    command in front.

    Raises DaxemuError on a timeout (PATIENCE) or on exit status != 0.
    """
    try:
        done = subprocess.run(
            worker(phase, job, wrapper),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired as error:
        raise DaxemuError(f"{phase} of {job.spec.label} did not end within {PATIENCE:g} s") from error
    if done.returncode:
        why = done.stderr.strip().rpartition("\n")[2] or f"exit {done.returncode}"
        raise DaxemuError(f"{phase} of {job.spec.label}: {why}")
    return [json.loads(line) for line in done.stdout.splitlines()]


class WorkloadLife(msgspec.Struct):
    """Life of the workload: one process from start to end. Times are epoch seconds.

    ``status``: exit status, or minus the signal; -9 if ``hung``. ``first``: time of the first successful
    operation. ``down``: seconds after ``first`` without a successful operation. ``said``: end of stderr.
    """

    start: float
    end: float = 0.0
    first: float | None = None
    down: float = 0.0
    status: int = 0
    hung: bool = False
    said: str = ""


class Tender(threading.Thread):
    """Thread running a workload for its planned time.

    ``samples``: (time, operations, bytes, errors), cumulative. ``wrapper``: the command in front of every
    worker.
    """

    def __init__(self, job: Job, wrapper: Sequence[str] = ()) -> None:
        super().__init__(daemon=True)
        self.job = job
        self._wrapper = wrapper
        self.samples: list[tuple[float, int, int, int]] = []
        self.lives: list[WorkloadLife] = []
        self.running = threading.Event()
        """Set after the first operation, or after the end of the first life."""
        self.began = 0.0
        self.last_error: str | None = None
        self._process: subprocess.Popen[str] | None = None
        self._stopping = False

    @property
    def until(self) -> float:
        """Return the epoch time of the planned end."""
        return self.began + self.job.seconds

    def run(self) -> None:
        """Run lives until the time is up, a life ends with status 0, or MAX_LIVES is reached.

        A workload that dies before its first operation is not started again.
        """
        while len(self.lives) < MAX_LIVES and not self._stopping:
            self._live(len(self.lives))
            if not self.began or time.time() >= self.until or self.lives[-1].status == 0:
                break
        self.running.set()

    def stop(self) -> None:
        """Kill the running process; start no new life. Called from another thread."""
        self._stopping = True
        process = self._process
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()

    def _live(self, number: int) -> None:
        job = msgspec.structs.replace(self.job, life=number, until=self.until if number else 0.0)
        life = WorkloadLife(time.time())
        self.lives.append(life)
        errors = Path(job.state) / f"stderr-{number}"
        with open(errors, "wb") as stderr:
            self._process = subprocess.Popen(
                worker("run", job, self._wrapper),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            )
        process = self._process
        limit = threading.Timer(job.seconds + PATIENCE, self._give_up, [life, process])
        limit.start()
        before = self.samples[-1] if self.samples else (0.0, 0, 0, 0)
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                self._note(json.loads(line), before)
        life.status = process.wait()
        limit.cancel()
        life.end = time.time()
        life.said = errors.read_text(errors="backslashreplace").strip()[-300:]

    def _note(self, said: dict[str, Any], before: tuple[float, int, int, int]) -> None:
        life = self.lives[-1]
        life.first, life.down = said["first"], said["down"]
        if said["error"] is not None:
            self.last_error = said["error"]
        self.samples.append(
            (said["t"], before[1] + said["ops"], before[2] + said["bytes"], before[3] + said["errors"])
        )
        if not self.running.is_set():
            self.began = said["t"]
            self.running.set()

    def down(self) -> float:
        """Return seconds without a successful operation: failing, dead, or restarting."""
        total = sum(life.down for life in self.lives)
        out_since: float | None = None
        for life in self.lives:
            if out_since is not None and life.first is not None:
                total += max(life.first - out_since, 0.0)
                out_since = None
            if out_since is None and life.status:
                out_since = life.end
        if out_since is not None:
            total += max(self.until - out_since, 0.0)
        return total

    @staticmethod
    def _give_up(life: WorkloadLife, process: subprocess.Popen[str]) -> None:
        life.hung = True
        process.send_signal(signal.SIGKILL)
