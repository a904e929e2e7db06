"""inject, clear, scrub, badblocks, damaged, remove: verbs that make memory bad, or look at it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from daxemu.cli.common import PATH, PATH_TEXT, SIZE, Target, connect, emit, human, json_option, table, target
from daxemu.errors import InvalidArgument
from daxemu.events import signalled
from daxemu.failure_kind import INJECTED, FailureKind, injected_kind
from daxemu.protocol import kind_fields
from daxemu.uapi import PAGE_SIZE


def _ranges(offsets: tuple[int, ...], lengths: tuple[int, ...], size: int | None) -> list[list[int]]:
    """Pairs; a single length serves all offsets, no offset means 0, no length means one page, or to the end
    of the file.
    """
    offsets = offsets or (0,)
    if not lengths:
        lengths = tuple(
            PAGE_SIZE if size is None else max(min(PAGE_SIZE, size - offset), 1) for offset in offsets
        )
    if len(lengths) == 1:
        lengths *= len(offsets)
    if len(offsets) != len(lengths):
        raise InvalidArgument(
            f"{len(offsets)} offsets but {len(lengths)} lengths: give one length, or one for each offset"
        )
    return [list(pair) for pair in zip(offsets, lengths, strict=True)]


def _range_options(command: Any) -> Any:
    command = click.option(
        "--length",
        "lengths",
        type=SIZE,
        multiple=True,
        help="Bytes; one page if not given. Again for each --offset, or once.",
    )(command)
    return click.option(
        "--offset", "offsets", type=SIZE, multiple=True, help="Bytes; repeat it for several ranges."
    )(command)


def _kind_options(command: Any) -> Any:
    for kind in reversed(INJECTED):
        if kind.traits.option:
            command = click.option(f"--{kind}", is_flag=True, help=kind.traits.option)(command)
    return command


@click.command()
@click.argument("path", type=PATH_TEXT)
@_range_options
@_kind_options
@click.option("--seed", type=int, default=0, show_default=True, help="What --silent changes them to.")
@json_option
def inject(
    path: str,
    offsets: tuple[int, ...],
    lengths: tuple[int, ...],
    seed: int,
    as_json: bool,
    **kinds: bool,
) -> None:
    """Poison memory: a range of the file PATH, or with a mountpoint of the device.

    The media is bad in whole 512-byte sectors, mappings lose whole 4096-byte pages: ranges are rounded out to
    those. Several ranges are several failures; none happens unless all are valid.

    \b
    Example:
      daxemu inject /tmp/pmem/db --offset 8K --length 4K
      daxemu inject /tmp/pmem --offset 1G --offset 2G --length 64K
    """
    given = [injected_kind(name) for name, is_set in kinds.items() if is_set]
    if len(given) > 1:
        raise InvalidArgument(f"{' and '.join(f'--{kind}' for kind in given)}: give one of them")
    kind = given[0] if given else FailureKind.POISON
    with (found := target(path)).client as client:
        result = client.request(
            "inject",
            ino=found.ino,
            ranges=_ranges(offsets, lengths, found.size),
            seed=seed,
            **kind_fields(kind),
        )
    emit(result, as_json, lambda: _describe_injection(result))


def _describe_injection(result: dict[str, Any]) -> list[str]:
    lines = [
        f"{FailureKind.of_outcome(r['outcome']).traits.done} device {r['offset']:#x}+{r['length']:#x} "
        f"(pfn {r['pfn']:#x}, {r['nr_pages']} pages): "
        f"{r['outcome']}, {signalled(r['processes'], r['signals'])}"
        for r in result["ranges"]
    ]
    if result["rounded"]:
        lines.append("note: rounded out to whole 512-byte sectors")
    if result["holes"]:
        lines.append(f"note: {result['holes']} bytes are holes of the file, there is nothing to poison")
    return lines


@click.command()
@click.argument("path", type=PATH_TEXT)
@_range_options
@json_option
def clear(path: str, offsets: tuple[int, ...], lengths: tuple[int, ...], as_json: bool) -> None:
    """Make poisoned memory healthy again: what was lost reads as zeros. With a mountpoint and no range: all
    of it.

    \b
    Example:
      daxemu clear /tmp/pmem/db --offset 8K
    """
    with (found := target(path)).client as client:
        ranges = _everything(found) if not offsets and not lengths else _ranges(offsets, lengths, found.size)
        result = client.request("clear", ino=found.ino, ranges=ranges)
    emit(result, as_json, f"cleared {result['bytes']} bytes of poison in {len(result['ranges'])} ranges")


def _everything(found: Target) -> list[list[int]]:
    return [[0, found.client.request("status")["size"] if found.size is None else found.size]]


@click.command()
@click.argument("mountpoint", type=PATH)
@json_option
def scrub(mountpoint: Path, as_json: bool) -> None:
    """Look for latent poison (an address range scrub): what is found is in badblocks then. Nobody is
    signalled.

    \b
    Example:
      daxemu scrub /tmp/pmem
    """
    with connect(mountpoint) as client:
        result = client.request("scrub")
    emit(
        result,
        as_json,
        f"found {result['bytes']} bytes of poison nobody knew of, in {len(result['ranges'])} ranges",
    )


@click.command()
@click.argument("mountpoint", type=PATH)
@json_option
def badblocks(mountpoint: Path, as_json: bool) -> None:
    """Print the bad sectors that are known, as sysfs does: first sector and count, a range a line.

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
    """List the files that lost data, and which bytes of each.

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
def remove(mountpoint: Path, as_json: bool) -> None:
    """Surprise removal: the device goes away under everybody who uses it. They are told; from then on all is
    EIO.

    \b
    Example:
      daxemu remove /tmp/pmem
    """
    with connect(mountpoint) as client:
        size = client.request("status")["size"]
        result = client.request("remove")
    count = signalled(result["processes"], result["signals"])
    emit(result, as_json, f"removed {human(size)} in one call: {count}")
