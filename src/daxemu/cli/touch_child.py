"""Child process of ``daxemu load`` and ``daxemu store``: makes one access and reports the observation.

    python -m daxemu.cli.touch_child ORDER FILE      ORDER: the JSON of an Order

Reports are lines of JSON on standard output: ``{"signal": ...}`` for each SIGBUS, ``{"result": ...}`` for the
access. On a direct mount the child runs under ``daxemu run``, so its mapping is of the media.

SIGBUS is blocked except during the access and during the wait of ``hold``: the handler, which is Python,
interrupts no other Python. The handler of a fault cannot return, because the access would fault again: the
handler reports, and ends the process.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import sys
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from daxemu.host.tracer.siginfo import SIGINFO_SIZE, parse
from daxemu.uapi import BUS_ADRERR, BUS_MCEERR_AO, BUS_MCEERR_AR, PAGE_SIZE, page_align_down, page_align_up

CODES = {1: "BUS_ADRALN", BUS_ADRERR: "BUS_ADRERR", 3: "BUS_OBJERR", BUS_MCEERR_AR: "BUS_MCEERR_AR"}
CODES[BUS_MCEERR_AO] = "BUS_MCEERR_AO"
"""Names of si_code, of uapi/asm-generic/siginfo.h."""

_OUTPUT = 1  # standard output
# uapi/linux/prctl.h
_PR_SET_PDEATHSIG = 1
_PR_MCE_KILL = 33
_PR_MCE_KILL_SET = 1
_PR_MCE_KILL_EARLY = 1
_SA_SIGINFO = 4  # uapi/asm-generic/signal-defs.h
_MAP_FAILED = ctypes.c_void_p(-1).value

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
_SignalSet = ctypes.c_byte * 128

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long)
_libc.memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_libc.memcpy.restype = None


class _Sigaction(ctypes.Structure):
    """``struct sigaction`` of the C library."""

    _fields_ = (
        ("handler", _Handler),
        ("mask", _SignalSet),
        ("flags", ctypes.c_int),
        ("restorer", ctypes.c_void_p),
    )


@dataclass(frozen=True)
class Order:
    """The access to make. ``offset`` and ``length``: bytes of the file. ``data``: bytes to store, in hex;
    None for a load. ``by_call``: by pread(2) or pwrite(2) instead of a mapping. ``hold``: wait for signals
    afterwards, early ones included. ``parent``: process id; the child ends with its parent.
    """

    offset: int
    length: int
    data: str | None
    by_call: bool
    hold: bool
    parent: int


class OneAccess:
    """Access to a file, and the signals that the process gets."""

    def __init__(self, path: str, order: Order) -> None:
        self._path = path
        self._order = order
        self._done = bytearray()
        self._start = page_align_down(order.offset)
        self._address = 0
        self._is_waiting = False
        self._handler = _Handler(self._on_signal)

    def run(self) -> None:
        """Make the access and report the result. With ``hold``, report signals without end."""
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])
        action = _Sigaction(self._handler, flags=_SA_SIGINFO)
        _libc.sigaction(int(signal.SIGBUS), ctypes.byref(action), None)
        if self._order.hold:
            _libc.prctl(_PR_MCE_KILL, _PR_MCE_KILL_SET, _PR_MCE_KILL_EARLY, 0, 0)
        call = "open"
        try:
            flags = os.O_RDONLY if self._order.data is None else os.O_RDWR
            fd = os.open(self._path, flags | os.O_NONBLOCK | os.O_NOCTTY)
            call = self._call()
            self._access(fd)
        except OSError as error:
            _report("result", self._result(call, error.errno))
            return
        _report("result", self._result(call, None))
        if self._order.hold:
            self._wait()

    def _call(self) -> str:
        if self._order.by_call:
            return "pread" if self._order.data is None else "pwrite"
        return "mmap"

    def _access(self, fd: int) -> None:
        order = self._order
        data = None if order.data is None else bytes.fromhex(order.data)
        if order.by_call and data is None:
            self._done += os.pread(fd, order.length, order.offset)
        elif order.by_call and data is not None:
            self._done += data[: os.pwrite(fd, data, order.offset)]
        else:
            self._map(fd)
            self._copy(data)

    def _map(self, fd: int) -> None:
        end = page_align_up(self._order.offset + self._order.length)
        kind = mmap.PROT_READ | (0 if self._order.data is None else mmap.PROT_WRITE)
        at = _libc.mmap(None, end - self._start, kind, mmap.MAP_SHARED, fd, self._start)
        if at == _MAP_FAILED:
            raise OSError(number := ctypes.get_errno(), os.strerror(number))
        self._address = at

    def _copy(self, data: bytes | None) -> None:
        """Load or store in the order of addresses. The first byte of each page goes alone: memcpy(3) touches
        the bytes of a page in an order of its own, and the address of a fault would be any of these bytes.
        """
        order = self._order
        ours = ctypes.create_string_buffer(data or b"", order.length)
        at = order.offset
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGBUS])
        while at < order.offset + order.length:
            size = min(page_align_down(at) + PAGE_SIZE, order.offset + order.length) - at
            for first, count in ((at, 1), (at + 1, size - 1)):
                local = ctypes.addressof(ours) + first - order.offset
                target = self._address + first - self._start
                _libc.memcpy(*((local, target) if data is None else (target, local)), count)
            self._done += ours.raw[at - order.offset : at - order.offset + size]
            at += size
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGBUS])

    def _wait(self) -> NoReturn:
        self._is_waiting = True
        everything = _SignalSet()
        while True:
            _libc.sigsuspend(ctypes.byref(everything))

    def _on_signal(self, _number: int, info: int, _context: int) -> None:
        found = parse(ctypes.string_at(info, SIGINFO_SIZE))
        offset = found.addr - self._address + self._start
        is_inside = self._start <= offset < page_align_up(self._order.offset + self._order.length)
        report = {
            "signal": signal.Signals(found.signo).name,
            "code": CODES.get(found.code, str(found.code)),
            "address": found.addr,
            "offset": offset if is_inside else None,
            "lsb": found.lsb if found.code in (BUS_MCEERR_AR, BUS_MCEERR_AO) else None,
        }
        _report("signal", report)
        if not self._is_waiting and found.code != BUS_MCEERR_AO:
            _report("result", self._result("load" if self._order.data is None else "store", None))
            os._exit(0)

    def _result(self, call: str, number: int | None) -> dict[str, Any]:
        by_mapping = "load" if self._order.data is None else "store"
        return {
            "call": by_mapping if call == "mmap" and number is None else call,
            "offset": self._order.offset,
            "length": self._order.length,
            "bytes": self._done.hex(),
            "errno": number,
        }


def _report(kind: str, value: dict[str, Any]) -> None:
    line = json.dumps({kind: value}).encode() + b"\n"
    while line:
        line = line[os.write(_OUTPUT, line) :]


def argument(order: Order) -> str:
    """Return the ORDER argument of the command line."""
    return json.dumps(asdict(order))


def main() -> None:
    """Run an order. The process ends with its parent."""
    order = Order(**json.loads(sys.argv[1]))
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() == order.parent:
        OneAccess(sys.argv[2], order).run()


if __name__ == "__main__":
    main()
