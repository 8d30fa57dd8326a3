"""What is said of a run that fails at its first look: what is wrong, and the likely causes in their order."""

from __future__ import annotations

import re

import pytest

from mend_lightning.errors import FailingRunWarning
from mend_lightning.evaluation.doubts import Asked, causes, failure, findings, warn_of_failure

ASKED = Asked({"prompt": "{input}", "target": " {target}", "stop": "\n"}, confidence=0.75)
FINE = {
    "base_accuracy": 0.6, "stop_probability": 0.9, "confident": 0.95, "probability": 0.78, "edit_success": 0.9,
    "delta_norm": 0.1, "edit_nll": 0.3, "locality_kl": 0.01,
}  # fmt: skip


def test_a_run_that_goes_well_is_not_warned_of(recwarn):
    assert findings(FINE, ASKED) == {} and failure(FINE, 96, ASKED, "The test") is None
    assert warn_of_failure(FINE, 96, ASKED, "The test") is False and not recwarn.list


@pytest.mark.parametrize(
    "metric, fails, holds, said",
    [
        ("base_accuracy", 0.099, 0.1, r"the base model answers 0.099 of the unrelated questions \(x_out\) right, fewer"),
        ("confident", 0.8, 0.81, r"0.200 of the edits miss their confidence: less than 0.9 × 0.75, median probability 0.78"),
        ("edit_success", 0.499, 0.5, "edit success is 0.499, under one half"),
    ],
)  # fmt: skip
def test_what_is_too_little(metric, fails, holds, said):
    assert findings({**FINE, metric: holds}, ASKED) == {}
    found = findings({**FINE, metric: fails}, ASKED)
    assert list(found) == [metric] and re.match(said, found[metric]), found


def test_causes_come_in_their_order_with_their_figures():
    values = {
        **FINE, "base_accuracy": 0.02, "stop_probability": 0.0004, "confident": 0.1, "probability": 0.03, "edit_success": 0.1,
        "delta_norm": 1.84,
    }  # fmt: skip
    with pytest.warns(FailingRunWarning) as caught:
        assert warn_of_failure(values, 300, ASKED, "The test")
    said = str(caught[0].message)
    order = [
        "The test fails, on 300 edits: the base model answers 0.020", "; 0.900 of the edits miss", "; edit success is 0.100",
        r"Likely causes, the likeliest first: (1) the stop text (data.stop, '\n')", "probability 0.0004.",
        "(2) the prompt (data.prompt, '{input}'): asked so, the base model answers 0.020",
        "(3) the layers (model.layers): 0.100 of the edits reach their confidence, the new answers' median probability is 0.03.",
        "(4) the edit rate (model.edit_rate, and what it learns by): ‖ΔW‖/‖W‖ is 1.84.",
    ]  # fmt: skip
    places = [said.find(part) for part in order]
    assert -1 not in places and places == sorted(places), (places, said)


def test_what_nothing_speaks_for_is_not_named():
    """A base that knows the facts and ends its answers has no wrong stop or prompt."""
    values = {**FINE, "edit_success": 0.2}
    assert [cause[:14] for cause in causes(values, ASKED, findings(values, ASKED))] == [
        "the layers (mo",
        "the edit rate ",
    ]
    # Of a base that knows nothing layers and rate are no cause.
    values = {**FINE, "base_accuracy": 0.0, "stop_probability": 0.1}
    assert [cause[:8] for cause in causes(values, ASKED, findings(values, ASKED))] == ["the stop", "the prom"]


def test_losses_that_are_no_numbers_are_left_out_of_values():
    values = {name: value for name, value in FINE.items() if name != "locality_kl"}
    found = findings(values, ASKED)
    assert found == {"edit_nll": "the losses of edited models are not finite"}
    assert causes(values, ASKED, found)[-1].startswith("the edit rate")


def test_the_end_of_sequence_token_has_a_name():
    asked = Asked({**ASKED.prompt_format, "stop": ""})
    (stop, _) = causes({**FINE, "base_accuracy": 0.0, "stop_probability": 0.1}, asked, {"base_accuracy": ""})
    assert "the end-of-sequence token" in stop


def test_an_editor_that_has_yet_to_learn_its_size_is_not_blamed_for_it():
    values = {name: value for name, value in FINE.items() if name != "confident"} | {"edit_success": 0.0}
    published = {"prompt_format": ASKED.prompt_format}
    assert findings(values, Asked(**published, trained=False)) == {}
    assert list(findings(values, Asked(**published))) == ["edit_success"]
    assert list(findings(values, Asked(**published, confidence=0.75, trained=False))) == ["edit_success"]


def test_nobody_knows_every_word_of_a_running_text():
    running = Asked({"prompt": "{input}", "target": "{target}", "stop": None})
    assert findings({**FINE, "base_accuracy": 0.0}, running) == {} and not running.has_stop
    statements = Asked({"prompt": "{input}", "target": " {target}", "stop": None})
    assert list(findings({**FINE, "base_accuracy": 0.0}, statements)) == ["base_accuracy"]


def test_nothing_ends_a_class():
    assert ASKED.has_stop and not Asked(ASKED.prompt_format, classifies=True).has_stop
    assert not Asked({}).has_stop, "nobody knows"
