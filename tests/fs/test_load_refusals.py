"""Tables with valid values but without a valid filesystem: refused in one line."""

from __future__ import annotations

import pytest

from daxemu.errors import CorruptMetadata
from daxemu.fs.inode import ROOT_INO
from tests.support.core import Core, core, pages

__all__ = ["core"]

REFUSALS = {
    "ring": ("UPDATE entry SET parent=3 WHERE ino=2", "cannot be reached from the root|link count"),
    "two names": ("INSERT INTO entry VALUES(1, x'61', 3)", "has another place|link count"),
    "name of the root": ("INSERT INTO entry VALUES(3, x'61', 1)", "has another place"),
    "no name": ("DELETE FROM entry WHERE ino=4", "inode 4: link count 1, has 0"),
    "link count": ("UPDATE inode SET nlink=7 WHERE ino=4", "inode 4: link count 7, has 1"),
    "a second name": ("INSERT INTO entry VALUES(1, x'62', 4)", "inode 4: link count 1, has 2"),
    "proxy": (
        "UPDATE link SET dev_block=(SELECT dev_block FROM link WHERE ino=4) WHERE ino=5",
        "without a proxy",
    ),
    "proxy number": ("UPDATE link SET proxy=9223372036854775807 WHERE ino=4", "proxy 9223372036854775807 is"),
    "place in the file": ("UPDATE link SET file_block=1<<60 WHERE ino=4", "beyond the largest file"),
    "next number": (
        "UPDATE counter SET value=9223372036854775807 WHERE name='next_ino'",
        "next inode's number",
    ),
    "no counter": ("DELETE FROM counter", "next inode's number is None"),
    "trigger": (
        "CREATE TRIGGER t AFTER INSERT ON entry BEGIN DELETE FROM inode; END",
        "tables are not those",
    ),
    "view": (
        "DROP TABLE counter; CREATE VIEW counter AS SELECT 'clean' AS name, 1 AS value",
        "tables are not",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_it_is_refused(core: Core, name: str) -> None:
    statement, complaint = REFUSALS[name]
    core.dir(b"inner", core.dir(b"outer").ino)
    assert [core.file(b"f", pages("A")), core.file(b"g", pages("B"))] == [4, 5]
    assert core.fs.names.lookup(ROOT_INO, b"outer").ino == 2
    core.fs.commit()
    core.fs.store._execute(statement)
    core.close(save=False)
    core.open_pmem()
    core.drop_pmem()
    with pytest.raises(CorruptMetadata, match=complaint) as caught:
        core.open()
    assert "\n" not in str(caught.value)
    core.drop_pmem()
