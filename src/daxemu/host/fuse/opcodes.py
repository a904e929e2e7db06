"""Table of FUSE requests: opcode -> answering part (uapi/linux/fuse.h, enum fuse_opcode).

``make protocol`` makes docs/fuse-requests.md of this table; tests/host/test_opcodes.py compares the table
with the registered handlers.
"""

from __future__ import annotations

import errno
from enum import Enum
from typing import NamedTuple


class ServedBy(Enum):
    """Answering part of a request."""

    PYFUSE3 = "pyfuse3 calls host/fuse/operations"
    SUPPLEMENT = "supplement.c calls host/fuse/extra_operations"
    LIBFUSE = "libfuse"
    NO_PART = "no part"


class FuseRequest(NamedTuple):
    """One opcode. ``handler``: answering method. ``in_c``: first treatment of the request, by answers.c.

    ``error``: errno of the answer where no part serves the request, from libfuse or from pyfuse3's default
    handler.
    """

    number: int
    name: str
    served_by: ServedBy
    handler: str = ""
    in_c: str = ""
    error: int = 0
    note: str = ""


_ANSWERED = "answered where a layout covers the request"
_NOTED = "answered; Python is told afterwards"


def _python(number: int, name: str, handler: str = "", in_c: str = "", note: str = "") -> FuseRequest:
    return FuseRequest(number, name, ServedBy.PYFUSE3, handler or name.lower(), in_c, note=note)


def _supplement(number: int, name: str) -> FuseRequest:
    return FuseRequest(number, name, ServedBy.SUPPLEMENT, name.lower())


def _libfuse(number: int, name: str, note: str) -> FuseRequest:
    return FuseRequest(number, name, ServedBy.LIBFUSE, note=note)


def _refused(number: int, name: str, note: str) -> FuseRequest:
    return FuseRequest(number, name, ServedBy.NO_PART, error=errno.ENOSYS, note=note)


REQUESTS = (
    _python(1, "LOOKUP"),
    _python(2, "FORGET", in_c=_NOTED),
    _python(3, "GETATTR", in_c=_ANSWERED),
    _python(4, "SETATTR"),
    _python(5, "READLINK"),
    _python(6, "SYMLINK"),
    _python(8, "MKNOD"),
    _python(9, "MKDIR"),
    _python(10, "UNLINK"),
    _python(11, "RMDIR"),
    _python(12, "RENAME"),
    _python(13, "LINK"),
    _python(14, "OPEN"),
    _python(15, "READ", in_c=_ANSWERED),
    _python(16, "WRITE", in_c=_ANSWERED),
    _python(17, "STATFS"),
    _python(18, "RELEASE", in_c=_NOTED),
    _python(20, "FSYNC"),
    _python(21, "SETXATTR"),
    _python(22, "GETXATTR", in_c="answered for security.capability of a file that has none"),
    _python(23, "LISTXATTR"),
    _python(24, "REMOVEXATTR"),
    _refused(25, "FLUSH", "the kernel sends no second one"),
    _libfuse(26, "INIT", "supplement.c and killpriv.c change flags of the answer"),
    _python(27, "OPENDIR"),
    _refused(28, "READDIR", "not sent: the kernel sends READDIRPLUS"),
    _python(29, "RELEASEDIR"),
    _python(30, "FSYNCDIR"),
    _refused(31, "GETLK", "not sent: the kernel keeps the locks"),
    _refused(32, "SETLK", "not sent: the kernel keeps the locks"),
    _refused(33, "SETLKW", "not sent: the kernel keeps the locks"),
    _refused(34, "ACCESS", "not sent: default_permissions"),
    _python(35, "CREATE"),
    _libfuse(36, "INTERRUPT", "the request goes on"),
    _refused(37, "BMAP", "not sent: no block device"),
    _libfuse(38, "DESTROY", ""),
    _supplement(39, "IOCTL"),
    _refused(40, "POLL", "the kernel sends no second one"),
    _libfuse(41, "NOTIFY_REPLY", "not sent: daxemu asks for no pages"),
    _python(42, "BATCH_FORGET", "forget", in_c=_NOTED),
    _supplement(43, "FALLOCATE"),
    _python(44, "READDIRPLUS", "readdir"),
    _python(45, "RENAME2", "rename"),
    _supplement(46, "LSEEK"),
    _supplement(47, "COPY_FILE_RANGE"),
    _refused(48, "SETUPMAPPING", "not sent: virtiofs only"),
    _refused(49, "REMOVEMAPPING", "not sent: virtiofs only"),
    _refused(50, "SYNCFS", "not sent: virtiofs and fuseblk only"),
    _python(51, "TMPFILE", "create", note="killpriv.c makes the request CREATE"),
    _refused(52, "STATX", "the kernel asks GETATTR instead"),
)
"""Every opcode of the kernel's protocol 7.39, in order."""


def table() -> str:
    """Return the page docs/fuse-requests.md, in Markdown."""
    lines = [
        "# FUSE requests",
        "",
        "<!-- Made by `make protocol` of host/fuse/opcodes.py. -->",
        "",
        "Which part answers each request of the kernel. From libfuse 3.14 on, answers.c sees each first.",
        "",
        "| opcode | request | C first | served by | handler | notes |",
        "|---|---|---|---|---|---|",
    ]
    for each in REQUESTS:
        by = each.served_by.value if not each.error else f"no part: {errno.errorcode[each.error]}"
        handler = f"`{each.handler}`" if each.handler else ""
        lines.append(f"| {each.number} | {each.name} | {each.in_c} | {by} | {handler} | {each.note} |")
    return "\n".join(lines) + "\n"
