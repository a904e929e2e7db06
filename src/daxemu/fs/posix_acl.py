"""POSIX access control lists, in the format of the extended attributes (fs/posix_acl.c).

The kernel checks permissions against the lists. The filesystem does the rest: mode bits follow the list, the
list follows chmod(2), and a new inode inherits the directory's default list.
"""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple

from daxemu.errors import FsError

ACCESS = b"system.posix_acl_access"
DEFAULT = b"system.posix_acl_default"

USER_OBJ, USER, GROUP_OBJ, GROUP, MASK, OTHER = 0x01, 0x02, 0x04, 0x08, 0x10, 0x20
_VERSION = 2
_HEADER = struct.Struct("<I")
_ENTRY = struct.Struct("<HHI")


class Entry(NamedTuple):
    """Permissions (``perm``, rwx bits) of a class of users (``tag``; ``id`` for USER and GROUP)."""

    tag: int
    perm: int
    id: int


Acl = list[Entry]


def decode(value: bytes) -> Acl:
    """Return the list in the value of an attribute. Raises FsError EINVAL for a malformed list.

    Every list has exactly one entry each for the owner, the group and others.
    """
    if len(value) < _HEADER.size or (len(value) - _HEADER.size) % _ENTRY.size:
        raise FsError(errno.EINVAL)
    if _HEADER.unpack_from(value) != (_VERSION,):
        raise FsError(errno.EOPNOTSUPP)
    acl = [Entry(*fields) for fields in _ENTRY.iter_unpack(value[_HEADER.size :])]
    tags = [entry.tag for entry in acl]
    if any(tags.count(tag) != 1 for tag in (USER_OBJ, GROUP_OBJ, OTHER)) or tags.count(MASK) > 1:
        raise FsError(errno.EINVAL)
    if MASK not in tags and (USER in tags or GROUP in tags):
        raise FsError(errno.EINVAL)
    return acl


def encode(acl: Acl) -> bytes:
    """Return the value of the extended attribute."""
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in acl)


def is_only_mode(acl: Acl) -> bool:
    """Return True if the list is equivalent to mode bits (``posix_acl_equiv_mode``)."""
    return all(entry.tag in (USER_OBJ, GROUP_OBJ, OTHER) for entry in acl)


def mode_of(acl: Acl) -> int:
    """Return the permission bits for a list. The group bits are the mask, if the list has a mask."""
    perms = {entry.tag: entry.perm for entry in acl if entry.tag not in (USER, GROUP)}
    return perms[USER_OBJ] << 6 | perms.get(MASK, perms[GROUP_OBJ]) << 3 | perms[OTHER]


def with_mode(acl: Acl, mode: int) -> Acl:
    """Return the list after chmod(2) (``__posix_acl_chmod_masq``)."""
    group = MASK if any(entry.tag == MASK for entry in acl) else GROUP_OBJ
    wanted = {USER_OBJ: mode >> 6 & 7, group: mode >> 3 & 7, OTHER: mode & 7}
    return [entry._replace(perm=wanted.get(entry.tag, entry.perm)) for entry in acl]


def inherited(default: Acl, mode: int) -> tuple[Acl, int]:
    """Return list and mode of a new inode under the list ``default`` (``posix_acl_create_masq``)."""
    group = MASK if any(entry.tag == MASK for entry in default) else GROUP_OBJ
    shift = {USER_OBJ: 6, group: 3, OTHER: 0}
    acl = [
        entry._replace(perm=entry.perm & mode >> shift[entry.tag] & 7) if entry.tag in shift else entry
        for entry in default
    ]
    return acl, mode & ~0o777 | mode_of(acl)
