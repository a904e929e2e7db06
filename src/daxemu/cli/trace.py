"""trace: every operation of programs on a mount, and every step of failures."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any, TextIO

import click
import msgspec

from daxemu.cli.common import PATH, connect
from daxemu.cli.output import for_people, say
from daxemu.errors import InvalidArgument
from daxemu.events import Event, decode
from daxemu.trace_record import OperationTrace, StepTrace, TraceRecord

_record = msgspec.json.Decoder(TraceRecord).decode
_MICRO = 1e6


@click.command()
@click.argument("mountpoint", type=PATH)
@click.option("-o", "output", type=PATH, help="FILE.json is for Perfetto; else JSON lines.")
@click.option("--file", "glob", metavar="GLOB", help="Only operations on these files: *.log or dir/*.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="End after this time.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def trace(
    mountpoint: Path, output: Path | None, glob: str | None, seconds: float | None, as_json: bool
) -> None:
    """Record each operation of programs on a mount, with its process, range, result and duration, and each
    step of a failure. Ctrl-C or the end of the mount ends the trace. Meanwhile the supervisor serves each
    request in Python, so more slowly.

    \b
    Example:
      daxemu trace /tmp/pmem -o trace.json --seconds 10
    """
    if output is not None and as_json:
        raise InvalidArgument("-o and --json: give one of them")
    with connect(mountpoint) as client, connect(mountpoint) as follower:
        last = follower.request("status")["events"]
        client.set_patience(None)
        follower.set_patience(None)
        lines = client.trace_lines(glob)
        until = None if seconds is None else threading.Timer(seconds, client.hang_up)
        with _writer(output, as_json) as keep, _limited(until), suppress(KeyboardInterrupt):
            events = threading.Thread(target=_follow, args=(follower.follow_lines(last), keep), daemon=True)
            events.start()
            for line in lines:
                keep(_record(line))
        follower.hang_up()
        events.join()


def _follow(lines: Iterator[bytes], keep: Keep) -> None:
    for line in lines:
        keep(decode(line))


@contextmanager
def _limited(timer: threading.Timer | None) -> Iterator[None]:
    if timer is not None:
        timer.start()
    try:
        yield
    finally:
        if timer is not None:
            timer.cancel()


Keep = Callable[[TraceRecord | Event], None]


@contextmanager
def _writer(output: Path | None, as_json: bool) -> Iterator[Keep]:
    """Return a function that writes one record, in the form of the options. For any thread."""
    lock = threading.Lock()
    is_chrome = output is not None and output.suffix == ".json"
    opened = nullcontext(None) if output is None else output.open("w", buffering=1)
    with opened as file:
        chrome = _Chrome(file) if file is not None and is_chrome else None

        def keep(record: TraceRecord | Event) -> None:
            with lock:
                if chrome is not None:
                    chrome.add(record)
                elif file is not None or as_json:
                    line = msgspec.json.encode(record).decode()
                    say(line) if file is None else file.writelines((line, "\n"))
                else:
                    say(_line(record))

        try:
            yield keep
        finally:
            with lock:
                if chrome is not None:
                    chrome.end()


def _line(record: TraceRecord | Event) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(record.time)) + f".{int(record.time % 1 * 1e6):06d}"
    if isinstance(record, OperationTrace):
        where = f" {record.offset:#x}+{record.length:#x}" if record.length else ""
        result = f"errno {record.errno}" if record.errno else "ok"
        who = f"{record.comm}:{record.tid}"
        took = f"{record.seconds * _MICRO:.0f} us"
        return for_people(f"{clock}  {who}  {record.op} {record.path or '?'}{where}  {result}  {took}")
    if isinstance(record, StepTrace):
        what = f"  {record.what}" if record.what else ""
        took = f"{record.seconds * _MICRO:.0f} us"
        return f"{clock}  failure {record.failure}  {record.step} of pfn {record.pfn:#x}{what}  {took}"
    if isinstance(record, Event):
        return for_people(f"{clock}  {record.summary()}")
    return f"{clock}  {record.count} records were lost: the reader was too slow"


class _Chrome:
    """Writer of the Trace Event Format: a track for each thread, and one for each failure."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._file.writelines(("[",))
        self._between = "\n"
        self._named: set[int] = set()

    def add(self, record: TraceRecord | Event) -> None:
        """Write a record as a complete event ("X"), or as an instant ("i")."""
        if isinstance(record, OperationTrace):
            if record.tid not in self._named:
                self._named.add(record.tid)
                of_thread = {"pid": record.pid, "tid": record.tid}
                name = {"name": f"{record.comm}:{record.tid}"}
                self._put({"name": "thread_name", "ph": "M", **of_thread, "args": name})
            shown: dict[str, Any] = {"path": record.path, "errno": record.errno}
            shown |= {"offset": record.offset, "length": record.length}
            span = self._span(record.op, record.time, record.seconds)
            self._put({**span, "cat": "operation", "pid": record.pid, "tid": record.tid, "args": shown})
        elif isinstance(record, StepTrace):
            shown = {"pfn": hex(record.pfn), "nr_pages": record.nr_pages, "what": record.what}
            span = self._span(record.step, record.time, record.seconds)
            self._put({**span, "cat": "failure", "pid": 0, "tid": record.failure, "args": shown})
        else:
            shown = msgspec.to_builtins(record)
            instant = {"name": type(record).__name__, "ph": "i", "s": "g", "ts": record.time * _MICRO}
            self._put({**instant, "pid": 0, "tid": 0, "args": shown})

    @staticmethod
    def _span(name: str, began: float, seconds: float) -> dict[str, Any]:
        return {"name": name, "ph": "X", "ts": began * _MICRO, "dur": seconds * _MICRO}

    def _put(self, entry: dict[str, Any]) -> None:
        self._file.writelines((self._between, json.dumps(entry)))
        self._between = ",\n"

    def end(self) -> None:
        """Write the end of the list."""
        self._file.writelines(("\n]\n",))
