"""load and store: make one access to a file in a process of its own, and print what a program gets."""

from __future__ import annotations

import errno
import json
import mmap
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

import click

from daxemu.cli.common import PATH_TEXT, SIZE, F, connect, emit, json_option
from daxemu.cli.output import say, say_json
from daxemu.cli.touch_child import Order, argument
from daxemu.errors import InvalidArgument

LIMIT = 1 << 20
"""Maximum length of an access in bytes: the output shows each byte."""
_ROW = 16
"""Bytes in a line of output."""


def _access_options(command: F) -> F:
    command = click.option(
        "--map/--syscall",
        "by_mapping",
        default=True,
        help="Through a shared mapping (default), or by pread(2) or pwrite(2).",
    )(command)
    return click.option("--offset", type=SIZE, default=0, help="Bytes; default: 0.")(command)


@click.command()
@click.argument("file", type=PATH_TEXT)
@_access_options
@click.option("--length", type=SIZE, default=_ROW, show_default=True, help="Bytes, at most 1M.")
@click.option(
    "--hold", is_flag=True, help="Keep the mapping, and print each signal as it comes, until Ctrl-C."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; with --hold, one a line.")
def load(file: str, by_mapping: bool, offset: int, length: int, hold: bool, as_json: bool) -> None:
    """Load bytes of FILE as a program does, and print what the program gets: the bytes, an errno, or the
    siginfo of a SIGBUS with its address as an offset in the file.

    A process of its own makes the access; on a direct mount under daxemu run, so that its mapping is of the
    media. Exit status 0 whatever the process gets. With --hold the process asks for early signals (AO) by
    prctl(PR_MCE_KILL): one at the failure, without an access.

    \b
    Example:
      daxemu load /tmp/pmem/db --offset 8K
      daxemu load /tmp/pmem/db --offset 8K --syscall
      daxemu load /tmp/pmem/db --offset 8K --hold
    """
    if hold and not by_mapping:
        raise InvalidArgument("--hold keeps a mapping: give it without --syscall")
    _check(offset, length)
    order = Order(offset, length, None, not by_mapping, hold, os.getpid())
    if not hold:
        result = _access(file, order)
        emit(result, as_json, lambda: _lines(result))
        return
    with _reports(file, order) as reports:
        for kind, report in reports:
            if as_json:
                say_json({kind: report})
            else:
                say(*([_signal_line(report)] if kind == "signal" else _result_lines(report, hold=True)))


@click.command()
@click.argument("file", type=PATH_TEXT)
@_access_options
@click.option("--byte", type=SIZE, help="Value from 0 to 255 to store.")
@click.option(
    "--length", type=SIZE, help="With --byte: store the value this many times, at most 1M; default: 1."
)
@click.option("--text", help="Text to store.")
@json_option
def store(
    file: str,
    by_mapping: bool,
    offset: int,
    byte: int | None,
    length: int | None,
    text: str | None,
    as_json: bool,
) -> None:
    """Store bytes in FILE as a program does, and print what the program gets: success, an errno, or the
    siginfo of a SIGBUS with its address as an offset in the file.

    A process of its own makes the access; on a direct mount under daxemu run, so that its mapping is of the
    media. Exit status 0 whatever the process gets.

    \b
    Example:
      daxemu store /tmp/pmem/db --offset 8K --text hello
      daxemu store /tmp/pmem/db --offset 8K --byte 0 --length 4K --syscall
    """
    data = _data(byte, length, text)
    _check(offset, len(data))
    result = _access(file, Order(offset, len(data), data.hex(), not by_mapping, False, os.getpid()))
    emit(result, as_json, lambda: _lines(result))


def _data(byte: int | None, length: int | None, text: str | None) -> bytes:
    if (byte is None) == (text is None):
        raise InvalidArgument("give the bytes to store: either --byte or --text")
    if text is not None:
        if length is not None:
            raise InvalidArgument("--length belongs to --byte: give --text alone")
        return os.fsencode(text)
    if byte is None or byte > 0xFF:
        raise InvalidArgument(f"--byte is {byte}: expected a value from 0 to 255")
    if length is not None and length > LIMIT:
        raise InvalidArgument(_too_long(length))
    return bytes([byte]) * (1 if length is None else length)


def _check(offset: int, length: int) -> None:
    if not length:
        raise InvalidArgument("the length is 0: give at least one byte")
    if length > LIMIT:
        raise InvalidArgument(_too_long(length))
    if offset + length > sys.maxsize - LIMIT:
        raise InvalidArgument(f"offset {offset}: no file is that large")


def _too_long(length: int) -> str:
    return f"{length} bytes are too many for one access: give at most {LIMIT} bytes"


def _access(file: str, order: Order) -> dict[str, Any]:
    signals = []
    result: dict[str, Any] = {}
    with _reports(file, order) as reports:
        for kind, report in reports:
            if kind == "signal":
                signals.append(report)
            else:
                result = report
    return {**result, "signals": signals}


@contextmanager
def _reports(file: str, order: Order) -> Iterator[Iterator[tuple[str, dict[str, Any]]]]:
    """Start the child. Yield its reports as pairs of kind and value; a death by a signal is a report, too.

    The child does not outlive the block. Raises NotMounted for a file elsewhere. If the child cannot begin,
    the child prints the reason, and this process exits with the child's exit status.
    """
    with connect(file) as client:
        is_direct = client.request("status").get("mode") == "direct"
        mountpoint = str(client.mount.mountpoint)
    child = [sys.executable, "-P", "-m", "daxemu.cli.touch_child", argument(order), file]
    if is_direct and not _can_map(file):
        child = [sys.executable, "-P", "-m", "daxemu", "run", mountpoint, "--", *child]
    with subprocess.Popen(child, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            yield _until_the_end(process, process.stdout, order)
        finally:
            process.kill()


def _can_map(file: str) -> bool:
    """Return whether this process can map a file of a direct mount. Such a process is under daxemu run
    already, and daxemu run does not nest. False for an empty file.
    """
    try:
        fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK)
        try:
            mmap.mmap(fd, 1, prot=mmap.PROT_READ).close()
        finally:
            os.close(fd)
    except (OSError, ValueError):  # ValueError: an empty file
        return False
    return True


def _until_the_end(
    process: subprocess.Popen[bytes], output: IO[bytes], order: Order
) -> Iterator[tuple[str, dict[str, Any]]]:
    is_done = False
    for line in output:
        ((kind, report),) = json.loads(line).items()
        is_done |= kind == "result"
        yield kind, report
    status = process.wait()
    if status < 0:
        death = {"signal": signal.Signals(-status).name, "code": None, "address": None, "offset": None}
        yield "signal", {**death, "lsb": None}
    if status < 0 and not is_done:
        call = "load" if order.data is None else "store"
        yield (
            "result",
            {"call": call, "offset": order.offset, "length": order.length, "bytes": "", "errno": None},
        )
    elif status > 0:
        click.get_current_context().exit(status)


def _lines(result: dict[str, Any]) -> list[str]:
    return [*map(_signal_line, result["signals"]), *_result_lines(result)]


def _signal_line(report: dict[str, Any]) -> str:
    if report["code"] is None:
        return f"the process was killed by {report['signal']}"
    line = f"{report['signal']}: si_code {report['code']}, si_addr {_place(report)}"
    return line if report["lsb"] is None else f"{line}, si_addr_lsb {report['lsb']}"


def _place(report: dict[str, Any]) -> str:
    if report["offset"] is None:
        return f"{report['address']:#x}, outside of the mapping"
    return f"at file offset {report['offset']:#x}"


def _result_lines(result: dict[str, Any], *, hold: bool = False) -> list[str]:
    if result["errno"] is not None:
        number = result["errno"]
        return [f"{result['call']}: {errno.errorcode.get(number, number)} ({os.strerror(number)})"]
    done = bytes.fromhex(result["bytes"])
    is_whole = len(done) == result["length"]
    if result["call"] in ("store", "pwrite"):
        lines = [f"{result['call']}: {len(done)} bytes"] if done or is_whole else []
    else:
        lines = list(_dump(done, result["offset"]))
    if result["call"] in ("pread", "pwrite") and not is_whole:
        lines.append(f"{result['call']}: returned {len(done)} of {result['length']} bytes")
    return [*lines, "mapped: waiting for signals until Ctrl-C"] if hold and is_whole else lines


def _dump(data: bytes, offset: int) -> Iterator[str]:
    """Yield rows of 16 bytes. Rows that equal the row before are one line ``*``, as in hexdump(1)."""
    before = b""
    is_repeated = False
    for at in range(0, len(data), _ROW):
        row = data[at : at + _ROW]
        if row == before:
            if not is_repeated:
                yield "*"
            is_repeated = True
            continue
        shown = "".join(chr(value) if 0x20 <= value < 0x7F else "." for value in row)
        yield f"{offset + at:#010x}  {row.hex(' '):<{3 * _ROW - 1}}  |{shown}|"
        before, is_repeated = row, False
    if is_repeated:
        yield f"{offset + len(data):#010x}"
