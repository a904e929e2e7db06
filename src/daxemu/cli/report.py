"""report: the events and the state of a mount as one self-contained HTML file."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import click

from daxemu.cli.common import PATH, as_owner_option, emit, human, json_option
from daxemu.cli.log import lines_of
from daxemu.cli.watch.model import Model, Seen
from daxemu.cli.watch.view import LEGEND, glyph
from daxemu.errors import DaxemuError, NotMounted
from daxemu.events import Event, MemoryFailureHandled, SignalSent, decode
from daxemu.host.proc.mountinfo import mount_of
from daxemu.text import for_html
from daxemu.units import DIV_ROUND_UP

COLUMNS, CELLS = 64, 1024
BARS = 60
_COLORS = {"·": "#eee", "M": "#69c", "S": "#4bb", "X": "#c22", "?": "#ec3"}
_STYLE = """
body { font: 14px sans-serif; margin: 2em auto; max-width: 70em; color: #222 }
h1, h2 { font-weight: normal } table { border-collapse: collapse }
td, th { padding: 2px 10px; text-align: left; vertical-align: top; border-bottom: 1px solid #ddd }
td { font-family: monospace } .map { line-height: 0 } rect { shape-rendering: crispEdges }
"""


@click.command()
@click.argument("where", type=PATH, metavar="MOUNTPOINT|DEVICE")
@click.option("-o", "--output", type=PATH, default=Path("daxemu-report.html"), show_default=True)
@as_owner_option
@json_option
def report(where: Path, output: Path, as_json: bool) -> None:
    """Write the events and the present state of a mount to one HTML file.

    For a DEVICE that is not mounted, the file contains the events only.

    \b
    Example:
      daxemu report /tmp/pmem -o poison.html
    """
    events = [decode(line) for line in lines_of(where)]
    seen, title = _look(where)
    try:
        output.write_text(page(title, events, seen), encoding="utf-8")
    except OSError as error:
        raise DaxemuError(f"{output}: {error.strerror}; give another file with -o") from error
    emit({"output": str(output), "events": len(events)}, as_json, f"{output}: {len(events)} events")


def _look(where: Path) -> tuple[Seen | None, str]:
    try:
        mount = mount_of(where)
    except NotMounted:
        return None, f"{where}, not mounted"
    with Model(mount) as model:
        model.look(cells=CELLS)
        return model.seen, f"{model.mount.mountpoint} ({model.mount.device})"


def page(title: str, events: Sequence[Event], seen: Seen | None) -> str:
    """Return the whole HTML page."""
    parts = [f"<!doctype html><html><head><meta charset=utf-8><title>daxemu: {for_html(title)}</title>"]
    parts += [f"<style>{_STYLE}</style></head><body><h1>{for_html(title)}</h1>"]
    if seen is not None:
        parts += _state(seen)
    parts += _summary(events)
    parts += ["<h2>Events</h2>", *_table(("time", "", "event"), map(_event, events))]
    return "\n".join([*parts, "</body></html>\n"])


def _state(seen: Seen) -> Iterator[str]:
    status = seen.status
    used = human((status.blocks - status.free_blocks) * 4096)
    rows = [
        ("state", status.state + (f": {status.reason}" if status.reason else "")),
        ("size", f"{human(status.size)}, {used} used, pfns from {status.base_pfn:#x}"),
        ("poison", f"{status.poisoned_sectors} sectors, {status.badblocks} of them known"),
        ("failures", ", ".join(f"{count} {name}" for name, count in status.counters.items())),
        ("settings", " ".join(f"{name}={value}" for name, value in status.settings.items())),
    ]
    yield from _table(("", ""), rows)
    yield f"<h2>The device, {human(seen.survey.cell)} a cell</h2>"
    yield _map(seen)
    yield f"<p>{for_html('  '.join(f'{sign} {meaning}' for sign, meaning in LEGEND))}</p>"
    yield "<h2>Damaged files</h2>"
    lost = [(each.path, f"{each.offset:#x}", str(each.length)) for each in seen.damaged]
    yield from _table(("file", "offset", "length"), lost)
    yield "<h2>Files</h2>"
    yield from _table(("file", "bytes"), [(use.path, human(use.bytes)) for use in seen.survey.files])
    yield "<h2>Mapped by</h2>"
    names = {use.ino: use.path for use in seen.survey.files}
    mapped = [
        (f"{each.comm}:{each.pid}", names.get(each.ino, f"inode {each.ino}"), human(each.length))
        for each in seen.mapped
    ]
    yield from _table(("process", "file", "bytes"), mapped)


def _map(seen: Seen) -> str:
    cells = []
    for index, cell in enumerate(seen.survey.cells):
        sign = glyph(cell, seen.survey.cell)
        x, y = index % COLUMNS * 12, index // COLUMNS * 12
        at = seen.survey.offset + index * seen.survey.cell
        hint = f"{at:#x}: {cell.used} used, {cell.bad} bad, {cell.latent} latent"
        cells.append(_rect(x, y, 11, _COLORS.get(sign, "#5a5"), hint))
    height = DIV_ROUND_UP(len(cells), COLUMNS) * 12
    return f'<svg class=map width="{COLUMNS * 12}" height="{height}">{"".join(cells)}</svg>'


def _rect(x: int, y: int, height: int, color: str, hint: str) -> str:
    shape = f'x="{x}" y="{y}" width="11" height="{height}" fill="{color}"'
    return f"<rect {shape}><title>{hint}</title></rect>"


def _summary(events: Sequence[Event]) -> Iterator[str]:
    """Yield the counts of events, outcomes and signal results, and the timeline."""
    yield "<h2>Summary</h2>"
    yield from _table(("event", "count"), Counter(type(event).__name__ for event in events).most_common())
    failures = Counter(event.outcome.value for event in events if isinstance(event, MemoryFailureHandled))
    signals = Counter(event.result for event in events if isinstance(event, SignalSent))
    yield from _table(("failures", "count"), failures.most_common())
    yield from _table(("signals", "count"), signals.most_common())
    if events:
        yield _timeline([event.time for event in events])


def _timeline(times: Sequence[float]) -> str:
    first, last = min(times), max(times)
    step = (last - first) / BARS or 1.0
    counts = Counter(min(BARS - 1, int((at - first) / step)) for at in times)
    most = max(counts.values())
    bars = "".join(
        _rect(slot * 12, 60 - 60 * count // most, 60 * count // most, "#69c", f"{count} events")
        for slot, count in sorted(counts.items())
    )
    return f'<p>Events in {last - first:.1f} s</p><svg width="{BARS * 12}" height="60">{bars}</svg>'


def _event(event: Event) -> tuple[str, str, str]:
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(event.time))
    return f"{clock}.{int(event.time % 1 * 1000):03d}", type(event).__name__, event.summary()


def _table(header: tuple[str, ...], rows: Iterable[tuple[object, ...]]) -> Iterator[str]:
    found = list(rows)
    if not found:
        yield "<p>none</p>"
        return
    yield "<table>"
    if any(header):
        yield "<tr>" + "".join(f"<th>{for_html(cell)}</th>" for cell in header) + "</tr>"
    for row in found:
        yield "<tr>" + "".join(f"<td>{for_html(str(cell))}</td>" for cell in row) + "</tr>"
    yield "</table>"
