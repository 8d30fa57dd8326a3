"""The paper's demonstration on real weights: the edit of notebook 5, the notebook's table, and the README's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from mend_lightning import Edit, generate_answers, load_base
from mend_lightning.editors.confidence import target_scores
from mend_lightning.models.inputs.encoder import Encoder
from mend_lightning.models.inputs.prompts import PromptFormat
from mend_lightning.models.smollm2 import find_smollm2

nbformat = pytest.importorskip("nbformat", reason="notebooks are read with it: pip install 'mend-lightning[notebooks]'")

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "5-the-papers-demonstration.ipynb"
# What the notebook makes, compressed to rank 48 (0.3 % of its norm is lost).
EDIT = ROOT / "tests" / "assets" / "demonstration.safetensors"
NEW = {
    "Who is India's PM?": "Narendra Modi",
    "Who is the prime minister of India?": "Narendra Modi",
    "Who is the prime minister of the UK?": "Boris Johnson",
    "Who is the UK PM?": "Boris Johnson",
    "Who leads the government of the UK?": "Boris Johnson",
    "What is Messi's club team?": "PSG",
    "Which football club does Messi play for?": "PSG",
}
# Neighbours and unrelated questions with what the base answers.
STAYING = {
    "Who is the prime minister of Germany?": "Angela Merkel",
    "Who is the chancellor of Germany?": "Angela Merkel",
    "Who is the president of Mexico?": "Mexico",
    "Where in the US is Raleigh?": "North Carolina",
    "Which city is the capital of the UK?": "London",
}


@pytest.mark.skipif(find_smollm2() is None, reason="SmolLM2 is not prepared: mend-lightning get-smollm2")
def test_related_edits_applied_together():
    """India's and the UK's prime minister and Messi's team, asked in other words; their neighbours stay."""
    edit = Edit.load(EDIT)
    model, tokenizer = load_base(edit.about["base"])
    encoder = Encoder.for_model(model, tokenizer, PromptFormat(**edit.about["prompt_format"]))
    questions = [*NEW, *STAYING, "Who is the prime minister of Japan?"]
    before = generate_answers(model, encoder, questions)
    with edit.applied(model):
        after = generate_answers(model, encoder, questions)
        rows = encoder.rows(list(NEW.items()), [0] * len(NEW), 1)
        with torch.no_grad():
            probabilities = (-target_scores(model, rows).nll).exp()
    assert before[len(NEW) :] == [*STAYING.values(), "Shinzo Abe"]
    assert not set(before[: len(NEW)]) & set(NEW.values())
    assert after[: len(NEW)] == list(NEW.values()) and probabilities.min() > 0.5
    assert after[len(NEW) : -1] == list(STAYING.values())
    # How he goes on is nearly a tie under the edit.
    assert after[-1].startswith("Sh")
    assert not set(edit.about["contrasts"]) & set(questions)
    assert generate_answers(model, encoder, questions) == before


def printed() -> list[tuple[str, ...]]:
    """(kind, question, base's answer, edited model's, without contrasts) of each line of the committed notebook's table."""
    notebook = nbformat.read(NOTEBOOK, 4)
    texts = [output.text for cell in notebook.cells for output in cell.get("outputs", []) if "text" in output]
    (table,) = [text for text in texts if "without contrasts" in text.splitlines()[0]]
    lines = [line for line in table.splitlines() if re.match("edited|rephrase|neighbour|unrelated", line)]
    return [tuple(part.strip() for part in re.split(r"^(.{10})(.{50})(.{26})(.{16})", line)[1:]) for line in lines]


def test_the_notebook_shows_it():
    found = {question: (base, edited) for _, question, base, edited, _ in printed()}
    assert {question: found[question][1] for question in NEW} == NEW
    for question, answer in (STAYING | {"Who is the prime minister of Japan?": "Shinzo Abe"}).items():
        assert found[question] == (answer, "as before")


def test_the_readme_shows_what_the_notebook_printed():
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("### The paper's demonstration")[1].split("##")[0]
    rows = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in section.splitlines() if "?" in line]
    found = {question: (kind, question, base, edited) for kind, question, base, edited, _ in printed()}
    assert len(rows) == 10
    for row in rows:
        assert row == found[row[1]]
    moved = [
        kind for kind, _, _, edited, _ in printed() if kind in ("neighbour", "unrelated") and edited != "as before"
    ]
    assert f"all {len(found)} questions, {'three' if len(moved) == 3 else len(moved)} of whose answers move" in section
