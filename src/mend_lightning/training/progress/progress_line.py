"""One task's progress on the screen: a bar in a terminal; where there is none (CI, nohup) a line now and then."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any

from tqdm import tqdm

from mend_lightning.data.batch import EditBatch
from mend_lightning.training.progress.console import console
from mend_lightning.training.progress.pace import Pace, amount, duration
from mend_lightning.training.progress.pace import ending as ending_text

# A screen is drawn anew this often, in seconds.
REDRAW_SECONDS = 0.5
# A log gets a line this often at first, and less often the longer it takes: after a share of the time, and at last so rarely.
LOG_SECONDS, LOG_SHARE, LOG_SECONDS_AT_MOST = 30.0, 0.05, 600.0

Values = Callable[[], Mapping[str, float]]


class _Bar(tqdm):
    """tqdm with words of our own behind the bar, instead of iterations per second."""

    status = ""

    @property
    def format_dict(self) -> dict[str, Any]:
        return {**super().format_dict, "status": self.status}


class ProgressLine:
    """How far a loop over edits is, how fast it goes, and when it ends.

    Args:
        name: what is done, such as "Training".
        total: units there are; None: nobody knows.
        unit: what is counted, such as "steps".
        done: units that were done before this process began.
        keep: whether the last state stays on the screen.
        below: lines of the screen above it that others draw.

    Attributes:
        pace: the speed.
        ending: what to say of the end; None: it follows from the speed, a turn being a unit.
        values: further numbers, as they were last read.
    """

    def __init__(
        self, name: str, total: int | None, unit: str = "batches", done: int = 0, keep: bool = True, below: int = 0
    ) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, done
        self.pace = Pace()
        self.ending: Callable[[], str] | None = None
        self.values: Mapping[str, float] = {}
        self._bar: _Bar | None = None
        self._values: Values | None = None
        self._shown_at = 0.0
        if sys.stdout.isatty():
            self._bar = _open_bar(name, total, done, keep, below)
            self._show(self.text())

    def turn(self, edits: int, done: int | None = None, values: Values | None = None) -> None:
        """Counts a turn of the loop, and shows it if the last look is old enough.

        Args:
            edits: that it made, on all processes.
            done: units done by now; None: one more than before.
            values: gives further numbers by name; called only when something is shown, for reading them may wait for a device.
        """
        self.pace.turn(edits)
        self.done = self.done + 1 if done is None else done
        self._values = values
        # In a log the end has a line of its own.
        last = self._bar is None and self.done == self.total
        if not last and self.pace.elapsed - self._shown_at >= self._patience():
            self._read()
            self._show(self.text())

    def redraw(self) -> None:
        """Draws the bar, if it is one, as things are now."""
        if self._bar is not None:
            self._read()
            self._show(self.text())

    def close(self, note: Mapping[str, float] | None = None, read: bool = True) -> None:
        """Shows the last state and how long it took, and leaves the screen.

        Args:
            note: further numbers, for a log.
            read: whether the turns' numbers may be asked for once more.
        """
        if read:
            self._read()
        if self._bar is None:
            self.values = {**self.values, **(note or {})}
        self._show(self.text(over=True))
        if self._bar is not None:
            self._bar.close()

    def text(self, over: bool = False) -> str:
        """What is shown, but for the name; `over`: of all that was done, with how long it took instead of how long it takes."""
        total = "" if self.total is None else f"/{self.total:,}"
        parts = [f"{self.done:,}{total} {self.unit}"]
        speed = self.pace.average_edits_per_second if over else self.pace.edits_per_second
        if speed is not None:
            parts.append(f"{amount(speed)} edits/s")
        end = f"took {duration(self.pace.elapsed)}" if over else self._ending()
        parts += [end, *(f"{name} {amount(value)}" for name, value in self.values.items())]
        return ", ".join(part for part in parts if part)

    def _ending(self) -> str:
        if self.ending is not None:
            return self.ending()
        if self.total is None or self.pace.seconds_per_turn is None:
            return ""
        return ending_text((self.total - self.done) * self.pace.seconds_per_turn, datetime.now())

    def _patience(self) -> float:
        if self._bar is not None:
            return REDRAW_SECONDS
        return min(LOG_SECONDS_AT_MOST, max(LOG_SECONDS, LOG_SHARE * self.pace.elapsed))

    def _read(self) -> None:
        if self._values is not None:
            self.values = self._values()

    def _show(self, text: str) -> None:
        self._shown_at = self.pace.elapsed
        if self._bar is None:
            # No width wraps a log's line.
            console().print(f"{self.name}: {text}", highlight=False, markup=False, soft_wrap=True)
            return
        self._bar.n, self._bar.status = self.done, text
        self._bar.refresh()


def _open_bar(name: str, total: int | None, done: int, keep: bool, below: int) -> _Bar:
    shape = "{desc}  {status}" if total is None else "{desc} {percentage:3.0f}%|{bar:10}| {status}"
    # tqdm draws a bar when it makes it, before there are words behind it, unless that is delayed.
    bar = _Bar(
        desc=name, total=total, initial=done, bar_format=shape, file=sys.stdout, dynamic_ncols=True, leave=keep,
        position=below, delay=1.0,
    )  # fmt: skip
    bar.delay = 0.0
    return bar


def followed(batches: Iterable[EditBatch], name: str, total: int, processes: int = 1) -> Iterator[EditBatch]:
    """The batches, one after another, with a `ProgressLine` of them.

    Args:
        batches: what is gone through.
        name: what is done with them.
        total: their number.
        processes: that do the same with batches of their own.
    """
    line = ProgressLine(name, total)
    for batch in batches:
        yield batch
        line.turn(processes * len(batch.z_edit))
    line.close()
