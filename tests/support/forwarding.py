"""Supervisor for tests of forwarded calls: real control socket, real taking of descriptors, stub decisions.

    python -m tests.support.forwarding DIRECTORY

``DIRECTORY/answer`` holds the decision for each mmap(2): ``continue``, ``value ADDRESS``, ``errno NUMBER``,
``hold`` (no answer), ``crash``, ``traced`` (refused if a tracer is there), ``descriptor`` (the number of a
copied descriptor is the value). All other calls continue. ``DIRECTORY/calls`` gets a line of JSON for each
call: number, thread, arguments. ``DIRECTORY/mode`` holds ``page cache`` for a mount that is not direct.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import cast

import msgspec
import trio

from daxemu import protocol
from daxemu.host.run.attached import AttachedRun, refused, tracer_of
from daxemu.host.run.filters import Nr
from daxemu.host.run.seccomp import CONTINUE, Answer, NotifiedCall
from daxemu.host.unexpected import Unexpected
from daxemu.private_path import PrivatePath
from daxemu.supervisor.control import ControlSocket
from daxemu.supervisor.event_log import EventLog
from daxemu.supervisor.trace import Traces
from daxemu.supervisor.verbs.attach import Attachments


class Stub:
    """Decides calls as the files of the directory say."""

    def __init__(self, directory: Path, log: EventLog) -> None:
        self._directory = directory
        self._log = log

    async def handle(self, run: AttachedRun, call: NotifiedCall) -> Answer | None:
        with (self._directory / "calls").open("a") as calls:
            calls.write(json.dumps([call.nr, call.tid, call.args, run.zone.start]) + "\n")
        if call.nr != Nr.MMAP:
            return CONTINUE
        word, *argument = (self._directory / "answer").read_text().split()
        match word:
            case "value":
                return Answer(int(argument[0], 0))
            case "errno":
                return Answer(error=int(argument[0]))
            case "crash":
                raise ZeroDivisionError
            case "hold":
                await trio.sleep_forever()
            case "itself":
                run.answer(call, Answer(77))
                return None
            case "descriptor":
                with (self._directory / "given").open("w+") as file:
                    return Answer(run.add_fd(call, file.fileno()))
            case "traced":
                if (reason := tracer_of(call.tid)) is not None:
                    return refused(call, reason, self._log.emit)
        return CONTINUE


async def main(directory: Path) -> None:
    """Serve until SIGTERM."""
    private = PrivatePath.at(directory)
    log = EventLog(private / "events.jsonl")
    unexpected = Unexpected(log.emit)
    is_direct = not (directory / "mode").exists()
    async with trio.open_nursery() as nursery:
        handle = Stub(directory, log).handle if is_direct else None
        attachments = Attachments(handle, log.emit, unexpected.nursery(nursery), unexpected)

        async def answer(request: protocol.AnyRequest) -> msgspec.Struct:
            assert isinstance(request, protocol.Attach)
            return await attachments.attach(request)

        control = ControlSocket(private / "control.sock", log, cast("Traces", None), answer, unexpected)
        listener = control.bind()
        os.write(1, b"ready\n")
        await control.serve(listener)


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
