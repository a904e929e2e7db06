"""Output of the command line. The only module that prints: text is escaped, so that no untrusted text can
control a terminal.
"""

from __future__ import annotations

import json
from typing import Any

import click

from daxemu.text import for_people as for_people
from daxemu.text import name_text as name_text


def say(*lines: str, tabs: bool = False, bold: bool = False, fg: str | None = None, end: str = "\n") -> None:
    """Print lines on standard output. Newlines within a line are escaped, and tabs unless ``tabs`` is
    true.
    """
    for line in lines:
        shown = "\t".join(map(for_people, line.split("\t"))) if tabs else for_people(line)
        if bold or fg:
            shown = click.style(shown, bold=bold or None, fg=fg)
        click.echo(shown + end, nl=False)


def complain(*lines: str) -> None:
    """Print lines on standard error, escaped as by ``say``."""
    for line in lines:
        click.echo(for_people(line), err=True)


def say_json(result: Any) -> None:
    """Print JSON on one line. Characters outside of ASCII are escaped. Paths are encoded by name_text."""
    click.echo(json.dumps(result, default=name_text))


def rewrite(line: str) -> None:
    """Overwrite the last line on standard error; an empty ``line`` erases the last line."""
    click.echo(f"\r\x1b[K{for_people(line)}", err=True, nl=False)
