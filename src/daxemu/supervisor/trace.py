"""Traces: every operation of programs, and every step of failures, for ``daxemu trace``."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import msgspec
import trio

from daxemu import protocol as p
from daxemu.fs.filesystem import Filesystem
from daxemu.host.observer import Operation
from daxemu.host.proc.processes import comm_of, process_of
from daxemu.rule import On
from daxemu.supervisor.observation import Observation
from daxemu.supervisor.steps import Steps
from daxemu.trace_record import OperationTrace, StepTrace, TraceLost, TraceRecord
from daxemu.uapi import Ino

KEPT = 100_000
"""Records that wait for a reader. A slower reader loses the oldest."""
_BATCH = 256


class TraceReader:
    """Observer that keeps records for one reader. Belongs to the trio thread."""

    def __init__(self, fs: Filesystem, file: str | None) -> None:
        """``file``: a glob over paths, as in rules; None for every file."""
        self._fs = fs
        self._on = None if file is None else On("any", file)
        self._records: deque[TraceRecord] = deque()
        self._lost = 0
        self._more = trio.Event()

    def wants(self, ino: Ino) -> bool:
        """See Observer."""
        return self._on is None or self._on.names(self._fs.names.path_of(ino))

    async def before(self, operation: Operation) -> None:
        """See Observer."""

    async def after(self, operation: Operation, seconds: float, error: int) -> None:
        """See Observer."""
        path = operation.paths(self._fs.names.path_of)[0]
        if self._on is not None and not self._on.names(path):
            return
        pid = process_of(operation.tid) if operation.tid else 0
        self.add(
            OperationTrace(
                time=time.time() - seconds,
                seconds=seconds,
                op=operation.op.value,
                path=path or None,
                ino=operation.ino,
                offset=operation.offset,
                length=operation.length,
                pid=pid,
                tid=operation.tid,
                comm=comm_of(pid) if pid else "?",
                errno=error,
            )
        )

    def add(self, record: OperationTrace | StepTrace) -> None:
        """Keep a record for the reader."""
        if len(self._records) == KEPT:
            self._records.popleft()
            self._lost += 1
        self._records.append(record)
        self._more.set()

    async def lines(self) -> AsyncIterator[list[bytes]]:
        """Yield lists of encoded records, without an end."""
        while True:
            if not self._records:
                self._more = trio.Event()
                await self._more.wait()
            batch: list[TraceRecord] = []
            if self._lost:
                batch.append(TraceLost(time.time(), self._lost))
                self._lost = 0
            while self._records and len(batch) < _BATCH:
                batch.append(self._records.popleft())
            yield [msgspec.json.encode(record) for record in batch]


class Traces:
    """Begins and ends traces."""

    def __init__(self, fs: Filesystem, observation: Observation, steps: Steps) -> None:
        self._fs = fs
        self._observation = observation
        self._steps = steps

    @asynccontextmanager
    async def one(self, request: p.Trace) -> AsyncIterator[TraceReader]:
        """Trace in the context. C answers no request meanwhile."""
        trace = TraceReader(self._fs, request.file)
        self._steps.add(trace.add)
        try:
            await self._observation.add(trace)
            with self._fs.layouts.suspended():
                yield trace
        finally:
            self._steps.remove(trace.add)
            await self._observation.remove(trace)
