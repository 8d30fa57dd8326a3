"""`mend-lightning check-data`: every number it prints, counted by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.bases import small_tokenizer
from helpers.commandline import assert_says, call

from mend_lightning.data.check import check_source, counts, token_lengths
from mend_lightning.models.inputs.prompts import PromptFormat

FORMATS = Path(__file__).parents[2] / "assets" / "formats"
GOOD = {"prompt": "Q?", "target": "A", "rephrases": ["R?", "S?"], "answers": ["B"], "subject": "s", "relation": "r"}


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Twelve lines that are no record among good and unusable ones."""
    lines = [
        json.dumps(GOOD), "", json.dumps({**GOOD, "target": ""}), json.dumps({**GOOD, "prompt": "P?", "rephrases": []}),
        json.dumps({**GOOD, "prompt": "T?", "answers": [], "relation": "q"}),
        *[f'{{"prompt": {i}' for i in range(11)], json.dumps({"prompt": "no target"}),
    ]  # fmt: skip
    path = tmp_path / "facts.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def test_every_count(mixed):
    check = check_source(mixed)
    assert check.format == "native"
    assert [record.line for record in check.records] == [1, 3, 4, 5]
    assert [record.line for record in check.usable] == [1, 5]
    assert check.left_out == {"without alternatives": [3], "without rephrases": [4]}
    assert [line for line, _ in check.faults] == list(range(6, 18))
    assert check.duplicates == [3]
    assert check.known == 3
    assert dict(counts(check)) == {
        "rephrases": "4 (2.0 a record)", "new answers": "2", "without true answers": "1",
        "locality examples of their own": "0 (0 hard)", "portability questions": "0", "subjects": "1",
        "relations": "2 (r 1, q 1)",
    }  # fmt: skip


def test_what_published_records_bring_along():
    rows = dict(counts(check_source(FORMATS / "knowedit.json")))
    assert rows["portability questions"] == "Reasoning 2, Subject_Aliasing 1"
    assert rows["locality examples of their own"] == "3 (3 hard)"
    assert dict(counts(check_source(FORMATS / "wikitext.jsonl")))["paragraphs"] == "3"


def test_token_lengths_are_the_tokenizers():
    tokenizer = small_tokenizer()
    records = check_source(FORMATS / "native.jsonl").records
    format = PromptFormat("Q: {input}\nA:", stop="\n")

    def size(text: str) -> int:
        return len(tokenizer(text)["input_ids"])

    def measure(texts, special):
        return [size(text) for text in texts]

    lengths = token_lengths(records, measure, format, 21)
    asked = [size(f"Q: {max((r.prompt, *r.rephrases), key=len)}\nA:") for r in records]
    said = [size(f" {max(r.alternatives, key=len)}\n") for r in records]
    both = [a + b for a, b in zip(asked, said)]
    assert min(both) <= 21 < max(both), "the limit tells some from others"
    found = lengths["question and target"]
    assert (found.shortest, found.middle, found.longest) == (min(both), sorted(both)[1], max(both))
    assert found.too_long == tuple(record.line for record, size in zip(records, both) if size > 21)
    assert lengths["question (the longest phrasing)"].longest == max(asked)
    assert lengths["target (the longest)"].shortest == min(said)


def test_the_report(mixed, tmp_path):
    small_tokenizer().save_pretrained(tmp_path / "base")
    said = call("check-data", mixed, "--base", tmp_path / "base", "--max_length", 2)
    assert said.code == 0, said.err
    for text in (
        "format │ native", "records │ 16", "can be edited │ 2", "left out, without alternatives │ 1 (line 3)",
        "left out, without rephrases │ 1 (line 4)", "faulty │ 12 (lines 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, …)",
        "question stands in an earlier record │ 1 (line 3)", "Faulty records: 10 of 12", "line 15: not valid JSON",
        "over 2", "2 (lines 1, 5)", "Training stops at the first faulty record (line 6)", "2 of 16 records can be",
    ):  # fmt: skip
        assert text in said.out, text
    assert "line 16: not valid JSON" not in said.out


def test_columns_and_format(tmp_path):
    path = tmp_path / "facts.csv"
    path.write_text("question,new,other\nQ?,A,R?\nP?,B,\n")
    said = call("check-data", path, "--columns", '{"prompt": "question", "target": "new", "rephrases": ["other"]}')
    assert said.code == 0, said.err
    assert "can be edited │ 1" in said.out and "left out, without rephrases │ 1 (line 2)" in said.out
    kept = call("check-data", path, "--columns.prompt=question", "--columns.target=new", "--require_rephrases", "false")
    assert "can be edited │ 2" in kept.out


def test_locality_data():
    said = call("check-data", FORMATS / "nq.jsonl")
    assert said.code == 0 and "It holds no edit; use it as data.locality_data." in said.out


def test_nothing_usable(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_text('{"prompt": "Q?", "target": ""}')
    said = call("check-data", path)
    assert said.code == 1 and "can be edited │ 0" in said.out
    assert_says(said.err, "nothing in it can be used")


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"foo": 1}\n{"bar": 2}', r"No record could be read; the first one: .*line 1: the keys foo are of no known"),
        ("[1, 2", r"not valid JSON"),
        ("", r"nothing in it can be used"),
    ],
)
def test_no_record_at_all(text, error, tmp_path):
    path = tmp_path / "facts.json"
    path.write_text(text)
    said = call("check-data", path)
    assert said.code == 1
    assert_says(said.err, error)


def test_what_is_given_wrong(tmp_path):
    assert_says(call("check-data", tmp_path / "gone.jsonl").err, "does not exist")
    assert_says(call("check-data", FORMATS / "kilt.jsonl", "--format", "kitl").err, "Did you mean 'kilt'")
    said = call("check-data", FORMATS / "kilt.jsonl", "--base", tmp_path / "none")
    assert_says(said.err, "tokenizer of .* cannot be loaded")
