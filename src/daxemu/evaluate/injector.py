"""Injector: makes the faults of a trial happen at their times, on the mount of the trial."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from daxemu.client import Client
from daxemu.errors import DaxemuError, NotMounted
from daxemu.evaluate.faults import Fault, span
from daxemu.failure_kind import FailureKind
from daxemu.protocol import Survey, kind_fields
from daxemu.survey_report import SurveyReport
from daxemu.uapi import PAGE_SIZE

CELLS = 4096
"""Number of survey cells in one request."""


class FaultRecord(msgspec.Struct):
    """Record of a drawn fault.

    ``result``: injected; missed (the file, or this part of the file, does not exist any more); refused
    (``reason``). Offset and length are device bytes; times are seconds from the start of the workload.
    ``told``: number of signals.
    """

    fault: Fault
    result: str = "missed"
    time: float = 0.0
    offset: int = 0
    length: int = 0
    outcome: str = ""
    told: int = 0
    path: str = ""
    reason: str = ""


def files_of(root: Path) -> list[tuple[str, int]]:
    """Return (path, size in bytes) of all non-empty files below ``root``, sorted by path.

    A "files" fault is a place in these files.
    """
    found = ((path, path.stat()) for path in sorted(root.rglob("*")) if path.is_file())
    return [(str(path.relative_to(root)), stat.st_size) for path, stat in found if stat.st_size]


class Injector:
    """Injector of one trial.

    ``root``: directory of the workload. ``files``: files of the prepared workload. ``size``: bytes of the
    device.
    """

    def __init__(self, client: Client, root: Path, files: list[tuple[str, int]], size: int) -> None:
        self._client = client
        self._root = root
        self._files = files
        self._size = size
        self.injected: list[FaultRecord] = []
        self.scrubbed: list[dict[str, Any]] = []

    def run(self, faults: list[Fault], scrubs: list[float], start: float, until: float) -> None:
        """Inject and scrub at the planned times; return at ``until``.

        Planned times are seconds after ``start``. ``start`` and ``until`` are epoch times. Raises NotMounted
        if the mount is gone; any other DaxemuError of a fault is recorded.
        """
        agenda: list[tuple[float, int, Callable[[], None]]] = []

        def enter(at: float, act: Callable[[], None]) -> None:
            agenda.append((at, len(agenda), act))

        for fault in faults:
            record = FaultRecord(fault)
            self.injected.append(record)
            enter(fault.time, partial(self._happen, record, start))
            if fault.found is not None and fault.found > fault.time:
                enter(fault.found, partial(self._report, record))
        for at in scrubs:
            enter(at, partial(self._scrub, start))
        for at, _, act in sorted(agenda):
            if start + at >= until:
                break
            time.sleep(max(start + at - time.time(), 0.0))
            act()
        time.sleep(max(until - time.time(), 0.0))

    def _happen(self, record: FaultRecord, start: float) -> None:
        fault = record.fault
        record.time = time.time() - start
        try:
            if fault.kind.traits.whole_device:
                record.told = self._client.request("remove")["told"]
                record.length, record.result = self._size, "injected"
                return
            at = self._place(record)
            if at is None:
                return
            if not fault.kind.traits.is_poison:
                record.offset, record.length = at, min(fault.length, self._size - at)
                where = [[record.offset, record.length]]
                self._client.request("inject", ranges=where, seed=fault.seed, **kind_fields(fault.kind))
                record.result = "injected"
                return
            record.offset, record.length = span(fault, at, self._size)
            at_once = fault.found is not None and fault.found <= fault.time
            self._poison(record, fault.kind if at_once else FailureKind.LATENT)
        except NotMounted:
            raise
        except DaxemuError as error:
            record.result, record.reason = "refused", str(error)

    def _poison(self, record: FaultRecord, kind: FailureKind) -> None:
        where = [[record.offset, record.length]]
        (done,) = self._client.request("inject", ranges=where, **kind_fields(kind))["ranges"]
        record.outcome, record.result = done["outcome"], "injected"
        record.told += done["told"]

    def _report(self, record: FaultRecord) -> None:
        """Report latent poison as the hardware would, without an access.

        The same range is injected again, not latent.
        """
        if record.result != "injected":
            return
        try:
            self._poison(record, record.fault.kind)
        except NotMounted:
            raise
        except DaxemuError as error:
            record.reason = str(error)

    def _scrub(self, start: float) -> None:
        began = time.time()
        try:
            found = self._client.request("scrub")
        except NotMounted:
            raise
        except DaxemuError as error:
            self.scrubbed.append({"time": began - start, "error": str(error)})
        else:
            took = time.time() - began
            self.scrubbed.append({"time": began - start, "bytes": found["bytes"], "seconds": took})

    def _place(self, record: FaultRecord) -> int | None:
        """Resolve a fault to a device byte.

        None if the file, or the part of the file, does not exist any more. Raises DaxemuError.
        """
        fault = record.fault
        if fault.target == "files":
            at = self._in_files(record)
        elif fault.target == "metadata":
            at = self._in_metadata(fault.place)
        else:
            at = int(fault.place * self._size)
        return None if at is None else min(max(at + fault.shift, 0), self._size - 1)

    def _in_metadata(self, place: float) -> int:
        """Resolve a fraction to a device byte among the filesystem's own bytes, in device order.

        The space has both superblocks and both replicas of the records.
        """
        whole = self._survey(0, self._size)
        at = int(place * sum(cell.metadata for cell in whole.cells))
        found = whole
        while True:
            index = 0
            while at >= found.cells[index].metadata:
                at -= found.cells[index].metadata
                index += 1
            start = found.offset + index * found.cell
            if found.cell == PAGE_SIZE:
                return start + at
            found = self._survey(start, min(found.cell, self._size - start))

    def _survey(self, offset: int, length: int) -> SurveyReport:
        return self._client.ask(Survey(offset, length, CELLS))

    def _in_files(self, record: FaultRecord) -> int | None:
        at = int(record.fault.place * sum(size for _, size in self._files))
        for path, size in self._files:
            if at < size:
                record.path = path
                return self._device_byte(self._root / path, at / size)
            at -= size
        return None

    def _device_byte(self, path: Path, part: float) -> int | None:
        """Resolve a fraction of a file's present size to a device byte; None for a hole or a missing file.

        The file may have changed its size since the workload was prepared.
        """
        try:
            found = path.stat()
        except OSError:
            return None
        ino, offset = found.st_ino, int(part * found.st_size)
        for extent in self._client.request("map", ino=ino)["extents"]:
            if extent["offset"] <= offset < extent["offset"] + extent["length"]:
                base = extent["device_offset"]
                return None if base is None else int(base + offset - extent["offset"])
        return None
