"""Start of a supervisor in the background."""

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
"""Seconds without a line from the supervisor. Loading a million files takes several."""

Tell = Callable[[int, int], None]
"""Function of the bytes that the repair strategy has brought up to date, and of all bytes to bring."""


def spawn(
    device: Path,
    mountpoint: Path,
    options: MountOptions = PLAIN,
    tell: Tell = lambda done, total: None,
) -> int:
    """Start a supervisor, wait until its mount is usable, and return the pid of the supervisor.

    Messages of the supervisor go to DEVICE/supervisor.log. ``tell`` is called with the progress of a repair
    strategy that begins. Raises NotADevice, the error with which the supervisor refused, or Busy if the
    supervisor wrote no line for PATIENCE seconds. After an error no process is left.
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
    except (FileNotFoundError, NotADirectoryError) as error:
        raise NotADevice(
            f"{device} is not a daxemu device: make one with: daxemu mkfs {device} --size 1G"
        ) from error
    except OSError as error:
        raise DaxemuError(f"the supervisor cannot be started: {error.strerror}") from error
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
    """Terminate the supervisor, which then unmounts. SIGKILL after PATIENCE seconds."""
    process.terminate()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _read(fd: int, log: PrivatePath, tell: Tell) -> dict[str, Any]:
    """Return the last line of the supervisor: ready, or refused. Raises Busy, or DaxemuError at its death."""
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
