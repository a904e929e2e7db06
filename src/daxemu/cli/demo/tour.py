"""The mount of the tour, its record of promises, and the end of a mount."""

from __future__ import annotations

import os
from pathlib import Path

from daxemu.cli.demo.programs import Program
from daxemu.cli.output import say
from daxemu.client import Client
from daxemu.errors import DaxemuError
from daxemu.host.fuse.session import Session, abort_connection
from daxemu.host.proc.mountinfo import mount_at
from daxemu.uapi import PAGE_SIZE as PAGE


class Tour:
    """A mount for the tour, and the record of the checked promises."""

    def __init__(self, mountpoint: Path, scratch: Path, quiet: bool) -> None:
        self.mountpoint = mountpoint
        self.scratch = scratch
        self.checks: list[dict[str, object]] = []
        self._quiet = quiet

    def chapter(self, title: str) -> None:
        """Print the heading of a part."""
        if not self._quiet:
            say("", f"== {title}", bold=True)

    def say(self, text: str) -> None:
        """Print a line about an action or an observation."""
        if not self._quiet:
            say(f"   {text}")

    def check(self, promise: str, kept: bool) -> None:
        """Record and print a promise, kept or not."""
        self.checks.append({"promise": promise, "kept": kept})
        if not self._quiet:
            say(f"   {'ok  ' if kept else 'NOT '} {promise}", fg="green" if kept else "red")

    def request(self, op: str, **arguments: object) -> dict[str, object]:
        """Send a request to the supervisor and return the reply."""
        with Client.at(self.mountpoint) as client:
            return client.request(op, **arguments)

    def inject(self, file: Path, offset: int) -> None:
        """Poison the page at byte ``offset`` of ``file``."""
        self.say(f"$ daxemu inject {file} --offset {offset:#x}")
        self.request("inject", ino=file.stat().st_ino, ranges=[[offset, PAGE]])

    def program(self, name: str, *arguments: str | Path) -> Program:
        """Start one of the C programs of the demo."""
        return Program([str(self.scratch / name), *map(str, arguments)])


def unmount(mountpoint: Path) -> None:
    """Unmount and wait for the end of the supervisor. A mount that does not answer is cut."""
    found = mount_at(mountpoint)
    if found is None:
        return
    try:
        with Client(found) as client:
            process = os.pidfd_open(client.request("status")["pid"])
            client.request("unmount", force=True)
            os.waitid(os.P_PIDFD, process, os.WEXITED)
            os.close(process)
    except (DaxemuError, OSError):
        abort_connection(found)
    if mount_at(mountpoint) is not None:
        Session(-1, found).detach()
