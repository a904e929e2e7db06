"""Differential fuzzer of host/fuse/answers.c: FUSE requests go to the C code and to a model in Python.

The C code and the model must give the same messages, notes for Python and device bytes, and must leave the
same requests to Python. answers.c reads a request and writes its answer on one descriptor, as with /dev/fuse:
a SOCK_SEQPACKET socket keeps the bounds of both. C reads a request into an allocation of exactly its length:
make test-asan reports an access beyond its end.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import random
import socket
import struct
import tempfile
from typing import NamedTuple, Self

from daxemu.host.fuse.supplement import library, quick_library
from tests.fuzz.mutate import INTERESTING, mutated

IN_HEADER, OUT_HEADER = struct.Struct("=IIQQIIIHH"), struct.Struct("=IiQ")
READ_WRITE, NOTE = struct.Struct("=QQIIQII"), struct.Struct("=QQq")
BATCH_HEADER, FORGET_ONE = struct.Struct("=II"), struct.Struct("=Qq")
GETATTR, READ, WRITE, RELEASE, GETXATTR, FORGET, BATCH_FORGET, INIT = 3, 15, 16, 18, 22, 2, 42, 26
WRITTEN, GROWN, RELEASED, FORGOTTEN = 1, 2, 3, 4
NOTIFY_INVAL_INODE, WRITE_CACHE = 2, 1
CAPS = b"security.capability\0"
ATTR_OUT, RELEASE_IN, GETXATTR_IN = 104, 24, 8
MAX_PIECES = 32
LONGEST = 1 << 17
DEVICE = 1 << 18
GRANULE = 512
"""Bytes that runs are multiples of: small, so that a request meets many runs. C knows no block size."""
INODES = (2, 3, 4098)
"""Inodes that have layouts; the last shares its bucket of the table with the first."""
PLACES = (64, 128, 256, 512, 1024, 2048)
"""Sizes that the array of notes has one after the other, in a new process."""
ROOM = DEVICE // len(INODES) // GRANULE
"""Granules of each file: no two files share device bytes."""
_NOTED = ctypes.PYFUNCTYPE(None, ctypes.c_void_p, ctypes.c_size_t)

Note = tuple[int, int, int]


class Seen(NamedTuple):
    """Effects of some requests: requests left to Python, messages written, notes with times as 0."""

    left: list[bytes]
    messages: list[bytes]
    notes: list[Note]


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
        self._libc = ctypes.CDLL(None)
        self._libc.malloc.argtypes, self._libc.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
        self._libc.free.argtypes, self._libc.free.restype = (ctypes.c_void_p,), None
        self._file = tempfile.TemporaryFile(dir="/dev/shm")  # noqa: SIM115  (closed by __exit__)
        self._file.truncate(DEVICE)
        self.media = mmap.mmap(self._file.fileno(), DEVICE)
        self._kernel, self._fuse = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._kernel.setblocking(False)
        self._notes: list[Note] = []

        def noted(notes: int, count: int) -> None:
            for kind, which, value in NOTE.iter_unpack(ctypes.string_at(notes, count * NOTE.size)):
                assert kind != WRITTEN or value > 0
                self._notes.append((kind, which, 0 if kind == WRITTEN else value))

        self._keep = _NOTED(noted)
        self._slot = ctypes.c_void_p.in_dll(library(), "daxemu_noted")
        self._burst_ends = ctypes.c_int64.in_dll(library(), "daxemu_burst_ends")

    def __enter__(self) -> Self:
        self._slot.value = ctypes.cast(self._keep, ctypes.c_void_p).value
        place = self._calls.daxemu_layouts_device
        place.argtypes, place.restype = (ctypes.c_int, ctypes.c_int64, ctypes.c_void_p), None
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.media))
        place(self._file.fileno(), 0, base)
        self._burst_ends.value = 2**62
        return self

    def __exit__(self, *exc: object) -> None:
        self._calls.daxemu_layout_break_all()
        self._calls.daxemu_layouts_device(-1, 0, None)
        self._slot.value = None
        self._burst_ends.value = 0
        self._kernel.close()
        self._fuse.close()
        self._file.close()

    def grant(self, ino: int, size: int, start: int, end: int, device: int, *, may_write: bool) -> None:
        """See daxemu_layout_grant()."""
        self._grant(ino, size, start, end, device, may_write)

    def grant_attributes(self, ino: int) -> None:
        """See daxemu_layout_attributes(); all bytes are the inode's number modulo 256."""
        self._attributes(ino, attributes_of(ino), 1)

    def break_layout(self, ino: int) -> None:
        """See daxemu_layout_break()."""
        self._calls.daxemu_layout_break(ctypes.c_uint64(ino))

    def ask(self, requests: list[bytes]) -> Seen:
        """Send ``requests`` in one burst; C reads each into an allocation as long as the longest of them."""
        for each in requests:
            self._kernel.send(each)
        self._notes = []
        left, messages = [], []
        size = max(map(len, requests))
        at = self._libc.malloc(size)
        while (got := self._read(self._fuse.fileno(), at, size, None)) >= 0:
            left.append(ctypes.string_at(at, got))
        self._libc.free(at)
        while True:
            try:
                messages.append(self._kernel.recv(DEVICE * 2))
            except BlockingIOError:
                return Seen(left, messages, self._notes)


def attributes_of(ino: int) -> bytes:
    return bytes([ino % 256]) * ATTR_OUT


def request(opcode: int, ino: int, body: bytes, unique: int = 10) -> bytes:
    """A request as the kernel forms it."""
    return IN_HEADER.pack(IN_HEADER.size + len(body), opcode, unique, ino, 0, 0, 1, 0, 0) + body


def read_body(offset: int, size: int) -> bytes:
    return READ_WRITE.pack(0, offset, size, 0, 0, 0, 0)


def write_body(offset: int, size: int, data: bytes, flags: int = 0) -> bytes:
    """``size`` is the length that the request states, which may differ from the length of ``data``."""
    return READ_WRITE.pack(0, offset, size, flags, 0, 0, 0) + data


class Run(NamedTuple):
    """Bytes [start, end) of a file, at byte ``device`` of the device."""

    start: int
    end: int
    device: int
    may_write: bool


class Model:
    """Reference implementation of answers.c: layouts, device bytes, and the answer to each request."""

    def __init__(self, media: bytes) -> None:
        self.media = bytearray(media)
        self.size: dict[int, int] = {}
        self.runs: dict[int, list[Run]] = {}
        self.with_attributes: set[int] = set()
        self._noted: set[int] = set()
        self._told: set[int] = set()

    def grant(self, ino: int, size: int, run: Run) -> None:
        self.size[ino] = size
        kept = [each for each in self.runs.get(ino, []) if each.end <= run.start or each.start >= run.end]
        self.runs[ino] = sorted([*kept, run])
        self.with_attributes.add(ino)

    def break_layout(self, ino: int) -> None:
        self.size.pop(ino, None)
        self.runs.pop(ino, None)
        self.with_attributes.discard(ino)

    def ask(self, requests: list[bytes]) -> Seen:
        """The effects of ``requests``. Python hears of all notes whenever a request is left to it."""
        seen = Seen([], [], [])
        for each in requests:
            if not self._answer(each, seen):
                seen.left.append(each)
                self._python_has_notes()
        self._python_has_notes()
        return seen

    def _python_has_notes(self) -> None:
        self._noted.clear()
        self._told.clear()

    def _answer(self, asked: bytes, seen: Seen) -> bool:
        """Add the answer of C to ``seen``. False: C leaves the request to Python."""
        if len(asked) < IN_HEADER.size:
            return False
        length, opcode, unique, ino, *_ = IN_HEADER.unpack_from(asked)
        body = asked[IN_HEADER.size :]
        answer = {
            READ: self._read,
            WRITE: self._write,
            GETATTR: self._getattr,
            GETXATTR: self._getxattr,
            RELEASE: self._release,
            FORGET: self._forget,
            BATCH_FORGET: self._batch_forget,
        }.get(opcode)
        if answer is None or length != len(asked):
            return False
        found = answer(ino, body, seen)
        if found is None:
            return False
        if opcode not in (FORGET, BATCH_FORGET):
            error, data = found
            seen.messages.append(OUT_HEADER.pack(OUT_HEADER.size + len(data), error, unique) + data)
        return True

    def _pieces(self, ino: int, start: int, end: int, *, write: bool = False) -> list[slice]:
        """Device bytes of file bytes [start, end); empty if C must not answer for them."""
        pieces = []
        for run in self.runs.get(ino, []):
            if run.start <= start < run.end and start < end and (run.may_write or not write):
                at, until = run.device + start - run.start, min(run.end, end)
                pieces.append(slice(at, at + until - start))
                start = until
        return pieces if start >= end and len(pieces) <= MAX_PIECES else []

    def _read(self, ino: int, body: bytes, seen: Seen) -> tuple[int, bytes] | None:
        if ino not in self.size or len(body) < READ_WRITE.size:
            return None
        _, offset, size, *_ = READ_WRITE.unpack_from(body)
        pieces = self._pieces(ino, offset, min(offset + size, self.size[ino]))
        return (0, b"".join(bytes(self.media[each]) for each in pieces)) if pieces else None

    def _write(self, ino: int, body: bytes, seen: Seen) -> tuple[int, bytes] | None:
        if ino not in self.size or len(body) < READ_WRITE.size:
            return None
        _, offset, size, flags, *_ = READ_WRITE.unpack_from(body)
        data = body[READ_WRITE.size :][:size]
        pieces = self._pieces(ino, offset, offset + size, write=True)
        if len(data) < size or not pieces:
            return None
        done = 0
        for each in pieces:
            self.media[each] = data[done : done + each.stop - each.start]
            done += each.stop - each.start
        if ino not in self._noted:
            self._noted.add(ino)
            seen.notes.append((WRITTEN, ino, 0))
        self.with_attributes.discard(ino)
        if offset + size > self.size[ino]:
            self.size[ino] = offset + size
            seen.notes.append((GROWN, ino, offset + size))
        if flags & WRITE_CACHE and ino not in self._told:
            self._told.add(ino)
            seen.messages.append(OUT_HEADER.pack(40, NOTIFY_INVAL_INODE, 0) + struct.pack("=Qqq", ino, -1, 0))
        return 0, struct.pack("=II", size, 0)

    def _getattr(self, ino: int, body: bytes, seen: Seen) -> tuple[int, bytes] | None:
        return (0, attributes_of(ino)) if ino in self.with_attributes else None

    def _getxattr(self, ino: int, body: bytes, seen: Seen) -> tuple[int, bytes] | None:
        return (-errno.ENODATA, b"") if ino in self.size and body[GETXATTR_IN:] == CAPS else None

    def _release(self, ino: int, body: bytes, seen: Seen) -> tuple[int, bytes] | None:
        if len(body) < RELEASE_IN:
            return None
        seen.notes.append((RELEASED, int.from_bytes(body[:8], "little"), 0))
        return 0, b""

    def _forget(self, ino: int, body: bytes, seen: Seen) -> tuple[int, bytes] | None:
        if len(body) < 8:
            return None
        seen.notes.append((FORGOTTEN, ino, int.from_bytes(body[:8], "little", signed=True)))
        return 0, b""

    def _batch_forget(self, ino: int, body: bytes, seen: Seen) -> tuple[int, bytes] | None:
        if len(body) < BATCH_HEADER.size:
            return None
        count, _ = BATCH_HEADER.unpack_from(body)
        if count > (len(body) - BATCH_HEADER.size) // FORGET_ONE.size:
            return None
        for number in range(count):
            which, lookups = FORGET_ONE.unpack_from(body, BATCH_HEADER.size + number * FORGET_ONE.size)
            seen.notes.append((FORGOTTEN, which, lookups))
        return 0, b""


class Requests:
    """Random requests and layouts. Offsets lie mostly at the bounds of runs."""

    def __init__(self, rng: random.Random, answers: Answers, model: Model) -> None:
        self._rng, self._answers, self._model = rng, answers, model

    def change(self) -> None:
        """Grant runs to a file, or break its layout."""
        rng, ino = self._rng, self._rng.choice(INODES)
        if rng.random() < 0.2:
            self._answers.break_layout(ino)
            self._model.break_layout(ino)
            return
        first = rng.randrange(ROOM)
        if rng.random() < 0.3:
            lengths = [1] * rng.randint(MAX_PIECES - 2, MAX_PIECES + 8)
        else:
            lengths = [rng.randint(1, 70)]
        may_write = rng.random() < 0.7
        for length in lengths:
            start, end = first * GRANULE, min(ROOM, first + length) * GRANULE
            if start == end:
                break
            self._grant(ino, start, end, may_write=may_write)
            first += length

    def _grant(self, ino: int, start: int, end: int, *, may_write: bool) -> None:
        run = Run(start, end, INODES.index(ino) * ROOM * GRANULE + start, may_write)
        size = max(self._model.size.get(ino, 0), self._rng.randint(start + 1, end))
        self._answers.grant(ino, size, start, end, run.device, may_write=may_write)
        self._answers.grant_attributes(ino)
        self._model.grant(ino, size, run)

    def some(self) -> list[bytes]:
        """Return one request, damaged in half of the calls, or sometimes a burst."""
        rng = self._rng
        if rng.random() < 0.05:
            return self._full_notes()
        if rng.random() < 0.05:
            return [self._small() for _ in range(rng.randint(2, 90))]
        made = self._any()
        if rng.random() < 0.5:
            made = mutated(rng, made)
            # A length that agrees leads further in.
            if rng.random() < 0.7 and len(made) >= 4:
                made = struct.pack("=I", len(made)) + made[4:]
        elif rng.random() < 0.3:
            # A body too short for its opcode, under a header that agrees.
            made = made[: rng.randint(IN_HEADER.size - 8, len(made))]
            made = struct.pack("=I", len(made)) + made[4:]
        return [made[:LONGEST] or b"\0"]

    def _ino(self) -> int:
        return self._rng.choice((*INODES, 5))

    def _offset(self, ino: int) -> int:
        rng, edges = self._rng, [self._model.size.get(ino, 0)]
        for run in self._model.runs.get(ino, []):
            edges += run.start, run.end
        edge = max(0, rng.choice(edges) + rng.choice((-1, 0, 0, 0, 1)))
        return rng.choice((edge, edge, edge, rng.randrange(ROOM * GRANULE), rng.choice(INTERESTING)))

    def _size(self) -> int:
        rng = self._rng
        small, large = rng.randint(0, 3 * GRANULE), rng.randrange(ROOM * GRANULE)
        return rng.choice((small, large, large, rng.choice([each for each in INTERESTING if each < 2**32])))

    def _write(self, ino: int, longest: int) -> bytes:
        rng = self._rng
        data = rng.randbytes(rng.choice((0, 1, 100, rng.randint(1, longest))))
        near = max(0, len(data) + rng.choice((-8, -1, 1, 8)))
        size = rng.choice((len(data), len(data), len(data), near, self._size()))
        return request(WRITE, ino, write_body(self._offset(ino), size, data, rng.choice((0, WRITE_CACHE))))

    def _forgets(self, ino: int, most: int) -> bytes:
        rng = self._rng
        count = rng.randint(0, most)
        data = b"".join(FORGET_ONE.pack(ino + number, number) for number in range(count))
        said = rng.choice((count, count, count + 1, 2**31, 2**32 - 1))
        return request(BATCH_FORGET, 0, BATCH_HEADER.pack(said, 0) + data)

    def to_the_last_note(self, places: int) -> list[bytes]:
        """A burst that leaves one free place of ``places`` in the array of notes, then a store that needs
        two.
        """
        ino, size = INODES[0], 2 * GRANULE
        self._answers.break_layout(ino)
        self._model.break_layout(ino)
        run = Run(0, size, 0, True)
        self._answers.grant(ino, GRANULE, 0, size, 0, may_write=True)
        self._answers.grant_attributes(ino)
        self._model.grant(ino, GRANULE, run)
        forgets = b"".join(FORGET_ONE.pack(number, number) for number in range(places - 1))
        return [
            request(BATCH_FORGET, 0, BATCH_HEADER.pack(places - 1, 0) + forgets),
            request(WRITE, ino, write_body(0, size, self._rng.randbytes(size))),
        ]

    def _full_notes(self) -> list[bytes]:
        """A burst that fills the array of notes in answers.c (2^n places), then adds notes."""
        rng = self._rng
        count = 2 ** rng.randint(6, 11) - rng.randint(0, 1)
        notes = b"".join(FORGET_ONE.pack(number, number) for number in range(count))
        burst = [request(BATCH_FORGET, 0, BATCH_HEADER.pack(count, 0) + notes)]
        runs = [(ino, run) for ino in self._model.runs for run in self._model.runs[ino] if run.may_write]
        if runs and rng.random() < 0.7:
            ino, run = rng.choice(runs)
            size = run.end - run.start
            return [*burst, request(WRITE, ino, write_body(run.start, size, rng.randbytes(size)))]
        opcode, size = rng.choice(((RELEASE, RELEASE_IN), (FORGET, 8)))
        return [*burst, request(opcode, self._ino(), bytes(size))]

    def _small(self) -> bytes:
        """A request that leaves notes."""
        ino, value = self._ino(), self._rng.getrandbits(63)
        match self._rng.randrange(4):
            case 0:
                return self._write(ino, GRANULE)
            case 1:
                return request(RELEASE, ino, struct.pack("=QQQ", value, 0, 0))
            case 2:
                return request(FORGET, ino, struct.pack("=Q", value))
            case _:
                return self._forgets(ino, 20)

    def _any(self) -> bytes:
        rng, ino = self._rng, self._ino()
        match rng.randrange(8):
            case 0 | 1:
                return request(READ, ino, read_body(self._offset(ino), self._size()))
            case 2 | 3:
                return self._write(ino, ROOM * GRANULE)
            case 4:
                return request(GETATTR, ino, bytes(16))
            case 5:
                name = rng.choice((CAPS, CAPS, CAPS[:-1], CAPS + b"\0", b"user.a\0"))
                return request(GETXATTR, ino, bytes(GETXATTR_IN) + name)
            case 6:
                return self._small() if rng.random() < 0.7 else self._forgets(ino, 200)
            case _:
                return request(INIT, 0, bytes(rng.choice((8, 16, 64))))


def fuzz(seed: int, rounds: int) -> int:
    """Send ``rounds`` requests or bursts; return the number of requests that C answered."""
    rng = random.Random(seed)
    answered = 0
    with Answers() as answers:
        answers.media[:] = rng.randbytes(DEVICE)
        model = Model(answers.media[:])
        requests = Requests(rng, answers, model)
        for number in range(rounds):
            if number < len(PLACES):
                asked = requests.to_the_last_note(PLACES[number])
            else:
                if rng.random() < 0.2:
                    requests.change()
                asked = requests.some()
            expected, seen = model.ask(asked), answers.ask(asked)
            shown = f"seed {seed}, round {number}: {[each[:80].hex() for each in asked]}"
            assert seen.left == expected.left, f"{shown}: left to Python"
            assert seen.messages == expected.messages, f"{shown}: messages"
            assert seen.notes == expected.notes, f"{shown}: notes"
            assert answers.media[:] == model.media, f"{shown}: device bytes"
            answered += len(asked) - len(seen.left)
    return answered
