"""The supervisor's own log: repeated messages are counted, and every other message is written."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daxemu.events import SettingChanged
from daxemu.private_path import PrivatePath
from daxemu.ratelimit import DEFAULT_BURST
from daxemu.supervisor import event_log
from daxemu.supervisor.event_log import EventLog
from daxemu.supervisor.log_handler import EscapingFormatter, RatelimitedHandler, log_to_stderr
from tests.pmem.test_media import files_cannot_grow


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def handler(stream: io.StringIO) -> Iterator[RatelimitedHandler]:
    """Handler of the messages of event_log."""
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


HOSTILE = "\x1b[31m\nERROR n: forged \u202e\udcff"
SHOWN = "\\x1b[31m\\nERROR n: forged \\u202e\\xff"


def test_names_of_others_do_not_act_on_a_terminal_nor_forge_a_line() -> None:
    stream = io.StringIO()
    made = RatelimitedHandler(stream)
    made.setFormatter(EscapingFormatter("%(levelname)s %(name)s: %(message)s"))
    log = logging.Logger("n")
    log.addHandler(made)
    log.error("no file %s", HOSTILE)
    log.error("of its own", extra={"details": f"two\nlines {HOSTILE}"})
    try:
        raise ValueError(HOSTILE)
    except ValueError:
        log.exception("caught")
    lines = stream.getvalue().splitlines()
    assert lines[:4] == [f"ERROR n: no file {SHOWN}", "ERROR n: of its own", "    two", "    lines \\x1b[31m"]
    assert "    ValueError: \\x1b[31m" in lines
    assert [line for line in lines if not line.startswith("    ")] == [
        f"ERROR n: no file {SHOWN}",
        "ERROR n: of its own",
        "ERROR n: caught",
    ]
    assert stream.getvalue().isascii()


@pytest.mark.parametrize(
    "how", ["raise fault", "thread = Thread(target=fail); thread.start(); thread.join()"]
)
def test_an_exception_that_nothing_catches_is_a_message(how: str) -> None:
    code = (
        "import logging\nfrom threading import Thread\n"
        f"from {log_to_stderr.__module__} import log_to_stderr\n"
        f"log_to_stderr('%(levelname)s: %(message)s', logging.INFO)\n"
        f"fault = ValueError({HOSTILE!r})\ndef fail(): raise fault\n{how}\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    lines = done.stderr.decode("ascii").splitlines()
    assert lines[0] == "CRITICAL: uncaught exception"
    assert all(line.startswith("    ") for line in lines[1:])
    assert lines[-1] == "    ERROR n: forged \\u202e\\xff"
