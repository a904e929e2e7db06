"""The command's help as a man page and as a page of the site.

python -m tools.cli_docs man > build/daxemu.1
python -m tools.cli_docs markdown > docs/reference/cli.md
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from typing import NamedTuple

import click

import daxemu
from daxemu.cli.main import VERBS, main


class Help(NamedTuple):
    """Help text of one verb. ``prose``: paragraphs and, indented, examples."""

    name: str
    usage: str
    prose: list[str]
    options: list[tuple[str, str]]


def helps() -> Iterator[Help]:
    """Of the command itself, then of every verb, in the order of ``daxemu --help``."""
    context = click.Context(main, info_name="daxemu")
    yield _help(main, context, "daxemu")
    assert isinstance(main, click.Group)
    for verb in VERBS:
        command = main.get_command(context, verb)
        assert command is not None
        yield _help(command, click.Context(command, info_name=verb, parent=context), f"daxemu {verb}")


def _help(command: click.Command, context: click.Context, name: str) -> Help:
    usage = " ".join([name, *command.collect_usage_pieces(context)])
    text = inspect.cleandoc(command.help or "")
    records = [param.get_help_record(context) for param in command.get_params(context)]
    options = [record for record in records if record and record[1] and "--help" not in record[0]]
    return Help(name, usage, text.split("\n\n"), options)


def _is_verbatim(paragraph: str) -> bool:
    return paragraph.startswith("\b\n")


def markdown() -> str:
    """A page of the site."""
    lines = ["# The command line", "", "<!-- Made by `make protocol` of the commands' help. -->", ""]
    for each in helps():
        lines += [f"## {each.name}", "", f"    {each.usage}", ""]
        for paragraph in each.prose:
            if _is_verbatim(paragraph):
                lines += [*(f"    {line}" for line in paragraph.splitlines()[1:]), ""]
            else:
                lines += [_code_in(paragraph), ""]
        if each.options:
            lines += ["| option | |", "|---|---|"]
            lines += [f"| `{names}` | {_code_in(_cell(text))} |" for names, text in each.options] + [""]
    return "\n".join(lines).rstrip() + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _code_in(text: str) -> str:
    """Words with angle brackets would be taken for HTML."""
    return re.sub(r"(<\S+>)", r"`\1`", text)


def man() -> str:
    """A page of section 1."""
    whole, *verbs = helps()
    first, *rest = whole.prose
    lines = [f'.TH DAXEMU 1 "" "daxemu {daxemu.__version__}" "User Commands"', ".SH NAME"]
    lines += [f"daxemu \\- {_roff(first.rstrip('.'))}", ".SH SYNOPSIS", ".B daxemu", "[OPTIONS] VERB ..."]
    lines += [".SH DESCRIPTION", *_roff_prose(rest), ".SH VERBS"]
    for verb in verbs:
        lines += [f".SS {_roff(verb.usage)}", *_roff_prose(verb.prose)]
        for names, text in verb.options:
            lines += [".TP", f".B {_roff(names)}", _roff(text)]
    return "\n".join(lines) + "\n"


def _roff_prose(paragraphs: list[str]) -> Iterator[str]:
    for paragraph in paragraphs:
        if _is_verbatim(paragraph):
            yield from (".nf", *map(_roff, paragraph.splitlines()[1:]), ".fi")
        else:
            yield from (".PP", _roff(" ".join(paragraph.split())))


def _roff(text: str) -> str:
    escaped = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{escaped}" if escaped.startswith((".", "'")) else escaped


if __name__ == "__main__":
    print({"man": man, "markdown": markdown}[sys.argv[1]](), end="")
