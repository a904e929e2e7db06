"""A strategy attached to a device with data copies the data while the mount goes on."""

from __future__ import annotations

import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from daxemu.client import Client
from daxemu.errors import Busy, DaxemuError
from daxemu.host.proc.mountinfo import mount_at
from daxemu.supervisor import spawn as spawning
from daxemu.supervisor.settings import MountOptions
from daxemu.supervisor.spawn import spawn
from tests.support.quick import QuickMount
from tests.support.scene import PAGE
from tests.support.terminal import Terminal

pytestmark = [pytest.mark.mount, pytest.mark.timeout(120)]

PATIENCE = 20.0
PAGES = 2048
"""Pages of the file that exists before."""
SLOW = """
import time
from pathlib import Path
from daxemu.ranges import Range
from daxemu.repair.{module} import {base}

GATE = Path({gate!r})

class Slow({base}):
    def mounted(self, *, after_crash):
        for number, piece in enumerate(super().mounted(after_crash=after_crash)):
            yield piece
            time.sleep({pause})
            while GATE.exists() and GATE.stat().st_size < number:
                time.sleep(0.01)
                yield Range(0, 0)
"""


@dataclass
class Gate:
    """Gate to stop a strategy at ``strategy`` after two pieces of at least eight, until the test opens the
    gate.
    """

    strategy: Path
    kind: str

    def __post_init__(self) -> None:
        self._file = self.strategy.with_suffix(".gate")
        self._file.write_bytes(b"x")
        self.take(0)

    def take(self, pause: float) -> None:
        """Make each piece take ``seconds`` seconds."""
        code = SLOW.format(module=self.kind, base=self.kind.capitalize(), pause=pause, gate=str(self._file))
        self.strategy.write_text(code)

    def let_one_pass(self) -> None:
        """Let the strategy process one further piece."""
        if self._file.exists():
            with self._file.open("ab") as file:
                file.write(b"x")

    def open(self) -> None:
        """Let the strategy go on to the end."""
        self._file.unlink(missing_ok=True)


def _until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture(params=["mirror", "parity"])
def gate(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Gate]:
    made = Gate(tmp_path / "slow.py", request.param)
    try:
        yield made
    finally:
        made.open()


@pytest.fixture
def slow(gate: Gate) -> Path:
    """Strategy held by ``gate``."""
    return gate.strategy


@pytest.fixture
def written(quick_mount: QuickMount) -> QuickMount:
    """A mount with a file whose pages are all different."""
    (quick_mount.path / "f").write_bytes(random.Random(1).randbytes(PAGES * PAGE))
    return quick_mount


def _progress(client: Client) -> int | None:
    found = client.request("status")["repair"]["progress"]
    return None if found is None else int(found["done_bytes"])


def _survives(mount: QuickMount, name: str, pages: list[int], expected: bytes) -> None:
    """Poison pages, and check for no effect on any process."""
    mount.inject(name, *((page * PAGE, PAGE) for page in pages))
    with (mount.path / name).open("rb", buffering=0) as file:
        for page in pages:
            wanted = expected[page * PAGE : (page + 1) * PAGE]
            assert os.pread(file.fileno(), PAGE, page * PAGE) == wanted, f"page {page} of {name}"


def test_files_are_used_meanwhile(written: QuickMount, gate: Gate, slow: Path) -> None:
    """Files present at the start, changed, created and deleted during the copy are all protected in
    the end.
    """
    rng = random.Random(2)
    expected = bytearray((written.path / "f").read_bytes())
    others: dict[str, bytes] = {}
    answers = []
    with Client.at(written.path) as client, Client.at(written.path) as looking, ThreadPoolExecutor(1) as pool:
        with (written.path / "f").open("r+b", buffering=0) as file:
            begins = pool.submit(client.request, "repair", strategy=str(slow))
            _until(lambda: _progress(looking) is not None)
            while not begins.done():
                at = rng.randrange(PAGES * PAGE - 9000)
                data = rng.randbytes(rng.randrange(1, 9000))
                os.pwrite(file.fileno(), data, at)
                expected[at : at + len(data)] = data
                assert os.pread(file.fileno(), 100, at) == expected[at : at + 100]
                name = f"new{rng.randrange(5)}"
                if others.pop(name, None) is not None:
                    (written.path / name).unlink()
                else:
                    others[name] = rng.randbytes(20 * PAGE)
                    (written.path / name).write_bytes(others[name])
                answers.append(_progress(looking))
                if len(answers) % 2 == 0:
                    gate.let_one_pass()
        assert begins.result(PATIENCE)["strategy"] == str(slow)
        assert _progress(looking) is None
    seen = [done for done in answers if done is not None]
    assert len(set(seen)) > 3
    assert seen == sorted(seen)
    last = written.events("RepairProgress")[-1]
    assert last["done_bytes"] == last["total_bytes"] >= PAGES * PAGE
    for name, data in others.items():
        _survives(written, name, [rng.randrange(20)], data)
    # Never two of one stripe.
    _survives(written, "f", list(range(rng.randrange(16), PAGES, 16)), bytes(expected))


def test_a_block_that_fails_before_its_copy_is_lost_and_no_other(
    written: QuickMount, gate: Gate, slow: Path
) -> None:
    expected = (written.path / "f").read_bytes()
    with Client.at(written.path) as client, Client.at(written.path) as looking, ThreadPoolExecutor(1) as pool:
        begins = pool.submit(client.request, "repair", strategy=str(slow))
        _until(lambda: _progress(looking) is not None)
        written.inject("f", ((PAGES - 1) * PAGE, PAGE))
        assert not begins.done()
        gate.open()
        result = begins.result(PATIENCE)
    assert result["left"] == 1
    (finished, again) = written.events("RepairFinished")
    assert (finished["verdict"], again["verdict"]) == ("cannot", "cannot")
    assert "not processed the block yet" in finished["reason"]
    _survives(written, "f", [3, 700], expected)


@pytest.mark.parametrize("how", ["kill", "remount", "powerfail"])
def test_the_mount_ends_meanwhile(written: QuickMount, gate: Gate, slow: Path, how: str) -> None:
    """An incomplete copy is of no use: the next mount begins anew."""
    expected = (written.path / "f").read_bytes()
    with (written.path / "f").open("rb") as file:
        os.fsync(file.fileno())
    with Client.at(written.path) as client, Client.at(written.path) as looking, ThreadPoolExecutor(1) as pool:
        begins = pool.submit(client.request, "repair", strategy=str(slow))
        _until(lambda: (_progress(looking) or 0) > PAGE)
        written.repair = str(slow)
        assert not begins.done()
        if how == "remount":
            looking.close()
            written.umount()
        else:
            {"kill": written.kill, "powerfail": written.powerfail}[how]()
            written.check()
        gate.open()
        written.mount()
        with pytest.raises(DaxemuError):
            begins.result(PATIENCE)
    assert not list((written.device / "repair").glob("incomplete"))
    _survives(written, "f", list(range(5, PAGES, 16)), expected)


def test_another_is_chosen_meanwhile(written: QuickMount, gate: Gate, slow: Path) -> None:
    with Client.at(written.path) as client, Client.at(written.path) as other, ThreadPoolExecutor(1) as pool:
        begins = pool.submit(client.request, "set", settings={"repair": str(slow)})
        _until(lambda: _progress(other) is not None)
        other.request("repair", strategy="zero")
        gate.open()
        with pytest.raises(Busy, match="chosen meanwhile: zero"):
            begins.result(PATIENCE)
        report = other.request("status")["repair"]
    assert (report["strategy"], report["progress"], report["space_bytes"]) == ("zero", None, 0)
    assert not list((written.device / "repair").iterdir())


def test_one_that_finds_no_room(quick_mount: QuickMount) -> None:
    path = quick_mount.path
    with (path / "f").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, int(os.statvfs(path).f_bavail * PAGE * 0.6))
    with Client.at(path) as client:
        free = client.request("status")["free_blocks"]
        with pytest.raises(DaxemuError, match="full"):
            client.request("repair", strategy="mirror")
        report = client.request("status")["repair"]
    assert (report["strategy"], report["progress"], report["space_bytes"]) == ("none", None, 0)
    with (path / "f").open("rb+") as file:
        os.fsync(file.fileno())
    with Client.at(path) as client:
        assert client.request("status")["free_blocks"] >= free - 64


def test_the_command_is_interrupted(written: QuickMount, gate: Gate, slow: Path) -> None:
    """The command shows its progress; after an interrupt the supervisor goes on."""
    command = [sys.executable, "-m", "daxemu", "repair", str(written.path), "--strategy", str(slow)]
    with Terminal(command, 100, 10) as terminal, Client.at(written.path) as looking:
        terminal.wait_for("%")
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("the supervisor goes on with")
        assert terminal.process.wait(PATIENCE) == 130
        assert _progress(looking) is not None
        said = subprocess.run(
            [sys.executable, "-m", "daxemu", "status", str(written.path)], capture_output=True, text=True
        )
        assert "begins, " in said.stdout
        gate.open()
        _until(lambda: _progress(looking) is None)
    _survives(written, "f", [3, 700], (written.path / "f").read_bytes())


# -- at mount


def test_a_mount_waits_for_as_long_as_there_is_progress(
    written: QuickMount, gate: Gate, slow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each line of the supervisor starts the patience of the waiting process anew."""
    gate.take(0.35)
    gate.open()
    written.umount()
    heard: list[tuple[int, int]] = []
    waits: list[float] = []
    select_ready = select.select

    def noted_select(*arguments: Any) -> Any:
        waits.append(arguments[3])
        return select_ready(*arguments)

    monkeypatch.setattr(select, "select", noted_select)
    written.pid = spawn(
        written.device, written.path, MountOptions(str(slow)), lambda *seen: heard.append(seen)
    )
    assert len(heard) > 2
    assert len(waits) > 2
    assert set(waits) == {spawning.PATIENCE}
    assert heard == sorted(heard)
    _survives(written, "f", [3, 700], (written.path / "f").read_bytes())


def test_a_mount_that_says_nothing_is_given_up(
    written: QuickMount, gate: Gate, slow: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.take(4)
    gate.open()
    written.umount()
    monkeypatch.setattr(spawning, "PATIENCE", 2.0)
    with pytest.raises(Busy, match="said nothing for 2 s"):
        spawn(written.device, written.path, MountOptions(str(slow)))
    assert mount_at(written.path) is None
    written.mount()
    assert (written.path / "f").stat().st_size == PAGES * PAGE
