"""daxemu status: the text of a report."""

from __future__ import annotations

from daxemu.cli.mount import _describe

REPORT = {
    "device": "/dev/shm/pmem0",
    "mountpoint": "/mnt",
    "pid": 7,
    "state": "mounted",
    "reason": None,
    "size": 1 << 30,
    "base_pfn": 0x100000,
    "blocks": 1000,
    "free_blocks": 999,
    "inodes": 1,
    "extents": 2,
    "open_files": 3,
    "badblocks": 8,
    "poisoned_sectors": 16,
    "settings": {"scrub_interval": "60"},
    "counters": {"recovered": 1},
    "events": 5,
    "supplement": "loaded",
    "tracer": "pid 8",
}


def test_a_supervisor_of_before_there_was_a_background_scrub() -> None:
    """A supervisor of an earlier version may serve its mount after an upgrade. All other mounts are shown
    too.
    """
    said = "16 sectors, 8 of them known (badblocks), {} background scrubs"
    assert said.format(0) in "\n".join(_describe(REPORT))
    assert said.format(3) in "\n".join(_describe({**REPORT, "scrubs": 3}))
