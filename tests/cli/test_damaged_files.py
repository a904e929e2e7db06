"""Garbage in small files of a DEVICE: each verb without a mount prints one line, with the right exit
status.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from daxemu.cli.main import main
from tests.support.core import core_at
from tests.support.mount import dax_mount_at

VERBS = ("page-types", "fsck", "log", "status", "mkfs")
OK = (0, 0, 0, 3, 0)
"""Exit statuses of VERBS on a sound device that a killed machine has left; status wants a mount."""
REFUSED = (3, 3, 3, 3, 3)
NO_POISON_LIST = (0, 3, 0, 3, 0)
NO_STRUCT_PAGES = (3, 0, 0, 3, 0)


@pytest.fixture(scope="module")
def left_behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Make the files of a killed machine."""
    with core_at() as core:
        core.file(b"f", b"data")
        core.fs.commit()
        core.pmem.make_struct_pages()
        core.pmem.show_in_sysfs()
        made = tmp_path_factory.mktemp("left") / "device"
        shutil.copytree(core.path, made)
        yield made


def put(name: str, data: bytes) -> Callable[[Path], None]:
    def harm(device: Path) -> None:
        (device / name).write_bytes(data)

    return harm


def cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda device: os.truncate(device / name, size)


def fifo(name: str) -> Callable[[Path], None]:
    def harm(device: Path) -> None:
        path = device / name
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    return harm


JUNK = bytes(range(256)) * 16
HARM: dict[str, tuple[Callable[[Path], None], tuple[int, ...]]] = {
    "nothing": (lambda device: None, OK),
    "spans": (put("struct_page/spans/data.ninja", JUNK), NO_STRUCT_PAGES),
    "spans of another shape": (put("struct_page/spans/shape.ninja", JUNK), NO_STRUCT_PAGES),
    "spans of another type": (put("struct_page/spans/dtype.ninja", b"complex128"), NO_STRUCT_PAGES),
    "sections cut off": (cut("struct_page/sections/data.ninja", 0), NO_STRUCT_PAGES),
    "pages cut off": (cut("struct_page/pages/data.ninja", 100), NO_STRUCT_PAGES),
    "pages of no type": (put("struct_page/pages/dtype.ninja", b"\xff\xfe"), NO_STRUCT_PAGES),
    "struct_page is a FIFO": (fifo("struct_page"), REFUSED),
    "spans is a FIFO": (fifo("struct_page/spans/data.ninja"), REFUSED),
    "sysfs": (put("sysfs/badblocks", JUNK), OK),
    "sysfs counters": (put("sysfs/memory_failure/total", b"-1 many"), OK),
    "sysfs is a FIFO": (fifo("sysfs"), REFUSED),
    "poison is text": (put("poison", b"everything\n"), NO_POISON_LIST),
    "poison is no text": (put("poison", JUNK), NO_POISON_LIST),
    "poison beyond the device": (put("poison", b"16384 1\n"), NO_POISON_LIST),
    "poison of negative length": (put("poison", b"8 -8\n"), NO_POISON_LIST),
    "poison of huge numbers": (put("poison", b"9" * 5000 + b" 1\n"), NO_POISON_LIST),
    "poison is a FIFO": (fifo("poison"), REFUSED),
    "events that are no text": (put("events.jsonl", b'{"event":"Unmounted","mountpoint":"\xff"}\n'), OK),
    "events that are deep": (put("events.jsonl", b'{"event":"Unmounted","x":' + b"[" * 100000), OK),
    "events": (
        put("events.jsonl", JUNK + b'\n{"event":"Unmounted","seq":1,"time":1e300,"mountpoint":"m"}\n'),
        OK,
    ),
}


def run(verb: str, device: Path) -> tuple[int, str]:
    """Run a verb. Return the exit status and the error line; unexpected exceptions propagate."""
    arguments = [verb, str(device), *(["--size", "8M", "--force"] if verb == "mkfs" else [])]
    done = CliRunner().invoke(main, arguments)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.stderr


@pytest.mark.parametrize("name", HARM)
@pytest.mark.filterwarnings("error")
def test_a_verb_says_one_line(left_behind: Path, tmp_path: Path, name: str) -> None:
    harm, expected = HARM[name]
    device = tmp_path / "device"
    shutil.copytree(left_behind, device)
    harm(device)
    statuses = []
    for verb in VERBS:
        status, said = run(verb, device)
        statuses.append(status)
        if status:
            assert said.startswith("daxemu: "), (verb, said)
            assert said.count("\n") == 1, (verb, said)
    assert dict(zip(VERBS, statuses, strict=True)) == dict(zip(VERBS, expected, strict=True))


@pytest.mark.mount
@pytest.mark.parametrize(
    "name", ["spans", "spans is a FIFO", "sysfs", "sysfs is a FIFO", "poison is no text"]
)
def test_a_mount_makes_them_anew_or_says_one_line(tmp_path: Path, name: str) -> None:
    harm, expected = HARM[name]
    with dax_mount_at(tmp_path, "16M") as made:
        (made.path / "f").write_bytes(b"data")
        running = made.device.with_name(made.device.name + "-running")
        shutil.copytree(made.device / "struct_page", running)
        made.umount()
        shutil.copytree(running, made.device / "struct_page", copy_function=shutil.copyfile)
        shutil.rmtree(running)
        harm(made.device)
        if expected[1]:
            said = made.run("mount", made.device, made.path, status=3)
            assert said.count("\n") == 1
            made.sound = False
            return
        made.mount()
        assert (made.path / "f").read_bytes() == b"data"
        assert made.json("page-types", made.device)["pages"] > 0
        assert (made.device / "sysfs" / "badblocks").read_bytes() == b""
