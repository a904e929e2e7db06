"""Each request at its limit, beside a reader: answered right, and the longest wait and step are printed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daxemu.client import Client
from tests.mount.test_settle import Reader
from tests.support.quick import QuickMount, quick_mount_at
from tests.support.zygote import Zygote

pytestmark = pytest.mark.mount
MANY = 5000
"""Ranges of one request: 40 batches. A request has room for 190,000."""
SPAN = 4096
FILES = 500


@pytest.fixture
def measured(tmp_path: Path, zygote: Zygote) -> Iterator[QuickMount]:
    """A mount of 4 GiB whose supervisor writes its longest step to ``steps``."""
    with quick_mount_at(tmp_path, zygote, 4 << 30, mount=False) as mount:
        mount.mount("measure_steps", str(tmp_path / "steps"))
        yield mount


def _ranges(count: int) -> list[list[int]]:
    return [[(1 << 30) + number * SPAN, 512] for number in range(count)]


def inject_many(client: Client, mount: QuickMount) -> None:
    """An injection of as many ranges as a request has room for."""
    done = client.request("inject", ranges=_ranges(MANY))
    assert len(done["ranges"]) == MANY
    assert {each["outcome"] for each in done["ranges"]} == {"Recovered"}
    assert client.request("status")["badblocks"] == MANY


def inject_latent_and_scrub(client: Client, mount: QuickMount) -> None:
    """Latent poison, found by a scrub."""
    client.request("inject", ranges=_ranges(5000), latent=True)
    assert client.request("scrub")["bytes"] == 5000 * 512


def list_and_clear(client: Client, mount: QuickMount) -> None:
    """The list of many bad blocks, and one range that clears all."""
    client.request("inject", ranges=_ranges(5000))
    assert len(client.request("badblocks")["ranges"]) == 5000
    assert client.request("clear", ranges=[[1 << 30, 1 << 30]])["bytes"] == 5000 * 512
    assert client.request("status")["poisoned_sectors"] == 0


def survey_at_most_cells(client: Client, mount: QuickMount) -> None:
    """A survey of as many cells as are allowed."""
    found = client.request("survey", cells=1 << 16)
    assert len(found["cells"]) == 1 << 16


def map_many_extents(client: Client, mount: QuickMount) -> None:
    """The map of a file of many extents."""
    with (mount.path / "holes").open("wb") as file:
        for number in range(FILES):
            os.pwrite(file.fileno(), b"x", number * 2 * 4096)
    ino = (mount.path / "holes").stat().st_ino
    assert len(client.request("map", ino=ino)["extents"]) == 2 * FILES - 1


def damage_many_files(client: Client, mount: QuickMount) -> None:
    """The list of many damaged files."""
    for number in range(FILES):
        (mount.path / str(number)).write_bytes(b"x" * 4096)
    client.request("inject", ranges=[[0, 4096]], ino=(mount.path / "7").stat().st_ino)
    assert len(client.request("damaged")["files"]) == 1


def allocate_and_give_back(client: Client, mount: QuickMount) -> None:
    """An fallocate(2) of 1 GiB, and a file of that length deleted."""
    with (mount.path / "long").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, 1 << 30)
    (mount.path / "long").unlink()


@pytest.mark.parametrize(
    "at_the_limit",
    [
        inject_many,
        inject_latent_and_scrub,
        list_and_clear,
        survey_at_most_cells,
        map_many_extents,
        damage_many_files,
        allocate_and_give_back,
    ],
    ids=lambda case: case.__name__,
)
def test_a_request_at_its_limit_is_answered_beside_a_reader(
    measured: QuickMount, tmp_path: Path, at_the_limit: Callable[[Client, QuickMount], Any]
) -> None:
    reader = Reader(measured.make_file("small", 1))
    reader.start()
    try:
        with measured.client() as client:
            at_the_limit(client, measured)
    finally:
        reader.over.set()
        reader.join()
    step = (tmp_path / "steps").read_text()
    print(f"{at_the_limit.__name__}: longest read {reader.worst * 1000:.0f} ms, longest step {step}")
    assert reader.reads
