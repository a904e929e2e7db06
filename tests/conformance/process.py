"""Descriptors, mappings and kill policy of a process in a scenario."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Mapping:
    file: str
    first: int
    pages: int
    private: bool


@dataclass
class Process:
    fds: dict[int, tuple[str, bool]] = field(default_factory=dict)
    """File and whether it is O_DIRECT."""
    maps: dict[int, Mapping] = field(default_factory=dict)
    disposition: str = "handler"
    policies: list[str] = field(default_factory=lambda: ["n"])
    """Of the main thread and the others: n none, e early, l late."""

    def early(self, sysctl: bool) -> bool:
        return "e" in self.policies or (sysctl and "n" in self.policies)

    def rename(self, file: str, name: str) -> None:
        """Call an open or mapped file by another name."""
        self.fds = {fd: (name if f == file else f, direct) for fd, (f, direct) in self.fds.items()}
        self.maps = {m: replace(at, file=name) if at.file == file else at for m, at in self.maps.items()}

    def child(self) -> Process:
        return Process(dict(self.fds), dict(self.maps), self.disposition, self.policies[:1])
