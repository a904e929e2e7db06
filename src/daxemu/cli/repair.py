"""repair: what is done about data that goes bad."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from daxemu.cli.common import PATH, absolute_strategy, connect, emit, json_option
from daxemu.cli.progress import choose
from daxemu.errors import DaxemuError


@click.command()
@click.argument("mountpoint", type=PATH)
@click.option("--strategy", metavar="NAME[:KEY=VALUE,...]", help="Choose this one from now on.")
@json_option
def repair(mountpoint: Path, strategy: str | None, as_json: bool) -> None:
    """Have the mount's repair strategy see to everything that is known to be bad, and print what is left.

    One that is chosen here first copies, or adds up, what is there already. The mount goes on meanwhile; and
    so does the copying if this command is interrupted.

    \b
    none          tell and leave, as every kernel does
    zero          clear the poison: the pages are good, and empty
    punch         a hole in the file; the bad block is not used again
    quarantine    move what can be read of a page; the bad block is not used again
    mirror        a second copy elsewhere on the device        mapped=honest|trust checksum=no|yes
    parity        checksums, and N+1 slices a stripe           slice=4096 data=8 mapped=honest|trust
    async-parity  parity added up once in a window             window=1 (seconds), and parity's
    reread        read it again from a directory               path=DIR
    fence         give up the whole device
    FILE.py       your own (docs/repair.md)

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
            f"the strategy {result['strategy']} failed, and is asked nothing more: {broken}; "
            f"choose another: daxemu repair {mountpoint} --strategy NAME"
        )


def _describe(result: dict[str, Any]) -> str:
    why = f" ({result['reason']})" if result["reason"] else ""
    return "{strategy}: {recovered} blocks recovered, {lost} lost, {left} left{why}".format(**result, why=why)
