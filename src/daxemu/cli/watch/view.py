"""Screen of watch: draws the state of a mount, for a terminal of any size."""

from __future__ import annotations

import time

from rich.console import Group
from rich.layout import Layout
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from daxemu.cli.common import human
from daxemu.cli.output import for_people
from daxemu.cli.watch.model import Model
from daxemu.survey_report import Cell

HEAD, FOOT, FRAME = 3, 1, 2
MIN_PANEL = 3
KEYS = "arrows move  + - zoom  i poison  L latent  c clear  q quit"
LEGEND = (("·", "free"), ("░▒▓█", "used"), ("M", "metadata"), ("S", "shared"), ("X", "bad"), ("?", "latent"))
_DENSITY = "░▒▓█"
_STYLES = {"M": "blue", "S": "cyan", "X": "bold white on red", "?": "bold black on yellow", "·": "dim"}


def map_size(width: int, height: int) -> tuple[int, int]:
    """Return the columns and rows of the map on a screen of ``width`` x ``height`` characters."""
    return max(8, width - FRAME), max(2, (height - HEAD - FOOT) * 2 // 5 - FRAME)


def glyph(cell: Cell, size: int) -> str:
    """Return one character for a part of the device of ``size`` bytes: the sign of its worst state."""
    if cell.bad:
        return "X"
    if cell.latent:
        return "?"
    if not cell.used:
        return "·"
    if cell.metadata * 2 > cell.used:
        return "M"
    if cell.shared * 2 > cell.used:
        return "S"
    return _DENSITY[min(len(_DENSITY) - 1, cell.used * len(_DENSITY) // size)]


def screen(model: Model, width: int, height: int) -> Layout:
    """Return the whole screen, of ``width`` x ``height`` characters."""
    columns, rows = map_size(width, height)
    below = height - HEAD - FOOT - rows - FRAME
    lists = below // 2 if below >= 2 * MIN_PANEL else 0
    layout = Layout()
    layout.split_column(
        Layout(_head(model), size=HEAD),
        Layout(_map(model, columns), size=rows + FRAME),
        Layout(name="lists", size=lists or None),
        Layout(_events(model, below - lists - FRAME), size=max(1, below - lists)),
        Layout(Text(KEYS, style="reverse", no_wrap=True, overflow="crop"), size=FOOT),
    )
    layout["lists"].visible = lists > 0
    layout["lists"].split_row(
        Layout(_files(model, lists - FRAME), ratio=3), Layout(_mappings(model, lists - FRAME), ratio=2)
    )
    return layout


def _text(name: str, style: str = "") -> Text:
    return Text(for_people(name), style=style, no_wrap=True, overflow="ellipsis")


def _line(*parts: str, style: str = "") -> Text:
    return Text(for_people("  ".join(parts)), style=style, no_wrap=True, overflow="ellipsis")


def _head(model: Model) -> Group:
    status = model.now.status
    used = (status.blocks - status.free_blocks) * 4096
    state = status.state + (f": {status.reason}" if status.reason else "")
    if status.mode == "direct":
        state += ", direct"
    counters = ", ".join(f"{count} {name}" for name, count in status.counters.items() if count) or "none"
    rates = ", ".join(f"{rate:.1f} {name}/s" for name, rate in model.rates().items())
    return Group(
        _line(
            f"{status.mountpoint}  ({status.device})",
            state,
            f"{human(status.size)}, {human(used)} used",
            style="bold" if status.state == "mounted" else "bold red",
        ),
        _line(
            f"poison: {status.poisoned_sectors} sectors, {status.badblocks} known",
            f"failures: {counters}",
            f"settings: {' '.join(f'{k}={v}' for k, v in status.settings.items())}",
        ),
        _line(*([model.message] if model.message else []), rates),
    )


def _map(model: Model, columns: int) -> Panel:
    survey = model.now.survey
    text = Text(no_wrap=True, overflow="crop")
    for index, cell in enumerate(survey.cells):
        if index and index % columns == 0:
            text.append("\n")
        shown = glyph(cell, survey.cell)
        style = _STYLES.get(shown, "green")
        text.append(shown, style=f"{style} reverse" if index == model.cursor else style)
    end = min(survey.offset + len(survey.cells) * survey.cell, model.now.status.size)
    legend = "  ".join(f"{sign} {meaning}" for sign, meaning in LEGEND)
    return Panel(
        text,
        title=f"device {survey.offset:#x}-{end:#x}, {human(survey.cell)} a cell",
        subtitle=legend,
        padding=0,
    )


def _files(model: Model, rows: int) -> Panel:
    """Return the panel of the files at the cursor."""
    here, damaged = model.now.here, {lost.ino for lost in model.now.damaged}
    grid = _grid()
    for use in here.files[:rows]:
        style = "red" if use.ino in damaged else ""
        grid.add_row(
            _text(use.path, style),
            human(use.bytes),
            f"from {use.file_offset:#x}",
        )
    if not here.files:
        grid.add_row("no file" if not here.cells[0].metadata else "the filesystem's own records", "", "")
    more = f", {len(here.files) - rows} more" if len(here.files) > rows else ""
    return Panel(grid, title=f"at the cursor: {here.offset:#x}+{here.cell:#x}{more}", padding=0)


def _mappings(model: Model, rows: int) -> Panel:
    mapped = model.now.mapped
    grid = _grid()
    for each in mapped[:rows]:
        grid.add_row(
            _text(f"{each.comm}:{each.pid}"),
            human(each.length),
            _text(model.path_of(each.ino)),
        )
    if not mapped:
        grid.add_row("no process", "", "")
    return Panel(grid, title=f"mapped by: {len({each.pid for each in mapped})} processes", padding=0)


def _events(model: Model, rows: int) -> Panel:
    lines = [
        _line(time.strftime("%H:%M:%S", time.localtime(event.time)), event.summary())
        for event in list(model.events)[-max(1, rows) :]
    ]
    return Panel(Group(*lines), title=f"events: {model.now.status.events}", padding=0)


def _grid() -> Table:
    grid = Table.grid(expand=True, padding=(0, 1))
    grid.add_column(ratio=1, no_wrap=True)
    grid.add_column(justify="right", no_wrap=True)
    grid.add_column(no_wrap=True, overflow="ellipsis")
    return grid
