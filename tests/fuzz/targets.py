"""Fuzz targets of the parsers in Python. Each takes bytes and raises if a parser breaks its promise.

A parser either returns a value with the same serialized form, or raises the documented error. The C parser of
FUSE requests has a separate target, tests/fuzz/answers.py.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import msgspec

from daxemu.errors import InvalidArgument, NotADevice
from daxemu.evaluate.plan import parse
from daxemu.pmem.device_dir import DeviceDir
from daxemu.pmem.media import Media
from daxemu.private_path import PrivatePath
from daxemu.protocol import decode_request
from daxemu.uapi import SECTOR_SIZE
from tests.evaluate.plans import SMALL
from tests.fuzz import metadata

SIZE = 16 << 20
"""Bytes of the device whose files are damaged."""
_DEVICE = (
    f"version = {{}}\nsize = {SIZE}\nbase_pfn = 1048576\naltmap = 0\nalign = 4096\nstruct_pages = true\n"
)


class Target(NamedTuple):
    """A parser, and inputs to begin with."""

    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    rounds: int = 2000
    """Mutations that the tests run."""


def control(data: bytes) -> None:
    """A line of the control socket; the supervisor catches these three errors (supervisor/control.py)."""
    try:
        request = decode_request(data)
    except (msgspec.MsgspecError, UnicodeError, RecursionError):
        return
    assert decode_request(msgspec.json.encode(request)) == request


def plan(data: bytes) -> None:
    """A plan of daxemu evaluate."""
    try:
        text = data.decode()
    except UnicodeDecodeError:
        return
    try:
        parsed = parse(text)
    except InvalidArgument as error:
        _require_one_line(error)
        return
    assert parse(text) == parsed


def device_toml(data: bytes) -> None:
    """The file device.toml."""
    path = _scratch()
    (path / "device.toml").write_bytes(data)
    try:
        device = DeviceDir.load(path)
    except NotADevice as error:
        _require_one_line(error)
        return
    device.config.validate()


def poison(data: bytes) -> None:
    """The file poison: sectors within the device, or a refusal."""
    path = _scratch()
    (path / "media").touch()
    os.truncate(path / "media", SIZE)
    (path / "poison").write_bytes(data)
    device = PrivatePath.at(path)
    try:
        media = Media(device, SIZE)
    except NotADevice:
        device.close()
        return
    try:
        for sectors in media.poison:
            assert 0 <= sectors.start < sectors.end <= SIZE // SECTOR_SIZE
    finally:
        media.close()
        device.close()


def superblock(data: bytes) -> None:
    """The superblock's record, under a valid checksum."""
    metadata.superblock(_scratch() / "metadata", data)


def table_row(data: bytes) -> None:
    """A row of any table, loaded with the others."""
    metadata.table_row(_scratch() / "rows", data)


def sealed_page(data: bytes) -> None:
    """Bytes of a page of the database, under a valid checksum."""
    metadata.sealed_page(_scratch() / "pages", data)


def _require_one_line(error: Exception) -> None:
    assert "\n" not in str(error)


scratch: Path | None = None
"""Directory for the files of targets. If None, the first target makes one and Python removes it at exit."""
_own: tempfile.TemporaryDirectory[str] | None = None


def _scratch() -> Path:
    global scratch, _own
    if scratch is None:
        _own = tempfile.TemporaryDirectory(prefix="daxemu-fuzz-", dir="/dev/shm")
        scratch = Path(_own.name)
    return scratch


TARGETS = {
    "control": Target(
        control,
        (
            b'{"op": "status"}',
            b'{"op": "inject", "path": "/f", "ranges": [{"offset": 0, "length": 4096}], "latent": true}',
            b'{"op": "set", "settings": {"early_kill": "1", "scrub_interval": "60"}}',
            b'{"op": "repair", "strategy": "parity"}',
            b'{"op": "follow", "after": -1}',
            b'{"op": ' + b"[" * 5000,
        ),
    ),
    "plan": Target(plan, (SMALL.encode(), b"x = " + b"[" * 5000, b"a." * 5000 + b"a = 1")),
    "device_toml": Target(
        device_toml,
        (
            *(_DEVICE.format(version).encode() for version in (1, 2, 3)),
            b"x = " + b"[" * 5000,
            b"x = " + b"{a=" * 5000,
        ),
    ),
    "poison": Target(
        poison, (b"0 8\n16 8\n" + b"\n" * 100, b"32767 1\n", b"32767 2\n", b"9" * 5000 + b" 1\n")
    ),
    "inode_row": Target(metadata.inode_row, tuple(map(msgspec.msgpack.encode, metadata.ROWS))),
    "table_row": Target(table_row, tuple(map(msgspec.msgpack.encode, metadata.TABLE_ROWS)), 200),
    "sealed_page": Target(
        sealed_page,
        (
            b"\0\x1c\0\0\0\0\x07",
            b"\1\0\0\x0d\0\0\0\x03",
            b"\2\x80\x0f" + bytes(60),
            b"\4\0\0" + b"\x81" * 400,
        ),
        100,
    ),
    "superblock": Target(
        superblock,
        (*map(msgspec.msgpack.encode, metadata.SUPERBLOCKS), b"\x95\xa4dax\xe6\x03\x01\xcd\x08\x00\x90"),
    ),
}
