"""Check and repair of an unmounted device."""

from __future__ import annotations

import pytest

from daxemu.errors import Busy
from daxemu.fs.offline import Report, check_device
from daxemu.fs.rmap import METADATA_INO
from daxemu.pmem.device_dir import DeviceDir
from daxemu.pmem.inject import inject
from daxemu.uapi import PAGE_SIZE
from tests.fs.test_store import a_bit_of_everything, state
from tests.support.core import Core, pages


def check(core: Core, *, repair: bool = False) -> Report:
    with DeviceDir.open(core.path) as directory:
        return check_device(directory, repair=repair)


def test_a_sound_device(core: Core) -> None:
    a_bit_of_everything(core)
    count = len(core.fs.names)
    core.close()
    for repair in (False, True):
        assert check(core, repair=repair) == Report(inodes=count)


def test_checking_changes_nothing_that_a_mount_would_see(core: Core) -> None:
    a_bit_of_everything(core)
    before = state(core.fs)
    core.close()
    check(core)
    core.open()
    assert state(core.fs) == before


def test_a_mounted_device_is_busy(core: Core) -> None:
    with pytest.raises(Busy):
        check(core)


def test_damaged_files_are_no_fault_of_the_filesystem(core: Core) -> None:
    ino = core.file(b"f", pages("AB"))
    core.poison(ino, 1)
    core.close()
    report = check(core)
    assert report.wrong == []
    assert report.damaged == [f"/f: {PAGE_SIZE} bytes at {PAGE_SIZE:#x} are poison"]


def test_a_poisoned_copy_of_metadata_is_found_and_rewritten(core: Core) -> None:
    a_bit_of_everything(core)
    before = state(core.fs)
    first = next(owner for owner in core.fs.rmap.owners(0, 1) if owner.ino == METADATA_INO)
    inject(core.pmem, first.dev_block * PAGE_SIZE, 1)
    core.close(save=False)
    assert check(core).wrong == ["the first superblock is poisoned"]
    report = check(core, repair=True)
    assert (report.healed, report.wrong) == (1, [])
    core.open()
    assert core.pmem.badblocks.count == 0
    assert len(core.fs.names) < len(before)  # that was not committed


def test_what_cannot_be_read_is_reported_and_not_repaired(core: Core) -> None:
    for owner in list(core.fs.rmap.owners(0, 1 << 40)):
        inject(core.pmem, owner.dev_block * PAGE_SIZE, owner.length * PAGE_SIZE)
    core.close(save=False)
    for repair in (False, True):
        report = check(core, repair=repair)
        assert report.wrong == ["the first superblock is poisoned", "the second superblock is poisoned"]
        assert report.healed == 0
    core.open_pmem()
    assert core.pmem.badblocks.count > 0
    core.drop_pmem()


def test_every_bad_value_is_named(core: Core) -> None:
    a_bit_of_everything(core)
    core.fs.commit()
    for statement in ("UPDATE inode SET uid=-7 WHERE ino=2", "UPDATE inode SET size=-1480 WHERE ino=3"):
        core.fs.store._execute(statement)
    core.close(save=False)
    name = core.pmem.name
    assert check(core).wrong == [
        f"{name}: inode 2: uid -7 is outside its range",
        f"{name}: inode 3: size -1480 is outside its range",
    ]
