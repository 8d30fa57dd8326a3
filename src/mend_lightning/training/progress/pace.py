"""How fast edits go by, and when the rest will be done: the numbers of any progress display, and their words."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from datetime import datetime, timedelta

# Speed is that of the last minute, or of so many turns where they take longer: batches differ in length.
WINDOW_SECONDS, WINDOW_TURNS = 60.0, 10
# From here on a time of day says more than a number of minutes.
LONG_SECONDS = 15 * 60


class Pace:
    """Recent speed of a loop whose every turn makes some edits, without the first turn: it pays for what comes once.

    Args:
        clock: gives seconds that never run backwards.

    Example:
        >>> times = iter([0.0, 9.0, 11.0, 13.0])
        >>> pace = Pace(lambda: next(times))
        >>> for _ in range(3):
        ...     pace.turn(edits=8)
        >>> pace.edits_per_second, pace.seconds_per_turn
        (4.0, 2.0)
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._started, self._away = clock(), 0.0
        self._left_at: float | None = None
        self._edits = self._turns = 0
        # (time, edits, turns) at the end of a turn.
        self._first: tuple[float, int, int] | None = None
        self._marks: deque[tuple[float, int, int]] = deque()

    def turn(self, edits: int) -> None:
        """Counts a turn that ends now."""
        self._edits, self._turns = self._edits + edits, self._turns + 1
        now = self._clock() - self._away
        self._marks.append((now, self._edits, self._turns))
        self._first = self._first or self._marks[0]
        while len(self._marks) > WINDOW_TURNS + 1 and now - self._marks[1][0] >= WINDOW_SECONDS:
            self._marks.popleft()

    def leave(self) -> None:
        """Stops the clock: what comes now (a validation) is not part of the loop."""
        self._left_at = self._clock()

    def come_back(self) -> None:
        """Ends what `leave` began."""
        if self._left_at is not None:
            self._away, self._left_at = self._away + self._clock() - self._left_at, None

    @property
    def elapsed(self) -> float:
        """Seconds since the start, those away included."""
        return self._clock() - self._started

    @property
    def edits_per_second(self) -> float | None:
        """None until two turns are over, and where turns make no edits."""
        return self._rate(1, self._marks[0] if self._marks else None)

    @property
    def average_edits_per_second(self) -> float | None:
        """The same of all turns but the first."""
        return self._rate(1, self._first)

    @property
    def seconds_per_turn(self) -> float | None:
        turns = self._rate(2, self._marks[0] if self._marks else None)
        return 1 / turns if turns else None

    def _rate(self, column: int, since: tuple[float, int, int] | None) -> float | None:
        if since is None or len(self._marks) < 2:
            return None
        last = self._marks[-1]
        return (last[column] - since[column]) / max(last[0] - since[0], 1e-9) or None


def duration(seconds: float) -> str:
    """Example:
    >>> duration(7.4), duration(725), duration(11110), duration(180000)
    ('0:07', '12:05', '3:05:10', '2 days 2:00:00')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    text = f"{hours}:{minutes:02}:{rest:02}" if days or hours else f"{minutes}:{rest:02}"
    return f"{days} day{'s' if days > 1 else ''} {text}" if days else text


def ending(seconds: float, now: datetime, at_most: bool = False) -> str:
    """How long it still takes, and when that is if it is long.

    Args:
        seconds: that are left.
        now: the time of day.
        at_most: it may end sooner.

    Example:
        >>> friday = datetime(2026, 1, 2, 14, 0)
        >>> ending(52, friday), ending(3900, friday, at_most=True), ending(36000, friday)
        ('0:52 left', 'at most 1:05:00 left (until 15:05)', '10:00:00 left (until Sat 00:00)')
        >>> ending(864000, friday)
        '10 days 0:00:00 left (until 12 Jan 14:00)'
    """
    text = f"{'at most ' if at_most else ''}{duration(seconds)} left"
    if seconds < LONG_SECONDS:
        return text
    end = now + timedelta(seconds=seconds)
    days = (end.date() - now.date()).days
    day = "" if days == 0 else f"{end:%a} " if days < 7 else f"{end.day} {end:%b} "
    return f"{text} (until {day}{end:%H:%M})"


def amount(value: float) -> str:
    """A number in as few digits as tell it.

    Example:
        >>> amount(5.432), amount(0.00123), amount(123.4), amount(12345.6)
        ('5.43', '0.00123', '123', '12,346')
    """
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
