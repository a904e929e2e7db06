"""printk_ratelimit(): a limit on equal messages in an interval, and the number suppressed (lib/ratelimit.c).

The caller passes the time: seconds from any origin.
"""

from __future__ import annotations

DEFAULT_INTERVAL = 5.0
DEFAULT_BURST = 10
"""Defaults of linux/ratelimit_types.h, in seconds and messages."""


class Ratelimit:
    """``struct ratelimit_state``: at most ``burst`` messages in each ``interval`` of seconds."""

    def __init__(self, interval: float = DEFAULT_INTERVAL, burst: int = DEFAULT_BURST) -> None:
        self._interval = interval
        self._burst = burst
        self._left = burst
        self._begin: float | None = None
        self._missed = 0

    def ratelimit(self, now: float) -> tuple[bool, int]:
        """``___ratelimit()``: return (print the message?, number suppressed in the interval just ended)."""
        if self._begin is None:
            self._begin = now
        suppressed = 0
        if not self._begin <= now <= self._begin + self._interval:  # the clock may have been set back
            self._begin, self._left = now, self._burst
            suppressed = self.release()
        if self._left:
            self._left -= 1
            return True, suppressed
        self._missed += 1
        return False, suppressed

    def release(self) -> int:
        """``ratelimit_state_exit()``: return the number of suppressed messages not reported yet."""
        missed, self._missed = self._missed, 0
        return missed


def suppressed_line(func: str, missed: int) -> str:
    """Return the kernel's line about suppressed messages of the function ``func``."""
    return f"{func}: {missed} callbacks suppressed"
