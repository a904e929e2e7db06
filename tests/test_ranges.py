"""RangeSet and IntervalIndex against plain sets and lists."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daxemu.ranges import IntervalIndex, Range, RangeSet

SPANS = st.tuples(st.integers(0, 60), st.integers(0, 20)).map(lambda p: (p[0], p[0] + p[1]))


@given(st.lists(st.tuples(st.booleans(), SPANS), max_size=40), SPANS)
def test_range_set_equals_a_plain_set(
    steps: list[tuple[bool, tuple[int, int]]], probe: tuple[int, int]
) -> None:
    ranges, model = RangeSet(), set[int]()
    for adding, (start, end) in steps:
        span = set(range(start, end))
        if adding:
            assert {i for r in ranges.add(start, end) for i in range(*r)} == span - model
            model |= span
        else:
            assert {i for r in ranges.remove(start, end) for i in range(*r)} == span & model
            model -= span
        stored = list(ranges)
        assert {i for r in stored for i in range(*r)} == model
        assert all(a.end < b.start for a, b in pairwise(stored))
        assert all(r.start < r.end for r in stored)
        assert ranges.total == len(model)
    start, end = probe
    span = set(range(start, end))
    assert {i for r in ranges.overlapping(start, end) for i in range(*r)} == span & model
    assert {i for r in ranges.gaps(start, end) for i in range(*r)} == span - model
    assert ranges.overlaps(start, end) == bool(span & model)
    assert ranges.covers(start, end) == (span <= model)
    following = sorted(i for i in model if i >= start)
    first = ranges.first_from(start)
    assert (first.start if first else None) == (following[0] if following else None)


@given(st.sets(st.integers(0, 90), min_size=40), st.integers(0, 100), st.integers(0, 100))
def test_many_ranges_are_removed_as_one_by_one(values: set[int], start: int, length: int) -> None:
    ranges = RangeSet((2 * value, 2 * value + 1) for value in values)
    model = {2 * value for value in values}
    span = set(range(start, start + 2 * length))
    assert [part.start for part in ranges.remove(start, start + 2 * length)] == sorted(span & model)
    assert [part.start for part in ranges] == sorted(model - span)
    assert ranges.total == len(model - span)
    assert ranges == RangeSet((value, value + 1) for value in model - span)


@dataclass(eq=False)
class Item:
    start: int
    length: int


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 130)), max_size=60), st.data())
def test_interval_index_finds_exactly_the_overlapping(
    spans: list[tuple[int, int]], data: st.DataObject
) -> None:
    index: IntervalIndex[Item] = IntervalIndex(lambda i: i.start, lambda i: i.length)
    items = [Item(*s) for s in spans]
    for item in items:
        index.add(item)
    gone = data.draw(st.lists(st.sampled_from(items), unique_by=id)) if items else []
    for item in gone:
        index.discard(item)
    left = [i for i in items if not any(i is g for g in gone)]
    assert len(index) == len(left)
    start, end = data.draw(SPANS)
    expected = {id(i) for i in left if i.start < end and start < i.start + i.length and start < end}
    assert {id(i) for i in index.overlapping(start, end)} == expected


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 3))
def test_an_item_changed_as_stays_allows_is_still_found(old: int, new: int, trim: int) -> None:
    index: IntervalIndex[Item] = IntervalIndex(lambda i: i.start, lambda i: i.length)
    item = Item(10, old)
    index.add(item)
    if index.stays(item, 10 + trim, new):
        item.start, item.length = 10 + trim, new
    else:
        index.discard(item)
        item.start, item.length = 10 + trim, new
        index.add(item)
    assert list(index.overlapping(9 + trim + new, 10 + trim + new)) == [item]
    assert list(index.overlapping(10 + trim + new, 1000)) == []
    index.discard(item)


def test_discarding_an_unknown_item_is_a_value_error() -> None:
    index: IntervalIndex[Item] = IntervalIndex(lambda i: i.start, lambda i: i.length)
    with pytest.raises(ValueError, match="not in the index"):
        index.discard(Item(0, 1))


def test_range_clip() -> None:
    assert Range(2, 9).clip(4, 20) == Range(4, 9)
    assert not Range(2, 4).clip(4, 20)


def test_the_gap_around_an_integer() -> None:
    known = RangeSet([(10, 20), (30, 40)])
    bounds = Range(5, 50)
    assert known.gap_around(7, bounds) == Range(5, 10)
    assert known.gap_around(25, bounds) == Range(20, 30)
    assert known.gap_around(40, bounds) == Range(40, 50)
    assert known.gap_around(25, Range(22, 26)) == Range(22, 26)
