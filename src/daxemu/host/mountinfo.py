"""Which daxemu mounts there are, and which one a path is on: /proc/self/mountinfo.

Nothing here touches a mount, so nothing here can hang on one. Standard library only, for the client.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from daxemu.errors import NotMounted

FS_TYPE = "fuse.daxemu"
SOURCE_PREFIX = "daxemu:"
_MAX_LINKS = 40  # as the kernel's MAXSYMLINKS


class Mount(NamedTuple):
    """One daxemu mount. ``dev`` is what st_dev and /proc/PID/maps show of its files: (major, minor)."""

    mountpoint: Path
    device: Path
    dev: tuple[int, int]

    @property
    def socket(self) -> Path:
        """The supervisor's control socket."""
        return self.device / "control.sock"


def _unescape(field: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)


def printable(path: Path) -> str:
    """A path for people and for JSON: bytes that are no UTF-8 are shown as ``\\xff``."""
    return os.fsencode(path).decode(errors="backslashreplace")


def mounts() -> list[Mount]:
    """Every daxemu mount in this mount namespace, in the order they were made."""
    found = []
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            fields = line.split()
            tail = fields[fields.index("-") + 1 :]
            source = _unescape(tail[1])
            if tail[0] == FS_TYPE and source.startswith(SOURCE_PREFIX):
                major, minor = (int(n) for n in fields[2].split(":"))
                device = Path(source.removeprefix(SOURCE_PREFIX))
                found.append(Mount(Path(_unescape(fields[4])), device, (major, minor)))
    return found


def mount_at(mountpoint: Path) -> Mount | None:
    """The topmost daxemu mount at exactly this path."""
    wanted = Path(os.path.abspath(mountpoint))
    return next((m for m in reversed(mounts()) if m.mountpoint == wanted), None)


def mount_of(path: Path) -> Mount:
    """The mount that holds ``path``, which need not exist. Raises NotMounted.

    Symbolic links are followed as long as they are outside of every daxemu mount; nothing on one is touched,
    since it may hang.
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
    """The innermost mount whose mountpoint is ``path`` or above it; of several on one mountpoint, the
    topmost.
    """
    holding = [m for m in mounts() if m.mountpoint == path or m.mountpoint in path.parents]
    return max(reversed(holding), key=lambda mount: len(mount.mountpoint.parts), default=None)
