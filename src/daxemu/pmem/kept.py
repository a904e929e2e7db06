"""Contents of poisoned pages, kept aside while the pages are punched out of the media (direct mappings).

The file ``kept`` has the offsets of ``media``. Only pages with readable sectors beside poison have data:
a page that is poison as a whole has nothing to keep.
"""

from __future__ import annotations

import mmap
import os

from daxemu.pmem.backing import FULL, data_runs, no_memory, punch, reserve
from daxemu.private_path import PrivatePath
from daxemu.ranges import Range, RangeSet
from daxemu.uapi import PAGE_SIZE
from daxemu.units import blocks_of, byte_span, bytes_of_blocks


class KeptPages:
    """The file ``kept`` of a device. ``pages``: numbers of the pages with data in the file."""

    NAME = "kept"

    def __init__(self, directory: PrivatePath, size: int) -> None:
        """Open the file, or make an empty file of ``size`` bytes."""
        self._file = directory / self.NAME
        self._fd = self._file.open(os.O_RDWR, create=True)
        os.ftruncate(self._fd, size)
        self.pages = RangeSet(blocks_of(run) for run in data_runs(self._fd))

    @classmethod
    def exists(cls, directory: PrivatePath) -> bool:
        """Return True if the device has the file: its media is as for direct mappings."""
        return (directory / cls.NAME).exists()

    def reserve(self, pages: Range) -> None:
        """Back the pages with memory. Raises NoSpace; then nothing has changed."""
        reserve(self._fd, *byte_span(pages))

    def put(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Write bytes from byte ``offset`` on. Raises NoSpace for pages without memory."""
        try:
            done = os.pwrite(self._fd, data, offset)
        except OSError as error:
            if error.errno not in FULL:
                raise
            done = 0
        if done != len(data):
            raise no_memory()
        self.pages.add(*blocks_of(Range(offset, offset + len(data))))

    def get(self, page: int) -> bytearray:
        """Return the contents of a page; zeros without data."""
        return bytearray(os.pread(self._fd, PAGE_SIZE, page * PAGE_SIZE))

    def view(self, offset: int, length: int) -> memoryview:
        """Return the live bytes, writable, of pages that then have data. Raises NoSpace."""
        pages = blocks_of(Range(offset, offset + length))
        whole = bytes_of_blocks(pages)
        self.reserve(pages)
        self.pages.add(*pages)
        mapped = mmap.mmap(self._fd, whole.length, offset=whole.start)
        return memoryview(mapped)[offset - whole.start : offset - whole.start + length]

    def zero(self, offset: int, length: int) -> None:
        """Zero bytes of pages with data; whole pages are forgotten."""
        part = Range(offset, offset + length)
        for run in list(self.pages.overlapping(*blocks_of(part))) if self.pages else ():
            inside = bytes_of_blocks(run).clip(*part)
            punch(self._fd, inside.start, inside.length)
        whole = part.inner(PAGE_SIZE)
        if whole:
            self.pages.remove(*blocks_of(whole))

    def forget(self, pages: Range) -> None:
        """Discard the data of pages."""
        if self.pages.remove(*pages):
            punch(self._fd, *byte_span(pages))

    def close(self) -> None:
        """Close the file, which stays."""
        os.close(self._fd)

    def remove(self) -> None:
        """Close and remove the file. Precondition: no page has data that is still needed."""
        self.close()
        self._file.unlink()
