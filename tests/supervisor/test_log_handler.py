"""The supervisor's own log: what is said over and over is counted, and everything else is there."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from daxemu.events import SettingChanged
from daxemu.private_path import PrivatePath
from daxemu.ratelimit import DEFAULT_BURST
from daxemu.supervisor import event_log
from daxemu.supervisor.event_log import EventLog
from daxemu.supervisor.log_handler import RatelimitedHandler
from tests.pmem.test_media import files_cannot_grow


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def handler(stream: io.StringIO) -> Iterator[RatelimitedHandler]:
    """What handles the messages of event_log."""
    made = RatelimitedHandler(stream)
    made.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    event_log.log.addHandler(made)
    yield made
    event_log.log.removeHandler(made)


def test_a_full_disk_in_a_storm(handler: RatelimitedHandler, stream: io.StringIO, tmp_path: Path) -> None:
    log = EventLog(PrivatePath.at(tmp_path) / "events.jsonl")
    with files_cannot_grow():
        for number in range(1000):
            log.emit(SettingChanged(name="n", value=str(number)))
    log.close()
    assert log.emitted == 1000
    event_log.log.warning("something else")
    handler.close()
    lines = stream.getvalue().splitlines()
    assert sum("is not in the file" in line for line in lines) == DEFAULT_BURST
    assert lines[DEFAULT_BURST:] == [
        f"WARNING {event_log.__name__}: something else",
        f"WARNING {event_log.__name__}: _append: {1000 - DEFAULT_BURST} callbacks suppressed",
    ]


def test_afterwards_it_says_how_many_there_were(handler: RatelimitedHandler, stream: io.StringIO) -> None:
    def message(created: float) -> logging.LogRecord:
        record = logging.LogRecord("n", logging.ERROR, "/f.py", 7, "again", (), None, func="commit")
        record.created = created
        return record

    for created in [100.0] * 25 + [200.0]:
        handler.handle(message(created))
    lines = stream.getvalue().splitlines()
    assert lines == ["ERROR n: again"] * 10 + ["WARNING n: commit: 15 callbacks suppressed", "ERROR n: again"]
