"""Decoder of rows of the tables; checks the domain of each value. A ValueError names the row and the
column.
"""

from __future__ import annotations

import stat
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from daxemu.errors import FsError
from daxemu.fs import posix_acl
from daxemu.fs.inode import LINK_MAX, MAX_FILE_SIZE, RESERVED_INO, TIME_MAX, Inode
from daxemu.uapi import NAME_MAX, SYMLINK_MAX, XATTR_SIZE_MAX

_Id = Annotated[int, Meta(ge=0, le=(1 << 32) - 2)]
_Time = Annotated[int, Meta(ge=-TIME_MAX, le=TIME_MAX)]
_KINDS: tuple[Any, ...] = (
    Annotated[int, Meta(ge=1, le=RESERVED_INO)],
    Annotated[int, Meta(ge=0, le=0o177777)],
    _Id,
    _Id,
    Annotated[int, Meta(ge=0, le=LINK_MAX)],
    Annotated[int, Meta(ge=0, le=(1 << 32) - 1)],
    Annotated[int, Meta(ge=0, le=MAX_FILE_SIZE)],
    _Time,
    _Time,
    _Time,
    Annotated[bytes, Meta(min_length=1, max_length=SYMLINK_MAX)] | None,
    bytes | None,
)
INO_LIMIT = RESERVED_INO >> 1
"""Limit of inode numbers in a row. The numbers above suffice for all new inodes in the life of a device."""
_COLUMNS: tuple[str, ...] = ("ino", "mode", "uid", "gid", "nlink", "rdev", "size", "atime", "mtime", "ctime")
_COLUMNS += ("target", "xattrs")
_Row = msgspec.defstruct(
    "_Row", list(zip(_COLUMNS, _KINDS, strict=True)), array_like=True, forbid_unknown_fields=True
)
"""A struct, because the conversion to a tuple type takes thirty times as long."""
_TYPES = frozenset(
    (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK, stat.S_IFIFO, stat.S_IFSOCK, stat.S_IFCHR, stat.S_IFBLK)
)
_decode_xattrs = msgspec.msgpack.Decoder(dict[bytes, bytes]).decode


def inode_of(row: tuple[Any, ...]) -> Inode:
    """Decode a row of the table ``inode``. Raises ValueError for a value outside the domain."""
    try:
        values = msgspec.structs.astuple(msgspec.convert(row, _Row))
    except msgspec.ValidationError as error:
        raise ValueError(f"inode {row[0]!r}: {_wrong_column(row)}") from error
    inode = Inode(*values[:-1])
    kind = stat.S_IFMT(inode.mode)
    if kind not in _TYPES:
        raise ValueError(f"inode {inode.ino}: mode {inode.mode:#o} is of no file type")
    if (inode.target is not None) != (kind == stat.S_IFLNK):
        raise ValueError(f"inode {inode.ino}: a symlink without a target, or a target without a symlink")
    if inode.target is not None and (inode.size != len(inode.target) or b"\0" in inode.target):
        raise ValueError(f"inode {inode.ino}: a symlink's size {inode.size} or its target is wrong")
    if inode.nlink == 0 and kind != stat.S_IFREG:
        raise ValueError(f"inode {inode.ino}: link count 0, and not a regular file")
    if inode.ino == RESERVED_INO and kind != stat.S_IFREG:
        raise ValueError(f"inode {inode.ino}: mode {inode.mode:#o}, expected a regular file")
    if INO_LIMIT <= inode.ino < RESERVED_INO:
        raise ValueError(f"inode {inode.ino}: its number is not below {INO_LIMIT}")
    if values[-1] is not None:
        inode.xattrs = _xattrs(inode.ino, values[-1])
    return inode


def _wrong_column(row: tuple[Any, ...]) -> str:
    """Describe the first value of a row outside the domain."""
    if len(row) != len(_COLUMNS):
        return f"{len(row)} columns, expected {len(_COLUMNS)}"
    for name, value, kind in zip(_COLUMNS, row, _KINDS, strict=True):
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError:
            shown = value if isinstance(value, int) else f"of type {type(value).__name__}"
            return f"{name} {shown} is outside its range"
    return "a value is outside its range"


def _xattrs(ino: int, data: bytes) -> dict[bytes, bytes]:
    try:
        found = _decode_xattrs(data)
    except msgspec.MsgspecError as error:
        raise ValueError(f"inode {ino}: its extended attributes cannot be decoded") from error
    for name, value in found.items():
        if not 1 <= len(name) <= NAME_MAX or b"\0" in name or len(value) > XATTR_SIZE_MAX:
            raise ValueError(f"inode {ino}: an extended attribute has a bad name or size")
        if name in (posix_acl.ACCESS, posix_acl.DEFAULT):
            try:
                posix_acl.decode(value)
            except FsError as error:
                raise ValueError(f"inode {ino}: its access list cannot be decoded") from error
    return found


def check_entry(parent: int, name: bytes) -> None:
    """Check the name of an entry. Raises ValueError for an invalid name."""
    if type(name) is not bytes or not 1 <= len(name) <= NAME_MAX or name in (b".", b".."):
        raise ValueError(f"directory {parent}: an entry's name is empty, too long, . or ..")
    if b"/" in name or b"\0" in name:
        raise ValueError(f"directory {parent}: an entry's name holds / or NUL")
