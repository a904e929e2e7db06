"""DaxDevice: one holder, notified by range; no byte is read from poison; no access after a removal."""

from __future__ import annotations

import errno

import pytest

from daxemu.errors import Busy, InvalidArgument, MediaError, NoDevice, Unsupported
from daxemu.pmem.dax_device import DaxDevice
from daxemu.ranges import Range
from daxemu.uapi import MF_MEM_PRE_REMOVE, PAGE_SIZE, U64_MAX
from tests.support.core import Core


class Holder:
    """Holder that records each notification."""

    def __init__(self, error: Exception | None = None) -> None:
        self.told: list[tuple[int, int, int]] = []
        self.error = error

    def before_poison(self) -> None:
        """No grant depends on the health of the media."""

    def notify_failure(self, offset: int, length: int, flags: int) -> None:
        self.told.append((offset, length, flags))
        if self.error is not None:
            raise self.error


@pytest.fixture
def dax(core: Core) -> DaxDevice:
    """A device without a filesystem."""
    core.without_filesystem()
    core.pmem.dax.discard(0, core.pmem.dax.size)
    return core.pmem.dax


def test_one_holder_at_a_time(dax: DaxDevice) -> None:
    first, second = Holder(), Holder()
    assert dax.dax_is_idle()
    dax.hold(first)
    assert not dax.dax_is_idle()
    with pytest.raises(Busy):
        dax.hold(second)
    dax.release(second)
    assert not dax.dax_is_idle()
    dax.release(first)
    dax.hold(second)


def test_a_failure_goes_to_the_holder_as_one_call(dax: DaxDevice) -> None:
    holder = Holder()
    dax.hold(holder)
    dax.notify_failure(PAGE_SIZE, 1 << 40, 0)
    assert holder.told == [(PAGE_SIZE, 1 << 40, 0)]


def test_a_failure_without_a_holder_is_unsupported(dax: DaxDevice) -> None:
    with pytest.raises(Unsupported) as caught:
        dax.notify_failure(0, PAGE_SIZE, 0)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_removal_is_one_call_for_everything(dax: DaxDevice) -> None:
    holder = Holder()
    dax.hold(holder)
    dax.kill_dax()
    assert holder.told == [(0, U64_MAX, MF_MEM_PRE_REMOVE)]
    assert not dax.alive
    assert dax.dax_is_idle()


def test_a_holder_that_fails_does_not_save_the_device(dax: DaxDevice) -> None:
    dax.hold(Holder(MediaError("no")))
    with pytest.raises(MediaError):
        dax.kill_dax()
    assert not dax.alive


def test_after_removal_there_is_nothing(dax: DaxDevice) -> None:
    dax.kill_dax()
    for verb in (
        lambda: dax.hold(Holder()),
        lambda: dax.notify_failure(0, PAGE_SIZE, 0),
        dax.kill_dax,
        lambda: dax.direct_access(0, 1),
        lambda: dax.recovery_write(0, bytes(512)),
        lambda: dax.reserve(0, PAGE_SIZE),
        lambda: dax.add_poison(Range(0, 1)),
        lambda: dax.zero(0, 1),
    ):
        with pytest.raises(NoDevice) as caught:
            verb()
        assert caught.value.errno == errno.ENXIO


@pytest.mark.parametrize(("offset", "length"), [(-1, 1), (0, -1), (8 << 20, 1), (0, (8 << 20) + 1)])
def test_nothing_outside_the_device(dax: DaxDevice, offset: int, length: int) -> None:
    with pytest.raises(InvalidArgument):
        dax.direct_access(offset, length)
    with pytest.raises(InvalidArgument):
        dax.add_poison(Range(offset, offset + length))
    with pytest.raises(InvalidArgument):
        dax.reserve(offset, length)


def test_direct_access_is_the_live_media(dax: DaxDevice) -> None:
    dax.reserve(0, PAGE_SIZE)
    dax.direct_access(100, 5)[:] = b"hello"
    assert bytes(dax.direct_access(99, 7)) == b"\0hello\0"
    dax.zero(100, 4)
    assert bytes(dax.direct_access(99, 7)) == b"\0\0\0\0\0o\0"


def test_no_access_to_poison_and_the_error_says_where(dax: DaxDevice) -> None:
    dax.reserve(0, PAGE_SIZE)
    assert dax.add_poison(Range(1000, 1100), Range(4096, 4097)) == [Range(512, 1536), Range(4096, 4608)]
    with pytest.raises(MediaError) as caught:
        dax.direct_access(0, PAGE_SIZE)
    assert caught.value.ranges == (Range(512, 1536),)
    assert len(dax.direct_access(0, 512)) == 512
    with pytest.raises(MediaError):
        dax.zero(600, 1)


def test_a_write_over_poison_clears_it_and_its_badblocks(dax: DaxDevice) -> None:
    dax.reserve(0, PAGE_SIZE)
    dax.add_poison(Range(512, 1536))
    dax.badblocks.set(1, 2)
    assert dax.recovery_write(1024, b"x" * 512) == [Range(1024, 1536)]
    assert list(dax.badblocks) == [Range(1, 2)]
    assert dax.poisoned(0, PAGE_SIZE) == [Range(512, 1024)]
    assert bytes(dax.direct_access(1024, 512)) == b"x" * 512


@pytest.mark.parametrize(("offset", "length"), [(1, 512), (0, 100), (512, 700)])
def test_a_write_over_poison_is_of_whole_sectors(dax: DaxDevice, offset: int, length: int) -> None:
    dax.reserve(0, PAGE_SIZE)
    dax.add_poison(Range(0, PAGE_SIZE))
    with pytest.raises(InvalidArgument):
        dax.recovery_write(offset, bytes(length))
    assert dax.poisoned(0, PAGE_SIZE) == [Range(0, PAGE_SIZE)]


def test_discarded_memory_reads_as_zeros_when_it_is_reserved_again(dax: DaxDevice) -> None:
    dax.reserve(0, PAGE_SIZE)
    dax.direct_access(0, 4)[:] = b"full"
    dax.discard(0, PAGE_SIZE)
    dax.reserve(0, PAGE_SIZE)
    assert bytes(dax.direct_access(0, 4)) == bytes(4)
