"""The namespace: errnos, link counts, paths, and the number of bytes that need room in the store."""

from __future__ import annotations

import errno
import stat
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from daxemu.errors import FsError
from daxemu.fs.inode import ENTRY_COST, ROOT_INO, Credentials
from daxemu.fs.namespace import Namespace
from daxemu.fs.rmap import Rmap
from daxemu.uapi import NAME_MAX, SYMLINK_MAX, XATTR_CREATE, XATTR_REPLACE, XATTR_SIZE_MAX, Ino

ROOT = Credentials(0, 0)
REG = stat.S_IFREG | 0o644


@pytest.fixture
def names() -> Namespace:
    return Namespace.new(Rmap(), 0, 0)


def touch(names: Namespace, name: bytes, parent: Ino = ROOT_INO) -> Ino:
    return names.mknod(parent, name, REG, 0, ROOT).ino


def mkdir(names: Namespace, name: bytes, parent: Ino = ROOT_INO) -> Ino:
    return names.mkdir(parent, name, 0o755, ROOT).ino


def refusal(call: object, *arguments: object) -> int:
    assert callable(call)
    with pytest.raises(FsError) as caught:
        call(*arguments)
    return caught.value.errno


# -- looking


def test_lookup(names: Namespace) -> None:
    ino = touch(names, b"f")
    assert names.lookup(ROOT_INO, b"f").ino == ino
    assert refusal(names.lookup, ROOT_INO, b"g") == errno.ENOENT
    assert refusal(names.lookup, ino, b"g") == errno.ENOTDIR
    assert refusal(names.lookup, ROOT_INO, b"n" * (NAME_MAX + 1)) == errno.ENAMETOOLONG
    assert refusal(names.lookup, 99, b"g") == errno.ESTALE


def test_dot_and_dot_dot(names: Namespace) -> None:
    deep = mkdir(names, b"e", mkdir(names, b"d"))
    assert names.lookup(deep, b".").ino == deep
    assert names.path_of(names.lookup(deep, b"..").ino) == "/d"
    assert names.lookup(ROOT_INO, b"..").ino == ROOT_INO


def test_dot_of_a_file_is_the_file(names: Namespace) -> None:
    """A file handle looks "." up; a file has no ".."."""
    file = touch(names, b"f")
    assert names.lookup(file, b".").ino == file
    assert refusal(names.lookup, file, b"..") == errno.ENOTDIR
    assert refusal(names.lookup, 99, b".") == errno.ESTALE


def test_only_a_regular_file_has_extents(names: Namespace) -> None:
    assert refusal(names.regular, ROOT_INO) == errno.EISDIR
    link = names.symlink(ROOT_INO, b"s", b"t", ROOT).ino
    assert refusal(names.regular, link) == errno.EINVAL
    assert names.regular(touch(names, b"f"))[1].blocks == 0


# -- making


def test_what_is_there_cannot_be_made_again(names: Namespace) -> None:
    ino = touch(names, b"f")
    assert refusal(names.mknod, ROOT_INO, b"f", REG, 0, ROOT) == errno.EEXIST
    assert refusal(names.mkdir, ROOT_INO, b"f", 0o755, ROOT) == errno.EEXIST
    assert refusal(names.symlink, ROOT_INO, b"f", b"t", ROOT) == errno.EEXIST
    assert refusal(names.link, ino, ROOT_INO, b"f") == errno.EEXIST


def test_names_have_255_bytes_at_most(names: Namespace) -> None:
    ino = touch(names, b"n" * NAME_MAX)
    long = b"n" * (NAME_MAX + 1)
    assert refusal(names.mknod, ROOT_INO, long, REG, 0, ROOT) == errno.ENAMETOOLONG
    assert refusal(names.mkdir, ROOT_INO, long, 0o755, ROOT) == errno.ENAMETOOLONG
    assert refusal(names.link, ino, ROOT_INO, long) == errno.ENAMETOOLONG
    assert refusal(names.rename, ROOT_INO, b"n" * NAME_MAX, ROOT_INO, long, 0) == errno.ENAMETOOLONG


def test_a_symlink_has_4095_bytes_at_most(names: Namespace) -> None:
    inode = names.symlink(ROOT_INO, b"s", b"t" * SYMLINK_MAX, ROOT)
    assert (inode.target, inode.size) == (b"t" * SYMLINK_MAX, SYMLINK_MAX)
    assert refusal(names.symlink, ROOT_INO, b"u", b"t" * (SYMLINK_MAX + 1), ROOT) == errno.ENAMETOOLONG
    assert refusal(names.lookup, ROOT_INO, b"u") == errno.ENOENT


def test_nothing_is_made_in_a_removed_directory(names: Namespace) -> None:
    ino, other = mkdir(names, b"d"), touch(names, b"f")
    names.rmdir(ROOT_INO, b"d")
    assert refusal(names.mknod, ino, b"x", REG, 0, ROOT) == errno.ENOENT
    assert refusal(names.mkdir, ino, b"x", 0o755, ROOT) == errno.ENOENT
    assert refusal(names.link, other, ino, b"x") == errno.ENOENT
    assert refusal(names.rename, ROOT_INO, b"f", ino, b"x", 0) == errno.ENOENT


def test_nothing_is_made_in_a_file(names: Namespace) -> None:
    ino = touch(names, b"f")
    assert refusal(names.mknod, ino, b"x", REG, 0, ROOT) == errno.ENOTDIR


def test_modes_owners_and_umask(names: Namespace) -> None:
    who = Credentials(1000, 100, umask=0o027)
    inode = names.mknod(ROOT_INO, b"f", stat.S_IFREG | 0o666, 0, who)
    assert (inode.mode, inode.uid, inode.gid) == (stat.S_IFREG | 0o640, 1000, 100)
    assert names.mkdir(ROOT_INO, b"d", 0o777, who).mode == stat.S_IFDIR | 0o750
    assert names.mknod(ROOT_INO, b"c", stat.S_IFCHR | 0o600, 0x103, ROOT).rdev == 0x103


def test_a_setgid_directory_gives_its_group_and_directories_the_bit(names: Namespace) -> None:
    team = names.mkdir(ROOT_INO, b"d", 0o2775, Credentials(0, 50))
    assert team.mode & stat.S_ISGID
    who = Credentials(1000, 100)
    assert names.mknod(team.ino, b"f", REG, 0, who).gid == 50
    below = names.mkdir(team.ino, b"e", 0o755, who)
    assert below.gid == 50
    assert below.mode & stat.S_ISGID


def test_numbers_are_never_used_twice(names: Namespace) -> None:
    first = touch(names, b"f")
    names.drop(names.unlink(ROOT_INO, b"f"))
    assert touch(names, b"f") > first


# -- links


def test_link_counts_of_files(names: Namespace) -> None:
    ino = touch(names, b"f")
    assert names.link(ino, ROOT_INO, b"g").nlink == 2
    assert names.unlink(ROOT_INO, b"f").nlink == 1
    assert names.unlink(ROOT_INO, b"g").nlink == 0
    assert refusal(names.link, ino, ROOT_INO, b"h") == errno.ENOENT
    assert refusal(names.link, mkdir(names, b"d"), ROOT_INO, b"e") == errno.EPERM


def test_link_counts_of_directories(names: Namespace) -> None:
    root = names.get(ROOT_INO)
    ino = mkdir(names, b"d")
    mkdir(names, b"e", ino)
    assert (root.nlink, names.get(ino).nlink) == (3, 3)
    names.rmdir(ino, b"e")
    assert names.get(ino).nlink == 2
    names.rmdir(ROOT_INO, b"d")
    assert (root.nlink, names.get(ino).nlink) == (2, 0)


def test_unlink_and_rmdir_refuse_each_others_work(names: Namespace) -> None:
    ino = mkdir(names, b"d")
    touch(names, b"f", ino)
    assert refusal(names.unlink, ROOT_INO, b"d") == errno.EISDIR
    assert refusal(names.rmdir, ino, b"f") == errno.ENOTDIR
    assert refusal(names.rmdir, ROOT_INO, b"d") == errno.ENOTEMPTY
    assert refusal(names.unlink, ROOT_INO, b"x") == errno.ENOENT
    assert refusal(names.rmdir, ROOT_INO, b"x") == errno.ENOENT


# -- paths


def test_a_path_follows_renames(names: Namespace) -> None:
    one, two = mkdir(names, b"one"), mkdir(names, b"two")
    ino = touch(names, b"f", one)
    names.rename(one, b"f", two, b"g", 0)
    names.rename(ROOT_INO, b"two", one, b"three", 0)
    assert names.path_of(ino) == "/one/three/g"
    assert names.path_of(ROOT_INO) == "/"


def test_a_path_is_found_anew_when_the_name_that_was_known_is_gone(names: Namespace) -> None:
    one = mkdir(names, b"one")
    ino = touch(names, b"f", one)
    names.link(ino, ROOT_INO, b"g")
    names.unlink(ROOT_INO, b"g")
    assert names.path_of(ino) == "/one/f"
    touch(names, b"g")
    assert names.path_of(ino) == "/one/f"


def test_an_unlinked_file_has_no_path(names: Namespace) -> None:
    ino = touch(names, b"f")
    names.unlink(ROOT_INO, b"f")
    assert names.path_of(ino) == f"<inode {ino}, unlinked>"
    assert "unlinked" in names.path_of(4711)


def test_a_path_can_be_printed_whatever_bytes_are_in_it(names: Namespace) -> None:
    ino = touch(names, b"caf\xe9")
    assert names.path_of(ino).encode().startswith(b"/caf")


# -- attributes


def test_setattr_sets_what_is_given_and_leaves_the_rest(names: Namespace) -> None:
    inode = names.get(touch(names, b"f"))
    inode.ctime = 0
    names.setattr(inode.ino, mode=stat.S_IFDIR | 0o4711, uid=5)
    assert (inode.mode, inode.uid, inode.gid) == (stat.S_IFREG | 0o4711, 5, 0)
    assert inode.ctime > 0
    mtime = inode.mtime
    names.setattr(inode.ino, gid=6, atime=-7)
    assert (inode.uid, inode.gid, inode.atime, inode.mtime) == (5, 6, -7, mtime)
    names.setattr(inode.ino, mtime=8)
    assert inode.mtime == 8


# -- extended attributes


def test_extended_attributes(names: Namespace) -> None:
    ino = touch(names, b"f")
    assert refusal(names.getxattr, ino, b"user.a") == errno.ENODATA
    assert refusal(names.removexattr, ino, b"user.a") == errno.ENODATA
    assert refusal(names.setxattr, ino, b"user.a", b"1", XATTR_REPLACE) == errno.ENODATA
    names.setxattr(ino, b"user.a", b"1", XATTR_CREATE)
    assert refusal(names.setxattr, ino, b"user.a", b"2", XATTR_CREATE) == errno.EEXIST
    names.setxattr(ino, b"user.a", b"3", XATTR_REPLACE)
    assert names.getxattr(ino, b"user.a") == b"3"
    names.setxattr(ino, b"user.a", b"v" * XATTR_SIZE_MAX, 0)
    assert refusal(names.setxattr, ino, b"user.a", b"v" * (XATTR_SIZE_MAX + 1), 0) == errno.E2BIG
    names.removexattr(ino, b"user.a")
    assert refusal(names.getxattr, ino, b"user.a") == errno.ENODATA


# -- accounting

NAME = st.sampled_from([b"a", b"bb", b"ccc"])
VERBS = st.sampled_from(["mknod", "mkdir", "symlink", "link", "unlink", "rename", "exchange", "set", "drop"])


@given(st.lists(st.tuples(VERBS, NAME, NAME, st.integers(0, 3)), max_size=40))
def test_name_bytes_are_what_a_recount_finds(steps: list[tuple[str, bytes, bytes, int]]) -> None:
    names = Namespace.new(Rmap(), 0, 0)
    parents = [ROOT_INO, mkdir(names, b"dd"), mkdir(names, b"e")]
    for verb, a, b, number in steps:
        parent, other = parents[number % 3], parents[number // 2]
        with suppress(FsError):
            one_step(names, verb, (parent, a), (other, b), number)
        for inode in list(names):
            if inode.nlink == 0:
                names.drop(inode)
        assert names.name_bytes == recount(names)


def one_step(names: Namespace, verb: str, at: tuple[Ino, bytes], to: tuple[Ino, bytes], number: int) -> None:
    match verb:
        case "mknod" | "mkdir":
            (touch if verb == "mknod" else mkdir)(names, at[1], at[0])
        case "symlink":
            names.symlink(*at, to[1] * number, ROOT)
        case "link":
            names.link(names.lookup(*at).ino, *to)
        case "unlink":
            (names.rmdir if names.lookup(*at).is_dir else names.unlink)(*at)
        case "rename" | "exchange":
            names.rename(*at, *to, 2 if verb == "exchange" else 0)
        case "set":
            names.setxattr(names.lookup(*at).ino, to[1], b"v" * number, 0)
        case "drop":
            names.removexattr(names.lookup(*at).ino, to[1])


def recount(names: Namespace) -> int:
    total = 0
    for inode in names:
        total += sum(len(name) + ENTRY_COST for name in inode.entries or ())
        total += len(inode.target or b"")
        total += sum(len(name) + len(value) + ENTRY_COST for name, value in inode.xattrs.items())
    return total
