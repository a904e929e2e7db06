"""watch: a live view of a mount in the terminal; keys inject and clear poison."""

from __future__ import annotations

import json
import os
import select
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live

from daxemu.cli.common import PATH
from daxemu.cli.output import say_json
from daxemu.cli.watch.model import Model
from daxemu.cli.watch.view import map_size, screen
from daxemu.errors import InvalidArgument
from daxemu.failure_kind import FailureKind

INTERVAL = 0.5
"""Seconds between two updates without a key."""
_ARROWS = {b"\x1b[A": "k", b"\x1b[B": "j", b"\x1b[C": "l", b"\x1b[D": "h"}

_KINDS = {"i": FailureKind.POISON, "L": FailureKind.LATENT}


@click.command()
@click.argument("mountpoint", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print the contents of the screen once, as JSON.")
def watch(mountpoint: Path, as_json: bool) -> None:
    """Watch a mount: a map of the device, its files, the processes that map the files, and new events.

    \b
    arrows, hjkl  move the cursor       i  poison the page at the cursor
    + -           zoom in, out          L  poison the page at the cursor, latent
    q             quit                  c  clear all poison at the cursor

    \b
    Example:
      daxemu watch /tmp/pmem
    """
    with Model.of(mountpoint) as model:
        if as_json:
            model.look(cells=64)
            say_json(json.loads(model.json()))
            return
        if not (sys.stdin.isatty() and sys.stdout.isatty()):
            raise InvalidArgument("watch needs a terminal: for a script use --json, daxemu status or log -f")
        _run(model)


def _run(model: Model) -> None:
    console = Console()
    with _keys() as keyboard, Live(console=console, screen=True, auto_refresh=False) as live:
        while not model.ended:
            columns, rows = map_size(console.width, console.height)
            model.look(cells=columns * rows)
            live.update(screen(model, console.width, console.height), refresh=True)
            if _wait(keyboard, model, columns):
                return


def _wait(keyboard: int, model: Model, columns: int) -> bool:
    """Handle keys until the next update. Return True to quit."""
    deadline = time.monotonic() + INTERVAL
    if not select.select([keyboard], [], [], max(0.0, deadline - time.monotonic()))[0]:
        return False
    typed = os.read(keyboard, 64)
    if not typed:
        return True
    for arrow, letter in _ARROWS.items():
        typed = typed.replace(arrow, letter.encode())
    return any(not press(model, key, columns) for key in typed.decode(errors="ignore"))


def press(model: Model, key: str, columns: int) -> bool:
    """Handle a key, on a map of ``columns`` columns. Return False to quit."""
    match key:
        case "q" | "\x03" | "\x04":
            return False
        case "h":
            model.move(-1)
        case "l":
            model.move(1)
        case "k":
            model.move(-columns)
        case "j":
            model.move(columns)
        case "+" | "=":
            model.zoom(closer=True)
        case "-":
            model.zoom(closer=False)
        case "i" | "L":
            model.inject(_KINDS[key])
        case "c":
            model.clear()
    return True


@contextmanager
def _keys() -> Iterator[int]:
    """Open the keyboard: one key at a time, without echo. Yields the file descriptor."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
