"""watch: a mount in the terminal, live; keys make its memory bad and good again."""

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
"""Seconds between looks at the mount while nobody types."""
_ARROWS = {b"\x1b[A": "k", b"\x1b[B": "j", b"\x1b[C": "l", b"\x1b[D": "h"}

_KINDS = {"i": FailureKind.POISON, "L": FailureKind.LATENT}


@click.command()
@click.argument("mountpoint", type=PATH)
@click.option("--json", "as_json", is_flag=True, help="Print what the screen would show, once, as JSON.")
def watch(mountpoint: Path, as_json: bool) -> None:
    """Watch a mount: the device as a map, files on it, who maps them, events as they come.

    \b
    arrows, hjkl  move the cursor       i  poison the page at the cursor
    + -           look closer, farther  L  the same, latent: nobody is told
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
    """Do what is typed until it is time to look again. Returns whether to quit."""
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
    """Do what a key says, on a map of so many columns. Returns whether to go on."""
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
    """The keyboard, a key at a time and not echoed."""
    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield fd
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)
