"""Cell of the matrix: one program in one situation, on a machine of its own.

    python -m daxemu.apps.cell     CellRequest as JSON on stdin; on stdout one JSON object a line:
                                   each CellStep as it happens, the MatrixCell at the end

The program is observed under the harm, then observed again after a restart. A separate process, like a trial.
On SIGTERM or SIGINT the process removes its machine before its end.
"""

from __future__ import annotations

import functools
import re
import signal
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from daxemu.apps.application import COMPLAINT, Application, Place, ReportedError, Spot
from daxemu.apps.process import Ended, Process, TimedOut, describe
from daxemu.apps.programs import application_called
from daxemu.apps.records import ReadBack
from daxemu.apps.situations import BY_NAME, Situation
from daxemu.errors import DaxemuError
from daxemu.evaluate.machine import PATIENCE, TrialMachine, daxemu, directories, ending
from daxemu.events import signalled
from daxemu.events.mounts import Mode
from daxemu.failure_kind import FailureKind
from daxemu.protocol import kind_fields
from daxemu.uapi import BUS_MCEERR_AO, BUS_MCEERR_AR, PAGE_SIZE

SIZE = 1 << 30
DEATH_PATIENCE = 0.5
"""Seconds allowed for a signalled process to die."""
LOGGED = re.compile(
    r"(?i).*(corrupt|checksum|could not read|i(nput)?/o(utput)? error|short read|truncat|bad file|mismatch)"
)
"""Line in a program's log reporting lost data."""
CODES = {BUS_MCEERR_AO: "BUS_MCEERR_AO", BUS_MCEERR_AR: "BUS_MCEERR_AR"}


class Behaviour(StrEnum):
    """Behaviour of a program during one life."""

    RIGHT = "right"
    REPORTS = "reports"
    AO = "SIGBUS AO"
    AR = "SIGBUS AR"
    SIGBUS = "SIGBUS"
    DIES = "dies"
    HANGS = "hangs"
    LOGGED = "wrong, logged"
    WRONG = "wrong"


class CellStep(msgspec.Struct, tag="step"):
    """A step of a cell. ``time``: seconds from the start of the cell."""

    time: float
    text: str


class ProgramLife(msgspec.Struct):
    """Life of the program: from a start to the end. ``said``: the program's message, or its log's."""

    outcome: Behaviour
    said: str = ""
    status: int | None = None
    right: int = 0
    wrong: int = 0
    missing: int = 0
    signals: list[str] = []
    stays: bool = False
    """True if the program did not end as asked, and was killed."""


class MatrixCell(msgspec.Struct, tag="cell"):
    """Observations of one cell. ``mode``: mode of the mount. ``first``: under the harm. ``again``: after the
    restart.

    ``failed``: reason for missing observations. ``hurt``: the injected range.
    """

    application: str
    situation: str
    mode: Mode = "page cache"
    failed: str | None = None
    hurt: str = ""
    first: ProgramLife | None = None
    again: ProgramLife | None = None
    seconds: float = 0.0
    steps: list[CellStep] = []


class CellRequest(msgspec.Struct):
    """Request for a cell. ``limit``: seconds for each wait; a longer wait counts as a hang.

    ``directory``, ``device``: paths for the machine; must not exist yet.
    """

    application: str
    situation: str
    limit: float
    directory: str = ""
    device: str = ""
    mode: Mode = "page cache"


class SeenSignal(NamedTuple):
    """Signal to a process. ``is_delivered``: False if the process ended before, for one."""

    pid: int
    code: int
    text: str
    is_delivered: bool


class CellRun:
    """Run of one cell. ``tell`` is called with each step."""

    def __init__(self, request: CellRequest, tell: Callable[[CellStep], None]) -> None:
        self.request = request
        self.app: Application = application_called(request.application)()
        self.situation: Situation = BY_NAME[request.situation]
        self.cell = MatrixCell(request.application, request.situation, request.mode)
        self.machine = TrialMachine(Path(request.directory), Path(request.device), "none", request.mode)
        self._tell = tell
        self._names = (
            (str(self.machine.mountpoint), "MOUNTPOINT"),
            (str(self.machine.mountpoint.parent / "scratch"), "SCRATCH"),
        )
        self._began = time.monotonic()
        self._events_seen = 0

    def make(self) -> MatrixCell:
        """Run the cell. A failure of the cell itself is returned in ``failed``, not raised."""
        try:
            with directories(Path(self.request.directory), Path(self.request.device)):
                self._run()
        except (DaxemuError, OSError) as error:
            self.cell.failed = f"{type(error).__name__}: {error}"
            self._say(self.cell.failed)
        self.cell.seconds = time.monotonic() - self._began
        return self.cell

    def _say(self, text: str) -> None:
        step = CellStep(time.monotonic() - self._began, self._plain(text))
        self.cell.steps.append(step)
        self._tell(step)

    def _plain(self, text: str) -> str:
        """Replace the paths of this run by MOUNTPOINT and SCRATCH."""
        for path, name in self._names:
            text = text.replace(path, name)
        return text

    def _run(self) -> None:
        situation, machine = self.situation, self.machine
        machine.make(SIZE, early_kill=False)
        scratch = Path(self.request.directory) / "scratch"
        scratch.mkdir()
        root = machine.mountpoint / "data"
        root.mkdir()
        place = Place(root, scratch, self.request.limit, self.app.user, self._say, machine.wrapper)
        try:
            self._say(f"-- {self.app.name} makes its data")
            try:
                self.app.prepare(place)
                if situation.part == "journal" and not situation.live:
                    self.app.crash(place)
            except (Ended, TimedOut, ReportedError) as error:
                raise DaxemuError(f"the program cannot make its data: {error}") from error
            place.kill_all()
            machine.again()
            if situation.early_kill:
                self._say(f"   $ daxemu set {machine.mountpoint} early_kill=1")
                daxemu("set", machine.mountpoint, "early_kill=1")
            harm: Callable[[Process], int] | None = None
            removed = situation.harm is not None and situation.harm.traits.whole_device
            if removed:
                harm = self._remove
            elif situation.harm is not None and not situation.live:
                self._inject(situation.harm, self.app.spot(place, situation.part))
            elif situation.harm is not None:
                harm = functools.partial(self._inject_live, situation.harm, place)
            self._say(f"-- {self.app.name} is started")
            self.cell.first = self._life(place, harm)
            if removed:
                self._say("-- the device is back")
                machine.again()
            self._say(f"-- {self.app.name} is started again")
            self.cell.again = self._life(place, None)
        finally:
            if not place.kill_all():
                self._cut_off(place)

    def _inject_live(self, kind: FailureKind, place: Place, process: Process) -> int:
        if self.situation.part == "journal":
            self.app.dirty(place, process)
        return self._inject(kind, self.app.spot(place, self.situation.part))

    def _inject(self, kind: FailureKind, spot: Spot) -> int:
        """Inject at ``spot``. Return the number of signalled processes."""
        offset, length = spot.offset, spot.length
        if kind.traits.is_poison:
            offset = offset // PAGE_SIZE * PAGE_SIZE
            length = min(PAGE_SIZE, spot.path.stat().st_size - offset)
        name = spot.path.relative_to(self.machine.mountpoint / "data")
        self.cell.hurt = f"{name} {offset:#x}+{length:#x} ({spot.what})"
        self._say(f"   $ daxemu inject {spot.path} --offset {offset:#x} --length {length}{kind.words}")
        with self.machine.client() as client:
            client.set_patience(PATIENCE)
            ino = spot.path.stat().st_ino
            done = client.request("inject", ino=ino, ranges=[[offset, length]], seed=1, **kind_fields(kind))
        if not done["ranges"] or done["holes"]:
            raise DaxemuError(f"nothing to inject into at {self.cell.hurt}: the range has a hole")
        (found,) = done["ranges"]
        self._say(f"   {found['outcome']}, {signalled(found['processes'], found['signals'])}")
        return int(found["processes"])

    def _remove(self, process: Process) -> int:
        self._say(f"   $ daxemu remove {self.machine.mountpoint}")
        self.cell.hurt = "the whole device"
        with self.machine.client() as client:
            client.set_patience(PATIENCE)
            found = client.request("remove")
        self._say(f"   {signalled(found['processes'], found['signals'])}")
        return int(found["processes"])

    def _life(self, place: Place, harm: Callable[[Process], int] | None) -> ProgramLife:
        """Run one life: start the program, read everything, end the program.

        With ``harm``, the program reads everything before and after the harm.
        """
        read_back: ReadBack | None = None
        problem: Exception | None = None
        try:
            process = self.app.start(place)
            read_back = (self.app.warm if harm else self.app.read)(place, process)
            self._say(f"   {_count(read_back)}")
            if harm is not None:
                if not read_back.complete:
                    raise DaxemuError(f"the data is incomplete before the injection: {_count(read_back)}")
                signalled_processes = harm(process)
                read_back = None
                if signalled_processes and process.ends_within(DEATH_PATIENCE):
                    raise Ended(process.wait())
                read_back = self.app.read(place, process)
                self._say(f"   {_count(read_back)}")
        except (Ended, TimedOut, ReportedError) as error:
            problem = error
        if not place.started:
            raise DaxemuError(f"the program cannot be started: {problem}")
        life = self._judge(place, read_back, problem)
        self._end(place, life)
        shown = f": {life.said}" if life.said else ""
        self._say(f"=> {life.outcome}{shown}")
        return life

    def _judge(self, place: Place, read_back: ReadBack | None, problem: Exception | None) -> ProgramLife:
        process = place.started[-1]
        if (read_back is None or read_back.complaints) and process.ends_within(DEATH_PATIENCE):
            # A client reports that its server is gone: the end of the server decides.
            try:
                status = process.wait()
            except TimedOut as error:
                problem = error
            else:
                refused = isinstance(problem, ReportedError) and status >= 0
                # A program that aborts after an error message to its client has reported the error.
                gave_up = read_back is not None and status == -signal.SIGABRT
                if not refused and not gave_up:
                    problem = Ended(status)
        signals = self._signals()
        said = self._telling(process, problem)
        life = ProgramLife(
            Behaviour.RIGHT, status=process.status, signals=[signal.text for signal in signals]
        )
        if read_back is not None:
            life.right, life.wrong, life.missing = read_back.right, read_back.wrong, read_back.missing
        if isinstance(problem, Ended) and problem.status == -signal.SIGBUS:
            mine = [each for each in signals if each.pid == process.pid]
            codes = [each.code for each in mine if each.is_delivered] or [each.code for each in mine]
            life.outcome = {BUS_MCEERR_AO: Behaviour.AO, BUS_MCEERR_AR: Behaviour.AR}.get(
                codes[-1] if codes else 0, Behaviour.SIGBUS
            )
        elif isinstance(problem, Ended) and problem.status < 0:
            life.outcome, life.said = Behaviour.DIES, f"{describe(problem.status)}: {said}"
        elif isinstance(problem, TimedOut):
            life.outcome, life.said = Behaviour.HANGS, str(problem)
        elif problem is not None:
            life.outcome, life.said = Behaviour.REPORTS, said or str(problem)
        elif read_back is not None and read_back.complaints:
            life.outcome, life.said = Behaviour.REPORTS, self._plain(read_back.complaints[0])
        elif read_back is not None and not read_back.complete:
            logged = [line for line in self.app.log(place, process) if LOGGED.match(line)]
            life.outcome = Behaviour.LOGGED if logged else Behaviour.WRONG
            life.said = _count(read_back)
            if logged:
                life.said += f"; log: {self._plain(self.app.stamp.sub('', logged[-1], 1))}"
        return life

    def _end(self, place: Place, life: ProgramLife) -> None:
        process = place.started[-1]
        if life.outcome is not Behaviour.HANGS and process.status is None:
            try:
                status = self.app.stop(place, process)
                self._say(f"   the program ends: {describe(status)}")
            except TimedOut as error:
                self._say(f"   the program does not end as asked: {error}")
                life.stays = True
                life.said = life.said or "does not end when asked to"
        life.status = process.status
        said = [line for line in process.output if COMPLAINT.match(line) or LOGGED.match(line)]
        for line in said[:20]:
            self._say(f"   output: {self.app.stamp.sub('', line, 1)[:300]}")
        if not place.kill_all():
            self._say("   the program cannot be killed: a process is blocked on the mount")
            self._cut_off(place)

    def _telling(self, process: Process, problem: Exception | None) -> str:
        """Return the most informative line of a program: the last complaint, or the last line."""
        lines = problem.lines if isinstance(problem, ReportedError) else process.output
        complaints = [line for line in lines if COMPLAINT.match(line) or LOGGED.match(line)]
        telling = [line for line in complaints if not line.endswith("---")] or [
            line for line in lines if line
        ]
        line = telling[-1] if telling else ""
        return self._plain(self.app.stamp.sub("", line, 1)).strip()[:300]

    def _cut_off(self, place: Place) -> None:
        """Mount again, to release processes blocked on the old mount.

        Raises DaxemuError if a process is left.
        """
        self.machine.again()
        if not place.kill_all():
            raise DaxemuError("a process of the program cannot be killed")

    def _signals(self) -> list[SeenSignal]:
        """Return each signal since the last call."""
        events = self.machine.events()
        fresh, self._events_seen = events[self._events_seen :], len(events)
        found = []
        for event in fresh:
            if event["event"] != "SignalSent":
                continue
            words = (
                f"SIGBUS {CODES.get(event['code'], event['code'])} to {event['comm']}:{event['pid']} at "
                f"{event['address']:#x}, lsb {event['lsb']}: {event['result']}"
            )
            self._say(f"   {words}")
            found.append(
                SeenSignal(event["pid"], event["code"], words, is_delivered=event["result"] == "delivered")
            )
        return found


def _count(read_back: ReadBack) -> str:
    parts = [f"{read_back.right} records right"]
    if read_back.wrong:
        parts.append(f"{read_back.wrong} wrong ({read_back.first_wrong})")
    if read_back.missing:
        parts.append(f"{read_back.missing} missing")
    return ", ".join(parts)


def main() -> int:
    """See the module."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ending)

    def put(what: Any) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(what) + b"\n")
        sys.stdout.buffer.flush()

    request = msgspec.json.decode(sys.stdin.buffer.read(), type=CellRequest)
    put(CellRun(request, put).make())
    return 0


if __name__ == "__main__":
    sys.exit(main())
