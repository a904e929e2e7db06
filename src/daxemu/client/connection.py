"""What both clients share: connecting, the lines of a request, and what a reply means."""

from __future__ import annotations

import json
import os
import socket
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from daxemu.errors import ERRORS, DaxemuError, InvalidArgument, NotMounted, PermissionDenied
from daxemu.host.mountinfo import Mount

if TYPE_CHECKING:
    import msgspec

    from daxemu.events import Event
    from daxemu.protocol import FileRange, Follow, Request

    R = TypeVar("R", bound=msgspec.Struct)

_UCRED = struct.Struct("=iII")
File = str | os.PathLike[str] | tuple[str | os.PathLike[str], int, int]
"""A file on the mount, or (file, offset, length)."""


def connect(mount: Mount) -> socket.socket:
    """A connection to a mount's supervisor. Raises NotMounted when nobody answers there, PermissionDenied
    when we may not ask.
    """
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    directory = -1
    try:
        # By way of the directory: a socket's path has 108 bytes at most, a device's path may be longer.
        directory = os.open(mount.device, os.O_PATH | os.O_CLOEXEC)
        connected.connect(f"/proc/self/fd/{directory}/{mount.socket.name}")
    except PermissionError as error:
        connected.close()
        raise PermissionDenied(
            f"{mount.mountpoint} is another user's: only he and root may ask; sudo daxemu ..."
        ) from error
    except OSError as error:
        connected.close()
        raise NotMounted(
            f"no supervisor answers for {mount.mountpoint} ({error.strerror}): "
            f"daxemu umount --force {mount.mountpoint}"
        ) from error
    finally:
        if directory >= 0:
            os.close(directory)
    if _is_dead(connected):
        connected.close()
        raise NotMounted(f"the supervisor of {mount.mountpoint} is dead: daxemu umount {mount.mountpoint}")
    return connected


def _is_dead(connection: socket.socket) -> bool:
    """Whether the process that listens has ended, but for a thread that waits on its own mount and cannot be
    killed: its sockets stay open, and nobody answers there any more.
    """
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, _, _ = _UCRED.unpack(credentials)
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b") ")[2].split()
    except OSError:
        return True
    return fields[0] in (b"Z", b"X")


def went_away(mount: Mount) -> NotMounted:
    """The connection ended where an answer was to come."""
    return NotMounted(f"the supervisor of {mount.mountpoint} went away: see daxemu status")


def encode(message: dict[str, Any]) -> bytes:
    """A request as its line."""
    return json.dumps(message).encode() + b"\n"


def result_of(line: bytes) -> dict[str, Any]:
    """The result that a reply's line carries. Raises what the supervisor raised."""
    reply = json.loads(line)
    if not reply["ok"]:
        raise ERRORS.get(reply["error"], DaxemuError)(reply["message"])
    result: dict[str, Any] = reply["result"]
    return result


def encode_typed(request: Request[R]) -> bytes:
    """The same of a typed request."""
    import msgspec

    return msgspec.json.encode(request) + b"\n"


def typed_result_of(request: Request[R], line: bytes) -> R:
    """The same, as the type that answers ``request``."""
    import msgspec

    from daxemu.protocol import reply_type

    return msgspec.convert(result_of(line), reply_type(type(request)))


def follow_of(
    after: int,
    kinds: Sequence[type[Event]] | None = None,
    files: Sequence[File] | None = None,
    ranges: Sequence[tuple[int, int]] | None = None,
    pids: Sequence[int] | None = None,
) -> Follow:
    """The subscription to some events. Raises InvalidArgument for a file that is not there."""
    from daxemu.protocol import Follow

    return Follow(
        after=after,
        events=None if kinds is None else [kind.__name__ for kind in kinds],
        files=None if files is None else [_file_range(file) for file in files],
        ranges=None if ranges is None else list(ranges),
        pids=None if pids is None else list(pids),
    )


def _file_range(file: File) -> FileRange:
    from daxemu.protocol import FileRange

    path, offset, length = file if isinstance(file, tuple) else (file, 0, None)
    try:
        return FileRange(os.stat(path).st_ino, offset, length)  # noqa: PTH116 - of a PathLike
    except OSError as error:
        raise InvalidArgument(f"{os.fspath(path)}: {error.strerror}") from error
