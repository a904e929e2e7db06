"""``daxemu load`` and ``daxemu store``: one access, and the bytes, errno or siginfo that a program gets."""

from __future__ import annotations

import errno
import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.mount import DAXEMU, PATIENCE, DaxMount

pytestmark = pytest.mark.mount
PAGE = 4096
BAD = 3
"""Page to poison."""
AT = BAD * PAGE
AR = {"signal": "SIGBUS", "code": "BUS_MCEERR_AR", "lsb": 12}


def load(mount: DaxMount, offset: int, length: int, *options: str) -> dict[str, Any]:
    found = mount.json("load", mount.path / "f", "--offset", offset, "--length", length, *options)
    assert isinstance(found, dict)
    return found


def store(mount: DaxMount, offset: int, *options: str) -> dict[str, Any]:
    found = mount.json("store", mount.path / "f", "--offset", offset, *options)
    assert isinstance(found, dict)
    return found


def without_addresses(signals: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return signals less si_addr, which the test cannot know: the offset stands for it."""
    return [{name: value for name, value in each.items() if name != "address"} for each in signals]


@pytest.fixture
def file(dax_mount: DaxMount) -> Path:
    return dax_mount.make_file("f", 8)


@pytest.mark.parametrize("how", ["--map", "--syscall"])
def test_load_gets_the_bytes(dax_mount: DaxMount, file: Path, how: str) -> None:
    result = load(dax_mount, AT - 2, 4, how)
    assert (bytes.fromhex(result["bytes"]), result["errno"], result["signals"]) == (b"CCDD", None, [])


@pytest.mark.parametrize("how", ["--map", "--syscall"])
@pytest.mark.parametrize(
    ("options", "stored"),
    [(("--text", "häh"), "häh".encode()), (("--byte", "0xff", "--length", "3"), b"\xff" * 3)],
)
def test_store_is_seen_by_read(
    dax_mount: DaxMount, file: Path, how: str, options: tuple[str, ...], stored: bytes
) -> None:
    result = store(dax_mount, AT - 1, *options, how)
    assert (bytes.fromhex(result["bytes"]), result["signals"]) == (stored, [])
    assert file.read_bytes()[AT - 2 : AT - 1 + len(stored)] == b"C" + stored


@pytest.mark.parametrize("kind", [(), ("--latent",)])
def test_a_load_of_poison_is_the_siginfo_of_ar(
    dax_mount: DaxMount, file: Path, kind: tuple[str, ...]
) -> None:
    dax_mount.run("inject", file, "--offset", AT, *kind)
    result = load(dax_mount, AT + 100, 16)
    assert without_addresses(result["signals"]) == [{**AR, "offset": AT + 100}]
    assert result["signals"][0]["address"] % PAGE == 100
    assert (result["bytes"], result["errno"]) == ("", None)


@pytest.mark.parametrize("length", [3, 12, 40, PAGE])
def test_the_address_of_a_load_is_its_first_byte(dax_mount: DaxMount, file: Path, length: int) -> None:
    """memcpy(3) loads the last 8 bytes of 12 first."""
    dax_mount.run("inject", file, "--offset", AT)
    assert without_addresses(load(dax_mount, AT, length)["signals"]) == [{**AR, "offset": AT}]


def test_a_load_across_pages_has_the_bytes_before_the_poison(dax_mount: DaxMount, file: Path) -> None:
    dax_mount.run("inject", file, "--offset", AT)
    result = load(dax_mount, AT - 4, 2 * PAGE)
    assert bytes.fromhex(result["bytes"]) == b"CCCC"
    assert without_addresses(result["signals"]) == [{**AR, "offset": AT}]


def test_a_store_to_poison_is_the_siginfo_of_ar(dax_mount: DaxMount, file: Path) -> None:
    dax_mount.run("inject", file, "--offset", AT)
    result = store(dax_mount, AT + 8, "--byte", "1")
    assert without_addresses(result["signals"]) == [{**AR, "offset": AT + 8}]
    assert result["bytes"] == ""


def test_a_read_of_poison_is_an_errno(dax_mount: DaxMount, file: Path) -> None:
    dax_mount.run("inject", file, "--offset", AT)
    result = load(dax_mount, AT, 16, "--syscall")
    assert (result["call"], result["errno"], result["signals"]) == ("pread", errno.EIO, [])
    shown = dax_mount.run("load", file, "--offset", AT, "--syscall")
    assert shown == "pread: EIO (Input/output error)\n"


def test_a_write_of_the_whole_page_clears_the_poison(dax_mount: DaxMount, file: Path) -> None:
    dax_mount.run("inject", file, "--offset", AT)
    result = store(dax_mount, AT, "--byte", "0x41", "--length", "4K", "--syscall")
    assert (len(result["bytes"]), result["errno"]) == (2 * PAGE, None)
    assert bytes.fromhex(load(dax_mount, AT, 2)["bytes"]) == b"AA"


def test_past_the_end(dax_mount: DaxMount, file: Path) -> None:
    (signalled,) = load(dax_mount, 8 * PAGE, 1)["signals"]
    assert (signalled["code"], signalled["offset"], signalled["lsb"]) == ("BUS_ADRERR", 8 * PAGE, None)
    assert dax_mount.run("load", file, "--offset", 8 * PAGE, "--syscall") == "pread: returned 0 of 16 bytes\n"


def test_a_missing_file_and_a_removed_device_are_an_errno_of_open(dax_mount: DaxMount, file: Path) -> None:
    missing = dax_mount.json("load", dax_mount.path / "missing")
    assert (missing["call"], missing["errno"]) == ("open", errno.ENOENT)
    dax_mount.run("remove", dax_mount.path)
    dax_mount.sound = False
    assert (load(dax_mount, 0, 1)["call"], load(dax_mount, 0, 1)["errno"]) == ("open", errno.EIO)


def test_the_output_for_people(dax_mount: DaxMount, file: Path) -> None:
    shown = dax_mount.run("load", file, "--offset", AT - 16, "--length", 48)
    assert shown.splitlines() == [
        f"0x00002ff0  {'43 ' * 16} |CCCCCCCCCCCCCCCC|",
        f"0x00003000  {'44 ' * 16} |DDDDDDDDDDDDDDDD|",
        "*",
        "0x00003020",
    ]
    assert dax_mount.run("store", file, "--text", "abc") == "store: 3 bytes\n"
    dax_mount.run("inject", file, "--offset", AT)
    assert dax_mount.run("load", file, "--offset", AT) == (
        "SIGBUS: si_code BUS_MCEERR_AR, si_addr at file offset 0x3000, si_addr_lsb 12\n"
    )


@contextmanager
def holding(file: Path) -> Iterator[tuple[subprocess.Popen[str], Any, int]]:
    """Run ``load --hold``. Yield the process, its first report, and the process id of its child."""
    command = [*DAXEMU, "load", str(file), "--offset", str(AT), "--hold", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            first = report(process)
            (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            pidfd = os.pidfd_open(int(child))
            yield process, first, int(child)
            assert select.select([pidfd], [], [], PATIENCE)[0], "the child outlives its parent"
            os.close(pidfd)
        finally:
            with suppress(ProcessLookupError):
                process.kill()


def report(process: subprocess.Popen[str]) -> Any:
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], PATIENCE)[0]
    return json.loads(process.stdout.readline())


def test_a_held_page_gets_ao_until_ctrl_c(dax_mount: DaxMount, file: Path) -> None:
    with holding(file) as (process, first, _):
        assert bytes.fromhex(first["result"]["bytes"]) == b"D" * 16
        dax_mount.run("inject", file, "--offset", AT)
        signalled = without_addresses([report(process)["signal"]])
        assert signalled == [{**AR, "code": "BUS_MCEERR_AO", "offset": AT}]
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE) == 130


def test_a_held_page_ends_with_its_parent(dax_mount: DaxMount, file: Path) -> None:
    with holding(file) as (process, _, child):
        assert Path(f"/proc/{child}").exists()
        process.kill()


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (("store", "--byte", "256"), "expected a value from 0 to 255"),
        (("store",), "either --byte or --text"),
        (("store", "--byte", "1", "--text", "a"), "either --byte or --text"),
        (("store", "--text", "a", "--length", "2"), "--length belongs to --byte"),
        (("store", "--text", ""), "at least one byte"),
        (("store", "--byte", "1", "--length", "1G"), "give at most 1048576 bytes"),
        (("load", "--length", "1G"), "give at most 1048576 bytes"),
        (("load", "--length", "0"), "at least one byte"),
        (("load", "--offset", str(1 << 63)), "no file is that large"),
        (("load", "--hold", "--syscall"), "without --syscall"),
    ],
)
def test_refusals(dax_mount: DaxMount, words: tuple[str, ...], refusal: str) -> None:
    verb, *options = words
    assert refusal in dax_mount.run(verb, dax_mount.path / "f", *options, status=2)


def test_a_file_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"a")
    done = subprocess.run([*DAXEMU, "load", tmp_path / "f"], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (3, "")
    assert "is not on a daxemu mount" in done.stderr
