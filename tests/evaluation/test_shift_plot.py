"""The picture of shifts: what is on it, in which order, and that it is a picture."""

from __future__ import annotations

import pytest
from matplotlib.image import imread

from mend_lightning.errors import ConfigError, OutputPathError
from mend_lightning.evaluation.shift_plot import laid_out, plot_shifts
from mend_lightning.evaluation.shifts import Shift


def shift(kind: str, size: float, question: str = "Who?", new: str = "b") -> Shift:
    return Shift(question, kind, "a", new, 0.5, 0.5 - size, 0.5, 0.5, 0.0)


SHIFTS = [
    shift("neutral", 0.125),
    shift("own kind", 0.25),
    shift("edited", 0.125),
    shift("neutral", 0.5),
    shift("neutral", 0.25),
]


def test_groups_and_their_order():
    rows, height = laid_out(SHIFTS, most=2)
    said = [row if isinstance(row, str) else row.size for _, row in rows]
    assert said == ["Edited", 0.125, "Neutral (must stay), 2 of 3", 0.5, 0.25, "own kind", 0.25]
    places = [place for place, _ in rows]
    assert places == sorted(places) and places[-1] < height


def test_long_and_changed_questions_have_more_room():
    short, long = shift("", 0.1, new="a"), shift("", 0.1, question="word " * 30, new="a")
    changed = shift("", 0.1)
    heights = [laid_out([each], 1)[1] for each in (short, changed, long)]
    assert heights[0] < heights[1] < heights[2]


def test_the_file_is_a_picture_that_grows_with_its_questions(tmp_path):
    path = plot_shifts([*SHIFTS, shift("", 0.1, "What is $x$ in $ now, " * 20)], tmp_path / "new" / "shifts.png")
    height, width, _ = imread(path).shape
    assert width > 1000
    assert imread(plot_shifts(SHIFTS * 4, tmp_path / "more.png")).shape[0] > height
    assert plot_shifts([shift("", 0.1, "", "")], tmp_path / "empty.png").exists()


def test_nothing_to_draw_and_nowhere_to_write(tmp_path):
    with pytest.raises(ConfigError, match="nothing to draw"):
        plot_shifts([], tmp_path / "a.png")
    with pytest.raises(ConfigError, match="at most 0"):
        plot_shifts(SHIFTS, tmp_path / "a.png", most=0)
    (tmp_path / "file").touch()
    with pytest.raises(OutputPathError, match="Cannot write"):
        plot_shifts(SHIFTS, tmp_path / "file" / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "no half-written file"
