"""Names of extended attributes (xattr_resolve_name() in fs/xattr.c, with the handlers of ext4 and XFS).

The kernel's FUSE has a single handler, without a prefix, and passes any name on. Checks by namespace that
do not depend on the handlers (``xattr_permission()``) the kernel makes itself.
"""

from __future__ import annotations

import errno

from daxemu.errors import FsError
from daxemu.fs import posix_acl

TRUSTED = b"trusted."
_PREFIXES = (b"user.", TRUSTED, b"security.")
_WHOLE = (posix_acl.ACCESS, posix_acl.DEFAULT)


def check_name(name: bytes) -> None:
    """Raises FsError EOPNOTSUPP for a namespace that nobody handles, EINVAL for a namespace and no more."""
    if name in _PREFIXES:
        raise FsError(errno.EINVAL)
    if not name.startswith(_PREFIXES) and name not in _WHOLE:
        raise FsError(errno.EOPNOTSUPP)
