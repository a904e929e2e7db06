"""Poisoned or inconsistent metadata: survived, refused or found by fsck, never another filesystem."""

from __future__ import annotations

import apsw
import pytest

from daxemu.errors import CorruptMetadata
from daxemu.fs import fsck
from daxemu.fs.metadata_page import MetadataFile
from daxemu.pmem.inject import inject, uninject
from daxemu.uapi import PAGE_SIZE
from tests.fs.test_store import a_bit_of_everything, mounted, restore, snapshot, state
from tests.support.core import Core, core_at

# -- poison


@pytest.mark.parametrize("replica", [0, 1])
@pytest.mark.parametrize("file", MetadataFile, ids=lambda file: file.name.lower())
@pytest.mark.parametrize("clean", [True, False], ids=["unmounted", "killed"])
def test_one_copy_of_all_metadata_may_go(core: Core, file: MetadataFile, replica: int, clean: bool) -> None:
    a_bit_of_everything(core)
    core.fs.commit()
    before = state(core.fs)
    places = {core.fs.region._device_offset(file, replica, p) for p in range(core.fs.region.pages(file))}
    core.close(save=clean)
    core.open()
    core.close(save=clean)
    core.open()
    core.without_filesystem()
    for place in places:
        inject(core.pmem, place, 1)
    with mounted(core) as fs:
        assert state(fs) == before
        assert fs.region.repair() > 0
        assert fsck.fsck(fs) == []
    assert core.pmem.badblocks.count == 0


def test_both_copies_of_any_page_gone_is_corrupt_metadata_or_does_not_matter(core: Core) -> None:
    """A loss never shows another filesystem silently, neither an older state nor an empty one."""
    a_bit_of_everything(core)
    core.fs.commit()
    before, region = state(core.fs), core.fs.region
    sizes = {file: region.pages(file) for file in MetadataFile}
    pairs = [
        [region._device_offset(f, r, page) for r in range(2)]
        for f in MetadataFile
        for page in range(sizes[f])
    ]
    image = snapshot(core)
    core.without_filesystem()
    refused = 0
    for pair in pairs:
        restore(core, image)
        for place in pair:
            inject(core.pmem, place, 1)
        try:
            with mounted(core) as fs:
                assert state(fs) == before
        except CorruptMetadata:
            refused += 1
        for place in pair:
            uninject(core.pmem, place, PAGE_SIZE)
            core.pmem.dax.reserve(place, PAGE_SIZE)
    assert refused >= 5


# -- tables that make no sense


SENSELESS = [
    "DELETE FROM inode",
    "DELETE FROM inode WHERE ino=1",
    "DELETE FROM inode WHERE ino=2",
    "UPDATE inode SET mode=33188 WHERE ino=1",
    "UPDATE inode SET nlink=7 WHERE ino=2",
    "UPDATE inode SET mode=NULL WHERE ino=2",
    "UPDATE inode SET xattrs=x'c1' WHERE ino=2",
    "INSERT INTO entry VALUES(1, x'41', 999)",
    "INSERT INTO entry VALUES(2, x'41', 3)",
    "UPDATE link SET dev_block=0",
    "UPDATE link SET dev_block=2047, length=2",
    "UPDATE link SET dev_block=-1",
    "UPDATE link SET length=0",
    "UPDATE link SET file_block=-1 WHERE ino=2",
    "UPDATE link SET proxy=NULL",
    "INSERT INTO link VALUES(999, 0, 2000, 1, NULL)",
    "INSERT INTO link VALUES(1, 0, 2000, 1, NULL)",
    "INSERT INTO link SELECT ino, file_block+1, dev_block, length, proxy FROM link",
    "DROP TABLE link",
    "DROP TABLE inode",
    "ALTER TABLE inode DROP COLUMN xattrs",
]


@pytest.mark.parametrize("sql", SENSELESS)
def test_tables_that_make_no_sense_are_refused_or_found_by_fsck(core: Core, sql: str) -> None:
    a_bit_of_everything(core)
    core.fs.commit()
    core.fs._connection().execute(sql) if hasattr(
        core.fs, "_connection"
    ) else core.fs.store._connection().execute(sql)
    core.close(save=False)
    try:
        core.open()
    except CorruptMetadata:
        core.drop_pmem()
        return
    core.sound = False
    assert fsck.fsck(core.fs) != []


@pytest.mark.parametrize(
    ("sql", "complaint"),
    [
        ("UPDATE inode SET mode=-1 WHERE ino=2", "inode 2: mode -1"),
        ("UPDATE inode SET mode=420 WHERE ino=2", "inode 2: mode 0o644"),
        ("UPDATE inode SET uid=1<<40 WHERE ino=2", "inode 2: uid 1099511627776"),
        ("UPDATE inode SET gid=-7 WHERE ino=2", "inode 2: gid -7"),
        ("UPDATE inode SET rdev=-5 WHERE ino=2", "inode 2: rdev -5"),
        ("UPDATE inode SET size=-1480 WHERE ino=2", "inode 2: size -1480"),
        ("UPDATE inode SET nlink=-1 WHERE ino=2", "inode 2: nlink -1"),
        ("UPDATE inode SET mtime=9223372036854775807 WHERE ino=2", "inode 2: mtime"),
        ("UPDATE inode SET target=x'41' WHERE ino=2", "inode 2: a symlink"),
        ("UPDATE entry SET name=x'2f41' WHERE name=x'66'", "directory 1: an entry's name holds / or NUL"),
        ("UPDATE entry SET name=x'4100' WHERE name=x'66'", "directory 1: an entry's name holds / or NUL"),
        ("UPDATE entry SET name=x'2e2e' WHERE name=x'66'", "directory 1: an entry's name is empty"),
    ],
)
def test_a_value_outside_its_domain_is_named_and_refused(core: Core, sql: str, complaint: str) -> None:
    a_bit_of_everything(core)
    core.fs.commit()
    core.fs.store._connection().execute(sql)
    core.close(save=False)
    with pytest.raises(CorruptMetadata, match=complaint):
        core.open()
    core.drop_pmem()


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE inode SET size='big' WHERE ino=2",
        "INSERT INTO entry VALUES(1, 'text', 2)",
        "UPDATE link SET length='x'",
        "UPDATE counter SET value='x'",
    ],
)
def test_a_value_of_another_type_cannot_get_into_the_tables(core: Core, sql: str) -> None:
    a_bit_of_everything(core)
    core.fs.commit()
    with pytest.raises(apsw.ConstraintError):
        core.fs.store._connection().execute(sql)


def test_a_device_of_another_size_is_refused(core: Core) -> None:
    a_bit_of_everything(core)
    core.close()
    with core_at(size=12 << 20) as other:
        other.close()
        data = (core.path / "media").read_bytes()
        with open(other.path / "media", "r+b") as media:
            media.write(data)
        with pytest.raises(CorruptMetadata, match="another size"):
            other.open()
        other.drop_pmem()


@pytest.mark.parametrize("copied_back", [True, False])
def test_a_device_that_is_removed_can_be_let_go(core: Core, copied_back: bool) -> None:
    """SQLite writes the header of the WAL, or the WAL, when closed."""
    a_bit_of_everything(core)
    core.fs.commit()
    before = state(core.fs)
    if copied_back:
        core.fs.store._execute("PRAGMA wal_checkpoint")
    core.mm.removal(core.pmem.pages.start, core.pmem.pages.length, core.pmem.dax.kill_dax)
    core.fs.close()
    core.close(save=False)
    core.open()
    assert state(core.fs) == before
