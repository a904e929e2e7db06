"""POSIX access control lists, as their extended attributes hold them (fs/posix_acl.c).

The kernel checks permissions against them; what it leaves to the filesystem is here: mode bits follow the
list, the list follows chmod(2), and what is made in a directory inherits the directory's default list.
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
    """Who (``tag``, and ``id`` for USER and GROUP) may do what (``perm``, rwx bits)."""

    tag: int
    perm: int
    id: int


Acl = list[Entry]


def decode(value: bytes) -> Acl:
    """Raises FsError EINVAL for what is no list, or one without the three entries that every list has."""
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
    """The value of the extended attribute."""
    return _HEADER.pack(_VERSION) + b"".join(_ENTRY.pack(*entry) for entry in acl)


def is_only_mode(acl: Acl) -> bool:
    """Whether the mode bits say all that the list says (``posix_acl_equiv_mode``)."""
    return all(entry.tag in (USER_OBJ, GROUP_OBJ, OTHER) for entry in acl)


def mode_of(acl: Acl) -> int:
    """The permission bits that go with a list; the group's are the mask, if there is one."""
    perms = {entry.tag: entry.perm for entry in acl if entry.tag not in (USER, GROUP)}
    return perms[USER_OBJ] << 6 | perms.get(MASK, perms[GROUP_OBJ]) << 3 | perms[OTHER]


def with_mode(acl: Acl, mode: int) -> Acl:
    """The list after chmod(2) (``__posix_acl_chmod_masq``)."""
    group = MASK if any(entry.tag == MASK for entry in acl) else GROUP_OBJ
    wanted = {USER_OBJ: mode >> 6 & 7, group: mode >> 3 & 7, OTHER: mode & 7}
    return [entry._replace(perm=wanted.get(entry.tag, entry.perm)) for entry in acl]


def inherited(default: Acl, mode: int) -> tuple[Acl, int]:
    """List and mode of something made with ``mode`` under the list ``default``
    (``posix_acl_create_masq``).
    """
    group = MASK if any(entry.tag == MASK for entry in default) else GROUP_OBJ
    shift = {USER_OBJ: 6, group: 3, OTHER: 0}
    acl = [
        entry._replace(perm=entry.perm & mode >> shift[entry.tag] & 7) if entry.tag in shift else entry
        for entry in default
    ]
    return acl, mode & ~0o777 | mode_of(acl)
