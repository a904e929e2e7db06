"""What a program must bring to be put into situations, and the place where it runs."""

from __future__ import annotations

import abc
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import ClassVar, NamedTuple

from daxemu.apps.process import Hung, Process, no_core
from daxemu.apps.records import HEAD, HURT, HURT_LATE, Finding, text
from daxemu.apps.situations import Part
from daxemu.errors import DaxemuError

COMPLAINT = re.compile(
    r"(?i).*\b(error|fatal|panic|exception|cannot|can't|could not|failed|malformed|corrupt\w*|invalid)\b"
)
"""A line by which a program tells of something wrong."""


class Needs(NamedTuple):
    """What must be installed. ``programs``: found in PATH; ``modules``: of Python; ``headers``: C's;
    ``build``: Debian packages of what a driver is compiled with; ``version``: a command that prints the
    version, where that of the package does not.
    """

    debian: tuple[str, ...] = ()
    pypi: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    build: tuple[str, ...] = ()
    version: tuple[str, ...] = ()


class Spot(NamedTuple):
    """Where to hurt: bytes of a file, of which ``what`` says what they are."""

    path: Path
    offset: int
    length: int
    what: str


class Refused(Exception):
    """The program says that it cannot work with what it found. ``lines``: its words."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines[-3:]))
        self.lines = list(lines)


class Place:
    """Where a program runs. ``root``: its directory on the mount; ``scratch``: one elsewhere; ``user``: as
    whom, if we are root and it must not be.
    """

    def __init__(
        self, root: Path, scratch: Path, limit: float, user: str | None, say: Callable[[str], None]
    ) -> None:
        self.root = root
        self.scratch = scratch
        self.limit = limit
        self.say = say
        self.started: list[Process] = []
        self._become: list[str] = []
        if user is not None and os.geteuid() == 0:
            self._become = ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
            scratch.parent.chmod(0o755)  # whatever our umask is
            for directory in (root, scratch):
                shutil.chown(directory, user, user)

    def _command(self, argv: Sequence[str | Path]) -> list[str]:
        words = [str(word) for word in argv]
        self.say(f"   $ {' '.join(words)}")
        return self._become + words

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "HOME": str(self.scratch), "LC_ALL": "C.UTF-8", "TZ": "UTC"}

    def start(self, argv: Sequence[str | Path]) -> Process:
        """Start a program."""
        process = Process(self._command(argv), self.limit, self.scratch, self._environment)
        self.started.append(process)
        return process

    def ask(self, argv: Sequence[str | Path], given: str = "") -> tuple[int, list[str]]:
        """Run a command to its end: its status, and the lines that it printed. Raises Hung."""
        process = subprocess.Popen(
            self._command(argv),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.scratch,
            env=self._environment,
            start_new_session=True,
            preexec_fn=no_core,
        )
        try:
            output, _ = process.communicate(given.encode(), self.limit)
        except subprocess.TimeoutExpired as error:
            raise Hung(f"{argv[0]}: nothing for {self.limit:g} s") from error
        finally:
            process.kill()
        return process.returncode, output.decode(errors="backslashreplace").splitlines()

    def make(self, argv: Sequence[str | Path], given: str = "") -> list[str]:
        """The same of what must succeed. Raises DaxemuError."""
        status, output = self.ask(argv, given)
        if status:
            raise DaxemuError(f"{Path(argv[0]).name} ended with status {status}: {' '.join(output[-3:])}")
        return output

    def compile(self, source: str, *libraries: str, options: Sequence[str] = ()) -> Path:
        """A program of drivers/, compiled. Raises DaxemuError."""
        program = self.scratch / source.partition(".")[0]
        if not program.exists():
            linked = [f"-l{name}" for name in libraries]
            self.make(["gcc", "-O1", *options, "-o", program, driver(source), *linked])
        return program

    def kill_all(self) -> bool:
        """Kill what was started; whether all is gone."""
        self.started = [process for process in self.started if not process.kill()]
        return not self.started


def driver(name: str) -> Path:
    """A file of drivers/."""
    return Path(str(resources.files("daxemu.apps") / "drivers" / name))


def python_driver(name: str) -> list[str | Path]:
    """The command line that a driver in Python begins with."""
    return [sys.executable, driver(name)]


class Application(abc.ABC):
    """One program; an object lives as long as one cell. Methods that run it raise Ended, Hung, Refused."""

    name: ClassVar[str]
    about: ClassVar[str]
    """One line: which program, how it is set up, how it gets at its data."""
    note: ClassVar[str]
    """What of its design explains what is seen of it: a sentence or two."""
    needs: ClassVar[Needs]
    journal: ClassVar[str] = ""
    """What it has for a journal; empty if it has none."""
    user: ClassVar[str | None] = None
    stamp: ClassVar[re.Pattern[str]] = re.compile("")
    """What each line of its log begins with and nobody needs."""

    @abc.abstractmethod
    def prepare(self, place: Place) -> None:
        """Have the program make its data, and leave a journal with HURT_LATE if it has one that stays.
        Raises DaxemuError.
        """

    def crash(self, place: Place) -> None:
        """Before the journal is hurt: whatever it takes for a journal to be left."""
        return

    @abc.abstractmethod
    def spot(self, place: Place, part: Part) -> Spot:
        """What to hurt. Nothing was hurt yet."""

    @abc.abstractmethod
    def start(self, place: Place) -> Process:
        """Start it; it has opened its data when this returns."""

    @abc.abstractmethod
    def read(self, place: Place, process: Process) -> Finding:
        """Have it read everything."""

    def warm(self, place: Place, process: Process) -> Finding:
        """Before it is hurt while it runs: have it touch all of its data."""
        return self.read(place, process)

    def dirty(self, place: Place, process: Process) -> None:
        """Before the journal is hurt under it: whatever it takes for the journal to hold something again."""
        return

    def log(self, place: Place, process: Process) -> list[str]:
        """What it has written to its log so far."""
        return process.output

    def stop(self, place: Place, process: Process) -> int:
        """End it as its manual says; how it ended."""
        return process.end()


def find_record(number: int, files: Sequence[Path]) -> Spot:
    """The place of a record's text in one of ``files``. Raises DaxemuError."""
    needle = text(number)[: HEAD + 40].encode()
    for path in files:
        at = path.read_bytes().find(needle)
        if at >= 0:
            return Spot(path, at + HEAD + 16, 16, f"record {number}")
    raise DaxemuError(f"record {number} is in none of {', '.join(path.name for path in files)}")


def number_of(part: Part) -> int:
    """Which record is hurt."""
    return HURT_LATE if part == "journal" else HURT
