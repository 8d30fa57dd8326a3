"""The line about what training changed, and when it says that it was for nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mend_lightning.training.training_change import training_change
from mend_lightning.training.validations import Validation, Validations, validation_of

BEFORE = Validation(
    0, 96, {"edit_success": 0.955, "generality": 0.94, "kept": 0.98, "locality_kl": 0.0118, "loss": 1.0}
)


def changed(**values) -> str:
    """The line where these metrics have other values after the training."""
    return training_change(BEFORE, Validation(60, 96, {**BEFORE.values, **values}))


def test_what_it_says():
    assert changed(edit_success=0.983, locality_kl=0.01) == (
        "Training changed, on 96 validation edits: success 0.955 → 0.983, generality 0.940 → 0.940, kept 0.980 → 0.980, "
        "KL 0.0118 → 0.0100."
    )


@pytest.mark.parametrize(
    "values, said",
    [
        ({}, "KL 0.0118 → 0.0118. The editor is no better than the untrained editor."),
        # Less than one edit of 96.
        ({"edit_success": 0.965, "kept": 0.971}, "The editor is no better than the untrained editor."),
        ({"locality_kl": 0.0115}, "The editor is no better than the untrained editor."),
        ({"kept": 0.96}, "worse than the untrained editor in kept. It is better in nothing."),
        ({"locality_kl": 0.02}, "It did harm: the editor is worse than the untrained editor in KL. It is better in nothing."),
        (
            {"generality": 0.9, "edit_success": 0.9, "locality_kl": 0.009},
            "It did harm: the editor is worse than the untrained editor in success and generality. It is better in KL.",
        ),
    ],
)  # fmt: skip
def test_where_it_was_for_nothing(values, said):
    assert changed(**values).endswith(said)


def test_one_edit_is_a_change():
    assert changed(generality=0.94 + 1 / 96).endswith("0.0118.")
    assert "did harm" in changed(generality=0.94 - 1 / 96)


def test_what_was_not_measured_is_left_out():
    """A base that knows nothing keeps nothing."""
    without = replace(BEFORE, values={name: value for name, value in BEFORE.values.items() if name != "kept"})
    line = training_change(without, replace(BEFORE, step=60), "the editor that it began with")
    assert "kept" not in line and line.endswith("The editor is no better than the editor that it began with.")


def test_what_a_checkpoint_holds():
    validations = Validations(BEFORE, replace(BEFORE, step=30))
    saved = validations.saved()
    assert Validations.of(saved) == validations and Validations.of(None) == Validations()
    assert validation_of({"validations": saved, "global_step": 30}) == validations.last
    # Saved at another time than it validated, or by an earlier version.
    assert validation_of({"validations": saved, "global_step": 31}) is None
    assert validation_of({"global_step": 30}) is None
