"""Feeds FUSE requests to host/answers.c over a socket pair, and compares its answers with a model in Python.

answers.c reads a request and writes its answer on one descriptor, as with /dev/fuse: a SOCK_SEQPACKET socket
keeps the bounds of both. Run under make test-asan, every access out of bounds ends the process.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import random
import socket
import struct
import tempfile
from typing import Self

from daxemu.host.supplement import library, quick_library
from tests.fuzz.mutate import INTERESTING, mutated

IN_HEADER, OUT_HEADER = struct.Struct("=IIQQIIIHH"), struct.Struct("=IiQ")
READ_WRITE = struct.Struct("=QQIIQII")
GETATTR, READ, WRITE, RELEASE, GETXATTR, FORGET, BATCH_FORGET, INIT = 3, 15, 16, 18, 22, 2, 42, 26
CAPS = b"security.capability\0"
ATTR_OUT = 104
BUFFER = 1 << 17
DEVICE = 1 << 20
INODES = (2, 3, 4098)
"""Inodes that have layouts; the last shares its bucket of the table with the first."""
_NOTED = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)


class Answers:
    """answers.c with layouts over a device of DEVICE bytes. A context manager; one at a time in a process."""

    def __init__(self) -> None:
        self._calls = calls = quick_library()
        self._grant = calls.daxemu_layout_grant
        self._grant.argtypes, self._grant.restype = (*(ctypes.c_uint64,) * 5, ctypes.c_int), None
        self._attributes = calls.daxemu_layout_attributes
        self._attributes.argtypes = (ctypes.c_uint64, ctypes.c_char_p, ctypes.c_int)
        self._attributes.restype = None
        self._read = calls.daxemu_read_request
        self._read.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)
        self._read.restype = ctypes.c_ssize_t
        self._file = tempfile.TemporaryFile(dir="/dev/shm")  # noqa: SIM115  (closed by __exit__)
        self._file.truncate(DEVICE)
        self.media = mmap.mmap(self._file.fileno(), DEVICE)
        self._buffer = mmap.mmap(-1, BUFFER)
        self._at = ctypes.addressof(ctypes.c_char.from_buffer(self._buffer))
        self._kernel, self._fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._kernel.setblocking(False)
        self.notes = 0
        """How many notes Python was given."""

        def noted(notes: int, count: int) -> None:
            self.notes += count

        self._keep = _NOTED(noted)
        self._slot = ctypes.c_void_p.in_dll(library(), "daxemu_noted")

    def __enter__(self) -> Self:
        self._slot.value = ctypes.cast(self._keep, ctypes.c_void_p).value
        place = self._calls.daxemu_layouts_device
        place.argtypes, place.restype = (ctypes.c_int, ctypes.c_int64, ctypes.c_void_p), None
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.media))
        place(self._file.fileno(), 0, base)
        return self

    def __exit__(self, *exc: object) -> None:
        self._calls.daxemu_layout_break_all()
        self._calls.daxemu_layouts_device(-1, 0, None)
        self._slot.value = None
        self._kernel.close()
        self._fuse.close()
        self._file.close()

    def grant(self, ino: int, size: int, start: int, end: int, device: int, *, may_write: bool) -> None:
        """See daxemu_layout_grant()."""
        self._grant(ino, size, start, end, device, may_write)

    def grant_attributes(self, ino: int) -> None:
        """See daxemu_layout_attributes(); all bytes are the inode's number modulo 256."""
        self._attributes(ino, bytes([ino % 256]) * ATTR_OUT, 1)

    def break_layout(self, ino: int) -> None:
        """See daxemu_layout_break()."""
        self._calls.daxemu_layout_break(ctypes.c_uint64(ino))

    def ask(self, request: bytes) -> tuple[bool, list[bytes]]:
        """Send one request: whether C left it to Python, and all that C wrote to the descriptor."""
        self._kernel.send(request)
        ctypes.set_errno(0)
        got = self._read(self._fuse.fileno(), self._at, BUFFER, None)
        if got >= 0:
            assert self._buffer[:got] == request
        written = []
        while True:
            try:
                written.append(self._kernel.recv(BUFFER * 2))
            except BlockingIOError:
                return got >= 0, written


def request(opcode: int, ino: int, body: bytes, unique: int = 10) -> bytes:
    """A request as the kernel forms it."""
    return IN_HEADER.pack(IN_HEADER.size + len(body), opcode, unique, ino, 0, 0, 1, 0, 0) + body


def read_body(offset: int, size: int) -> bytes:
    return READ_WRITE.pack(0, offset, size, 0, 0, 0, 0)


def write_body(offset: int, data: bytes) -> bytes:
    return READ_WRITE.pack(0, offset, len(data), 0, 0, 0, 0) + data


def random_request(rng: random.Random) -> bytes:
    """A request of any kind, mostly to an inode with a layout, half of them damaged."""
    ino = rng.choice((*INODES, 5))
    offset = rng.choice((rng.randrange(DEVICE), *INTERESTING))
    size = rng.choice((rng.randrange(1, 70000), *(each for each in INTERESTING if each < 2**32)))
    made = rng.choice(
        (
            request(READ, ino, read_body(offset, size)),
            request(WRITE, ino, write_body(offset, rng.randbytes(rng.choice((0, 1, 100, 4096, 20000))))),
            request(GETATTR, ino, bytes(16)),
            request(GETXATTR, ino, bytes(8) + CAPS),
            request(RELEASE, ino, bytes(24)),
            request(FORGET, ino, struct.pack("=Q", 1)),
            request(BATCH_FORGET, 0, struct.pack("=IIQQ", rng.choice((1, 2, 2**31)), 0, ino, 1)),
            request(INIT, 0, bytes(rng.choice((8, 16, 64)))),
        )
    )
    if rng.random() < 0.5:
        made = mutated(rng, made)
        # A length that agrees leads further in.
        if rng.random() < 0.7 and len(made) >= 4:
            made = struct.pack("=I", len(made)) + made[4:]
    return made[:BUFFER] or b"\0"


class Files:
    """The model: for each inode its size, and which file bytes lie where on the device."""

    def __init__(self, answers: Answers, rng: random.Random) -> None:
        self._answers, self._rng = answers, rng
        self.size: dict[int, int] = {}
        self.runs: dict[int, list[tuple[int, int, int, bool]]] = {}

    def change(self) -> None:
        """Grant a run to a file, or break its layout."""
        ino = self._rng.choice(INODES)
        if self._rng.random() < 0.3:
            self._answers.break_layout(ino)
            self.size.pop(ino, None)
            self.runs.pop(ino, None)
            return
        # Each file has a third of the device, so a store to one changes no other.
        room = DEVICE // len(INODES) // 4096
        first, length = self._rng.randrange(room), self._rng.randint(1, 20)
        start, end = first * 4096, min(room, first + length) * 4096
        device, may_write = INODES.index(ino) * room * 4096 + start, self._rng.random() < 0.7
        self.size[ino] = max(self.size.get(ino, 0), self._rng.randint(start + 1, end))
        self._answers.grant(ino, self.size[ino], start, end, device, may_write=may_write)
        self._answers.grant_attributes(ino)
        kept = [run for run in self.runs.get(ino, []) if run[1] <= start or run[0] >= end]
        self.runs[ino] = sorted([*kept, (start, end, device, may_write)])

    def bytes_of(self, ino: int, start: int, end: int) -> bytes | None:
        """The file's bytes on the device; None where no run has them."""
        out = b""
        for first, stop, device, _ in self.runs.get(ino, []):
            if first <= start < stop and start < end:
                until = min(stop, end)
                out += self._answers.media[device + start - first : device + until - first]
                start = until
        return out if start >= end else None

    def check(self, asked: bytes, is_pythons: bool, written: list[bytes], before: bytes) -> None:
        """Precondition: ``asked`` was answered just now; ``before`` is the device as it was."""
        replies = []
        for message in written:
            length, error, unique = OUT_HEADER.unpack_from(message)
            assert length == len(message)
            if unique:
                replies.append((error, message[OUT_HEADER.size :]))
        assert len(replies) <= 1
        if is_pythons:
            assert not replies
            return
        assert len(asked) >= IN_HEADER.size
        length, opcode, _, ino, *_ = IN_HEADER.unpack_from(asked)
        assert length == len(asked)
        if opcode != WRITE:
            assert self._answers.media[:] == before
        if opcode == READ:
            _, offset, size, *_ = READ_WRITE.unpack_from(asked, IN_HEADER.size)
            end = min(offset + size, self.size[ino])
            assert replies == [(0, self.bytes_of(ino, offset, end))]
        elif opcode == WRITE:
            self._check_write(ino, asked[IN_HEADER.size :], before, replies)
        elif opcode == GETXATTR:
            assert replies == [(-errno.ENODATA, b"")]
        else:
            assert opcode in (GETATTR, RELEASE, FORGET, BATCH_FORGET)

    def _check_write(self, ino: int, body: bytes, before: bytes, replies: list[tuple[int, bytes]]) -> None:
        _, offset, size, *_ = READ_WRITE.unpack_from(body)
        data = body[READ_WRITE.size :][:size]
        assert len(data) == size
        assert replies == [(0, struct.pack("=II", size, 0))]
        assert self.bytes_of(ino, offset, offset + size) == data
        touched = [run for run in self.runs[ino] if run[0] < offset + size and run[1] > offset]
        assert all(may_write for *_, may_write in touched)
        changed = {
            at
            for at in range(0, DEVICE, 4096)
            if before[at : at + 4096] != self._answers.media[at : at + 4096]
        }
        allowed = {
            at for first, stop, device, _ in touched for at in range(device, device + stop - first, 4096)
        }
        assert changed <= allowed
        self.size[ino] = max(self.size[ino], offset + size)


def fuzz(seed: int, rounds: int) -> int:
    """Ask ``rounds`` requests; how many of them C answered."""
    rng = random.Random(seed)
    answered = 0
    with Answers() as answers:
        answers.media[:] = rng.randbytes(DEVICE)
        files = Files(answers, rng)
        for _ in range(rounds):
            if rng.random() < 0.2:
                files.change()
            asked, before = random_request(rng), answers.media[:]
            is_pythons, written = answers.ask(asked)
            answered += not is_pythons
            try:
                files.check(asked, is_pythons, written, before)
            except (AssertionError, KeyError) as error:
                raise AssertionError(f"seed {seed}: {asked[:200].hex()} -> {written}") from error
    return answered
