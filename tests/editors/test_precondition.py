"""The inputs' second moment: against dense float64 algebra."""

from __future__ import annotations

import pytest
import torch
from helpers.models import ROUNDING, relative_error

from mend_lightning.editors import MendEditor
from mend_lightning.editors.factors import Factors
from mend_lightning.editors.precondition import InputMoments, InputPreconditioner
from mend_lightning.errors import ConfigError

DAMPING = 0.03


def inputs(count: int, width: int, seed: int = 0) -> torch.Tensor:
    """Rows with a strong common direction, a mean, and units of different size."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, width, generator=generator) * torch.linspace(0.2, 3, width)
    return rows + 5 * torch.randn(count, 1, generator=generator) * torch.ones(width) + 0.7


def slow_matrix(u: torch.Tensor, damping: float) -> torch.Tensor:
    """The matrix from its definition, token by token, in float64."""
    u = u.double()
    second = sum(torch.outer(row, row) for row in u) / len(u)
    width = u.shape[1]
    inverse = torch.linalg.inv(second + damping * second.trace() / width * torch.eye(width, dtype=torch.float64))
    effect_without = u.std(0, unbiased=False).sum()
    effect_with = torch.stack([row @ inverse @ row for row in u]).mean()
    return effect_without / effect_with * inverse


def calibrated(u: torch.Tensor, parts: int = 3) -> InputPreconditioner:
    moments = InputMoments.empty(u.shape[1])
    for part in u.chunk(parts):
        moments.add(part)
    preconditioner = InputPreconditioner(u.shape[1], DAMPING)
    preconditioner.calibrate(moments)
    return preconditioner


def test_matrix_is_the_damped_inverse_second_moment():
    u = inputs(200, 6)
    expected = slow_matrix(u, DAMPING)
    # The products are summed from float32 batches.
    assert relative_error(calibrated(u).matrix, expected) < ROUNDING


def test_other_inputs_are_answered_less_for_the_same_effect_on_the_edits_own():
    u = inputs(400, 8)
    own, others = u[:1], u[1:]
    with_it = calibrated(others)(own)

    def leak(factor: torch.Tensor) -> torch.Tensor:
        return (others @ factor[0]).square().mean() / (own @ factor[0]).square()

    assert leak(with_it) < 0.2 * leak(own)


def phrasings(count: int, width: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs of edits and of rephrases: half of the units are the subject's, half change from phrasing to phrasing."""
    shared, generator = inputs(count, width), torch.Generator().manual_seed(9)
    changing = torch.arange(width) >= width // 2
    both = [shared + noise * changing * torch.randn(count, width, generator=generator) for _ in range(2)]
    return both[0], both[1]


def test_matrix_with_answers_and_rephrases():
    """From the definitions, token by token, in float64: rows times (A⁻¹ C B⁻¹)ᵀ."""
    ridge, width = 0.2, 6
    u, (edits, rephrases) = inputs(200, width), phrasings(50, width, 2.0)
    moments = InputMoments.empty(width)
    moments.add(u)
    moments.answers.add(edits)
    for part in (slice(0, 20), slice(20, 50)):
        moments.add_pairs(edits[part], rephrases[part])
    preconditioner = InputPreconditioner(width, DAMPING, ridge)
    preconditioner.calibrate(moments)

    def mean_outer(rows, others) -> torch.Tensor:
        return sum(torch.outer(a, b) for a, b in zip(rows.double(), others.double())) / len(rows)

    def inverse(second: torch.Tensor, damping: float) -> torch.Tensor:
        return torch.linalg.inv(second + damping * second.trace() / width * torch.eye(width, dtype=torch.float64))

    a = (mean_outer(u, u) + mean_outer(edits, edits)) / 2
    b = (mean_outer(edits, edits) + mean_outer(rephrases, rephrases)) / 2
    c = (mean_outer(edits, rephrases) + mean_outer(rephrases, edits)) / 2
    expected = (inverse(a, DAMPING) @ c @ inverse(b, ridge)).T
    effect = torch.stack([row @ expected @ row for row in u.double()]).mean()
    expected = u.double().std(0, unbiased=False).sum() / effect * expected
    assert relative_error(preconditioner.matrix, expected) < ROUNDING


def test_rephrases_are_answered_more_alike_with_the_regression():
    edits, rephrases = phrasings(2000, 8, 30.0)
    moments = InputMoments.empty(8)
    moments.add(inputs(500, 8, seed=1))
    moments.add_pairs(edits, rephrases)

    def answer(ridge: float | None) -> torch.Tensor:
        """To the rephrase, in parts of the answer to the edit itself; of fresh phrasings of other subjects."""
        preconditioner = InputPreconditioner(8, DAMPING, ridge)
        preconditioner.calibrate(moments)
        u, v = (part[:200] for part in phrasings(700, 8, 30.0))
        factor = preconditioner(u)
        return (factor * v).sum(1).mean() / (factor * u).sum(1).mean()

    assert answer(1e-3) > 3 * answer(None) > 0, (answer(1e-3), answer(None))


def test_without_pairs_there_is_no_regression():
    moments = InputMoments.empty(6)
    moments.add(inputs(100, 6))
    with_ridge, without = InputPreconditioner(6, DAMPING, 0.1), InputPreconditioner(6, DAMPING)
    for preconditioner in (with_ridge, without):
        preconditioner.calibrate(moments)
    assert relative_error(with_ridge.matrix, without.matrix) < ROUNDING


def test_editor_at_its_start_is_the_formula():
    u, delta = inputs(40, 5), torch.randn(40, 3, generator=torch.Generator().manual_seed(1))
    factors = {"fc": Factors(u, delta, torch.zeros(40, dtype=torch.long), 1)}
    editor = MendEditor({"fc": (5, 3)}, rank=2, edit_rate=0.01, precondition=DAMPING)
    moments = InputMoments.empty(5)
    moments.add(u)
    editor.calibrate({"fc": moments})
    dense = editor(factors)["fc"].dense()[0].double()
    d = delta.double()
    normalized = (d - d.mean(0)) / (d.std(0) + 1e-7)
    expected = -0.01 * normalized.T @ (u.double() @ slow_matrix(u, DAMPING))
    assert relative_error(dense, expected) < ROUNDING


def test_uncalibrated_editor_says_what_to_do():
    editor = MendEditor({"fc": (5, 3)}, rank=2, precondition=DAMPING)
    factors = {"fc": Factors(inputs(4, 5), torch.ones(4, 3), torch.zeros(4, dtype=torch.long), 1)}
    assert not editor.calibrated
    with pytest.raises(ConfigError, match="has not been calibrated. MendModule does that at the start of fit"):
        editor(factors)


def test_calibration_is_saved_with_the_editor(tmp_path):
    editor = MendEditor({"fc": (5, 3)}, rank=2, precondition=DAMPING)
    moments = {"fc": InputMoments.empty(5)}
    moments["fc"].add(inputs(30, 5))
    editor.calibrate(moments)
    loaded = MendEditor.from_pretrained(editor.save_pretrained(tmp_path))
    assert loaded.calibrated
    assert torch.equal(loaded.preconditioners[0].matrix, editor.preconditioners[0].matrix)


def test_settings_that_cannot_be():
    with pytest.raises(ConfigError, match="damping of an inverse and must be positive, not 0"):
        InputPreconditioner(3, damping=0)
    with pytest.raises(ConfigError, match="ridge of a regression and must be positive, not -1"):
        InputPreconditioner(3, damping=1, rephrase_ridge=-1)
    with pytest.raises(ConfigError, match="rephrase_ridge is a part of the preconditioning: set precondition"):
        MendEditor({"fc": (5, 3)}, rephrase_ridge=0.1)
