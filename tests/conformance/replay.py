"""Play a scenario's steps with real processes on a real mount, and note the outcome of each in the
recordings' form.

Three measures make the mount as similar to DAX as possible, so that only failures are compared: files are
made and their cached pages dropped; read-ahead is off (a touched page caches no neighbours); FICLONE, which
the kernel does not forward to FUSE, becomes copy_file_range(2), which shares blocks.

On a direct mount all processes are programs under one ``daxemu run``.
"""

from __future__ import annotations

import errno
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Self

from daxemu.cli.main import VERBS
from daxemu.errors import DaxemuError
from daxemu.uapi import PMD_SHIFT, Ino
from tests.conformance.journal import Journal, drop_cache, no_read_ahead, until
from tests.conformance.recording import Outcome, Records, Scenario, Step, last_touched
from tests.support.actor import Actor, ActorDied, ActorError, ActorTimeout
from tests.support.mount import DAXEMU, DaxMount

PAGE = 4096
PATIENCE = 10.0
"""Seconds that one command may take: a hang is an outcome, not a wait."""
OTHER_ACTOR = re.compile(r"(pvmread|pvmwrite) (\d+) (\d+) (\d+) (\d+)")
POISON_FILE = re.compile(r"poison page (\d+)(?: of (\S+))?")


class NotYet(Exception):
    """The scenario needs a feature that daxemu lacks; the message names the feature."""


def needs_run(scenario: Scenario) -> bool:
    """Return True if the programs of the scenario inject poison themselves."""
    return any(re.match(r"madvise .* (hwpoison|soft)$", step.do) for step in scenario.steps)


def by_pmd(scenario: Scenario) -> bool:
    """Return True if the kernel mapped by 2 MiB: the signal covers all 2 MiB."""
    signals = (s for step in scenario.steps if step.expected for s in step.expected.signals)
    return any(signal.get("lsb") == PMD_SHIFT for signal in signals)


def not_yet(scenario: Scenario) -> str | None:
    """Return the missing feature that a scenario needs, or None."""
    if needs_run(scenario) and "run" not in VERBS:
        return "madvise(MADV_HWPOISON, MADV_SOFT_OFFLINE) needs `daxemu run` (issue 4, 8)"
    return None


class Player:
    """Actors of one scenario on one fresh mount. A context manager: the actors end with the block."""

    def __init__(self, mount: DaxMount, scenario: Scenario) -> None:
        self._mount = mount
        self._scenario = scenario
        self._stack = ExitStack()
        socket.setdefaulttimeout(PATIENCE)
        self._stack.callback(socket.setdefaulttimeout, None)
        self._client = self._stack.enter_context(mount.client())
        self._actors: dict[str, Actor] = {}
        self._launcher: Actor | None = None
        """Parent of all actors on a direct mount. The launcher maps no file."""
        self._unlinked: dict[str, Ino] = {}
        self._buried: set[str] = set()
        self._stuck: set[str] = set()
        self._spun: Any = None
        self._journal = Journal(mount.device, self._client)
        no_read_ahead(mount.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def play(self) -> Iterator[tuple[int, Step, Outcome]]:
        """Yield every step with its index and its outcome here."""
        for index, step in enumerate(self._scenario.steps):
            res = self._do(index, step)
            signals, deaths = self._news()
            consumed = sum(s["code"] == "BUS_MCEERR_AR" for s in signals)
            consumed += sum(d["who"] == step.who for d in deaths)  # forced on the thread that caused it
            dmesg = self._journal.lines(consumed)
            yield index, step, Outcome(res, signals, deaths, dmesg, self._journal.counted())

    # -- commands

    def _do(self, index: int, step: Step) -> Any:
        if step.who == "-":
            return self._scene(step.do)
        if step.who in ("inj", "host"):
            return self._fail(index, step)
        return self._act(self._actor(step.who), step)

    def _scene(self, do: str) -> Any:
        words = do.split()
        match words:
            case ["mkfile", name, "pages", pages, "first", first]:
                path = self._mount.make_file(name, int(pages), first)
                drop_cache(path)
            case ["early_kill", value]:
                self._client.request("set", settings={"early_kill": value})
            case ["read", path] if path.endswith("badblocks"):
                return self._journal.badblocks()
            case _:
                raise NotYet(f"cannot set the scene: {do}")
        return None

    def _actor(self, name: str) -> Actor:
        if name not in self._actors:
            self._actors[name] = self._launched(name) if self._mount.is_direct else self._spawned(name)
        return self._actors[name]

    def _spawned(self, name: str, *, under_run: bool = False) -> Actor:
        under_run |= needs_run(self._scenario)
        wrapper = (*DAXEMU, "run", str(self._mount.path), "--") if under_run else ()
        actor = Actor.spawn(name, cwd=self._mount.path, wrapper=wrapper)
        return self._stack.enter_context(actor)

    def _launched(self, name: str) -> Actor:
        """Return a new program under the ``daxemu run`` of the scenario, which starts one Python for all."""
        if self._launcher is None:
            self._launcher = self._spawned("launcher", under_run=True)
        actor = self._launcher.fork(name)
        actor.exec()
        return actor

    def _act(self, actor: Actor, step: Step) -> Any:
        if step.do.startswith("spin"):
            return self._spun
        if actor.name in self._stuck:
            return "still stuck"
        if actor.name in self._buried:
            return "dead already"
        words = step.do.split()
        try:
            if words[0] == "fork":
                self._actors[f"p{words[1]}"] = actor.fork(f"p{words[1]}")
                return {"ret": 0, "errno": "0"}
            if pvm := OTHER_ACTOR.fullmatch(step.do):
                verb, other, mapping, page, length = pvm.groups()
                return actor.pvm(verb, self._actor(f"p{other}"), int(mapping), int(page), int(length)).res
            if words[0] in ("ficlone", "clonerange"):
                return self._clone(actor, words)
            if words[0] == "unlink":
                self._unlinked[words[1]] = self._ino(words[1])
            res = actor.cmd(step.do, PATIENCE).res
            if words[0] == "tw" and "ok" in res:
                self._fill(actor, *words[1:])
            return res
        except ActorDied:
            return "died"
        except ActorTimeout:
            return self._gave_up_on(actor)
        except ActorError as error:  # an earlier step ended otherwise: no mapping, no descriptor
            return f"not possible: {str(error).splitlines()[0]}"

    def _gave_up_on(self, actor: Actor) -> str:
        """The actor has been killed."""
        self._stuck.add(actor.name)
        return "no answer"

    def _fill(self, actor: Actor, mapping: str, page: str, letter: str) -> None:
        """The recordings' actor stores to the whole page, daxemu's actor to the first byte: store the rest
        here.
        """
        try:
            with open(f"/proc/{actor.pid}/mem", "r+b", buffering=0) as memory:
                memory.seek(actor.addr(int(mapping), int(page)))
                memory.write(letter.encode() * PAGE)
        except OSError as error:
            raise AssertionError(f"{actor.name}: cannot fill page {page} of m{mapping}: {error}") from error

    def _clone(self, actor: Actor, words: list[str]) -> Any:
        destination, source = words[1:3]
        at, length, to = words[3:] or ("0", str(self._size(actor, source)), "0")
        res = actor.cmd(f"copyrange {destination} {source} {at} {length} {to}", PATIENCE).res
        return {"ret": 0, "errno": "0"} if res["ret"] == int(length) else res

    def _size(self, actor: Actor, fd: str) -> int:
        """Return the size of an open file: FICLONE clones the whole file."""
        opened = [
            s.do.split() for s in self._scenario.steps if s.who == actor.name and s.do.startswith("open")
        ]
        name = next(words[2] for words in opened if words[1] == fd)
        return (self._mount.path / name).stat().st_size

    # -- failures

    def _fail(self, index: int, step: Step) -> Any:
        if "unbind" in step.do:
            self._client.request("remove")
            return {"ret": 0, "errno": "0"}
        if check := re.match(r"machine check (\w+) on that page", step.do):
            return self._machine_check(index, check.group(1))
        if found := POISON_FILE.match(step.do):
            page, name = int(found.group(1)), found.group(2) or "f"
            return self._injected(name, page * PAGE, PAGE)
        if "superblock" in step.do:
            return self._injected(None, 0, PAGE)
        if "free space" in step.do:
            size = self._client.request("status")["size"]
            return self._injected(None, size - 64 * PAGE, PAGE)
        raise NotYet(f"cannot make the failure: {step.do}")

    def _machine_check(self, index: int, kind: str) -> Any:
        """Kind "ao": found by no running thread; "ar": the spinner consumes the poison; "ao64": names one
        cache line.
        """
        offset, length = last_touched(self._scenario.steps[:index]) * PAGE, PAGE
        if kind == "ao64":
            offset, length = offset + 1024, 64
        if kind != "ar":
            self._injected("f", offset, length)
            return "sent"
        spin = next(s for s in self._scenario.steps[index:] if s.do.startswith("spin"))
        spinner = self._actor(spin.who)
        _, mapping, page, *_ = spin.do.split()
        spinner.start_spin(int(mapping), int(page))
        begun = self._journal.failures()
        self._injected("f", offset, length, latent=True)
        try:
            self._spun = spinner.reply(PATIENCE).res
        except ActorDied:
            self._spun = "died"
        except ActorTimeout:
            self._spun = self._gave_up_on(spinner)
        until(lambda: self._journal.failures() > begun)
        return "sent"

    def _injected(self, name: str | None, offset: int, length: int, *, latent: bool = False) -> Any:
        ino = None if name is None else self._ino(name)
        try:
            done = self._client.request("inject", ino=ino, ranges=[[offset, length]], latent=latent)
        except DaxemuError as error:
            return {"ret": -1, "errno": errno.errorcode[error.errno]}
        outcome = done["ranges"][0]["outcome"]
        if outcome in ("Recovered", "Delayed", "latent"):
            return {"ret": 0, "errno": "0"}
        return {"ret": -1, "errno": {"Failed": "EUCLEAN", "Ignored": "EBUSY"}[outcome]}

    def _ino(self, name: str) -> Ino:
        """Return the inode number of a file, also of a file that the scenario has unlinked."""
        return self._unlinked.get(name) or (self._mount.path / name).stat().st_ino

    # -- outcomes

    def _news(self) -> tuple[Records, Records]:
        """Return the signals and deaths since the last call, after all signals sent have arrived."""
        signals: list[dict[str, Any]] = []
        deaths: list[dict[str, Any]] = []
        for name, actor in self._actors.items():
            if name in self._buried | self._stuck:
                continue
            try:
                actor.barrier()
            except ActorDied as died:
                self._buried.add(name)
                deaths.append({"who": name, **died.death.recorded()})
            signals += [{"who": name, **signal.recorded()} for signal in actor.signals()]
        return tuple(signals), tuple(deaths)


@contextmanager
def playing(mount: DaxMount, scenario: Scenario) -> Iterator[Player]:
    """A player of ``scenario``; raises NotYet when it cannot be played."""
    reason = not_yet(scenario)
    if reason is not None:
        raise NotYet(reason)
    with Player(mount, scenario) as player:
        yield player
