"""Shared by both clients: connecting, requests as lines, the decoding of replies.

The peer is not trusted: any user may mount a filesystem with the name of daxemu. Each reply or missing reply
of such a peer ends in an exception of daxemu.errors.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Any, TypeVar

from daxemu.errors import (
    ERRORS,
    Busy,
    DaxemuError,
    InvalidArgument,
    NotASupervisor,
    NotMounted,
    PermissionDenied,
)
from daxemu.host.proc import stat
from daxemu.host.proc.mountinfo import Mount

if TYPE_CHECKING:
    import msgspec

    from daxemu.events import Event
    from daxemu.protocol import FileRange, Follow, Request

    R = TypeVar("R", bound=msgspec.Struct)

MAX_REPLY = 256 << 20
"""Maximum bytes of one answer or event: the ranges of the longest injection take 60 MB."""
CONNECT_PATIENCE = 5.0
"""Limit in seconds of connecting, if the caller sets no limit."""
SETTLE_PATIENCE = 10.0
"""Limit in seconds of ``settle``, if the caller sets no limit."""
_UCRED = struct.Struct("=iII")
_TIMEVAL = struct.Struct("@ll")
File = str | os.PathLike[str] | tuple[str | os.PathLike[str], int, int]
"""A file on the mount, or (file, offset, length)."""


def connecting(mount: Mount, patience: float) -> Future[socket.socket]:
    """Connect to the supervisor of a mount in a thread, within ``patience`` seconds. See _connect for the
    exceptions.

    A thread is needed because a system call that walks the DEVICE of another user has no time limit: a
    directory of the path may be on a FUSE filesystem that never answers. The thread is a daemon, and ends
    with the process.
    """
    made: Future[socket.socket] = Future()

    def work() -> None:
        try:
            connected = _connect(mount, patience)
        except Exception as error:  # noqa: BLE001 - raised again in the caller that waits for the result
            made.set_exception(error)
        else:
            made.set_result(connected)

    threading.Thread(target=work, name="daxemu connect", daemon=True).start()
    return made


def abandon(made: Future[socket.socket]) -> None:
    """Close a connection that is no longer wanted, as soon as the thread has made the connection."""

    def close(future: Future[socket.socket]) -> None:
        if future.exception() is None:
            future.result().close()

    made.add_done_callback(close)


def connect(mount: Mount, patience: float) -> socket.socket:
    """Connect and wait for the result. Raises as ``_connect``, and Busy after ``patience`` seconds."""
    made = connecting(mount, patience)
    try:
        return made.result(patience)
    except TimeoutError as error:
        abandon(made)
        raise no_answer(mount) from error


def _connect(mount: Mount, patience: float) -> socket.socket:
    """Connect. Raises NotMounted if no process listens, PermissionDenied if the caller has no access, Busy if
    the supervisor accepts no connection in time, NotASupervisor if the owner of the mount does not own the
    socket.
    """
    connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # connect(2) waits while the backlog is full, for as long as SO_SNDTIMEO says.
        limit = max(patience, 0.001)
        limits = _TIMEVAL.pack(int(limit), int(limit % 1 * 1e6))
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, limits)
        _connect_through_directory(connected, mount)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _TIMEVAL.pack(0, 0))
        _check_peer(connected, mount)
    except BaseException:
        connected.close()
        raise
    return connected


def _connect_through_directory(connected: socket.socket, mount: Mount) -> None:
    directory = -1
    try:
        # Relative to the directory: the path of a socket has at most 108 bytes, the path of a device may be
        # longer.
        directory = os.open(mount.device, os.O_PATH | os.O_CLOEXEC)
        connected.connect(f"/proc/self/fd/{directory}/{mount.socket.name}")
    except BlockingIOError as error:
        raise no_answer(mount) from error
    except PermissionError as error:
        raise PermissionDenied(
            f"{mount.mountpoint} belongs to another user: only its owner and root may ask; sudo daxemu ..."
        ) from error
    except OSError as error:
        raise NotMounted(
            f"no supervisor answers for {mount.mountpoint} ({error.strerror}): "
            f"daxemu umount --force {mount.mountpoint}"
        ) from error
    finally:
        if directory >= 0:
            os.close(directory)


def peer_of(connected: socket.socket) -> tuple[int, int]:
    """Return (pid, uid) of the listening process, as of the time of its listen(2). Pid 0: the process is in
    another pid namespace.
    """
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    pid, uid, _ = _UCRED.unpack(credentials)
    return pid, uid


def _check_peer(connected: socket.socket, mount: Mount) -> None:
    """Compare the owners of the mount and of the socket, as the kernel states both, before a byte is sent.
    Any user may mount with a source of their choice. Raises NotASupervisor, NotMounted.
    """
    pid, uid = peer_of(connected)
    if mount.owner is not None and uid != mount.owner:
        raise NotASupervisor(
            f"{mount.socket} is served by uid {uid}, but uid {mount.owner} mounted {mount.mountpoint}: "
            f"not a daxemu supervisor; fusermount3 -u {mount.mountpoint} ends that mount"
        )
    if _is_dead(pid):
        raise NotMounted(f"the supervisor of {mount.mountpoint} is dead: daxemu umount {mount.mountpoint}")


def _is_dead(pid: int) -> bool:
    """Return True if the listening process has ended, except for a thread that waits on its own mount and
    cannot be killed. The sockets of such a process stay open, and no task answers. A process of another pid
    namespace counts as alive.
    """
    return pid > 0 and state_of(pid) in ("", "Z", "X")


def state_of(pid: int) -> str:
    """Return the letter of the state of a process in /proc/PID/stat; empty if the process is gone."""
    try:
        return stat.read(pid).state
    except OSError:
        return ""


def no_answer(mount: Mount, pid: int = 0) -> Busy:
    """Make the exception for an answer that did not come in time."""
    where, stopped = mount.mountpoint, ""
    if pid and state_of(pid) in ("T", "t"):
        stopped = f", it is stopped: kill -CONT {pid}, or"
    return Busy(f"the supervisor of {where} does not answer{stopped or ':'} daxemu umount --force {where}")


def nonsense(mount: Mount, what: str) -> NotASupervisor:
    """Make the exception for a reply that no supervisor sends."""
    return NotASupervisor(
        f"the process that answers for {mount.mountpoint} is not a daxemu supervisor: it sent {what}; "
        f"fusermount3 -u {mount.mountpoint} ends that mount"
    )


def went_away(mount: Mount) -> NotMounted:
    """Make the exception for a connection that ended before the answer."""
    return NotMounted(f"the supervisor of {mount.mountpoint} went away: see daxemu status")


def encode(message: dict[str, Any]) -> bytes:
    """Encode a request as a line."""
    return json.dumps(message).encode() + b"\n"


def result_of(mount: Mount, line: bytes) -> dict[str, Any]:
    """Decode the result of a reply. Raises the exception of the supervisor, and NotASupervisor for a line
    that is not a reply.
    """
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise nonsense(mount, "a line that is no JSON") from error
    match reply:
        case {"ok": True, "result": dict(result)}:
            return result
        case {"ok": False, "error": str(kind), "message": str(message)}:
            raise ERRORS.get(kind, DaxemuError)(message)
    raise nonsense(mount, "JSON that is no reply")


def seconds_of(mount: Mount, result: dict[str, Any]) -> float:
    """Return the seconds of a reply to ``settle``. Raises NotASupervisor for a missing number."""
    match result:
        case {"seconds": float() | int() as seconds}:
            return float(seconds)
    raise nonsense(mount, "a reply of another type")


def encode_typed(request: Request[R]) -> bytes:
    """Encode a typed request as a line."""
    import msgspec

    return msgspec.json.encode(request) + b"\n"


def typed_result_of(mount: Mount, request: Request[R], line: bytes) -> R:
    """Decode the result of a reply as the reply type of ``request``. Raises as ``result_of``."""
    import msgspec

    from daxemu.protocol import reply_type

    try:
        return msgspec.convert(result_of(mount, line), reply_type(type(request)))
    except msgspec.ValidationError as error:
        raise nonsense(mount, "a reply of another type") from error


def event_of(mount: Mount, line: bytes) -> Event:
    """Decode an event. Raises NotASupervisor for any other line."""
    import msgspec

    from daxemu.events import decode

    try:
        return decode(line)
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
        raise nonsense(mount, "a line that is no event") from error


def event_dict_of(mount: Mount, line: bytes) -> dict[str, Any]:
    """Decode an event as plain JSON. Raises NotASupervisor for any other line."""
    try:
        event = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise nonsense(mount, "a line that is no JSON") from error
    if not isinstance(event, dict):
        raise nonsense(mount, "a line that is no event")
    return event


def follow_of(
    after: int,
    kinds: Sequence[type[Event]] | None = None,
    files: Sequence[File] | None = None,
    ranges: Sequence[tuple[int, int]] | None = None,
    pids: Sequence[int] | None = None,
) -> Follow:
    """Make the request for a subscription. Raises InvalidArgument for a missing file."""
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
