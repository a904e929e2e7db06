"""Schedulers: run trials in processes of this machine, or on the workers of a Dask cluster."""

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
from daxemu.evaluate.trial import Result, TrialRequest

OVERTIME = 420.0
"""Seconds allowed for a trial beside its workload's time.

mkfs, mount, prepare and check have their own limits.
"""
SHM = Path("/dev/shm")


class Scheduler(Protocol):
    """Runner of trials."""

    def results(self, requests: Sequence[TrialRequest]) -> Iterator[Result]:
        """Yield each result when its trial ends, in any order."""

    def stop(self) -> None:
        """End all running trials; return after their machines are removed. Safe to call twice."""


class _Processes:
    """Set of running trial processes, to signal all of them on stop()."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[subprocess.Popen[bytes]] = set()
        self.stopping = False

    @contextlib.contextmanager
    def one(self) -> Iterator[subprocess.Popen[bytes]]:
        """Start a trial process; keep the process in the set until the context ends.

        Raises DaxemuError after stop().
        """
        with self._lock:
            if self.stopping:
                raise DaxemuError("stopped before the trial began")
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


def make_here(request: TrialRequest, processes: _Processes) -> Result:
    """Run one trial on this machine, in a separate process.

    A failure of the trial is returned in ``failed``.
    """
    name = f"daxemu-trial-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    here = msgspec.structs.replace(
        request,
        directory=str(Path(tempfile.gettempdir()) / name),
        device=str((SHM if SHM.is_dir() else Path(tempfile.gettempdir())) / f"{name}.device"),
    )
    plan = parse(request.plan)
    failed = Result(key=request.key, fingerprint=plan.fingerprint(request.key.workload, request.key.faults))
    try:
        with processes.one() as process:
            try:
                output, errors = process.communicate(msgspec.json.encode(here), plan.seconds + OVERTIME)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                failed.failed = f"killed: did not end within {plan.seconds + OVERTIME:g} s"
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
    """Scheduler for this machine; ``jobs`` trials at a time."""

    def __init__(self, jobs: int) -> None:
        self._pool = ThreadPoolExecutor(jobs)
        self._processes = _Processes()

    def results(self, requests: Sequence[TrialRequest]) -> Iterator[Result]:
        """See Scheduler.results."""
        for future in as_completed(
            [self._pool.submit(make_here, request, self._processes) for request in requests]
        ):
            yield future.result()

    def stop(self) -> None:
        """See Scheduler.stop."""
        self._processes.stop()
        self._pool.shutdown(wait=True, cancel_futures=True)


def default_jobs() -> int:
    """Return half the number of usable processors, at least 1.

    One trial keeps two processors busy: the workload and the supervisor.
    """
    return max(len(os.sched_getaffinity(0)) // 2, 1)


def make_remotely(request: bytes) -> bytes:
    """Run one trial on a Dask worker.

    Argument and result are JSON, so the cluster needs none of daxemu's types.
    """
    return msgspec.json.encode(make_here(msgspec.json.decode(request, type=TrialRequest), _Processes()))


class DaskScheduler:
    """Scheduler for a Dask cluster. Every worker needs daxemu installed and permission to mount."""

    def __init__(self, address: str) -> None:
        """Connect to ``address``.

        Raises Unsupported without distributed, InvalidArgument without an answer.
        """
        self._client = connect(address)
        self._futures: list[Any] = []

    def results(self, requests: Sequence[TrialRequest]) -> Iterator[Result]:
        """See Scheduler.results. A trial whose worker died is returned as failed."""
        from distributed import as_completed as as_dask_completed

        by_future = {}
        for request in requests:
            # Never cached, never retried: every request is one trial.
            future = self._client.submit(make_remotely, msgspec.json.encode(request), pure=False, retries=0)
            by_future[future.key] = request
            self._futures.append(future)
        for future in as_dask_completed(self._futures):
            if future.status == "finished":
                yield msgspec.json.decode(future.result(), type=Result)
                continue
            request = by_future[future.key]
            fingerprint = parse(request.plan).fingerprint(request.key.workload, request.key.faults)
            why = str(future.exception()) if future.status == "error" else future.status
            yield Result(key=request.key, fingerprint=fingerprint, failed=f"on the cluster: {why}")

    def stop(self) -> None:
        """Cancel all trials not yet started. Running trials end by themselves and remove their machines."""
        self._client.cancel(self._futures)
        self._client.close()


def connect(address: str) -> Any:
    """Return a Dask client.

    Raises Unsupported without distributed, InvalidArgument without an answer at ``address``.
    """
    try:
        from distributed import Client as DaskClient
    except ImportError as error:
        raise Unsupported("--scheduler needs Dask: pip install 'daxemu[dask]'") from error
    try:
        if where := re.fullmatch(r"tcp://([^/]+):(\d+)", address):
            # Without a listener, Dask retries for its whole timeout: check the port first.
            socket.create_connection((where[1], int(where[2])), timeout=10).close()
        return DaskClient(address, timeout=10)
    except OSError as error:
        why = error.strerror or "no answer"
        raise InvalidArgument(
            f"no Dask scheduler answers at {address}: {why}; start one, or give its address"
        ) from error
    except (ValueError, TypeError) as error:
        raise InvalidArgument(f"{address} is no address of a Dask scheduler: give tcp://HOST:PORT") from error
