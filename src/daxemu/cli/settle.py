"""settle: wait until each failure was handled and logged."""

from __future__ import annotations

from pathlib import Path

import click

from daxemu.cli.common import PATH, Number, connect, emit, json_option
from daxemu.client.connection import SETTLE_PATIENCE


@click.command()
@click.argument("mountpoint", type=PATH)
@click.option(
    "--timeout", type=Number(), default=SETTLE_PATIENCE, show_default=True, help="Maximum wait in seconds."
)
@json_option
def settle(mountpoint: Path, timeout: float, as_json: bool) -> None:
    """Wait until each failure so far was handled and each of its signals is in the log.

    A signal for a stopped process is in the log as pending. Exit status 4 after the timeout.

    \b
    Example:
      daxemu settle /tmp/pmem && daxemu log /tmp/pmem
    """
    with connect(mountpoint) as client:
        seconds = client.settle(timeout)
    emit({"seconds": seconds}, as_json, f"settled after {seconds:.3f} s")
