"""Times of the background scrub. The clock is trio's own, so no test waits."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from daxemu.errors import InvalidArgument
from daxemu.supervisor.scrub import Scrubber
from daxemu.supervisor.settings import seconds

Scenario = Callable[[Scrubber, list[float]], Awaitable[None]]


def noting(times: list[float], start: float = 0.0) -> Callable[[], Awaitable[None]]:
    """A scrub with a note of each time."""

    async def scrub() -> None:
        times.append(trio.current_time() - start)

    return scrub


def play(scenario: Scenario) -> None:
    """Run a scrubber from time 0; return the times of scrubs."""

    async def scene() -> None:
        times: list[float] = []
        start = trio.current_time()
        scrubber = Scrubber(noting(times, start))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scrubber.run)
            await scenario(scrubber, times)
            assert scrubber.scrubs == len(times)
            nursery.cancel_scope.cancel()

    trio.run(scene, clock=trio.testing.MockClock(autojump_threshold=0))


def test_never_unless_asked_for() -> None:
    async def scenario(scrubber: Scrubber, times: list[float]) -> None:
        await trio.sleep(80_000)
        assert times == []

    play(scenario)


def test_each_time_the_interval_is_over() -> None:
    async def scenario(scrubber: Scrubber, times: list[float]) -> None:
        scrubber.set(10)
        await trio.sleep(35)
        assert times == [10, 20, 30]

    play(scenario)


def test_another_interval_counts_from_when_it_is_set() -> None:
    async def scenario(scrubber: Scrubber, times: list[float]) -> None:
        scrubber.set(1000)
        await trio.sleep(5)
        scrubber.set(2)
        await trio.sleep(5)
        assert times == [7, 9]
        scrubber.set(0)
        await trio.sleep(80_000)
        assert times == [7, 9]

    play(scenario)


def test_stopped_it_ends_whatever_is_set() -> None:
    async def scene() -> None:
        times: list[float] = []
        scrubber = Scrubber(noting(times))
        scrubber.set(10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scrubber.run)
            await trio.sleep(15)
            scrubber.stop()
            scrubber.set(10)
        assert len(times) == 1

    trio.run(scene, clock=trio.testing.MockClock(autojump_threshold=0))


def test_stopped_at_the_moment_that_it_would_begin() -> None:
    """Either task may run first: after stop() no scrub may begin."""

    async def scene() -> None:
        times: list[float] = []
        scrubber = Scrubber(noting(times))
        scrubber.set(10)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(scrubber.run)
            await trio.sleep(10)
            before = len(times)
            scrubber.stop()
        assert len(times) == before

    for _ in range(30):
        trio.run(scene, clock=trio.testing.MockClock(autojump_threshold=0))


@pytest.mark.parametrize(
    ("text", "value"), [("0", 0), ("0.0", 0), ("5", 5), ("0.05", 0.05), ("86400", 86400)]
)
def test_intervals(text: str, value: float) -> None:
    assert seconds(text) == value


@pytest.mark.parametrize(
    "text", ["", " 1", "1s", "-1", "+1", "nan", "inf", "1e3", "0.009", "9999999999", "٣"]
)
def test_an_invalid_interval_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument, match="must be seconds"):
        seconds(text)
