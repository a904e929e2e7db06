"""Ratelimit: a burst in each interval, and the number of suppressed messages."""

from __future__ import annotations

from daxemu.ratelimit import Ratelimit, suppressed_line


def test_a_burst_and_then_nothing_until_the_interval_is_over() -> None:
    limit = Ratelimit(interval=5, burst=3)
    assert [limit.ratelimit(now)[0] for now in (10, 10, 11, 12, 14.9, 15)] == [True] * 3 + [False] * 3
    assert limit.ratelimit(15.1) == (True, 3)
    assert limit.ratelimit(15.2) == (True, 0)


def test_the_interval_begins_with_a_message_not_with_the_clock() -> None:
    limit = Ratelimit(interval=5, burst=1)
    assert limit.ratelimit(1000) == (True, 0)
    assert limit.ratelimit(1004) == (False, 0)
    assert limit.ratelimit(1020) == (True, 1)
    assert limit.ratelimit(1024) == (False, 0)


def test_a_few_are_never_limited() -> None:
    limit = Ratelimit()
    assert {limit.ratelimit(now) for now in range(1000)} == {(True, 0)}
    assert limit.release() == 0


def test_the_number_suppressed_is_returned_once() -> None:
    limit = Ratelimit(burst=1)
    for _ in range(4):
        limit.ratelimit(0)
    assert (limit.release(), limit.release()) == (3, 0)
    assert limit.ratelimit(100) == (True, 0)


def test_a_clock_set_back_begins_a_new_interval() -> None:
    limit = Ratelimit(burst=1)
    limit.ratelimit(1e9)
    assert limit.ratelimit(5) == (True, 0)


def test_suppressed_line_is_the_kernels() -> None:
    """The line as recorded in scenario `e1-ignore-late` (6.1-tmpfs)."""
    assert suppressed_line("unpoison_memory", 7) == "unpoison_memory: 7 callbacks suppressed"
