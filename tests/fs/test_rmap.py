"""The reverse map and the reflink proxy: one proxy for a shared extent, as long as any link lives."""

from __future__ import annotations

import random

from daxemu.fs.extents import ExtentMap
from daxemu.fs.rmap import Link, Owner, Rmap
from daxemu.ranges import Range, RangeSet


def a_file(rmap: Rmap, ino: int, dev_block: int = 100, length: int = 10) -> ExtentMap:
    extents = ExtentMap(ino, rmap)
    extents.insert(0, dev_block, length)
    return extents


def a_clone(rmap: Rmap, ino: int, of: ExtentMap, start: int = 0, length: int = 10) -> ExtentMap:
    extents = ExtentMap(ino, rmap)
    extents.clone_from(of, start, length, 0)
    return extents


def test_an_extent_that_was_never_shared_has_no_proxy() -> None:
    rmap = Rmap()
    a_file(rmap, 1)
    assert rmap.proxy_of(100) is None
    assert list(rmap.owners(100, 110)) == [Owner(1, 0, 100, 10)]


def test_sharing_makes_one_proxy_that_counts_the_links() -> None:
    rmap = Rmap()
    one = a_file(rmap, 1)
    for count in (2, 3, 4):
        a_clone(rmap, count, one)
        proxy = rmap.proxy_of(105)
        assert proxy is not None
        assert proxy.refcount == count


def test_a_clone_of_a_clone_holds_the_same_proxy() -> None:
    rmap = Rmap()
    one = a_file(rmap, 1)
    two = a_clone(rmap, 2, one)
    proxy = rmap.proxy_of(100)
    a_clone(rmap, 3, two, 3, 2)
    assert rmap.proxy_of(104) is proxy


def test_sharing_a_part_gives_the_whole_extent_the_proxy() -> None:
    rmap = Rmap()
    one = a_file(rmap, 1)
    a_clone(rmap, 2, one, 4, 2)
    assert rmap.proxy_of(100) is rmap.proxy_of(104) is rmap.proxy_of(109)


def test_a_link_that_is_split_keeps_its_proxy_on_both_sides_and_counts_twice() -> None:
    rmap = Rmap()
    one = a_file(rmap, 1)
    two = a_clone(rmap, 2, one)
    proxy = rmap.proxy_of(100)
    assert proxy is not None
    two.remove(4, 6)
    assert [link.proxy for link in two] == [proxy, proxy]
    assert proxy.refcount == 3


def test_the_proxy_stays_while_any_link_is_intact() -> None:
    rmap = Rmap()
    one = a_file(rmap, 1)
    two = a_clone(rmap, 2, one)
    proxy = rmap.proxy_of(100)
    one.remove(0, 10)
    assert rmap.proxy_of(100) is proxy
    a_clone(rmap, 3, two, 0, 10)
    assert rmap.proxy_of(100) is proxy
    two.remove(0, 10)
    assert rmap.proxy_of(100) is proxy
    assert proxy is not None
    assert proxy.refcount == 1


def test_the_proxy_goes_with_the_last_link() -> None:
    rmap = Rmap()
    one = a_file(rmap, 1)
    two = a_clone(rmap, 2, one)
    old = rmap.proxy_of(100)
    one.remove(0, 10)
    two.remove(0, 10)
    assert rmap.proxy_of(100) is None
    again = a_file(rmap, 4)
    a_clone(rmap, 5, again)
    assert rmap.proxy_of(100) is not old
    assert old is not None
    assert old.refcount == 0


def test_every_owner_of_a_shared_extent_is_found_at_its_own_offset() -> None:
    rmap = Rmap()
    one = a_file(rmap, 1)
    two = ExtentMap(2, rmap)
    two.clone_from(one, 2, 6, 50)
    assert sorted(rmap.owners(103, 105)) == [Owner(1, 3, 103, 2), Owner(2, 51, 103, 2)]


def test_free_blocks_have_no_owners() -> None:
    rmap = Rmap()
    a_file(rmap, 1)
    assert list(rmap.owners(110, 1 << 60)) == []
    assert list(rmap.owners(0, 100)) == []
    assert list(rmap.owners(105, 105)) == []


def test_shared_parts_are_the_blocks_used_by_another_link() -> None:
    rmap = Rmap()
    one = a_file(rmap, 1)
    a_clone(rmap, 2, one, 2, 3)
    a_clone(rmap, 3, one, 8, 2)
    (link,) = one
    assert list(rmap.shared_parts(link, 100, 110)) == [Range(102, 105), Range(108, 110)]
    assert list(rmap.shared_parts(link, 103, 104)) == [Range(103, 104)]


def test_the_only_link_left_is_shared_until_the_next_commit() -> None:
    rmap = Rmap()
    one = a_file(rmap, 1)
    a_clone(rmap, 2, one).remove(2, 10)
    (link,) = one
    assert list(rmap.shared_parts(link, 100, 110)) == [Range(100, 110)]
    rmap.given_up = RangeSet()  # as after a commit
    assert list(rmap.shared_parts(link, 100, 110)) == [Range(100, 102)]


def test_a_block_that_one_file_uses_twice_is_shared() -> None:
    rmap = Rmap()
    one = a_file(rmap, 1, length=2)
    one.clone_from(one, 0, 2, 6)
    first, second = one
    assert list(rmap.shared_parts(first, 100, 102)) == [Range(100, 102)]
    assert sorted(rmap.owners(100, 101)) == [Owner(1, 0, 100, 1), Owner(1, 6, 100, 1)]
    assert first.proxy is second.proxy


def test_unreferenced_blocks_are_those_without_a_link() -> None:
    rmap = Rmap()
    a_file(rmap, 1)
    assert rmap.unreferenced(95, 115) == [Range(95, 100), Range(110, 115)]


def test_lookup_among_thousands_of_small_links_and_a_long_one_equals_brute_force() -> None:
    rmap = Rmap()
    whole = a_file(rmap, 1, dev_block=0, length=1 << 20)
    dice = random.Random(3)
    for ino in range(2, 3002):
        extents = ExtentMap(ino, rmap)
        extents.clone_from(whole, dice.randrange((1 << 20) - 8), dice.randrange(1, 8), dice.randrange(100))
    (long_link,) = whole
    assert long_link.proxy is not None
    assert long_link.proxy.refcount == 3001
    everything = list(rmap)
    for _ in range(200):
        start = dice.randrange(1 << 20)
        end = start + dice.choice([1, 1, 50, 5000])
        expected = {owner_of(link, start, end) for link in everything if overlap(link, start, end)}
        assert set(rmap.owners(start, end)) == expected
        assert rmap.proxy_of(start) is long_link.proxy


def overlap(link: Link, start: int, end: int) -> bool:
    return link.dev_block < end and start < link.dev_end


def owner_of(link: Link, start: int, end: int) -> Owner:
    low, high = max(link.dev_block, start), min(link.dev_end, end)
    return Owner(link.ino, link.file_block + low - link.dev_block, low, high - low)
