"""Tests of other mounts that must hold on a direct mount unchanged."""

from __future__ import annotations

from tests.mount.test_action_required import *  # noqa: F403
from tests.support.scene import PAGES, Scene, ar, consumes, letter, signals_of

del test_through_every_reflink  # noqa: F821

BAD = 1


def test_through_every_reflink_but_stores_copy_first(scene: Scene) -> None:
    """A store to a shared block copies the block first: the copy fails, which is EIO in
    dax_iomap_copy_around(), so BUS_ADRERR.
    """
    path = scene.mount.path
    scene.mount.run("reflink", path / "f", path / "g", "--dest-offset", "8K")
    p0, p1 = scene.mapper("p0", touch=[BAD]), scene.mapper("p1", "g", pages=PAGES + 2)
    assert p1.cmd(f"tr 0 {BAD + 2}").ok == letter(BAD)
    scene.poison(BAD)
    scene.mount.run("reflink", path / "f", path / "h")
    p2 = scene.mapper("p2", "h")
    for _ in range(2):
        consumes(p0, f"tr 0 {BAD}", ar(BAD))
        consumes(p1, f"tr 0 {BAD + 2}", ar(BAD + 2))
        consumes(p2, f"tr 0 {BAD}", ar(BAD))
    assert p1.cmd(f"tw 0 {BAD + 2} x").faulted
    assert [each["code"] for each in signals_of(p1)] == ["BUS_ADRERR"]
    assert p1.cmd(f"tr 0 {BAD + 3}").ok == letter(BAD + 1)
