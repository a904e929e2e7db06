"""Damage to a device, drawn from a seed, and what a filesystem on it must be after that.

An image is a copy of one prepared device in shared memory. :func:`check` says what a user of it would see.
"""

from __future__ import annotations

import random
import shutil
import stat
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from daxemu.errors import DaxemuError, MediaError
from daxemu.events import Event, MetadataRewritten
from daxemu.fs.allocator import Allocator
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.fsck import fsck
from daxemu.fs.inode import ROOT_INO
from daxemu.fs.metadata_page import seal
from daxemu.fs.metadata_region import MetadataRegion
from daxemu.fs.offline import check_device
from daxemu.fs.records import _COLUMNS
from daxemu.fs.rmap import Rmap
from daxemu.fs.store import Store
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.pmem.device_dir import DeviceDir
from daxemu.pmem.pmem import Pmem
from daxemu.uapi import PAGE_SIZE
from tests.support.core import ROOT, Core
from tests.support.metadata import Page, metadata_pages, overwrite, superblocks

Tree = dict[bytes, tuple[Any, ...]]
"""By path: everything that system calls show of a file; ``None`` for bytes that cannot be read."""

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


def fill(core: Core) -> None:
    """A bit of everything that a filesystem can hold."""
    fs = core.fs
    directory = core.dir(b"d")
    inner = core.dir(b"inner", directory.ino)
    first = core.file(b"f", b"data" * 3000)
    core.clone(first, b"clone")
    fs.link(first, inner.ino, b"another name")
    fs.symlink(directory.ino, b"s", b"../f", ROOT)
    fs.mknod(inner.ino, b"null", stat.S_IFCHR | 0o600, 0x103, ROOT)
    fs.setxattr(first, b"user.x", b"value", 0)
    for number in range(40):
        core.file(b"file %d" % number, b"%d" % number, inner.ino)


def tree(fs: Filesystem) -> Tree:
    """Walk everything from the root, by names alone, and read it."""
    found: Tree = {}
    ahead = [(b"", ROOT_INO)]
    while ahead:
        path, ino = ahead.pop()
        inode = fs.names.get(ino)
        data: bytes | None = b""
        if inode.extents is not None:
            try:
                # Of a huge file the beginning: all of its blocks are there.
                data = bytes(fs.read(ino, 0, min(inode.size, 1 << 20)))
            except MediaError:
                data = None
        times = (inode.atime, inode.mtime, inode.ctime)
        plain = (inode.mode, inode.uid, inode.gid, inode.nlink, inode.rdev, inode.size, times)
        found[path or b"/"] = (ino, *plain, inode.target, sorted(inode.xattrs.items()), inode.sectors, data)
        ahead += [(path + b"/" + name, child) for name, child in (inode.entries or {}).items()]
    for inode in fs.names:
        fs.names.path_bytes(inode.ino)  # a ring would have no end
    return found


class Image:
    """A copy of the device at ``pristine``, with damage as ``seed`` says. ``kind`` names the damage; after
    ``is_sealed`` damage checksums are right and values may be wrong.
    """

    def __init__(self, pristine: Pristine, path: Path, seed: int) -> None:
        self.path, self.pristine = path, pristine
        self.random = random.Random(seed)
        self.is_sealed = False
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir()
        for name in ("device.toml", "poison"):
            shutil.copyfile(pristine.path / name, path / name)
        with (path / "media").open("wb") as media:
            for offset, data in pristine.parts:
                media.seek(offset)
                media.write(data)
            media.truncate(pristine.size)
        damage = self.random.choice(DAMAGE)
        self.kind = damage.__name__
        damage(self)

    def offsets(self) -> list[int]:
        """Where a copy of a page, or a superblock, is."""
        return [offset for page in self.pristine.pages for offset in page.offsets] + list(
            self.pristine.supers
        )

    def page(self, offset: int) -> bytes:
        """Bytes of one page of the pristine device."""
        return self.pristine.media[offset : offset + PAGE_SIZE]

    def some(self, items: list[Any]) -> list[Any]:
        """One or a few of them."""
        return self.random.sample(items, min(len(items), self.random.choice((1, 1, 2, 5, 20))))

    def noise(self, data: bytes) -> bytes:
        """``data`` with a few bytes or bits changed, or a run of them."""
        changed, draw = bytearray(data), self.random
        for _ in range(draw.choice((1, 1, 3, 30))):
            at = draw.randrange(len(changed))
            if draw.random() < 0.3:
                end = min(len(changed), at + draw.randrange(1, 200))
                changed[at:end] = draw.choice(
                    (bytes(end - at), b"\xff" * (end - at), draw.randbytes(end - at))
                )
            else:
                changed[at] = draw.choice(
                    (0, 0xFF, changed[at] ^ 1 << draw.randrange(8), draw.randrange(256))
                )
        return bytes(changed)


def bytes_of_pages(image: Image) -> None:
    """Copies of pages and superblocks, one of a page or both."""
    for offset in image.some(image.offsets()):
        overwrite(image.path, offset, image.noise(image.page(offset)))


def swapped_pages(image: Image) -> None:
    """A page where another belongs, both intact."""
    for offset in image.some(image.offsets()):
        overwrite(image.path, offset, image.page(image.random.choice(image.offsets())))


def lost_pages(image: Image) -> None:
    """Copies that are zeros, or were never written."""
    for offset in image.some(image.offsets()):
        overwrite(image.path, offset, bytes(PAGE_SIZE))


def stale_pages(image: Image) -> None:
    """One copy of a page as of an earlier commit."""
    for page in image.some(image.pristine.pages):
        offset = image.random.choice(page.offsets)
        overwrite(image.path, offset, image.pristine.old[offset : offset + PAGE_SIZE])


def sealed_noise(image: Image) -> None:
    """Both copies of a page changed alike, their checksum right."""
    image.is_sealed = True
    for page in image.some([page for page in image.pristine.pages if any(image.page(page.offsets[0])[:64])]):
        data = bytearray(image.noise(image.page(page.offsets[0])))
        seal(memoryview(data), page.file, page.number, 1 << 40)
        for offset in page.offsets:
            overwrite(image.path, offset, bytes(data))


def values(image: Image) -> None:
    """Any column of any row, through SQL."""
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
    """Other tables, triggers, views, whole tables changed."""
    image.is_sealed = True
    run_sql(image.path, [(image.random.choice(SCHEMA_CHANGES), ())])


def poison(image: Image) -> None:
    """The list of poisoned sectors, sensible or not."""
    draw = image.random
    lines = [
        f"{draw.choice(image.offsets()) // 512} {draw.choice((1, 8, 100))}"
        for _ in range(draw.randrange(1, 40))
    ]
    text = "\n".join(lines).encode() + b"\n"
    if draw.random() < 0.3:
        text = image.noise(text)
    (image.path / "poison").write_bytes(text)


def small_files(image: Image) -> None:
    """``device.toml``, ``poison``, the length of the media, files of the running machine."""
    draw = image.random
    name = draw.choice(
        ("device.toml", "device.toml", "media", "poison", "struct_page", "sysfs", "events.jsonl")
    )
    path = image.path / name
    if name == "media":
        with path.open("r+b") as media:
            media.truncate(draw.choice((0, 4096, image.pristine.size - 4096, image.pristine.size + 4096)))
    elif draw.random() < 0.15:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(image.noise(path.read_bytes() if path.exists() else b"\0" * 4096))


DAMAGE: list[Callable[[Image], None]] = [
    bytes_of_pages,
    swapped_pages,
    lost_pages,
    stale_pages,
    sealed_noise,
    values,
    values,
    schema,
    poison,
    small_files,
]


def run_sql(path: Path, statements: list[tuple[str, tuple[Any, ...]]]) -> None:
    """Change the tables; a statement that a constraint refuses changes nothing."""
    import apsw

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


class Pristine:
    """The device that images are copies of: its bytes, the bytes of an earlier mount, its tree."""

    def __init__(self, core: Core) -> None:
        self.path, self.size = core.path, core.config.size
        core.reopen()
        core.file(b"early", b"x")
        core.close()
        self.old = (self.path / "media").read_bytes()
        core.open()
        fill(core)
        core.close()
        core.open()
        self.tree = tree(core.fs)
        core.close()
        self.media = (self.path / "media").read_bytes()
        self.pages: list[Page] = metadata_pages(self.path)
        self.supers = superblocks(self.path)
        parts = ((at, self.media[at : at + PAGE_SIZE]) for at in range(0, self.size, PAGE_SIZE))
        self.parts = [(at, data) for at, data in parts if any(data)]


class Seen:
    """One mount of an image: events, what fsck says, the tree or the error."""

    def __init__(self, path: Path, *, write: bool) -> None:
        self.events: list[Event] = []
        self.wrong: list[str] = []
        self.tree: Tree | None = None
        self.lost = 0
        try:
            with DeviceDir.open(path) as directory, closing(Pmem(directory)) as pmem:
                mm = MemoryFailures(self.events.append)
                pmem.attach(mm)
                self._mount(Filesystem(pmem.dax, mm, self.events.append), write)
        except DaxemuError as error:
            self.wrong.append(str(error))

    def _mount(self, fs: Filesystem, write: bool) -> None:
        try:
            self.wrong += fsck(fs)
            self.tree = tree(fs)
            self.lost = len(fs.damaged())
            if write:
                ino = fs.mknod(ROOT_INO, b"new", stat.S_IFREG | 0o644, 0, ROOT).ino
                fs.write(ino, 0, b"new" * 5000)
                fs.fsync()
                for name, child in list(fs.names.directory(ROOT_INO)[1].items()):
                    if not fs.names.get(child).is_dir:
                        fs.unlink(ROOT_INO, name)
        finally:
            fs.close()

    @property
    def said_something(self) -> bool:
        return bool(self.wrong or self.lost or any(type(event) is MetadataRewritten for event in self.events))


def check(image: Image) -> None:
    """fsck, mount, walk, repair, mount again and write. An assertion fails where a mount showed something
    wrong without a word.
    """
    found: list[str] = []
    for repair in (False, True):
        try:
            with DeviceDir.open(image.path) as directory:
                report = check_device(directory, repair=repair)
            found += [*report.wrong, *report.damaged]
        except DaxemuError as error:
            found.append(str(error))
        seen = Seen(image.path, write=repair)
        said = bool(found or seen.said_something)
        assert not any("\n" in line for line in (*found, *seen.wrong)), (
            f"more than a line: {found} {seen.wrong}"
        )
        if not image.is_sealed and seen.tree is not None:
            right = image.pristine.tree
            wrong = {
                path for path in right.keys() | seen.tree.keys() if right.get(path) != seen.tree.get(path)
            }
            lost = {path for path in wrong if (entry := seen.tree.get(path)) and entry[-1] is None}
            assert wrong == lost, f"{image.kind}: wrong: {sorted(wrong - lost)[:5]}"
            assert said or not wrong, f"{image.kind}: lost without a word: {sorted(wrong)[:5]}"
        if image.is_sealed and seen.tree is not None and repair and not said:
            after = Seen(image.path, write=False)
            assert after.tree is not None, f"{image.kind}: lost by a write: {after.wrong}"
            assert not after.wrong, f"{image.kind}: sound before a write: {after.wrong}"
