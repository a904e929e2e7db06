"""map and reflink: verbs for files on a mount."""

from __future__ import annotations

import os
from pathlib import Path

import click

from daxemu.cli.common import PATH_TEXT, SIZE, connect, emit, json_option, regular_file, table
from daxemu.errors import InvalidArgument
from daxemu.host.proc.mountinfo import mount_of


@click.command(name="map")
@click.argument("file", type=PATH_TEXT)
@json_option
def map(file: str, as_json: bool) -> None:
    """Print the extents of a file: device offset, first pfn, and the number of links to the extent.

    \b
    Example:
      daxemu map /tmp/pmem/db
    """
    with connect(file) as client:
        client.request("status")
        result = client.request("map", ino=regular_file(file).st_ino)
    rows = [
        (
            f"{e['offset']:#x}",
            f"{e['length']:#x}",
            "hole" if e["device_offset"] is None else f"{e['device_offset']:#x}",
            "-" if e["pfn"] is None else f"{e['pfn']:#x}",
            "-" if e["device_offset"] is None else str(e["shared_by"]),
            "yes" if e["poisoned"] else "",
        )
        for e in result["extents"]
    ]
    header = ("OFFSET", "LENGTH", "DEVICE", "PFN", "SHARED BY", "POISON")
    emit(result, as_json, lambda: table(rows, header) if rows else f"{file} is empty")


@click.command()
@click.argument("source", type=PATH_TEXT)
@click.argument("destination", type=PATH_TEXT)
@click.option("--offset", type=SIZE, default=0, help="Bytes, in the source; a multiple of 4096.")
@click.option("--length", type=SIZE, default=0, help="Bytes; 0 is to the end of the source.")
@click.option("--dest-offset", type=SIZE, default=0, help="Bytes, in the destination; a multiple of 4096.")
@json_option
def reflink(source: str, destination: str, offset: int, length: int, dest_offset: int, as_json: bool) -> None:
    """Share the blocks of SOURCE with DESTINATION (FICLONE, FICLONERANGE). A missing DESTINATION is made.

    A later write to either file gives the written file new blocks. Poison in a shared block damages every
    file with a link to the block.

    \b
    Example:
      daxemu reflink /tmp/pmem/db /tmp/pmem/db.snapshot
    """
    if mount_of(Path(source)).dev != mount_of(Path(destination)).dev:
        raise InvalidArgument(
            f"both files must be on one daxemu mount: {source} and {destination} are on two; use cp"
        )
    with connect(source) as client:
        client.request("status")
    src = regular_file(source).st_ino
    made = not os.path.lexists(destination)
    try:
        whole = not (offset or length or dest_offset)
        flags = os.O_WRONLY | os.O_CREAT | (os.O_TRUNC if whole and not _same(source, destination) else 0)
        os.close(os.open(destination, flags, 0o666))
    except OSError as error:
        raise InvalidArgument(f"{destination}: {error.strerror}") from error
    try:
        with connect(source) as client:
            result = client.request(
                "reflink",
                src=src,
                dst=regular_file(destination).st_ino,
                src_offset=offset,
                length=length,
                dst_offset=dest_offset,
            )
    except BaseException:
        if made:
            Path(destination).unlink()
        raise
    emit(result, as_json, f"{destination} shares {result['bytes']} bytes with {source}")


def _same(one: str, other: str) -> bool:
    try:
        return Path(one).samefile(other)
    except OSError:
        return False
