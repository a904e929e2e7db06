"""settle: wait until failures are over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from daxemu.cli.common import emit, json_option
from daxemu.client import Client


@click.command()
@click.argument("mountpoint", type=click.Path(path_type=Path))
@click.option("--timeout", type=float, default=10.0, show_default=True, help="Seconds to wait at most.")
@json_option
def settle(mountpoint: Path, timeout: float, as_json: bool) -> None:
    """Wait until every failure so far was handled and every signal of them is in the log.

    A signal for a process that is stopped is in the log as pending. Exit status 4 if it takes longer.

    \b
    Example:
      daxemu settle /tmp/pmem && daxemu log /tmp/pmem
    """
    with Client.at(mountpoint) as client:
        result: dict[str, Any] = client.request("settle", patience=timeout)
    emit(result, as_json, f"settled after {result['seconds']:.3f} s")
