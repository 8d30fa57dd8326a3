"""What the progress bar says, on a screen and in a log, with a clock that the test moves."""

from __future__ import annotations

import io
import re
from datetime import datetime
from functools import partial
from types import SimpleNamespace

import lightning as L
import pytest
from helpers.bases import REMARKS, first_batches, given, run_config
from lightning.pytorch.callbacks import EarlyStopping, RichProgressBar, Timer, TQDMProgressBar

from mend_lightning.cli.config.overlays import resolved_configs
from mend_lightning.cli.run import run_trainer
from mend_lightning.training.progress import progress_line
from mend_lightning.training.progress.pace import Pace
from mend_lightning.training.progress.progress_bar import EditProgressBar, training_end
from mend_lightning.training.progress.progress_line import ProgressLine, followed

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS, "ignore:Checkpoint directory .* exists and is not empty.*")


class Clock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Passing(L.Callback):
    """Lets time pass: 100 s in the first step, 2 s in any other, 5 s in a batch of validation."""

    def __init__(self, clock: Clock) -> None:
        self.clock, self.first = clock, True

    def on_train_batch_start(self, *_) -> None:
        self.clock.now += 100 if self.first else 2
        self.first = False

    def on_validation_batch_start(self, *_) -> None:
        self.clock.now += 5


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_line, "Pace", partial(Pace, clock))
    return clock


@pytest.fixture
def screen(monkeypatch) -> Screen:
    screen = Screen()
    monkeypatch.setattr(progress_line, "sys", SimpleNamespace(stdout=screen))
    return screen


@pytest.fixture
def shown(trainer):
    """`shown(clock, **settings)`: a Trainer with our bar."""

    def make(clock: Clock, **settings) -> L.Trainer:
        return trainer(callbacks=[EditProgressBar(), Passing(clock)], enable_progress_bar=True, **settings)

    return make


def frames(screen: Screen) -> list[str]:
    """What stood on the screen's lines, one after another; doubles once."""
    texts = [text.strip() for text in re.split(r"[\r\n]|\x1b\[A", screen.getvalue())]
    return [text for i, text in enumerate(texts) if text and text != texts[i - 1]]


def words(frame: str) -> str:
    """A frame without the bar itself and the losses."""
    return re.sub(r"\s*\d+%\|.*\|", "", frame).partition(", edit ")[0]


def test_a_bar_counts_the_whole_training_in_edits(mend, edit_data, shown, clock, screen):
    module = mend("llama")
    batch = first_batches(module, edit_data(), 1)[0]
    run = shown(clock, max_steps=6, val_check_interval=3, check_val_every_n_epoch=None)
    run.fit(module, given([batch] * 4), given([batch] * 2))
    seen = frames(screen)
    # 4 edits a step and 2 s for each but the first; of a validation's 10 s nothing is known before it was.
    expected = [
        "Training 0/6 steps",
        "Training 1/6 steps",
        "Training 2/6 steps, 2 edits/s, 0:08 left + 2 validations",
        "Training 3/6 steps, 2 edits/s, 0:06 left + 2 validations",
        "Validation after step 3 0/2 batches",
        "Validation after step 3 1/2 batches",
        "Validation after step 3 2/2 batches, 0.8 edits/s, 0:00 left",
        "Validation after step 3 2/2 batches, 0.8 edits/s, took 0:10",
        "Training 3/6 steps, 2 edits/s, 0:16 left",
        "Training 4/6 steps, 2 edits/s, 0:14 left",
        "Training 5/6 steps, 2 edits/s, 0:12 left",
        "Training 6/6 steps, 2 edits/s, 0:10 left",
        "Validation after step 6 0/2 batches",
        "Validation after step 6 1/2 batches",
        "Validation after step 6 2/2 batches, 0.8 edits/s, 0:00 left",
        "Validation after step 6 2/2 batches, 0.8 edits/s, took 0:10",
        "Training 6/6 steps, 2 edits/s, 0:00 left",
        "Training 6/6 steps, 2 edits/s, took 2:10",
    ]
    assert list(dict.fromkeys(map(words, seen))) == expected
    metrics = run.logged_metrics | run.callback_metrics
    last = dict(re.findall(r"(edit|locality|val loss|grad norm) ([\d.e+-]+)", seen[-1].replace(",", "")))
    names = {"edit": "train/edit", "locality": "train/locality", "val loss": "val/loss", "grad norm": "train/grad_norm"}
    for short, name in names.items():
        assert float(last[short]) == pytest.approx(float(metrics[name]), rel=0.01), short


def test_a_log_gets_a_line_for_each_thing_done(mend, edit_data, shown, clock, capsys):
    module = mend("llama")
    batch = first_batches(module, edit_data(), 1)[0]
    shown(clock, max_steps=6, val_check_interval=3, check_val_every_n_epoch=None).fit(
        module, given([batch] * 4), given([batch] * 2)
    )
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if re.match("Training|Validation", line)]
    assert [words(line.replace(", loss ", ", edit ")) for line in lines] == [
        # The only step in which half a minute passed.
        "Training: 1/6 steps",
        "Validation after step 3: 2/2 batches, 0.8 edits/s, took 0:10",
        "Validation after step 6: 2/2 batches, 0.8 edits/s, took 0:10",
        "Training: 6/6 steps, 2 edits/s, took 2:10",
    ]
    assert re.search(r"loss [\d.]+, edit success [\d.]+, retained [\d.]+$", lines[1]) and "\r" not in out


def test_a_log_gets_a_line_for_the_validation_before_the_first_step(mend, edit_data, shown, clock, capsys):
    """The first row of what a log says of its validations, with the same columns."""
    shown(clock, max_steps=2, val_check_interval=2, check_val_every_n_epoch=None).fit(mend("llama"), edit_data())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Validation")]
    number = r"[\d.e+-]+"
    for line, name in zip(lines, ("before the first step", "after step 2"), strict=True):
        said = rf"Validation {name}: 3/3 batches, 0.3 edits/s, took 0:15, loss {number}, edit success {number}, retained {number}"
        assert re.fullmatch(said, line), line


def test_a_log_stays_short(clock, capsys):
    """Ten hours of half-second steps: every half minute, then ever less often, never less than every ten minutes."""
    line, times = ProgressLine("Training", 72_000, "steps"), []
    for _ in range(72_000):
        clock.now += 0.5
        line.turn(8)
        times += [clock.now] * capsys.readouterr().out.count("\n")
    gaps = [after - before for before, after in zip([0, *times], times)]
    assert min(gaps) == gaps[0] == 30 and max(gaps) == pytest.approx(600, abs=1) and len(times) < 120


def test_a_log_says_the_end_once(clock, capsys):
    line = ProgressLine("Test", 3)
    for _ in range(3):
        clock.now += 40
        line.turn(4)
    line.close()
    said = [text.partition(" batches")[0] for text in capsys.readouterr().out.splitlines()]
    assert said == ["Test: 1/3", "Test: 2/3", "Test: 3/3"]


def test_numbers_are_read_only_to_be_shown(clock, screen):
    """Reading them waits for the device."""
    asked = []
    line = ProgressLine("Training", 100, "steps")
    for _ in range(100):
        clock.now += 0.01
        line.turn(1, values=lambda: asked.append(clock.now) or {})
    assert asked == pytest.approx([0.5, 1.0], abs=0.02)


def test_speed_is_that_of_the_last_minute():
    clock = Clock()
    pace = Pace(clock)
    for seconds in [50] + [1] * 100 + [4] * 60:
        clock.now += seconds
        pace.turn(8)
    assert pace.edits_per_second == pytest.approx(2) and pace.seconds_per_turn == pytest.approx(4)
    assert pace.average_edits_per_second == pytest.approx(8 * 160 / 340)
    pace.leave()
    clock.now += 1000
    pace.come_back()
    clock.now += 4
    pace.turn(8)
    assert pace.edits_per_second == pytest.approx(2) and pace.elapsed == 50 + 340 + 1000 + 4


def test_a_resumed_training_is_shown_from_where_it_was(mend, edit_data, shown, clock, screen, tmp_path):
    batches = given([first_batches(mend("llama"), edit_data(), 1)[0]] * 3)
    run = shown(clock, max_steps=3)
    run.fit(mend("llama"), batches)
    run.save_checkpoint(tmp_path / "last.ckpt")
    screen.seek(0), screen.truncate()
    again = shown(clock)
    again.fit_loop.max_epochs = 2
    again.fit(mend("llama"), batches, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    # Two epochs of three; the speed is of this process alone, whose first step does not count.
    assert list(dict.fromkeys(map(words, frames(screen)))) == [
        "Training 3/6 steps",
        "Training 4/6 steps",
        "Training 5/6 steps, 2 edits/s, 0:02 left",
        "Training 6/6 steps, 2 edits/s, 0:00 left",
        "Training 6/6 steps, 2 edits/s, took 1:44",
    ]


def test_edits_of_all_processes_are_counted(edit_data, mend, clock, capsys):
    batch = first_batches(mend("llama"), edit_data(), 1)[0]
    trainer = SimpleNamespace(num_test_batches=[3], world_size=2)
    bar = EditProgressBar()
    bar.on_test_start(trainer, None)
    for index in range(3):
        clock.now += 4
        bar.on_test_batch_end(trainer, None, None, batch, index)
    bar.on_test_end(trainer, None)
    assert capsys.readouterr().out == "Test: 3/3 batches, 2 edits/s, took 0:12\n"
    for _ in followed([batch] * 3, "Estimating", 3, processes=2):
        clock.now += 4
    assert capsys.readouterr().out == "Estimating: 3/3 batches, 2 edits/s, took 0:12\n"


def test_a_training_counts_the_edits_of_all_processes_and_one_of_them_says_it(
    mend, edit_data, shown, clock, capsys, monkeypatch
):
    batch = first_batches(mend("llama"), edit_data(), 1)[0]
    monkeypatch.setattr(L.Trainer, "world_size", 2)
    for first in (True, False):
        run = shown(clock, max_steps=3)
        monkeypatch.setattr(L.Trainer, "is_global_zero", first)
        run.fit(mend("llama"), given([batch] * 3))
    (last,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Training: 3/3")]
    assert words(last) == "Training: 3/3 steps, 4 edits/s, took 1:44"


def test_what_a_module_prints_stands_above_the_bar(clock, screen, monkeypatch):
    """`LightningModule.print` goes through the bar."""
    monkeypatch.setattr("sys.stdout", screen)
    line = ProgressLine("Training", 2, "steps")
    EditProgressBar().print("a", "word")
    line.close()
    assert [words(frame) for frame in frames(screen)] == [
        "Training 0/2 steps",
        "a word",
        "Training 0/2 steps",
        "Training 0/2 steps, took 0:00",
    ]


def test_what_may_end_a_training_sooner(monkeypatch):
    trainer = SimpleNamespace(
        callbacks=[], estimated_stepping_batches=1000, global_step=100, accumulate_grad_batches=10, num_val_batches=[],
        val_check_batch=50, check_val_every_n_epoch=None, fit_loop=SimpleNamespace(total_batch_idx=999),
    )  # fmt: skip
    assert training_end(trainer, 0.05, 0, None) == "7:30 left"
    trainer.callbacks = [EarlyStopping("val/loss")]
    assert training_end(trainer, 0.05, 0, None) == "at most 7:30 left"
    timer = Timer("00:00:01:00")
    monkeypatch.setattr(timer, "time_elapsed", lambda stage: 20.0)
    trainer.callbacks = [timer]
    assert training_end(trainer, 0.05, 0, None) == "0:40 left"
    trainer.callbacks, trainer.num_val_batches = [], [4]
    # Every 50 of 10,000 batches, of which 1,000 are over.
    assert training_end(trainer, 0.05, 1000, 1.0) == "10:30 left"
    assert training_end(trainer, 1.0, 1000, 0.0).startswith("2:30:00 left (until ")
    trainer.estimated_stepping_batches = float("inf")
    assert training_end(trainer, 0.05, 0, 1.0) == "" == training_end(trainer, None, 0, 1.0)


@pytest.mark.parametrize("given_bar", [None, "TQDMProgressBar", "RichProgressBar", False])
def test_which_bar_a_run_has(given_bar, base_folder, facts, tmp_path, capsys):
    """Ours, unless the config brings one or switches it off."""
    own = [{"class_path": f"lightning.pytorch.callbacks.{given_bar}"}] if given_bar else []
    shown = {"enable_progress_bar": given_bar is not False, "callbacks": own, "enable_checkpointing": False}
    config = run_config(tmp_path, base_folder("llama"), facts, max_steps=2, limit_val_batches=0, logger=[], **shown)
    cli = run_trainer(*resolved_configs(["fit", "--config", str(config), "--model.precondition", "0.01"]))
    kinds = {
        None: EditProgressBar,
        "TQDMProgressBar": TQDMProgressBar,
        "RichProgressBar": RichProgressBar,
        False: type(None),
    }
    assert type(cli.trainer.progress_bar_callback) is kinds[given_bar]
    lines = [line.partition(",")[0] for line in capsys.readouterr().out.splitlines()]
    assert lines.count("Training: 2/2 steps") == int(given_bar is None)
    estimated = [line for line in lines if line.startswith("Estimating the preconditioning: ")]
    assert len(estimated) == int(given_bar is not False)


def test_an_error_ends_the_bar_and_reads_nothing(mend, edit_data, shown, clock, screen, monkeypatch):
    """What a failed device holds cannot be read; what is printed then begins on a line of its own."""
    module = mend("llama")
    batch = first_batches(module, edit_data(), 1)[0]

    def fail(self, *_):
        monkeypatch.setattr(EditProgressBar, "get_metrics", None)
        raise ZeroDivisionError

    monkeypatch.setattr(Passing, "on_train_batch_end", fail)
    with pytest.raises(ZeroDivisionError):
        shown(clock, max_steps=3).fit(module, given([batch] * 3))
    assert words(frames(screen)[-1]) == "Training 1/3 steps, took 1:40" and screen.getvalue().endswith("\n")


def test_times_of_day(monkeypatch, clock, capsys):
    """A line knows the end as a time of day where it is far."""

    class Noon(datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 12, 0)

    monkeypatch.setattr(progress_line, "datetime", Noon)
    line = ProgressLine("Test", 362)
    for _ in range(2):
        clock.now += 60
        line.turn(6)
    assert capsys.readouterr().out.splitlines()[-1] == "Test: 2/362 batches, 0.1 edits/s, 6:00:00 left (until 18:00)"
