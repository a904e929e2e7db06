"""apps: the behaviour of real programs under memory failure."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from daxemu.cli.common import NumberRange, json_option, table
from daxemu.cli.long_work import INTERRUPTED, interruptible, progress
from daxemu.cli.output import complain, say, say_json
from daxemu.errors import DaxemuError, InvalidArgument, Unsupported

if TYPE_CHECKING:
    from daxemu.apps.cell import MatrixCell
    from daxemu.apps.matrix import Wanted
    from daxemu.events.mounts import Mode


@click.command()
@click.option(
    "--list",
    "listing",
    is_flag=True,
    help="List the programs, which of them are installed, and the situations.",
)
@click.option("--install", is_flag=True, help="Install the chosen programs that are missing first.")
@click.option("--only", metavar="NAME", multiple=True, help="Run only this program; repeat for several.")
@click.option(
    "--situation", metavar="NAME", multiple=True, help="Run only this situation; repeat for several."
)
@click.option(
    "--direct",
    is_flag=True,
    help="Run on direct mounts, with the programs under daxemu run: as on DAX hardware. Needs root.",
)
@click.option("--both", is_flag=True, help="Run every cell in page-cache mode and on a direct mount.")
@click.option(
    "--limit",
    type=NumberRange(1.0),
    default=30.0,
    show_default=True,
    help="Seconds without an answer after which a program counts as hung.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path, dir_okay=False),
    multiple=True,
    help="Write the matrix to this .md or .json file; repeat for both.",
)
@json_option
def apps(
    listing: bool,
    install: bool,
    only: tuple[str, ...],
    situation: tuple[str, ...],
    direct: bool,
    both: bool,
    limit: float,
    output: tuple[Path, ...],
    as_json: bool,
) -> None:
    """Observe real programs, unmodified databases and others, under memory failure. Each cell is one
    program in one situation, on a separate mount; the program is restarted afterwards. A run of a single
    cell prints each step.

    A cell states the observed behaviour: right (all data is right), reports (the program says that something
    is wrong), SIGBUS AO or AR, dies, hangs, wrong (wrong data without any report).

    \b
    Example:
      daxemu apps --only sqlite3-mmap --situation late
      daxemu apps --direct --only sqlite3-mmap --situation late
    """
    from daxemu.apps import install as installing
    from daxemu.apps.matrix import wanted
    from daxemu.apps.report import as_markdown, summary

    for path in output:
        if path.suffix not in (".md", ".json"):
            raise InvalidArgument(f"{path}: give a name that ends in .md or .json")
        if not path.parent.is_dir():
            raise InvalidArgument(f"{path}: make the directory {path.parent} first")
    modes = _modes(direct=direct, both=both)
    cells = wanted(only, situation, modes)
    chosen = list(dict.fromkeys(cell.application for cell in cells))
    if install:
        installing.install((a.needs for a in chosen), lambda text: complain(text))
        cells = wanted(only, situation, modes)
    if listing:
        _list(cells, as_json)
        return
    possible = [cell for cell in cells if not cell.why_not]
    if not possible:
        reasons = ", ".join(sorted({f"{c.application.name}: {c.why_not}" for c in cells}))
        raise Unsupported(f"{reasons}; to install absent programs: daxemu apps --install")
    made = _make(possible, limit, print_steps=len(cells) == 1 and not as_json)
    for path in output:
        text = (
            as_markdown(cells, made) if path.suffix == ".md" else json.dumps(summary(cells, made), indent=1)
        )
        path.write_text(text.rstrip("\n") + "\n")
    if as_json:
        say_json(summary(cells, made))
    elif len(cells) > 1:
        say(*_table(cells, made))
    failed = [cell for cell in made if cell.failed]
    for cell in failed:
        complain(f"daxemu: not observed: {_title(cell)}: {cell.failed}")
    if failed:
        sys.exit(DaxemuError.exit_status)


def _modes(*, direct: bool, both: bool) -> tuple[Mode, ...]:
    """Return the modes of the mounts. Raises InvalidArgument for both options at once."""
    from daxemu.host.direct_needs import check_direct

    if direct and both:
        raise InvalidArgument("--direct and --both exclude each other: give one of them")
    if direct or both:
        check_direct()
    return ("page cache", "direct") if both else ("direct",) if direct else ("page cache",)


def _make(cells: list[Wanted], limit: float, *, print_steps: bool) -> list[MatrixCell]:
    from daxemu.apps.matrix import make

    made = []
    try:
        with interruptible():
            if print_steps:
                (cell,) = cells
                made.append(make(cell, limit, lambda step: say(step.text)))
                say(f"{_title(made[0])}: {_outcomes(made[0])}")
                return made
            with progress(len(cells), "cells") as done:
                for cell in cells:
                    made.append(make(cell, limit, lambda step: None))
                    name = f"{cell.application.name} / {cell.situation.name} / {cell.mode}"
                    done(name, f": {_outcomes(made[-1])}, {made[-1].seconds:.1f} s")
    except KeyboardInterrupt:
        complain(f"daxemu: stopped after {len(made)} of {len(cells)} cells")
        sys.exit(INTERRUPTED)
    return made


def _title(cell: MatrixCell) -> str:
    direct = ", direct mount" if cell.mode == "direct" else ""
    return f"{cell.application}, {cell.situation}{direct}"


def _outcomes(cell: MatrixCell) -> str:
    if cell.first is None or cell.again is None:
        return "not observed"
    return f"{cell.first.outcome}, restarted: {cell.again.outcome}"


def _table(cells: list[Wanted], made: list[MatrixCell]) -> list[str]:
    found = {(cell.application, cell.situation, cell.mode): _outcomes(cell) for cell in made}
    rows = [
        (*key, found.get(key, cell.why_not))
        for cell in cells
        for key in [(cell.application.name, cell.situation.name, cell.mode)]
    ]
    return table(rows, ("PROGRAM", "SITUATION", "MODE", "OUTCOME"))


def _list(cells: list[Wanted], as_json: bool) -> None:
    from daxemu.apps.install import commands, missing, versions

    programs = list(dict.fromkeys(cell.application for cell in cells))
    situations = list(dict.fromkeys(cell.situation for cell in cells))
    lacking = {a.name: missing(a.needs) for a in programs}
    would_run = [" ".join(command) for command in commands(a.needs for a in programs)]
    if as_json:
        described = [
            {
                "name": a.name,
                "about": a.about,
                "journal": a.journal,
                "missing": lacking[a.name],
                "versions": versions(a.needs),
            }
            for a in programs
        ]
        columns = [{"name": s.name, "about": s.about} for s in situations]
        say_json({"programs": described, "situations": columns, "install": would_run})
        return
    rows = [
        (a.name, f"absent: {', '.join(lacking[a.name])}" if lacking[a.name] else "here", a.about)
        for a in programs
    ]
    say(*table(rows, ("PROGRAM", "STATE", "WHAT RUNS")))
    say("")
    say(*table([(s.name, s.about) for s in situations], ("SITUATION", "WHAT HAPPENS")))
    if would_run:
        say("", "--install would run:", *(f"  {command}" for command in would_run))
