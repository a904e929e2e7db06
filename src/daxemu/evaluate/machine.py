"""A fresh machine for one trial: device, mount and workload directory, and what can be done to them.

By the command line and daxemu.client only, as a user's script would. What it leaves behind is nothing.
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
from daxemu.host.mountinfo import mount_at

DAXEMU = (sys.executable, "-m", "daxemu")
PATIENCE = 90.0
"""Seconds for any one command."""
NO_PROTECTION = "none"


def daxemu(*arguments: str | Path | int) -> str:
    """Run a verb; its stdout. Raises DaxemuError with the verb's own line."""
    try:
        done = subprocess.run(
            [*DAXEMU, *map(str, arguments)],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired as error:
        raise DaxemuError(f"daxemu {arguments[0]} took more than {PATIENCE:g} s") from error
    if done.returncode:
        said = done.stderr.strip().rpartition("\n")[2].removeprefix("daxemu: ")
        raise DaxemuError(said or f"daxemu {arguments[0]}: exit {done.returncode}")
    return done.stdout


def start_worker(module: str) -> subprocess.Popen[bytes]:
    """A process of its own for one machine, told what to do on stdin. In a session of its own, so that the
    terminal's Ctrl-C reaches us alone.
    """
    return subprocess.Popen(
        [sys.executable, "-m", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


class Ending:
    """A signal handler that ends the process, but not in the middle of something that must be whole."""

    def __init__(self) -> None:
        self._holds = 0
        self._wanted = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._wanted = True
        self._end_if_free()

    @contextlib.contextmanager
    def hold(self) -> Iterator[None]:
        """What is inside is finished first."""
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
"""Of a trial's process."""


class TrialMachine:
    """``directory``: the trial's own. The device is ``device`` and the mount ``mountpoint``."""

    def __init__(self, directory: Path, device: Path, strategy: str) -> None:
        self.device = device
        self.mountpoint = directory / "mnt"
        self.strategy = strategy

    def make(self, size: int, *, early_kill: bool) -> None:
        """mkfs, mount. Raises DaxemuError."""
        self.mountpoint.mkdir()
        daxemu("mkfs", self.device, "--size", size)
        self.mount()
        if early_kill:
            daxemu("set", self.mountpoint, "early_kill=1")

    def mount(self) -> None:
        """Mount with the trial's strategy. Raises DaxemuError."""
        # Without the option for the default, so that plans with it alone run on every version.
        repair = [] if self.strategy == NO_PROTECTION else ["--repair", self.strategy]
        # A mount whose command is killed half way may come to be when everything was cleared away.
        with ending.hold():
            daxemu("mount", self.device, self.mountpoint, *repair)

    def client(self) -> Client:
        """A connection. Raises NotMounted."""
        return Client.at(self.mountpoint)

    def status(self) -> dict[str, Any]:
        """``daxemu status``. Raises DaxemuError."""
        with self.client() as client:
            return client.request("status")

    def again(self) -> None:
        """Unmount and mount, mending metadata if that was hurt: nothing is in the page cache then.

        Raises DaxemuError.
        """
        shut_down = self.status()["state"] == "shut down"
        daxemu("umount", self.mountpoint, "--force")
        if shut_down:
            daxemu("fsck", self.device, "--repair")
        self.mount()

    def events(self) -> list[dict[str, Any]]:
        """What happened in all mounts of it."""
        return [json.loads(line) for line in daxemu("log", self.device, "--json").splitlines()]


def clear_away(directory: Path, device: Path) -> None:
    """Take away what a trial may have left, without touching its mount. Raises DaxemuError if that stays."""
    while mount_at(directory / "mnt") is not None:
        daxemu("umount", directory / "mnt", "--force")
    for left in (device, directory):
        shutil.rmtree(left, ignore_errors=True)


@contextlib.contextmanager
def directories(directory: Path, device: Path) -> Iterator[None]:
    """Both exist inside, neither afterwards."""
    directory.mkdir(parents=True)
    try:
        yield
    finally:
        clear_away(directory, device)
