"""One cell of the matrix: one program in one situation, on a machine of its own, and once more afterwards.

    python -m daxemu.apps.cell     reads a Task as JSON from stdin; one JSON object a line on stdout: each
                                   Step as it happens, the Cell at the end

A process of its own, as a trial is: told to end, it takes its machine away first.
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
from typing import Any

import msgspec

from daxemu.apps.application import COMPLAINT, Application, Place, Refused, Spot
from daxemu.apps.process import Ended, Hung, Process, describe
from daxemu.apps.programs import application_called
from daxemu.apps.records import Finding
from daxemu.apps.situations import BY_NAME, Situation
from daxemu.errors import DaxemuError
from daxemu.evaluate.machine import PATIENCE, TrialMachine, daxemu, directories, ending
from daxemu.events import signalled
from daxemu.uapi import BUS_MCEERR_AO, BUS_MCEERR_AR, PAGE_SIZE

SIZE = 1 << 30
DEATH_PATIENCE = 0.5
"""Seconds that a process that was sent a signal has to die of it."""
LOGGED = re.compile(
    r"(?i).*(corrupt|checksum|could not read|i(nput)?/o(utput)? error|short read|truncat|bad file|mismatch)"
)
"""A line in a program's own log that tells of lost data."""
CODES = {BUS_MCEERR_AO: "BUS_MCEERR_AO", BUS_MCEERR_AR: "BUS_MCEERR_AR"}


class Outcome(StrEnum):
    """What became of one life of a program."""

    RIGHT = "right"
    REPORTS = "reports"
    AO = "SIGBUS AO"
    AR = "SIGBUS AR"
    SIGBUS = "SIGBUS"
    DIES = "dies"
    HANGS = "hangs"
    LOGGED = "wrong, logged"
    WRONG = "wrong"


class Step(msgspec.Struct, tag="step"):
    """One thing that happened; seconds from the start of the cell."""

    time: float
    text: str


class Life(msgspec.Struct):
    """From a start of the program to its end. ``said``: its words, if it complained, or its log's."""

    outcome: Outcome
    said: str = ""
    status: int | None = None
    right: int = 0
    wrong: int = 0
    missing: int = 0
    signals: list[str] = []
    stays: bool = False
    """It did not end when it was asked to, and was killed."""


class Cell(msgspec.Struct, tag="cell"):
    """What was seen. ``failed``: why nothing was; ``first``: under harm, ``again``: restarted after it."""

    application: str
    situation: str
    failed: str | None = None
    hurt: str = ""
    first: Life | None = None
    again: Life | None = None
    seconds: float = 0.0
    steps: list[Step] = []


class Task(msgspec.Struct):
    """A cell to be made. ``directory`` and ``device``: where, and nothing is there yet."""

    application: str
    situation: str
    limit: float
    directory: str = ""
    device: str = ""


class CellRun:
    """Makes one cell. ``tell``: is given each step."""

    def __init__(self, task: Task, tell: Callable[[Step], None]) -> None:
        self.task = task
        self.app: Application = application_called(task.application)()
        self.situation: Situation = BY_NAME[task.situation]
        self.cell = Cell(task.application, task.situation)
        self.machine = TrialMachine(Path(task.directory), Path(task.device), "none")
        self._tell = tell
        self._names = (
            (str(self.machine.mountpoint), "MOUNTPOINT"),
            (str(self.machine.mountpoint.parent / "scratch"), "SCRATCH"),
        )
        self._began = time.monotonic()
        self._events_seen = 0

    def make(self) -> Cell:
        """See Cell. Raises nothing that a cell can meet."""
        try:
            with directories(Path(self.task.directory), Path(self.task.device)):
                self._run()
        except (DaxemuError, OSError) as error:
            self.cell.failed = f"{type(error).__name__}: {error}"
            self._say(self.cell.failed)
        self.cell.seconds = time.monotonic() - self._began
        return self.cell

    def _say(self, text: str) -> None:
        step = Step(time.monotonic() - self._began, self._plain(text))
        self.cell.steps.append(step)
        self._tell(step)

    def _plain(self, text: str) -> str:
        """Without the names of this one run."""
        for path, name in self._names:
            text = text.replace(path, name)
        return text

    def _run(self) -> None:
        situation, machine = self.situation, self.machine
        machine.make(SIZE, early_kill=False)
        scratch = Path(self.task.directory) / "scratch"
        scratch.mkdir()
        root = machine.mountpoint / "data"
        root.mkdir()
        place = Place(root, scratch, self.task.limit, self.app.user, self._say)
        try:
            self._say(f"-- {self.app.name} makes its data")
            try:
                self.app.prepare(place)
                if situation.part == "journal" and not situation.live:
                    self.app.crash(place)
            except (Ended, Hung, Refused) as error:
                raise DaxemuError(f"it cannot make its data: {error}") from error
            place.kill_all()
            machine.again()
            if situation.early_kill:
                self._say(f"   $ daxemu set {machine.mountpoint} early_kill=1")
                daxemu("set", machine.mountpoint, "early_kill=1")
            harm: Callable[[Process], int] | None = None
            if situation.harm == "removal":
                harm = self._remove
            elif situation.harm != "none" and not situation.live:
                self._inject(self.app.spot(place, situation.part))
            elif situation.harm != "none":
                harm = functools.partial(self._hurt_under, place)
            self._say(f"-- {self.app.name} is started")
            self.cell.first = self._life(place, harm)
            if situation.harm == "removal":
                self._say("-- the device is back")
                machine.again()
            self._say(f"-- {self.app.name} is started again")
            self.cell.again = self._life(place, None)
        finally:
            if not place.kill_all():
                self._cut_off(place)

    def _hurt_under(self, place: Place, process: Process) -> int:
        if self.situation.part == "journal":
            self.app.dirty(place, process)
        return self._inject(self.app.spot(place, self.situation.part))

    def _inject(self, spot: Spot) -> int:
        """Return how many processes were signalled."""
        silent = self.situation.harm == "silent"
        latent = self.situation.harm == "latent"
        offset, length = spot.offset, spot.length
        if not silent:
            offset = offset // PAGE_SIZE * PAGE_SIZE
            length = min(PAGE_SIZE, spot.path.stat().st_size - offset)
        name = spot.path.relative_to(self.machine.mountpoint / "data")
        options = " --silent" if silent else " --latent" if latent else ""
        self.cell.hurt = f"{name} {offset:#x}+{length:#x} ({spot.what})"
        self._say(f"   $ daxemu inject {spot.path} --offset {offset:#x} --length {length}{options}")
        with self.machine.client() as client:
            client.set_patience(PATIENCE)
            ino = spot.path.stat().st_ino
            done = client.request(
                "inject", ino=ino, ranges=[[offset, length]], silent=silent, latent=latent, seed=1
            )
        if not done["ranges"] or done["holes"]:
            raise DaxemuError(f"there is nothing to hurt at {self.cell.hurt}")
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

    def _life(self, place: Place, harm: Callable[[Process], int] | None) -> Life:
        """Start it, read everything, harm it if it is to be harmed and read everything again, end it."""
        finding: Finding | None = None
        problem: Exception | None = None
        try:
            process = self.app.start(place)
            finding = (self.app.warm if harm else self.app.read)(place, process)
            self._say(f"   {_count(finding)}")
            if harm is not None:
                if not finding.complete:
                    raise DaxemuError(f"its data is not whole before the harm: {_count(finding)}")
                told = harm(process)
                finding = None
                if told and process.ends_within(DEATH_PATIENCE):
                    raise Ended(process.wait())
                finding = self.app.read(place, process)
                self._say(f"   {_count(finding)}")
        except (Ended, Hung, Refused) as error:
            problem = error
        if not place.started:
            raise DaxemuError(f"it cannot be started: {problem}")
        life = self._judge(place, finding, problem)
        self._end(place, life)
        shown = f": {life.said}" if life.said else ""
        self._say(f"=> {life.outcome}{shown}")
        return life

    def _judge(self, place: Place, finding: Finding | None, problem: Exception | None) -> Life:
        process = place.started[-1]
        if (finding is None or finding.complaints) and process.ends_within(DEATH_PATIENCE):
            # A client's words about a server that is gone: the server's end is what happened.
            try:
                status = process.wait()
            except Hung as error:
                problem = error
            else:
                refused = isinstance(problem, Refused) and status >= 0
                # What aborts by itself once it has told its client of the error has reported it.
                gave_up = finding is not None and status == -signal.SIGABRT
                if not refused and not gave_up:
                    problem = Ended(status)
        signals = self._signals()
        said = self._telling(process, problem)
        life = Life(Outcome.RIGHT, status=process.status, signals=[text for _, _, text in signals])
        if finding is not None:
            life.right, life.wrong, life.missing = finding.right, finding.wrong, finding.missing
        if isinstance(problem, Ended) and problem.status == -signal.SIGBUS:
            codes = [code for pid, code, _ in signals if pid == process.pid]
            life.outcome = {BUS_MCEERR_AO: Outcome.AO, BUS_MCEERR_AR: Outcome.AR}.get(
                codes[-1] if codes else 0, Outcome.SIGBUS
            )
        elif isinstance(problem, Ended) and problem.status < 0:
            life.outcome, life.said = Outcome.DIES, f"{describe(problem.status)}: {said}"
        elif isinstance(problem, Hung):
            life.outcome, life.said = Outcome.HANGS, str(problem)
        elif problem is not None:
            life.outcome, life.said = Outcome.REPORTS, said or str(problem)
        elif finding is not None and finding.complaints:
            life.outcome, life.said = Outcome.REPORTS, self._plain(finding.complaints[0])
        elif finding is not None and not finding.complete:
            logged = [line for line in self.app.log(place, process) if LOGGED.match(line)]
            life.outcome = Outcome.LOGGED if logged else Outcome.WRONG
            life.said = _count(finding)
            if logged:
                life.said += f"; its log: {self._plain(self.app.stamp.sub('', logged[-1], 1))}"
        return life

    def _end(self, place: Place, life: Life) -> None:
        process = place.started[-1]
        if life.outcome is not Outcome.HANGS and process.status is None:
            try:
                status = self.app.stop(place, process)
                self._say(f"   it ends: {describe(status)}")
            except Hung as error:
                self._say(f"   it does not end as asked: {error}")
                life.stays = True
                life.said = life.said or "does not end when it is asked to"
        life.status = process.status
        said = [line for line in process.output if COMPLAINT.match(line) or LOGGED.match(line)]
        for line in said[:20]:
            self._say(f"   it says: {self.app.stamp.sub('', line, 1)[:300]}")
        if not place.kill_all():
            self._say("   it cannot be killed: it waits on the mount")
            self._cut_off(place)

    def _telling(self, process: Process, problem: Exception | None) -> str:
        """The line that says most about a problem: the last complaint, or the last line."""
        lines = problem.lines if isinstance(problem, Refused) else process.output
        complaints = [line for line in lines if COMPLAINT.match(line) or LOGGED.match(line)]
        telling = [line for line in complaints if not line.endswith("---")] or [
            line for line in lines if line
        ]
        line = telling[-1] if telling else ""
        return self._plain(self.app.stamp.sub("", line, 1)).strip()[:300]

    def _cut_off(self, place: Place) -> None:
        """Let go who waits on the mount for ever; the next life gets a new one."""
        self.machine.again()
        if not place.kill_all():
            raise DaxemuError("a process is left that cannot be killed")

    def _signals(self) -> list[tuple[int, int, str]]:
        """(pid, code, in words) of each signal since this was last asked."""
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
            found.append((event["pid"], event["code"], words))
        return found


def _count(finding: Finding) -> str:
    parts = [f"{finding.right} records right"]
    if finding.wrong:
        parts.append(f"{finding.wrong} wrong ({finding.first_wrong})")
    if finding.missing:
        parts.append(f"{finding.missing} missing")
    return ", ".join(parts)


def main() -> int:
    """See the module."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ending)

    def put(what: Any) -> None:
        sys.stdout.buffer.write(msgspec.json.encode(what) + b"\n")
        sys.stdout.buffer.flush()

    task = msgspec.json.decode(sys.stdin.buffer.read(), type=Task)
    put(CellRun(task, put).make())
    return 0


if __name__ == "__main__":
    sys.exit(main())
