"""Latent poison: undetected until a load, a read or a scrub finds the poison."""

from __future__ import annotations

import pytest

from tests.support.scene import PAGE, Scene, ao, ar, consumes, refused

pytestmark = pytest.mark.mount

BAD = 3


def hide(scene: Scene) -> None:
    scene.mount.inject("f", (BAD * PAGE, PAGE), latent=True)
    assert scene.badblocks() == []


def test_a_load_finds_latent_poison_and_other_processes_are_signalled_by_policy(scene: Scene) -> None:
    """The consumer gets AR. Early killers with the page present get AO, SIGBUS blocked or not; late killers
    get no signal (`m2-mce-ar-late`, `m2-mce-ar-early`).
    """
    actors = {name: scene.mapper(name, touch=[BAD]) for name in ("p0", "p1", "p2", "p3")}
    for name in ("p1", "p3"):
        actors[name].cmd("mcekill early")
    actors["p3"].cmd("sig block")
    hide(scene)
    for actor in actors.values():
        actor.expect_no_signal()
    consumes(actors["p0"], f"tr 0 {BAD}", ar(BAD))
    assert actors["p1"].wait_signal().recorded() == ao(BAD)
    while actors["p3"].cmd("sig pending").ret == 0:
        pass
    actors["p3"].cmd("sig take")
    assert actors["p3"].wait_signal().code == "BUS_MCEERR_AO"
    actors["p2"].expect_no_signal()
    actors["p0"].expect_no_signal()
    assert scene.badblocks() != []
    consumes(actors["p2"], f"tr 0 {BAD}", ar(BAD))


def test_a_process_that_unmapped_the_page_is_not_signalled(scene: Scene) -> None:
    p0, p1 = scene.mapper("p0", touch=[BAD]), scene.mapper("p1", touch=[BAD])
    p1.cmd("mcekill early")
    hide(scene)
    p1.cmd("munmap 0")
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    while not scene.mount.events("MemoryFailureHandled"):
        pass
    p1.expect_no_signal()


def test_read_finds_it(scene: Scene) -> None:
    p0 = scene.mapper("p0", touch=[BAD])
    p0.cmd("mcekill early")
    hide(scene)
    reader = scene.actor("reader")
    reader.cmd("open 0 f rw")
    assert refused(reader, f"pread 0 {BAD * PAGE} {PAGE}") == "EIO"
    assert p0.wait_signal().recorded() == ao(BAD)


def test_an_injection_over_latent_poison_signals_processes_with_the_page_present(scene: Scene) -> None:
    """As in the kernel, where latent poison unmaps no page."""
    p0, p1 = scene.mapper("p0", touch=[BAD]), scene.mapper("p1", touch=[BAD])
    p0.cmd("mcekill early")
    hide(scene)
    scene.poison(BAD)
    assert p0.wait_signal().recorded() == ao(BAD)
    for actor in (p0, p1):
        actor.expect_no_signal()
        consumes(actor, f"tr 0 {BAD}", ar(BAD))


def test_a_second_latent_injection_forgets_no_process(scene: Scene) -> None:
    """Latent poison is injected again over more pages, and found page by page: each process that had a page
    present is signalled for that page.
    """
    p0, late = scene.mapper("p0", touch=[BAD]), scene.mapper("late", touch=[BAD])
    p0.cmd("mcekill early")
    hide(scene)
    scene.mount.inject("f", (BAD * PAGE, 3 * PAGE), latent=True)  # a touch makes the neighbours present, too
    reader = scene.actor("reader")
    reader.cmd("open 0 f direct")
    for page in (BAD, BAD + 1, BAD + 2):
        assert refused(reader, f"pread 0 {page * PAGE} {PAGE}") == "EIO"
        assert p0.wait_signal().recorded() == ao(page)
    for actor in (p0, late):
        actor.expect_no_signal()


def test_processes_with_the_page_before_a_clear_are_not_signalled(scene: Scene) -> None:
    p0 = scene.mapper("p0", touch=[BAD])
    p0.cmd("mcekill early")
    hide(scene)
    scene.mount.run("clear", scene.mount.path / "f", "--offset", BAD * PAGE, "--length", PAGE)
    scene.poison(BAD)
    p0.expect_no_signal()


def test_a_scrub_finds_latent_poison_and_signals_no_process(scene: Scene) -> None:
    p0 = scene.mapper("p0", touch=[BAD])
    p0.cmd("mcekill early")
    hide(scene)
    found = scene.mount.json("scrub", scene.mount.path)
    assert found["bytes"] == PAGE
    assert scene.badblocks() != []
    p0.expect_no_signal()
    assert scene.mount.json("scrub", scene.mount.path)["bytes"] == 0
