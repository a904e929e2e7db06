"""events.jsonl and supervisor.log stay within their limit in any storm, and every event is accounted for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from daxemu.errors import InvalidArgument
from daxemu.events import DeviceRemoved, Event, EventsRepeated, SettingChanged, decode, encode
from daxemu.pmem.device_dir import DeviceConfig, DeviceDir
from daxemu.pmem.event_files import events_of
from daxemu.private_path import PrivatePath
from daxemu.supervisor.event_file import STORM
from daxemu.supervisor.event_log import EventLog
from daxemu.supervisor.settings import MIN_LOG_SIZE, log_size, size_text
from tests.pmem.test_media import files_cannot_grow

LIMIT = 8192
FILES = ("events.jsonl", "events.jsonl.1")


def a_setting(value: object) -> SettingChanged:
    return SettingChanged(name="n", value=str(value))


def a_log(directory: Path, limit: int = LIMIT) -> EventLog:
    return EventLog(PrivatePath.at(directory) / "events.jsonl", limit)


def in_file(path: Path) -> list[Event]:
    return [decode(line) for line in path.read_bytes().splitlines()]


def kept(directory: Path) -> list[Event]:
    """The events of both files."""
    return [
        event
        for name in reversed(FILES)
        if (directory / name).exists()
        for event in in_file(directory / name)
    ]


def numbers(events: list[Event]) -> list[int]:
    """Return the number of each event that the lines stand for."""
    return [
        seq
        for event in events
        for seq in range(event.first if isinstance(event, EventsRepeated) else event.seq, event.seq + 1)
    ]


def check_limit(directory: Path, limit: int = LIMIT) -> None:
    for name in FILES:
        if (directory / name).exists():
            assert (directory / name).stat().st_size <= limit // 2


def test_the_limit_holds_at_each_event(tmp_path: Path) -> None:
    log = a_log(tmp_path)
    for number in range(500):
        log.emit(a_setting(number))
        check_limit(tmp_path)
    log.close()
    found = numbers(kept(tmp_path))
    assert found == list(range(found[0], 501))
    assert found[0] > 1


def test_a_storm_of_equal_events_is_one_line(tmp_path: Path) -> None:
    log = a_log(tmp_path)
    log.emit(a_setting("before"))
    for number in range(10_000):
        log.emit(a_setting("again"))
        if number in (STORM, STORM + 1, 5000):
            assert numbers(kept(tmp_path)) == list(range(1, log.emitted + 1))
    log.emit(a_setting("after"))
    log.close()
    lines = kept(tmp_path)
    assert len(lines) == 1 + STORM + 1 + 1
    said = lines[-2]
    assert isinstance(said, EventsRepeated)
    assert (said.first, said.seq, said.count) == (STORM + 2, 10_001, 10_000 - STORM)
    assert said.what == a_setting("again").summary()
    assert said.since <= said.time
    assert numbers(lines) == list(range(1, 10_003))


def test_a_few_equal_events_are_written_out(tmp_path: Path) -> None:
    log = a_log(tmp_path)
    for _ in range(STORM):
        log.emit(a_setting("again"))
    log.close()
    assert [event.seq for event in kept(tmp_path)] == list(range(1, STORM + 1))


def test_many_storms_one_after_another(tmp_path: Path) -> None:
    log = a_log(tmp_path)
    for storm in range(50):
        for _ in range(STORM + 5 + storm):
            log.emit(a_setting(storm))
            check_limit(tmp_path)
    log.close()
    found = numbers(kept(tmp_path))
    assert found == list(range(found[0], log.emitted + 1))


def test_a_follower_gets_each_event_of_a_storm(tmp_path: Path) -> None:
    async def scenario() -> None:
        log = a_log(tmp_path)
        for _ in range(1000):
            log.emit(a_setting("again"))
        seen: list[Event] = []
        async for lines in log.follow(0):
            seen += map(decode, lines)
            if len(seen) == 1000:
                break
        log.close()
        assert [event.seq for event in seen] == list(range(1, 1001))
        assert {type(event) for event in seen} == {SettingChanged}

    trio.run(scenario)


def test_a_new_limit_holds_from_the_next_event_on(tmp_path: Path) -> None:
    log = a_log(tmp_path, 1 << 20)
    for number in range(300):
        log.emit(a_setting(number))
    log.limit = LIMIT
    for number in range(300):
        log.emit(a_setting(number))
    log.close()
    check_limit(tmp_path)


def test_a_crash_between_the_rename_and_the_new_file(tmp_path: Path) -> None:
    log = a_log(tmp_path)
    log.emit(a_setting("before"))
    log.close()
    (tmp_path / "events.jsonl").rename(tmp_path / "events.jsonl.1")
    log = a_log(tmp_path)
    log.emit(a_setting("after"))
    log.close()
    assert kept(tmp_path) == [decode(line) for line in map(encode, kept(tmp_path))]
    assert [event.summary() for event in kept(tmp_path)] == ["set n=before", "set n=after"]


def test_a_new_file_that_cannot_be_made_is_made_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rename worked, the disk had no inode: events are missing, the log goes on, the limit holds."""
    log = a_log(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(PrivatePath, "open", _refuse)
        for number in range(200):
            log.emit(a_setting(number))
    assert not (tmp_path / "events.jsonl").exists()
    log.emit(a_setting("after"))
    log.close()
    check_limit(tmp_path)
    assert [event.seq for event in in_file(tmp_path / "events.jsonl")] == [201]


def _refuse(self: PrivatePath, flags: int, *, create: bool = False) -> int:
    raise OSError(28, "No space left on device")


def test_half_a_line_of_a_dead_supervisor_is_ended(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_bytes(b'{"event":"Mou')
    log = a_log(tmp_path)
    log.emit(a_setting(1))
    log.close()
    first, second = (tmp_path / "events.jsonl").read_bytes().splitlines()
    assert first == b'{"event":"Mou'
    assert decode(second).seq == 1


def test_a_storm_on_a_full_disk(tmp_path: Path) -> None:
    """The line of the storm has space to grow: the lines before stay correct."""
    log = a_log(tmp_path)
    for _ in range(STORM + 1):
        log.emit(a_setting("again"))
    with files_cannot_grow(at=(tmp_path / "events.jsonl").stat().st_size):
        for _ in range(1000):
            log.emit(a_setting("again"))
    log.close()
    assert numbers(kept(tmp_path)) == list(range(1, log.emitted + 1))


def test_a_file_emptied_by_another_process_has_no_hole(tmp_path: Path) -> None:
    log = a_log(tmp_path)
    for _ in range(STORM + 1):
        log.emit(a_setting("again"))
    os.truncate(tmp_path / "events.jsonl", 0)
    log.emit(a_setting("again"))
    log.emit(a_setting("after"))
    log.close()
    assert b"\0" not in (tmp_path / "events.jsonl").read_bytes()
    assert [event.seq for event in kept(tmp_path)] == [STORM + 2, STORM + 3]


def test_a_line_larger_than_the_file_may_be(tmp_path: Path) -> None:
    log = a_log(tmp_path)
    log.emit(a_setting("x" * LIMIT))
    log.emit(DeviceRemoved(device="pmem0", told=0))
    log.close()
    check_limit(tmp_path)
    assert [event.seq for event in kept(tmp_path)] == [2]


def test_log_of_a_device_reads_both_files(tmp_path: Path) -> None:
    with DeviceDir.create(tmp_path / "pmem0", DeviceConfig(8 << 20)) as device:
        log = EventLog(device.root / "events.jsonl", LIMIT)
        for number in range(100):
            log.emit(a_setting(number))
        lines = events_of(device)
        seen = [decode(next(lines)).seq]
        log.emit(a_setting("while it is read"))
        seen += [decode(line).seq for line in lines]
        log.close()
    assert (tmp_path / "pmem0" / "events.jsonl.1").exists()
    assert seen == list(range(seen[0], 102))


@pytest.mark.parametrize(("text", "value"), [("16M", 16 << 20), ("1048577", 1048577), ("1T", 1 << 40)])
def test_a_size_reads_as_it_is_said(text: str, value: int) -> None:
    assert log_size(text) == value
    assert size_text(value) == text


@pytest.mark.parametrize("text", ["", "0", "-16M", "1023K", "2T", "much", "16M 16M", "9" * 400])
def test_a_size_that_cannot_be(text: str) -> None:
    with pytest.raises(InvalidArgument, match="must be a size, 1M to 1T"):
        log_size(text)


WRITER = """
import logging, os, sys
from pathlib import Path
from daxemu.private_path import PrivatePath
from daxemu.supervisor.supervisor_log import SupervisorLog
logging.basicConfig(level=logging.INFO)
root = PrivatePath.at(Path(sys.argv[1]))
own = SupervisorLog(root / "supervisor.log", lambda: int(sys.argv[2]))
own.attach()
for number in range(int(sys.argv[3])):
    logging.info("%d %s", number, "x" * 1000)
    for name in ("supervisor.log", "supervisor.log.1"):
        if (root / name).exists():
            assert (root / name).lstat().st_size <= int(sys.argv[2]) // 2
os.write(1, b"stdout\\n")
own.detach()
"""


def write_log(directory: Path, messages: int) -> int:
    with open(directory / "supervisor.log", "ab") as output:
        return subprocess.run(
            [sys.executable, "-c", WRITER, directory, str(MIN_LOG_SIZE), str(messages)],
            stdout=output,
            stderr=output,
            check=False,
        ).returncode


def test_supervisor_log_keeps_to_its_limit(tmp_path: Path) -> None:
    assert write_log(tmp_path, 3000) == 0
    older = (tmp_path / "supervisor.log.1").read_text().splitlines()
    newer = (tmp_path / "supervisor.log").read_text().splitlines()
    assert newer.pop() == "stdout"
    found = [int(line.split()[0].rpartition(":")[2]) for line in older + newer]
    assert found == list(range(found[0], 3000))
    assert (tmp_path / "supervisor.log").stat().st_mode & 0o777 == 0o600


def test_supervisor_log_after_a_crash_between_the_rename_and_the_new_file(tmp_path: Path) -> None:
    (tmp_path / "supervisor.log.1").write_bytes(b"before\n")
    assert write_log(tmp_path, 3) == 0
    assert (tmp_path / "supervisor.log.1").read_text() == "before\n"
    assert len((tmp_path / "supervisor.log").read_text().splitlines()) == 4


def test_another_stderr_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "supervisor.log").write_bytes(b"of the last mount\n")
    with open(tmp_path / "terminal", "wb") as terminal:
        subprocess.run(
            [sys.executable, "-c", WRITER, tmp_path, str(MIN_LOG_SIZE), "2000"], stderr=terminal, check=True
        )
    assert (tmp_path / "supervisor.log").read_text() == "of the last mount\n"
    assert (tmp_path / "terminal").stat().st_size > 2_000_000
