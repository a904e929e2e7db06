"""safe_read: poison raises an exception instead of SIGBUS."""

from __future__ import annotations

import mmap

import numpy as np
import pytest

from daxemu import protocol as p
from daxemu.client import Client, safe_read
from daxemu.errors import InvalidArgument, MediaError
from tests.support.quick import QuickMount

PAGE = 4096


def mapped(path: str, access: int = mmap.ACCESS_READ) -> mmap.mmap:
    with open(path, "r+b") as file:
        return mmap.mmap(file.fileno(), 0, access=access)


@pytest.mark.mount
@pytest.mark.parametrize("access", [mmap.ACCESS_READ, mmap.ACCESS_WRITE, mmap.ACCESS_COPY])
def test_poison_is_an_error_and_no_signal(quick_mount: QuickMount, access: int) -> None:
    file = quick_mount.make_file("f", 4)
    with mapped(str(file), access) as view:
        assert view[0] == ord("A")
        with Client.at(file) as client:
            client.ask(p.Inject([(2 * PAGE, PAGE)], ino=file.stat().st_ino))
            assert safe_read(view, 10, PAGE) == b"A" * (PAGE - 10) + b"B" * 10
            assert safe_read(view, 3 * PAGE) == b"D" * PAGE
            with pytest.raises(MediaError, match="byte 8192 of the mapping") as caught:
                safe_read(view, PAGE)
            assert caught.value.good == b"B" * PAGE
            with pytest.raises(MediaError, match="byte 8292 "):
                safe_read(view, 2 * PAGE + 100, 1)
            client.ask(p.Clear([(2 * PAGE, PAGE)], ino=file.stat().st_ino))
        assert safe_read(view, 2 * PAGE, PAGE) == bytes(PAGE)


@pytest.mark.mount
def test_latent_poison_is_found_by_it(quick_mount: QuickMount) -> None:
    file = quick_mount.make_file("f", 2)
    with mapped(str(file)) as view, Client.at(file) as client:
        client.ask(p.Inject([(PAGE, PAGE)], ino=file.stat().st_ino, latent=True))
        with pytest.raises(MediaError, match="byte 4096 "):
            safe_read(view)
        assert client.ask(p.GetBadblocks()).sectors == 8


@pytest.mark.mount
def test_an_array_over_the_file(quick_mount: QuickMount) -> None:
    file = quick_mount.make_file("f", 2)
    array = np.memmap(file, dtype=np.uint32, mode="r")
    with Client.at(file) as client:
        client.ask(p.Inject([(PAGE, PAGE)], ino=file.stat().st_ino))
    assert safe_read(array, 0, 8) == b"A" * 8
    with pytest.raises(MediaError):
        safe_read(array[PAGE // 4 :])


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, 101), (101, None), (50, 51), (0, -1)])
def test_outside_of_the_mapping(offset: int, length: int | None) -> None:
    with pytest.raises(InvalidArgument, match="has 100 bytes"):
        safe_read(bytes(100), offset, length)


def test_any_memory_can_be_read() -> None:
    assert safe_read(b"0123456789", 3, 4) == b"3456"
    assert safe_read(b"", 0) == b""
    with pytest.raises(TypeError):
        safe_read("text")
