"""The life of a repair strategy, and guarded calls into the strategy.

A strategy fails if a method raises, hangs or answers nonsense (``RepairStrategyFailed``). From then on no
method of the strategy is called, and every failure gets the verdict "failed". The filesystem goes on without
the strategy.
"""

from __future__ import annotations

import logging
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import trio

from daxemu.errors import Busy, DaxemuError, InvalidArgument, MediaError, NoSpace, NotMounted
from daxemu.events import Emit, RepairProgress, RepairStrategyFailed
from daxemu.fs.data_ops import Origin
from daxemu.fs.filesystem import Filesystem
from daxemu.host.unexpected import Unexpected
from daxemu.private_path import PrivatePath
from daxemu.protocol import Progress
from daxemu.ranges import Range, RangeSet
from daxemu.repair import registry
from daxemu.repair.arrays import SparseArray
from daxemu.repair.registry import INCOMPLETE, MAPPED
from daxemu.repair.strategy import Failure, Options, Strategy, Verdict
from daxemu.repair.volume import Volume
from daxemu.supervisor.guard import Guard, Hung
from daxemu.uapi import PAGE_SIZE

log = logging.getLogger(__name__)

HOOK_LIMIT = 5.0
"""Time limit of one call into a strategy, in seconds."""
BEGIN_LIMIT = 20.0
"""Time limit of the begin of a strategy, in seconds, without the initial pieces. Below the watchdog's."""
SAY = 1.0
"""Seconds between two events ``RepairProgress``."""
IDLE = 1.0
"""Seconds between two checks whether the strategy has a tick interval."""

P = ParamSpec("P")
T = TypeVar("T")


class StrategyHost:
    """Holds the strategy of one machine, and calls its methods. Implements DataOps for the filesystem."""

    def __init__(self, fs: Filesystem, root: PrivatePath, emit: Emit, mountpoint: Path | None = None) -> None:
        """``root``: directory for data that strategies do not keep on the device. ``mountpoint``: where the
        filesystem will be mounted.
        """
        self._mountpoint = mountpoint
        self._fs = fs
        self._root = root
        self._emit = emit
        self._guard = Guard()
        self._strategy: Strategy | None = None
        self._choice = [""]
        """The text of the last call of :meth:`choose`; a new object for each call."""
        self._lost = RangeSet()
        """Blocks with a mapped store lost to poison since the last write to the block."""
        self._mapped: SparseArray | None = None
        """Marks of ``Filesystem.mapped_stores``, which outlive a crash; None without a watching strategy."""
        self.text = "none"
        self.broken: str | None = None
        self.progress: Progress | None = None
        """Progress of the initial pieces; None after these."""
        self.is_ending = False
        """True once the mount is gone: no strategy begins any more."""

    # -- choice of the strategy

    def check(self, text: str) -> tuple[type[Strategy], Options]:
        """Parse ``NAME[:key=value,...]``. Raises InvalidArgument if this strategy cannot be chosen.

        While mounted, call from a worker thread only: a path in the options may be on this mount.
        """
        kind, options = registry.parse(text)
        for path in options.paths():
            if self._mountpoint is not None and Path(path).resolve().is_relative_to(self._mountpoint):
                raise InvalidArgument(f"--repair {text}: {path} is on the mount itself")
        return kind, options

    def choose(self, text: str, *, after_crash: bool = False) -> Iterator[Progress]:
        """Change to the strategy ``NAME[:key=value,...]``.

        Each step brings one piece of the device up to date. Files may be used between two steps.

        Raises InvalidArgument, with nothing changed. Raises any other DaxemuError if the strategy cannot
        begin; then no strategy is left. Raises Busy if another strategy was chosen meanwhile; that one stays.
        """
        kind, options = self.check(text)
        directory = self._root / kind.layout(options)
        # The data of an earlier strategy of this mount is out of date at the next begin: stores go on
        # in between.
        keep = directory if self._strategy is None else None
        self._choice = choice = [text]
        self._drop()
        for _ in self._forget(keep, kind):
            yield Progress(0, 0)
            self._check_choice(choice)
            if self.is_ending:
                raise NotMounted("the mount ends: at the next one the strategy begins anew")
        volume = Volume(self._fs, directory, self._guard.atomically)
        strategy: Strategy | None = None
        unseen: list[Range] = []
        try:
            if kind.watches and not directory.exists():
                self._root.mkdir()
                (self._root / INCOMPLETE).touch()
            self._strategy = strategy = self._guard.call(BEGIN_LIMIT, kind, volume, options)
            self.text, self.broken = text, None
            if kind.watches:
                self._fs.watch(self)
                self._mapped = SparseArray(self._root / MAPPED, "uint8", self._fs.allocator.total)
                # Stores of a mount that crashed, seen below.
                unseen = list(self._mapped.nonzero())
                for blocks in unseen:
                    self._fs.mapped_stores.add(*blocks)
                self._fs.note_stored_to()
            pieces = self._guard.call(BEGIN_LIMIT, strategy.mounted, after_crash=after_crash)
            yield from self._see_to(strategy, pieces, choice)
            for blocks in unseen:
                self._fs.mapped_stores_end(blocks)
            (self._root / INCOMPLETE).unlink()
        except Exception as error:
            if self._strategy is strategy and not self.is_ending:
                self._drop()
                for _ in self._forget():
                    pass
            if isinstance(error, DaxemuError):
                raise
            raise DaxemuError(f"the repair strategy {text} cannot begin: {error!r}") from error

    def _check_choice(self, choice: list[str]) -> None:
        if self._choice is not choice:
            raise Busy(f"another repair strategy was chosen meanwhile: {self._choice[0]}")

    def _see_to(
        self, strategy: Strategy, pieces: Iterator[Range] | None, choice: list[str]
    ) -> Iterator[Progress]:
        total = self._fs.allocator.used_in(Range(0, self._fs.allocator.total)) * PAGE_SIZE
        progress, said = Progress(0, total), time.monotonic()
        while pieces is not None:
            self._check_choice(choice)
            if self._strategy is not strategy:
                raise self.error()
            if self.is_ending:
                raise NotMounted("the mount ends: at the next one the strategy begins anew")
            self._fs.fsync_if_much()
            piece = self._guard.call(HOOK_LIMIT, next, pieces, None)
            if piece is None:
                break
            seen = self._fs.allocator.used_in(piece.clip(0, self._fs.allocator.total)) * PAGE_SIZE
            self.progress = progress = Progress(min(total, progress.done_bytes + seen), total)
            if time.monotonic() - said >= SAY:
                said = time.monotonic()
                self._emit(
                    RepairProgress(strategy=self.text, done_bytes=progress.done_bytes, total_bytes=total)
                )
            yield progress
        if self.progress is not None:
            self.progress = None
            self._emit(RepairProgress(strategy=self.text, done_bytes=total, total_bytes=total))

    def _forget(self, keep: PrivatePath | None = None, kind: type[Strategy] | None = None) -> Iterator[None]:
        """Delete the data of strategies, piece by piece. Complete data of ``kind`` in ``keep`` stays."""
        incomplete = self._root / INCOMPLETE
        is_whole = not incomplete.exists()
        if self._root.exists():
            incomplete.touch()  # the mount may end before all is deleted
        yield from registry.forget(self._fs, self._root, keep=keep if is_whole else None, kind=kind)
        incomplete.unlink()

    def _drop(self) -> None:
        strategy, self._strategy = self._strategy, None
        self._unwatch()
        self._lost, self.text, self.progress = RangeSet(), "none", None
        if strategy is not None:
            self._try(strategy.discard)

    def close(self) -> None:
        """Detach the strategy: the filesystem is about to be unmounted."""
        strategy, self._strategy = self._strategy, None
        if strategy is not None:
            self._try(strategy.unmounting)
        self._unwatch()
        self._guard.close()

    def _unwatch(self) -> None:
        self._fs.watch(None)
        if self._mapped is not None:
            self._mapped.close()
            self._mapped = None

    @property
    def is_active(self) -> bool:
        """True if failures go to a strategy: one was chosen, and the filesystem is not shut down."""
        return self.text != "none" and self._fs.shutdown_reason is None

    def error(self) -> DaxemuError:
        """Return the error for a failure of memory that a failed strategy did not repair."""
        return DaxemuError(f"the repair strategy {self.text} failed: {self.broken}")

    def volume(self) -> Volume:
        """Return the view of the filesystem that strategies have."""
        return Volume(self._fs, self._root)

    def stale(self, blocks: Range) -> Iterator[Range]:
        """Return the parts of ``blocks`` with a mapped store that was lost to poison."""
        return self._lost.overlapping(*blocks)

    def space_bytes(self) -> int:
        """Return the number of bytes that the strategy takes up."""
        return (self._ask(self._strategy.space_bytes) or 0) if self._strategy is not None else 0

    # -- calls into the strategy

    def _fail(self, where: str, error: BaseException) -> None:
        self.broken = f"{where}: {error!r}" if not isinstance(error, Hung) else f"{where}: {error}"
        self._strategy = None
        self._unwatch()
        self._emit(RepairStrategyFailed(strategy=self.text, reason=self.broken))
        # As text: a traceback object would keep views of the media, and the media could not be unmapped.
        said = "".join(traceback.format_exception(error))
        log.error("the repair strategy %s failed in %s", self.text, where, extra={"details": said})

    def _ask(self, verb: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Call a method of the strategy, for at most HOOK_LIMIT seconds. Return None if the strategy failed.

        MediaError and NoSpace from the method propagate; any other exception is a failure of the strategy.
        """
        try:
            return self._guard.call(HOOK_LIMIT, verb, *args, **kwargs)
        except (MediaError, NoSpace):
            raise
        except Exception as error:  # noqa: BLE001  the code of a user may raise any exception
            self._fail(getattr(verb, "__name__", "?"), error)
            return None

    def _try(self, verb: Callable[[], None]) -> None:
        try:
            self._ask(verb)
        except DaxemuError as error:
            self._fail(getattr(verb, "__name__", "?"), error)

    def verdict(self, failure: Failure) -> Verdict | None:
        """Ask the strategy about a failure. None if there is no strategy, or if the strategy failed."""
        if self._strategy is None:
            return None
        try:
            verdict = self._ask(self._strategy.failed, failure)
        except DaxemuError as error:
            self._fail("failed", error)
            return None
        if verdict is None:
            return None
        if why := self._why_nonsense(failure, verdict):
            self._fail("failed", ValueError(why))
            return None
        return verdict

    def _why_nonsense(self, failure: Failure, verdict: Verdict) -> str | None:
        if not isinstance(verdict, Verdict):
            return f"it answered {verdict!r}, which is no Verdict"
        asked = RangeSet(failure.blocks)
        for run in (*verdict.recovered, *verdict.lost):
            if not asked.covers(*run):
                return f"it speaks of blocks {run.start}-{run.end}, which did not fail"
        for run in verdict.recovered:
            if verdict.lost.overlaps(*run):
                return f"it says of blocks in {run.start}-{run.end} both that they are recovered and lost"
            volume = self.volume()
            if any(volume.poison(part) for part in volume.in_use(run)):
                return f"it says that blocks {run.start}-{run.end} are recovered, and they are bad"
        return None

    # -- DataOps, for the strategy

    def verify(self, blocks: Range) -> None:
        """See DataOps."""
        for settled in self._fs.mapped_stores.gaps(*blocks):
            if self._strategy is not None:
                self._ask(self._strategy.verify, settled)

    def store_begins(self, blocks: Sequence[Range], origin: Origin) -> None:
        """See DataOps."""
        if self._strategy is not None:
            self._ask(self._strategy.store_begins, blocks, origin)

    def store_done(self, blocks: Sequence[Range], origin: Origin) -> None:
        """See DataOps."""
        if origin is Origin.SYSCALL and self._lost:
            for run in blocks:
                self._lost.remove(*run)
        if self._strategy is not None:
            self._try_hook(self._strategy.store_done, blocks, origin)

    def mapped(self, blocks: Range) -> None:
        """See DataOps."""
        if self._mapped is not None:
            self._mapped.fill(blocks, 1)

    def unmapped(self, blocks: Range) -> bool:
        """See DataOps. The strategy is told of a store at this moment, as at a write-back."""
        for run in self.volume().in_use(blocks):
            if self._strategy is None:
                return False
            try:
                self._ask(self._strategy.store_begins, [run], Origin.MAPPED)
            except DaxemuError as error:
                log.warning("blocks %d-%d stay without protection: %s", run.start, run.end, error)
                return False
            self.store_done([run], Origin.MAPPED)
        if self._mapped is not None:
            self._mapped.fill(blocks, 0)
        return True

    def store_lost(self, blocks: Range) -> None:
        """See DataOps."""
        self._lost.add(*blocks)

    def allocated(self, blocks: Range) -> None:
        """See DataOps."""
        if self._strategy is not None:
            self._try_hook(self._strategy.allocated, blocks)

    def freed(self, blocks: Range) -> None:
        """See DataOps."""
        self._lost.remove(*blocks)
        if self._mapped is not None and self._fs.mapped_stores.overlaps(*blocks):
            self._fs.mapped_stores.remove(*blocks)
            self._mapped.fill(blocks, 0)
        if self._strategy is not None:
            self._try_hook(self._strategy.freed, blocks)

    def committed(self) -> None:
        """See DataOps."""
        if self._strategy is not None:
            self._try_hook(self._strategy.committed)

    def _try_hook(self, verb: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """Call a hook after its event. A refusal comes too late: any error is a failure of the strategy."""
        try:
            self._ask(verb, *args, **kwargs)
        except DaxemuError as error:
            self._fail(getattr(verb, "__name__", "?"), error)

    # -- in the background

    async def attach(self, text: str) -> None:
        """Change the strategy while the mount is in use: half of the time is left to other tasks.

        Raises the errors of :meth:`choose`.
        """
        began = trio.current_time()
        for _ in self.choose(text):
            await trio.sleep(trio.current_time() - began)
            began = trio.current_time()

    async def scrub(self) -> int:
        """Have the strategy scrub all blocks. Return the number of bytes scrubbed."""
        seen = 0
        strategy = self._strategy
        if strategy is None:
            return seen
        pieces = strategy.scrub()
        while self._strategy is strategy:
            try:
                piece = self._ask(next, pieces, None)
            except DaxemuError as error:
                self._fail("scrub", error)
                break
            if piece is None:
                break
            seen += piece.length * PAGE_SIZE
            await trio.lowlevel.checkpoint()
        return seen

    async def tick(self, unexpected: Unexpected) -> None:
        """Call the strategy's tick at its interval, until cancelled."""
        while True:
            interval = self._strategy.interval if self._strategy is not None else None
            await trio.sleep(interval or IDLE)
            if interval is not None and self._strategy is not None and self._fs.shutdown_reason is None:
                with unexpected.caught("the tick of the repair strategy"):
                    self._try(self._strategy.tick)
