"""DevPagemap: which pfns are data pages of a device."""

from __future__ import annotations

from daxemu.mm.pagemap import DevPagemap
from daxemu.ranges import Range


def a_pagemap(*ranges: tuple[int, int], altmap_pages: int = 0) -> DevPagemap:
    return DevPagemap("pmem0", tuple(Range(*r) for r in ranges), None, altmap_pages)


def test_pfns_inside_the_device_are_valid() -> None:
    pgmap = a_pagemap((100, 200))
    assert pgmap.pfn_valid(0, 1000) == [Range(100, 200)]
    assert pgmap.pfn_valid(150, 160) == [Range(150, 160)]
    assert pgmap.pfn_valid(199, 201) == [Range(199, 200)]


def test_pfns_outside_the_device_are_not_valid() -> None:
    pgmap = a_pagemap((100, 200))
    assert pgmap.pfn_valid(0, 100) == []
    assert pgmap.pfn_valid(200, 300) == []
    assert pgmap.pfn_valid(150, 150) == []


def test_the_altmap_is_no_data() -> None:
    pgmap = a_pagemap((100, 200), (300, 400), altmap_pages=10)
    assert pgmap.pfn_valid(100, 110) == []
    assert pgmap.pfn_valid(105, 115) == [Range(110, 115)]
    assert pgmap.pfn_valid(0, 1000) == [Range(110, 200), Range(300, 400)]
