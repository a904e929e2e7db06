"""Report of the matrix as a Markdown page: observations, a summary, and instructions to repeat a cell."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

import daxemu
from daxemu.apps.application import Application
from daxemu.apps.cell import Behaviour, MatrixCell, ProgramLife
from daxemu.apps.differences import differences
from daxemu.apps.install import versions
from daxemu.apps.matrix import Wanted
from daxemu.apps.situations import BY_NAME, Situation
from daxemu.events.mounts import Mode
from daxemu.text import for_people

MEANING = {
    Behaviour.RIGHT: "all records came back as written",
    Behaviour.REPORTS: "the program reports an error, or refuses to start",
    Behaviour.AO: "killed by SIGBUS, BUS_MCEERR_AO: signalled because the poisoned page was mapped",
    Behaviour.AR: "killed by SIGBUS, BUS_MCEERR_AR: the program consumed the poison",
    Behaviour.SIGBUS: "killed by SIGBUS, BUS_ADRERR",
    Behaviour.DIES: "ended by another signal",
    Behaviour.HANGS: "no answer within the limit",
    Behaviour.LOGGED: "records are wrong or missing, and only the log of the program reports an error",
    Behaviour.WRONG: "records are wrong or missing, and nothing reports an error",
}
KILLED = (Behaviour.AO, Behaviour.AR, Behaviour.SIGBUS, Behaviour.DIES)
LOSSES = (Behaviour.WRONG, Behaviour.LOGGED)


def summary(cells: Sequence[Wanted], made: Sequence[MatrixCell]) -> dict[str, Any]:
    """Return all observations as JSON-compatible builtins."""
    programs = list(dict.fromkeys(cell.application for cell in cells))
    return {
        "version": daxemu.__version__,
        "system": _system(),
        "modes": list(dict.fromkeys(cell.mode for cell in cells)),
        "programs": {a.name: {"about": a.about, "versions": versions(a.needs)} for a in programs},
        "cells": msgspec.to_builtins(made),
        "not_made": [
            {
                "application": c.application.name,
                "situation": c.situation.name,
                "mode": c.mode,
                "reason": c.why_not,
            }
            for c in cells
            if c.why_not
        ],
    }


def as_markdown(cells: Sequence[Wanted], made: Sequence[MatrixCell]) -> str:
    """Return the page."""
    programs = list(dict.fromkeys(cell.application for cell in cells))
    situations = list(dict.fromkeys(cell.situation for cell in cells))
    modes = list(dict.fromkeys(cell.mode for cell in cells))
    parts = [
        _HEAD.format(system=_system(), version=daxemu.__version__),
        *_matrices(modes, programs, situations, cells, made),
        *(f"- **{outcome}**: {text}" for outcome, text in MEANING.items() if _occurs(made, outcome)),
        *(["- **+**: the program did not end when asked to, and was killed"] if _stays(made) else []),
        "- **-**: the program has no journal",
        "",
        "The columns:",
        "",
        *(f"- **{s.title}** (`--situation {s.name}`): {s.about}" for s in situations),
        "",
        *(_differing(made) if len(modes) > 1 else ()),
        "## How to read this",
        "",
        *_readings(modes, made),
        _AGAIN,
        "",
        "## The programs",
        "",
        "| program | what runs | journal | version |",
        "|---|---|---|---|",
        *(_program(a) for a in programs),
        "",
        "Reasons, by program:",
        "",
        *(f"- `{a.name}`: {a.note}" for a in programs),
        "",
        "## Each cell",
        "",
        _DETAIL,
    ]
    for a in programs:
        parts += _details(a, modes, made)
    return "\n".join(parts) + "\n"


def _matrices(
    modes: Sequence[Mode],
    programs: Sequence[type[Application]],
    situations: Sequence[Situation],
    cells: Sequence[Wanted],
    made: Sequence[MatrixCell],
) -> Iterator[str]:
    """Yield the matrix of each mode, with its title."""
    for mode in modes:
        found = {(cell.application, cell.situation): cell for cell in made if cell.mode == mode}
        reasons = {(c.application.name, c.situation.name): c.why_not for c in cells if c.mode == mode}
        yield from (TITLES[mode], "", _matrix(programs, situations, found, reasons), "")


def _differing(made: Sequence[MatrixCell]) -> Iterator[str]:
    """Yield the list of the cells that depend on the mode."""
    found = list(differences(made))
    total = len({(cell.application, cell.situation) for cell in made if cell.mode == "direct"})
    yield from ("## Cells that differ between the modes", "")
    if not found:
        yield from (f"None: the behaviour is the same in both modes in each of the {total} cells.", "")
        return
    yield from (f"{len(found)} of {total} cells. In all others the behaviour is the same in both modes.", "")
    yield from ("| program | situation | page cache | direct | reason |", "|---|---|---|---|---|")
    for each in found:
        name, situation = each.direct.application, each.direct.situation
        shown = f"{_short(each.cached)} | {_short(each.direct)} | {each.reason or 'not explained'}"
        yield f"| `{name}` | {BY_NAME[situation].title} | {shown} |"
    yield ""


def _readings(modes: Sequence[Mode], made: Sequence[MatrixCell]) -> Iterator[str]:
    for mode in modes:
        if len(modes) > 1:
            yield from (f"### {'On direct mounts' if mode == 'direct' else 'In page-cache mode'}", "")
        yield from (_reading([cell for cell in made if cell.mode == mode]), "")


def _details(a: type[Application], modes: Sequence[Mode], made: Sequence[MatrixCell]) -> Iterator[str]:
    """Yield the section of a program under "Each cell"."""
    for mode in modes:
        mine = [cell for cell in made if cell.application == a.name and cell.mode == mode]
        if not mine:
            continue
        yield from ("", f"### {a.name}" + (", direct" if mode == "direct" else ""), "")
        yield from ("| situation | injected at | first run | restarted |", "|---|---|---|---|")
        yield from (_row(cell) for cell in mine)


_HEAD = """\
# Behaviour of real programs under memory failure

Unmodified programs with data on a daxemu mount, one fresh mount for each cell. A cell shows the behaviour of
the program under the harm, then its behaviour after a restart with the harm still in place. All behaviour is
observed, none predicted: `daxemu apps` starts the program, poisons the page of a known record (or changes 16
bytes of the record), has the program read everything, and compares each of the 2400 records with the record
written.

- On [direct](direct.md) mounts the programs run under `daxemu run`, and a mapping is the media. A read(2)
  with poison in its range returns EIO and no bytes. DAX hardware does the same.
- In page-cache mode, the default of a mount, a mapping is one of the kernel's page cache. A read(2) of good
  pages followed by poison returns the good bytes first.

[Fidelity](fidelity.md) lists all differences.

Made by `make apps` with daxemu {version} on {system}.
"""
TITLES: dict[Mode, str] = {
    "page cache": "## The matrix in page-cache mode",
    "direct": "## The matrix on direct mounts, as on DAX hardware",
}

_AGAIN = """\
## Repeat one cell

    daxemu apps --only PROGRAM --situation SITUATION
    daxemu apps --direct --only PROGRAM --situation SITUATION

prints each step: commands, the injected range, signals, and the messages of the program:

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

`daxemu apps --list` shows which programs are installed. `--install` installs the others, from Debian with
apt-get and from PyPI into the venv."""

_DETAIL = """\
The injected range, and the message of the program (the last line with an error)."""


def _system() -> str:
    try:
        name = platform.freedesktop_os_release().get("PRETTY_NAME", "")
    except OSError:
        name = ""
    return ", ".join(filter(None, [f"Linux {platform.release()}", name, platform.machine()]))


def _occurs(made: Sequence[MatrixCell], outcome: Behaviour) -> bool:
    return any(life is not None and life.outcome is outcome for c in made for life in (c.first, c.again))


def _stays(made: Sequence[MatrixCell]) -> bool:
    return any(life is not None and life.stays for c in made for life in (c.first, c.again))


def _matrix(
    programs: Sequence[type[Application]],
    situations: Sequence[Situation],
    found: dict[tuple[str, str], MatrixCell],
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


def _short(cell: MatrixCell) -> str:
    if cell.first is None or cell.again is None:
        return "not observed"
    return " / ".join(
        (f"**{life.outcome}**" if life.outcome in LOSSES else str(life.outcome))
        + (" +" if life.stays else "")
        for life in (cell.first, cell.again)
    )


def _reading(made: Sequence[MatrixCell]) -> str:
    """Return the summary of the matrix, with counts from the matrix itself."""
    kinds = [(c, BY_NAME[c.situation].harm) for c in made if c.first and c.again]
    harmed = [c for c, kind in kinds if kind]
    poison = [c for c, kind in kinds if kind and kind.traits.is_poison]
    removal = [c for c, kind in kinds if kind and kind.traits.whole_device]
    silent = [c for c in harmed if c not in poison and c not in removal]

    def ends(cells: Sequence[MatrixCell], *outcomes: Behaviour) -> list[MatrixCell]:
        return [c for c in cells if c.again is not None and c.again.outcome in outcomes]

    def either(cells: Sequence[MatrixCell], *outcomes: Behaviour) -> list[MatrixCell]:
        return [c for c in cells if any(life and life.outcome in outcomes for life in (c.first, c.again))]

    def begins(cells: Sequence[MatrixCell], *outcomes: Behaviour) -> list[MatrixCell]:
        return [c for c in cells if c.first is not None and c.first.outcome in outcomes]

    entries = (
        (
            "Poison in the data file: wrong data without an error",
            either([c for c in poison if BY_NAME[c.situation].part == "data"], *LOSSES),
        ),
        (
            "Poison in the journal: acknowledged data lost without an error",
            either([c for c in poison if BY_NAME[c.situation].part == "journal"], *LOSSES),
        ),
        ("Changed bytes: wrong data without an error", either(silent, *LOSSES)),
        ("Of these, reported once in the program's log", begins(harmed, Behaviour.LOGGED)),
        ("Killed by a signal", begins(harmed, *KILLED)),
        ("No answer", either(harmed, Behaviour.HANGS)),
        ("Did not end when asked to", [c for c in harmed if c.first is not None and c.first.stays]),
        (
            "Poison: all data right after a restart with the poison still present",
            ends(poison, Behaviour.RIGHT),
        ),
        ("Removed and put back: all data right", ends(removal, Behaviour.RIGHT)),
        (
            "Removed and put back: not all data right",
            [c for c in removal if c not in ends(removal, Behaviour.RIGHT)],
        ),
    )
    lines = [f"Of {len(harmed)} cells with an injection or a removal:", ""]
    return "\n".join(lines + [f"- **{title}**: {_named(cells)}." for title, cells in entries])


def _named(cells: Sequence[MatrixCell]) -> str:
    """Return the number of cells and their names. Programs with the same situations are joined."""
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


def _row(cell: MatrixCell) -> str:
    if cell.failed:
        return f"| {cell.situation} | {cell.hurt} | not observed: `{_escape(cell.failed)}` | |"
    return f"| {cell.situation} | {cell.hurt} | {_shown(cell.first)} | {_shown(cell.again)} |"


def _shown(life: ProgramLife | None) -> str:
    if life is None:
        return ""
    return f"{life.outcome}" + (f": `{_escape(life.said)}`" if life.said else "")


def _escape(text: str) -> str:
    """For the inside of a code span in a table."""
    clean = for_people(text).replace("`", "'").replace("|", "/")
    return clean[:160] + ("..." if len(clean) > 160 else "")
