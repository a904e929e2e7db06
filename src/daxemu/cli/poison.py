"""inject, clear, scrub, badblocks, damaged, remove: verbs that make, clear or list poison."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from daxemu.cli.common import (
    PATH,
    PATH_TEXT,
    Target,
    Whole,
    connect,
    emit,
    human,
    json_option,
    table,
    target,
)
from daxemu.cli.every import inject_every
from daxemu.cli.places import Places, place_options
from daxemu.cli.rules import RuleOptions, add_rule, rule_options
from daxemu.errors import InvalidArgument
from daxemu.events import signalled
from daxemu.failure_kind import INJECTED, FailureKind, injected_kind
from daxemu.protocol import kind_fields
from daxemu.rule import ClearAction, InjectAction, RemoveAction


def _of_file_option(command: Any) -> Any:
    return click.option(
        "--of-file", is_flag=True, help="With --on: --offset and --length are of the operation's file."
    )(command)


def _kind_options(command: Any) -> Any:
    for kind in reversed(INJECTED):
        if kind.traits.option:
            command = click.option(f"--{kind}", is_flag=True, help=kind.traits.option)(command)
    return command


@click.command()
@click.argument("path", type=PATH_TEXT)
@place_options(with_find=True)
@click.option("--every", metavar="FILE-GLOB", help="In each file of the mount PATH that matches, as in --on.")
@_kind_options
@click.option("--seed", type=Whole(), default=0, show_default=True, help="Seed of the new bytes of --silent.")
@_of_file_option
@json_option
@rule_options
def inject(
    path: str,
    places: Places,
    every: str | None,
    seed: int,
    of_file: bool,
    as_json: bool,
    rule: RuleOptions | None,
    **kinds: bool,
) -> None:
    """Poison memory: a range of the file PATH or, if PATH is a mountpoint, of the device.

    Poison covers whole 512-byte sectors, and mappings lose whole 4096-byte pages: ranges are rounded out to
    these units. Each range is one failure. If one range is invalid, nothing is poisoned.

    With --every, the ranges are those of each file that matches, one file after another, up to the end of the
    file. Files without data there are skipped and counted.

    With --on, the failure waits for an operation of a program. If PATH is the mountpoint, and no range is
    given, the pages of the operation are poisoned.

    \b
    Example:
      daxemu inject /tmp/pmem --on 'read:*.sst:3' --by mydb
      daxemu inject /tmp/pmem/db --offset 8K --length 4K
      daxemu inject /tmp/pmem/db --page 2 --find 'key:42'
      daxemu inject /tmp/pmem --every '*.sst' --page 0
      daxemu inject /tmp/pmem --offset 1G --offset 2G --length 64K
    """
    given = [injected_kind(name) for name, is_set in kinds.items() if is_set]
    if len(given) > 1:
        raise InvalidArgument(f"{' and '.join(f'--{kind}' for kind in given)}: give one of them")
    kind = given[0] if given else FailureKind.POISON
    with (found := target(path)).client as client:
        if rule is not None:
            if every is not None:
                raise InvalidArgument("--every is for now: with --on, OP:FILE has the glob, and --of-file")
            wanted = _ranges_of_rule(path, found, places, of_file=of_file)
            add_rule(client, rule, InjectAction(kind, wanted, found.ino, of_file, seed), as_json=as_json)
            return
        _refuse_of_file(of_file)
        fields = {"seed": seed, **kind_fields(kind)}
        if every is not None:
            result = inject_every(found, every, places, fields)
        else:
            ranges = places.ranges(path, found.size)
            result = client.request("inject", ino=found.ino, ranges=ranges, **fields)
    emit(result, as_json, lambda: _describe_injection(result))


def _describe_injection(result: dict[str, Any]) -> list[str]:
    lines = []
    for file in result.get("files", ()):
        lines += [f"{file['path']}: {line}" for line in _describe_ranges(file)]
    if not lines:
        lines = _describe_ranges(result)
    if result["rounded"]:
        lines.append("note: rounded out to whole 512-byte sectors")
    if result["holes"]:
        lines.append(f"note: {result['holes']} bytes are holes of the file: a hole has no media to poison")
    if result.get("skipped"):
        lines.append(f"note: {len(result['skipped'])} files skipped: no data in the ranges")
    return lines


def _describe_ranges(result: dict[str, Any]) -> list[str]:
    return [
        f"{FailureKind.of_outcome(r['outcome']).traits.done} device {r['offset']:#x}+{r['length']:#x} "
        f"(pfn {r['pfn']:#x}, {r['nr_pages']} pages): "
        f"{r['outcome']}, {signalled(r['processes'], r['signals'])}"
        for r in result["ranges"]
    ]


@click.command()
@click.argument("path", type=PATH_TEXT)
@place_options(with_find=False)
@_of_file_option
@json_option
@rule_options
def clear(
    path: str,
    places: Places,
    of_file: bool,
    as_json: bool,
    rule: RuleOptions | None,
) -> None:
    """Clear poison: the media can be read again, and lost bytes read as zeros. Without a range, clear the
    whole file or, if PATH is a mountpoint, the whole device. With --on, the range is as with inject.

    \b
    Example:
      daxemu clear /tmp/pmem/db --offset 8K
    """
    with (found := target(path)).client as client:
        if rule is not None:
            wanted = _ranges_of_rule(path, found, places, of_file=of_file)
            add_rule(client, rule, ClearAction(wanted, found.ino, of_file), as_json=as_json)
            return
        _refuse_of_file(of_file)
        ranges = places.ranges(path, found.size) if places.is_given else _everything(found)
        result = client.request("clear", ino=found.ino, ranges=ranges)
    emit(result, as_json, f"cleared {result['bytes']} bytes of poison in {len(result['ranges'])} ranges")


def _ranges_of_rule(path: str, found: Target, places: Places, *, of_file: bool) -> list[tuple[int, int]]:
    """Return the ranges of a rule; none for the pages of the operation."""
    if of_file and found.ino is not None:
        raise InvalidArgument("--of-file is for the file of the operation: give the mountpoint as PATH")
    if not places.is_given and found.ino is None and not of_file:
        return []
    return [(offset, length) for offset, length in places.ranges(path, found.size)]


def _refuse_of_file(of_file: bool) -> None:
    if of_file:
        raise InvalidArgument("--of-file belongs to --on: give --on, too")


def _everything(found: Target) -> list[list[int]]:
    return [[0, found.client.request("status")["size"] if found.size is None else found.size]]


@click.command()
@click.argument("mountpoint", type=PATH)
@json_option
def scrub(mountpoint: Path, as_json: bool) -> None:
    """Search the device for latent poison (address range scrub). The poison that is found becomes bad blocks.
    No process is signalled.

    \b
    Example:
      daxemu scrub /tmp/pmem
    """
    with connect(mountpoint) as client:
        result = client.request("scrub")
    emit(
        result,
        as_json,
        f"found {result['bytes']} bytes of latent poison, in {len(result['ranges'])} ranges",
    )


@click.command()
@click.argument("mountpoint", type=PATH)
@json_option
def badblocks(mountpoint: Path, as_json: bool) -> None:
    """Print the bad blocks in the format of sysfs: first sector and number of sectors, one range a line.

    \b
    Example:
      daxemu badblocks /tmp/pmem
    """
    with connect(mountpoint) as client:
        result = client.request("badblocks")
    emit(result, as_json, lambda: [f"{first} {count}" for first, count in result["ranges"]])


@click.command()
@click.argument("mountpoint", type=PATH)
@json_option
def damaged(mountpoint: Path, as_json: bool) -> None:
    """List the damaged files, and the damaged bytes of each file.

    \b
    Example:
      daxemu damaged /tmp/pmem
    """
    with connect(mountpoint) as client:
        result = client.request("damaged")
    rows = [(f["path"], f"{f['offset']:#x}", str(f["length"])) for f in result["files"]]
    emit(result, as_json, lambda: table(rows, ("FILE", "OFFSET", "LENGTH")) if rows else "no damaged files")


@click.command()
@click.argument("mountpoint", type=PATH)
@json_option
@rule_options
def remove(mountpoint: Path, as_json: bool, rule: RuleOptions | None) -> None:
    """Surprise removal: the device goes away while in use. Processes that have pages of it present are
    signalled; each later access is EIO. With --on, the removal waits for an operation of a program.

    \b
    Example:
      daxemu remove /tmp/pmem
    """
    with connect(mountpoint) as client:
        if rule is not None:
            add_rule(client, rule, RemoveAction(), as_json=as_json)
            return
        size = client.request("status")["size"]
        result = client.request("remove")
    count = signalled(result["processes"], result["signals"])
    emit(result, as_json, f"removed {human(size)} in one call: {count}")
