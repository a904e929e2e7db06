"""Rules of compare.py: each changes the kernel's outcome into the right outcome here, for one reason.

A rule returns None where it does not apply. A rule may return two reasons, joined by " + ".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tests.conformance.recording import Outcome, Step
from tests.conformance.world import PAGE, Place, World

HARDWARE = "hardware poison"
CACHE = "FUSE page cache"
"""Never on a direct mount."""
UNMAPPED = "poison is unmapped"
BUFFER_VERBS = ("kread", "kwrite", "pvmread", "pvmwrite")
BUG = "kernel bug"
CANNOT_CLEAR = "cannot clear"
OVERWRITTEN = "overwritten whole"
PROPOSED = "proposed"

Turned = tuple[Outcome, str]
Rule = Callable[[Step, Outcome, World], Turned | None]


def _numbers(step: Step) -> list[int]:
    return [int(word) for word in step.do.split()[1:] if word.isdigit()]


def place_of(step: Step) -> Place:
    """Return the place that a load, a store or a look at pagemap names."""
    mapping, page, *_ = _numbers(step)
    return step.who, mapping, page


def _failed(res: Any) -> bool:
    return not isinstance(res, dict) or res.get("ret") == -1


def _count(n: int, pages: str | None = None) -> dict[str, Any]:
    return {"ret": n, "errno": "0"} | ({} if pages is None else {"pages": pages})


def _error(errno: str, pages: str | None = None) -> dict[str, Any]:
    return {"ret": -1, "errno": errno} | ({} if pages is None else {"pages": pages})


def letters(world: World, file: str, offset: int, length: int) -> str:
    """Return the content of ``pages`` as the recordings write it: a letter for each 4 KiB of the buffer."""
    said = ""
    for at in range(offset, offset + length, PAGE):
        end = min(at + PAGE, offset + length)
        held = {world.holds(world.block(file, page)) for page in range(at // PAGE, (end - 1) // PAGE + 1)}
        said += held.pop() if len(held) == 1 else "?"
    return said


# -- processes that died here only


def dead(step: Step, kernel: Outcome, world: World) -> Turned | None:
    reason = world.dead.get(step.who)
    return None if reason is None else (Outcome("dead already"), reason)


# -- kernel bugs


def dax_warning(step: Step, kernel: Outcome, world: World) -> Turned | None:
    """Reflinked extents confuse fs/dax.c's accounts."""
    lines = tuple(line for line in kernel.dmesg if line != "WARNING: fs/dax.c")
    return replace(kernel, dmesg=lines), BUG


def told(step: Step, kernel: Outcome, world: World) -> Turned | None:
    """Since 6.12 the kernel misses processes that map a shared block through another file or process, and 7.2
    signals the owner of a private copy. Here processes with the page present and an early policy are
    signalled.
    """
    if step.who != "inj" and not step.do.startswith("machine check ao"):
        return None  # where a thread consumes the poison, that thread counts, whatever its policy
    failing = world.failing(step)
    if not failing:
        return None
    (block,) = failing
    here = [p for p in world.mapped_at(block) if world.process(p[0]).early(world.sysctl)]
    copied = set(world.copied_from(block))
    recorded = {(s["who"], s["addr"]): s for s in kernel.signals}
    seen = (p for p in here if world.process(p[0]).disposition == "handler")
    lost = [p for p in seen if (p[0], _addr(p)) not in recorded]
    strangers = [p for p in copied if (p[0], _addr(p)) in recorded]
    if (lost and not world.shared(block)) or not (lost or strangers):
        return None
    gone = {(p[0], _addr(p)) for p in strangers}
    signals = [s for key, s in recorded.items() if key not in gone] + [_ao(p) for p in lost]
    lines = [line for line in kernel.dmesg if "Sending SIGBUS" not in line]
    lines += [_sending(signal["who"]) for signal in signals]
    return replace(kernel, signals=tuple(signals), dmesg=tuple(lines)), BUG


def _addr(place: Place) -> str:
    return f"m{place[1]}+{place[2] * PAGE:#x}"


def _signal(place: Place, code: str, how: str, **lsb: int) -> dict[str, Any]:
    about = {"who": place[0], "thread": 0, "sig": "SIGBUS", "code": code, "addr": _addr(place)}
    return {**about, **lsb, "how": how}


def _ao(place: Place) -> dict[str, Any]:
    return _signal(place, "BUS_MCEERR_AO", "async", lsb=12)


def _sending(who: str) -> str:
    return f"Memory failure: PFN: Sending SIGBUS to {who} due to hardware memory corruption"


def neighbours_told(step: Step, right: Outcome, ours: Outcome, world: World) -> Outcome:
    """Return ``ours`` without signals to processes for which fault-around had made the page present."""
    places = [p for block in world.failing(step) for p in world.maybe_at(block)]
    places = [p for p in places if world.process(p[0]).early(world.sysctl)]
    signals, deaths, lines = list(ours.signals), list(ours.deaths), list(ours.dmesg)
    for place in places:
        who = place[0]
        told = [s for s in signals if (s["who"], s["addr"]) == (who, _addr(place)) and s not in right.signals]
        died = [d for d in deaths if d == {"who": who, "signal": "SIGBUS"} and d not in right.deaths]
        for signal in (s for s in told if s == _ao(place) | {"thread": s["thread"]}):
            signals.remove(signal)
        for death in died:
            deaths.remove(death)
        if lines.count(_sending(who)) > right.dmesg.count(_sending(who)):
            lines.remove(_sending(who))
    return replace(ours, signals=tuple(signals), deaths=tuple(deaths), dmesg=tuple(lines))


# -- poison is touched


def access(step: Step, kernel: Outcome, world: World) -> Turned | None:
    """A load or store of poison is BUS_MCEERR_AR, forced. The kernel goes on where the page stayed mapped."""
    if not step.do.startswith(("tr ", "tw ")) or not world.bad(world.block_at(place_of(step))):
        return None
    if kernel.res == "dead already":
        return None
    place = place_of(step)
    if world.direct and _copies_first(step, place, world):
        return Outcome({"faulted": True}, (_signal(place, "BUS_ADRERR", "during access"),)), HARDWARE
    line = f"MCE: Killing {step.who} due to hardware memory corruption fault at VA"
    if world.process(step.who).disposition == "handler":
        signal = _signal(place, "BUS_MCEERR_AR", "during access", lsb=12)
        right = Outcome({"faulted": True}, (signal,), (), (line,))
    else:
        right = Outcome("died", (), ({"who": step.who, "signal": "SIGBUS"},), (line,))
    if isinstance(kernel.res, dict) and kernel.res.get("faulted"):
        # A store to a shared block is BUS_ADRERR: the kernel copies first. Here write-back copies.
        block = world.block_at(place)
        assert block is not None
        shared = world.shared(block) and not world.direct
        reason = CACHE if shared else world.diverged.get(block)
        return None if reason is None else (right, reason)
    return right, HARDWARE


def _copies_first(step: Step, place: Place, world: World) -> bool:
    """Return True for a store to a shared block: the copy of poison fails."""
    block = world.block_at(place)
    mapping = world.process(step.who).maps[place[1]]
    return step.do.startswith("tw ") and not mapping.private and block is not None and world.shared(block)


def read(step: Step, kernel: Outcome, world: World) -> Turned | None:
    """read(2) of poison: EIO. The page cache returns the good pages before the poison first; O_DIRECT and a
    direct mount do not.
    """
    if not step.do.startswith("pread "):
        return None
    fd, offset, length = _numbers(step)
    file, direct = world.process(step.who).fds.get(fd, ("", False))
    bad = [i for i, (block, _) in enumerate(world.span(step.who, fd, offset, length)) if world.bad(block)]
    if not bad:
        return None
    good = (offset // PAGE + bad[0]) * PAGE - offset
    if direct or world.direct or good <= 0:
        return replace(kernel, res=_error("EIO", "")), HARDWARE
    right = replace(kernel, res=_count(good, letters(world, file, offset, good)))
    return right, CACHE if _failed(kernel.res) else f"{HARDWARE} + {CACHE}"


def write(step: Step, kernel: Outcome, world: World) -> Turned | None:
    """write(2) of whole pages clears poison; of part of a page EFAULT, EIO where the write would have to
    copy.
    """
    if not step.do.startswith("pwrite "):
        return None
    fd, offset, length = _numbers(step)[:3]
    span = [(block, whole) for block, whole in world.span(step.who, fd, offset, length) if world.bad(block)]
    if not span:
        return None
    for block, whole in span:
        if not whole:
            assert block is not None
            return replace(kernel, res=_error("EIO" if world.shared(block) else "EFAULT")), HARDWARE
    if isinstance(kernel.res, dict) and kernel.res.get("errno") == "EFAULT":
        return replace(kernel, res=_count(length)), CANNOT_CLEAR
    copies = all(block is not None and world.shared(block) for block, _ in span)
    if isinstance(kernel.res, dict) and kernel.res.get("errno") == "EIO" and copies:
        return replace(kernel, res=_count(length)), OVERWRITTEN
    return None


def buffer(step: Step, kernel: Outcome, world: World) -> Turned | None:
    """Poison as a system call's buffer: EFAULT, or a short count up to the poison."""
    verb = step.do.split()[0]
    if verb not in BUFFER_VERBS:
        return None
    numbers = _numbers(step)
    who = f"p{numbers[0]}" if verb.startswith("pvm") else step.who
    mapping, page = numbers[1:3] if verb.startswith("pvm") else numbers[0:2]
    length = numbers[-1]
    for i in range(length // PAGE):
        if world.bad(world.block_at((who, mapping, page + i))):
            return replace(kernel, res=_count(i * PAGE) if i else _error("EFAULT")), HARDWARE
    return None


def pagemap(step: Step, kernel: Outcome, world: World) -> Turned | None:
    """Without a signal the kernel leaves the page mapped, and a load is a machine check. Here the page is
    unmapped, so that the next load finds the poison.
    """
    if not step.do.startswith("pagemap ") or not world.bad(world.block_at(place_of(step))):
        return None
    return replace(kernel, res={"present": 0}), UNMAPPED if world.direct else CACHE


def badblocks(step: Step, kernel: Outcome, world: World) -> Turned | None:
    if not step.do.endswith("badblocks") or not world.cleared or world.poison:
        return None
    return replace(kernel, res="0 range(s), 0 bad 512-byte sectors in all"), CANNOT_CLEAR


# -- features that kernels lack


def warned(step: Step, kernel: Outcome, world: World) -> Turned | None:
    """The pmem driver was to warn of a removal while the device is held (2021)."""
    if not ("unbind" in step.do and step.who == "inj"):
        return None
    line = "nd_pmem: DAX active at remove, trigger mass memory failure"
    return replace(kernel, dmesg=(*kernel.dmesg, line)), PROPOSED


# -- an earlier difference left other bytes


def other_bytes(step: Step, kernel: Outcome, world: World) -> Turned | None:
    """The outcome follows from the world, its reason from the difference that changed the world."""
    verb = step.do.split()[0]
    if verb in ("tr", "tw"):
        block = world.block_at(place_of(step))
        if block not in world.diverged or world.bad(block):
            return None
        letter = world.letter_at(place_of(step)) if verb == "tr" else step.do.split()[3]
        return Outcome({"ok": letter}), world.diverged[block]
    if verb not in ("pread", "pwrite"):
        return None
    fd, offset, length = _numbers(step)[:3]
    span = [block for block, _ in world.span(step.who, fd, offset, length)]
    reasons = [world.diverged[block] for block in span if block in world.diverged]
    if not reasons or any(world.bad(block) for block in span):
        return None
    file, _ = world.process(step.who).fds[fd]
    pages = letters(world, file, offset, length) if verb == "pread" else None
    return replace(kernel, res=_count(length, pages)), reasons[0]


def unmapped_at_shutdown(step: Step, kernel: Outcome, world: World) -> Turned | None:
    """The kernel keeps mappings of a filesystem that shut down; here the cached pages go with the
    filesystem.
    """
    kept = isinstance(kernel.res, dict) and "ok" in kernel.res
    if (
        world.direct
        or not world.down
        or not step.do.startswith(("tr ", "tw "))
        or not kept
        or place_of(step) in world.copies
    ):
        return None
    signal = _signal(place_of(step), "BUS_ADRERR", "during access")
    return Outcome({"faulted": True}, (signal,)), CACHE


RULES: tuple[Rule, ...] = (
    dax_warning,
    told,
    access,
    read,
    write,
    buffer,
    pagemap,
    badblocks,
    warned,
    other_bytes,
    unmapped_at_shutdown,
    dead,
)
