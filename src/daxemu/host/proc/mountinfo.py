"""daxemu mounts, and the mount that holds a path: /proc/self/mountinfo.

No function here touches a mount, so no function can hang on a mount. Standard library only, for the client.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from daxemu.errors import NotMounted
from daxemu.text import name_text

FS_TYPE = "fuse.daxemu"
SOURCE_PREFIX = "daxemu:"
_MAX_LINKS = 40  # as the kernel's MAXSYMLINKS


class Mount(NamedTuple):
    """One daxemu mount. ``dev``: (major, minor) of the files in st_dev and /proc/PID/maps. ``owner``: uid of
    the mounting user, from the kernel (``user_id=``); None: not known.
    """

    mountpoint: Path
    device: Path
    dev: tuple[int, int]
    owner: int | None = None
    id: int = 0
    """The kernel's number of this one mount; each copy of the mount has another."""

    @property
    def socket(self) -> Path:
        """The supervisor's control socket."""
        return self.device / "control.sock"


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def printable(path: Path) -> str:
    """Return a path for JSON and for messages: see daxemu.text.name_text."""
    return name_text(path)


def mounts(process: int | str = "self") -> list[Mount]:
    """Return every daxemu mount in the mount namespace of ``process``, oldest first. Raises OSError if /proc
    does not show the process.
    """
    with open(f"/proc/{process}/mountinfo", "rb") as lines:
        return [mount for line in lines if (mount := _parse(line)) is not None]


def _parse(line: bytes) -> Mount | None:
    """Parse one line of mountinfo; None for another filesystem. Split at single spaces: the kernel escapes
    spaces within a field, but no other character of Python's whitespace.
    """
    fields = os.fsdecode(line).rstrip("\n").split(" ")
    fs_type, escaped, options = fields[fields.index("-") + 1 :][:3]
    source = _unescape(escaped)
    if fs_type != FS_TYPE or not source.startswith(SOURCE_PREFIX):
        return None
    major, minor = (int(n) for n in fields[2].split(":"))
    uids = [option.removeprefix("user_id=") for option in options.split(",") if option.startswith("user_id=")]
    owner = int(uids[0]) if uids else None
    device = Path(source.removeprefix(SOURCE_PREFIX))
    return Mount(Path(_unescape(fields[4])), device, (major, minor), owner, int(fields[0]))


def mount_at(mountpoint: Path) -> Mount | None:
    """Return the topmost daxemu mount at exactly this path; None without one."""
    wanted = Path(os.path.abspath(mountpoint))
    return next((m for m in reversed(mounts()) if m.mountpoint == wanted), None)


def mount_of(path: Path) -> Mount:
    """Return the mount that holds ``path``, which need not exist. Raises NotMounted.

    Symbolic links outside of all daxemu mounts are followed. No file on a daxemu mount is touched, since a
    mount may hang.
    """
    at = Path(os.path.abspath(path))
    for _ in range(_MAX_LINKS):
        # The parent is resolved: a link in it may lead onto a mount.
        for candidate in (at, Path(os.path.realpath(at.parent)) / at.name):
            if (found := _holding(candidate)) is not None:
                return found
        try:
            at = Path(os.path.abspath(at.parent / at.readlink()))
        except OSError:
            break  # no link, so nothing more to follow
    raise NotMounted(f"{path} is not on a daxemu mount: see daxemu status, or make one with daxemu mount")


def _holding(path: Path) -> Mount | None:
    """Return the innermost mount whose mountpoint is ``path`` or above; of several on one mountpoint, the
    topmost.
    """
    holding = [m for m in mounts() if m.mountpoint == path or m.mountpoint in path.parents]
    return max(reversed(holding), key=lambda mount: len(mount.mountpoint.parts), default=None)
