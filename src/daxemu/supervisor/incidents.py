"""Incidents without a memory_failure(): pages to collect or revoke, where no failure was reported."""

from __future__ import annotations

from daxemu.fs.filesystem import Filesystem
from daxemu.mm.incident import Incident
from daxemu.pmem.inject import failed_pages
from daxemu.pmem.pmem import Pmem
from daxemu.ranges import Range


def of_device_range(pmem: Pmem, fs: Filesystem, part: Range) -> Incident:
    """Return an incident of all file pages that hold any of the device bytes ``part``."""
    pfn, nr_pages = failed_pages(pmem, part)
    return Incident(0, pfn, nr_pages, 0, mappings=fs.failed_ranges(part).files)
