"""daxemu log: all the events, or the kernel's lines, of which a storm makes no more than a number."""

from __future__ import annotations

import json
from pathlib import Path

from click.testing import CliRunner

from daxemu.cli.log import BURST
from daxemu.cli.main import main
from daxemu.events import Event, FilesystemShutdown, MemoryFailureHandled, Mounted, Outcome, encode
from daxemu.ratelimit import DEFAULT_INTERVAL
from tests.support.core import Core

START = 1_700_000_000.0


def a_failure(pfn: int, time: float) -> MemoryFailureHandled:
    return MemoryFailureHandled(
        time=time, pfn=pfn, nr_pages=1, page_type="dax page", outcome=Outcome.RECOVERED, told=0, files=1
    )


def log(device: Path, events: list[Event], *options: str) -> list[str]:
    """Return the output of ``daxemu log`` for a device with ``events``."""
    (device / "events.jsonl").write_bytes(b"".join(encode(event) + b"\n" for event in events))
    done = CliRunner().invoke(main, ["log", str(device), *options])
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


def test_a_few_lines_are_all_there(core: Core) -> None:
    events: list[Event] = [Mounted(device="d", mountpoint="/m", size=1), a_failure(16, START)]
    line = f"[{START:.6f}] Memory failure: 0x10: recovery action for dax page: Recovered"
    assert log(core.path, events, "--dmesg") == [line]


def test_of_a_storm_a_burst_and_a_number(core: Core) -> None:
    events: list[Event] = [a_failure(pfn, START + pfn / 1e6) for pfn in range(5000)]
    # Another message is another limit.
    events.append(FilesystemShutdown(time=START + 1, device="pmem0", reason="Shutting down filesystem."))
    lines = log(core.path, events, "--dmesg")
    assert sum("recovery action" in line for line in lines) == BURST
    assert "Shutting down filesystem." in lines[BURST]
    assert lines[BURST + 1 :] == [f"[{START + 1:.6f}] action_result: {5000 - BURST} callbacks suppressed"]


def test_after_the_interval_the_number_comes_before_the_next_line(core: Core) -> None:
    later = START + DEFAULT_INTERVAL + 1
    events: list[Event] = [a_failure(pfn, START) for pfn in range(BURST + 7)]
    lines = log(core.path, [*events, a_failure(0xABC, later)], "--dmesg")
    assert len(lines) == BURST + 2
    assert lines[-2] == f"[{later:.6f}] action_result: 7 callbacks suppressed"
    assert "0xabc" in lines[-1]


def test_the_events_themselves_are_complete(core: Core) -> None:
    events: list[Event] = [a_failure(pfn, START) for pfn in range(2000)]
    assert [json.loads(line)["pfn"] for line in log(core.path, events, "--json")] == list(range(2000))
    assert [json.loads(line)["pfn"] for line in log(core.path, events, "--json", "--dmesg")] == list(
        range(2000)
    )
    assert len(log(core.path, events)) == 2000
