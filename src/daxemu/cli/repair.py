"""repair: choose a repair strategy, and repair all bad blocks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from daxemu.cli.common import PATH, absolute_strategy, connect, emit, json_option
from daxemu.cli.progress import choose
from daxemu.errors import DaxemuError


@click.command()
@click.argument("mountpoint", type=PATH)
@click.option("--strategy", metavar="NAME[:KEY=VALUE,...]", help="Choose this strategy first.")
@json_option
def repair(mountpoint: Path, strategy: str | None, as_json: bool) -> None:
    """Have the repair strategy of the mount repair every bad block, and print the number of blocks that are
    left.

    A strategy that is chosen here first copies, or adds up, the existing data. The mount serves requests
    meanwhile. The copying continues if this command is interrupted.

    \b
    none          signal and leave the poison, as every kernel does
    zero          clear the poison: the pages can be read, and are zeros
    punch         make a hole in the file; the bad block is not used again
    quarantine    move the readable bytes of a page; the bad block is not used again
    mirror        a second copy elsewhere on the device        mapped=honest|trust checksum=no|yes
    parity        checksums, and N+1 slices a stripe           slice=4096 data=8 mapped=honest|trust
    async-parity  parity added up once in a window             window=1 (seconds), and options of parity
    reread        read the file again from a directory         path=DIR
    fence         shut the whole filesystem down
    FILE.py       a strategy of your own (docs/repair.md)

    \b
    Example:
      daxemu repair /tmp/pmem --strategy parity:slice=512,data=8
    """
    chosen = absolute_strategy(strategy) if strategy else None
    with connect(mountpoint) as client:
        result = choose(client, chosen, "repair", strategy=chosen)
        broken = client.request("status")["repair"]["broken"]
    emit(result, as_json, lambda: _describe(result))
    if broken:
        raise DaxemuError(
            f"the strategy {result['strategy']} failed, and is not called any more: {broken}; "
            f"choose another: daxemu repair {mountpoint} --strategy NAME"
        )


def _describe(result: dict[str, Any]) -> str:
    why = f" ({result['reason']})" if result["reason"] else ""
    return "{strategy}: {recovered} blocks recovered, {lost} lost, {left} left{why}".format(**result, why=why)
