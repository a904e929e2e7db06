"""Between the machine and its repair strategy: when it is called, what it is told, what is made of its
answer.

A strategy that raises, hangs or answers nonsense fails (``RepairStrategyFailed``); from then on it is asked
nothing more, and every failure it should have seen to is "failed". The filesystem goes on without it.
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
from daxemu.events import Emit, RepairFinished, RepairProgress, RepairStrategyFailed
from daxemu.fs.data_ops import Origin
from daxemu.fs.filesystem import Filesystem
from daxemu.fs.rmap import Owner
from daxemu.host.unexpected import Unexpected
from daxemu.mm.memory_failure import Incident, Task
from daxemu.pmem.pmem import Pmem
from daxemu.private_path import PrivatePath
from daxemu.protocol import Progress, RepairReport
from daxemu.ranges import Range, RangeSet
from daxemu.repair import registry
from daxemu.repair.registry import INCOMPLETE
from daxemu.repair.strategy import Failure, Options, Strategy, Verdict
from daxemu.repair.volume import Volume
from daxemu.supervisor.guard import Guard, Hung
from daxemu.uapi import PAGE_SHIFT, PAGE_SIZE

log = logging.getLogger(__name__)

HOOK_LIMIT = 5.0
"""Seconds that any one call into a strategy may take."""
BEGIN_LIMIT = 20.0
"""Seconds that it may take to begin, without the pieces that it then sees to one by one. Less than the
watchdog waits.
"""
SAY = 1.0
"""Seconds between two events that say how far it has come."""
IDLE = 1.0
"""Seconds between looks whether the strategy wants to be ticked."""

P = ParamSpec("P")
T = TypeVar("T")


class Repairs:
    """The strategy of one machine. It is the filesystem's DataOps, too, on the strategy's behalf."""

    def __init__(
        self, pmem: Pmem, fs: Filesystem, root: PrivatePath, emit: Emit, mountpoint: Path | None = None
    ) -> None:
        """``root``: where strategies keep what is not on the device. ``mountpoint``: where it will be
        mounted.
        """
        self._mountpoint = mountpoint
        self._pmem = pmem
        self._fs = fs
        self._root = root
        self._emit = emit
        self._guard = Guard()
        self._strategy: Strategy | None = None
        self._choice = [""]
        """The text of the last call of :meth:`choose`; another object for each."""
        self._lost = RangeSet()
        """Blocks with a mapped store that was lost to poison, since they were last written."""
        self.text = "none"
        self.broken: str | None = None
        self.progress: Progress | None = None
        """How far the strategy is, while it sees to what was there before it."""
        self.is_ending = False
        """The mount is gone: nothing begins any more."""
        self.counters = dict.fromkeys(("recovered", "lost", "cannot", "failed"), 0)

    # -- which one

    def check(self, text: str) -> tuple[type[Strategy], Options]:
        """Whether ``NAME[:key=value,...]`` can be chosen. While mounted, from a worker thread only: a path
        that it names may be on this mount. Raises InvalidArgument.
        """
        kind, options = registry.parse(text)
        for path in options.paths():
            if self._mountpoint is not None and Path(path).resolve().is_relative_to(self._mountpoint):
                raise InvalidArgument(f"--repair {text}: {path} is on the mount itself")
        return kind, options

    def choose(self, text: str, *, after_crash: bool = False) -> Iterator[Progress]:
        """Have ``NAME[:key=value,...]`` from now on. Each step brings a bounded piece of what it keeps up to
        date; files may be used in between.

        Raises InvalidArgument, with nothing changed, or any other DaxemuError if the strategy cannot begin;
        then there is none. Busy if another one was chosen meanwhile: that stays.
        """
        kind, options = self.check(text)
        directory = self._root / kind.layout(options)
        # What a strategy of this mount kept is not for the next: stores come in before that begins.
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
        try:
            if kind.watches and not directory.exists():
                self._root.mkdir()
                (self._root / INCOMPLETE).touch()
            self._strategy = strategy = self._guard.call(BEGIN_LIMIT, kind, volume, options)
            self.text, self.broken = text, None
            if kind.watches:
                self._fs.watch(self)
            pieces = self._guard.call(BEGIN_LIMIT, strategy.mounted, after_crash=after_crash)
            yield from self._see_to(strategy, pieces, choice)
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
                raise DaxemuError(f"the repair strategy {self.text} failed: {self.broken}")
            if self.is_ending:
                raise NotMounted("the mount ends: at the next one the strategy begins anew")
            self._fs.check_alive()
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
        """Remove what strategies kept, but for what ``kind`` has in ``keep``, if that is complete."""
        incomplete = self._root / INCOMPLETE
        is_whole = not incomplete.exists()
        if self._root.exists():
            incomplete.touch()  # a mount that ends meanwhile leaves a part
        yield from registry.forget(self._fs, self._root, keep=keep if is_whole else None, kind=kind)
        incomplete.unlink()

    def _drop(self) -> None:
        strategy, self._strategy = self._strategy, None
        self._fs.watch(None)
        self._lost, self.text, self.progress = RangeSet(), "none", None
        if strategy is not None:
            self._try(strategy.discard)

    def close(self) -> None:
        """The filesystem is about to be unmounted."""
        strategy, self._strategy = self._strategy, None
        if strategy is not None:
            self._try(strategy.unmounting)
        self._fs.watch(None)
        self._guard.close()

    @property
    def is_active(self) -> bool:
        """Whether a failure makes any difference to the strategy."""
        return self.text != "none" and self._fs.shutdown_reason is None

    def report(self) -> RepairReport:
        """How it fares."""
        space = (self._ask(self._strategy.space_bytes) or 0) if self._strategy is not None else 0
        return RepairReport(
            self.text, **self.counters, space_bytes=space, broken=self.broken, progress=self.progress
        )

    # -- calling it

    def _fail(self, where: str, error: BaseException) -> None:
        self.broken = f"{where}: {error!r}" if not isinstance(error, Hung) else f"{where}: {error}"
        self._strategy = None
        self._fs.watch(None)
        self._emit(RepairStrategyFailed(strategy=self.text, reason=self.broken))
        # As text: a traceback that is kept keeps views of the media, which then cannot be unmapped.
        said = "".join(traceback.format_exception(error))
        log.error("the repair strategy %s failed in %s", self.text, where, extra={"details": said})

    def _ask(self, verb: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """Call the strategy; None if it failed. Raises what a strategy may: MediaError and NoSpace."""
        try:
            return self._guard.call(HOOK_LIMIT, verb, *args, **kwargs)
        except (MediaError, NoSpace):
            raise
        except Exception as error:  # noqa: BLE001  another's code, which may raise anything
            self._fail(getattr(verb, "__name__", "?"), error)
            return None

    def _try(self, verb: Callable[[], None]) -> None:
        try:
            self._ask(verb)
        except DaxemuError as error:
            self._fail(getattr(verb, "__name__", "?"), error)

    # -- a failure

    def failed(self, incident: Incident, tasks: Sequence[Task]) -> RangeSet:
        """Nobody has the incident's pages mapped any more, or a read waits for them: repair what can be. The
        strategy is asked once. ``tasks``: who had them mapped.

        Returns the pfns that are as they were, whose processes need not be told.
        """
        if not self.is_active or incident.pre_remove:
            return RangeSet()
        if incident.spared is not None:
            return incident.spared
        spared = incident.spared = RangeSet()
        for part in incident.parts:
            first = part.pfn - self._pmem.dax.base_pfn
            blocks = Range(first, first + part.nr_pages).clip(0, self._fs.allocator.total)
            if part.error is None and blocks:
                verdict = self._repair(blocks, self._writable(incident, tasks))
                if verdict is None:
                    part.error = DaxemuError(f"the repair strategy {self.text} failed: {self.broken}")
                elif verdict.transparent:
                    for run in verdict.recovered:
                        spared.add(run.start + self._pmem.dax.base_pfn, run.end + self._pmem.dax.base_pfn)
        return spared

    def repair_now(self, blocks: Range, mapped: Incident, tasks: Sequence[Task]) -> Verdict | None:
        """Ask the strategy (again) about what is bad of ``blocks``, whose mappings are ``mapped`` and which
        ``tasks`` have; None if it failed.
        """
        return self._repair(blocks, self._writable(mapped, tasks)) if self.is_active else Verdict()

    def _writable(self, incident: Incident, tasks: Sequence[Task]) -> RangeSet:
        """The device blocks of the incident that somebody has mapped for writing."""
        found, base = RangeSet(), self._pmem.dax.base_pfn
        for task in tasks:
            for run in task.present:
                for hurt in incident.mappings if run.writable else ():
                    part = Range(run.index, run.index + run.nr_pages).clip(
                        hurt.index, hurt.index + hurt.count
                    )
                    if hurt.mapping == run.mapping and part:
                        start = hurt.pfn - base + part.start - hurt.index
                        found.add(start, start + part.length)
        return found

    def _repair(self, blocks: Range, unseen: RangeSet) -> Verdict | None:
        began = time.perf_counter()
        failure, owners = self._failure(blocks, unseen)
        if not failure.blocks and not failure.copies:
            return Verdict()  # free blocks, or poison that is only simulated: there is nothing to repair
        verdict = self._ask_for_verdict(failure)
        if not failure.blocks:
            return verdict
        word = "failed" if verdict is None else verdict.word(failure)
        self.counters[word] += 1
        self._emit(
            RepairFinished(
                strategy=self.text,
                pfn=blocks.start + self._pmem.dax.base_pfn,
                nr_pages=blocks.length,
                verdict=word,
                transparent=verdict is not None and verdict.transparent,
                seconds=time.perf_counter() - began,
                lost=_not_recovered(owners, verdict.recovered if verdict is not None else RangeSet()),
                reason=verdict.reason if verdict is not None else self.broken,
            )
        )
        return verdict

    def _failure(self, blocks: Range, unseen: RangeSet) -> tuple[Failure, list[Owner]]:
        volume = Volume(self._fs, self._root)
        bad = RangeSet((r.start >> PAGE_SHIFT, -(-r.end >> PAGE_SHIFT)) for r in volume.poison(blocks))
        used = tuple(part for run in volume.in_use(blocks) for part in bad.overlapping(*run))
        copies = tuple(position for run in bad for position in volume.reserved.positions(run))
        stale = RangeSet(part for run in used for part in self._lost.overlapping(*run))
        owners = [owner for run in used for owner in volume.owners(run)]
        return Failure(used, unseen, stale, copies), owners

    def _ask_for_verdict(self, failure: Failure) -> Verdict | None:
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
            volume = Volume(self._fs, self._root)
            if any(volume.poison(part) for part in volume.in_use(run)):
                return f"it says that blocks {run.start}-{run.end} are recovered, and they are bad"
        return None

    # -- DataOps, for the strategy

    def verify(self, blocks: Range) -> None:
        """See DataOps."""
        if self._strategy is not None:
            self._ask(self._strategy.verify, blocks)

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
        if self._strategy is not None:
            self._try_hook(self._strategy.freed, blocks)

    def committed(self) -> None:
        """See DataOps."""
        if self._strategy is not None:
            self._try_hook(self._strategy.committed)

    def _try_hook(self, verb: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
        """What has happened cannot be refused any more: an error is the strategy's own."""
        try:
            self._ask(verb, *args, **kwargs)
        except DaxemuError as error:
            self._fail(getattr(verb, "__name__", "?"), error)

    # -- in the background

    async def attach(self, text: str) -> None:
        """As :meth:`choose`, while the mount is in use: half of the time is for all else. Raises as that."""
        began = trio.current_time()
        for _ in self.choose(text):
            await trio.sleep(trio.current_time() - began)
            began = trio.current_time()

    async def scrub(self) -> int:
        """Have the strategy look at everything; returns how many bytes it looked at."""
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
        """Tick the strategy for as long as it lives."""
        while True:
            interval = self._strategy.interval if self._strategy is not None else None
            await trio.sleep(interval or IDLE)
            if interval is not None and self._strategy is not None and self._fs.shutdown_reason is None:
                with unexpected.caught("the tick of the repair strategy"):
                    self._try(self._strategy.tick)


def _not_recovered(owners: list[Owner], recovered: RangeSet) -> list[tuple[int, int, int]]:
    """(inode, offset, length) of what owners had and did not get back, in bytes."""
    found = []
    for owner in owners:
        for part in recovered.gaps(owner.dev_block, owner.dev_block + owner.length):
            at = owner.file_block + part.start - owner.dev_block
            found.append((owner.ino, at << PAGE_SHIFT, part.length << PAGE_SHIFT))
    return found
