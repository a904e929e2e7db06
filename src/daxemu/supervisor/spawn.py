"""Starts a supervisor in the background and waits until its mount is usable."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
from pathlib import Path

import msgspec

from daxemu.errors import ERRORS, DaxemuError, NotADevice
from daxemu.supervisor.settings import PLAIN, MountOptions

PATIENCE = 60.0
"""Seconds to wait for the mount; loading a million files takes some."""


def spawn(device: Path, mountpoint: Path, options: MountOptions = PLAIN) -> int:
    """Mount in the background; returns the supervisor's pid. Its messages go to DEVICE/supervisor.log.

    Raises what the supervisor refused with; no process is left then.
    """
    log = device / "supervisor.log"
    ours, theirs = os.pipe()
    try:
        with open(log, "ab") as output:
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
    try:
        answer = _read(ours, process)
    finally:
        os.close(ours)
    if not answer:
        process.kill()
        process.wait()
        raise DaxemuError(f"the supervisor ended at once: see {log}")
    reply = json.loads(answer)
    if not reply["ok"]:
        process.wait()
        raise ERRORS.get(reply["error"], DaxemuError)(reply["message"])
    return process.pid


def _read(fd: int, process: subprocess.Popen[bytes]) -> bytes:
    """What the supervisor says when it is ready: nothing if it died, or took too long."""
    ready, _, _ = select.select([fd], [], [], PATIENCE)
    return os.read(fd, 1 << 16) if ready else b""
