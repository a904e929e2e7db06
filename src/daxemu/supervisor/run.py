"""The life of a supervisor process: open the device, mount, serve, unmount, save.

Order of opening, undone in reverse: device lock, media, filesystem (the holder), mount, event loop, tracer,
control socket. The process ends with the mount: by ``daxemu umount``, umount(8), a signal, or an abort of the
connection.
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
from daxemu.host.direct.mappings import DirectMappings
from daxemu.host.direct_needs import check_direct
from daxemu.host.fuse import supplement
from daxemu.host.fuse.loop import FuseLoop
from daxemu.host.fuse.session import Session, abort_file, check_mountpoint
from daxemu.host.fuse.watchdog import Watchdog
from daxemu.host.mappings import Mappings
from daxemu.host.page_cache.mappings import PageCacheMappings
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
from daxemu.supervisor.verbs.status import mode_of

import pyfuse3  # isort: skip  (after host.supplement, which must be loaded first)

log = logging.getLogger(__name__)

SYNC_PATIENCE = 2.0
"""Seconds of each step of ``umount --force``: unmount, write-back of client processes' stores, detach."""
SYNC_PATIENCE_ON_SIGNAL = 10.0
"""Seconds of each step where the supervisor ends on a signal: no client waits for an answer then."""
COMMIT_INTERVAL = 5.0
"""Seconds between commits of changes without an fsync(2), as in ext4 and XFS."""
COMMIT_LOOK = 0.2
"""Seconds between two checks for MUCH changes, which are committed at once."""
ANSWER_PATIENCE = 2.0
"""Seconds for the answers to requests under way after the end of the mount."""


def supervise(
    device: Path,
    mountpoint: Path,
    ready: Callable[[], None],
    options: MountOptions = PLAIN,
    progress: Callable[[p.Progress], None] = lambda progress: None,
) -> None:
    """Mount ``device`` on ``mountpoint``, and serve the mount until its end.

    ``ready`` is called once the mount is usable. ``progress`` is called before that, each time the repair
    strategy has brought another piece of the device up to date. Raises DaxemuError if the device cannot be
    mounted; then no mount and no lock remains.
    """
    raise_descriptor_limit()
    with ExitStack() as undo:
        check_mountpoint(mountpoint)
        if options.direct:
            check_direct()
        directory = undo.enter_context(DeviceDir.open(device))
        tightened = directory.tighten()
        events = EventLog(directory.root / "events.jsonl", options.log_size)
        undo.callback(events.close)
        own_log = SupervisorLog(directory.root / "supervisor.log", lambda: events.limit)
        own_log.attach()
        undo.callback(own_log.detach)
        pmem = Pmem(directory, events.emit, is_direct=options.direct)
        undo.callback(pmem.close)
        try:
            mm, fs = open_core(pmem, events, (os.geteuid(), os.getegid()))
        except CorruptMetadata as error:
            # A mount uses good copies of metadata pages by itself. Only fsck tells if more can be repaired.
            why = str(error).removesuffix(FSCK_HINT)
            raise CorruptMetadata(f"{why}; see: daxemu fsck {printable(device)}") from error
        undo.callback(_save, fs)
        host = StrategyHost(fs, directory.root / "repair", events.emit, mountpoint.resolve())
        undo.callback(host.close)
        for seen in host.choose(options.repair, after_crash=fs.had_crashed):
            progress(seen)
        gc.freeze()  # the loaded objects stay: a collection over a million inodes would delay a failure
        session = Session.open(directory.path, mountpoint)
        undo.callback(session.detach)
        mode = f"{directory.config.mode:04o}"
        where = printable(session.mount.mountpoint)
        mounted: list[Event] = [
            Mounted(device=printable(device), mountpoint=where, size=pmem.dax.size, mode=mode_of(pmem))
        ]
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
        ending = _Ending(session, fs, unexpected)
        make = partial(
            Machine,
            pmem,
            mm,
            fs,
            session,
            events,
            host,
            unexpected,
            power_fail=ending.power_fail,
            make_mappings=DirectMappings if options.direct else PageCacheMappings,
            supplement_missing=supplement.MISSING,
            has_layouts=options.layouts and supplement.READS,
        )
        trio.run(_serve, make, made, ending, session, events.emit, directory.root / "control.sock", ready)


def _save(fs: Filesystem) -> None:
    try:
        fs.close()
    except DaxemuError as error:
        log.error("the metadata could not be saved: %s", error)
        raise


class _Ending:
    """Ends of a mount: unmount, unmount by force, power failure, signal."""

    def __init__(self, session: Session, fs: Filesystem, unexpected: Unexpected) -> None:
        self._session = session
        self._fs = fs
        self._unexpected = unexpected
        self.mappings: Mappings | None = None
        """None before the mount answers requests: until then no process has stored anything."""

    async def unmount(self, *, force: bool, patience: float = SYNC_PATIENCE) -> None:
        """Unmount and commit. ``force``: also while in use, in steps of ``patience`` seconds each.

        Raises Busy if processes use the mount (without ``force``), NoSpace if the commit fails.
        """
        session = self._session
        if force:
            pinned = True  # a mount whose copies cannot be listed in time counts as pinned
            with trio.move_on_after(patience):
                pins = await trio.to_thread.run_sync(pins_of, session.mount, abandon_on_cancel=True)
                pinned = bool(pins)
            await self._unmount_by_force(patience, pinned=pinned)
        else:
            await trio.to_thread.run_sync(session.unmount, abandon_on_cancel=True)
        self._fs.commit()

    async def _unmount_by_force(self, patience: float, *, pinned: bool) -> None:
        """Unmount, or else write back, detach and cut the connection: at most 3 x ``patience`` seconds."""
        session = self._session
        if not pinned:
            with trio.move_on_after(patience), suppress(Busy):
                await trio.to_thread.run_sync(session.unmount, abandon_on_cancel=True)
                return
        with trio.move_on_after(patience):
            try:
                if self.mappings is not None:
                    await trio.to_thread.run_sync(self.mappings.write_back_all, abandon_on_cancel=True)
            except OSError as error:  # only other mount namespaces may have the mount: no path from here
                log.warning("stores of client processes were not written back before the cut: %s", error)
        with trio.move_on_after(patience):
            await trio.to_thread.run_sync(session.detach, abandon_on_cancel=True)
        if not session.abort():
            pyfuse3.terminate()

    async def power_fail(self) -> p.PowerFailed:
        """Cut the connection, so that no dirty page is written back, and drop all state in memory.

        The bytes on the media stay. A write(2) reaches the media at once; a store through a mapping reaches
        the media by msync or fsync. Raises Unsupported if the connection cannot be cut.
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
        """Unmount by force on SIGTERM, SIGINT and SIGHUP, until cancelled."""
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
    """Answer a request. Unmount and PowerFail end the mount; the machine answers all others.

    Raises DaxemuError; NotMounted after the watchdog has cut the connection.
    """
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
            ending.mappings = machine.mappings
            services.start_soon(_log_internals_on_signal, machine)
            services.start_soon(_commit_now_and_then, machine)
            services.start_soon(Reclaim(machine.fs).run)
            services.start_soon(machine.strategy_host.tick, machine.unexpected)
            services.start_soon(machine.scrubber.run)
            answer = partial(_answer, machine, ending, watchdog)
            control = ControlSocket(socket, machine.log, machine.traces, answer, machine.unexpected)
            listener = control.bind()
            nursery.start_soon(control.serve, listener)
            nursery.start_soon(_announce, machine.mappings, ready)
            try:
                await FuseLoop().main()
            finally:
                with trio.CancelScope(shield=True):
                    await machine.mappings.stop()
            machine.strategy_host.is_ending = True
            with trio.move_on_after(ANSWER_PATIENCE):
                await control.idle()  # the client of an unmount gets the reply before the socket closes
            nursery.cancel_scope.cancel()
        services.cancel_scope.cancel()


async def _commit_now_and_then(machine: Machine) -> None:
    """Commit every COMMIT_INTERVAL seconds, or sooner after MUCH changes."""
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


async def _announce(mappings: Mappings, ready: Callable[[], None]) -> None:
    await mappings.start()
    ready()
