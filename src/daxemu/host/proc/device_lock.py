"""Holder of a device's lock: /proc/locks.

umount(8) returns before the supervisor has saved. The next opener of the device waits here until
the supervisor has ended.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
from pathlib import Path

from daxemu.errors import Busy
from daxemu.host.deadline import Deadline
from daxemu.host.proc import status
from daxemu.host.proc.mountinfo import Mount, mounts
from daxemu.host.proc.pins import named, pins_of_device

PATIENCE = 60.0
"""Seconds to wait for a supervisor to save and end."""


def wait_for_last_mount(device: Path) -> None:
    """Wait, at most PATIENCE seconds, until the supervisor of an unmounted ``device`` has ended.

    Does not wait while ``device`` is mounted here. Afterwards the device may still be locked: the caller
    takes the lock to know. Raises Busy if another mount namespace still has a mount of the device.
    """
    holder = holder_of(device)
    if holder is not None and (pins := pins_of_device(device)):
        raise Busy(
            f"{device} is still mounted as {named(pins)}: end that process, or daxemu umount --force {device}"
        )
    if holder is None or any(_same(mount.device, device) for mount in mounts()):
        return
    _wait(holder)


def end_holder(mount: Mount, deadline: Deadline, kill_patience: float) -> bool:
    """End the supervisor that holds the lock of a mount's device: by SIGTERM, and ``kill_patience`` seconds
    before the deadline by SIGKILL. Return whether the supervisor has ended. Signals a holder of the lock only
    if its effective uid is the mount's owner. Raises TimeoutError if the filesystem that holds the device
    does not answer.
    """
    if (pid := deadline.run(lambda: holder_of(mount.device), kill_patience)) is None:
        return True
    try:
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        # Second look: only after pidfd_open(2) is the pid certain to mean the same process.
        again = deadline.run(lambda: holder_of(mount.device), kill_patience)
        if again != pid or _uid_of(pid) != mount.owner:
            return False
        # SIGCONT: a supervisor that was stopped can save what no fsync had made durable.
        for signals, kept in (((signal.SIGTERM, signal.SIGCONT), kill_patience), ((signal.SIGKILL,), 0.0)):
            for number in signals:
                signal.pidfd_send_signal(process, number)
            if select.select([process], [], [], deadline.left(kept))[0]:
                return True
        return False
    except ProcessLookupError:
        return True
    finally:
        os.close(process)


def _uid_of(pid: int) -> int | None:
    """Return the effective uid of a process; None for a process that is gone."""
    try:
        return status.read(pid).euid
    except OSError:
        return None


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


def holder_of(device: Path) -> int | None:
    """Return the pid that holds the flock(2) of the device; None without a holder in this pid namespace.

    Opens no file of the device, so root may ask about the device of another user.
    """
    try:
        root = os.open(device, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return None  # the next opener of the device reports the error
    try:
        found = os.stat("lock", dir_fd=root, follow_symlinks=False)
    except OSError:
        return None
    finally:
        os.close(root)
    wanted = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
    with open("/proc/locks") as lines:
        for line in lines:
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5] == wanted and int(fields[4]) > 0:
                return int(fields[4])
    return None
