"""Options that name ranges, of a file or of the device: --offset, --length, --page, --find."""

from __future__ import annotations

import errno
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import click

from daxemu.cli.common import SIZE, WholeRange
from daxemu.errors import InvalidArgument
from daxemu.ranges import Range
from daxemu.uapi import PAGE_SIZE

_CHUNK = 1 << 20
"""Bytes of one read of a search."""
_ESCAPE = re.compile(rb"\\x([0-9A-Fa-f]{2})")


class Places(NamedTuple):
    """Ranges named by options. ``offsets`` and ``lengths``: bytes. ``finds``: bytes to search for."""

    offsets: tuple[int, ...]
    lengths: tuple[int, ...]
    finds: tuple[bytes, ...] = ()

    @property
    def is_given(self) -> bool:
        """Return whether any option was given."""
        return bool(self.offsets or self.lengths or self.finds)

    def ranges(self, path: str, size: int | None) -> list[list[int]]:
        """Return pairs [offset, length] in bytes, of the file ``path`` with ``size`` bytes, or of the device
        (None). A single length serves all offsets. Without an offset, 0. Without a length, one page, or the
        rest of the file. Bytes to search for are a range each.

        Raises InvalidArgument if a search finds nothing.
        """
        if not self.finds:
            return self._numbered(size)
        if size is None:
            raise InvalidArgument("--find searches a file: give a file as PATH, or --every")
        if self.lengths and not self.offsets:
            raise InvalidArgument(
                "--length belongs to --offset or --page: --find has the length of its bytes"
            )
        found = [(find(path, wanted), wanted) for wanted in self.finds]
        if missing := [wanted for at, wanted in found if at is None]:
            raise InvalidArgument(
                f"{path} does not hold the bytes {_shown(missing[0])}: give others, or --offset; "
                "a page that cannot be read is not searched"
            )
        return (self._numbered(size) if self.offsets else []) + [
            [at, len(wanted)] for at, wanted in found if at is not None
        ]

    def _numbered(self, size: int | None) -> list[list[int]]:
        offsets, lengths = self.offsets or (0,), self.lengths
        if not lengths:
            lengths = tuple(
                PAGE_SIZE if size is None else max(min(PAGE_SIZE, size - offset), 1) for offset in offsets
            )
        if len(lengths) == 1:
            lengths *= len(offsets)
        if len(offsets) != len(lengths):
            raise InvalidArgument(
                f"{len(offsets)} offsets but {len(lengths)} lengths: give one length, or one for each offset"
            )
        return [list(pair) for pair in zip(offsets, lengths, strict=True)]


def place_options(*, with_find: bool) -> Callable[[Any], Any]:
    """Add the options to a verb. The verb gets ``places``: Places. ``with_find``: --find, too."""

    def decorate(command: Any) -> Any:
        def collected(*args: Any, **kwargs: Any) -> Any:
            offsets, lengths, pages = (kwargs.pop(name) for name in ("offsets", "lengths", "pages"))
            finds = tuple(map(_parse, kwargs.pop("finds", ())))
            every = (*offsets, *(page * PAGE_SIZE for page in pages))
            return command(*args, **kwargs, places=Places(every, lengths, finds))

        collected.__doc__, collected.__name__ = command.__doc__, command.__name__
        collected.__click_params__ = getattr(command, "__click_params__", [])  # type: ignore[attr-defined]
        options = [
            click.option(
                "--offset", "offsets", type=SIZE, multiple=True, help="Bytes; repeat for several ranges."
            ),
            click.option(
                "--page", "pages", type=WholeRange(min=0), multiple=True, help="The same as --offset N*4096."
            ),
            click.option(
                "--length",
                "lengths",
                type=SIZE,
                multiple=True,
                help="Bytes; default: one page. Give it once, or once for each --offset and --page.",
            ),
        ]
        if with_find:
            options.append(
                click.option(
                    "--find",
                    "finds",
                    metavar="BYTES",
                    multiple=True,
                    help=r"The first bytes of the file that equal BYTES: text, with \xNN for a byte. "
                    "The search reads the file, so it discovers latent poison.",
                )
            )
        for option in reversed(options):
            option(collected)
        return collected

    return decorate


def _parse(text: str) -> bytes:
    wanted = _ESCAPE.sub(lambda found: bytes.fromhex(found[1].decode()), os.fsencode(text))
    if not wanted:
        raise InvalidArgument("--find has no bytes: give at least one")
    return wanted


def _shown(wanted: bytes) -> str:
    return repr(wanted)[1:]


def find(path: str | os.PathLike[str], wanted: bytes) -> int | None:
    """Return the offset of the first occurrence of ``wanted`` in the data of a file; None without one. Holes
    and pages that cannot be read are not searched.

    Reads past the page cache: cached pages would become present in processes that touch their neighbours.
    Raises OSError.
    """
    with _opened(path) as fd:
        return _search(fd, wanted)


def has_data(path: str | os.PathLike[str], parts: Iterable[Range]) -> bool:
    """Return whether any of the byte ranges ``parts`` of a file has data; False if all are holes. Raises
    OSError.
    """
    with _opened(path) as fd:
        return any(
            part.start <= at < part.end for part in parts if (at := _data_at(fd, part.start)) is not None
        )


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[int]:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT | os.O_NONBLOCK)
    try:
        yield fd
    finally:
        os.close(fd)


def _data_at(fd: int, offset: int) -> int | None:
    """Return the first offset with data from ``offset`` on; None without one. The supervisor writes dirty
    pages back first: a store through a mapping into a hole is data.
    """
    try:
        return os.lseek(fd, offset, os.SEEK_DATA)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None


def _search(fd: int, wanted: bytes) -> int | None:
    before, end = b"", 0
    for at, data in _data(fd):
        text = (before if at == end else b"") + data
        end = at + len(data)
        if (index := text.find(wanted)) >= 0:
            return end - len(text) + index
        before = text[len(text) - min(len(wanted) - 1, len(text)) :]
    return None


def _data(fd: int) -> Iterator[tuple[int, bytes]]:
    """Yield the readable data of a file in pieces, with their offsets."""
    end = 0
    with mmap.mmap(-1, _CHUNK) as buffer:
        while (at := _data_at(fd, end)) is not None:
            end = os.lseek(fd, at, os.SEEK_HOLE)
            yield from _readable(fd, buffer, at, end)


def _readable(fd: int, buffer: mmap.mmap, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yield the readable bytes of [at, end). A piece that holds poison is read page by page."""
    by_page_until = at
    while at < end:
        length = PAGE_SIZE if at < by_page_until else _CHUNK
        data = _read(fd, buffer, at, length)
        if data is None and length == PAGE_SIZE:
            at += PAGE_SIZE
        elif data is None:
            by_page_until = at + _CHUNK
        elif data:
            yield at, data[: end - at]
            at += len(data)
        else:
            return  # the file was truncated


def _read(fd: int, buffer: mmap.mmap, at: int, length: int) -> bytes | None:
    """Return up to ``length`` bytes; None if a page of them cannot be read."""
    with memoryview(buffer) as whole, whole[:length] as part:
        try:
            got = os.preadv(fd, [part], at)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return None
        return bytes(part[:got])
