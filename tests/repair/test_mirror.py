"""A mirror with checksums: which of two different copies is right."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from daxemu.errors import MediaError
from daxemu.events import CorruptionFound
from daxemu.fs.reserved import ReservedFile
from daxemu.uapi import PAGE_SIZE, Ino
from tests.support.repairing import Repairing, repairing

DATA = b"".join(bytes([page + 1]) * PAGE_SIZE for page in range(4))


@pytest.fixture
def checked() -> Iterator[Repairing]:
    with repairing("mirror:checksum=yes") as made:
        yield made


def found(made: Repairing) -> list[tuple[str, bool]]:
    return [(e.by, e.repaired) for e in made.core.events if isinstance(e, CorruptionFound)]


def corrupt_copy(made: Repairing, ino: Ino, offset: int) -> None:
    block = made.at(ino, offset) // PAGE_SIZE
    extents = ReservedFile(made.core.fs)._extents()
    assert extents is not None
    (run,) = extents.lookup(block, block + 1)
    made.corrupt(run.dev_block * PAGE_SIZE, 100)


def scrub(made: Repairing) -> None:
    strategy = made.host._strategy
    assert strategy is not None
    for _ in strategy.scrub():
        pass


def test_a_corrupt_block_is_read_from_its_copy(checked: Repairing) -> None:
    ino = checked.core.file(data=DATA)
    checked.corrupt(checked.at(ino, PAGE_SIZE), 100)
    assert checked.core.read(ino) == DATA
    assert found(checked) == [("read", True)]
    assert checked.core.read(ino) == DATA
    assert len(found(checked)) == 1


def test_a_corrupt_copy_is_found_by_a_scrub(checked: Repairing) -> None:
    ino = checked.core.file(data=DATA)
    corrupt_copy(checked, ino, PAGE_SIZE)
    assert checked.core.read(ino) == DATA
    assert found(checked) == []
    scrub(checked)
    scrub(checked)
    assert found(checked) == [("scrub", True)]
    finished = checked.fail(checked.at(ino, PAGE_SIZE), PAGE_SIZE)
    assert finished is not None
    assert finished.verdict == "recovered"
    assert checked.core.read(ino) == DATA


def test_a_corrupt_copy_is_not_used_for_a_repair(checked: Repairing) -> None:
    ino = checked.core.file(data=DATA)
    corrupt_copy(checked, ino, 0)
    finished = checked.fail(checked.at(ino, 0), 512)
    assert finished is not None
    assert (finished.verdict, finished.reason) == ("cannot", "the copy is damaged, too")


def test_a_block_is_eio_if_its_copy_is_corrupt_too(checked: Repairing) -> None:
    ino = checked.core.file(data=DATA)
    corrupt_copy(checked, ino, 0)
    checked.corrupt(checked.at(ino, 0), 100)
    with pytest.raises(MediaError, match="and so has its copy"):
        checked.core.fs.read(ino, 0, PAGE_SIZE)
    scrub(checked)
    assert found(checked) == [("read", False), ("scrub", False)]
    checked.core.fs.write(ino, 0, DATA[:PAGE_SIZE])
    assert checked.core.read(ino) == DATA


@pytest.mark.parametrize("crash", [False, True])
def test_checksums_survive_a_remount(checked: Repairing, crash: bool) -> None:
    ino = checked.core.file(data=DATA)
    checked.core.fs.commit()
    checked.remount(crash=crash)
    checked.corrupt(checked.at(ino, 0), 100)
    assert checked.core.read(ino) == DATA
    assert found(checked)[-1] == ("read", True)


def test_checksums_are_computed_anew_after_a_mirror_without(checked: Repairing) -> None:
    """Blocks written without checksums are not compared with older checksums."""
    ino = checked.core.file(data=DATA)
    checked.choose("mirror")
    checked.core.fs.write(ino, 0, b"new" * 1000)
    checked.choose("mirror:checksum=yes")
    assert bytes(checked.core.fs.read(ino, 0, 3000)) == b"new" * 1000
    assert found(checked) == []
