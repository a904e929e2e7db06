"""Kinds of damage to a device, for tests/support/corruption.py."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw

from daxemu.fs.allocator import Allocator
from daxemu.fs.metadata_page import seal
from daxemu.fs.metadata_region import MetadataRegion
from daxemu.fs.records import _COLUMNS
from daxemu.fs.rmap import Rmap
from daxemu.fs.store import Store
from daxemu.pmem.device_dir import DeviceDir
from daxemu.pmem.pmem import Pmem
from daxemu.uapi import PAGE_SIZE
from tests.support.corruption import Image
from tests.support.metadata import overwrite

COLUMNS = {
    "inode": list(_COLUMNS),
    "entry": ["parent", "name", "ino"],
    "link": ["ino", "file_block", "dev_block", "length", "proxy"],
    "counter": ["name", "value"],
}
SCHEMA_CHANGES = (
    "CREATE TABLE more(a)",
    "CREATE TRIGGER t AFTER INSERT ON entry BEGIN DELETE FROM inode; END",
    "CREATE INDEX i ON inode(mode)",
    "DROP TABLE link",
    "ALTER TABLE inode RENAME COLUMN uid TO owner",
    "DROP TABLE counter; CREATE VIEW counter AS WITH RECURSIVE c(name, value) AS "
    "(SELECT 'clean', 1 UNION ALL SELECT name, value + 1 FROM c) SELECT * FROM c",
    "DELETE FROM inode",
    "DELETE FROM counter",
    "INSERT INTO link SELECT ino + 1, file_block, dev_block, length, NULL FROM link",
    "UPDATE entry SET parent = ino WHERE ino IN (SELECT ino FROM inode WHERE mode & 61440 = 16384)",
)


def noise(draw: random.Random, data: bytes) -> bytes:
    """Return ``data`` with a few bytes or bits changed, or a run of bytes."""
    changed = bytearray(data or b"\0")
    for _ in range(draw.choice((1, 1, 3, 30))):
        at = draw.randrange(len(changed))
        if draw.random() < 0.3:
            end = min(len(changed), at + draw.randrange(1, 200))
            changed[at:end] = draw.choice((bytes(end - at), b"\xff" * (end - at), draw.randbytes(end - at)))
        else:
            changed[at] = draw.choice((0, 0xFF, changed[at] ^ 1 << draw.randrange(8), draw.randrange(256)))
    return bytes(changed)


def one_byte(image: Image) -> None:
    """Change a byte in use, in one copy of each of some pages."""
    draw = image.random
    for page in image.pages():
        offset = draw.choice(page.offsets)
        data = image.page(offset)
        at = draw.choice([at for at in range(PAGE_SIZE) if data[at]])
        overwrite(image.path, offset + at, bytes([data[at] ^ 1 << draw.randrange(8)]))


def noisy_pages(image: Image) -> None:
    """Damage one copy of some pages, or both copies in different ways."""
    draw = image.random
    for page in image.pages():
        for offset in page.offsets if draw.random() < 0.5 else draw.sample(page.offsets, 1):
            overwrite(image.path, offset, noise(draw, image.page(offset)))


def both_copies_alike(image: Image) -> None:
    """The same bytes of both copies."""
    for page in image.pages():
        changed = noise(image.random, image.page(page.offsets[0]))
        for offset in page.offsets:
            overwrite(image.path, offset, changed)


def swapped_pages(image: Image) -> None:
    """A page where another belongs, intact: in one copy or both."""
    draw = image.random
    for page in image.pages():
        other = draw.choice([each for each in image.pristine.live if each.number != page.number])
        for offset in page.offsets if draw.random() < 0.3 else draw.sample(page.offsets, 1):
            overwrite(image.path, offset, image.page(other.offsets[0]))


def lost_pages(image: Image) -> None:
    """Copies of zeros."""
    draw = image.random
    for page in image.pages():
        for offset in page.offsets if draw.random() < 0.2 else draw.sample(page.offsets, 1):
            overwrite(image.path, offset, bytes(PAGE_SIZE))


def stale_pages(image: Image) -> None:
    """One copy of a page as of an earlier commit, with a right checksum."""
    for page in image.pages():
        offset = image.random.choice(page.offsets)
        overwrite(image.path, offset, image.pristine.old[offset : offset + PAGE_SIZE])


def bad_superblocks(image: Image) -> None:
    """Noise in one superblock or both, zeros, or a superblock of an earlier mount."""
    draw, supers = image.random, image.pristine.supers
    if draw.random() < 0.3:
        offset = draw.choice(supers)
        overwrite(image.path, offset, image.pristine.old[offset : offset + PAGE_SIZE])
        return
    for offset in supers if draw.random() < 0.3 else [draw.choice(supers)]:
        junk = (noise(draw, image.page(offset)[:150]), bytes(PAGE_SIZE), b"\xff" * 99)
        overwrite(image.path, offset, draw.choice(junk))


def sealed_noise(image: Image) -> None:
    """Both copies of a page changed alike, with right checksums."""
    image.is_sealed = True
    for page in image.pages():
        data = bytearray(noise(image.random, image.page(page.offsets[0])))
        seal(memoryview(data), page.file, page.number, 1 << 40)
        for offset in page.offsets:
            overwrite(image.path, offset, bytes(data))


def values(image: Image) -> None:
    """Change any column of any row, through SQL."""
    image.is_sealed = True
    draw = image.random
    numbers = [-1, 0, 1, 2, 3, 4, 5, 1 << 31, 1 << 40, 1 << 62, (1 << 63) - 1, -(1 << 63), 0o40755, 0o120777]
    blobs = [b"", b"/", b"a\0b", b"..", b"x" * 300, b"\x80", b"\x81\xc4\x01a\xc4\x01b", b"f"]
    statements: list[tuple[str, tuple[Any, ...]]] = []
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        table = draw.choice(list(COLUMNS))
        column = draw.choice(COLUMNS[table])
        value = draw.choice(
            [*numbers, None] if column not in ("name", "target", "xattrs") else [*blobs, None]
        )
        if draw.random() < 0.3 and column in ("ino", "parent", "dev_block", "length", "size"):
            value = draw.randrange(60)
        where = f"(SELECT count(*) FROM {table})"
        key = COLUMNS[table][: 1 if table in ("inode", "counter") else 2]
        row = f"SELECT {', '.join(key)} FROM {table} LIMIT 1 OFFSET {draw.randrange(1 << 30)} % {where}"
        if draw.random() < 0.2:
            statements.append((f"DELETE FROM {table} WHERE ({', '.join(key)}) = ({row})", ()))
        else:
            set_it = f"UPDATE OR REPLACE {table} SET {column} = ? WHERE ({', '.join(key)}) = ({row})"
            statements.append((set_it, (value,)))
    run_sql(image.path, statements)


def schema(image: Image) -> None:
    """Change tables, triggers or views, or whole tables."""
    image.is_sealed = True
    run_sql(image.path, [(image.random.choice(SCHEMA_CHANGES), ())])


def poison(image: Image) -> None:
    """The list of poisoned sectors, sensible or not."""
    draw = image.random
    offsets = [draw.choice(page.offsets) for page in image.pages()]
    if draw.random() < 0.3:
        offsets = [*image.pages()[0].offsets, draw.choice(image.pristine.supers)]
    offsets += [draw.randrange(image.pristine.size)]
    text = b"".join(b"%d %d\n" % (at // 512, draw.choice((1, 8, 100))) for at in offsets)
    (image.path / "poison").write_bytes(noise(draw, text) if draw.random() < 0.3 else text)


def config(image: Image) -> None:
    """Another value in a line of ``device.toml``, or noise in the file."""
    image.is_running = True
    draw, toml = image.random, image.path / "device.toml"
    lines = toml.read_bytes().splitlines(keepends=True)
    at = draw.randrange(len(lines))
    name = lines[at].partition(b"=")[0]
    values = (
        b"0",
        b"-1",
        b"1",
        b"4096",
        b"65536",
        b"1048576",
        b"2097152",
        b"9" * 30,
        b"true",
        b"'x'",
        b"[",
        b"1e9",
    )
    if draw.random() < 0.3:
        toml.write_bytes(noise(draw, toml.read_bytes()))
        return
    lines[at] = draw.choice((b"", name + b"= " + draw.choice(values) + b"\n", lines[at] * 2))
    toml.write_bytes(b"".join(lines))


def media_size(image: Image) -> None:
    """Media shorter, or longer, than the superblock states."""
    size = image.pristine.size
    os.truncate(
        image.path / "media", image.random.choice((0, 4096, size - 4096, size - 1, size + 1, size * 2))
    )
    image.is_refused = True


def running_files(image: Image) -> None:
    """Noise in files of a running machine: ``struct_page/``, ``sysfs/``, the events."""
    image.is_running = True
    draw = image.random
    names = [name for name in image.pristine.files if name.name not in ("device.toml", "poison", "lock")]
    for name in draw.sample(names, draw.choice((1, 1, 3))):
        path = image.path / name
        match draw.randrange(5):
            case 0:
                path.unlink()
            case 1:
                os.truncate(path, draw.choice((0, 1, path.stat().st_size // 2, path.stat().st_size + 100)))
            case _:
                path.write_bytes(noise(draw, path.read_bytes()))


def wrong_types(image: Image) -> None:
    """A file of the device replaced by another type: refused, or made anew."""
    image.is_running = True
    draw = image.random
    names = ("device.toml", "poison", "media", "lock", "control.sock", "events.jsonl", "supervisor.log")
    path = image.path / draw.choice(
        (*names, "struct_page", "sysfs", "repair", "struct_page/pages", "sysfs/badblocks")
    )
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    match draw.randrange(5):
        case 0:
            path.mkdir()
        case 1:
            os.mkfifo(path)
        case 2:
            path.symlink_to(image.outside)
        case 3:
            path.hardlink_to(image.outside)
        case _:
            path.symlink_to("/")
    image.is_refused = path.name in ("device.toml", "media", "poison", "lock")


DAMAGE: list[Callable[[Image], None]] = [
    one_byte,
    one_byte,
    noisy_pages,
    both_copies_alike,
    swapped_pages,
    swapped_pages,
    lost_pages,
    stale_pages,
    stale_pages,
    bad_superblocks,
    sealed_noise,
    values,
    values,
    values,
    schema,
    poison,
    config,
    media_size,
    running_files,
    wrong_types,
]


def run_sql(path: Path, statements: list[tuple[str, tuple[Any, ...]]]) -> None:
    """Change the tables; a statement refused by a constraint changes no row."""
    with DeviceDir.open(path) as directory, closing(Pmem(directory)) as pmem:
        store = Store(MetadataRegion(pmem.dax, Rmap(), Allocator(pmem.dax)), "fuzz")
        store.open(read_only=False)
        try:
            for statement, values_ in statements:
                try:
                    store._connection().execute(statement, values_)
                except (apsw.ConstraintError, apsw.MismatchError):
                    continue
        finally:
            store.close()
