"""Store: the filesystem's records as tables, committed in batches. fs/metadata_region.py states the place of
the tables on the device.

The in-memory structures are the authority. ``Namespace.dirty_*`` and ``Rmap.dirty`` record the changes since
the last commit; :meth:`Store.commit` writes only these changes, in one transaction. After a crash the tables
hold the state of the last commit.

An unlinked file that is still open is not in the tables; the file ends with the mount. A file of O_TMPFILE,
which may get a name, is in the tables with a link count of 0 (an orphan); the next mount removes orphans. So
linkat(2) of a file of many extents writes a few rows, not all links of the file.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from operator import itemgetter

import apsw
import msgspec

from daxemu.errors import CorruptMetadata, DaxemuError, MediaError, NoSpace
from daxemu.fs.inode import MAX_FILE_SIZE, Inode
from daxemu.fs.metadata_page import PAYLOAD, MetadataFile
from daxemu.fs.metadata_region import MetadataRegion
from daxemu.fs.metadata_vfs import MetadataVfs
from daxemu.fs.namespace import Namespace
from daxemu.fs.records import INO_LIMIT, check_entry, inode_of
from daxemu.fs.rmap import METADATA_INO, Link, ReflinkProxy, Rmap
from daxemu.ranges import RangeSet
from daxemu.text import for_people
from daxemu.uapi import PAGE_SIZE, Block, Ino
from daxemu.units import round_down, round_up

log = logging.getLogger(__name__)
_FIRST = itemgetter(0)

# Maximum bytes of one inode, and of one link, in a b-tree, including half-filled pages.
INODE_BYTES, LINK_BYTES, NAME_FACTOR = 280, 110, 2.5
BASE_PAGES = 48
CHECKPOINT_PAGES = 64
GROWTH_PAGES = 64
MOST_GROWTH_PAGES = 4096
"""Most pages of one growth of the database, beyond what a change needs: 4 times as many are reserved."""
LARGE_PAGES = 1024
AHEAD = 8
"""A region of LARGE_PAGES and more grows before it is full, when the last AHEAD-th part comes into use. Each
change then makes a part of the growth, 256 pages in 6 ms; a growth at once took 64 ms at 200,000 links.
"""
FSCK_HINT = "; run: daxemu fsck"
PROXY_LIMIT = 1 << 62

# Compared, word by word, with the tables of a device: a space more or less is another word.
SCHEMA = """
    CREATE TABLE inode(
        ino INTEGER PRIMARY KEY, mode INTEGER, uid INTEGER, gid INTEGER, nlink INTEGER, rdev INTEGER,
        size INTEGER, atime INTEGER, mtime INTEGER, ctime INTEGER, target BLOB, xattrs BLOB) STRICT;
    CREATE TABLE entry(parent INTEGER, name BLOB, ino INTEGER, PRIMARY KEY(parent, name))
        WITHOUT ROWID, STRICT;
    CREATE TABLE link(
        ino INTEGER, file_block INTEGER, dev_block INTEGER, length INTEGER, proxy INTEGER,
        PRIMARY KEY(ino, file_block)) WITHOUT ROWID, STRICT;
    CREATE TABLE counter(name TEXT PRIMARY KEY, value INTEGER) WITHOUT ROWID, STRICT;
"""


_WRONG_TYPE = "a row has a value of a wrong type"
_SQLITE: dict[type[Exception], str] = {
    apsw.NotADBError: "the records are no SQLite database",
    apsw.CorruptError: "the records are damaged",
    apsw.SQLError: "a table or a column is missing",
    apsw.IOError: "a page of the records cannot be read",
}


def _in_words(error: Exception) -> str:
    """Return the reason for an error of SQLite, or of bytes that are not text."""
    if isinstance(error, MediaError):
        return str(error)
    return _SQLITE.get(type(error), "the records are damaged")


class Store:
    """Tables of one device."""

    def __init__(self, region: MetadataRegion, name: str) -> None:
        self._region = region
        self._name = name
        self._vfs = MetadataVfs(region)
        self._room = 0
        self._growth: Iterator[None] | None = None
        """Growth of the region under way."""
        self._may_grow_ahead = True
        """False after a growth ahead of need found no space."""
        self.is_clean = False
        """True if no change followed the last commit, so no crash happened."""
        self._db: apsw.Connection | None = None
        self._counters: tuple[int, bool] | None = None
        """Counters on the device: the number of the next inode, and ``is_clean``."""

    # -- opening

    def format(self, names: Namespace, rmap: Rmap, *, after: int = 0) -> None:
        """Make a new filesystem with the inodes of ``names``. ``after``: generation of the superblock of the
        filesystem that is replaced. Raises NoSpace, CorruptMetadata.
        """
        self._region.prepare(after)
        self.ensure_room(len(names), rmap.link_count, names.name_bytes)
        self._open()
        self._execute("PRAGMA journal_mode=MEMORY")
        self._execute("PRAGMA journal_mode=WAL")
        self._execute(SCHEMA)
        self.commit(names, rmap)
        self._region.format()

    def open(self, *, read_only: bool) -> None:
        """Open existing tables. With ``read_only``, the WAL is not copied back either. Raises
        CorruptMetadata.
        """
        self._region.load()
        self._region.is_read_only = read_only
        if not read_only:
            self._region.begin()
        self._open()
        if read_only:
            self._connection().config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
        self._execute("PRAGMA journal_mode=WAL")
        self._check_schema()
        self._room = self._region.size(MetadataFile.DB)

    def _open(self) -> None:
        try:
            self._db = apsw.Connection("db", vfs=self._vfs.name)
        except (apsw.Error, MediaError) as error:
            raise self._translated(error) from error
        self._execute(
            "PRAGMA locking_mode=EXCLUSIVE; PRAGMA synchronous=FULL; PRAGMA temp_store=MEMORY;"
            f"PRAGMA wal_autocheckpoint={CHECKPOINT_PAGES}; PRAGMA cache_size=-8192"
        )

    def _check_schema(self) -> None:
        """Check for exactly the tables of SCHEMA, without views or triggers. Raises CorruptMetadata."""
        found = sorted(_words(row[0]) for row in self._execute("SELECT sql FROM sqlite_schema"))
        if found != sorted(_words(sql) for sql in SCHEMA.split(";") if sql.strip()):
            raise CorruptMetadata(f"{self._name}: the metadata's tables are not those of a filesystem")

    def close(self) -> None:
        """Close the tables. Uncommitted changes are lost. The write-back of SQLite at the close may fail
        without loss: the next mount reads the WAL.
        """
        if self._db is not None:
            try:
                self._db.close()
            except apsw.Error as error:
                log.warning("%s: closing the metadata: %s", self._name, error)
            self._db = None
        self._vfs.unregister()

    def _connection(self) -> apsw.Connection:
        if self._db is None:
            raise CorruptMetadata(f"{self._name}: the metadata is not open")
        return self._db

    def _execute(self, sql: str) -> list[tuple[apsw.SQLiteValue, ...]]:
        try:
            return list(self._connection().execute(sql))
        except (apsw.Error, MediaError, UnicodeDecodeError) as error:
            raise self._translated(error) from error

    def _translated(self, error: apsw.Error | MediaError | UnicodeDecodeError) -> DaxemuError:
        failure, self._vfs.failure = self._vfs.failure, None
        if isinstance(failure, MediaError) or failure is None:
            why = str(failure or _in_words(error))
            return CorruptMetadata(f"{self._name}: metadata cannot be read ({why}){FSCK_HINT}")
        return failure

    # -- room

    def ensure_room(self, inodes: int, links: int, name_bytes: int) -> None:
        """Make room for tables of ``inodes``, ``links`` and ``name_bytes``, and for a transaction that writes
        all rows.

        A large region grows ahead of need, one step a call; on a nearly full device the steps are small.
        Raises NoSpace if the device or the memory of the host is full; then nothing has changed.
        """
        rows = inodes * INODE_BYTES + links * LINK_BYTES + int(name_bytes * NAME_FACTOR)
        needed = BASE_PAGES * PAGE_SIZE + rows
        is_large = self._room >= LARGE_PAGES * PAYLOAD
        if needed <= self._room - (self._room // AHEAD if is_large else 0):
            return
        try:
            while self._growth is not None or needed > self._room or self._may_grow_ahead:
                if self._growth is None:
                    self._growth = self._grow(self._next_room(needed))
                self._continue_growth(needed)
                if needed <= self._room:
                    return
        except NoSpace:
            self._may_grow_ahead = False
            if needed > self._room:
                for _ in self._grow(round_up(needed, PAYLOAD)):
                    pass

    def _next_room(self, needed: int) -> int:
        """Return the room after the next growth. Growth in large steps keeps the number of extents small."""
        step = min(self._room // 4, MOST_GROWTH_PAGES * PAYLOAD)
        return max(round_up(needed, GROWTH_PAGES * PAYLOAD), self._room + round_down(step, PAYLOAD))

    def _continue_growth(self, needed: int) -> None:
        """Take one step of the growth under way, or as many steps as make the room ``needed``."""
        growth, self._growth = self._growth, None
        while growth is not None:
            if next(growth, self) is self:
                self._may_grow_ahead = True
                return
            if needed <= self._room:
                self._growth = growth
                return

    def _finish_growth(self) -> None:
        """End a growth under way. Without a crash, the next mount expects zeros in free blocks."""
        growth, self._growth = self._growth, None
        with suppress(NoSpace):
            for _ in growth or ():
                pass

    def _grow(self, room: int) -> Iterator[None]:
        yield from self._region.grow_in_pieces(MetadataFile.DB, room)
        wal = room + room // 64 + 2 * CHECKPOINT_PAGES * PAYLOAD
        yield from self._region.grow_in_pieces(MetadataFile.WAL, wal)
        self._room = room

    # -- committing

    def commit(self, names: Namespace, rmap: Rmap, *, clean: bool = False) -> None:
        """Write all changes since the last commit, or nothing. ``clean``: no change will follow the commit.

        Raises CorruptMetadata if the region is unusable, NoSpace if the region is too small.
        """
        if clean:
            self._finish_growth()
        inodes, entries, extents = names.dirty_inodes | names.dirty_times, names.dirty_entries, rmap.dirty
        if not (inodes or entries or extents) and clean == self.is_clean:
            return
        db = self._connection()
        try:
            with db:
                self._commit_inodes(db, names, inodes | (extents.keys() - {METADATA_INO}))
                self._commit_entries(db, names, entries)
                self._commit_links(db, names, rmap)
                if (names.next_ino, clean) != self._counters:
                    db.execute(
                        "REPLACE INTO counter VALUES('next_ino', ?), ('clean', ?)", (names.next_ino, clean)
                    )
        except apsw.Error as error:
            raise self._translated(error) from error
        names.dirty_inodes, names.dirty_times = set(), set()
        names.dirty_entries, rmap.dirty, rmap.marks = set(), {}, 0
        names.dirty_since = 0
        rmap.given_up = RangeSet()
        self.is_clean = clean
        self._counters = (names.next_ino, clean)

    def _commit_inodes(self, db: apsw.Connection, names: Namespace, dirty: set[Ino]) -> None:
        there = [inode for ino in dirty if (inode := names.find(ino)) is not None and names.is_stored(inode)]
        gone = [(ino,) for ino in dirty.difference(inode.ino for inode in there)]
        db.executemany("DELETE FROM inode WHERE ino=?", gone)
        db.executemany("DELETE FROM link WHERE ino=?", gone)
        db.executemany(
            "REPLACE INTO inode VALUES(?,?,?,?,?,?,?,?,?,?,?,?)",
            map(_row, there),
        )

    def _commit_entries(self, db: apsw.Connection, names: Namespace, dirty: set[tuple[Ino, bytes]]) -> None:
        gone, there = [], []
        for parent, name in dirty:
            directory = names.find(parent)
            child = (directory.entries or {}).get(name) if directory is not None else None
            if child is None:
                gone.append((parent, name))
            else:
                there.append((parent, name, child))
        db.executemany("DELETE FROM entry WHERE parent=? AND name=?", gone)
        db.executemany("REPLACE INTO entry VALUES(?,?,?)", there)

    def _commit_links(self, db: apsw.Connection, names: Namespace, rmap: Rmap) -> None:
        for ino, ranges in rmap.dirty.items():
            inode = names.find(ino)
            if ino == METADATA_INO or inode is None or inode.extents is None or not names.is_stored(inode):
                continue
            extents = inode.extents
            for start, end in ranges:
                db.execute(
                    "DELETE FROM link WHERE ino=? AND file_block>=? AND file_block<?", (ino, start, end)
                )
                # The whole of a changed link is marked dirty, old and new range: no other link begins in the
                # dirty range.
                found = {id(run.link): run.link for run in extents.runs(start, end) if run.link is not None}
                db.executemany(
                    "REPLACE INTO link VALUES(?,?,?,?,?)",
                    (_link_row(link) for link in found.values()),
                )

    # -- loading

    def load(self, names: Namespace, rmap: Rmap, total_blocks: Block) -> None:
        """Fill an empty ``names`` and ``rmap``.

        Raises CorruptMetadata if the tables are unreadable or inconsistent; the caller must then discard
        ``names`` and ``rmap``.
        """
        try:
            with _without_gc():
                for row in self._connection().execute("SELECT * FROM inode"):
                    names.adopt(inode_of(row))
                entries = self._connection().execute("SELECT parent, name, ino FROM entry")
                for parent, group in groupby(entries, key=_FIRST):
                    names.adopt_entries(parent, group)
                links = self._connection().execute("SELECT * FROM link ORDER BY ino, file_block")
                self._adopt_links(links, names, rmap, total_blocks)
            self._adopt_counters(names)
            names.finish_loading()
        except apsw.Error as error:
            raise self._translated(error) from error
        except (ValueError, DaxemuError) as error:
            why = error if not isinstance(error, msgspec.MsgspecError | UnicodeError) else _WRONG_TYPE
            raise CorruptMetadata(
                f"{self._name}: the metadata is inconsistent: {for_people(str(why))}"
            ) from error
        except (TypeError, KeyError) as error:
            raise CorruptMetadata(f"{self._name}: the metadata is inconsistent: {_WRONG_TYPE}") from error

    def _adopt_counters(self, names: Namespace) -> None:
        counters = dict(self._connection().execute("SELECT name, value FROM counter"))
        next_ino, clean = counters.get("next_ino"), counters.get("clean")
        if type(next_ino) is not int or not names.next_ino <= next_ino <= INO_LIMIT:
            raise ValueError(f"the next inode's number is {next_ino}, expected {names.next_ino} or more")
        if clean not in (0, 1):
            raise ValueError(f"the counter clean is {clean}, expected 0 or 1")
        names.reserve_inos(next_ino)
        self.is_clean = bool(clean)

    def wrong_values(self) -> list[str]:
        """Return a line for each row with a value outside its domain. (:meth:`load` stops at the first.)"""
        wrong = []
        try:
            for row in self._connection().execute("SELECT * FROM inode"):
                try:
                    inode_of(row)
                except ValueError as error:
                    wrong.append(f"{self._name}: {for_people(str(error))}")
            for parent, name in self._connection().execute("SELECT parent, name FROM entry"):
                try:
                    check_entry(parent, name)
                except ValueError as error:
                    wrong.append(f"{self._name}: {for_people(str(error))}")
        except apsw.Error as error:
            wrong.append(str(self._translated(error)))
        return wrong

    def _adopt_links(
        self, rows: Iterator[tuple[int, ...]], names: Namespace, rmap: Rmap, total_blocks: Block
    ) -> None:
        proxies: dict[int, ReflinkProxy] = {}
        adopted: list[Link] = []
        for ino, group in groupby(rows, key=_FIRST):
            inode = names.get(ino)
            if inode.extents is None:
                raise ValueError(f"inode {ino} is not a file but has blocks")
            links = []
            end = 0
            for _, file_block, dev_block, length, number in group:
                if file_block < end or length <= 0 or dev_block < 0 or dev_block + length > total_blocks:
                    raise ValueError(f"inode {ino}: blocks {dev_block}+{length} at {file_block}")
                end = file_block + length
                if end > MAX_FILE_SIZE // PAGE_SIZE:
                    raise ValueError(f"inode {ino}: block {end} is beyond the largest file")
                proxy = None
                if number is not None:
                    if not 0 < number < PROXY_LIMIT:
                        raise ValueError(f"inode {ino}: proxy {number} is outside its range")
                    proxy = proxies.get(number)
                    if proxy is None:
                        proxy = proxies[number] = ReflinkProxy(number)
                links.append(Link(inode.ino, file_block, dev_block, length, proxy))
            inode.extents.adopt(links)
            adopted += links
        rmap.adopt(adopted)
        rmap.reserve_proxies(max(proxies, default=0) + 1)

    def integrity_check(self) -> list[str]:
        """Return the problems of the tables that SQLite finds, one line each."""
        found = [_words(row[0]) for row in self._execute("PRAGMA integrity_check")]
        return [] if found == ["ok"] else found


def _words(sql: object) -> str:
    return " ".join(str(sql).split())


def _link_row(link: Link) -> tuple[int | None, ...]:
    number = link.proxy.number if link.proxy is not None else None
    return (link.ino, link.file_block, link.dev_block, link.length, number)


def _row(inode: Inode) -> tuple[int | bytes | None, ...]:
    return (
        inode.ino,
        inode.mode,
        inode.uid,
        inode.gid,
        inode.nlink,
        inode.rdev,
        inode.size,
        inode.atime,
        inode.mtime,
        inode.ctime,
        inode.target,
        msgspec.msgpack.encode(inode.xattrs) if inode.xattrs else None,
    )


@contextmanager
def _without_gc() -> Iterator[None]:
    """Disable garbage collection during the load: loaded objects stay, and repeated searches for garbage
    among the objects take longer than the load.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
