"""Processes without own activity while all others race: the signals due to each holder are known exactly."""

from __future__ import annotations

import random
from contextlib import ExitStack
from typing import Self

from daxemu.client import Client
from daxemu.host.proc.mountinfo import mount_of
from tests.support.actor import Actor
from tests.support.quick import QuickMount
from tests.support.racer import PATIENCE
from tests.support.scene import PAGE, Scene, ao, ar, present, signals_of

PAGES = 32


class Holders:
    """Early and late mappers of a separate file, and two strangers. A context manager."""

    def __init__(self, mount: QuickMount, seed: int) -> None:
        self.rounds = 0
        self._mount = mount
        self._rng = random.Random(seed)
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        scene = self._stack.enter_context(Scene(self._mount))
        self._ino = self._mount.make_file("still", PAGES).stat().st_ino
        self._mount.make_file("healthy-still", PAGES)
        self._early = [self._holder(scene, f"e{i}", "still", "early") for i in range(3)]
        self._late = self._holder(scene, "l0", "still", "late")
        self._strangers = [self._holder(scene, "s0", "healthy-still", "early"), scene.actor("s1")]
        for page in range(0, PAGES, 4):
            self._strangers[0].cmd(f"tr 0 {page}")
        self._client = self._stack.enter_context(Client(mount_of(self._mount.path), patience=PATIENCE))
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    @staticmethod
    def _holder(scene: Scene, name: str, file: str, policy: str) -> Actor:
        return scene.mapper(name, file, pages=PAGES, before=[f"mcekill {policy}"])

    def round(self) -> None:
        """Fail a page that all holders have present, known or latent: each holder is signalled once."""
        page, latent = self._rng.randrange(PAGES), self._rng.random() < 0.3
        for actor in (*self._early, self._late):
            assert actor.cmd(f"tr 0 {page}").ok is not None
            assert present(actor, 0, page)
        self._client.request("inject", ino=self._ino, ranges=[[page * PAGE, PAGE]], latent=latent)
        if latent:
            self._consumes(self._late, page)
        for actor in self._early:
            assert actor.wait_signal().recorded() == ao(page)
        if not latent:
            self._consumes(self._late, page)
        for actor in self._early:
            self._consumes(actor, page)
        for actor in (*self._early, self._late, *self._strangers):
            actor.expect_no_signal()
        self._client.request("clear", ino=self._ino, ranges=[[page * PAGE, PAGE]])
        self.rounds += 1

    @staticmethod
    def _consumes(actor: Actor, page: int) -> None:
        result = actor.cmd(f"tr 0 {page}")
        assert result.faulted, f"{actor.name} read {result} of poison\n{actor.transcript[-2000:]}"
        assert signals_of(actor) == [ar(page)]
