"""Log lines, counters and bad blocks of a mount after a step, in the recordings' form; and settings that make
the mount as similar to DAX as possible.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path

from daxemu.client import Client
from daxemu.events import decode
from daxemu.uapi import BUS_MCEERR_AR

SETTLE = 2.0
"""Seconds to wait for the supervisor's account of what a process saw already."""


class Journal:
    """Reader of the events of one device."""

    def __init__(self, device: Path, client: Client) -> None:
        self._path = device / "events.jsonl"
        self._client = client
        self._read = self._path.stat().st_size
        self._lines: list[str] = []
        self._owed = 0
        """BUS_MCEERR_AR that processes saw, less those that the log told of."""
        self._before = self._counters()

    def lines(self, consumed: int) -> tuple[str, ...]:
        """Return the new log lines, once the log reports the ``consumed`` BUS_MCEERR_AR signals seen
        meanwhile.
        """
        self._owed += consumed
        until(self._paid)
        self._owed = 0
        lines, self._lines = self._lines, []
        return tuple(lines)

    def _paid(self) -> bool:
        with open(self._path, "rb") as file:
            file.seek(self._read)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]
        self._read += len(new)
        for line in new.splitlines():
            event = json.loads(line)
            self._owed -= event["event"] == "SignalSent" and event["code"] == BUS_MCEERR_AR
            if (said := decode(line).dmesg()) is not None:
                self._lines.append(_anonymous(said))
        return self._owed <= 0

    def _counters(self) -> dict[str, int]:
        counters: dict[str, int] = self._client.request("status")["counters"]
        return {"total": sum(counters.values()), **counters}

    def failures(self) -> int:
        """Return the number of failures."""
        return self._counters()["total"]

    def counted(self) -> dict[str, str]:
        """Return the increase of the counters since the last call."""
        before, self._before = self._before, self._counters()
        grown = {name: count - before[name] for name, count in self._before.items()}
        return {name: f"{more:+}" for name, more in grown.items() if more}

    def badblocks(self) -> str:
        """The list, in words."""
        ranges = self._client.request("badblocks")["ranges"]
        if not ranges:
            return "0 range(s), 0 bad 512-byte sectors in all"
        return (
            f"{len(ranges)} range(s), {sum(n for _, n in ranges)} bad 512-byte sectors in all, "
            f"last one starts at sector {ranges[-1][0] % 8} of its page"
        )


def _anonymous(line: str) -> str:
    """PFN, VA, and names without pids, as in the recordings."""
    line = re.sub(r"Memory failure: 0x[0-9a-f]+", "Memory failure: PFN", line)
    line = re.sub(r"\b(p\d):\d+", r"\1", line)
    return re.sub(r"fault at [0-9a-f]+", "fault at VA", line)


def drop_cache(path: Path) -> None:
    """Drop the page cache: on DAX no page is present before a touch, so no page may be cached."""
    fd = os.open(path, os.O_RDWR)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def no_read_ahead(mountpoint: Path) -> None:
    """Switch read-ahead off: otherwise a touch caches neighbours, which fault-around would map with the next
    touch. Needs root.
    """
    device = mountpoint.stat().st_dev
    setting = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    setting.write_text("0")


def until(done: Callable[[], bool]) -> None:
    """Wait a short time for a condition."""
    deadline = time.monotonic() + SETTLE
    while not done() and time.monotonic() < deadline:
        time.sleep(0.002)
