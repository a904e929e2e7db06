"""A victim that waits for the server of another mount delays no other victim, and no verb."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.hung_fuse import stuck_victim
from tests.support.scene import Scene, ao, ar, consumes, signals_of
from tests.support.scene import present as is_present

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a mount of another filesystem"),
]

BAD = 1


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Directory for the other mount."""
    path = tmp_path / "other"
    path.mkdir()
    return path


@pytest.mark.parametrize("how", ["read", "fault", "locked"])
def test_the_others_are_signalled_and_every_verb_ends(early: Scene, other: Path, how: str) -> None:
    victims = [early.mapper(f"p{n}", touch=[BAD, BAD + 1]) for n in range(2)]
    with stuck_victim(early.mount.path / "f", BAD, other, how) as pid:
        for page in (BAD, BAD + 1):
            early.poison(page)
            for victim in victims:
                assert signals_of(victim) == [ao(page)]
                assert not is_present(victim, 0, page)
                consumes(victim, f"tr 0 {page}", ar(page))
        sent = [e["result"] for e in early.mount.events("SignalSent") if e["pid"] == pid]
        assert sent == ["delivered" if how == "fault" else "pending"]
        for victim in victims:
            victim.kill()
        early.mount.umount("--force")
        assert not early.mount.path.is_mount()
