"""Which process holds a device's lock: /proc/locks.

umount(8) returns before the supervisor has saved. Whoever wants the device next waits for it here.
"""

from __future__ import annotations

import contextlib
import os
import select
from pathlib import Path

from daxemu.errors import DaxemuError
from daxemu.host.mountinfo import mounts
from daxemu.private_path import PrivatePath

PATIENCE = 60.0
"""Seconds to wait for a supervisor to save and end."""


def wait_for_last_mount(device: Path) -> None:
    """Wait until a supervisor whose mount is gone has let go of ``device``; not while it is mounted.

    Whether the device is free then, its lock tells.
    """
    holder = _holder(device)
    if holder is None or any(_same(mount.device, device) for mount in mounts()):
        return
    _wait(holder)


def _wait(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        process = os.pidfd_open(pid)
        try:
            select.select([process], [], [], PATIENCE)
        finally:
            os.close(process)


def _same(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except OSError:
        return False


def _holder(device: Path) -> int | None:
    """The pid that has flock(2)ed the device; None if none has, or none that this pid namespace sees."""
    try:
        root = PrivatePath.at(device)
        found = (root / "lock").lstat()
        root.close()
    except (OSError, DaxemuError):
        return None  # whoever opens the device next says what is wrong
    wanted = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with open("/proc/locks") as lines:
        for line in lines:
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5] == wanted and int(fields[4]) > 0:
                return int(fields[4])
    return None
