"""Requests of the kernel that the supervisor has not answered yet."""

from __future__ import annotations

import time
from collections.abc import Callable

from daxemu.host.fuse.session import abort_file
from daxemu.host.proc.mountinfo import mount_of
from tests.support.quick import QuickMount

PATIENCE = 20.0
"""Time limit in seconds."""


def until(what: Callable[[], bool]) -> None:
    """Wait until a condition holds. Asserts after PATIENCE seconds."""
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def waiting(mount: QuickMount) -> int:
    """Return the number of requests that the supervisor has not answered."""
    return int((abort_file(mount_of(mount.path)).parent / "waiting").read_text())
