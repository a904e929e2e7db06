"""One deadline for work of several steps: each step gets the time left, so the sum is limited."""

from __future__ import annotations

import time


class Deadline:
    """Moment ``seconds`` after the construction of this object."""

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def left(self, keep: float = 0.0) -> float:
        """Return the time limit of a step in seconds, with ``keep`` seconds reserved for later steps; 0 if no
        time is left.
        """
        return max(0.0, self._until - keep - time.monotonic())
