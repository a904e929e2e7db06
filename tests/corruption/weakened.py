"""Filesystems without one of the checks. The corruption fuzzer must notice each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from crc32c import crc32c

from daxemu.fs import metadata_page, metadata_region, store
from daxemu.fs.inode import Inode
from daxemu.fs.metadata_page import MetadataFile
from daxemu.fs.metadata_region import MetadataRegion
from daxemu.uapi import PAGE_SIZE


def every_page_is_intact(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(metadata_region, "is_intact", lambda page, file, number: True)


def copies_are_not_compared(patch: pytest.MonkeyPatch) -> None:
    """Read the first copy, if intact."""

    def first(self: MetadataRegion, file: MetadataFile, page: int) -> memoryview:
        at = self._places[file][0][page]
        if not self._dax.is_poisoned(at, PAGE_SIZE):
            data = self._dax.direct_access(at, PAGE_SIZE)
            if metadata_page.is_intact(data, file, page):
                return data
        return self._good_of_two(file, page)

    patch.setattr(MetadataRegion, "_good", first)


def values_have_no_domain(patch: pytest.MonkeyPatch) -> None:
    def unchecked(row: tuple[Any, ...]) -> Inode:
        inode = Inode(*row[:-1])
        if row[-1]:
            inode.xattrs = msgspec.msgpack.decode(row[-1])
        return inode

    patch.setattr(store, "inode_of", unchecked)
    patch.setattr(store, "check_entry", lambda parent, name: None)


def a_page_may_be_another(patch: pytest.MonkeyPatch) -> None:
    """Accept a page with a right checksum and any page number."""

    def checksum_alone(page: memoryview, file: int, number: int) -> bool:
        return int.from_bytes(page[-4:], "little") == crc32c(page[:-4])

    patch.setattr(metadata_region, "is_intact", checksum_alone)


def a_generation_is_as_good_as_another(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(metadata_region, "generation_of", lambda page: 1)


WEAKENED: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    weaken.__name__: weaken
    for weaken in (
        every_page_is_intact,
        copies_are_not_compared,
        values_have_no_domain,
        a_page_may_be_another,
        a_generation_is_as_good_as_another,
    )
}
