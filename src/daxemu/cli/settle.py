"""settle: wait until failures are over."""

from __future__ import annotations

from pathlib import Path

import click

from daxemu.cli.common import PATH, connect, emit, json_option
from daxemu.client.connection import SETTLE_PATIENCE


@click.command()
@click.argument("mountpoint", type=PATH)
@click.option(
    "--timeout", type=float, default=SETTLE_PATIENCE, show_default=True, help="Seconds to wait at most."
)
@json_option
def settle(mountpoint: Path, timeout: float, as_json: bool) -> None:
    """Wait until every failure so far was handled and every signal of them is in the log.

    A signal for a process that is stopped is in the log as pending. Exit status 4 if it takes longer.

    \b
    Example:
      daxemu settle /tmp/pmem && daxemu log /tmp/pmem
    """
    with connect(mountpoint) as client:
        seconds = client.settle(timeout)
    emit({"seconds": seconds}, as_json, f"settled after {seconds:.3f} s")
