"""Files mapped by 2 MiB on DAX (``mkfs --align 2M``): signalled processes, their siginfo, and the unmapped
pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daxemu.uapi import HPAGE_PMD_NR as NR
from daxemu.uapi import PAGE_SIZE, PMD_SIZE
from tests.support.mount import DAXEMU
from tests.support.quick import quick_mount_at
from tests.support.scene import FAR, Scene, ao, ar, ask, consumes, letter, present, signals_of
from tests.support.zygote import Zygote

pytestmark = pytest.mark.mount

BAD = NR + 3
"""Page to poison, in the second 2 MiB."""
NEAR = BAD + 2 * FAR
"""Page in the same 2 MiB that no fault makes present together with the poisoned page."""


@pytest.fixture
def scene(tmp_path: Path, zygote: Zygote) -> Iterator[Scene]:
    """A mount with early_kill=1 and the file ``f`` of 3 times 2 MiB, whose page i holds letter i."""
    with quick_mount_at(tmp_path, zygote, align=PMD_SIZE) as mount, Scene(mount) as made:
        mount.make_file("f", 3 * NR)
        made.set(early_kill=1)
        yield made


def ao21(page: int, **how: Any) -> dict[str, Any]:
    """Return the AO for the whole 2 MiB around the page."""
    return ao(page, **how) | {"lsb": 21}


def mapper(scene: Scene, name: str = "p0", **how: Any) -> Any:
    """A process with all of ``f`` mapped, unless ``how`` says otherwise."""
    return scene.mapper(name, **{"pages": 3 * NR, **how})


def test_ao_has_lsb_21_at_the_page_and_ar_has_12(scene: Scene) -> None:
    p0 = mapper(scene, touch=[BAD, NEAR, 5, 2 * NR])
    (outcome,) = scene.poison(BAD)
    assert (outcome["outcome"], outcome["told"]) == ("Recovered", 1)
    assert signals_of(p0) == [ao21(BAD)]
    (event,) = scene.signal_events(p0)
    assert (event["address"], event["lsb"], event["result"]) == (p0.addr(0, BAD), 21, "delivered")
    assert not present(p0, 0, BAD)
    assert not present(p0, 0, NEAR), "all of the 2 MiB is unmapped"
    assert present(p0, 0, 5)
    assert present(p0, 0, 2 * NR)
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    assert p0.cmd(f"tr 0 {NEAR}").ok == letter(NEAR)
    assert p0.cmd(f"tr 0 {BAD + 1}").ok == letter(BAD + 1)
    assert p0.cmd(f"tr 0 {BAD - 1}").ok == letter(BAD - 1)


def test_a_touch_of_any_page_of_the_2_mib_makes_the_failed_page_present(scene: Scene) -> None:
    near = mapper(scene, "p0", touch=[NEAR])
    elsewhere = mapper(scene, "p1", touch=[BAD - NR, BAD + NR])
    assert not present(near, 0, BAD)
    (outcome,) = scene.poison(BAD)
    assert outcome["told"] == 1
    assert signals_of(near) == [ao21(BAD)]
    assert signals_of(elsewhere) == []


def test_stores_to_the_rest_of_the_2_mib_are_kept(scene: Scene) -> None:
    p0 = mapper(scene, touch=[NEAR])
    assert p0.cmd(f"tw 0 {NEAR} x").ok == "x"
    scene.poison(BAD)
    assert signals_of(p0) == [ao21(BAD)]
    assert p0.cmd(f"tr 0 {NEAR}").ok == "x"
    with open(scene.mount.path / "f", "rb") as file:
        file.seek(NEAR * PAGE_SIZE)
        assert file.read(1) == b"x"


def test_a_known_bad_block_keeps_its_2_mib_mapped_by_pages(scene: Scene) -> None:
    p0 = mapper(scene, touch=[NEAR])
    scene.poison(BAD)
    assert signals_of(p0) == [ao21(BAD)]
    for page in (NEAR, NEAR + FAR):
        assert p0.cmd(f"tr 0 {page}").ok == letter(page)
    scene.poison(NEAR + 2 * FAR)
    assert signals_of(p0) == []
    scene.poison(NEAR)
    assert signals_of(p0) == [ao(NEAR)]
    assert present(p0, 0, NEAR + FAR)


def test_late_no_process_is_signalled_and_only_the_failed_page_is_unmapped(scene: Scene) -> None:
    p0 = mapper(scene, touch=[BAD, NEAR], before=["mcekill late"])
    (outcome,) = scene.poison(BAD)
    assert outcome["told"] == 0
    assert signals_of(p0) == []
    assert not present(p0, 0, BAD)
    assert present(p0, 0, NEAR)
    consumes(p0, f"tr 0 {BAD}", ar(BAD))


def test_a_mapping_that_has_not_room_for_2_mib_is_by_pages(scene: Scene) -> None:
    whole = mapper(scene, "p0", touch=[NEAR])
    part = scene.mapper("p1", first=NR, pages=NR - 1, touch=[BAD - NR, NEAR - NR])
    untouched = scene.mapper("p2", first=NR, pages=NR - 1, touch=[NEAR - NR])
    scene.poison(BAD)
    assert signals_of(whole) == [ao21(BAD)]
    assert signals_of(part) == [ao(BAD - NR)]
    assert signals_of(untouched) == []
    assert not present(untouched, 0, NEAR - NR), "the 2 MiB of the file are unmapped from everybody"


def test_without_a_2_mib_mapping_the_neighbours_stay(scene: Scene) -> None:
    part = scene.mapper(first=NR, pages=NR - 1, touch=[BAD - NR, NEAR - NR])
    scene.poison(BAD)
    assert signals_of(part) == [ao(BAD - NR)]
    assert present(part, 0, NEAR - NR)


def test_on_a_default_device_nothing_of_this(tmp_path: Path, zygote: Zygote) -> None:
    with quick_mount_at(tmp_path, zygote) as mount, Scene(mount) as scene:
        mount.make_file("f", 3 * NR)
        scene.set(early_kill=1)
        p0 = mapper(scene, "p0", touch=[BAD, NEAR])
        near = mapper(scene, "p1", touch=[NEAR])
        scene.poison(BAD)
        assert signals_of(p0) == [ao(BAD)]
        assert signals_of(near) == []
        assert present(p0, 0, NEAR)


def test_a_private_mapping_is_by_2_mib_until_it_has_a_copy_there(scene: Scene) -> None:
    reader = mapper(scene, "p0", kind="private", touch=[NEAR])
    writer = mapper(scene, "p1", kind="private", touch=[NEAR])
    assert writer.cmd(f"tw 0 {NEAR + FAR} x").ok == "x"
    scene.poison(BAD)
    assert signals_of(reader) == [ao21(BAD)]
    assert signals_of(writer) == []
    assert writer.cmd(f"tr 0 {NEAR + FAR}").ok == "x"


def test_a_hole_in_the_2_mib_or_a_new_end_splits_them(scene: Scene) -> None:
    p0 = mapper(scene, touch=[NEAR, 5, BAD])
    ask(p0, f"punch 0 {(NEAR + FAR) * PAGE_SIZE} {PAGE_SIZE}")
    scene.poison(BAD)
    assert signals_of(p0) == [ao(BAD)]
    assert present(p0, 0, NEAR)
    assert p0.cmd("tr 0 9").ok == letter(9)
    ask(p0, f"trunc 0 {100 * PAGE_SIZE}")
    assert p0.cmd("tr 0 5").ok == letter(5)
    scene.poison(9)
    assert signals_of(p0) == [ao(9)]


def test_a_clone_of_the_whole_file_is_by_2_mib_too(scene: Scene) -> None:
    scene.mount.run("reflink", scene.mount.path / "f", scene.mount.path / "g")
    p0 = mapper(scene, "p0", touch=[NEAR])
    p1 = mapper(scene, "p1", file="g", touch=[NEAR])
    scene.poison(BAD)
    assert signals_of(p0) == signals_of(p1) == [ao21(BAD)]
    assert not present(p0, 0, NEAR)
    assert not present(p1, 0, NEAR)


def test_copy_on_write_of_a_page_splits_both_files(scene: Scene) -> None:
    scene.mount.run("reflink", scene.mount.path / "f", scene.mount.path / "g")
    p0 = mapper(scene, "p0", touch=[BAD, NEAR])
    p1 = mapper(scene, "p1", file="g", touch=[NEAR])
    ask(p1, f"pwrite 0 {(NEAR + FAR) * PAGE_SIZE} {PAGE_SIZE} x")
    scene.poison(BAD)
    assert signals_of(p0) == [ao(BAD)]
    assert signals_of(p1) == []


def test_a_failure_of_many_2_mib_is_one_signal(scene: Scene) -> None:
    p0 = mapper(scene, touch=[5, NEAR])
    (outcome,) = scene.mount.inject("f", (100 * PAGE_SIZE, NR * PAGE_SIZE))["ranges"]
    assert outcome["told"] == 1
    assert signals_of(p0) == [ao21(100)]
    assert not present(p0, 0, 5)
    assert not present(p0, 0, NEAR)


def test_two_pages_of_the_same_2_mib_in_one_call(scene: Scene) -> None:
    p0 = mapper(scene, touch=[NEAR + FAR])
    assert {outcome["told"] for outcome in scene.poison(BAD, NEAR)} == {0, 1}
    assert signals_of(p0) == [ao21(BAD)]


def test_found_latent_poison_is_signalled_to_all_with_the_2_mib_present(scene: Scene) -> None:
    finder = mapper(scene, "p0", touch=[BAD])
    bad = mapper(scene, "p1", touch=[BAD])
    near = mapper(scene, "p2", touch=[NEAR])
    scene.mount.inject("f", (BAD * PAGE_SIZE, PAGE_SIZE), latent=True)
    assert present(near, 0, NEAR)
    consumes(finder, f"tr 0 {BAD}", ar(BAD))
    for other in (bad, near):
        signal = other.wait_signal().recorded()
        assert signal == ao21(BAD)
        assert signals_of(other) == []
    assert not present(near, 0, NEAR)


def test_madvise_gets_lsb_21(scene: Scene) -> None:
    p0 = scene.actor(wrapper=(*DAXEMU, "run", str(scene.mount.path), "--"))
    for command in ("open 0 f rw", f"mmap 0 0 0 {3 * NR} shared", f"tr 0 {NEAR}"):
        p0.cmd(command)
    p0.cmd(f"madvise 0 {BAD} 1 hwpoison")
    (signal,) = signals_of(p0)
    assert signal == ar(BAD) | {"lsb": 21, "how": signal["how"]}


def test_it_is_so_again_after_a_mount(scene: Scene) -> None:
    scene.mount.umount()
    scene.mount.mount()
    scene.set(early_kill=1)
    p0 = mapper(scene, touch=[NEAR])
    scene.poison(BAD)
    assert signals_of(p0) == [ao21(BAD)]
