"""The life of a supervisor process: open the device, mount, serve, unmount, save.

Order of opening, undone in reverse: device lock, media, filesystem (the holder), mount, event loop, tracer,
control socket. The process ends when the mount does, however that came about: ``daxemu umount``, umount(8), a
signal, an abort.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path

import msgspec
import trio

from daxemu import protocol as p
from daxemu.errors import Busy, CorruptMetadata, DaxemuError, NotMounted, Unsupported
from daxemu.events import DeviceTightened, Emit, Event, Mounted, Unmounted
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.store import FSCK_HINT
from daxemu.fs.super import MUCH
from daxemu.host.fuse import supplement
from daxemu.host.fuse.loop import FuseLoop
from daxemu.host.fuse.session import Session, abort_file, check_mountpoint
from daxemu.host.fuse.watchdog import Watchdog
from daxemu.host.proc.mountinfo import printable
from daxemu.host.proc.pins import pins_of
from daxemu.host.tracer.link import TracerLink
from daxemu.host.unexpected import Unexpected
from daxemu.pmem.device_dir import DeviceDir
from daxemu.pmem.pmem import Pmem
from daxemu.private_path import PrivatePath
from daxemu.supervisor.control import ControlSocket
from daxemu.supervisor.core import open_core
from daxemu.supervisor.descriptors import raise_descriptor_limit
from daxemu.supervisor.event_log import EventLog
from daxemu.supervisor.internals import log_internals
from daxemu.supervisor.machine import Machine
from daxemu.supervisor.reclaim import Reclaim
from daxemu.supervisor.settings import PLAIN, MountOptions
from daxemu.supervisor.strategy_host import StrategyHost
from daxemu.supervisor.supervisor_log import SupervisorLog

import pyfuse3  # isort: skip  (after host.supplement, which must be loaded first)

log = logging.getLogger(__name__)

SYNC_PATIENCE = 2.0
"""Seconds that ``umount --force`` waits for client processes' stores to be written back, before it cuts."""
SYNC_PATIENCE_ON_SIGNAL = 10.0
"""The same, where the supervisor ends on a signal: no client waits for an answer within 10 s."""
COMMIT_INTERVAL = 5.0
"""Seconds between commits of what nobody synced (as ext4's and XFS's)."""
COMMIT_LOOK = 0.2
"""Seconds between looks whether so MUCH has changed that a commit comes sooner."""
ANSWER_PATIENCE = 2.0
"""Seconds that requests under way have to be answered once the mount is gone."""


def supervise(
    device: Path,
    mountpoint: Path,
    ready: Callable[[], None],
    options: MountOptions = PLAIN,
    progress: Callable[[p.Progress], None] = lambda progress: None,
) -> None:
    """Mount ``device`` on ``mountpoint`` and serve it until it is unmounted. ``ready`` is called once it is
    usable, ``progress`` before that whenever the repair strategy has seen to another piece of the device.

    Raises DaxemuError when it cannot be mounted; nothing is left behind then.
    """
    raise_descriptor_limit()
    with ExitStack() as undo:
        check_mountpoint(mountpoint)
        directory = undo.enter_context(DeviceDir.open(device))
        tightened = directory.tighten()
        events = EventLog(directory.root / "events.jsonl", options.log_size)
        undo.callback(events.close)
        own_log = SupervisorLog(directory.root / "supervisor.log", lambda: events.limit)
        own_log.attach()
        undo.callback(own_log.detach)
        pmem = Pmem(directory)
        undo.callback(pmem.close)
        try:
            mm, fs = open_core(pmem, events, (os.geteuid(), os.getegid()))
        except CorruptMetadata as error:
            # A mount reads good copies by itself. What it refuses, fsck knows whether a repair can help.
            why = str(error).removesuffix(FSCK_HINT)
            raise CorruptMetadata(f"{why}; see: daxemu fsck {printable(device)}") from error
        undo.callback(_save, fs)
        host = StrategyHost(fs, directory.root / "repair", events.emit, mountpoint.resolve())
        undo.callback(host.close)
        for seen in host.choose(options.repair, after_crash=fs.had_crashed):
            progress(seen)
        gc.freeze()  # what was loaded stays: no failure shall wait for a look at a million inodes
        session = Session.open(directory.path, mountpoint)
        undo.callback(session.detach)
        mode = f"{directory.config.mode:04o}"
        where = printable(session.mount.mountpoint)
        mounted: list[Event] = [Mounted(device=printable(device), mountpoint=where, size=pmem.dax.size)]
        if tightened:
            mounted.append(DeviceTightened(device=printable(device), mode=mode, files=tightened))

        def made(machine: Machine) -> None:
            """Connect the machine with the kernel. The connection ends after the event loop."""
            machine.scrubber.set(options.scrub_interval)
            pyfuse3.init(machine.operations, f"/dev/fd/{session.fd}", set(pyfuse3.default_options))
            undo.callback(pyfuse3.close, unmount=False)  # libfuse closes the descriptor
            if machine.layouts is not None:
                fs.layouts.hold(machine.layouts)
                undo.callback(fs.layouts.hold, None)
            for event in mounted:
                events.emit(event)
            undo.callback(events.emit, Unmounted(mountpoint=where))

        unexpected = Unexpected(events.emit)
        make = partial(
            Machine,
            pmem,
            mm,
            fs,
            session,
            events,
            host,
            unexpected,
            supplement_missing=supplement.MISSING,
            has_layouts=options.layouts and supplement.READS,
        )
        ending = _Ending(session, fs, unexpected)
        trio.run(_serve, make, made, ending, session, events.emit, directory.root / "control.sock", ready)


def _save(fs: Filesystem) -> None:
    try:
        fs.close()
    except DaxemuError as error:
        log.error("the metadata could not be saved: %s", error)
        raise


class _Ending:
    """How the mount comes to its end, on request."""

    def __init__(self, session: Session, fs: Filesystem, unexpected: Unexpected) -> None:
        self._session = session
        self._fs = fs
        self._unexpected = unexpected

    async def unmount(self, *, force: bool, patience: float = SYNC_PATIENCE) -> None:
        """Unmount and save; ``force`` takes the mount away from those who use it. Each of its steps has
        ``patience`` seconds.

        Raises Busy, or NoSpace if the metadata could not be saved.
        """
        session = self._session
        if force:
            pins = await trio.to_thread.run_sync(pins_of, session.mount, abandon_on_cancel=True)
            await self._unmount_by_force(patience, pinned=bool(pins))
        else:
            await trio.to_thread.run_sync(session.unmount, abandon_on_cancel=True)
        self._fs.commit()

    async def _unmount_by_force(self, patience: float, *, pinned: bool) -> None:
        """Unmount, and cut the connection where that does not end it, in 3 x ``patience`` seconds at most."""
        session = self._session
        if not pinned:
            with trio.move_on_after(patience), suppress(Busy):
                await trio.to_thread.run_sync(session.unmount, abandon_on_cancel=True)
                return
        with trio.move_on_after(patience):
            try:
                await trio.to_thread.run_sync(session.sync, abandon_on_cancel=True)
            except OSError as error:  # the mount may be in other mount namespaces alone: no way in from here
                log.warning("stores of client processes were not written back before the cut: %s", error)
        with trio.move_on_after(patience):
            await trio.to_thread.run_sync(session.detach, abandon_on_cancel=True)
        if not session.abort():
            pyfuse3.terminate()

    async def power_fail(self) -> p.PowerFailed:
        """Cut the connection first, so that nothing dirty is written back; then everything in memory is
        dropped.

        What is on the media stays: a write(2) was flushed there, a store through a mapping only by msync or
        fsync.
        """
        if not self._session.abort():
            raise Unsupported(
                "the connection cannot be cut: mount -t fusectl none /sys/fs/fuse/connections (as root)"
            )
        dropped = self._fs.uncommitted()
        self._fs.abandon()
        await trio.to_thread.run_sync(self._session.detach, abandon_on_cancel=True)
        return p.PowerFailed(dropped.changes, dropped.oldest)

    async def on_signal(self) -> None:
        """Being told to end unmounts; whoever still uses the mount loses it."""
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
            async for number in signals:
                log.info("ending on signal %d", number)
                with self._unexpected.caught(f"ending on signal {number}"):
                    await self.unmount(force=True, patience=SYNC_PATIENCE_ON_SIGNAL)


async def _log_internals_on_signal(machine: Machine) -> None:
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        async for _ in signals:
            log_internals(machine.internals())


async def _answer(
    machine: Machine, ending: _Ending, watchdog: Watchdog, request: p.AnyRequest
) -> msgspec.Struct:
    """Answer any request. Unmount and PowerFail end the machine; the machine answers all others."""
    if isinstance(request, p.Unmount):
        await ending.unmount(force=request.force)
        return p.Done()
    if isinstance(request, p.PowerFail):
        return await ending.power_fail()
    answer = await machine.answer(request)
    if watchdog.cut is not None and not isinstance(request, p.Internals):
        raise NotMounted(f"{watchdog.cut}: see supervisor.log, then mount again")
    return answer


async def _serve(
    make: Callable[[TracerLink, trio.Nursery], Machine],
    made: Callable[[Machine], None],
    ending: _Ending,
    session: Session,
    emit: Emit,
    socket: PrivatePath,
    ready: Callable[[], None],
) -> None:
    """Make a machine, call ``made`` with it, and serve until the mount ends."""
    watchdog = Watchdog(session.mount, emit)
    async with trio.open_nursery() as services:
        services.start_soon(watchdog.beat)
        services.start_soon(ending.on_signal)
        async with (
            TracerLink.open(abort=abort_file(session.mount)) as tracer,
            trio.open_nursery() as nursery,
        ):
            machine = make(tracer, nursery)
            made(machine)
            services.start_soon(_log_internals_on_signal, machine)
            services.start_soon(_commit_now_and_then, machine)
            services.start_soon(Reclaim(machine.fs).run)
            services.start_soon(machine.strategy_host.tick, machine.unexpected)
            services.start_soon(machine.scrubber.run)
            answer = partial(_answer, machine, ending, watchdog)
            control = ControlSocket(socket, machine.log, answer, machine.unexpected)
            listener = control.bind()
            nursery.start_soon(control.serve, listener)
            nursery.start_soon(_announce, session, ready)
            await FuseLoop().main()
            machine.strategy_host.is_ending = True
            with trio.move_on_after(ANSWER_PATIENCE):
                await control.idle()  # whoever asked for the unmount gets an answer before the socket goes
            nursery.cancel_scope.cancel()
        services.cancel_scope.cancel()


async def _commit_now_and_then(machine: Machine) -> None:
    """What nobody synced is durable after a while all the same."""
    last = trio.current_time()
    while True:
        await trio.sleep(COMMIT_LOOK)
        if trio.current_time() < last + COMMIT_INTERVAL and machine.fs.changes < MUCH:
            continue
        last = trio.current_time()
        if machine.fs.shutdown_reason is None:
            try:
                machine.fs.fsync()
            except DaxemuError as error:
                log.error("the periodic commit failed: %s", error)
            except Exception as error:  # noqa: BLE001 - the next commit may succeed
                machine.unexpected.report("the periodic commit", error)


async def _announce(session: Session, ready: Callable[[], None]) -> None:
    if not await trio.to_thread.run_sync(session.tune_page_cache, abandon_on_cancel=True):
        log.info("the page cache reads ahead and keeps less than it could: needs root, and Linux 6.2")
    ready()
