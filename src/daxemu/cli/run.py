"""run: a program whose madvise(MADV_HWPOISON) works."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from daxemu.cli.common import PATH
from daxemu.cli.output import complain
from daxemu.client import Client
from daxemu.host.proc.mountinfo import mount_of
from daxemu.host.run.runner import Piece, execute

NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""Exit statuses, as a shell's."""


class _Run(click.Command):
    """Everything after ``--`` is the command, whatever it looks like."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See click.Command.parse_args."""
        cut = args.index("--") if "--" in args else len(args)
        ctx.meta[__name__] = args[cut + 1 :]
        return super().parse_args(ctx, args[:cut])


@click.command(cls=_Run, options_metavar="[--simulated]")
@click.argument("mountpoint", type=PATH, required=False, metavar="[MOUNTPOINT] -- COMMAND...")
@click.option("--simulated", is_flag=True, help="As the kernel does: signals, but the media stays good.")
@click.pass_context
def run(ctx: click.Context, mountpoint: Path | None, simulated: bool) -> None:
    """Run COMMAND so that its madvise(MADV_HWPOISON) and madvise(MADV_SOFT_OFFLINE) work, on mappings of
    files of this mount, or of any. So do those of its children; other system calls are not touched.

    COMMAND takes this process's place: its process id, signals, terminal and exit status are its own.
    Without root it cannot gain privileges (no_new_privs). Exit status 127: there is no such command, 126: it
    cannot be executed.

    \b
    Example:
      daxemu run /tmp/pmem -- ./my-test --poison
      daxemu run -- sh -c './writer | ./reader'
      daxemu run --simulated -- ./check xfs/550
    """
    command: list[str] = ctx.meta[__name__]
    if not command:
        raise click.UsageError("give the command after --, such as: daxemu run /tmp/pmem -- ls -l", ctx)
    only = mount_of(mountpoint) if mountpoint is not None else None
    try:
        execute(command, only, partial(_advise, simulated))
    except OSError as error:
        complain(f"daxemu: {command[0]}: {error.strerror or error}")
        ctx.exit(NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE)


def _advise(simulated: bool, tid: int, piece: Piece, soft: bool) -> int:
    where = {"address": piece.address, "ino": piece.ino, "offset": piece.offset, "length": piece.length}
    with Client(piece.mount) as client:
        return int(client.request("madvise", tid=tid, **where, soft=soft, simulated=simulated)["errno"])
