"""Damage of all kinds to a device: no traceback, no signal, no hang, and nothing wrong shown without a word.

``DAXEMU_CORRUPTION_IMAGES`` says how many images; ``DAXEMU_CORRUPTION_SEED`` replays one. 2,000 images take
about 80 s of processor time on a busy machine, the weakened filesystems included.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from collections.abc import Iterator
from types import FrameType

import pytest

from tests.corruption.weakened import WEAKENED
from tests.support.core import core_at
from tests.support.corruption import Image, Pristine, check
from tests.support.damage import DAMAGE

IMAGES = int(os.environ.get("DAXEMU_CORRUPTION_IMAGES", "2000"))
SEED = os.environ.get("DAXEMU_CORRUPTION_SEED")
CHUNKS = 20
CPU_SECONDS = 20
"""What one image may take. Of the processor: a slow machine does not count."""
NOTICED_BY = 300
"""Images within which the loss of a check must show."""


@pytest.fixture(scope="module")
def pristines() -> Iterator[list[Pristine]]:
    with core_at() as clean, core_at() as killed:
        yield [Pristine(clean, is_clean=True), Pristine(killed, is_clean=False)]


def hangs(number: int, frame: FrameType | None) -> None:
    raise AssertionError(f"more than {CPU_SECONDS} s of processor time")


def finding(pristines: list[Pristine], seed: int) -> str | None:
    """Return the problem of image ``seed``, or None."""
    path = pristines[0].path.with_name(pristines[0].path.name + "-image")
    kind = "making the image"
    before = signal.signal(signal.SIGPROF, hangs)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        image = Image(pristines, path, seed)
        kind = image.kind
        check(image)
    except Exception as error:
        if SEED:
            raise
        return f"DAXEMU_CORRUPTION_SEED={seed} {kind}: {type(error).__name__}: {error}"[:600]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        shutil.rmtree(path, ignore_errors=True)
    return None


@pytest.mark.slow
@pytest.mark.timeout(max(600, IMAGES // 4))
@pytest.mark.parametrize("chunk", range(1 if SEED else CHUNKS))
def test_damage_is_survived_and_never_hidden(pristines: list[Pristine], chunk: int) -> None:
    seeds = range(int(SEED), int(SEED) + 1) if SEED else range(chunk, IMAGES, CHUNKS)
    failed = [found for seed in seeds if (found := finding(pristines, seed)) is not None]
    assert not failed, "\n".join(failed)


@pytest.mark.parametrize("name", WEAKENED)
def test_the_loss_of_a_check_is_noticed(
    pristines: list[Pristine], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without one of its checks, the filesystem shows wrong data, and the fuzzer notices."""
    WEAKENED[name](monkeypatch)
    assert any(finding(pristines, seed) for seed in range(NOTICED_BY))


def test_each_kind_of_damage_is_drawn_on_each_device(pristines: list[Pristine]) -> None:
    path = pristines[0].path.with_name(pristines[0].path.name + "-drawn")
    drawn: Counter[tuple[str, bool]] = Counter()
    for seed in range(NOTICED_BY):
        image = Image(pristines, path, seed)
        drawn[image.kind, image.pristine.is_clean] += 1
    shutil.rmtree(path)
    assert {kind for kind, _ in drawn} == {damage.__name__ for damage in DAMAGE}
