"""ExtentMap: lookups without gaps, links growing only if not shared, blocks freed exactly once."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from daxemu.fs.extents import ExtentMap, Mapping
from daxemu.fs.rmap import Rmap
from daxemu.ranges import Range


def links(extents: ExtentMap) -> list[tuple[int, int, int]]:
    return [(link.file_block, link.dev_block, link.length) for link in extents]


def runs(found: list[Mapping]) -> list[tuple[int, int, int | None]]:
    return [(run.file_block, run.length, None if run.link is None else run.dev_block) for run in found]


def file_at(*spans: tuple[int, int, int]) -> ExtentMap:
    extents = ExtentMap(7, Rmap())
    for file_block, dev_block, length in spans:
        extents.insert(file_block, dev_block, length)
    return extents


def test_an_empty_file_is_one_hole() -> None:
    assert runs(file_at().lookup(3, 9)) == [(3, 6, None)]


def test_lookup_of_nothing_is_nothing() -> None:
    assert file_at((0, 100, 4)).lookup(2, 2) == []


def test_lookup_names_holes_and_runs_in_order_without_gaps() -> None:
    extents = file_at((2, 100, 3), (8, 200, 2))
    assert runs(extents.lookup(0, 12)) == [
        (0, 2, None),
        (2, 3, 100),
        (5, 3, None),
        (8, 2, 200),
        (10, 2, None),
    ]


def test_lookup_cuts_runs_to_the_range() -> None:
    extents = file_at((0, 100, 10))
    assert runs(extents.lookup(3, 5)) == [(3, 2, 103)]


def test_a_sequentially_written_file_stays_one_link() -> None:
    extents = file_at((0, 100, 2), (2, 102, 3))
    assert links(extents) == [(0, 100, 5)]
    assert extents.blocks == 5


def test_neighbours_in_the_file_that_are_apart_on_the_device_are_two_links() -> None:
    assert links(file_at((0, 100, 2), (2, 103, 3))) == [(0, 100, 2), (2, 103, 3)]


def test_neighbours_on_the_device_that_are_apart_in_the_file_are_two_links() -> None:
    assert links(file_at((0, 100, 2), (3, 102, 3))) == [(0, 100, 2), (3, 102, 3)]


def test_a_shared_link_does_not_grow() -> None:
    """The proxy of a grown shared link would stand for blocks that were never shared."""
    rmap = Rmap()
    one, two = ExtentMap(1, rmap), ExtentMap(2, rmap)
    one.insert(0, 100, 2)
    two.clone_from(one, 0, 2, 0)
    one.insert(2, 102, 1)
    assert links(one) == [(0, 100, 2), (2, 102, 1)]
    assert rmap.proxy_of(102) is None


def test_removing_the_middle_leaves_both_ends() -> None:
    extents = file_at((0, 100, 10))
    assert extents.remove(3, 5) == [Range(103, 105)]
    assert links(extents) == [(0, 100, 3), (5, 105, 5)]
    assert extents.blocks == 8


def test_removing_the_front_or_the_back_keeps_the_link_object() -> None:
    extents = file_at((0, 100, 10))
    (link,) = extents
    assert extents.remove(0, 2) == [Range(100, 102)]
    assert extents.remove(8, 10) == [Range(108, 110)]
    assert list(extents) == [link]
    assert links(extents) == [(2, 102, 6)]


def test_removing_across_links_and_holes_frees_each_block_once() -> None:
    extents = file_at((0, 100, 4), (6, 200, 4), (12, 300, 4))
    assert extents.remove(2, 14) == [Range(102, 104), Range(200, 204), Range(300, 302)]
    assert links(extents) == [(0, 100, 2), (14, 302, 2)]


def test_removing_a_hole_changes_nothing() -> None:
    extents = file_at((0, 100, 2))
    assert extents.remove(2, 1 << 50) == []
    assert links(extents) == [(0, 100, 2)]


def test_blocks_shared_with_another_file_are_not_freed() -> None:
    rmap = Rmap()
    one, two = ExtentMap(1, rmap), ExtentMap(2, rmap)
    one.insert(0, 100, 10)
    two.clone_from(one, 4, 2, 20)
    assert one.remove(0, 10) == [Range(100, 104), Range(106, 110)]
    assert two.remove(20, 22) == [Range(104, 106)]
    assert rmap.link_count == 0


def test_a_block_twice_in_one_removed_range_is_freed_once() -> None:
    extents = file_at((0, 100, 2))
    extents.clone_from(extents, 0, 2, 5)
    assert extents.remove(0, 10) == [Range(100, 102)]


def test_clone_shares_blocks_and_keeps_holes() -> None:
    rmap = Rmap()
    one, two = ExtentMap(1, rmap), ExtentMap(2, rmap)
    one.insert(0, 100, 2)
    one.insert(4, 200, 2)
    two.clone_from(one, 1, 4, 11)
    assert links(two) == [(11, 101, 1), (14, 200, 1)]
    assert two.blocks == 2
    assert runs(two.lookup(10, 16)) == [
        (10, 1, None),
        (11, 1, 101),
        (12, 2, None),
        (14, 1, 200),
        (15, 1, None),
    ]


def test_adopt_takes_over_stored_links() -> None:
    extents = ExtentMap(7, Rmap())
    extents.adopt(list(file_at((0, 100, 2), (5, 200, 2))))
    assert (links(extents), extents.blocks) == ([(0, 100, 2), (5, 200, 2)], 4)


SPAN = st.tuples(st.integers(0, 40), st.integers(1, 12))


@given(
    st.lists(st.tuples(st.sampled_from(["insert", "remove", "clone"]), SPAN, st.integers(0, 40)), max_size=25)
)
def test_extent_map_equals_a_dict_of_blocks(steps: list[tuple[str, tuple[int, int], int]]) -> None:
    """Compare with a plain dict: mapping, st_blocks, and freed blocks."""
    rmap = Rmap()
    extents = ExtentMap(7, rmap)
    table: dict[int, int] = {}
    next_block = 1000
    for verb, (start, length), to in steps:
        span = range(start, start + length)
        if verb == "insert" and not table.keys() & set(span):
            extents.insert(start, next_block, length)
            table |= {block: next_block + i for i, block in enumerate(span)}
            next_block += length + (start % 2)
        elif verb == "remove":
            before = set(table.values())
            freed = [block for run in extents.remove(start, start + length) for block in range(*run)]
            table = {block: device for block, device in table.items() if block not in span}
            assert sorted(freed) == sorted(before - set(table.values()))
        elif verb == "clone" and abs(to - start) >= length and not table.keys() & set(range(to, to + length)):
            extents.clone_from(extents, start, length, to)
            table |= {to + i: table[block] for i, block in enumerate(span) if block in table}
    found = {
        run.file_block + i: run.dev_block + i
        for run in extents.lookup(0, 60)
        if run.link is not None
        for i in range(run.length)
    }
    assert found == table
    assert extents.blocks == len(table)
    assert rmap.link_count == len(extents) == len(list(rmap))
    edges = [(run.file_block, run.file_block + run.length) for run in extents.lookup(0, 60)]
    assert all(a[1] == b[0] for a, b in pairwise(edges))
