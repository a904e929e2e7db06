"""Badblocks: bad sectors, as bytes and as text."""

from __future__ import annotations

from daxemu.pmem.badblocks import Badblocks
from daxemu.ranges import Range


def test_set_and_clear_say_what_is_new() -> None:
    bad = Badblocks()
    assert bad.set(10, 5) == [Range(10, 15)]
    assert bad.set(8, 10) == [Range(8, 10), Range(15, 18)]
    assert bad.clear(9, 3) == [Range(9, 12)]
    assert bad.clear(9, 3) == []
    assert bad.count == 7


def test_neighbours_are_one_entry() -> None:
    bad = Badblocks()
    bad.set(10, 5)
    bad.set(15, 5)
    assert list(bad) == [Range(10, 20)]
    assert len(bad) == 1


def test_check_finds_the_first_bad_part() -> None:
    bad = Badblocks()
    bad.set(10, 5)
    bad.set(20, 5)
    assert bad.check(12, 100) == Range(12, 15)
    assert bad.check(15, 5) is None


def test_a_byte_meets_its_whole_sector() -> None:
    bad = Badblocks()
    bad.set(10, 2)
    assert list(bad.overlapping_bytes(11 * 512 + 511, 1)) == [Range(11 * 512, 12 * 512)]
    assert list(bad.overlapping_bytes(12 * 512, 1)) == []
    assert list(bad.overlapping_bytes(0, 10 * 512)) == []


def test_the_sysfs_form() -> None:
    bad = Badblocks()
    assert bad.sysfs_text() == ""
    bad.set(10, 5)
    bad.set(100, 1)
    assert bad.sysfs_text() == "10 5\n100 1\n"
