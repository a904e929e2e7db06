"""EventLog: numbered, in the file and in memory, handed to followers; a full disk costs the file only."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from daxemu.events import DeviceRemoved, SettingChanged, decode
from daxemu.private_path import PrivatePath
from daxemu.supervisor import event_log
from daxemu.supervisor.event_log import EventLog
from tests.pmem.test_media import files_cannot_grow


def a_setting(value: object) -> SettingChanged:
    return SettingChanged(name="n", value=str(value))


async def take(events: AsyncIterator[list[bytes]], count: int) -> list[int]:
    """The numbers of the next events, of at least ``count``."""
    taken: list[int] = []
    with trio.fail_after(5):
        while len(taken) < count:
            taken += [decode(line).seq for line in await anext(events)]
    return taken


def test_events_are_numbered_dated_and_in_the_file(tmp_path: Path) -> None:
    log = EventLog(PrivatePath.at(tmp_path) / "events.jsonl")
    event = a_setting(1)
    log.emit(event)
    log.emit(DeviceRemoved(device="pmem0", told=0))
    assert (event.seq, log.emitted) == (1, 2)
    assert event.time > 1e9
    log.close()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["seq"] for line in lines] == [1, 2]


def test_the_file_goes_on_where_it_was(tmp_path: Path) -> None:
    for _ in range(2):
        log = EventLog(PrivatePath.at(tmp_path) / "events.jsonl")
        log.emit(a_setting(1))
        log.close()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["seq"] for line in lines] == [1, 1]


def test_a_follower_gets_past_and_future_events(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = EventLog(PrivatePath.at(tmp_path) / "events.jsonl")
        for number in range(5):
            log.emit(a_setting(number))
        events = log.follow(2)
        assert await take(events, 3) == [3, 4, 5]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(check_next, events, [6, 7])
            await trio.testing.wait_all_tasks_blocked()
            log.emit(a_setting(6))
            await trio.testing.wait_all_tasks_blocked()
            log.emit(a_setting(7))
        log.close()

    async def check_next(events: AsyncIterator[list[bytes]], numbers: list[int]) -> None:
        assert await take(events, len(numbers)) == numbers

    trio.run(scenario)


def test_every_follower_gets_every_event(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = EventLog(PrivatePath.at(tmp_path) / "events.jsonl")
        seen: list[list[int]] = []

        async def follow(after: int) -> None:
            seen.append(await take(log.follow(after), 50 - after))

        async with trio.open_nursery() as nursery:
            for after in (0, 10, 49):
                nursery.start_soon(follow, after)
            for number in range(50):
                log.emit(a_setting(number))
                if number % 7 == 0:
                    await trio.lowlevel.checkpoint()
        assert sorted(seen) == sorted([list(range(after + 1, 51)) for after in (0, 10, 49)])
        log.close()

    trio.run(scenario)


def test_a_follower_that_is_too_slow_misses_events_and_can_see_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(event_log, "KEPT", 10)

    async def scenario() -> None:
        log = EventLog(PrivatePath.at(tmp_path) / "events.jsonl")
        events = log.follow(0)
        log.emit(a_setting(0))
        assert await take(events, 1) == [1]
        for number in range(30):
            log.emit(a_setting(number))
        assert await take(events, 10) == list(range(22, 32))
        log.close()

    trio.run(scenario)
    assert len((tmp_path / "events.jsonl").read_text().splitlines()) == 31


def test_a_full_disk_does_not_undo_the_verb(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = EventLog(PrivatePath.at(tmp_path) / "events.jsonl")
        with files_cannot_grow():
            log.emit(a_setting(1))
            log.emit(a_setting(2))
        assert await take(log.follow(0), 2) == [1, 2]
        log.close()

    trio.run(scenario)


def test_the_file_goes_on_when_there_is_room_again(tmp_path: Path) -> None:
    log = EventLog(PrivatePath.at(tmp_path) / "events.jsonl")
    log.emit(a_setting(1))
    with files_cannot_grow():
        log.emit(a_setting(2))
    log.emit(a_setting(3))
    log.close()
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["seq"] for line in lines] == [1, 3]


def test_half_a_line_does_not_spoil_the_next(tmp_path: Path) -> None:
    """A disk that fills up in the middle of a line stores a part of the line."""
    path = tmp_path / "events.jsonl"
    log = EventLog(PrivatePath.at(tmp_path) / "events.jsonl")
    log.emit(a_setting(1))
    with files_cannot_grow(at=path.stat().st_size + 20):
        log.emit(a_setting(2))
    log.emit(a_setting(3))
    log.close()
    whole = []
    for line in path.read_bytes().splitlines():
        try:
            whole.append(json.loads(line)["seq"])
        except ValueError:
            continue
    assert whole in ([1, 3], [1, 2, 3])
