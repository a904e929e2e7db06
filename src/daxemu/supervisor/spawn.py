"""Starts a supervisor in the background and waits until its mount is usable."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from daxemu.errors import ERRORS, Busy, DaxemuError, NotADevice
from daxemu.private_path import PrivatePath
from daxemu.supervisor.settings import PLAIN, MountOptions

PATIENCE = 60.0
"""Seconds to wait for a sign of life; loading a million files takes some."""

Tell = Callable[[int, int], None]
"""(bytes that the repair strategy has seen to, of how many)."""


def spawn(
    device: Path,
    mountpoint: Path,
    options: MountOptions = PLAIN,
    tell: Tell = lambda done, total: None,
) -> int:
    """Mount in the background; returns the supervisor's pid. Its messages go to DEVICE/supervisor.log.
    ``tell`` hears how far a repair strategy is that copies, or adds up, what is there.

    Raises what the supervisor refused with, Busy if it says nothing for long; no process is left then.
    """
    root = PrivatePath.at(device)
    log = root / "supervisor.log"
    ours, theirs = os.pipe()
    try:
        with open(log.open(os.O_WRONLY | os.O_APPEND, create=True), "ab") as output:
            arguments = [str(device), str(mountpoint), str(theirs), msgspec.json.encode(options).decode()]
            process = subprocess.Popen(
                [sys.executable, "-m", "daxemu.supervisor", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs,),
                start_new_session=True,
                cwd="/",
            )
    except OSError as error:
        raise NotADevice(
            f"{device} is not a daxemu device: make one with: daxemu mkfs {device} --size 1G"
        ) from error
    finally:
        os.close(theirs)
        root.close()
    try:
        reply = _read(ours, log, tell)
    except BaseException:
        _end(process)
        raise
    finally:
        os.close(ours)
    if not reply["ok"]:
        process.wait()
        raise ERRORS.get(reply["error"], DaxemuError)(reply["message"])
    return process.pid


def _end(process: subprocess.Popen[bytes]) -> None:
    """Whoever waited does so no more: it unmounts what it may have mounted by now."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _read(fd: int, log: PrivatePath, tell: Tell) -> dict[str, Any]:
    """What the supervisor says when it is ready. Raises DaxemuError if it died before."""
    rest = b""
    while True:
        ready, _, _ = select.select([fd], [], [], PATIENCE)
        if not ready:
            raise Busy(f"the supervisor said nothing for {PATIENCE:g} s, and was ended: see {log}")
        chunk = os.read(fd, 1 << 16)
        if not chunk:
            raise DaxemuError(f"the supervisor ended at once: see {log}")
        *lines, rest = (rest + chunk).split(b"\n")
        for said in map(json.loads, lines):
            if "ok" in said:
                found: dict[str, Any] = said
                return found
            tell(said["done_bytes"], said["total_bytes"])
