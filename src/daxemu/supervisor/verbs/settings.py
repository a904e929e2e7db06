"""The verb ``set``, and the table of settings: name, parse, show, apply."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from daxemu import protocol as p
from daxemu.errors import InvalidArgument
from daxemu.events import Emit, SettingChanged
from daxemu.fs.filesystem import Filesystem
from daxemu.mm.memory_failure import MemoryFailures
from daxemu.supervisor.event_log import EventLog
from daxemu.supervisor.scrub import Scrubber
from daxemu.supervisor.settings import log_size, one_of, seconds, size_text
from daxemu.supervisor.strategy_host import StrategyHost


@dataclass(frozen=True)
class Setting:
    """One setting. ``parse`` raises InvalidArgument with the values that are possible."""

    name: str
    parse: Callable[[str], Any]
    show: Callable[[], str]
    apply: Callable[[Any], object]
    attach: Callable[[Any], Awaitable[None]] | None = None
    """Awaited before any setting of the request is applied, for a change that takes time and may fail."""


def settings_of(
    mm: MemoryFailures,
    fs: Filesystem,
    log: EventLog,
    scrubber: Scrubber,
    strategy_host: StrategyHost,
    choose: Callable[[str], Awaitable[None]],
) -> tuple[Setting, ...]:
    """Return the settings of a machine. ``choose`` changes the repair strategy."""
    return (
        Setting(
            "early_kill",
            lambda text: one_of(text, "0", "1") == "1",
            lambda: "1" if mm.sysctl_early_kill else "0",
            partial(setattr, mm, "sysctl_early_kill"),
        ),
        Setting("log_size", log_size, lambda: size_text(log.limit), partial(setattr, log, "limit")),
        Setting(
            "lost_store",
            lambda text: one_of(text, "silent", "eio") == "eio",
            lambda: "eio" if fs.lost_store_is_eio else "silent",
            partial(setattr, fs, "lost_store_is_eio"),
        ),
        Setting("repair", str, lambda: strategy_host.text, lambda strategy: None, attach=choose),
        Setting("scrub_interval", seconds, lambda: f"{scrubber.interval:.12g}", scrubber.set),
    )


class Settings:
    """Shows and changes the settings of a machine. Belongs to the trio thread."""

    def __init__(self, table: Sequence[Setting], emit: Emit) -> None:
        self._table = {setting.name: setting for setting in table}
        self._emit = emit

    def show(self) -> dict[str, str]:
        """Return every setting with its value."""
        return {name: setting.show() for name, setting in self._table.items()}

    async def set(self, wanted: dict[str, str]) -> p.Done:
        """Change settings, all or none. Raises InvalidArgument for an unknown name or an impossible value."""
        changes: list[tuple[Setting, Any]] = []
        for name, text in wanted.items():
            if name not in self._table:
                raise InvalidArgument(f"no setting {name!r}: there are {', '.join(sorted(self._table))}")
            try:
                changes.append((self._table[name], self._table[name].parse(text)))
            except InvalidArgument as error:
                raise InvalidArgument(f"{name}={text}: {error}") from error
        for setting, value in changes:
            if setting.attach is not None:
                await setting.attach(value)
        for setting, value in changes:
            setting.apply(value)
        for name, text in wanted.items():
            self._emit(SettingChanged(name=name, value=text))
        return p.Done()
