"""Where trials are made: in processes of this machine, or on the workers of a Dask cluster."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import tempfile
import threading
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, Protocol

import msgspec

from daxemu.errors import DaxemuError, InvalidArgument, Unsupported
from daxemu.evaluate.machine import clear_away, start_worker
from daxemu.evaluate.plan import parse
from daxemu.evaluate.trial import Result, Task

OVERTIME = 420.0
"""Seconds that a trial may take beside its workload's time: mkfs, mount, prepare, check, each with limits of
its own.
"""
SHM = Path("/dev/shm")


class Scheduler(Protocol):
    """Makes trials."""

    def results(self, tasks: Sequence[Task]) -> Iterator[Result]:
        """Each result as its trial ends, in any order."""

    def stop(self) -> None:
        """End the trials that run, and wait until their machines are gone. Safe to call twice."""


class _Processes:
    """The trial processes that run, so that they can be told to end."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self.stopping = False

    @contextlib.contextmanager
    def one(self) -> Iterator[subprocess.Popen[bytes]]:
        """A trial process."""
        with self._lock:
            if self.stopping:
                raise DaxemuError("stopped before it began")
            process = start_worker("daxemu.evaluate.trial")
            self._running.add(process)
        try:
            yield process
        finally:
            with self._lock:
                self._running.discard(process)

    def stop(self) -> None:
        with self._lock:
            self.stopping = True
            for process in self._running:
                process.send_signal(signal.SIGTERM)


def make_here(task: Task, processes: _Processes) -> Result:
    """Make one trial on this machine, in a process of its own. Raises nothing that a trial can meet."""
    name = f"daxemu-trial-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    here = msgspec.structs.replace(
        task,
        directory=str(Path(tempfile.gettempdir()) / name),
        device=str((SHM if SHM.is_dir() else Path(tempfile.gettempdir())) / f"{name}.device"),
    )
    plan = parse(task.plan)
    failed = Result(key=task.key, fingerprint=plan.fingerprint(task.key.workload, task.key.faults))
    try:
        with processes.one() as process:
            try:
                output, errors = process.communicate(msgspec.json.encode(here), plan.seconds + OVERTIME)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                failed.failed = "took too long, and was killed"
                return failed
            finally:
                clear_away(Path(here.directory), Path(here.device))
        if process.returncode or not output:
            said = errors.decode(errors="backslashreplace").strip().rpartition("\n")[2]
            failed.failed = said or f"the trial ended with status {process.returncode}"
            return failed
        return msgspec.json.decode(output, type=Result)
    except DaxemuError as error:
        failed.failed = str(error)
        return failed


class LocalScheduler:
    """``jobs`` trials at a time on this machine."""

    def __init__(self, jobs: int) -> None:
        self._pool = ThreadPoolExecutor(jobs)
        self._processes = _Processes()

    def results(self, tasks: Sequence[Task]) -> Iterator[Result]:
        """See Scheduler.results."""
        for future in as_completed([self._pool.submit(make_here, task, self._processes) for task in tasks]):
            yield future.result()

    def stop(self) -> None:
        """See Scheduler.stop."""
        self._processes.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)


def default_jobs() -> int:
    """A trial keeps two processors busy: its workload, and the supervisor that serves it."""
    return max(len(os.sched_getaffinity(0)) // 2, 1)


def make_remotely(task: bytes) -> bytes:
    """A trial on a Dask worker; JSON in, JSON out, so that the cluster needs none of our types."""
    return msgspec.json.encode(make_here(msgspec.json.decode(task, type=Task), _Processes()))


class DaskScheduler:
    """Trials on a Dask cluster whose workers have daxemu installed and may mount."""

    def __init__(self, address: str) -> None:
        """Raises Unsupported without distributed, InvalidArgument when nobody answers there."""
        self._client = connect(address)
        self._futures: list[Any] = []

    def results(self, tasks: Sequence[Task]) -> Iterator[Result]:
        """See Scheduler.results. A trial whose worker died is a failed one."""
        from distributed import as_completed as as_dask_completed

        by_future = {}
        for task in tasks:
            # Never cached, never repeated: two trials alike are two trials.
            future = self._client.submit(make_remotely, msgspec.json.encode(task), pure=False, retries=0)
            by_future[future.key] = task
            self._futures.append(future)
        for future in as_dask_completed(self._futures):
            if future.status == "finished":
                yield msgspec.json.decode(future.result(), type=Result)
                continue
            task = by_future[future.key]
            fingerprint = parse(task.plan).fingerprint(task.key.workload, task.key.faults)
            why = str(future.exception()) if future.status == "error" else future.status
            yield Result(key=task.key, fingerprint=fingerprint, failed=f"on the cluster: {why}")

    def stop(self) -> None:
        """See Scheduler.stop: what has not begun never does; what runs ends by itself, and clears itself
        away.
        """
        self._client.cancel(self._futures)
        self._client.close()


def connect(address: str) -> Any:
    """A Dask client. Raises Unsupported without distributed, InvalidArgument when nobody answers there."""
    try:
        from distributed import Client as DaskClient
    except ImportError as error:
        raise Unsupported("--scheduler needs Dask: pip install 'daxemu[dask]'") from error
    try:
        if where := re.fullmatch(r"tcp://([^/]+):(\d+)", address):
            # Dask asks again and again for its whole timeout where nobody listens.
            socket.create_connection((where[1], int(where[2])), timeout=10).close()
        return DaskClient(address, timeout=10)
    except (OSError, ValueError, TypeError) as error:
        raise InvalidArgument(f"no Dask scheduler answers at {address}: {error}") from error
