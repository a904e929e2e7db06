"""Shared by the verbs: sizes, paths on a mount, output."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

import click

from daxemu.cli.output import for_people, say, say_json
from daxemu.cli.patience import PATIENCE, PatientClient
from daxemu.errors import InvalidArgument
from daxemu.host.proc.mountinfo import mount_at
from daxemu.private_path import become_owner
from daxemu.sizes import human as human
from daxemu.sizes import parse_size

F = TypeVar("F", bound=Callable[..., Any])


class Size(click.ParamType[int]):
    """Size in bytes: decimal, with K, M, G, T for powers of 1024, or hexadecimal."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """See click.ParamType.convert."""
        if isinstance(value, int):
            return value
        try:
            return parse_size(value)
        except InvalidArgument as error:
            self.fail(str(error), param, ctx)


SIZE = Size()


class _Explaining(click.ParamType[Any]):
    """Number. A refusal states the expected form."""

    def fail(
        self, message: str, param: click.Parameter | None = None, ctx: click.Context | None = None
    ) -> NoReturn:
        """See click.ParamType.fail."""
        super().fail(_expected(message, self), param, ctx)


class Whole(_Explaining, click.types.IntParamType):
    """Whole number."""


class WholeRange(_Explaining, click.IntRange):
    """Whole number within limits."""


class Number(_Explaining, click.types.FloatParamType):
    """Number."""


class NumberRange(_Explaining, click.FloatRange):
    """Number within limits."""


def _expected(message: str, kind: click.ParamType[Any]) -> str:
    """Return the text of a refusal: the value, with which click's message begins, and what was expected."""
    what = "a whole number" if isinstance(kind, click.types.IntParamType) else "a number"
    if isinstance(kind, click.IntRange | click.FloatRange):
        low = "" if kind.min is None else f" {'above' if kind.min_open else 'from'} {kind.min:g}"
        high = "" if kind.max is None else f" to {kind.max:g}"
        what += low + high + (" on" if low.startswith(" from") and not high else "")
    return f"{message.partition(' is not ')[0]}: expected {what}"


class UntouchedPath(click.Path):
    """Path that is not examined during parsing. click.Path calls stat(2), which waits for a mount that
    hangs.
    """

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """See click.ParamType.convert."""
        return self.coerce_path_result(value)


PATH, PATH_TEXT = UntouchedPath(path_type=Path), UntouchedPath()


def json_option(command: F) -> F:
    """Add the option ``--json`` to a verb."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)


def as_owner_option(command: F) -> F:
    """Add the option ``--as-owner`` to a verb. The verb gets no argument for the option, and runs as the
    owner of its DEVICE.
    """

    def become(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
        if wanted:
            ctx.meta[AS_OWNER] = True

    return click.option(
        "--as-owner",
        is_flag=True,
        expose_value=False,
        callback=become,
        is_eager=True,
        help="As root: become the user that owns DEVICE first, permanently.",
    )(command)


class Device(click.ParamType[Path]):
    """Absolute path of a DEVICE directory. With ``--as-owner``, parsing the argument makes the process the
    owner of DEVICE.
    """

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        """See click.ParamType.convert."""
        path = Path(value).absolute()
        become_owner_if_asked(path)
        return path


DEVICE = Device()
AS_OWNER = "daxemu.as_owner"


def become_owner_if_asked(device: Path) -> None:
    """With ``--as-owner``, become the user that owns ``device``: see private_path.become_owner."""
    ctx = click.get_current_context(silent=True)
    if ctx is not None and ctx.meta.get(AS_OWNER):
        become_owner(device)


Lines = str | Sequence[str]
"""One line, or several."""


def emit(result: Any, as_json: bool, text: Lines | Callable[[], Lines]) -> None:
    """Print a result, as JSON or as lines for people. A string is one line; newlines in the string are
    escaped.
    """
    if as_json:
        say_json(result)
        return
    shown = text() if callable(text) else text
    say(*([shown] if isinstance(shown, str) and shown else shown))


def absolute_strategy(text: str) -> str:
    """Make a strategy ``NAME[:key=value,...]`` independent of the working directory: a name that is a Python
    file becomes an absolute path.
    """
    name, colon, rest = text.partition(":")
    return (os.path.abspath(name) if name.endswith(".py") else name) + colon + rest


def connect(path: str | os.PathLike[str]) -> PatientClient:
    """Connect to the supervisor of the mount that ``path`` is on. Raises NotMounted."""
    return PatientClient.at(path, patience=PATIENCE)


class Target(NamedTuple):
    """Object of a PATH argument: a file on a mount and its size in bytes, or the device of the mount (``ino``
    and ``size`` None).
    """

    client: PatientClient
    ino: int | None
    size: int | None


def target(path: str) -> Target:
    """Resolve ``path`` to a file or, for a mountpoint, to the device. Raises NotMounted, and InvalidArgument
    for anything else on a mount.
    """
    client = connect(path)
    client.request("status")  # fails in limited time if the mount hangs; realpath(3) has no limit
    if mount_at(Path(os.path.realpath(path))) is not None:
        return Target(client, None, None)
    found = regular_file(path)
    return Target(client, found.st_ino, found.st_size)


def regular_file(path: str) -> os.stat_result:
    """Return stat(2) of a regular file. Raises InvalidArgument for any other path."""
    try:
        found = Path(path).stat()
    except OSError as error:
        raise InvalidArgument(f"{path}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise InvalidArgument(
            f"{path} is not a regular file: give a file, or the mountpoint for device offsets"
        )
    return found


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...]) -> list[str]:
    """Return the lines of a table with aligned columns. Columns of numbers are right-aligned."""
    everything = [header, *(tuple(map(for_people, row)) for row in rows)]
    widths = [max(len(row[i]) for row in everything) for i in range(len(header))]
    numeric = [
        bool(rows) and all(row[i].lstrip("-").replace(".", "")[:1].isdigit() for row in rows)
        for i in range(len(header))
    ]
    lines = [
        "  ".join(
            cell.rjust(w) if right else cell.ljust(w)
            for cell, w, right in zip(row, widths, numeric, strict=True)
        )
        for row in everything
    ]
    return [line.rstrip() for line in lines]
