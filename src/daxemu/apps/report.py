"""The matrix as a page: what was seen, a reading of it, and how to see one cell again."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import msgspec

import daxemu
from daxemu.apps.application import Application
from daxemu.apps.cell import Cell, Life, Outcome
from daxemu.apps.install import versions
from daxemu.apps.matrix import Wanted
from daxemu.apps.situations import BY_NAME, Situation
from daxemu.text import for_people

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
        *(["- **+**: it did not end when it was asked to, and was killed"] if _stays(made) else []),
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
it read everything, and compares each of its 2400 records with what was written. What a mount does otherwise
than DAX on hardware is in [fidelity](fidelity.md): of that, a read(2) of good pages and poison after them
shows here, which is EIO there and the good bytes first here.

Made by `make apps` with daxemu {version} on {system}.

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
   Recovered, 0 processes signalled
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


def _stays(made: Sequence[Cell]) -> bool:
    return any(life is not None and life.stays for c in made for life in (c.first, c.again))


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
    return " / ".join(
        (f"**{life.outcome}**" if life.outcome in LOSSES else str(life.outcome))
        + (" +" if life.stays else "")
        for life in (cell.first, cell.again)
    )


def _reading(made: Sequence[Cell]) -> str:
    """What can be said of the whole, counted from it."""
    hurt = [c for c in made if BY_NAME[c.situation].harm != "none" and c.first and c.again]
    poison = [c for c in hurt if BY_NAME[c.situation].harm in ("poison", "latent")]
    silent = [c for c in hurt if BY_NAME[c.situation].harm == "silent"]
    removal = [c for c in hurt if BY_NAME[c.situation].harm == "removal"]

    def ends(cells: Sequence[Cell], *outcomes: Outcome) -> list[Cell]:
        return [c for c in cells if c.again is not None and c.again.outcome in outcomes]

    def either(cells: Sequence[Cell], *outcomes: Outcome) -> list[Cell]:
        return [c for c in cells if any(life and life.outcome in outcomes for life in (c.first, c.again))]

    def begins(cells: Sequence[Cell], *outcomes: Outcome) -> list[Cell]:
        return [c for c in cells if c.first is not None and c.first.outcome in outcomes]

    entries = (
        (
            "Poison in the data file, and wrong data without an error",
            either([c for c in poison if BY_NAME[c.situation].part == "data"], *LOSSES),
        ),
        (
            "Poison in the journal, and acknowledged data is gone without an error",
            either([c for c in poison if BY_NAME[c.situation].part == "journal"], *LOSSES),
        ),
        ("Other bytes, and wrong data without an error", either(silent, *LOSSES)),
        ("Of these, its log says something once", begins(hurt, Outcome.LOGGED)),
        ("Killed by a signal", begins(hurt, *KILLED)),
        ("No answer", either(hurt, Outcome.HANGS)),
        ("It did not end when it was asked to", [c for c in hurt if c.first is not None and c.first.stays]),
        ("Poison, and all is right after a restart with the poison still there", ends(poison, Outcome.RIGHT)),
        ("Removed and put back, and all is right", ends(removal, Outcome.RIGHT)),
        (
            "Removed and put back, and not all is right",
            [c for c in removal if c not in ends(removal, Outcome.RIGHT)],
        ),
    )
    lines = [f"Of {len(hurt)} cells in which something was hurt:", ""]
    return "\n".join(lines + [f"- **{title}**: {_named(cells)}." for title, cells in entries])


def _named(cells: Sequence[Cell]) -> str:
    """Which cells, programs with the same situations together."""
    if not cells:
        return "none"
    by_program: dict[str, list[str]] = {}
    for cell in cells:
        by_program.setdefault(cell.application, []).append(cell.situation)
    alike: dict[str, list[str]] = {}
    for name, situations in by_program.items():
        alike.setdefault(", ".join(situations), []).append(f"`{name}`")
    parts = [f"{', '.join(names)} ({situations})" for situations, names in alike.items()]
    return f"{len(cells)}: " + "; ".join(parts)


def _program(a: type[Application]) -> str:
    found = ", ".join(f"{name} {version}" for name, version in versions(a.needs).items()) or "absent"
    return f"| `{a.name}` | {a.about} | {a.journal or 'none'} | {found} |"


def _row(cell: Cell) -> str:
    if cell.failed:
        return f"| {cell.situation} | {cell.hurt} | not observed: `{_escape(cell.failed)}` | |"
    return f"| {cell.situation} | {cell.hurt} | {_told(cell.first)} | {_told(cell.again)} |"


def _told(life: Life | None) -> str:
    if life is None:
        return ""
    return f"{life.outcome}" + (f": `{_escape(life.said)}`" if life.said else "")


def _escape(text: str) -> str:
    """For the inside of a code span in a table."""
    clean = for_people(text).replace("`", "'").replace("|", "/")
    return clean[:160] + ("..." if len(clean) > 160 else "")
