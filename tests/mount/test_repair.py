"""Repair strategies under real programs: which processes learn of a failure, and which do not."""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.support.mount import DaxMount, dax_mount_at
from tests.support.quick import QuickMount
from tests.support.scene import (
    PAGE,
    PAGES,
    Scene,
    ao,
    ar,
    ask,
    consumes,
    letter,
    present,
    refused,
    signals_of,
)

pytestmark = pytest.mark.mount

BAD = 1
PATIENCE = 20.0


def _until(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.fixture
def repaired(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A scene with early_kill=1 and the repair strategy that is the indirect parameter."""
    with dax_mount_at(tmp_path, "64M", mount=False) as made:
        made.run("mount", made.device, made.path, "--repair", request.param)
        with Scene(made) as scene:
            made.make_file("f", PAGES)
            scene.set(early_kill=1)
            yield scene


def verdicts(mount: DaxMount) -> list[str]:
    """Return the verdict of each failure so far."""
    return [event["verdict"] for event in mount.events("RepairFinished")]


redundant = pytest.mark.parametrize(
    "repaired", ["mirror", "parity", "parity:slice=4096,data=2"], indirect=True
)


def corrupt(mount: DaxMount, page: int) -> None:
    """Change some bytes of a page of ``f``, silently."""
    mount.run("inject", mount.path / "f", "--offset", page * PAGE, "--length", 99, "--silent")


@redundant
def test_a_transparent_repair_needs_no_signal(repaired: Scene) -> None:
    p0 = repaired.mapper(touch=[BAD], kind="ro")
    (outcome,) = repaired.poison(BAD)
    assert (outcome["outcome"], outcome["told"]) == ("Recovered", 0)
    assert signals_of(p0) == []
    assert p0.cmd(f"tr 0 {BAD}").ok == letter(BAD)
    assert verdicts(repaired.mount) == ["recovered"]
    assert (repaired.badblocks(), repaired.damaged()) == ([], [])
    report = repaired.mount.json("status", repaired.mount.path)["repair"]
    assert (report["recovered"], report["cannot"]) == (1, 0)
    assert report["space_bytes"] > 0


@redundant
def test_a_load_of_latent_poison_gets_the_data(repaired: Scene) -> None:
    p0 = repaired.mapper("p0", touch=[BAD], kind="ro")
    p1 = repaired.mapper("p1", touch=[BAD], kind="ro")
    repaired.mount.inject("f", (BAD * PAGE, PAGE), latent=True)
    assert p0.cmd(f"tr 0 {BAD}").ok == letter(BAD)
    assert signals_of(p0) == []
    assert signals_of(p1) == []
    assert verdicts(repaired.mount) == ["recovered"]


@redundant
def test_a_partial_write_over_latent_poison_goes_through(repaired: Scene) -> None:
    repaired.mount.inject("f", (BAD * PAGE, PAGE), latent=True)
    with (repaired.mount.path / "f").open("r+b") as file:
        os.pwrite(file.fileno(), b"zz", BAD * PAGE + 100)
        page = os.pread(file.fileno(), PAGE, BAD * PAGE)
    assert page == letter(BAD).encode() * 100 + b"zz" + letter(BAD).encode() * (PAGE - 102)


@pytest.mark.parametrize("repaired", ["mirror"], indirect=True)
def test_a_strategy_that_cannot_repair_latent_poison_is_asked_once(repaired: Scene) -> None:
    """The strategy is asked once, however many partial writes follow; then a read signals every victim."""
    repaired.mapper("p0", touch=[BAD])
    repaired.mount.inject("f", (BAD * PAGE, 2 * PAGE), latent=True)
    with (repaired.mount.path / "f").open("r+b", buffering=0) as file:
        for _ in range(3):
            with pytest.raises(OSError, match=os.strerror(errno.EFAULT)):
                os.pwrite(file.fileno(), b"zz", BAD * PAGE + 100)
        assert verdicts(repaired.mount) == ["cannot"]
        assert repaired.badblocks() == []
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            os.pread(file.fileno(), PAGE, BAD * PAGE)
    while not repaired.mount.events("MemoryFailureHandled"):
        pass
    assert verdicts(repaired.mount) == ["cannot"]
    assert [event["offset"] for event in repaired.mount.events("FileDamaged")] == [BAD * PAGE]
    # Another may be able to.
    repaired.mount.inject("f", (60 * PAGE, PAGE), latent=True)
    with (repaired.mount.path / "f").open("r+b", buffering=0) as file:
        os.pwrite(file.fileno(), b"zz", 60 * PAGE + 100)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_read_amid_its_failure(quick_mount: QuickMount, tmp_path: Path, when: str) -> None:
    """The read gets the data at once; the file is damaged once, and the strategy is asked once."""
    quick_mount.umount()
    quick_mount.repair = "parity"
    quick_mount.mount("stop_in_failure", str(tmp_path), when)
    quick_mount.make_file("f", PAGES)
    with Scene(quick_mount) as scene, ThreadPoolExecutor(1) as pool:
        scene.mapper("p0", touch=[BAD], kind="ro")
        injecting = pool.submit(quick_mount.inject, "f", (BAD * PAGE, PAGE))
        _until((tmp_path / "stopped").exists)
        reader = scene.actor("reader")
        reader.cmd("open 0 f direct")
        for _ in range(2):
            assert reader.cmd(f"pread 0 {BAD * PAGE} {PAGE}").res["pages"] == letter(BAD)
        (tmp_path / "go").touch()
        (outcome,) = injecting.result(PATIENCE)["ranges"]
    assert (outcome["outcome"], outcome["told"]) == ("Recovered", 0)
    assert len(quick_mount.events("FileDamaged")) == 1
    assert verdicts(quick_mount) == ["recovered"]


def test_a_touch_of_a_page_just_revoked_believes_no_copy(quick_mount: QuickMount, tmp_path: Path) -> None:
    """The page was mapped for writing a moment ago."""
    quick_mount.umount()
    quick_mount.repair = "mirror"
    quick_mount.mount("stop_in_failure", str(tmp_path), "after")
    quick_mount.make_file("f", PAGES)
    with Scene(quick_mount) as scene, ThreadPoolExecutor(1) as pool:
        p0 = scene.mapper("p0", touch=[BAD])
        injecting = pool.submit(quick_mount.inject, "f", (BAD * PAGE, PAGE))
        _until((tmp_path / "stopped").exists)
        consumes(p0, f"tr 0 {BAD}", ar(BAD))
        (tmp_path / "go").touch()
        injecting.result(PATIENCE)
    assert verdicts(quick_mount) == ["cannot"]
    assert len(quick_mount.events("FileDamaged")) == 1


@redundant
@pytest.mark.parametrize("how", ["load", "scrub"])
def test_latent_poison_that_was_mapped_for_writing_is_not_believed(repaired: Scene, how: str) -> None:
    p0 = repaired.mapper("p0", touch=[BAD])
    repaired.mount.inject("f", (BAD * PAGE, PAGE), latent=True)
    if how == "scrub":
        repaired.mount.run("scrub", repaired.mount.path)
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    assert verdicts(repaired.mount) == ["cannot"]


@redundant
def test_mapped_for_writing_is_not_believed(repaired: Scene) -> None:
    """On real DAX the store of p0 may be on the media already, past every copy."""
    p0 = repaired.mapper("p0", touch=[BAD])
    (outcome,) = repaired.poison(BAD)
    assert outcome["told"] == 1
    assert signals_of(p0) == [ao(BAD)]
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    assert verdicts(repaired.mount) == ["cannot"]


@pytest.mark.parametrize("repaired", ["mirror:mapped=trust", "parity:mapped=trust"], indirect=True)
def test_mapped_for_writing_may_be_trusted_but_a_lost_store_never(repaired: Scene) -> None:
    p0 = repaired.mapper("p0", touch=[BAD, BAD + 1])
    repaired.poison(BAD)
    assert signals_of(p0) == []
    assert p0.cmd(f"tr 0 {BAD}").ok == letter(BAD)
    assert p0.cmd(f"tw 0 {BAD} z").ok is not None
    repaired.poison(BAD)
    assert signals_of(p0) == [ao(BAD)]
    assert verdicts(repaired.mount) == ["recovered", "cannot"]
    assert len(repaired.mount.events("StoreLost")) == 1


@pytest.mark.parametrize("repaired", ["zero", "punch"], indirect=True)
def test_a_lost_page_is_signalled_and_usable_again(repaired: Scene) -> None:
    p0 = repaired.mapper(touch=[BAD])
    repaired.poison(BAD)
    assert signals_of(p0) == [ao(BAD)]
    assert p0.cmd(f"tr 0 {BAD}").ok in ("0", "\0")
    assert verdicts(repaired.mount) == ["lost"]
    assert repaired.damaged() == []


@pytest.mark.parametrize("repaired", ["quarantine"], indirect=True)
def test_every_owner_moves_with_the_block(repaired: Scene) -> None:
    repaired.mount.run("reflink", repaired.mount.path / "f", repaired.mount.path / "clone")
    before = repaired.device_offset("f", BAD)
    repaired.mount.inject("f", (BAD * PAGE + 512, 512))
    wanted = letter(BAD).encode() * 512 + bytes(512) + letter(BAD).encode() * (PAGE - 1024)
    for name in ("f", "clone"):
        with (repaired.mount.path / name).open("rb") as file:
            assert os.pread(file.fileno(), PAGE, BAD * PAGE) == wanted
    after = repaired.device_offset("f", BAD)
    assert after != before
    assert repaired.device_offset("clone", BAD) == after
    assert repaired.badblocks() == [[before // 512 + 1, 1]]
    (event,) = repaired.mount.events("RepairFinished")
    assert len(event["lost"]) == 2, "of both files"


@pytest.mark.parametrize("repaired", ["fence"], indirect=True)
def test_a_fence_gives_everything_up(repaired: Scene) -> None:
    p0 = repaired.mapper(touch=[BAD])
    repaired.poison(BAD)
    assert ao(BAD) in signals_of(p0)
    assert refused(p0, "pread 0 0 4096") == "EIO"
    assert repaired.mount.json("status", repaired.mount.path)["state"] == "shut down"


@pytest.mark.parametrize("repaired", ["parity"], indirect=True)
def test_silent_corruption_is_found_by_a_load(repaired: Scene) -> None:
    p0 = repaired.mapper(touch=[BAD], kind="ro")
    repaired.mount.run(
        "inject", repaired.mount.path / "f", "--offset", BAD * PAGE, "--length", 99, "--silent"
    )
    assert not present(p0, 0, BAD)
    assert p0.cmd(f"tr 0 {BAD}").ok == letter(BAD)
    (found,) = repaired.mount.events("CorruptionFound")
    assert (found["by"], found["repaired"]) == ("read", True)


@pytest.mark.parametrize("repaired", ["none"], indirect=True)
def test_without_checksums_it_is_silent(repaired: Scene) -> None:
    p0 = repaired.mapper(touch=[BAD], kind="ro")
    repaired.mount.run(
        "inject", repaired.mount.path / "f", "--offset", BAD * PAGE, "--length", 99, "--silent"
    )
    assert p0.cmd(f"tr 0 {BAD}").ok != letter(BAD)
    assert repaired.mount.events("CorruptionFound") == []
    assert repaired.damaged() == []


@pytest.mark.parametrize("repaired", ["parity"], indirect=True)
def test_more_than_the_parity_makes_good_is_an_error_not_garbage(repaired: Scene) -> None:
    for page in (BAD, BAD + 1):
        corrupt(repaired.mount, page)
    p0 = repaired.actor()
    ask(p0, "open 0 f rw")
    assert refused(p0, f"pread 0 {BAD * PAGE} {PAGE}") == "EIO"
    assert [event["repaired"] for event in repaired.mount.events("CorruptionFound")][:1] == [False]


@pytest.mark.parametrize("repaired", ["none"], indirect=True)
def test_a_later_strategy_repairs_the_remaining_damage(repaired: Scene) -> None:
    repaired.poison(BAD, BAD + 5)
    assert len(repaired.damaged()) == 2
    done = repaired.mount.json("repair", repaired.mount.path, "--strategy", "punch")
    assert (done["strategy"], done["lost"], done["left"]) == ("punch", 2, 0)
    assert repaired.damaged() == []
    assert len(repaired.badblocks()) == 2, "the bad blocks are free now, and bad"
    repaired.set(repair="mirror")
    assert repaired.mount.json("status", repaired.mount.path)["settings"]["repair"] == "mirror"
    repaired.poison(BAD + 9)
    assert repaired.mount.json("repair", repaired.mount.path)["left"] == 0


def test_reread_from_where_it_came(tmp_path: Path) -> None:
    with dax_mount_at(tmp_path, "64M", mount=False) as made:
        origin = tmp_path / "origin"
        origin.mkdir()
        made.run("mount", made.device, made.path)
        for top in (origin, made.path):
            (top / "f").write_bytes(b"a" * 8 * PAGE)
        made.umount()
        made.run("mount", made.device, made.path, "--repair", f"reread:path={origin}")
        made.inject("f", (0, PAGE))
        assert (made.path / "f").read_bytes() == b"a" * 8 * PAGE
        with (made.path / "f").open("r+b") as file:
            file.write(b"b")
        made.inject("f", (0, PAGE))
        assert verdicts(made) == ["recovered", "cannot"]


def test_a_strategy_in_one_file(tmp_path: Path) -> None:
    """Run the example of docs/repair.md."""
    example = Path(__file__).parents[2] / "examples" / "compressed_copies.py"
    with dax_mount_at(tmp_path, "64M", mount=False) as made:
        made.run("mount", made.device, made.path, "--repair", f"{example}:level=1")
        made.make_file("f", 8)
        before = (made.path / "f").read_bytes()
        made.inject("f", (PAGE, 2 * PAGE))
        assert (made.path / "f").read_bytes() == before
        assert verdicts(made) == ["recovered"]
        made.umount()
        (tmp_path / "broken.py").write_text("import nothing_like_this\n")
        refusal = made.run("mount", made.device, made.path, "--repair", tmp_path / "broken.py", status=2)
        assert "cannot be loaded: ModuleNotFoundError" in refusal


def test_a_directory_on_the_mount_itself_is_refused(tmp_path: Path) -> None:
    with dax_mount_at(tmp_path, "64M") as made:
        (made.path / "origin").mkdir()
        refusal = made.run("repair", made.path, "--strategy", f"reread:path={made.path}/origin", status=2)
        assert "on the mount itself" in refusal


@pytest.mark.parametrize("strategy", ["mirror", "parity", "parity:slice=512", "async-parity:window=0.1"])
@pytest.mark.parametrize("how", ["kill", "powerfail"])
@pytest.mark.parametrize("quick_mount", [64 << 20], indirect=True)
def test_a_crash_leaves_it_able_to_repair(quick_mount: QuickMount, strategy: str, how: str) -> None:
    quick_mount.repair = strategy
    quick_mount.remount()
    top = quick_mount.path
    synced = {f"f{i}": os.urandom(50_000 + i) for i in range(6)}
    for name, data in synced.items():
        (top / name).write_bytes(data)
    (top / "gone").write_bytes(os.urandom(100_000))
    (top / "gone").unlink()
    fd = os.open(top, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)
    (top / "late").write_bytes(os.urandom(70_000))  # not synced: may be present or not
    quick_mount.crash(how)
    with quick_mount.client() as client:
        for name, data in synced.items():
            ino = (top / name).stat().st_ino
            client.request("inject", ino=ino, ranges=[[4096, 512]])
            assert (top / name).read_bytes() == data
        report = client.request("status")["repair"]
        assert (report["recovered"], report["cannot"]) == (6, 0)


@pytest.mark.parametrize("repaired", ["mirror"], indirect=True)
def test_a_dirty_mapping_that_was_synced_is_copied(repaired: Scene) -> None:
    with (repaired.mount.path / "f").open("r+b") as file, mmap.mmap(file.fileno(), PAGE) as view:
        view[:5] = b"hello"
        view.flush()
    repaired.poison(0)
    assert (repaired.mount.path / "f").read_bytes()[:5] == b"hello"
    assert verdicts(repaired.mount) == ["recovered"]


BROKEN = """
from daxemu.repair.strategy import Strategy

class Broken(Strategy):
    name = "broken"

    def failed(self, failure):
        raise ValueError("it cannot count")
"""


def test_repair_by_a_strategy_that_is_thrown_out_is_a_failure(dax_mount: DaxMount, tmp_path: Path) -> None:
    strategy = tmp_path / "broken.py"
    strategy.write_text(BROKEN)
    dax_mount.make_file("f", 4)
    dax_mount.inject("f", (PAGE, PAGE))
    said = dax_mount.run("repair", dax_mount.path, "--strategy", strategy, status=1)
    assert "failed, and is not called any more" in said
    assert "it cannot count" in said
    assert f"daxemu repair {dax_mount.path} --strategy NAME" in said
    assert said.count("\n") == 1
    assert (
        dax_mount.run("repair", dax_mount.path, "--strategy", "none")
        == "none: 0 blocks recovered, 0 lost, 1 left\n"
    )
