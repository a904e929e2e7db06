"""Wrappers of pyfuse3's handlers that tell an observer about each operation."""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from daxemu.host.fuse.supplement import unpack
from daxemu.host.observer import Observer, Operation
from daxemu.host.proc.processes import in_page_fault
from daxemu.rule import Op

import pyfuse3  # isort: skip  (after host.supplement, which must be loaded first)

P = ParamSpec("P")
T = TypeVar("T")
_TRUNCATES = frozenset({Op.TRUNCATE})


def observed(
    verb: Callable[P, Coroutine[Any, Any, T]], describe: Callable[..., Operation], observer: Observer
) -> Callable[P, Coroutine[Any, Any, T]]:
    """Wrap a handler: ``observer`` is told before and after each call. ``describe`` makes the operation from
    the arguments of the handler.
    """

    @functools.wraps(verb)
    async def observed(*args: P.args, **kwargs: P.kwargs) -> T:
        operation = describe(*args, **kwargs)
        await observer.before(operation)
        began = time.monotonic()
        try:
            result = await verb(*args, **kwargs)
        except pyfuse3.FUSEError as error:
            await observer.after(operation, time.monotonic() - began, error.errno)
            raise
        await observer.after(operation, time.monotonic() - began, 0)
        return result

    return observed


def _named(op: Op) -> Callable[..., Operation]:
    """Describe a handler of (parent, name, ..., ctx)."""
    return lambda parent, name, *rest: Operation(op, rest[-1].pid, parent=parent, name=name)


def _of_inode(op: Op) -> Callable[..., Operation]:
    """Describe a handler of (inode, ..., ctx)."""
    return lambda ino, *rest: Operation(op, rest[-1].pid, ino)


def _fsync(fh: int, datasync: bool) -> Operation:
    caller = unpack(fh)
    return Operation(Op.FSYNC, caller.tid, caller.ino)


def _read(fh: int, off: int, size: int) -> Operation:
    caller = unpack(fh)
    op = Op.LOAD if caller.tid and in_page_fault(caller.tid) else Op.READ
    return Operation(op, caller.tid, caller.ino, offset=off, length=size)


def _write(fh: int, off: int, buf: bytes) -> Operation:
    caller = unpack(fh)
    op = Op.WRITE_BACK if caller.from_cache else Op.WRITE
    return Operation(op, caller.tid, caller.ino, offset=off, length=len(buf))


def _open(ino: int, flags: int, ctx: pyfuse3.RequestContext) -> Operation:
    return Operation(Op.OPEN, ctx.pid, ino, also=_TRUNCATES if flags & os.O_TRUNC else frozenset())


def _setattr(
    ino: int,
    attr: pyfuse3.EntryAttributes,
    fields: pyfuse3.SetattrFields,
    fh: int | None,
    ctx: pyfuse3.RequestContext,
) -> Operation:
    return Operation(Op.TRUNCATE if fields.update_size else Op.SETATTR, ctx.pid, ino)


def _rename(
    parent: int, name: bytes, new_parent: int, new_name: bytes, flags: int, ctx: pyfuse3.RequestContext
) -> Operation:
    return Operation(Op.RENAME, ctx.pid, parent=new_parent, name=new_name, old=(parent, name))


def _link(ino: int, parent: int, name: bytes, ctx: pyfuse3.RequestContext) -> Operation:
    return Operation(Op.LINK, ctx.pid, ino, parent, name)


DESCRIBED: dict[str, Callable[..., Operation]] = {
    "lookup": _named(Op.LOOKUP),
    "getattr": _of_inode(Op.GETATTR),
    "setattr": _setattr,
    "readlink": _of_inode(Op.READLINK),
    "mknod": _named(Op.MKNOD),
    "mkdir": _named(Op.MKDIR),
    "symlink": _named(Op.SYMLINK),
    "unlink": _named(Op.UNLINK),
    "rmdir": _named(Op.RMDIR),
    "rename": _rename,
    "link": _link,
    "opendir": _of_inode(Op.OPENDIR),
    "open": _open,
    "create": _named(Op.CREATE),
    "read": _read,
    "write": _write,
    "fsync": _fsync,
    "setxattr": _of_inode(Op.SETXATTR),
    "getxattr": _of_inode(Op.GETXATTR),
    "listxattr": _of_inode(Op.LISTXATTR),
    "removexattr": _of_inode(Op.REMOVEXATTR),
}
"""Handler -> description of its operation. Handlers that are missing here are not observed: statfs, forget,
release, and those whose handle is that of a directory.
"""
