"""Names of extended attributes (xattr_resolve_name() in fs/xattr.c, with the handlers of ext4 and XFS).

The kernel's FUSE has a single handler without a prefix, and forwards any name. The kernel itself makes the
checks of ``xattr_permission()``, which depend on the namespace but not on the handlers.
"""

from __future__ import annotations

import errno

from daxemu.errors import FsError
from daxemu.fs import posix_acl

TRUSTED = b"trusted."
_PREFIXES = (b"user.", TRUSTED, b"security.")
_WHOLE = (posix_acl.ACCESS, posix_acl.DEFAULT)


def check_name(name: bytes) -> None:
    """Raise FsError EOPNOTSUPP for a namespace without a handler, EINVAL for a prefix without a name."""
    if name in _PREFIXES:
        raise FsError(errno.EINVAL)
    if not name.startswith(_PREFIXES) and name not in _WHOLE:
        raise FsError(errno.EOPNOTSUPP)
