"""Edits made in each format and asked in each, against one edit and one question at a time with dense weights."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
import torch
from helpers.bases import REMARKS, assert_same_state, state_copy
from helpers.models import KINDS, spread_parameters
from helpers.slow_scores import dense_weights, plain_greedy
from helpers.tokenizers import CHAT_TEMPLATES
from matplotlib.image import imread
from rich.console import Console
from torch.func import functional_call

from mend_lightning import InContext, MendEditor, load_base
from mend_lightning.data.batch import collate_tasks
from mend_lightning.data.host_model import HostModel
from mend_lightning.evaluation.evaluate import evaluate_batch
from mend_lightning.evaluation.format_plot import plot_formats
from mend_lightning.evaluation.format_table import (
    OWN_TOKENS,
    formats_table,
    means,
    means_lines,
    measure_formats,
    shares_of,
)
from mend_lightning.evaluation.statistics import holds_words
from mend_lightning.models.forward.generation import stop_ids

pytest_plugins = ["helpers.bases"]
pytestmark = pytest.mark.filterwarnings(*REMARKS)
FORMATS = {"llama": ["own", "chat", "passage"], "t5": ["own", "bare", "passage"]}
TABLE = {
    "formats": ["own", "chat"], "edits": 8, "success": [[1.0, 0.25], [0.5, 0.75]], "kept": [[0.9, None], [0.8, None]],
    "named": [[1.0, 0.5], [0.75, 1.0]], "unchanged": [[0.75, 0.5], [1.0, 0.25]], "known": [12, 0],
}  # fmt: skip


@pytest.fixture(params=list(FORMATS))
def measured(request, base_folder, edit_data):
    """A base that knows the facts, an editor, and two edits in each format."""
    model, tokenizer = load_base(str(base_folder(request.param)), "float32")
    tokenizer.chat_template = CHAT_TEMPLATES["plain"]
    settings = {"eval_rephrases": 2, "eval_formats": FORMATS[request.param], "format_edits": 2}
    data = edit_data(KINDS[request.param], **settings, tokenizer=tokenizer)
    data.attach(HostModel(model))
    return model, data.encoder, list(data.format_tasks().values())


def right(model, weights, encoder, key: str, pair) -> bool:
    """Whether every label of one row alone is the model's most probable token."""
    row = encoder.asking(key).rows([pair], [0], 1)
    with torch.no_grad():
        best = functional_call(model, weights, args=(), kwargs=dict(row.inputs)).logits[0].argmax(-1)
    where = row.labels[0] != -100
    return bool((best[where] == row.labels[0][where]).all())


def first_tokens(model, weights, encoder, key: str, prompt: str) -> list[int]:
    """The first tokens of an answer, one at a time, up to its end."""
    asking, said = encoder.asking(key), []
    ids, start = asking.prompt_ids(prompt), [encoder.decoder_start_token_id]
    while len(said) < OWN_TOKENS:
        inputs = {"input_ids": torch.tensor([ids])}
        inputs |= {"decoder_input_ids": torch.tensor([start])} if encoder.kind == "encoder_decoder" else {}
        with torch.no_grad():
            token = int(functional_call(model, weights, args=(), kwargs=inputs).logits[0, -1].argmax())
        if token in stop_ids(asking.tokenizer, asking.format.stop):
            break
        said.append(token)
        (ids if encoder.kind == "causal" else start).append(token)
    return said


def readable(asking, prompt: str, ids: list[int]) -> bool:
    """Whether an answer has its own tokens when it is read back from text."""
    text = asking.format.read(asking.tokenizer.decode(ids, skip_special_tokens=True))
    whole = asking.tokenizer(asking.format.question(prompt) + asking.format.answer(text))["input_ids"]
    before = len(asking.prompt_ids(prompt))
    alone = asking.tokenizer(text, add_special_tokens=False)["input_ids"]
    return bool(text) and (whole[before:] if asking.kind == "causal" else alone[: len(ids)]) == ids


def test_cells_are_those_of_one_question_after_another(measured):
    model, encoder, edits = measured
    editor = spread_parameters(MendEditor.for_model(model, rank=4, edit_rate=2e-3), 0.02).eval()
    base = state_copy(model)
    found = measure_formats(model, editor, encoder, edits)
    assert_same_state(state_copy(model), base)
    names = list(edits[0])
    seen = set()
    for edit, held in zip(edits, found, strict=True):
        for made in names:
            z_edit = encoder.rows([(edit[made].prompt, edit[made].target)], [0], 1, [made])
            deltas = editor.make_deltas(model, z_edit).deltas
            weights = dense_weights(model, editor.modules_in(model), deltas)
            for asked in names:
                task = edit[asked]
                pairs = [(text, task.target) for text in (task.prompt, *task.rephrases)]
                success = [right(model, weights, encoder, asked, pair) for pair in pairs]
                known = [pair for pair in task.locality if right(model, {}, encoder, asked, pair)]
                kept = [right(model, weights, encoder, asked, pair) for pair in known]
                said = plain_greedy(model, weights, encoder.asking(asked), task.prompt)
                own = [(text, first_tokens(model, {}, encoder, asked, text)) for text, _ in task.locality]
                own = [pair for pair in own if readable(encoder.asking(asked), *pair)]
                stays = [first_tokens(model, weights, encoder, asked, text) == answer for text, answer in own]
                cell = held[made][asked]
                assert (cell["success"], cell["kept"]) == (success, kept)
                assert cell["named"] == [holds_words(said, task.target)]
                assert cell["unchanged"] == stays
                seen |= set(kept) | set(stays)
    assert seen == {True, False}, "the edits do something, and not everything"


@pytest.mark.parametrize("measured", ["llama"], indirect=True)
def test_the_diagonal_is_what_evaluation_says_of_a_format_alone(measured):
    """Also of an editor that reads the rows' text."""
    model, encoder, edits = measured
    editor = InContext.for_model(model)
    editor.encoder = encoder
    found = measure_formats(model, editor, encoder, edits)
    for name in edits[0]:
        scores = evaluate_batch(model, editor, collate_tasks([edit[name] for edit in edits], encoder))
        for i, held in enumerate(found):
            of_edit = [scores.edit.correct_after[i], *scores.rephrase.correct_after[scores.rephrase.task == i]]
            assert held[name][name]["success"] == [bool(value) for value in of_edit]
            mine = scores.locality.task == i
            kept = scores.locality.correct_after[mine][scores.locality.correct_before[mine]]
            assert held[name][name]["kept"] == kept.tolist()
            assert held[name][name]["unchanged"] == [], "no weight changes"


@pytest.mark.parametrize("measured", ["llama"], indirect=True)
def test_edits_are_kept_off_their_questions_in_each_format(measured, monkeypatch):
    """With the very rows that a batch of the format has."""
    model, encoder, edits = measured
    question = edits[0]["own"].locality[0][0]
    edits = [{name: replace(task, keep=(question,)) for name, task in edit.items()} for edit in edits]
    editor, seen = MendEditor.for_model(model, rank=4, edit_rate=2e-3).eval(), []
    edited = editor.edited

    def watched(model, z_edit, trunk, x_keep):
        seen.append(x_keep)
        return edited(model, z_edit, trunk, x_keep)

    monkeypatch.setattr(editor, "edited", watched)
    measure_formats(model, editor, encoder, edits)
    for name, rows in zip(edits[0], seen, strict=True):
        expected = collate_tasks([edit[name] for edit in edits], encoder).x_keep
        assert rows.texts == expected.texts and torch.equal(rows.task, expected.task)
        assert torch.equal(rows.inputs["input_ids"], expected.inputs["input_ids"])


def test_shares_are_over_all_rows_of_all_edits():
    def cell(success, kept):
        return {"success": success, "kept": kept, "named": success[:1], "unchanged": []}

    first = {
        "own": {"own": cell([True, True], [True]), "chat": cell([False, False], [])},
        "chat": {"own": cell([True, False], [False]), "chat": cell([True, True], [])},
    }
    second = {
        "own": {"own": cell([False, True], [True, False, True]), "chat": cell([True, False], [])},
        "chat": {"own": cell([True, False], [True, True, True]), "chat": cell([True, True], [])},
    }
    table = shares_of([first, second])
    assert table["formats"] == ["own", "chat"] and table["edits"] == 2
    assert table["success"] == [[0.75, 0.25], [0.5, 1.0]]
    assert table["kept"] == [[0.75, None], [0.75, None]] and table["known"] == [4, 0]
    assert means(table["success"]) == (0.875, 0.375) and means(table["kept"]) == (0.75, 0.75)
    assert table["named"] == [[0.5, 0.5], [1.0, 1.0]] and table["unchanged"] == [[None, None]] * 2
    assert means([[None]]) == (None, None)


def test_the_table_on_the_console():
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(formats_table(TABLE))
    text = console.export_text()
    assert "8 edits made in each format, asked in each" in " ".join(text.split())
    lines = [line.split("│") for line in text.splitlines() if "│" in line]
    cells = [[cell.strip() for cell in line[1:-1]] for line in lines]
    assert cells == [["own", "1.000", "0.250"], ["", "0.900", "–"], ["chat", "0.500", "0.750"], ["", "0.800", "–"]]
    assert list(means_lines(TABLE)) == [
        "Asked in the format that they were made in, edits have a success of 0.875 and 0.900 of the known facts are retained; "
        "1.000 of the answers name the target, and 0.500 of the base's own answers to unrelated questions stay.",
        "Asked in the other formats, edits have a success of 0.375 and 0.800 of the known facts are retained; 0.625 of the "
        "answers name the target, and 0.750 of the base's own answers to unrelated questions stay.",
    ]


def test_the_picture(tmp_path):
    path = plot_formats(TABLE, tmp_path / "formats.png")
    picture = imread(path)
    assert min(picture.shape[:2]) > 400 and picture.std() > 0.05
