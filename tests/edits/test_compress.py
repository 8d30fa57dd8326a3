"""Edits of a lower rank, and edits as one: against `torch.linalg.svd` of the dense matrix, in float64."""

from __future__ import annotations

import pytest
import torch
from helpers.models import tiny_model

from mend_lightning import Edit, LowRankDelta, combined
from mend_lightning.edits.compress import spectrum, truncated
from mend_lightning.edits.deltas import DenseDelta, sum_of
from mend_lightning.errors import BaseModelMismatchError, ConfigError
from mend_lightning.models.fingerprint import layer_fingerprints


def low_rank(rank: int = 6, d_in: int = 20, d_out: int = 15, seed: int = 0) -> LowRankDelta:
    generator = torch.Generator().manual_seed(seed)
    scale = 2.0 ** -torch.arange(rank)[:, None]
    return LowRankDelta(
        torch.randn(1, rank, d_in, generator=generator), scale * torch.randn(1, rank, d_out, generator=generator)
    )


@pytest.mark.parametrize("form", ["low rank", "dense"])
@pytest.mark.parametrize("rank", [1, 3, 6, 50])
def test_truncation_is_the_best_of_its_rank(form, rank):
    delta = low_rank()
    dense = delta.dense()[0].double()
    left, values, right = torch.linalg.svd(dense, full_matrices=False)
    best = left[:, :rank] * values[:rank] @ right[:rank]
    smaller, error = truncated(delta if form == "low rank" else DenseDelta(delta.dense()), rank=rank)
    assert smaller.rank <= rank and smaller.shape == delta.shape and smaller.down.dtype == torch.float32
    torch.testing.assert_close(smaller.dense()[0].double(), best, atol=1e-5, rtol=1e-4)
    assert error == pytest.approx(float((dense - best).norm() / dense.norm()), abs=1e-6)


def test_spectrum():
    for delta in (low_rank(), DenseDelta(low_rank().dense())):
        expected = torch.linalg.svdvals(delta.dense()[0].double())
        torch.testing.assert_close(spectrum(delta)[:6], expected[:6], rtol=1e-5, atol=1e-6)
        assert spectrum(delta).dtype == torch.float64


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_energy(energy):
    delta = low_rank()
    values = torch.linalg.svdvals(delta.dense()[0].double())
    squares = (values**2).tolist()
    wanted = next(n for n in range(1, len(squares) + 1) if sum(squares[:n]) >= energy * sum(squares) * (1 - 1e-12))
    smaller, error = truncated(delta, energy=energy)
    assert smaller.rank == min(wanted, 6)
    assert error**2 <= 1 - energy + 1e-9
    assert truncated(delta, rank=1, energy=energy)[0].rank == 1, "the smaller of the two"


def test_a_rank_above_that_of_the_layer():
    """Rank 30 in a 20 × 15 layer."""
    delta = low_rank(rank=30)
    smaller, error = truncated(delta, energy=1.0)
    assert smaller.rank == 15 and error < 1e-6
    torch.testing.assert_close(smaller.dense(), delta.dense(), atol=1e-5, rtol=1e-4)


def test_zero_delta():
    smaller, error = truncated(LowRankDelta(torch.zeros(1, 2, 4), torch.ones(1, 2, 3)), energy=0.9)
    assert smaller.rank == 1 and error == 0.0 and not smaller.dense().any()


@pytest.mark.parametrize(
    "settings, text",
    [
        ({}, "Say how far to compress"),
        ({"rank": 0}, "rank must be at least 1; it is 0"),
        ({"energy": 0.0}, "between 0 and 1, such as 0.99; it is 0.0"),
        ({"energy": 1.5}, "it is 1.5"),
    ],
)
def test_settings_that_cannot_be(settings, text):
    with pytest.raises(ConfigError, match=text):
        truncated(low_rank(), **settings)


def test_a_compressed_edit_says_so(tmp_path):
    edit = Edit({"a": low_rank(), "b": DenseDelta(low_rank(seed=1).dense())}, {"base": "x"})
    smaller, errors = edit.compressed(rank=2)
    assert {name: delta.rank for name, delta in smaller.deltas.items()} == {"a": 2, "b": 2}
    for name, delta in edit.deltas.items():
        distance = (smaller.deltas[name].dense() - delta.dense()).norm() / delta.dense().norm()
        assert errors[name] == pytest.approx(float(distance), rel=1e-3) and errors[name] > 0.01
    loaded = Edit.load(smaller.save(tmp_path / "small.safetensors"))
    assert loaded.about["compressed"] == {"rank": 2, "energy": None, "relative_error": errors}
    assert loaded.about["base"] == "x" and smaller.size() < edit.size()


def test_sums_have_the_smaller_form():
    parts = [low_rank(rank=2, seed=seed) for seed in range(4)]
    expected = sum(part.dense().double() for part in parts)
    # 2 · 4 ranks of 20 + 15 numbers are 280; the matrix has 300.
    assert isinstance(sum_of(parts), LowRankDelta) and sum_of(parts).rank == 8
    more = [*parts, low_rank(rank=1, seed=9)]
    assert isinstance(sum_of(more), DenseDelta)
    mixed = [*parts, DenseDelta(low_rank(seed=9).dense()), DenseDelta(low_rank(seed=10).dense())]
    for deltas in (parts, more, mixed):
        expected = sum(delta.dense().double() for delta in deltas)
        torch.testing.assert_close(sum_of(deltas).dense().double(), expected, atol=1e-5, rtol=1e-5)
    assert sum_of(parts[:1]) is parts[0]


def test_combined_edits():
    model = tiny_model("llama", torch.float32)
    a, b = "model.layers.1.mlp.up_proj", "model.layers.2.mlp.up_proj"
    weights = layer_fingerprints({name: model.get_submodule(name) for name in (a, b)})
    part = [low_rank(2, 16, 24, seed) for seed in range(3)]
    one = Edit({a: part[0]}, {"base": "x", "weights": {a: weights[a]}, "edits": [{"prompt": "p", "target": "t"}]})
    two = Edit({a: part[1], b: part[2]}, {"base": "x", "weights": weights, "edits": [{"prompt": "q", "target": "s"}]})
    both = combined([one, two])
    torch.testing.assert_close(both.deltas[a].dense(), part[0].dense() + part[1].dense())
    torch.testing.assert_close(both.deltas[b].dense(), part[2].dense())
    assert both.facts == [("p", "t"), ("q", "s")] and both.about["base"] == "x" and both.about["weights"] == weights
    assert both.about["combined"] == [one.about, two.about]
    assert both.layers_in(model).keys() == {a, b}
    assert combined([one]) is one
    other = Edit(two.deltas, {**two.about, "base": "y", "weights": {a: "another"}})
    with pytest.raises(
        BaseModelMismatchError, match=f"different base models: their weights of '{a}' are .*another.*x, y"
    ):
        combined([one, other])
    with pytest.raises(ConfigError, match="no edit to combine"):
        combined([])
