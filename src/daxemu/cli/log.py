"""log: what happened on a mount."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import click
import msgspec

from daxemu.client import Client
from daxemu.errors import DaxemuError, NotMounted
from daxemu.events import Event, decode
from daxemu.host.mountinfo import mount_of


@click.command()
@click.argument("where", type=click.Path(path_type=Path), metavar="MOUNTPOINT|DEVICE")
@click.option("-f", "--follow", is_flag=True, help="Go on with each new event until the mount ends.")
@click.option(
    "--dmesg", is_flag=True, help="The kernel's own lines, and nothing that the kernel would not log."
)
@click.option("--json", "as_json", is_flag=True, help="One JSON object a line.")
def log(where: Path, follow: bool, dmesg: bool, as_json: bool) -> None:
    """Print the events of a mount: of this mount alone, or given a DEVICE of all its mounts.

    \b
    Example:
      daxemu log /tmp/pmem -f --dmesg
    """
    for line in lines_of(where, follow):
        try:
            event = decode(line)
        except msgspec.MsgspecError:
            click.echo(f"daxemu: skipped a line that is no event: {line[:80]!r}", err=True)
            continue
        text = line.decode() if as_json else _line(event, dmesg)
        if text is not None:
            click.echo(text)


def _line(event: Event, dmesg: bool) -> str | None:
    if dmesg:
        text = event.dmesg()
        return None if text is None else f"[{event.time:.6f}] {text}"
    clock = time.strftime("%H:%M:%S", time.localtime(event.time))
    return f"{clock}.{int(event.time % 1 * 1000):03d}  {event.summary()}"


def lines_of(where: Path, follow: bool = False) -> Iterator[bytes]:
    """The events of a mount, or of all mounts of a device, each as its line. Raises NotMounted.

    Looked up among the mounts first, without touching the path: a mount may hang, or be EIO throughout.
    """
    try:
        mount_of(where)
    except NotMounted:
        if not (where / "device.toml").is_file():
            raise
        return _of_device(where)
    return _of_mount(where, follow)


def _of_device(device: Path) -> Iterator[bytes]:
    try:
        with open(device / "events.jsonl", "rb") as file:
            yield from (line.rstrip(b"\n") for line in file)
    except FileNotFoundError:
        return
    except OSError as error:
        raise DaxemuError(f"{device}/events.jsonl: {error.strerror}; read it as its owner") from error


def _of_mount(mountpoint: Path, follow: bool) -> Iterator[bytes]:
    with Client.at(mountpoint) as client:
        last = client.request("status")["events"]
        if not follow and not last:
            return
        for line in client.follow_lines():
            yield line
            if not follow and decode(line).seq >= last:
                return
