"""Memory without struct pages, mapped by unmodified programs: every mapping counts as presence, for signals
and for revoke.
"""

from __future__ import annotations

import pytest

from tests.support.mount import DaxMount, daxemu
from tests.support.scene import FAR, PAGE, Scene, ao, ar, consumes, letter, present, refused, signals_of
from tests.support.syscalls import clone_range
from tests.support.under_run import under_run

pytestmark = [
    pytest.mark.mount,
    pytest.mark.parametrize("dax_mount", ["64M --no-struct-pages"], indirect=True),
]

BAD = 1


def test_every_process_that_maps_the_page_is_signalled(scene: Scene) -> None:
    """Every process that maps the page is signalled, early or late, touched or not. A process that maps other
    pages, or only has the file open, is not.
    """
    early = scene.mapper("p0", touch=[BAD], before=["mcekill early"])
    late = scene.mapper("p1", touch=[BAD], before=["mcekill late"])
    untouched = scene.mapper("p2", touch=[BAD + FAR])
    elsewhere = scene.mapper("p3", first=BAD + FAR, pages=FAR, touch=[0])
    opener = scene.actor("p4")
    opener.cmd("open 0 f rw")
    assert not present(untouched, 0, BAD)
    (outcome,) = scene.poison(BAD)
    assert (outcome["outcome"], outcome["told"]) == ("Recovered", 3)
    for actor in (early, late, untouched):
        assert signals_of(actor) == [ao(BAD)]
        consumes(actor, f"tr 0 {BAD}", ar(BAD))
        assert actor.cmd("tr 0 0").ok == letter(0)
    for actor in (elsewhere, opener):
        assert signals_of(actor) == []
    assert refused(opener, f"pread 0 {BAD * PAGE} {PAGE}") == "EIO"


def test_the_policy_chooses_the_thread(scene: Scene) -> None:
    p0 = scene.mapper(touch=[BAD], before=["threads l e n", "mcekill late"])
    scene.poison(BAD)
    assert signals_of(p0) == [ao(BAD, thread=2)]


def test_a_failure_without_struct_pages_is_on_no_counter(scene: Scene) -> None:
    scene.mapper(touch=[BAD])
    scene.poison(BAD)
    (event,) = scene.mount.events("MemoryFailureHandled")
    assert (event["page_type"], event["outcome"], event["files"]) == ("non struct page pfn", "Recovered", 1)
    assert "recovery action for non struct page pfn: Recovered" in scene.mount.run(
        "log", scene.mount.path, "--dmesg"
    )
    status = scene.mount.json("status", scene.mount.path)
    assert status["struct_pages"] is False
    assert set(status["counters"].values()) == {0}, "a pfn without a struct page is on no node"
    assert scene.badblocks() == [[scene.device_offset("f", BAD) // 512, 8]]
    assert scene.damaged() == [("/f", BAD * PAGE, PAGE)]


def test_every_owner_is_signalled_at_its_own_address(scene: Scene) -> None:
    source, clone = scene.mount.path / "f", scene.mount.path / "clone"
    with source.open("rb") as src, clone.open("wb") as dst:
        clone_range(dst.fileno(), src.fileno(), 0, 2 * PAGE, PAGE)
    one, two = scene.mapper("p0"), scene.mapper("p1", "clone", pages=3)
    (outcome,) = scene.poison(BAD)
    assert outcome["told"] == 2
    assert signals_of(one) == [ao(BAD)]
    assert signals_of(two) == [ao(BAD + 1)]


def test_latent_poison_is_found_by_a_load(scene: Scene) -> None:
    consumer, other = scene.mapper("p0", touch=[BAD]), scene.mapper("p1")
    scene.mount.inject("f", (BAD * PAGE, PAGE), latent=True)
    assert signals_of(other) == []
    consumes(consumer, f"tr 0 {BAD}", ar(BAD))
    assert other.wait_signal().recorded() == ao(BAD)


def test_writing_the_page_clears_the_poison(scene: Scene) -> None:
    p0 = scene.mapper(touch=[BAD])
    scene.poison(BAD)
    assert signals_of(p0) == [ao(BAD)]
    with (scene.mount.path / "f").open("r+b") as file:
        file.seek(BAD * PAGE)
        file.write(b"z" * PAGE)
    assert p0.cmd(f"tr 0 {BAD}").ok == "z"
    assert scene.badblocks() == []


def test_removal_signals_every_process_with_a_mapping(scene: Scene) -> None:
    touched, untouched = scene.mapper("p0", touch=[BAD]), scene.mapper("p1")
    assert scene.mount.json("remove", scene.mount.path)["told"] == 2
    assert signals_of(touched) == [ao(0)]
    assert signals_of(untouched) == [ao(0)]


def test_madvise_gets_no_page_of_it(scene: Scene) -> None:
    """get_user_pages() of a VM_PFNMAP mapping is EFAULT, so nothing is injected."""
    p0 = under_run(scene)
    assert refused(p0, f"madvise 0 {BAD} 1 hwpoison") == "EFAULT"
    assert refused(p0, f"madvise 0 {BAD} 1 soft") == "EFAULT"
    assert scene.badblocks() == []


def test_there_is_nothing_to_walk(dax_mount: DaxMount) -> None:
    assert not (dax_mount.device / "struct_page").exists()
    assert "has no struct pages" in dax_mount.run("page-types", dax_mount.device, status=8)


def test_struct_pages_of_its_own_it_cannot_hold(dax_mount: DaxMount) -> None:
    made = dax_mount.device.with_name(dax_mount.device.name + "-both")
    refusal = daxemu("mkfs", made, "--size", "64M", "--altmap", "--no-struct-pages", status=2)
    assert "altmap" in refusal
    assert not made.exists()
