"""Metrics against plain loops over rows: in batches of any size, on one process and merged over two."""

from __future__ import annotations

import math
import pickle
import random

import pytest
import torch

from mend_lightning.editors.edited_model import DeltaEdits
from mend_lightning.evaluation.evaluate import BatchScores, ComparedScores
from mend_lightning.evaluation.metric_collection import PROTOCOL, Scoreboard
from mend_lightning.evaluation.metrics import (
    Drawdown,
    EditSuccess,
    MedianShare,
    PerplexityDrawdown,
    RowShare,
    WeightedMean,
)
from mend_lightning.evaluation.statistics import bootstrap_interval, exact_match, token_f1
from mend_lightning.models.forward.losses import rows_all_true, rows_sum


def share(rows: list[tuple]) -> float:
    return sum(right for (right,) in rows) / len(rows)


def drawdown(rows: list[tuple]) -> float:
    return sum(before - after for before, after in rows) / len(rows)


def perplexity_drawdown(rows: list[tuple]) -> float:
    tokens = sum(count for _, _, count in rows)
    before, after = (math.exp(sum(row[i] for row in rows) / tokens) for i in (0, 1))
    return after - before


def weighted_mean(rows: list[tuple]) -> float:
    return sum(value * weight for value, weight in rows) / sum(weight for _, weight in rows)


def draw_share(generator: random.Random) -> tuple:
    return (generator.random() < 0.7,)


def draw_drawdown(generator: random.Random) -> tuple:
    return generator.random() < 0.8, generator.random() < 0.6


def draw_nll(generator: random.Random) -> tuple:
    return generator.uniform(0, 20), generator.uniform(0, 30), generator.randint(1, 9)


def draw_value(generator: random.Random) -> tuple:
    return generator.uniform(-1, 1), generator.randint(1, 9)


METRICS = {
    RowShare: (draw_share, share),
    EditSuccess: (draw_share, share),
    Drawdown: (draw_drawdown, drawdown),
    PerplexityDrawdown: (draw_nll, perplexity_drawdown),
    WeightedMean: (draw_value, weighted_mean),
}


@pytest.fixture(params=list(METRICS), ids=lambda metric: metric.__name__)
def case(request):
    """A metric class, rows for it, and the truth about them."""
    draw, truth = METRICS[request.param]
    generator = random.Random(0)
    rows = [draw(generator) for _ in range(101)]
    return request.param, rows, truth(rows)


def update(metric, rows: list[tuple]) -> None:
    metric.update(*(torch.tensor(list(column)) for column in zip(*rows)))


def batches(rows: list[tuple]) -> list[list[tuple]]:
    """Uneven ones."""
    ends = (0, 1, 8, 40, 41, len(rows))
    return [rows[a:b] for a, b in zip(ends, ends[1:])]


def test_accumulated_over_batches(case):
    metric_class, rows, truth = case
    metric = metric_class()
    for batch in batches(rows):
        update(metric, batch)
    assert metric.compute().dtype == torch.float32
    assert float(metric.compute()) == pytest.approx(truth, rel=1e-6)
    assert float(pickle.loads(pickle.dumps(metric)).compute()) == float(metric.compute())
    metric.reset()
    update(metric, rows[:3])
    assert float(metric.compute()) == pytest.approx(METRICS[metric_class][1](rows[:3]), rel=1e-6)


def test_merged_over_two_processes_of_unequal_shares(case):
    """Every state is a sum: what the processes hold is gathered and added, as torchmetrics does."""
    metric_class, rows, truth = case
    other = metric_class()
    update(other, rows[:17])
    theirs = iter([getattr(other, name) for name in other._defaults])
    metric = metric_class(dist_sync_fn=lambda mine, group: [mine, next(theirs)], distributed_available_fn=lambda: True)
    update(metric, rows[17:])
    assert float(metric.compute()) == pytest.approx(truth, rel=1e-6)


def test_every_state_is_a_float64_sum(case):
    """Lists would deadlock on processes with unequal numbers of batches, and float32 stops counting at 2^24."""
    metric = case[0]()
    assert metric._defaults
    for name, value in metric._defaults.items():
        assert value.dtype == torch.float64 and value.shape == ()
        assert metric._reductions[name] is torch.sum or metric._reductions[name].__name__ == "dim_zero_sum"


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric .* was called before the ``update`` method.*")
def test_nan_before_anything_was_seen(case):
    assert math.isnan(float(case[0]().compute()))


def test_counts_beyond_float32():
    metric = RowShare()
    metric.update(torch.tensor([True]))
    metric.hits += 2**24
    metric.rows += 2**25
    for _ in range(3):
        metric.update(torch.tensor([True]))
    assert (float(metric.hits), float(metric.rows)) == (2**24 + 4, 2**25 + 4)


def test_perplexity_of_extremes():
    metric = PerplexityDrawdown()
    metric.update(torch.tensor([0.0]), torch.tensor([60.0]), torch.tensor([1]))
    assert float(metric.compute()) == pytest.approx(math.exp(60) - 1, rel=1e-6)


def random_rows(count: int, seed: int, task_size: int = 1) -> ComparedScores:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(1, 6, (count,), generator=generator)

    def parts() -> torch.Tensor:
        return (torch.rand(count, generator=generator) * (tokens + 1)).floor().clamp(max=tokens)

    def values() -> torch.Tensor:
        return torch.rand(count, generator=generator) * tokens

    hits = parts()
    before = torch.rand(count, generator=generator) < 0.6
    task = torch.arange(count) // task_size
    end = torch.rand(count, generator=generator)
    return ComparedScores(task, tokens, hits == tokens, values(), hits, before, values(), parts(), values(), end)


def test_scoreboard_against_loops_over_rows():
    board, all_rows, all_hard = Scoreboard(), [], []
    for seed, tasks in enumerate((4, 1, 3)):
        scores = BatchScores(*(random_rows(tasks * n, 10 * seed + n, n) for n in (1, 2, 4)), edited=DeltaEdits({}, {}))
        hard = torch.rand(tasks * 4, generator=torch.Generator().manual_seed(seed)) < 0.5
        board.update(scores, hard, confidence=0.6, has_stop=True)
        all_rows.append(scores)
        all_hard += hard.tolist()
    board.update_generated([True, False, True, True], [1.0, 0.25, 1.0, 1.0])
    edit, rephrase, locality = (
        [row for scores in all_rows for row in as_dicts(getattr(scores, name))]
        for name in ("edit", "rephrase", "locality")
    )
    known = [(row, hard) for row, hard in zip(locality, all_hard) if row["correct_before"]]
    expected = {
        "edit_success": mean([row["correct_after"] for row in edit + rephrase]),
        "reliability": mean([row["correct_after"] for row in edit]),
        "generality": mean([row["correct_after"] for row in rephrase]),
        "confident": mean([math.exp(-row["nll_after"]) >= 0.9 * 0.6 for row in edit]),
        "probability": median_of_thousandths([math.exp(-row["nll_after"]) for row in edit]),
        "stop_probability": mean([row["end_before"] for row in locality]),
        "token_accuracy": ratio(edit + rephrase, "hits"),
        "edit_nll": ratio(rephrase, "nll_after"),
        "base_accuracy": mean([row["correct_before"] for row in locality]),
        "kept": mean([row["correct_after"] for row, _ in known]),
        "kept_hard": mean([row["correct_after"] for row, hard in known if hard]),
        "drawdown": mean([row["correct_before"] - row["correct_after"] for row in locality]),
        "perplexity_drawdown": math.exp(ratio(locality, "nll_after")) - math.exp(ratio(locality, "nll_before")),
        "locality_agreement": ratio(locality, "agreement"),
        "locality_kl": ratio(locality, "kl"),
        "generated_exact_match": 0.75,
        "generated_f1": 0.8125,
    }
    assert board.compute() == pytest.approx(expected, rel=1e-6)
    assert 0 < expected["confident"] < 1
    assert set(expected) | {"delta_norm"} == set(PROTOCOL) | {"edit_nll"}
    assert board.edits() == len(edit) == 8
    board.reset()
    assert board.compute() == {}, "what saw nothing is left out"


def test_what_nobody_asked_for_is_left_out():
    """How sure an edit is of an editor that does not look, and the stop of answers that have none."""
    board = Scoreboard()
    board.update(BatchScores(*(random_rows(2, n) for n in range(3)), DeltaEdits({}, {})), torch.tensor([True, False]))
    assert not board.compute().keys() & {"confident", "stop_probability"} and "probability" in board.compute()


def median_of_thousandths(values: list[float]) -> float:
    return (int(sorted(values)[(len(values) - 1) // 2] * 1000) + 0.5) / 1000


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_a_median(count):
    generator = random.Random(count)
    values = [generator.random() ** 3 for _ in range(count)]
    metric, other = MedianShare(), MedianShare()
    metric.update(torch.tensor(values[: count // 2]))
    other.update(torch.tensor(values[count // 2 :]))
    # As processes are: each has seen some.
    metric.counts += other.counts
    assert float(metric.compute()) == pytest.approx(median_of_thousandths(values), abs=1e-6)
    assert metric._defaults["counts"].dtype == torch.float64


def test_a_median_of_extremes():
    metric = MedianShare()
    metric.update(torch.tensor([0.0, 1.0, 1.0, float("nan")]))
    assert float(metric.compute()) == pytest.approx(0.0005), "two of four are 0"
    metric.update(torch.tensor([1.0, 1.0]))
    assert float(metric.compute()) == pytest.approx(0.9995)


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric .* was called before the ``update`` method.*")
def test_a_median_of_nothing():
    assert math.isnan(float(MedianShare().compute()))


def as_dicts(rows: ComparedScores) -> list[dict]:
    return [{name: getattr(rows, name)[i].item() for name in vars(rows)} for i in range(len(rows.task))]


def mean(values: list) -> float:
    return sum(values) / len(values)


def ratio(rows: list[dict], name: str) -> float:
    return sum(row[name] for row in rows) / sum(row["tokens"] for row in rows)


@pytest.mark.parametrize("seed", range(5))
def test_sums_of_ragged_rows(seed):
    """Rows without a value among them, also none at all."""
    generator = torch.Generator().manual_seed(seed)
    rows, count = 7, int(torch.randint(0, 20, (), generator=generator))
    row = torch.randint(0, rows, (count,), generator=generator)
    flags = torch.rand(count, generator=generator) < 0.8
    values = torch.randn(count, generator=generator)
    pairs = list(zip(row.tolist(), flags.tolist(), values.tolist()))
    assert rows_all_true(flags, row, rows).tolist() == [all(f for r, f, _ in pairs if r == i) for i in range(rows)]
    expected = [sum(v for r, _, v in pairs if r == i) for i in range(rows)]
    assert rows_sum(values, row, rows).tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    "prediction, target, f1",
    [
        ("Paris", "Paris", 1.0), ("paris", "Paris", 1.0), ("Rome", "Paris", 0.0), ("New York City", "New York", 0.8),
        ("a a b", "a b b", 2 / 3), ("no no", "no no", 1.0), ("b a", "a b", 1.0), ("", "", 1.0),
        ("", "Paris", 0.0), ("Paris", "", 0.0),
        ("the city of Paris, France", "Paris", 0.0), (" Paris\n", "Paris", 1.0),
    ],
)  # fmt: skip
def test_f1_of_words(prediction, target, f1):
    assert token_f1(prediction, target) == pytest.approx(f1)


def test_exact_match_is_exact():
    assert exact_match("Paris ", " Paris")
    assert not exact_match("paris", "Paris") and not exact_match("Paris.", "Paris")


def test_bootstrap_of_known_cases():
    assert bootstrap_interval([0.25] * 9) == (0.25, 0.25)
    assert bootstrap_interval([1.0]) == (1.0, 1.0)
    assert bootstrap_interval([0.0, 1.0], [0.0, 2.0]) == (1.0, 1.0), "an edit without rows counts nothing"
    assert bootstrap_interval([0.0, 1.0] * 20) == bootstrap_interval([0.0, 1.0] * 20), "seeded"
    values = [1.0] * 300 + [0.0] * 100
    low, high = bootstrap_interval(values)
    half = 1.96 * math.sqrt(0.75 * 0.25 / 400)
    assert (low, high) == pytest.approx((0.75 - half, 0.75 + half), abs=0.006)


def test_bootstrap_weighs_edits_by_their_rows():
    """An edit of three rows and one of one row, many times over: their mean is 3/4, not 1/2."""
    low, high = bootstrap_interval([1.0, 0.0] * 200, [3.0, 1.0] * 200)
    assert low < 0.75 < high and 0.5 < low and high - low < 0.1
