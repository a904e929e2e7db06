"""Machine of one trial: a fresh device, mount and workload directory.

Uses the command line and daxemu.client only, as a user's script would. Everything is removed afterwards.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from daxemu.client import Client
from daxemu.errors import DaxemuError
from daxemu.events.mounts import Mode
from daxemu.host.proc.mountinfo import mount_at

DAXEMU = (sys.executable, "-m", "daxemu")
PATIENCE = 90.0
"""Time limit of one command, in seconds."""
NO_PROTECTION = "none"


def daxemu(*arguments: str | Path | int) -> str:
    """Run a verb and return its stdout.

    Raises DaxemuError on a timeout (PATIENCE) or on exit status != 0; the text is the last line of the verb's
    stderr.
    """
    try:
        done = subprocess.run(
            [*DAXEMU, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired as error:
        raise DaxemuError(f"daxemu {arguments[0]} did not end within {PATIENCE:g} s") from error
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2].removeprefix("daxemu: ")
        raise DaxemuError(said or f"daxemu {arguments[0]}: exit {done.returncode}")
    return done.stdout


def start_worker(module: str) -> subprocess.Popen[bytes]:
    """Start a process for one machine; its request goes to stdin.

    The process has its own session, so Ctrl-C on the terminal signals only the parent.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


class Ending:
    """Signal handler: ends the process with status 130, but not inside a ``hold()`` section."""

    def __init__(self) -> None:
        self._holds = 0
        self._wanted = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._wanted = True
        self._end_if_free()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """Defer the end of the process until the section is left. Sections nest."""
        self._holds += 1
        try:
            yield
        finally:
            self._holds -= 1
            self._end_if_free()

    def _end_if_free(self) -> None:
        if self._wanted and not self._holds:
            self._wanted = False
            sys.exit(130)


ending = Ending()
"""The handler of a trial's process."""


class TrialMachine:
    """Device and mount of a trial.

    ``directory`` belongs to the trial; the mount point is ``directory``/mnt. ``mode``: mode of every mount of
    the device.
    """

    def __init__(self, directory: Path, device: Path, strategy: str, mode: Mode = "page cache") -> None:
        self.device = device
        self.mountpoint = directory / "mnt"
        self.strategy = strategy
        self.mode = mode

    @property
    def wrapper(self) -> tuple[str, ...]:
        """Return the command in front of a program on the mount: ``daxemu run`` on a direct mount."""
        if self.mode == "page cache":
            return ()
        return (*DAXEMU, "run", str(self.mountpoint), "--")

    def make(self, size: int, *, early_kill: bool) -> None:
        """Make the device with ``size`` bytes and mount it. Raises DaxemuError."""
        self.mountpoint.mkdir()
        daxemu("mkfs", self.device, "--size", size)
        self.mount()
        if early_kill:
            daxemu("set", self.mountpoint, "early_kill=1")

    def mount(self) -> None:
        """Mount the device with the trial's repair strategy. Raises DaxemuError."""
        # The default strategy is not passed as an option: a plan with only the default runs on every version.
        repair = [] if self.strategy == NO_PROTECTION else ["--repair", self.strategy]
        direct = ["--direct"] if self.mode == "direct" else []
        # A killed mount command may complete the mount after clear_away() ran.
        with ending.hold():
            daxemu("mount", self.device, self.mountpoint, *direct, *repair)

    def client(self) -> Client:
        """Return a connection to the supervisor. Raises NotMounted."""
        return Client.at(self.mountpoint)

    def status(self) -> dict[str, Any]:
        """Return the answer of ``daxemu status``. Raises DaxemuError."""
        with self.client() as client:
            return client.request("status")

    def again(self) -> None:
        """Unmount and mount again: the page cache is empty afterwards.

        A filesystem that was shut down is repaired in between (``fsck --repair``). Raises DaxemuError.
        """
        shut_down = self.status()["state"] == "shut down"
        daxemu("umount", self.mountpoint, "--force")
        if shut_down:
            daxemu("fsck", self.device, "--repair")
        self.mount()

    def events(self) -> list[dict[str, Any]]:
        """Return the events of all mounts of the device, oldest first."""
        return [json.loads(line) for line in daxemu("log", self.device, "--json").splitlines()]


def clear_away(directory: Path, device: Path) -> None:
    """Remove all leftovers of a trial: unmount, then delete ``directory`` and ``device``.

    Accesses no file on the mount.

    Raises DaxemuError if the mount stays.
    """
    while mount_at(directory / "mnt") is not None:
        daxemu("umount", directory / "mnt", "--force")
    for left in (device, directory):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def directories(directory: Path, device: Path) -> Iterator[None]:
    """Make ``directory``; on exit unmount and remove both ``directory`` and ``device``."""
    directory.mkdir(parents=True)
    try:
        yield
    finally:
        clear_away(directory, device)
