"""inject --every: the same ranges in each file whose path matches a glob."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from daxemu.cli.common import Target
from daxemu.cli.places import Places, find, has_data
from daxemu.errors import InvalidArgument
from daxemu.ranges import Range
from daxemu.rule import matches
from daxemu.text import name_text


class Chosen(NamedTuple):
    """Ranges of one file, in bytes of the file. Without ranges the file is skipped."""

    path: str
    ino: int
    ranges: list[list[int]]


def inject_every(found: Target, glob: str, places: Places, fields: dict[str, Any]) -> dict[str, Any]:
    """Inject failures into each regular file that matches, one file after another. ``fields``: more fields of
    the request.

    A range ends with its file. A file is skipped, and counted, if its ranges are holes or past the end, or if
    a search finds nothing. Raises InvalidArgument if no file matches or all are skipped; then nothing is
    poisoned.
    """
    if found.ino is not None:
        raise InvalidArgument("--every searches the mount for files: give the mountpoint as PATH")
    root = found.client.mount.mountpoint
    chosen = [_chosen(root, path, places) for path in _files(root, glob)]
    if not chosen:
        raise InvalidArgument(f"no file on {root} matches {glob}: see daxemu rules --help for globs")
    if not any(file.ranges for file in chosen):
        raise InvalidArgument(
            f"{len(chosen)} files match {glob}, but none has data in the ranges: see daxemu map FILE"
        )
    files = []
    for file in chosen:
        if file.ranges:
            result = found.client.request("inject", ino=file.ino, ranges=file.ranges, **fields)
            files.append({"path": file.path, **result})
    return {
        "files": files,
        "ranges": [part for file in files for part in file["ranges"]],
        "rounded": any(file["rounded"] for file in files),
        "holes": sum(file["holes"] for file in files),
        "skipped": [file.path for file in chosen if not file.ranges],
    }


def _files(root: Path, glob: str) -> Iterator[Path]:
    """Yield the regular files that match, in the order of their paths; a file with several names once."""
    seen = set()
    for entry in _regular_files(root):
        path = Path(entry.path)
        if matches(glob, f"/{path.relative_to(root)}") and entry.inode() not in seen:
            seen.add(entry.inode())
            yield path


def _regular_files(directory: os.PathLike[str]) -> Iterator[os.DirEntry[str]]:
    with os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False):
                yield from _regular_files(entry)
            elif entry.is_file(follow_symlinks=False):
                yield entry


def _chosen(root: Path, path: Path, places: Places) -> Chosen:
    stat = path.stat(follow_symlinks=False)
    wanted = Places(places.offsets, places.lengths)
    ranges = wanted.ranges(str(path), stat.st_size) if places.offsets or not places.finds else []
    ranges += [[at, len(text)] for text in places.finds if (at := find(path, text)) is not None]
    parts = [Range(at, at + length).clip(0, stat.st_size) for at, length in ranges]
    parts = [part for part in parts if part]
    shown = name_text(f"/{path.relative_to(root)}")
    return Chosen(
        shown, stat.st_ino, [[part.start, part.length] for part in parts] if has_data(path, parts) else []
    )
