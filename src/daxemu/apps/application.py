"""Interface of a program under test, and the environment of its processes."""

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

from daxemu.apps.process import Process, TimedOut, no_core
from daxemu.apps.records import DATA_TARGET, HEAD, JOURNAL_TARGET, ReadBack, text
from daxemu.apps.situations import Part
from daxemu.errors import DaxemuError
from daxemu.evaluate.machine import DAXEMU

COMPLAINT = re.compile(
    r"(?i)(?!\t).*\b"
    r"(error|fatal|panic|exception|cannot|can't|could not|failed|malformed|corrupt\w*|invalid)\b"
)
"""Line of output reporting an error. A line that begins with a tab is part of a stack trace."""


class Needs(NamedTuple):
    """Packages and files a program needs.

    ``programs``: found in PATH. ``modules``: Python modules. ``headers``: C headers. ``build``: Debian
    packages to compile a driver with. ``version``: command printing the version, where the package version is
    not enough.
    """

    debian: tuple[str, ...] = ()
    pypi: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    build: tuple[str, ...] = ()
    version: tuple[str, ...] = ()


class Spot(NamedTuple):
    """Target of an injection: bytes of a file. ``what``: description of the bytes."""

    path: Path
    offset: int
    length: int
    what: str


class ReportedError(Exception):
    """A program reported unusable data. ``lines``: the program's messages."""

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines[-3:]))
        self.lines = list(lines)


class Place:
    """Environment of a program.

    ``root``: directory on the mount. ``scratch``: directory off the mount. ``user``: user for the processes
    if daxemu runs as root; None: no change of user. ``wrapper``: verb of daxemu in front of every command.
    """

    def __init__(
        self,
        root: Path,
        scratch: Path,
        limit: float,
        user: str | None,
        say: Callable[[str], None],
        wrapper: Sequence[str] = (),
    ) -> None:
        self.root = root
        self.scratch = scratch
        self.limit = limit
        self.say = say
        self.started: list[Process] = []
        self._before = list(wrapper)
        self._shown = f"daxemu {' '.join(wrapper[len(DAXEMU) :])} " if wrapper else ""
        if user is not None and os.geteuid() == 0:
            self._before += ["setpriv", f"--reuid={user}", f"--regid={user}", "--init-groups"]
            scratch.parent.chmod(0o755)  # independent of the umask
            for directory in (root, scratch):
                shutil.chown(directory, user, user)

    def _command(self, argv: Sequence[str | Path]) -> list[str]:
        words = [str(word) for word in argv]
        self.say(f"   $ {self._shown}{' '.join(words)}")
        return self._before + words

    @property
    def _environment(self) -> dict[str, str]:
        return {**os.environ, "HOME": str(self.scratch), "LC_ALL": "C.UTF-8", "TZ": "UTC"}

    def start(self, argv: Sequence[str | Path]) -> Process:
        """Start a program."""
        process = Process(self._command(argv), self.limit, self.scratch, self._environment)
        self.started.append(process)
        return process

    def ask(self, argv: Sequence[str | Path], given: str = "") -> tuple[int, list[str]]:
        """Run a command to its end with ``given`` as stdin.

        Return exit status and output lines. Raises TimedOut.
        """
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
            raise TimedOut(f"{argv[0]}: did not end within {self.limit:g} s") from error
        finally:
            process.kill()
        return process.returncode, output.decode(errors="backslashreplace").splitlines()

    def make(self, argv: Sequence[str | Path], given: str = "") -> list[str]:
        """Run a command that must succeed; return output lines. Raises DaxemuError, TimedOut."""
        status, output = self.ask(argv, given)
        if status:
            raise DaxemuError(f"{Path(argv[0]).name} ended with status {status}: {' '.join(output[-3:])}")
        return output

    def compile(self, source: str, *libraries: str, options: Sequence[str] = ()) -> Path:
        """Compile a driver of drivers/ and return its path. Raises DaxemuError, TimedOut."""
        program = self.scratch / source.partition(".")[0]
        if not program.exists():
            linked = [f"-l{name}" for name in libraries]
            self.make(["gcc", "-O1", *options, "-o", program, driver(source), *linked])
        return program

    def kill_all(self) -> bool:
        """Kill all started processes. Return False if a process is left."""
        self.started = [process for process in self.started if not process.kill()]
        return not self.started


def driver(name: str) -> Path:
    """Return the path of a file in drivers/."""
    return Path(str(resources.files("daxemu.apps") / "drivers" / name))


def python_driver(name: str) -> list[str | Path]:
    """Return the beginning of the command line of a Python driver."""
    return [sys.executable, driver(name)]


class Application(abc.ABC):
    """Program under test. An object lives as long as one cell.

    Methods that run the program raise Ended, TimedOut, ReportedError.
    """

    name: ClassVar[str]
    about: ClassVar[str]
    """One line: program, configuration, access to the data."""
    note: ClassVar[str]
    """The design property explaining the observed behaviour: a sentence or two."""
    needs: ClassVar[Needs]
    journal: ClassVar[str] = ""
    """Description of the journal; empty if the program has none."""
    user: ClassVar[str | None] = None
    stamp: ClassVar[re.Pattern[str]] = re.compile("")
    """Prefix of every log line (time, process), removed in reports."""

    @abc.abstractmethod
    def prepare(self, place: Place) -> None:
        """Have the program make its data.

        A program with a lasting journal leaves record JOURNAL_TARGET in the journal. Raises DaxemuError.
        """

    def crash(self, place: Place) -> None:
        """Leave a journal behind. Called before an injection into the journal of a stopped program."""
        return

    @abc.abstractmethod
    def spot(self, place: Place, part: Part) -> Spot:
        """Return the target of an injection. Called before the injection, while all data is readable."""

    @abc.abstractmethod
    def start(self, place: Place) -> Process:
        """Start the program. Its data is open when start() returns."""

    @abc.abstractmethod
    def read(self, place: Place, process: Process) -> ReadBack:
        """Have the program read everything. Return the comparison with the records written."""

    def warm(self, place: Place, process: Process) -> ReadBack:
        """Have the program access all its data, before an injection into the running program."""
        return self.read(place, process)

    def dirty(self, place: Place, process: Process) -> None:
        """Have the program write to its journal again.

        Called before an injection into the journal of the running program.
        """
        return

    def log(self, place: Place, process: Process) -> list[str]:
        """Return the lines of the program's log so far."""
        return process.output

    def stop(self, place: Place, process: Process) -> int:
        """End the program as its manual says. Return the exit status, or minus the signal."""
        return process.end()


def find_record(number: int, files: Sequence[Path]) -> Spot:
    """Return the place of a record's text in one of ``files``. Raises DaxemuError if the text is in none."""
    needle = text(number)[: HEAD + 40].encode()
    for path in files:
        at = path.read_bytes().find(needle)
        if at >= 0:
            return Spot(path, at + HEAD + 16, 16, f"record {number}")
    raise DaxemuError(f"record {number} is in none of {', '.join(path.name for path in files)}")


def number_of(part: Part) -> int:
    """Return the number of the target record of a part."""
    return JOURNAL_TARGET if part == "journal" else DATA_TARGET
