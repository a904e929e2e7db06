"""Programs whose madvise(MADV_HWPOISON) and madvise(MADV_SOFT_OFFLINE) on files of a daxemu mount work, and
which may have direct mappings (``helper``).

Counterpart in Linux: do_madvise() and the page table walk of madvise_inject_error() in mm/madvise.c. The
supervisor does the work of memory_failure().

The program is not traced. The program runs in the very process that called ``daxemu run``, under a seccomp
filter that gives these calls to a *helper* process (``seccomp``): process id, parent, terminal, signals,
stops and exit status stay the program's own. A debugger can trace the program, and so can the supervisor's
tracer, for exact signals.

States of the helper: answering -> the last process under the filter is gone -> the helper ends.

Invariants:
- the helper is no child of the program, has a session of its own, and has no file open that the program was
  given;
- each call gets one answer, from a thread of its own: a failure waits for the signals of other processes,
  which may be in such a call, too;
- a range that overlaps a daxemu mapping is never given to the real kernel, which might poison real memory.
"""

from __future__ import annotations

import array  # noqa: F401 - of socket.send_fds(): an import under the filter may need the helper's answer
import contextlib
import ctypes
import errno
import os
import select
import signal
import socket
import struct
import threading
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, NoReturn

from daxemu.errors import DaxemuError, NotMounted
from daxemu.host.proc import maps, status
from daxemu.host.proc.maps import Vma
from daxemu.host.proc.mountinfo import Mount, mounts
from daxemu.host.proc.pagemap import Pagemap
from daxemu.host.run import filters, forward_in_c, seccomp
from daxemu.host.run.helper import Attach, Helper
from daxemu.host.run.seccomp import CONTINUE, Answer, NotifiedCall
from daxemu.uapi import (
    CAP_SYS_ADMIN,
    MADV_SOFT_OFFLINE,
    PAGE_SIZE,
    U64_MAX,
    page_align_up,
)
from daxemu.units import PFN_PHYS, PHYS_PFN

_BATCH = 1024  # pages probed by one call: IOV_MAX of uapi/linux/uio.h

_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t


class Piece(NamedTuple):
    """Pages of a process that map a file: ``length`` bytes from ``address``, file offset ``offset`` on."""

    mount: Mount
    address: int
    ino: int
    offset: int
    length: int


Advise = Callable[[int, Piece, bool], int]
"""Make a piece fail, or go offline softly, in the name of a thread; returns the system call's errno or 0.
Called in any thread; may raise DaxemuError.
"""


def execute(command: list[str], only: Mount | None, advise: Advise, attach: Attach | None = None) -> NoReturn:
    """Become ``command``, with the calls above answered for ``only``, or for all mounts, later ones included.

    ``attach``: also give the program direct mappings (``helper``); None: the small filter. Precondition: no
    other threads. Raises the exceptions of ``seccomp.install`` and ``filters.direct``; OSError if the program
    does not exist.
    """
    code = filters.small() if attach is None else filters.direct()
    if attach is not None:
        forward_in_c.library()  # raises before there is a filter
    ours, theirs = socket.socketpair()
    first = os.fork()
    if first == 0:
        # The helper's parent must not be the program, which may wait for its own children.
        if os.fork() == 0:
            ours.close()
            _help(theirs, only, advise, attach)
        os._exit(0)
    theirs.close()
    with contextlib.suppress(ChildProcessError):  # SIGCHLD is ignored: the kernel has reaped it
        os.waitpid(first, 0)
    listener = seccomp.install(code)
    with ours:
        socket.send_fds(ours, [b"x"], [listener])
    os.close(listener)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these two for itself
        signal.signal(number, signal.SIG_DFL)
    os.execvp(command[0], command)


def _help(sock: socket.socket, only: Mount | None, advise: Advise, attach: Attach | None) -> NoReturn:
    """Run the helper until the last process under the filter has ended."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP):
            signal.signal(number, signal.SIG_IGN)  # the helper ends with the program
        os.setsid()
        os.chdir("/")
        _close_all_but(sock.fileno())
        _, fds, _, _ = socket.recv_fds(sock, 1, 1)
        sock.close()
        if fds and attach is None:
            serve(fds[0], only, advise)
        elif fds and attach is not None:
            Helper(fds[0], only, partial(_answer, fds[0], only=only, advise=advise), attach).serve()
    finally:
        os._exit(0)


def _close_all_but(kept: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != kept:
            with contextlib.suppress(OSError):  # descriptor of the listing
                os.close(int(name))


def serve(listener: int, only: Mount | None, advise: Advise) -> None:
    """Answer calls until the last process under the filter is gone."""
    poller = select.poll()
    poller.register(listener, select.POLLIN)
    while True:
        for _, events in poller.poll():
            if events & select.POLLIN:
                if (call := seccomp.receive(listener)) is not None:
                    threading.Thread(target=_answer, args=(listener, call, only, advise), daemon=True).start()
            elif events:
                return


def _answer(listener: int, call: NotifiedCall, only: Mount | None, advise: Advise) -> None:
    result = Answer(error=errno.EIO)  # for failures of the helper: no supervisor, not permitted to read /proc
    try:
        with contextlib.suppress(OSError, NotMounted):
            result = _do_madvise(listener, call, only, advise)
    except DaxemuError as error:
        result = Answer(error=error.errno)
    finally:
        seccomp.answer(listener, call, result)


def _do_madvise(listener: int, call: NotifiedCall, only: Mount | None, advise: Advise) -> Answer:
    """``do_madvise()`` and ``madvise_inject_error()``."""
    start, length, advice = call.args[:3]
    if start % PAGE_SIZE:
        return Answer(error=errno.EINVAL)
    end = start + page_align_up(length)
    if end > U64_MAX:
        return Answer(error=errno.EINVAL)
    here = [only] if only is not None else mounts()
    vmas = sorted(
        (vma, mount)
        for mount in {mount.dev: mount for mount in here}.values()
        for vma in maps.read(call.tid, mount.dev)
        if vma.start < end and vma.end > start
    )
    if not vmas:
        return CONTINUE
    if not all(_is_capable(call.tid, mount) for mount in {mount for _, mount in vmas}):
        return Answer(error=errno.EPERM)
    pieces, error = _walk(call.tid, start, end, vmas)
    if not seccomp.is_waiting(listener, call):
        return Answer(error=errno.EINTR)  # the caller is dead
    soft = advice & 0xFFFFFFFF == MADV_SOFT_OFFLINE
    for piece in pieces:
        if failed := advise(call.tid, piece, soft):
            return Answer(error=failed)
    return Answer(error=error)


def _walk(tid: int, start: int, end: int, vmas: list[tuple[Vma, Mount]]) -> tuple[list[Piece], int]:
    """``get_user_pages_fast()`` for each page: return the pieces before the first page that is not available,
    and its errno.

    EFAULT, as in the kernel, when a page cannot be read; EINVAL where the mapping is not of a daxemu file.
    """
    pieces = []
    for vma, mount in vmas:
        if vma.start > start:
            break
        stop = min(end, vma.end)
        good = start + PFN_PHYS(fault_in(tid, start, PHYS_PFN(stop - start)))
        ours = start + PFN_PHYS(_files_own(tid, start, PHYS_PFN(good - start)))
        if ours > start:
            offset = PFN_PHYS(vma.pgoff) + start - vma.start
            pieces.append(Piece(mount, start, vma.ino, offset, ours - start))
        if ours < good:
            return pieces, errno.EINVAL
        if good < stop:
            return pieces, errno.EFAULT
        start = stop
    if start == end:
        return pieces, 0
    return pieces, errno.EINVAL if fault_in(tid, start, 1) else errno.EFAULT


def fault_in(tid: int, start: int, count: int) -> int:
    """Make pages present by reading a byte of each. Return the number of pages before the first that cannot
    be read.
    """
    for done in range(0, count, _BATCH):
        batch = min(_BATCH, count - done)
        buffer = ctypes.create_string_buffer(batch)
        first = start + PFN_PHYS(done)
        remote = b"".join(struct.pack("=QQ", first + page * PAGE_SIZE, 1) for page in range(batch))
        local = struct.pack("=QQ", ctypes.addressof(buffer), batch)
        got = _libc.process_vm_readv(tid, local, 1, remote, batch, 0)
        if got < 0:
            number = ctypes.get_errno()
            if number != errno.EFAULT:
                raise OSError(number, f"process_vm_readv {tid}: {os.strerror(number)}")
            got = 0
        if got < batch:
            return done + int(got)
    return count


def _files_own(tid: int, start: int, count: int) -> int:
    """Return the number of pages, from the first on, that belong to the file and are no private copy (CoW) of
    the process.
    """
    with Pagemap(tid) as pagemap:
        entries = pagemap.entries(start, count)
    for index, entry in enumerate(entries):
        if entry.present and not entry.is_file:
            return index
    return count


def _is_capable(tid: int, mount: Mount) -> bool:
    """``capable(CAP_SYS_ADMIN)``. In the emulated machine the mount's owner has the capability, too."""
    found = status.read(tid)
    return found.euid in (0, mount.socket.stat().st_uid) or found.has_capability(CAP_SYS_ADMIN)
