"""The background scrub on a real mount finds latent poison, and signals no process."""

from __future__ import annotations

import pytest

from daxemu.client import Client
from daxemu.host.proc.mountinfo import mount_of
from tests.support.mount import PATIENCE, DaxMount
from tests.support.scene import PAGE, Scene, ar, consumes, signals_of

pytestmark = pytest.mark.mount

BAD = 3
OFTEN = 0.02


def wait_for(mount: DaxMount, kind: str, count: int) -> list[dict[str, object]]:
    """Wait for ``count`` events of a kind; return the first ``count``."""
    found: list[dict[str, object]] = []
    with Client(mount_of(mount.path), patience=PATIENCE) as client:
        for event in client.follow():
            found += [event] if event["event"] == kind else []
            if len(found) == count:
                return found
    raise AssertionError("the events ended")


def test_a_scrub_finds_latent_poison_and_signals_no_process(scene: Scene) -> None:
    p0 = scene.mapper("p0", touch=[BAD], before=["mcekill early"])
    at = scene.device_offset("f", BAD)
    scene.set(scrub_interval=OFTEN)
    scene.mount.inject("f", (BAD * PAGE, PAGE), latent=True)
    (found,) = wait_for(scene.mount, "ScrubFound", 1)
    assert (found["offset"], found["length"]) == (at, PAGE)
    assert scene.badblocks() == [[at // 512, 8]]
    assert scene.damaged() == [("/f", BAD * PAGE, PAGE)]
    assert signals_of(p0) == []
    assert scene.mount.events("MemoryFailureHandled") == []
    consumes(p0, f"tr 0 {BAD}", ar(BAD))
    # The scrub goes on, and reports each page once.
    scene.mount.inject("f", (100 * PAGE, 512), latent=True)
    assert [e["length"] for e in wait_for(scene.mount, "ScrubFound", 2)] == [PAGE, 512]
    status = scene.mount.json("status", scene.mount.path)
    assert status["scrubs"] >= 2
    assert (status["poisoned_sectors"], status["badblocks"]) == (9, 9)


def test_off_by_default_and_on_from_the_start(scene: Scene) -> None:
    """Probing at mount finds poison left latent at unmount, so the test injects after the mount."""
    status = scene.mount.json("status", scene.mount.path)
    assert (status["settings"]["scrub_interval"], status["scrubs"]) == ("0", 0)
    scene.mount.umount()
    scene.mount.run("mount", scene.mount.device, scene.mount.path, "--scrub-interval", "0.02")
    assert scene.mount.json("status", scene.mount.path)["settings"]["scrub_interval"] == "0.02"
    scene.mount.inject("f", (BAD * PAGE, PAGE), latent=True)
    assert len(wait_for(scene.mount, "ScrubFound", 1)) == 1
    assert "background scrubs" in scene.mount.run("status", scene.mount.path)


def test_a_requested_scrub_reports_each_page_once(scene: Scene) -> None:
    scene.mount.inject("f", (BAD * PAGE, PAGE), latent=True)
    scene.mount.run("scrub", scene.mount.path)
    scene.mount.run("scrub", scene.mount.path)
    assert [e["length"] for e in scene.mount.events("ScrubFound")] == [PAGE]
    assert scene.mount.json("status", scene.mount.path)["scrubs"] == 0


def test_a_device_that_was_removed_is_scrubbed_no_more(scene: Scene) -> None:
    """After a removal no scrub runs, and the mount ends without an error."""
    scene.set(scrub_interval=OFTEN)
    scene.mount.inject("f", (BAD * PAGE, PAGE), latent=True)
    wait_for(scene.mount, "ScrubFound", 1)
    scene.mount.run("remove", scene.mount.path)
    scrubs = scene.mount.json("status", scene.mount.path)["scrubs"]
    scene.set(scrub_interval=OFTEN)
    assert scene.mount.json("status", scene.mount.path)["scrubs"] == scrubs
    scene.mount.umount()
