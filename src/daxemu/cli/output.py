"""The only place where the command line prints: escaped, so that no text of others acts on a terminal."""

from __future__ import annotations

import json
from typing import Any

import click

from daxemu.text import for_people as for_people
from daxemu.text import name_text as name_text


def say(*lines: str, tabs: bool = False, bold: bool = False, fg: str | None = None, end: str = "\n") -> None:
    """Print lines on standard output. A newline within a line is escaped; a tab too, except with ``tabs``."""
    for line in lines:
        shown = "\t".join(map(for_people, line.split("\t"))) if tabs else for_people(line)
        if bold or fg:
            shown = click.style(shown, bold=bold or None, fg=fg)
        click.echo(shown + end, nl=False)


def complain(*lines: str) -> None:
    """The same on standard error."""
    for line in lines:
        click.echo(for_people(line), err=True)


def say_json(result: Any) -> None:
    """Print JSON on one line. Characters outside of ASCII are escaped. Paths become names (name_text)."""
    click.echo(json.dumps(result, default=name_text))


def rewrite(line: str) -> None:
    """Write a line over the last one on standard error; an empty one takes that away."""
    click.echo(f"\r\x1b[K{for_people(line)}", err=True, nl=False)
