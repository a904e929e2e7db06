"""Mounts for tests: made fresh, checked with fsck afterwards, removed in any case."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daxemu.client import Client
from daxemu.host.fuse.session import Session, abort_connection
from daxemu.host.proc.mountinfo import mount_at
from tests.support import kinds
from tests.support.zygote import forking_zygote

DAXEMU = (sys.executable, "-m", "daxemu")
"""Command that starts a Python of its own. ``daxemu`` below is quicker."""
PATIENCE = 30.0
"""Time limit of one command in seconds. A hang fails the test."""


@dataclass
class DaxMount:
    """Mount of ``device`` at ``path``. ``sound``: fsck at the end must find no problem. ``is_direct``:
    mounted with --direct, so actors of a scene are programs under ``daxemu run``.
    """

    device: Path
    path: Path
    sound: bool = True
    is_direct: bool = False

    @property
    def wrapper(self) -> list[str]:
        """Return the words before a command that maps files: ``daxemu run`` on a direct mount."""
        return [*DAXEMU, "run", str(self.path), "--"] if self.is_direct else []

    def run(self, *arguments: str | Path | int, status: int = 0) -> str:
        """Run ``daxemu ARGUMENTS``; return stdout, or stderr if ``status`` is not 0."""
        return daxemu(*arguments, status=status)

    def json(self, *arguments: str | Path | int) -> Any:
        """Run ``daxemu ARGUMENTS --json``; return the parsed answer."""
        return json.loads(self.run(*arguments, "--json"))

    def inject(self, name: str, *ranges: tuple[int, int], latent: bool = False) -> Any:
        """Poison byte ranges (offset, length) of a file in one call."""
        spans = [word for offset, length in ranges for word in ("--offset", offset, "--length", length)]
        return self.json("inject", self.path / name, *spans, *(["--latent"] if latent else []))

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """Return the events of this mount so far: of one kind, or all."""
        lines = self.run("log", self.path, "--json").splitlines()
        return [e for e in map(json.loads, lines) if kind is None or e["event"] == kind]

    def client(self) -> Client:
        """Return a connection to the supervisor."""
        return Client.at(self.path)

    def mount(self, *options: str) -> None:
        """Mount the device."""
        kinds.require("mount")
        self.is_direct = "--direct" in options
        self.run("mount", *options, self.device, self.path)

    def mount_again(self) -> None:
        """Mount the device in the mode of the last mount."""
        self.mount(*(["--direct"] if self.is_direct else []))

    def umount(self, *options: str) -> None:
        """Unmount the device."""
        self.run("umount", *options, self.path)

    def make_file(self, name: str, pages: int, first: str = "A") -> Path:
        """Make a file on the media, as ``mkfile`` of the recordings does.

        Every byte of page i is the letter ``first`` + i.
        """
        path = self.path / name
        letters = (chr(ord("A") + (ord(first) - ord("A") + i) % 26) for i in range(pages))
        path.write_bytes(b"".join(letter.encode() * 4096 for letter in letters))
        return path


def daxemu(*arguments: str | Path | int, status: int = 0) -> str:
    """Run ``daxemu ARGUMENTS``, forked where possible, and assert exit status ``status``.

    Return stdout, or stderr if ``status`` is not 0.
    """
    done = finished(*arguments)
    stdout, stderr = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == status, f"daxemu {arguments}: exit {done.returncode}\n{stdout}{stderr}"
    return stderr if status else stdout


def finished(*arguments: str | bytes | Path | int) -> subprocess.CompletedProcess[bytes]:
    """Run ``daxemu ARGUMENTS``, forked where possible. Return the result, whatever the exit status."""
    words = [str(each) if isinstance(each, int) else os.fsdecode(each) for each in arguments]
    if (zygote := forking_zygote()) is not None:
        return zygote.daxemu(words, PATIENCE)
    return subprocess.run([*DAXEMU, *words], capture_output=True, timeout=PATIENCE, check=False)


@contextmanager
def dax_mount_at(
    directory: Path, size: str = "1G", *options: str, mount: bool = True, shm: Path = Path("/dev/shm")
) -> Iterator[DaxMount]:
    """Make a device of ``size`` in shared memory and mount it below ``directory``.

    ``options``: more options of mkfs. ``shm``: the tmpfs of the device.
    """
    device = shm / f"daxemu-test-{os.getpid()}-{uuid.uuid4().hex[:8]}"
    path = directory / "mnt"
    path.mkdir()
    made = DaxMount(device, path)
    try:
        daxemu("mkfs", device, "--size", size, *options)
        if mount:
            made.mount()
        yield made
        if mount_at(path) is not None:
            made.umount("--force")
        if made.sound:
            daxemu("fsck", device)
    finally:
        clear_away(path)
        shutil.rmtree(device, ignore_errors=True)


def clear_away(path: Path) -> None:
    """Detach a mount that may hang. The connection is aborted first, to release blocked processes."""
    while (left := mount_at(path)) is not None:
        abort_connection(left)
        Session(-1, left).detach()
