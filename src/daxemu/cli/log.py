"""log: the events of a mount."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from daxemu.cli.common import PATH, as_owner_option, become_owner_if_asked, connect
from daxemu.cli.output import complain, say, say_json
from daxemu.client import Client
from daxemu.client.connection import event_of, no_answer
from daxemu.errors import NotADevice, NotMounted
from daxemu.events import Event, decode
from daxemu.host.proc.mountinfo import mount_of
from daxemu.pmem.device_dir import DeviceDir
from daxemu.pmem.event_files import events_of
from daxemu.ratelimit import Ratelimit, suppressed_line

BURST = 100
"""Maximum number of lines of one kind in DEFAULT_INTERVAL seconds."""


class Dmesg:
    """Kernel log lines of events, with a rate limit for each function that prints lines.

    The kernel limits none of these lines (mm/memory-failure.c limits only the lines of unpoison): a real
    machine has few failures at a time, and its log is a ring. In daxemu one command can make thousands of
    lines that a person reads, so a storm is ``BURST`` lines and a number.

    The limit is applied here and not in the supervisor, because events are never dropped: all events are in
    events.jsonl, in subscriptions, and in the output of this verb without ``--dmesg``. The limit uses the
    time stamps of the events, so a log prints the same at any time.
    """

    def __init__(self) -> None:
        self._limits: dict[str, Ratelimit] = {}
        self._now = 0.0

    def lines(self, event: Event) -> Iterator[str]:
        """Yield the kernel log lines of an event; none for an event without lines, or above the limit."""
        text = event.dmesg()
        if text is None:
            return
        self._now = event.time
        func = event.printed_by()
        limit = self._limits.setdefault(func, Ratelimit(burst=BURST))
        go_ahead, missed = limit.ratelimit(event.time)
        if missed:
            yield self._stamped(suppressed_line(func, missed))
        if go_ahead:
            yield self._stamped(text)

    def rest(self) -> Iterator[str]:
        """Yield the last counts of suppressed lines, at the end of the log."""
        for func, limit in self._limits.items():
            if missed := limit.release():
                yield self._stamped(suppressed_line(func, missed))

    def _stamped(self, text: str) -> str:
        return f"[{self._now:.6f}] {text}"


@click.command()
@click.argument("where", type=PATH, metavar="MOUNTPOINT|DEVICE")
@click.option("-f", "--follow", is_flag=True, help="Continue with each new event until the mount ends.")
@click.option(
    "--dmesg",
    is_flag=True,
    help="Print the lines of the kernel log instead, and only these. A rate limit applies in a storm.",
)
@as_owner_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def log(where: Path, follow: bool, dmesg: bool, as_json: bool) -> None:
    """Print the events of a mount. For a mountpoint: the events of this mount. For a DEVICE: the events of
    all its mounts.

    \b
    Example:
      daxemu log /tmp/pmem -f --dmesg
    """
    kernel = Dmesg()
    for line in lines_of(where, follow):
        try:
            event = decode(line)
        except msgspec.MsgspecError:
            complain(f"daxemu: skipped a line that is not an event: {line[:80]!r}")
            continue
        if as_json:
            say_json(json.loads(line))
        elif dmesg:
            for text in kernel.lines(event):
                say(text)
        else:
            say(_line(event))
    for text in kernel.rest():
        say(text)


def _line(event: Event) -> str:
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    return f"{clock}.{int(event.time % 1 * 1000):03d}  {event.summary()}"


def lines_of(where: Path, follow: bool = False) -> Iterator[bytes]:
    """Yield the events of a mount, or of all mounts of a device, each as one line. Raises NotMounted.

    ``where`` is looked up in the table of mounts first, without access to the path: a mount may hang, or
    answer EIO to each access.
    """
    try:
        mount_of(where)
    except NotMounted:
        become_owner_if_asked(where.absolute())
        try:
            device = DeviceDir.look(where.absolute())
        except NotADevice:
            if (where / "device.toml").exists():
                raise
            device = None
        if device is None:
            raise
        return events_of(device)
    return _of_mount(where, follow)


def _of_mount(mountpoint: Path, follow: bool) -> Iterator[bytes]:
    with connect(mountpoint) as client:
        last = client.request("status")["events"]
        if not follow and not last:
            return
        if follow:
            client.set_patience(None)
        lines = client.follow_lines()
        while (line := _next(client, lines)) is not None:
            yield line
            if not follow and event_of(client.mount, line).seq >= last:
                return


def _next(client: Client, lines: Iterator[bytes]) -> bytes | None:
    try:
        return next(lines, None)
    except TimeoutError as error:
        raise no_answer(client.mount, client.pid) from error
