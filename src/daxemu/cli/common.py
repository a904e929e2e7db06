"""What the verbs share: sizes, paths on a mount, output."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

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
    """Bytes: decimal, with K, M, G, T for powers of 1024, or hexadecimal."""

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


class UntouchedPath(click.Path):
    """A path that parsing does not look at, as click.Path does: stat(2) waits for a mount that hangs."""

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> str | bytes | os.PathLike[str]:
        """See click.ParamType.convert."""
        return self.coerce_path_result(value)


PATH, PATH_TEXT = UntouchedPath(path_type=Path), UntouchedPath()


def json_option(command: F) -> F:
    """Adds ``--json``."""
    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")(command)


def as_owner_option(command: F) -> F:
    """Adds ``--as-owner``; the verb gets no argument for it, and runs as the owner of its DEVICE."""

    def become(ctx: click.Context, param: click.Parameter, wanted: bool) -> None:
        if wanted:
            ctx.meta[AS_OWNER] = True

    return click.option(
        "--as-owner",
        is_flag=True,
        expose_value=False,
        callback=become,
        is_eager=True,
        help="As root: become the user that owns DEVICE first, for good.",
    )(command)


class Device(click.ParamType[Path]):
    """Path of a DEVICE directory, absolute. With ``--as-owner`` the process becomes its owner here."""

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
    """Print a result, as JSON or as lines for people: a string is one line, whatever is in it."""
    if as_json:
        say_json(result)
        return
    shown = text() if callable(text) else text
    say(*([shown] if isinstance(shown, str) and shown else shown))


def absolute_strategy(text: str) -> str:
    """``NAME[:key=value,...]`` for a process with another working directory: a name that is a Python file
    becomes a path from the root.
    """
    name, colon, rest = text.partition(":")
    return (os.path.abspath(name) if name.endswith(".py") else name) + colon + rest


def connect(path: str | os.PathLike[str]) -> PatientClient:
    """The supervisor of the mount that ``path`` is on. Raises NotMounted."""
    return PatientClient.at(path, patience=PATIENCE)


class Target(NamedTuple):
    """What a PATH argument means: a file on a mount and its size, or with both None the device under it."""

    client: PatientClient
    ino: int | None
    size: int | None


def target(path: str) -> Target:
    """The file or, for a mountpoint, the device. Raises NotMounted, InvalidArgument for anything else on a
    mount.
    """
    client = connect(path)
    client.request("status")  # in limited time: looking at the path has no limit
    if mount_at(Path(os.path.realpath(path))) is not None:
        return Target(client, None, None)
    found = regular_file(path)
    return Target(client, found.st_ino, found.st_size)


def regular_file(path: str) -> os.stat_result:
    """stat(2) of a regular file. Raises InvalidArgument."""
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
    """Columns, aligned; numbers to the right. One line each."""
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
