"""State of a mount for watch and report, and the actions of the keys."""

from __future__ import annotations

import threading
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple, Self

import msgspec

from daxemu.client import Client
from daxemu.errors import DaxemuError, NotMounted
from daxemu.events import Event, MemoryFailureHandled, SignalSent, signalled
from daxemu.failure_kind import FailureKind
from daxemu.host.proc.mountinfo import Mount, mount_of
from daxemu.protocol import (
    Clear,
    Damaged,
    DamagedRange,
    Inject,
    MappedFile,
    StatusReport,
    Survey,
    WhoMaps,
    kind_fields,
)
from daxemu.protocol import Status as StatusRequest
from daxemu.survey_report import SurveyReport
from daxemu.uapi import PAGE_SIZE, page_align_down
from daxemu.units import DIV_ROUND_UP

KEPT = 1000
FILES = 50
RATE_WINDOW = 10.0
"""Window in seconds over which a rate is the mean."""
ZOOM = 8
PATIENCE = 5.0


class Seen(NamedTuple):
    """State of a mount at one moment."""

    status: StatusReport
    survey: SurveyReport
    here: SurveyReport
    """Survey of the part of the device at the cursor."""
    damaged: list[DamagedRange]
    mapped: list[MappedFile]


class Model:
    """A watched mount. A context manager. Call ``look`` before any other method."""

    def __init__(self, mount: Mount) -> None:
        self.mount = mount
        self.cursor = 0
        self.offset = 0
        self.length: int | None = None
        self.message = ""
        self.ended = False
        self.events: deque[Event] = deque(maxlen=KEPT)
        self.seen: Seen | None = None
        self._confirmed: tuple[int, FailureKind] | None = None
        self._names: dict[int, str] = {}
        self._surveyed: tuple[object, SurveyReport] | None = None
        self._client = Client(mount, patience=PATIENCE)
        self._listener = Client(mount)
        self._follower = threading.Thread(target=self._follow, name="events", daemon=True)
        self._follower.start()

    @classmethod
    def of(cls, path: Path) -> Self:
        """Return a model of the mount that ``path`` is on. Raises NotMounted."""
        return cls(mount_of(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._listener.hang_up()
        self._follower.join()
        self._listener.close()
        self._client.close()

    def _follow(self) -> None:
        for event in self._listener.events():
            self.events.append(event)

    @property
    def now(self) -> Seen:
        """The state at the last ``look``."""
        assert self.seen is not None
        return self.seen

    def look(self, cells: int) -> None:
        """Update the state. Sets ``ended`` when the mount is gone."""
        try:
            status = self._client.ask(StatusRequest())
            survey = self._survey(status, Survey(self.offset, self.length, cells, FILES))
            if self.seen is None:
                self.cursor = _first_without_metadata(survey)
            self.cursor = min(self.cursor, len(survey.cells) - 1)
            at, length = self._at_cursor(survey, status.size)
            here = self._client.ask(Survey(at, length, 1, FILES))
            damaged = self._client.ask(Damaged()).files
            mapped = self._client.ask(WhoMaps()).mapped
        except NotMounted:
            self.ended = True
            return
        self._names.update((use.ino, use.path) for use in survey.files + here.files)
        self.seen = Seen(status, survey, here, damaged, mapped)

    def _survey(self, status: StatusReport, wanted: Survey) -> SurveyReport:
        """Return the survey of the device, from the supervisor only if an event may have changed the survey:
        on a full device a survey is expensive.
        """
        key = (wanted, status.free_blocks, status.extents, status.inodes, status.events)
        if self._surveyed is None or self._surveyed[0] != key:
            self._surveyed = (key, self._client.ask(wanted))
        return self._surveyed[1]

    def _at_cursor(self, survey: SurveyReport, size: int) -> tuple[int, int]:
        at = survey.offset + self.cursor * survey.cell
        return at, min(survey.cell, size - at)

    # -- keys

    def move(self, cells: int) -> None:
        """Move the cursor by ``cells``; the cursor stays on the map."""
        self._confirmed = None
        target = self.cursor + cells
        if 0 <= target < len(self.now.survey.cells):
            self.cursor = target

    def zoom(self, *, closer: bool) -> None:
        """Show an eighth of the present range, around the cursor, or a range eight times as long."""
        size, survey = self.now.status.size, self.now.survey
        shown = size - self.offset if self.length is None else self.length
        least = len(survey.cells) * PAGE_SIZE
        length = max(least, shown // ZOOM) if closer else shown * ZOOM
        middle, _ = self._at_cursor(survey, size)
        if length >= size:
            self.offset, self.length = 0, None
        else:
            self.length = page_align_down(length)
            start = max(0, min(middle - self.length // 2, size - self.length))
            self.offset = page_align_down(start)
        cell = max(PAGE_SIZE, DIV_ROUND_UP(self.length or size, len(survey.cells)))
        self.cursor = max(0, middle - self.offset) // cell
        self.look(len(survey.cells))

    def inject(self, kind: FailureKind) -> None:
        """Poison a page at the cursor: of the file with the most bytes in the range, or without a file the
        first page. Poison in a range with metadata and no file would shut the filesystem down, so this
        requires the same key twice in a row.
        """
        at, _ = self._at_cursor(self.now.survey, self.now.status.size)
        if self.now.here.cells[0].metadata and not self.now.here.files and self._confirmed != (at, kind):
            self._confirmed = (at, kind)
            self.message = "metadata: poison here shuts the filesystem down; the same key again does so"
            return
        self._confirmed = None
        if self.now.here.files:
            at = self.now.here.files[0].device_offset
        try:
            done = self._client.ask(Inject([(at, PAGE_SIZE)], **kind_fields(kind))).ranges[0]
        except DaxemuError as error:
            self.message = str(error)
            return
        count = signalled(done.processes, done.signals)
        self.message = f"poisoned device {done.offset:#x}+{done.length:#x}: {done.outcome}, {count}"

    def clear(self) -> None:
        """Clear all poison at the cursor."""
        try:
            at = self._at_cursor(self.now.survey, self.now.status.size)
            cleared = self._client.ask(Clear([at])).bytes
        except DaxemuError as error:
            self.message = str(error)
            return
        self.message = f"cleared {cleared} bytes of poison"

    # -- derived

    def rates(self, now: float | None = None) -> dict[str, float]:
        """Return events, failures and signals per second, over the last window."""
        since = (time.time() if now is None else now) - RATE_WINDOW
        late = [event for event in list(self.events) if event.time >= since]
        return {
            "events": len(late) / RATE_WINDOW,
            "failures": sum(isinstance(event, MemoryFailureHandled) for event in late) / RATE_WINDOW,
            "signals": sum(isinstance(event, SignalSent) for event in late) / RATE_WINDOW,
        }

    def path_of(self, ino: int) -> str:
        """Return the path of a mapped file; without a known path, text with the inode number."""
        return self._names.get(ino, f"<inode {ino}>")

    def json(self) -> str:
        """Return the state at the last ``look`` as one JSON object."""
        shown = {**self.now._asdict(), "rates": self.rates()}
        return msgspec.json.encode(shown).decode()


def _first_without_metadata(survey: SurveyReport) -> int:
    """Return the cell where the cursor starts: the first cell with file data, else the first free cell, else
    0.
    """
    data = (index for index, cell in enumerate(survey.cells) if cell.used > cell.metadata == 0)
    free = (index for index, cell in enumerate(survey.cells) if not cell.metadata)
    return next(data, next(free, 0))
