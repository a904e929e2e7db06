"""Entry point of the ``daxemu`` command."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from typing import Any

import click

import daxemu
from daxemu.cli.output import complain
from daxemu.errors import DaxemuError

VERBS = {
    "mkfs": "device",
    "fsck": "device",
    "mount": "mount",
    "umount": "mount",
    "status": "mount",
    "set": "mount",
    "inject": "poison",
    "clear": "poison",
    "scrub": "poison",
    "badblocks": "poison",
    "damaged": "poison",
    "repair": "repair",
    "rules": "rules",
    "settle": "settle",
    "remove": "poison",
    "powerfail": "mount",
    "load": "touch",
    "store": "touch",
    "map": "files",
    "reflink": "files",
    "page-types": "page_types",
    "log": "log",
    "trace": "trace",
    "watch": "watch",
    "report": "report",
    "run": "run",
    "evaluate": "evaluate",
    "fleet": "fleet",
    "apps": "apps",
    "demo": "demo",
    "doctor": "doctor",
}
"""Verb -> module of this package. Only the module of the verb that is used is imported."""
SUMMARIES = {
    "mkfs": "Make a new device with an empty filesystem.",
    "fsck": "Check, and repair, the filesystem of an unmounted DEVICE.",
    "mount": "Mount DEVICE on MOUNTPOINT.",
    "umount": "Unmount, and wait until all data is on the device.",
    "status": "Show the state of one mount, or of all mounts.",
    "set": "Change settings of a mount, as sysctl(8) does.",
    "inject": "Poison a range of a file, or of the device.",
    "clear": "Clear poison: lost bytes read as zeros.",
    "scrub": "Search the device for latent poison.",
    "badblocks": "Print the bad blocks in the format of sysfs.",
    "damaged": "List the damaged files, and the damaged bytes of each.",
    "repair": "Repair every bad block by the mount's repair strategy.",
    "rules": "List, or delete, what happens when an operation matches.",
    "settle": "Wait until each failure so far was handled.",
    "remove": "Surprise removal: the device goes away while in use.",
    "powerfail": "Lose power: what no fsync(2) made durable is lost.",
    "load": "Load bytes of a file: what a program gets, bytes or SIGBUS.",
    "store": "Store bytes in a file: what a program gets.",
    "map": "Print the extents of a file.",
    "reflink": "Share the blocks of one file with another.",
    "page-types": "Count the page frames of a DEVICE by their flags.",
    "log": "Print the events of a mount.",
    "trace": "Record each operation of programs and step of a failure.",
    "watch": "Watch a mount: device, files, processes and events.",
    "report": "Write the state of a mount to one HTML file.",
    "run": "Run COMMAND with a working madvise(MADV_HWPOISON).",
    "evaluate": "Compare repair strategies.",
    "fleet": "Simulate thousands of devices over years.",
    "apps": "Observe real, unmodified programs under memory failure.",
    "demo": "Take the tour: real programs, poison, removal.",
    "doctor": "Check the requirements of daxemu on this machine.",
}
"""Lines of ``daxemu --help``, of at most 66 characters. The texts of the verbs would take the import of every
module: 0.4 s.
"""


class Verbs(click.Group):
    """Command group that finds verbs in VERBS, and turns each DaxemuError into one line and an exit
    status.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the verbs in the order in which a session uses them."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of the verb and return the verb."""
        if cmd_name not in VERBS:
            return None
        module = importlib.import_module(f"daxemu.cli.{VERBS[cmd_name]}")
        name = "set_setting" if cmd_name == "set" else cmd_name.replace("-", "_")
        command: click.Command = getattr(module, name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of verbs."""
        with formatter.section("Commands"):
            formatter.write_dl(list(SUMMARIES.items()))

    def invoke(self, ctx: click.Context) -> Any:
        """Run a verb and exit with its status."""
        try:
            return super().invoke(ctx)
        except DaxemuError as error:
            complain(f"daxemu: {error}")
            ctx.exit(error.exit_status)
        except click.UsageError as error:
            where = error.ctx.command_path if error.ctx else "daxemu"
            complain(f"daxemu: {error.format_message().removesuffix('.')}. See: {where} --help")
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(130)
        except BrokenPipeError:
            # The reader of our output closed the pipe. The interpreter must not meet EPIPE again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(0)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            complain(f"daxemu: {where}{error.strerror or error}")
            ctx.exit(1)
        except (click.ClickException, click.Abort, click.exceptions.Exit):
            raise
        except Exception as error:  # noqa: BLE001 - shown as Python shows it, but escaped: a traceback contains untrusted names
            complain(*"".join(traceback.format_exception(error)).rstrip().split("\n"))
            ctx.exit(1)


@click.command(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(daxemu.__version__, prog_name="daxemu")
def main() -> None:
    """A DAX device and a reflink filesystem in userspace, with memory failures as on real hardware.

    \b
    Example:
      daxemu mkfs /dev/shm/pmem0 --size 1G
      mkdir -p /tmp/pmem && daxemu mount /dev/shm/pmem0 /tmp/pmem
      daxemu inject /tmp/pmem/FILE --offset 4K
      daxemu log /tmp/pmem --dmesg
      daxemu umount /tmp/pmem

    Sizes and offsets are bytes; K, M, G and T are powers of 1024, 0x... is hexadecimal.

    Exit status: 0 done, 2 bad argument, 3 no such device or mount, 4 in use, 5 not permitted, 6 no space, 7
    poison or a filesystem after a shutdown, 8 not supported on this machine, 9 damaged metadata, 1 any other
    error.
    """
