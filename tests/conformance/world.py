"""Effects of a scenario's commands: the blocks of each file, the processes that map and share blocks, poison,
and contents.

The world is a second opinion on the device: where daxemu's outcome differs from the recorded one, the world
decides which outcome is right, independently of daxemu's own state. Pages of files are blocks, numbers
without a further meaning.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.conformance.process import Mapping, Process
from tests.conformance.recording import Outcome, Step, last_touched

PAGE = 4096
WINDOW = 16
"""Pages that fault-around maps at most; where its window begins depends on addresses."""
Block = int
Place = tuple[str, int, int]
"""Process, mapping, page of the mapping."""


@dataclass
class World:
    direct: bool = False
    """The mount is direct: a mapping is one of the media."""
    files: dict[str, list[Block | None]] = field(default_factory=dict)
    content: dict[Block, str] = field(default_factory=dict)
    """Value of all bytes of the block; "?" mixed."""
    unmapped: set[Place] = field(default_factory=set)
    """Pages present at the failure, and not touched since: the kernel leaves such a page mapped if it
    signalled no process."""
    poison: set[Block] = field(default_factory=set)
    cleared: bool = False  # or freed: the kernel's device cannot
    done: list[Step] = field(default_factory=list)
    down: bool = False
    """Filesystem shut down or device removed."""
    processes: dict[str, Process] = field(default_factory=dict)
    present: set[Place] = field(default_factory=set)
    cached: set[tuple[str, int]] = field(default_factory=set)  # pages that the page cache may hold
    around: set[Place] = field(default_factory=set)
    """Pages that fault-around may have made present: cached neighbours of a touched page."""
    copies: dict[Place, str] = field(default_factory=dict)  # private ones
    diverged: dict[Block, str] = field(default_factory=dict)
    """Blocks that differ from the kernel's, and the reason of the difference that caused this."""
    dead: dict[str, str] = field(default_factory=dict)
    """Processes that died here only, with the reason."""
    sysctl: bool = False
    _last: Block = 0

    # -- asking

    def process(self, who: str) -> Process:
        return self.processes.setdefault(who, Process())

    def block(self, file: str, page: int) -> Block | None:
        blocks = self.files.get(file, [])
        return blocks[page] if page < len(blocks) else None

    def block_at(self, place: Place) -> Block | None:
        """Return the block that a page of a mapping shows; None for a hole, a private copy, or no mapping."""
        who, number, page = place
        mapping = self.process(who).maps.get(number)
        if mapping is None or place in self.copies:
            return None
        return self.block(mapping.file, mapping.first + page)

    def holds(self, block: Block | None) -> str:
        return "0" if block is None else self.content[block]

    def letter_at(self, place: Place) -> str:
        return self.copies[place] if place in self.copies else self.holds(self.block_at(place))

    def shared(self, block: Block) -> bool:
        return sum(b == block for blocks in self.files.values() for b in blocks) > 1

    def bad(self, block: Block | None) -> bool:
        return block in self.poison

    def mapped_at(self, block: Block) -> Iterator[Place]:
        """Return every place where the block is present, private copies excepted."""
        return (place for place in sorted(self.present) if self.block_at(place) == block)

    def maybe_at(self, block: Block) -> Iterator[Place]:
        """Return every place where the block is present only if fault-around made it so."""
        return (place for place in sorted(self.around - self.present) if self.block_at(place) == block)

    def copied_from(self, block: Block) -> Iterator[Place]:
        """Return the private copies of the block."""
        for who, number, page in self.copies:
            mapping = self.process(who).maps[number]
            if self.block(mapping.file, mapping.first + page) == block:
                yield who, number, page

    # -- effects of steps; only commands that succeeded here are recorded

    def new_block(self, holding: str) -> Block:
        self._last += 1
        self.content[self._last] = holding
        return self._last

    def named(self, file: str) -> str:
        """Return the key of the file that a failure names, which may be unlinked."""
        return (
            file if file in self.files else next((n for n in self.files if n.startswith(f"{file} (")), file)
        )

    def failing(self, step: Step) -> list[Block]:
        """Return the blocks of files that a step poisons."""
        pages: list[tuple[str, int]] = []
        if step.who == "host" and step.do.startswith("machine check"):
            pages = [(self.named("f"), last_touched(self.done))]
        elif step.who == "inj" and (found := re.match(r"poison page (\d+)(?: of (\S+))?", step.do)):
            pages = [(self.named(found.group(2) or "f"), int(found.group(1)))]
        elif found := re.match(r"madvise (\d+) (\d+) (\d+) hwpoison", step.do):
            number, first, count = (int(word) for word in found.groups())
            mapping = self.process(step.who).maps[number]
            pages = [(mapping.file, mapping.first + first + i) for i in range(count)]
        blocks = (self.block(*page) for page in pages)
        return [block for block in blocks if block is not None]

    def after(self, step: Step, ours: Outcome, reason: str | None) -> None:
        """Record the effect of a step, failures included; ``reason``: cause of a difference from the
        kernel.
        """
        for block in self.failing(step):
            self.poison.add(block)
            self.around -= set(self.maybe_at(block))
            self.unmapped |= set(self.mapped_at(block))
            self.present -= set(self.mapped_at(block))
        self.down |= step.who in ("inj", "host") and ("superblock" in step.do or "unbind" in step.do)
        self._apply(step, ours, reason)
        self.done.append(step)

    def _apply(self, step: Step, ours: Outcome, reason: str | None) -> None:
        for death in ours.deaths:
            if reason is not None:
                self.dead.setdefault(death["who"], reason)
        words = step.do.split()
        handler = getattr(self, f"_do_{words[0]}", None)
        if handler is None:
            return
        res = ours.res if isinstance(ours.res, dict) else {}
        if step.who == "-" or res.get("ok") is not None or res.get("ret", -1) >= 0:
            handler(step.who, words[1:], reason)
        elif reason is not None:
            self._note(step.who, words, reason)

    def _note(self, who: str, words: list[str], reason: str) -> None:
        """Record a store that the kernel did and daxemu refused."""
        if words[0] in ("pwrite", "kwrite"):
            fd, offset, length = (int(w) for w in (words[1:4] if words[0] == "pwrite" else words[3:6]))
            for block, _ in self.span(who, fd, offset, length):
                if block is not None:
                    self.diverged[block] = reason
        elif words[0] in ("tw", "kread"):
            block = self.block_at((who, int(words[1]), int(words[2])))
            if block is not None:
                self.diverged[block] = reason

    def span(self, who: str, fd: int, offset: int, length: int) -> Iterator[tuple[Block | None, bool]]:
        """Return the blocks of a range of a file, and for each whether the range covers the whole block."""
        file, _ = self.process(who).fds.get(fd, ("", False))
        for page in range(offset // PAGE, -(-(offset + length) // PAGE)):
            whole = offset <= page * PAGE and (page + 1) * PAGE <= offset + length
            yield self.block(file, page), whole

    def _replace(self, file: str, page: int, block: Block | None) -> None:
        blocks = self.files[file]
        blocks += [None] * (page + 1 - len(blocks))
        old = blocks[page]
        if old is not None:
            gone = self.mapped_at(old)
            self.present -= {p for p in gone if self.process(p[0]).maps[p[1]].file == file}
        blocks[page] = block
        if old in self.poison and not any(old in b for b in self.files.values()):
            self.cleared = True

    def _do_mkfile(self, _: str, w: list[str], __: str | None) -> None:
        letters = (chr(ord("A") + (ord(w[4]) - ord("A") + i) % 26) for i in range(int(w[2])))
        self.files[w[0]] = [self.new_block(letter) for letter in letters]

    def _do_early_kill(self, _: str, w: list[str], __: str | None) -> None:
        self.sysctl = w[0] == "1"

    def _do_open(self, who: str, w: list[str], _: str | None) -> None:
        self.files.setdefault(w[1], [])
        self.process(who).fds[int(w[0])] = (w[1], w[2] == "direct")

    def _do_mmap(self, who: str, w: list[str], _: str | None) -> None:
        file = self.process(who).fds[int(w[1])][0]
        self.process(who).maps[int(w[0])] = Mapping(file, int(w[2]), int(w[3]), w[4] == "private")

    def _do_munmap(self, who: str, w: list[str], _: str | None) -> None:
        del self.process(who).maps[int(w[0])]
        self.present = {p for p in self.present if p[:2] != (who, int(w[0]))}
        self.around = {p for p in self.around if p[:2] != (who, int(w[0]))}
        self.copies = {p: c for p, c in self.copies.items() if p[:2] != (who, int(w[0]))}

    def _do_close(self, who: str, w: list[str], _: str | None) -> None:
        self.process(who).fds.pop(int(w[0]), None)

    def _do_exec(self, who: str, _: list[str], __: str | None) -> None:
        self.processes[who] = Process(policies=self.process(who).policies[:1])
        self.present = {p for p in self.present if p[0] != who}
        self.around = {p for p in self.around if p[0] != who}
        self.copies = {p: c for p, c in self.copies.items() if p[0] != who}

    def _do_fork(self, who: str, w: list[str], _: str | None) -> None:
        self.processes[f"p{w[0]}"] = self.process(who).child()
        self.copies |= {(f"p{w[0]}", m, p): c for (of, m, p), c in self.copies.items() if of == who}

    def _do_mcekill(self, who: str, w: list[str], _: str | None) -> None:
        self.process(who).policies[0] = {"early": "e", "late": "l"}.get(w[0], "n")

    def _do_threads(self, who: str, w: list[str], _: str | None) -> None:
        self.process(who).policies[1:] = w

    def _do_sig(self, who: str, w: list[str], _: str | None) -> None:
        if w[0] in ("block", "ignore", "default", "handler"):
            self.process(who).disposition = w[0]
        elif w[0] == "unblock":
            self.process(who).disposition = "handler"

    def _do_unlink(self, _: str, w: list[str], __: str | None) -> None:
        """Descriptors and mappings keep the file, under a name that no step can open."""
        if not self._is_used(w[0]):
            for page in range(len(self.files.get(w[0], ()))):
                self._replace(w[0], page, None)
            self.files.pop(w[0], None)
            return
        self._last += 1
        gone = f"{w[0]} (unlinked, {self._last})"
        self.files[gone] = self.files.pop(w[0], [])
        self.cached |= {(gone, page) for name, page in self.cached if name == w[0]}
        for process in self.processes.values():
            process.rename(w[0], gone)

    def _is_used(self, file: str) -> bool:
        return any(
            file in (*(name for name, _ in p.fds.values()), *(m.file for m in p.maps.values()))
            for p in self.processes.values()
        )

    def _do_tr(self, who: str, w: list[str], _: str | None) -> None:
        number, page = int(w[0]), int(w[1])
        mapping = self.process(who).maps[number]
        for other in range(max(0, page - WINDOW + 1), min(mapping.pages, page + WINDOW)):
            if (mapping.file, mapping.first + other) in self.cached:
                self.around.add((who, number, other))
        self.present.add((who, number, page))
        self.unmapped.discard((who, number, page))
        self.cached.add((mapping.file, mapping.first + page))

    def _do_pread(self, who: str, w: list[str], _: str | None) -> None:
        file, offset, length = self.process(who).fds[int(w[0])][0], int(w[1]), int(w[2])
        self.cached |= {(file, page) for page in range(offset // PAGE, -(-(offset + length) // PAGE))}

    def _do_tw(self, who: str, w: list[str], reason: str | None) -> None:
        place = (who, int(w[0]), int(w[1]))
        mapping = self.process(who).maps[place[1]]
        if mapping.private:
            self.copies[place] = w[2]
        else:
            self._store(mapping.file, mapping.first + place[2], w[2], whole=True, reason=reason)
            self.present.add(place)
            self.unmapped.discard(place)
            self.cached.add((mapping.file, mapping.first + place[2]))

    def _do_pwrite(self, who: str, w: list[str], reason: str | None) -> None:
        fd, offset, length = int(w[0]), int(w[1]), int(w[2])
        file = self.process(who).fds[fd][0]
        self._do_pread(who, w, reason)
        for i, (_, whole) in enumerate(self.span(who, fd, offset, length)):
            self._store(file, offset // PAGE + i, w[3], whole=whole, reason=reason)

    def _store(self, file: str, page: int, letter: str, *, whole: bool, reason: str | None) -> None:
        block = self.block(file, page)
        if block is None or self.shared(block):
            if block is not None and reason is not None:
                self.diverged[block] = reason
            block = self.new_block(letter)
            self._replace(file, page, block)
        elif whole and block in self.poison:
            self.poison.discard(block)
            self.cleared = True
        self.content[block] = letter if whole else "?"
        if reason is not None:
            self.diverged[block] = reason
        elif whole:
            self.diverged.pop(block, None)

    def _do_kread(self, who: str, w: list[str], reason: str | None) -> None:
        m, page, fd, offset, length = (int(x) for x in w)
        for i, (block, _) in enumerate(list(self.span(who, fd, offset, length))):
            memory = self.block_at((who, m, page + i))
            if memory is not None and not self.bad(memory):
                self.content[memory] = self.holds(block)
                if reason is not None:
                    self.diverged[memory] = reason

    def _do_kwrite(self, who: str, w: list[str], reason: str | None) -> None:
        m, page, fd, offset, length = (int(x) for x in w)
        file = self.process(who).fds[fd][0]
        for i in range(length // PAGE):
            place = (who, m, page + i)
            if self.bad(self.block_at(place)):
                break
            self._store(file, offset // PAGE + i, self.letter_at(place), whole=True, reason=reason)

    def _do_trunc(self, who: str, w: list[str], _: str | None) -> None:
        file, pages = self.process(who).fds[int(w[0])][0], -(-int(w[1]) // PAGE)
        for page in range(pages, len(self.files[file])):
            self._replace(file, page, None)
        self.files[file] = (self.files[file] + [None] * pages)[:pages]

    def _do_punch(self, who: str, w: list[str], _: str | None) -> None:
        fd, offset, length = (int(x) for x in w)
        for page in range(offset // PAGE, (offset + length) // PAGE):
            self._replace(self.process(who).fds[fd][0], page, None)

    _do_zero = _do_punch

    def _do_ficlone(self, who: str, w: list[str], _: str | None) -> None:
        self._clone(who, int(w[0]), int(w[1]), 0, None, 0)

    def _do_clonerange(self, who: str, w: list[str], _: str | None) -> None:
        destination, source, at, length, to = (int(x) for x in w)
        self._clone(who, destination, source, at // PAGE, length // PAGE, to // PAGE)

    def _clone(self, who: str, dst: int, src: int, at: int, count: int | None, to: int) -> None:
        (target, _), (source, _) = self.process(who).fds[dst], self.process(who).fds[src]
        for i, block in enumerate(self.files[source][at : None if count is None else at + count]):
            self._replace(target, to + i, block)
