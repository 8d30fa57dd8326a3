"""Comparisons with the golden vectors, at the tolerances their README advises."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from golden.cases import STATISTICS, Case, group_key, relative_error
from golden.running import parameters_by_original_name
from mend_lightning.editors.mend import MendEditor
from mend_lightning.editors.normalizer import RunningNormalizer
from mend_lightning.models.forward.logits import label_mask
from mend_lightning.models.forward.losses import is_correct
from mend_lightning.models.inputs.rows import Rows
from mend_lightning.training.step import StepOutput

TENSOR = 1e-4  # of the tensor's largest entry
LOSS = 1e-5  # relative
FINAL_PARAMETER = 3e-5  # absolute, after 20 steps
# In `traj_t5gated_separate` a token's unit lies on the clamp's kink to the last bit: weights multiplied by 1 ± 6e-8 send it one
# way or the other (in 5 of 7 draws, whatever the code), and with it the unit's entries: at most 10 of 1280, by at most 2.9e-4.
AT_KINK, SHARE_AT_KINK = 4e-4, 0.01


def check(actual: Tensor, expected: Tensor, what: str) -> None:
    error = relative_error(actual, expected)
    assert error <= TENSOR, f"{what}: error {error:.2e} of the largest entry"


def check_moments(count: int, mean: Tensor, m2: Tensor, expected: dict[str, Tensor], letter: str, layer: str) -> None:
    """Statistics of one side (`letter` u or v) against the original's mean, sum of squares and std."""
    normalizer = RunningNormalizer(mean.shape[0])
    for buffer, value in zip((normalizer.count, normalizer.mean, normalizer.m2), (count, mean, m2)):
        buffer.copy_(torch.as_tensor(value))
    assert int(count) == int(expected["k"])
    check(mean, expected[f"{letter}_mean"], f"{letter}_mean {layer}")
    check(m2, expected[f"{letter}_s"], f"{letter}_s {layer}")
    check(normalizer.std, expected[f"{letter}_std"], f"{letter}_std {layer}")


def check_statistics(case: Case, editor: MendEditor, buffers: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """All statistics of the editor: `buffers` by our names, `expected` by the original's."""
    for index, group in enumerate(editor.groups):
        start = f"mend.{group_key(case, group[0])}."
        theirs = {key.removeprefix(start): value for key, value in expected.items() if key.startswith(start)}
        for letter, name in STATISTICS.items():
            count, mean, m2 = (buffers[f"transforms.{index}.{name}.{key}"] for key in ("count", "mean", "m2"))
            check_moments(int(count), mean, m2, theirs, letter, group[0])


def check_losses(output: StepOutput, expected: dict, c_edit: float) -> None:
    assert output.edit.item() == pytest.approx(expected["l_edit"], rel=LOSS, abs=0)
    # A small l_loc is a difference of almost equal numbers: only there the absolute part counts.
    assert output.locality.item() == pytest.approx(expected["l_loc"], rel=0, abs=1e-4 * expected["l_loc"] + 3e-7)
    assert output.total(c_edit).item() == pytest.approx(expected["l_total"], rel=LOSS, abs=0)


def check_final_parameters(case: Case, editor: MendEditor) -> None:
    ours = parameters_by_original_name(editor, dict(editor.named_parameters()))
    expected = case.part("final")
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        errors = (value - expected[name]).detach().abs()
        off = float((errors > FINAL_PARAMETER).float().mean())
        assert off <= SHARE_AT_KINK and float(errors.max()) <= AT_KINK, (
            f"{name}: {off:.1%} off, error {errors.max():.2e}"
        )


def whole_row_accuracy(all_logits: Tensor, rows: Rows) -> float:
    """The original's accuracy: the share of rows that are right at every label."""
    mask = label_mask(rows)
    at = all_logits if all_logits.dim() == 2 else all_logits[mask]
    wrong = torch.zeros(mask.shape, dtype=torch.bool)
    wrong[mask] = ~is_correct(at, rows.labels[mask])
    return float((~wrong.any(-1)).float().mean())
