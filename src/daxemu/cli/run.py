"""run: execute a program with a working madvise(MADV_HWPOISON)."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import click

from daxemu.cli.common import PATH
from daxemu.cli.output import complain
from daxemu.client import Client
from daxemu.errors import Busy, DaxemuError, Unsupported
from daxemu.host.proc.mountinfo import Mount, mount_of, mounts
from daxemu.host.run.helper import Handover
from daxemu.host.run.runner import Piece, execute

NOT_FOUND, NOT_EXECUTABLE = 127, 126
"""Exit statuses, as of a shell."""
_PATIENCE = 5.0
"""Limit in seconds of an exchange with a supervisor about direct mappings."""
_SHORT_PATIENCE = 1.0
"""The same before the command starts."""


class _Run(click.Command):
    """Verb whose arguments after ``--`` are the command, even if the arguments look like options."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """See click.Command.parse_args."""
        cut = args.index("--") if "--" in args else len(args)
        ctx.meta[__name__] = args[cut + 1 :]
        return super().parse_args(ctx, args[:cut])


@click.command(cls=_Run, options_metavar="[--simulated]")
@click.argument("mountpoint", type=PATH, required=False, metavar="[MOUNTPOINT] -- COMMAND...")
@click.option(
    "--simulated", is_flag=True, help="Signal as the kernel does, but without poison: the media stays good."
)
@click.pass_context
def run(ctx: click.Context, mountpoint: Path | None, simulated: bool) -> None:
    """Run COMMAND with working madvise(MADV_HWPOISON) and madvise(MADV_SOFT_OFFLINE), on mappings of files of
    MOUNTPOINT or, without MOUNTPOINT, of any daxemu mount. On a mount of daxemu mount --direct, mmap(2) of
    COMMAND maps the media itself. The same holds for children of COMMAND.

    COMMAND replaces this process, with the same process id and terminal; signals reach COMMAND, and the exit
    status is that of COMMAND. Without root, COMMAND cannot gain privileges (no_new_privs). Exit
    status 127: the command was not found; 126: the command cannot be executed.

    \b
    Example:
      daxemu run /tmp/pmem -- ./my-test --poison
      daxemu run -- sh -c './writer | ./reader'
      daxemu run --simulated -- ./check xfs/550
      daxemu mount --direct /dev/shm/pmem0 /tmp/pmem && daxemu run /tmp/pmem -- ./my-test
    """
    command: list[str] = ctx.meta[__name__]
    if not command:
        raise click.UsageError("give the command after --, such as: daxemu run /tmp/pmem -- ls -l", ctx)
    only = mount_of(mountpoint) if mountpoint is not None else None
    try:
        attach = partial(_attach, simulated) if _may_be_direct(only) else None
        execute(command, only, partial(_advise, simulated), attach)
    except OSError as error:
        complain(f"daxemu: {command[0]}: {error.strerror or error}")
        ctx.exit(NOT_FOUND if isinstance(error, FileNotFoundError) else NOT_EXECUTABLE)


def _may_be_direct(only: Mount | None) -> bool:
    """Return whether a program may have direct mappings: a mount is direct, or its supervisor does not say.

    Only root makes direct mounts. Mounts of other users are not asked.
    """
    asked = [only] if only is not None else {mount.dev: mount for mount in mounts()}.values()
    return any(_is_direct(mount) for mount in asked if mount.owner in (None, 0))


def _is_direct(mount: Mount) -> bool:
    try:
        with Client(mount, patience=_SHORT_PATIENCE) as client:
            client.request("attach", pid=os.getpid())
        return True
    except Busy:
        return True
    except (OSError, DaxemuError):
        return False  # in page-cache mode; no supervisor, or of an earlier version


def _attach(simulated: bool, mount: Mount, offered: Handover) -> bool:
    """Give the descriptors of a run to the supervisor of a mount. Return False in page-cache mode."""
    descriptors = (offered.listener, offered.socket, os.fstat(offered.socket).st_ino)
    zone = (offered.zone.start, offered.zone.stop)
    try:
        with Client(mount, patience=_PATIENCE) as client:
            client.request("attach", pid=os.getpid(), descriptors=descriptors, zone=zone, simulated=simulated)
    except Unsupported:
        return False
    return True


def _advise(simulated: bool, tid: int, piece: Piece, soft: bool) -> int:
    where = {"address": piece.address, "ino": piece.ino, "offset": piece.offset, "length": piece.length}
    with Client(piece.mount) as client:
        return int(client.request("madvise", tid=tid, **where, soft=soft, simulated=simulated)["errno"])
