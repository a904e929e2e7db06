"""userfaultfd(2) of the test's own process: a thread faults, the test answers."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import resource
import select
import signal
import struct
import threading
from collections.abc import Callable, Iterator

import pytest
import trio

from daxemu.errors import Unsupported
from daxemu.host.c_layout import refusal
from daxemu.host.direct import code, scarce, structs, userfaultfd
from daxemu.host.direct.errors import (
    AddressSpaceChanging,
    AddressSpaceGone,
    NotRegistered,
    NotWritable,
    PagePresent,
    RegisteredElsewhere,
)
from daxemu.host.direct.syscalls import NR_FORK
from daxemu.host.direct.userfaultfd import Event, Feature, Forked, PageFault, Remapped, Unmapped, Userfaultfd
from daxemu.uapi import PAGE_SIZE

PAGES = 8
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.write.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
libc.memmove.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]


class Scene:
    """A shared mapping of PAGES pages of a file without any page, and a userfaultfd."""

    def __init__(self, features: Feature = userfaultfd.NEEDED) -> None:
        self.file = os.memfd_create("media", os.MFD_CLOEXEC)
        os.truncate(self.file, PAGES * PAGE_SIZE)
        self.at = map_shared(self.file, PAGES * PAGE_SIZE)
        self.uffd = userfaultfd.create()
        self.uffd.enable(features)

    def page(self, number: int) -> int:
        return self.at + number * PAGE_SIZE

    def events(self) -> list[Event]:
        """Wait for events."""
        select.select([self.uffd.fd], [], [], 20)
        return self.uffd.read()

    def close(self) -> None:
        self.uffd.close()
        libc.munmap(self.at, PAGES * PAGE_SIZE)
        os.close(self.file)


def map_shared(fd: int, length: int, prot: int = mmap.PROT_READ | mmap.PROT_WRITE) -> int:
    at = libc.mmap(None, length, prot, mmap.MAP_SHARED, fd, 0)
    assert at not in (None, ctypes.c_void_p(-1).value)
    return int(at)


def store(at: int, byte: bytes) -> None:
    """A store that lets other threads of Python run meanwhile."""
    libc.memmove(at, byte, len(byte))


def load(at: int) -> bytes:
    place = ctypes.create_string_buffer(1)
    libc.memmove(place, at, 1)
    return place.raw


class Accessing:
    """An access by a thread of its own."""

    def __init__(self, access: Callable[[], object]) -> None:
        self.result: object = None
        self.tid = 0
        self._access = access
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        self.tid = threading.get_native_id()
        self.result = self._access()

    def join(self) -> object:
        self._thread.join(20)
        assert not self._thread.is_alive()
        return self.result


@pytest.fixture
def scene() -> Iterator[Scene]:
    scene = Scene()
    yield scene
    scene.close()


def test_the_structs_are_those_of_the_kernel_header() -> None:
    assert refusal(code.library(), "daxemu_userfaultfd_layout", *structs.SHARED) is None
    assert refusal(code.library(), "daxemu_userfaultfd_layout", *structs.SHARED[:-1], struct.Struct("=3Q"))


def test_a_load_of_a_missing_page_waits_for_zeros(scene: Scene) -> None:
    scene.uffd.register(scene.at, PAGES * PAGE_SIZE)
    thread = Accessing(lambda: load(scene.page(2) + 77))
    assert scene.events() == [PageFault(scene.page(2) + 77, False, False, thread.tid)]
    scene.uffd.copy_zeros(scene.page(2), PAGE_SIZE, wp=False)
    assert thread.join() == b"\0"
    with pytest.raises(PagePresent) as raised:
        scene.uffd.copy_zeros(scene.page(1), 2 * PAGE_SIZE, wp=False)
    assert raised.value.done == PAGE_SIZE


def test_a_store_to_a_missing_page_is_told_from_a_load(scene: Scene) -> None:
    scene.uffd.register(scene.at, PAGES * PAGE_SIZE)
    thread = Accessing(lambda: store(scene.page(0), b"x"))
    assert scene.events() == [PageFault(scene.page(0), True, False, thread.tid)]
    os.pwrite(scene.file, b"yz", 0)
    scene.uffd.wake(scene.page(0), PAGE_SIZE)
    thread.join()
    assert os.pread(scene.file, 2, 0) == b"xz"


def test_zeros_with_write_protection_report_the_first_store(scene: Scene) -> None:
    scene.uffd.register(scene.at, PAGES * PAGE_SIZE)
    scene.uffd.copy_zeros(scene.page(3), PAGE_SIZE, wp=True)
    assert load(scene.page(3)) == b"\0"
    thread = Accessing(lambda: store(scene.page(3) + 9, b"x"))
    assert scene.events() == [PageFault(scene.page(3) + 9, True, True, thread.tid)]
    scene.uffd.write_protect(scene.page(3), PAGE_SIZE, False)
    thread.join()
    assert os.pread(scene.file, 1, 3 * PAGE_SIZE + 9) == b"x"


def test_a_thread_stays_asleep_without_wake(scene: Scene) -> None:
    os.pwrite(scene.file, b"a", 0)
    scene.uffd.register(scene.at, PAGES * PAGE_SIZE)
    scene.uffd.write_protect(scene.at, PAGES * PAGE_SIZE, True)
    thread = Accessing(lambda: store(scene.page(0), b"x"))
    scene.events()
    scene.uffd.write_protect(scene.page(0), PAGE_SIZE, False, wake=False)
    assert os.pread(scene.file, 1, 0) == b"a"
    scene.uffd.wake(scene.page(0), PAGE_SIZE)
    thread.join()
    assert os.pread(scene.file, 1, 0) == b"x"


def test_poison_fails_a_system_call_and_needs_the_protection_to_end_first(scene: Scene) -> None:
    os.pwrite(scene.file, b"a" * PAGE_SIZE, 0)
    scene.uffd.register(scene.at, PAGES * PAGE_SIZE)
    scene.uffd.write_protect(scene.page(1), PAGE_SIZE, True)
    for present in (0, 1):
        if not present:
            load(scene.page(0))
        with pytest.raises(PagePresent):
            scene.uffd.poison(scene.page(present), PAGE_SIZE)
    scene.uffd.write_protect(scene.page(1), PAGE_SIZE, False, wake=False)
    scene.uffd.poison(scene.page(1), PAGE_SIZE)
    reader, writer = os.pipe()
    assert libc.write(writer, scene.page(1), 1) == -1
    assert ctypes.get_errno() == errno.EFAULT
    os.close(reader)
    os.close(writer)


def test_a_fork_is_an_event_with_the_userfaultfd_of_the_child(scene: Scene) -> None:
    scene.uffd.register(scene.at, PAGES * PAGE_SIZE)
    thread = Accessing(lambda: libc.syscall(NR_FORK))
    (event,) = scene.events()
    assert isinstance(event, Forked)
    child = Userfaultfd(event.fd)
    assert not os.get_inheritable(child.fd)
    pid = thread.join()
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    with pytest.raises(AddressSpaceGone):
        child.copy_zeros(scene.page(3), PAGE_SIZE, wp=False)
    with pytest.raises(AddressSpaceGone):
        child.write_protect(scene.page(2), PAGE_SIZE, True)
    with pytest.raises(AddressSpaceGone):
        child.register(scene.at, PAGE_SIZE)
    child.close()


def test_a_fork_waits_for_a_free_descriptor(scene: Scene) -> None:
    scene.uffd.register(scene.at, PAGES * PAGE_SIZE)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    async def main() -> Event:
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
        try:
            with trio.move_on_after(0.5) as waited:
                await scarce.next_events(scene.uffd, trio.lowlevel.wait_readable)
            assert waited.cancelled_caught
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        with trio.fail_after(20):
            (event,) = await scarce.next_events(scene.uffd, trio.lowlevel.wait_readable)
        return event

    forking = Accessing(lambda: libc.syscall(NR_FORK))
    event = trio.run(main)
    assert isinstance(event, Forked)
    os.close(event.fd)
    pid = forking.join()
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_userfaultfd_that_is_closed_while_an_event_waits_is_not_read(scene: Scene) -> None:
    """The end of an address space comes between the wake-up of the reading task and its read."""

    async def closed_meanwhile(_: int) -> None:
        scene.uffd.close()

    async def main() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await scarce.next_events(scene.uffd, closed_meanwhile)

    trio.run(main)


def test_a_move_waits_for_its_event_and_requests_say_so(scene: Scene) -> None:
    """UFFD_FEATURE_EVENT_REMAP: the protection moves along."""
    scene.uffd.register(scene.at, PAGES * PAGE_SIZE)
    target = map_shared(scene.file, 4 * PAGE_SIZE)
    os.posix_fallocate(scene.file, 0, PAGES * PAGE_SIZE)
    scene.uffd.write_protect(scene.at, 4 * PAGE_SIZE, True)
    thread = Accessing(lambda: libc.mremap(scene.at, 4 * PAGE_SIZE, 4 * PAGE_SIZE, 3, target))
    select.select([scene.uffd.fd], [], [], 20)
    with pytest.raises(AddressSpaceChanging):
        scene.uffd.write_protect(scene.page(5), PAGE_SIZE, True)
    assert scene.uffd.read() == [Remapped(scene.at, target, 4 * PAGE_SIZE)]
    assert thread.join() == target
    storing = Accessing(lambda: store(target, b"x"))
    assert scene.events() == [PageFault(target, True, True, storing.tid)]
    scene.uffd.write_protect(target, PAGE_SIZE, False)
    storing.join()
    libc.munmap(target, 4 * PAGE_SIZE)


def test_an_unmapped_range_is_an_event_if_wanted() -> None:
    scene = Scene(userfaultfd.NEEDED | Feature.EVENT_UNMAP)
    scene.uffd.register(scene.at, PAGES * PAGE_SIZE)
    thread = Accessing(lambda: libc.munmap(scene.page(2), 3 * PAGE_SIZE))
    assert scene.events() == [Unmapped(scene.page(2), scene.page(5))]
    assert thread.join() == 0
    with pytest.raises(NotRegistered):
        scene.uffd.write_protect(scene.page(3), PAGE_SIZE, True)
    closing = Accessing(scene.close)
    while closing._thread.is_alive():
        try:
            scene.uffd.read()
        except OSError:
            break
    closing.join()


def test_errors_have_names(scene: Scene) -> None:
    with pytest.raises(NotRegistered, match=r"UFFDIO_REGISTER 0x1000, 4096 bytes: Invalid argument"):
        scene.uffd.register(PAGE_SIZE, PAGE_SIZE)
    with pytest.raises(NotRegistered):
        scene.uffd.register(scene.at + 1, PAGE_SIZE)
    with pytest.raises(NotRegistered):
        scene.uffd.copy_zeros(scene.at, PAGE_SIZE, wp=False)
    scene.uffd.register(scene.at, PAGES * PAGE_SIZE)
    other = userfaultfd.create()
    other.enable()
    with pytest.raises(RegisteredElsewhere):
        other.register(scene.at, PAGE_SIZE)
    other.close()
    for_reading = os.open(f"/proc/self/fd/{scene.file}", os.O_RDONLY)
    at = map_shared(for_reading, PAGE_SIZE, mmap.PROT_READ)
    with pytest.raises(NotWritable):
        scene.uffd.register(at, PAGE_SIZE)
    libc.munmap(at, PAGE_SIZE)
    os.close(for_reading)


def test_lacking_features_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert userfaultfd.missing() == []
    monkeypatch.setattr(userfaultfd, "available", lambda: Feature.PAGEFAULT_FLAG_WP | Feature.THREAD_ID)
    assert userfaultfd.missing(Feature.POISON | Feature.THREAD_ID | Feature.EVENT_FORK) == [
        "UFFD_FEATURE_EVENT_FORK",
        "UFFD_FEATURE_POISON",
    ]


def test_a_feature_that_no_kernel_has_is_unsupported() -> None:
    uffd = userfaultfd.create()
    with pytest.raises(Unsupported):
        uffd.enable(Feature(1 << 40))
    uffd.close()


def test_an_unprivileged_process_is_told_what_to_do() -> None:
    pid = os.fork()
    if not pid:
        os.setuid(65534)
        try:
            userfaultfd.create()
        except Unsupported as why:
            os._exit(0 if "become root" in str(why) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_request_after_the_close_has_no_descriptor() -> None:
    """A fault may be decided after its process has ended: its number may be another file's by then."""
    uffd = userfaultfd.create()
    number = uffd.fd
    uffd.close()
    other = userfaultfd.create()
    assert other.fd == number
    requests: tuple[Callable[[], None], ...] = (
        lambda: uffd.register(0, PAGE_SIZE),
        lambda: uffd.wake(0, PAGE_SIZE),
        lambda: uffd.write_protect(0, PAGE_SIZE, on=False),
        lambda: uffd.copy_zeros(0, PAGE_SIZE, wp=False),
        lambda: uffd.poison(0, PAGE_SIZE),
    )
    for request in requests:
        with pytest.raises(AddressSpaceGone):
            request()
    uffd.close()
    os.fstat(number)  # the other one is open
    other.close()
