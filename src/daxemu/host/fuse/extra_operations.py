"""FUSE operations without handlers in pyfuse3, over the filesystem's verbs: fallocate, lseek,
copy_file_range, ioctl.

host/fuse/supplement.c passes the requests on through one callback, inside pyfuse3's own call into libfuse, so
in the event loop's thread. A quick request is answered at once. A task answers a request that waits (a clone
writes pages back first).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, NamedTuple, Protocol

import trio

from daxemu.errors import FsError
from daxemu.fs.filesystem import Filesystem
from daxemu.host.fuse import fileattr
from daxemu.host.fuse.gates import Gates
from daxemu.host.fuse.handlers import in_pieces
from daxemu.host.fuse.io_lock import Claim
from daxemu.host.fuse.open_files import OpenFiles
from daxemu.host.fuse.structs import RawRequest
from daxemu.host.fuse.supplement import library, unpack
from daxemu.host.mappings import Mappings
from daxemu.host.observer import Observer, Operation
from daxemu.host.proc.processes import capable
from daxemu.host.proc.procfs import read_lines
from daxemu.host.unexpected import Nursery, Unexpected, refused
from daxemu.rule import Op
from daxemu.uapi import CAP_SYS_ADMIN, PAGE_SIZE, Ino
from daxemu.units import PFN_PHYS, byte_span, pages_at


class CloneOps(Protocol):
    """Sharing of blocks: source inode, offset, target inode, offset, length; returns the bytes shared."""

    async def clone(self, src: Ino, src_offset: int, dst: Ino, dst_offset: int, length: int) -> int:
        """``FICLONERANGE``."""
        ...

    async def copy(self, src: Ino, src_offset: int, dst: Ino, dst_offset: int, length: int) -> int:
        """``copy_file_range(2)``."""
        ...

    def is_quick(self, src: Ino, src_offset: int, dst: Ino, dst_offset: int, length: int) -> bool:
        """Return whether Filesystem.copy_file_range() alone suffices, without a wait."""
        ...


_HANDLER = ctypes.CFUNCTYPE(None, ctypes.POINTER(RawRequest))
_FALLOCATE, _LSEEK, _COPY_FILE_RANGE, _IOCTL = 1, 2, 3, 4
_NAMES = {_FALLOCATE: "fallocate", _LSEEK: "lseek", _COPY_FILE_RANGE: "copy_file_range", _IOCTL: "ioctl"}

# daxemu's ioctls: type 0xDA. The kernel forwards neither FICLONERANGE nor FIEMAP to FUSE, so daxemu has
# numbers of its own for both.
CLONE_RANGE = struct.Struct(
    "=qQQQ"
)  # as struct file_clone_range: src_fd, src_offset, src_length, dest_offset
MAP_HEADER = struct.Struct("=QQII")  # start, length in; how many extents out; 0
MAP_EXTENT = struct.Struct("=QQQII")  # file offset, device offset, length; links that share it; 1 if poisoned
MAP_ROOM = 64
DAXEMU_IOC_CLONE_RANGE = 1 << 30 | CLONE_RANGE.size << 16 | 0xDA << 8 | 13
DAXEMU_IOC_MAP = 3 << 30 | (MAP_HEADER.size + MAP_ROOM * MAP_EXTENT.size) << 16 | 0xDA << 8 | 11

# fs/xfs/libxfs/xfs_fs.h; EXT4_IOC_SHUTDOWN is the same.
XFS_IOC_GOINGDOWN = 2 << 30 | 4 << 16 | ord("X") << 8 | 125
_GOING_DEFAULT, _GOING_LOGFLUSH, _GOING_NOLOGFLUSH = 0, 1, 2


class Answered(NamedTuple):
    """``send``: send the reply to a request of libfuse. ``errno``: 0 for success."""

    send: Callable[[int], object]
    errno: int = 0


Later = Coroutine[Any, Any, Answered]
"""Service of a request that waits."""


class ExtraOperations:
    """Answers the requests from supplement.c, from construction until close(). A process has one session, so
    at most one open object of this class.
    """

    def __init__(
        self,
        fs: Filesystem,
        dev: tuple[int, int],
        clones: CloneOps,
        mappings: Mappings,
        file_modified: Callable[[Ino, int], None],
        open_files: OpenFiles,
        gates: Gates,
        nursery: Nursery,
        unexpected: Unexpected,
    ) -> None:
        """``dev`` is the mount's (major, minor); ``file_modified`` see Operations."""
        self._fs = fs
        self._dev = dev
        self._clones = clones
        self._mappings = mappings
        self._file_modified = file_modified
        self._open_files = open_files
        self._gates = gates
        self._nursery = nursery
        self._unexpected = unexpected
        self._observer: Observer | None = None
        self._fuse = ctypes.CDLL("libfuse3.so.3")
        self._fuse.fuse_reply_err.argtypes = (ctypes.c_void_p, ctypes.c_int)
        self._fuse.fuse_reply_lseek.argtypes = (ctypes.c_void_p, ctypes.c_int64)
        self._fuse.fuse_reply_write.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
        self._fuse.fuse_reply_ioctl.argtypes = (
            ctypes.c_void_p,
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_size_t,
        )
        self._callback = _HANDLER(self._handle)  # kept: C holds no reference to it
        self._slot = ctypes.c_void_p.in_dll(library(), "daxemu_handler")
        self._slot.value = ctypes.cast(self._callback, ctypes.c_void_p).value

    def close(self) -> None:
        """Answer ENOSYS to all later requests."""
        self._slot.value = None

    def observe(self, observer: Observer | None) -> None:
        """Tell ``observer`` about each operation from now on; None: nobody."""
        self._observer = observer

    def _handle(self, pointer: ctypes._Pointer[RawRequest]) -> None:
        request = pointer.contents
        try:
            if self._observer is not None:
                self._nursery.start_soon(self._observed, self._observer, _Kept(request))
                return
            answer = self._dispatch(request)
        except Exception as error:  # noqa: BLE001 - the caller is C, and the request must be answered
            answer = self._failed(_NAMES.get(request.op, str(request.op)), error)
        if isinstance(answer, Answered):
            answer.send(request.req)
        else:
            self._nursery.start_soon(self._answer, request.req, answer)

    async def _answer(self, req: int, later: Later) -> None:
        """Answer ``req`` by ``later``."""
        (await self._reply_of(later)).send(req)

    async def _reply_of(self, later: Later) -> Answered:
        """Return the reply of ``later``; an exception becomes an errno, an unexpected one EIO."""
        try:
            return await later
        except Exception as error:  # noqa: BLE001 - the request must be answered
            return self._failed(getattr(later, "__qualname__", "request"), error)

    def _failed(self, what: str, error: Exception) -> Answered:
        refusal = refused(error)
        if refusal is None:
            self._unexpected.report(f"FUSE {what}", error)
        return self._error(errno.EIO if refusal is None else refusal.errno)

    async def _observed(self, observer: Observer, kept: _Kept) -> None:
        """Serve a request, and tell ``observer`` before and after."""
        request = kept.request
        operation = _described(request)
        await observer.before(operation)
        began = time.monotonic()
        try:
            answer = self._dispatch(request)
            reply = answer if isinstance(answer, Answered) else await self._reply_of(answer)
        except Exception as error:  # noqa: BLE001 - the request must be answered
            reply = self._failed(operation.op, error)
        await observer.after(operation, time.monotonic() - began, reply.errno)
        reply.send(request.req)

    # -- replies

    def _error(self, error: int) -> Answered:
        """Return a reply of an errno; 0 is success."""
        return Answered(lambda req: self._fuse.fuse_reply_err(req, error), error)

    def _written(self, length: int) -> Answered:
        return Answered(lambda req: self._fuse.fuse_reply_write(req, length))

    def _found(self, offset: int) -> Answered:
        return Answered(lambda req: self._fuse.fuse_reply_lseek(req, offset))

    def _output(self, output: bytes = b"") -> Answered:
        """Return a reply of an ioctl that succeeded."""
        return Answered(lambda req: self._fuse.fuse_reply_ioctl(req, 0, output or None, len(output)))

    # -- requests

    def _dispatch(self, request: RawRequest) -> Answered | Later:
        """Serve a request at once, or return a coroutine for a request that waits. Raises DaxemuError."""
        ino = unpack(request.fh).ino
        if request.op == _FALLOCATE:
            self._file_modified(ino, request.tid)
            steps = self._fs.fallocate_in_pieces(ino, request.mode, request.offset, request.length)
            claim = self._gates.io_lock.claim(ino)
            try:
                is_done = claim.is_first and next(steps, self) is self
            except BaseException:
                claim.end()
                raise
            if is_done and self._mappings.is_settled(ino):
                claim.end()
                return self._error(0)
            return self._fallocate_later(claim, steps)
        if request.op == _LSEEK:
            return self._lseek(request, ino)
        if request.op == _COPY_FILE_RANGE:
            target = unpack(request.target_fh).ino
            self._file_modified(target, request.tid)
            copied = ino, request.offset, target, request.target_offset, request.length
            if self._clones.is_quick(*copied):
                done = self._fs.copy_file_range(*copied)
                settled = self._mappings.is_settled(target)
                return self._written(done) if settled else self._copied_later(target, done)
            return self._copy_later(*copied)
        if request.op == _IOCTL:
            return self._ioctl(request, request.ino)  # of a directory the handle is no inode number
        raise FsError(errno.ENOSYS)

    async def _copy_later(
        self, src: Ino, src_offset: int, dst: Ino, dst_offset: int, length: int
    ) -> Answered:
        return self._written(await self._clones.copy(src, src_offset, dst, dst_offset, length))

    async def _copied_later(self, target: Ino, done: int) -> Answered:
        await self._mappings.settled(target)
        return self._written(done)

    async def _fallocate_later(self, claim: Claim, steps: Iterator[None]) -> Answered:
        async with claim:
            await trio.lowlevel.checkpoint()
            await in_pieces(steps)
        # After the claim: a clone waits for the claim with the locks of files that this wait needs.
        for ino in claim.inos:
            await self._mappings.settled(ino)
        return self._error(0)

    # -- lseek

    def _lseek(self, request: RawRequest, ino: Ino) -> Answered | Later:
        inode, extents = self._fs.names.regular(ino)
        if extents.blocks * PAGE_SIZE >= inode.size:
            return self._found(self._fs.seek(ino, request.offset, request.mode))
        # A store into a hole through a mapping is data, but the filesystem learns of the store only when the
        # kernel writes the page back.
        return self._lseek_later(ino, request.offset, request.mode)

    async def _lseek_later(self, ino: Ino, offset: int, whence: int) -> Answered:
        await self._mappings.write_back(ino)
        return self._found(self._fs.seek(ino, offset, whence))

    # -- ioctl

    def _ioctl(self, request: RawRequest, ino: Ino) -> Answered | Later:
        command = _command_of(request)
        data = ctypes.string_at(request.data, request.data_size) if request.data_size else b""
        if command == DAXEMU_IOC_CLONE_RANGE and len(data) == CLONE_RANGE.size:
            if not unpack(request.fh).writable:
                raise FsError(errno.EBADF)
            return self._ioctl_clone(request.tid, ino, data)
        if command == DAXEMU_IOC_MAP and len(data) >= MAP_HEADER.size:
            return self._output(self._map(ino, data))
        if command in fileattr.GETTERS:
            return self._output(fileattr.get(self._fs, ino, command))
        if command in fileattr.SETTERS:
            fileattr.set_(self._fs, ino, command, data, request.tid)
            self._mappings.forget_attributes(ino)  # the ctime
            return self._output()
        if command == XFS_IOC_GOINGDOWN:
            if not capable(request.tid, CAP_SYS_ADMIN):
                raise FsError(errno.EPERM)
            return self._ioctl_goingdown(request.tid, request.offset)
        raise FsError(errno.ENOTTY)

    async def _ioctl_clone(self, tid: int, target: Ino, data: bytes) -> Answered:
        fd, offset, length, target_offset = CLONE_RANGE.unpack(data)
        source = await trio.to_thread.run_sync(_source_of, tid, fd, self._dev)
        self._file_modified(target, tid)
        await self._clones.clone(source, offset, target, target_offset, length)
        return self._output()

    async def _ioctl_goingdown(self, tid: int, address: int) -> Answered:
        """``xfs_fs_goingdown()``. Reads the argument at ``address`` of the thread: by the ioctl's number, the
        argument is output only, so the kernel does not copy its value into the request.
        """
        how = await trio.to_thread.run_sync(_word_of, tid, address)
        if how not in (_GOING_DEFAULT, _GOING_LOGFLUSH, _GOING_NOLOGFLUSH):
            raise FsError(errno.EINVAL)
        if how == _GOING_DEFAULT:
            for ino in self._open_files.inodes():
                await self._mappings.write_back(ino)
        reason = "User initiated shutdown received.  Shutting down filesystem."
        self._fs.shutdown(reason, save=how != _GOING_NOLOGFLUSH)
        return self._output()

    def _map(self, ino: Ino, data: bytes) -> bytes:
        start, length, _, _ = MAP_HEADER.unpack_from(data)
        extents = self._fs.extents_of(ino)
        found: list[bytes] = []
        wanted = pages_at(start, length)
        for run in extents.runs(wanted.start, wanted.end if length else 1 << 52):
            if run.link is None:
                continue
            base = PFN_PHYS(run.file_block - run.dev_block)
            for part, shared_by in self._fs.rmap.sharing(run.dev_block, run.dev_block + run.length):
                device, size = byte_span(part)
                poisoned = self._fs.dax.is_poisoned(device, size)
                found.append(MAP_EXTENT.pack(base + device, device, size, shared_by, poisoned))
            if len(found) >= MAP_ROOM:
                break
        del found[MAP_ROOM:]
        room = MAP_HEADER.size + MAP_ROOM * MAP_EXTENT.size
        return (MAP_HEADER.pack(start, length, len(found), 0) + b"".join(found)).ljust(room, b"\0")


class _Kept:
    """Copy of a request, and of the data that its pointer names: both are gone after the callback of C."""

    def __init__(self, request: RawRequest) -> None:
        self.request = RawRequest.from_buffer_copy(request)
        if request.data_size:
            self._data = ctypes.create_string_buffer(
                ctypes.string_at(request.data, request.data_size), request.data_size
            )
            self.request.data = ctypes.addressof(self._data)


def _command_of(request: RawRequest) -> int:
    """Return the number of an ioctl."""
    return int(request.mode) & 0xFFFFFFFF


def _described(request: RawRequest) -> Operation:
    """Return the operation of a request. A copy is about its target."""
    ino, tid = unpack(request.fh).ino, request.tid
    if request.op == _FALLOCATE:
        return Operation(Op.FALLOCATE, tid, ino, offset=request.offset, length=request.length)
    if request.op == _COPY_FILE_RANGE:
        target = unpack(request.target_fh).ino
        return Operation(Op.CLONE, tid, target, offset=request.target_offset, length=request.length)
    if request.op == _LSEEK:
        return Operation(Op.LSEEK, tid, ino)
    if _command_of(request) == DAXEMU_IOC_CLONE_RANGE and request.data_size == CLONE_RANGE.size:
        _, _, length, offset = CLONE_RANGE.unpack(ctypes.string_at(request.data, request.data_size))
        return Operation(Op.CLONE, tid, request.ino, offset=offset, length=length)
    return Operation(Op.IOCTL, tid, request.ino)


def _word_of(tid: int, address: int) -> int:
    """Return the 32-bit word at an address of a thread. Raises FsError EFAULT. From a worker thread only: the
    address may be in a mapping of a file on this mount.
    """
    try:
        with open(f"/proc/{tid}/mem", "rb", buffering=0) as memory:
            return int.from_bytes(os.pread(memory.fileno(), 4, address), sys.byteorder)
    except (OSError, OverflowError) as error:
        raise FsError(errno.EFAULT) from error


def _source_of(tid: int, fd: int, dev: tuple[int, int]) -> Ino:
    """Return the inode on this mount that descriptor ``fd`` of a thread has open for reading.

    /proc shows the inode without a request to the filesystem, which is this process. Raises FsError EBADF,
    EXDEV, EPERM, EOPNOTSUPP.
    """
    try:
        with open(f"/proc/{tid}/fdinfo/{fd}") as lines:
            facts = dict(line.split(":", 1) for line in lines if ":" in line)
        known = read_lines(f"/proc/{tid}/mountinfo")
        devices = {fields[0]: fields[2] for line in known if (fields := line.split(" ", 3))[2:]}
    except OSError as error:
        raise FsError(errno.EBADF if error.errno == errno.ENOENT else errno.EPERM) from error
    if "ino" not in facts:
        raise FsError(errno.EOPNOTSUPP, "/proc/PID/fdinfo names no inode: that needs Linux 5.14")
    if devices.get(facts["mnt_id"].strip()) != "{}:{}".format(*dev):
        raise FsError(errno.EXDEV)
    flags = int(facts["flags"], 8)
    if flags & os.O_ACCMODE == os.O_WRONLY or flags & os.O_PATH:
        raise FsError(errno.EBADF)
    return int(facts["ino"])
