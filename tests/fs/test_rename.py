"""renameat2(2) of the namespace, flag by flag, as a matrix."""

from __future__ import annotations

import errno
import itertools
import stat

import pytest

from daxemu.errors import FsError
from daxemu.fs.inode import ROOT_INO, Credentials
from daxemu.fs.namespace import Namespace
from daxemu.fs.rmap import Rmap
from daxemu.uapi import RENAME_EXCHANGE, RENAME_NOREPLACE, RENAME_WHITEOUT
from tests.fs.test_namespace import mkdir, refusal, touch

KINDS = ["nothing", "file", "symlink", "empty", "full"]
DIRS = {"empty", "full"}


@pytest.fixture
def names() -> Namespace:
    return Namespace.new(Rmap(), 0, 0)


def make(names: Namespace, kind: str, name: bytes, parent: int) -> int | None:
    match kind:
        case "file":
            return touch(names, name, parent)
        case "symlink":
            return names.symlink(parent, name, b"t", Credentials(0, 0)).ino
        case "empty" | "full":
            ino = mkdir(names, name, parent)
            if kind == "full":
                touch(names, b"child", ino)
            return ino
    return None


def expected_errno(old: str, new: str, flags: int) -> int | None:
    """rename(2)'s page, for two names in different directories."""
    if old == "nothing" or (flags == RENAME_EXCHANGE and new == "nothing"):
        return errno.ENOENT
    if flags == RENAME_NOREPLACE and new != "nothing":
        return errno.EEXIST
    if flags == RENAME_EXCHANGE or new == "nothing":
        return None
    if new in DIRS and old not in DIRS:
        return errno.EISDIR
    if old in DIRS and new not in DIRS:
        return errno.ENOTDIR
    return errno.ENOTEMPTY if new == "full" else None


def counts_are_right(names: Namespace) -> bool:
    """Check link counts (2 and the number of subdirectories) and ``..`` (the directory with the name)."""
    for directory in names:
        if directory.entries is None or not directory.nlink:
            continue
        children = [names.get(ino) for ino in directory.entries.values()]
        if directory.nlink != 2 + sum(child.is_dir for child in children):
            return False
        if any(child.is_dir and child.parent != directory.ino for child in children):
            return False
    return True


@pytest.mark.parametrize("flags", [0, RENAME_NOREPLACE, RENAME_EXCHANGE])
@pytest.mark.parametrize(("old", "new"), list(itertools.product(KINDS, KINDS)))
def test_the_matrix(names: Namespace, old: str, new: str, flags: int) -> None:
    one, two = mkdir(names, b"one"), mkdir(names, b"two")
    moved, there = make(names, old, b"o", one), make(names, new, b"n", two)
    wanted = expected_errno(old, new, flags)
    if wanted is not None:
        assert refusal(names.rename, one, b"o", two, b"n", flags) == wanted
        assert (names.directory(one)[1].get(b"o"), names.directory(two)[1].get(b"n")) == (moved, there)
    else:
        replaced = names.rename(one, b"o", two, b"n", flags)
        assert names.lookup(two, b"n").ino == moved
        if flags == RENAME_EXCHANGE:
            assert replaced is None
            assert names.lookup(one, b"o").ino == there
        else:
            assert b"o" not in names.directory(one)[1]
            assert (replaced.ino if replaced else None) == there
            assert replaced is None or replaced.nlink == 0
    assert counts_are_right(names)


@pytest.mark.parametrize("flags", [RENAME_NOREPLACE | RENAME_EXCHANGE, RENAME_EXCHANGE | RENAME_WHITEOUT, 8])
def test_flags_that_make_no_sense(names: Namespace, flags: int) -> None:
    touch(names, b"f")
    assert refusal(names.rename, ROOT_INO, b"f", ROOT_INO, b"g", flags) == errno.EINVAL


def test_onto_itself_or_another_link_to_the_same_file_does_nothing(names: Namespace) -> None:
    ino = touch(names, b"f")
    names.link(ino, ROOT_INO, b"g")
    assert names.rename(ROOT_INO, b"f", ROOT_INO, b"f", 0) is None
    assert names.rename(ROOT_INO, b"f", ROOT_INO, b"g", 0) is None
    assert set(names.directory(ROOT_INO)[1]) == {b"f", b"g"}
    assert names.get(ino).nlink == 2


@pytest.mark.parametrize("flags", [0, RENAME_NOREPLACE, RENAME_EXCHANGE])
def test_a_directory_does_not_go_below_itself(names: Namespace, flags: int) -> None:
    outer = mkdir(names, b"outer")
    inner = mkdir(names, b"inner", outer)
    mkdir(names, b"there", inner)
    name = b"there" if flags == RENAME_EXCHANGE else b"new"
    assert refusal(names.rename, ROOT_INO, b"outer", inner, name, flags) == errno.EINVAL
    assert refusal(names.rename, ROOT_INO, b"outer", outer, b"new", 0) == errno.EINVAL
    assert names.path_of(inner) == "/outer/inner"


def test_a_directory_does_not_change_places_with_one_above_it(names: Namespace) -> None:
    outer = mkdir(names, b"outer")
    inner = mkdir(names, b"inner", outer)
    assert refusal(names.rename, outer, b"inner", ROOT_INO, b"outer", RENAME_EXCHANGE) == errno.EINVAL
    assert names.path_of(inner) == "/outer/inner"


def test_nothing_replaces_a_directory_above_it(names: Namespace) -> None:
    outer = mkdir(names, b"outer")
    mkdir(names, b"inner", outer)
    with pytest.raises(FsError):
        names.rename(outer, b"inner", ROOT_INO, b"outer", 0)
    assert counts_are_right(names)


def test_exchange_within_one_directory(names: Namespace) -> None:
    file, directory = touch(names, b"f"), mkdir(names, b"d")
    names.rename(ROOT_INO, b"f", ROOT_INO, b"d", RENAME_EXCHANGE)
    assert names.directory(ROOT_INO)[1] == {b"f": directory, b"d": file}
    assert (names.path_of(file), names.path_of(directory)) == ("/d", "/f")
    assert counts_are_right(names)


def test_times_of_both_directories_and_the_file_change(names: Namespace) -> None:
    one, two = mkdir(names, b"one"), mkdir(names, b"two")
    inodes = [names.get(ino) for ino in (one, two, touch(names, b"f", one))]
    for inode in inodes:
        inode.ctime = inode.mtime = 0
    names.rename(one, b"f", two, b"f", 0)
    assert all(inode.ctime for inode in inodes)
    assert inodes[0].mtime
    assert inodes[1].mtime
    assert not inodes[2].mtime


def test_a_whiteout_stays_under_the_old_name(names: Namespace) -> None:
    """A whiteout is a device 0:0, for overlayfs. A rename without effect leaves no whiteout."""
    ino = touch(names, b"f")
    names.rename(ROOT_INO, b"f", ROOT_INO, b"g", RENAME_WHITEOUT)
    left = names.lookup(ROOT_INO, b"f")
    assert names.lookup(ROOT_INO, b"g").ino == ino
    assert (left.mode, left.rdev, left.nlink) == (stat.S_IFCHR, 0, 1)
    names.link(ino, ROOT_INO, b"h")
    names.rename(ROOT_INO, b"g", ROOT_INO, b"h", RENAME_WHITEOUT)
    assert names.lookup(ROOT_INO, b"g").ino == ino
    with pytest.raises(FsError) as caught:
        names.rename(ROOT_INO, b"f", ROOT_INO, b"g", RENAME_WHITEOUT | RENAME_NOREPLACE)
    assert caught.value.errno == errno.EEXIST
    assert counts_are_right(names)
