"""Records in a file, each stored twice, a page a copy: one poisoned page loses no record and is rewritten."""

import os
import struct
import zlib

PAGE = 4096
_HEADER = struct.Struct("<II")  # length, CRC-32
MAX_RECORD = PAGE - _HEADER.size


class LostRecord(Exception):
    """Both copies of a record are bad."""


class Ledger:
    """Record ``i`` is in pages ``2 i`` and ``2 i + 1``."""

    def __init__(self, path):
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._count = os.fstat(self._fd).st_size // (2 * PAGE)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        os.close(self._fd)

    def __len__(self):
        return self._count

    def append(self, record):
        """Append a record, which is durable on return."""
        if len(record) > MAX_RECORD:
            raise ValueError(f"a record of {len(record)} bytes: at most {MAX_RECORD}")
        page = (_HEADER.pack(len(record), zlib.crc32(record)) + record).ljust(PAGE, b"\0")
        os.pwrite(self._fd, page * 2, self._count * 2 * PAGE)
        os.fsync(self._fd)
        self._count += 1

    def read(self, index):
        """The record. Raises LostRecord."""
        copies = [2 * index, 2 * index + 1]
        pages = [self._page(number) for number in copies]
        good = next((page for page in pages if page is not None), None)
        if good is None:
            raise LostRecord(f"record {index}: pages {copies[0]} and {copies[1]} are bad")
        for number, page in zip(copies, pages, strict=True):
            if page is None:
                os.pwrite(self._fd, good, number * PAGE)  # a write of the whole page clears poison
        length, _ = _HEADER.unpack_from(good)
        return good[_HEADER.size : _HEADER.size + length]

    def _page(self, number):
        try:
            page = os.pread(self._fd, PAGE, number * PAGE)
        except OSError:
            return None
        length, checksum = _HEADER.unpack_from(page)
        record = page[_HEADER.size : _HEADER.size + length]
        return page if length <= MAX_RECORD and zlib.crc32(record) == checksum else None
