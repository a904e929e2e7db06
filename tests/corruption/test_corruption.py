"""Damage of all kinds to a device: no traceback, no signal, no hang, and nothing wrong shown without a word.

``DAXEMU_CORRUPTION_IMAGES`` says how many images; ``DAXEMU_CORRUPTION_SEED`` replays one.
"""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from tests.support.core import core_at
from tests.support.corruption import Image, Pristine, check

IMAGES = int(os.environ.get("DAXEMU_CORRUPTION_IMAGES", "2000"))
SEED = os.environ.get("DAXEMU_CORRUPTION_SEED")
CHUNKS = 20
CPU_SECONDS = 20
"""What one image may take. Of the processor: a slow machine does not count."""


@pytest.fixture(scope="module")
def pristine() -> Iterator[Pristine]:
    with core_at() as core:
        yield Pristine(core)


def hangs(number: int, frame: FrameType | None) -> None:
    raise AssertionError(f"more than {CPU_SECONDS} s of processor time")


def seeds(chunk: int) -> range:
    return range(int(SEED), int(SEED) + 1) if SEED else range(chunk, IMAGES, CHUNKS)


@pytest.mark.slow
@pytest.mark.timeout(max(600, IMAGES // 4))
@pytest.mark.parametrize("chunk", range(1 if SEED else CHUNKS))
def test_damage_is_survived_and_never_hidden(pristine: Pristine, chunk: int) -> None:
    path = pristine.path.with_name(pristine.path.name + "-image")
    failed: list[str] = []
    before = signal.signal(signal.SIGPROF, hangs)
    try:
        for seed in seeds(chunk):
            kind = "making the image"
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            try:
                image = Image(pristine, path, seed)
                kind = image.kind
                check(image)
            except Exception as error:
                if SEED:
                    raise
                failed.append(f"DAXEMU_CORRUPTION_SEED={seed} {kind}: {type(error).__name__}: {error}"[:600])
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
    finally:
        signal.signal(signal.SIGPROF, before)
        shutil.rmtree(path, ignore_errors=True)
    assert not failed, "\n".join(failed)
