"""Copies of a mount, in other mount namespaces or bound elsewhere. Each keeps the FUSE connection alive."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from daxemu.host.proc.mountinfo import Mount, mounts
from daxemu.host.proc.processes import read_comm
from daxemu.text import name_text

MOST_NAMED = 3
"""Number of copies named in a message."""


class Pin(NamedTuple):
    """Copy of a mount, with one process that sees the copy."""

    pid: int
    comm: str
    mount: Mount


def copies() -> Iterator[Pin]:
    """Yield every daxemu mount of every mount namespace in use, with one process of the namespace."""
    seen: set[str] = set()
    known: set[int] = set()
    for pid in ["self", *sorted(filter(str.isdigit, os.listdir("/proc")), key=int)]:
        try:
            namespace = str(Path(f"/proc/{pid}/ns/mnt").readlink())
        except OSError:
            namespace = ""  # another user's process: only mounts with new ids count
        if namespace in seen:
            continue
        try:
            found = mounts(pid)
            comm = read_comm(pid)
        except OSError:
            continue  # the process ended meanwhile
        if namespace:
            seen.add(namespace)
        for mount in found:
            if mount.id not in known:
                known.add(mount.id)
                yield Pin(os.getpid() if pid == "self" else int(pid), comm, mount)


def pins_of(mount: Mount) -> list[Pin]:
    """Return the copies of ``mount`` besides ``mount`` itself."""
    return [pin for pin in copies() if pin.mount.dev == mount.dev and pin.mount.id != mount.id]


def pins_of_device(device: Path) -> list[Pin]:
    """Return the mounts of a device in other mount namespaces than the caller's."""
    here = {mount.id for mount in mounts()}
    wanted = Path(os.path.abspath(device))
    return [pin for pin in copies() if pin.mount.id not in here and pin.mount.device == wanted]


def named(pins: Iterable[Pin]) -> str:
    """Return a text about copies for a message: mountpoint and process of each, of the first MOST_NAMED."""
    all_of_them = list(pins)
    shown = [
        f"{name_text(pin.mount.mountpoint)} in the mount namespace of pid {pin.pid} ({pin.comm})"
        for pin in all_of_them[:MOST_NAMED]
    ]
    more = len(all_of_them) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")
