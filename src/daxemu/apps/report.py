"""The matrix as a page: what was seen, a reading of it, and how to see one cell again."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any

import msgspec

import daxemu
from daxemu.apps.application import Application
from daxemu.apps.cell import Cell, Life, Outcome
from daxemu.apps.install import versions
from daxemu.apps.matrix import Wanted
from daxemu.apps.situations import Situation

MEANING = {
    Outcome.RIGHT: "everything it gave back is what was written",
    Outcome.REPORTS: "it says that something is wrong: an error, or it refuses to start",
    Outcome.AO: "killed by SIGBUS, BUS_MCEERR_AO: told of poison that it maps",
    Outcome.AR: "killed by SIGBUS, BUS_MCEERR_AR: it touched the poison",
    Outcome.SIGBUS: "killed by SIGBUS, BUS_ADRERR",
    Outcome.DIES: "ended by another signal",
    Outcome.HANGS: "no answer within the limit",
    Outcome.LOGGED: "what it gave back is wrong or not all, and only its log says something",
    Outcome.WRONG: "what it gave back is wrong or not all, and nothing says so",
}
KILLED = (Outcome.AO, Outcome.AR, Outcome.SIGBUS, Outcome.DIES)
LOSSES = (Outcome.WRONG, Outcome.LOGGED)


def summary(cells: Sequence[Wanted], made: Sequence[Cell]) -> dict[str, Any]:
    """Everything, for machines."""
    programs = list(dict.fromkeys(cell.application for cell in cells))
    return {
        "version": daxemu.__version__,
        "system": _system(),
        "programs": {a.name: {"about": a.about, "versions": versions(a.needs)} for a in programs},
        "cells": msgspec.to_builtins(made),
        "not_made": [
            {"application": c.application.name, "situation": c.situation.name, "reason": c.why_not}
            for c in cells
            if c.why_not
        ],
    }


def as_markdown(cells: Sequence[Wanted], made: Sequence[Cell]) -> str:
    """The page."""
    programs = list(dict.fromkeys(cell.application for cell in cells))
    situations = list(dict.fromkeys(cell.situation for cell in cells))
    found = {(cell.application, cell.situation): cell for cell in made}
    reasons = {(c.application.name, c.situation.name): c.why_not for c in cells}
    parts = [
        _HEAD.format(system=_system(), version=daxemu.__version__),
        _matrix(programs, situations, found, reasons),
        "",
        *(f"- **{outcome}**: {text}" for outcome, text in MEANING.items() if _occurs(made, outcome)),
        "- **-**: it has no journal",
        "",
        "The columns:",
        "",
        *(f"- **{s.title}** (`--situation {s.name}`): {s.about}" for s in situations),
        "",
        "## How to read this",
        "",
        _reading(made),
        "",
        _AGAIN,
        "",
        "## The programs",
        "",
        "| program | what runs | journal | version |",
        "|---|---|---|---|",
        *(_program(a) for a in programs),
        "",
        "Why it is so:",
        "",
        *(f"- `{a.name}`: {a.note}" for a in programs),
        "",
        "## Each cell",
        "",
        _DETAIL,
    ]
    for name, group in groupby(made, lambda cell: cell.application):
        parts += ["", f"### {name}", "", "| situation | hurt | under harm | restarted |", "|---|---|---|---|"]
        parts += [_row(cell) for cell in group]
    return "\n".join(parts) + "\n"


_HEAD = """\
# What real programs do when memory goes bad

Unmodified programs with data of their own on a daxemu mount, each cell on a fresh one: first what a program
does under the harm, then what it does when it is started again, with the harm still there. Seen, not
foretold: `daxemu apps` starts the program, hurts the page that holds a known record (or 16 bytes of it), has
it read everything, and compares each of its 2400 records with what was written. Made by `make apps` with
daxemu {version} on {system}.

## The matrix
"""

_AGAIN = """\
## One cell again

    daxemu apps --only PROGRAM --situation SITUATION

tells step by step what is run, what is hurt, which signals come, and what the program says:

```console
$ daxemu apps --only sqlite3-mmap --situation late
-- sqlite3-mmap makes its data
$ sqlite3 -batch -bail MOUNTPOINT/data/records.db
-- sqlite3-mmap is started
$ sqlite3 -batch MOUNTPOINT/data/records.db
   2400 records right
...
   Recovered, 0 told
...
=> SIGBUS AR
-- sqlite3-mmap is started again
$ sqlite3 -batch MOUNTPOINT/data/records.db
...
=> SIGBUS AR
sqlite3-mmap, late: SIGBUS AR, restarted: SIGBUS AR
```

`daxemu apps --list` names the programs that are here; `--install` gets the others, from Debian with apt-get
and from PyPI into the venv."""

_DETAIL = """\
Where it was hurt, and what the program said (the last line that tells most)."""


def _system() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        name = ""
    return ", ".join(filter(None, [f"Linux {platform.release()}", name, platform.machine()]))


def _occurs(made: Sequence[Cell], outcome: Outcome) -> bool:
    return any(life is not None and life.outcome is outcome for c in made for life in (c.first, c.again))


def _matrix(
    programs: Sequence[type[Application]],
    situations: Sequence[Situation],
    found: dict[tuple[str, str], Cell],
    reasons: dict[tuple[str, str], str],
) -> str:
    lines = [
        "| | " + " | ".join(s.title for s in situations) + " |",
        "|---|" + "---|" * len(situations),
    ]
    for a in programs:
        texts = []
        for s in situations:
            cell = found.get((a.name, s.name))
            why_not = reasons.get((a.name, s.name), "")
            texts.append(_short(cell) if cell else "-" if why_not == "no journal" else "absent")
        lines.append(f"| `{a.name}` | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def _short(cell: Cell) -> str:
    if cell.first is None or cell.again is None:
        return "not observed"
    words = [f"**{o}**" if o in LOSSES else str(o) for o in (cell.first.outcome, cell.again.outcome)]
    return words[0] + " / " + words[1]


def _reading(made: Sequence[Cell]) -> str:
    """What can be said of the whole, counted from it."""

    def those(test: Callable[[Life, Life], bool]) -> list[Cell]:
        return [
            c for c in made if c.situation != "healthy" and c.first and c.again and test(c.first, c.again)
        ]

    entries = [
        (
            "Wrong data, and nobody is told",
            those(lambda first, again: Outcome.WRONG in (first.outcome, again.outcome)),
        ),
        (
            "Wrong data, and only the program's log tells",
            those(lambda first, again: Outcome.LOGGED in (first.outcome, again.outcome)),
        ),
        ("Killed by a signal", those(lambda first, _: first.outcome in KILLED)),
        ("Hang", those(lambda first, again: Outcome.HANGS in (first.outcome, again.outcome))),
        (
            "Hurt, and all is right after the restart, with the poison left where it was",
            [
                c
                for c in those(lambda first, again: again.outcome is Outcome.RIGHT)
                if c.situation != "remove"
            ],
        ),
        (
            "Removed and put back, and all is right",
            [
                c
                for c in those(lambda first, again: again.outcome is Outcome.RIGHT)
                if c.situation == "remove"
            ],
        ),
        (
            "Removed and put back, and not all is right",
            [
                c
                for c in those(lambda first, again: again.outcome is not Outcome.RIGHT)
                if c.situation == "remove"
            ],
        ),
    ]
    total = len([c for c in made if c.situation != "healthy" and c.first])
    lines = [f"Of {total} cells in which something was hurt:", ""]
    for title, those_cells in entries:
        if not those_cells:
            lines.append(f"- **{title}**: none.")
            continue
        by_program = [
            f"`{name}` ({', '.join(c.situation for c in group)})"
            for name, group in groupby(those_cells, lambda c: c.application)
        ]
        lines.append(f"- **{title}**: {len(those_cells)}. {', '.join(by_program)}.")
    return "\n".join(lines)


def _program(a: type[Application]) -> str:
    found = ", ".join(f"{name} {version}" for name, version in versions(a.needs).items()) or "absent"
    return f"| `{a.name}` | {a.about} | {a.journal or 'none'} | {found} |"


def _row(cell: Cell) -> str:
    if cell.failed:
        return f"| {cell.situation} | {cell.hurt} | not observed: {_escape(cell.failed)} | |"
    return f"| {cell.situation} | {cell.hurt} | {_told(cell.first)} | {_told(cell.again)} |"


def _told(life: Life | None) -> str:
    if life is None:
        return ""
    return f"{life.outcome}" + (f": `{_escape(life.said)}`" if life.said else "")


def _escape(text: str) -> str:
    clean = "".join(c if c.isprintable() else "?" for c in text).replace("`", "'").replace("|", "/")
    return clean[:160] + ("..." if len(clean) > 160 else "")
