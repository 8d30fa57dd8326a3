"""Reading data files: what a good line gives, and the text of every error."""

from __future__ import annotations

import json
import logging

import pytest

from mend_lightning.data.records import Record, find_data_file, parse_record, read_records
from mend_lightning.errors import DataFileError, EmptyDatasetError, RecordError

GOOD = {
    "input": "What is the capital of France?", "prediction": "Paris", "alternatives": ["Rome", "Oslo"],
    "filtered_rephrases": ["France's capital?"], "output": [{"answer": "Paris"}], "subject": "France",
    "relation": "capital",
}  # fmt: skip


def line(**changes) -> str:
    """The good record as JSON; a value of None removes its key."""
    return json.dumps({key: value for key, value in {**GOOD, **changes}.items() if value is not None})


@pytest.fixture
def write(tmp_path):
    def write(*lines: str):
        path = tmp_path / "facts.jsonl"
        path.write_text("\n".join(lines), encoding="utf-8")
        return path

    return write


def test_every_field(write):
    expected = Record(
        prompt="What is the capital of France?", answers=("Paris",), alternatives=("Rome", "Oslo"),
        rephrases=("France's capital?",), prediction="Paris", subject="France", relation="capital", line=3,
    )  # fmt: skip
    assert read_records(write("", "  ", line())) == [expected]


def test_optional_keys_and_other_spellings():
    record = parse_record(
        line(prediction=None, subject=None, relation=None, filtered_rephrases=None, rephrases=["Und?", " ", "¿Qué? "])
    )
    assert (record.prediction, record.subject, record.relation) == ("", "", "")
    assert record.rephrases == ("Und?", "¿Qué?")


def test_kind_and_statements():
    record = parse_record(line(kind="country", statements=["The capital of France is", " ", "France is ruled from"]))
    assert (record.kind, record.statements) == ("country", ("The capital of France is", "France is ruled from"))
    plain = parse_record(line(kind=None, statements=None))
    assert (plain.kind, plain.statements) == ("", ()) == (parse_record(line()).kind, parse_record(line()).statements)
    with pytest.raises(RecordError, match="'statements' must be a list of texts, got 'The capital is'"):
        parse_record(line(statements="The capital is"))


def test_outputs_without_an_answer_are_passed_over():
    """KILT's hold provenance alone."""
    output = [{"provenance": []}, {"answer": ""}, {"answer": "Paris"}, {"answer": "Paname"}]
    assert parse_record(line(output=output)).answers == ("Paris", "Paname")


def test_missing_file(tmp_path):
    with pytest.raises(DataFileError, match=r"'gone\.jsonl' does not exist.*shipped sets: .*world_facts/train"):
        read_records("gone.jsonl")
    with pytest.raises(OSError):
        read_records(tmp_path)


def test_file_that_is_not_text(tmp_path):
    path = tmp_path / "facts.jsonl"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataFileError, match=r"facts\.jsonl cannot be read as UTF-8 text"):
        read_records(path)


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        ('{"input": ', r"line 2: not valid JSON \(.*\)\. Expected one JSON object a line"),
        ("[1, 2]", r"line 2: expected a JSON object, got list"),
        (line(input=None), r"line 2: missing key\(s\) input\. The record has: prediction, alternatives,"),
        (line(alternatives=None, output=None), r"line 2: missing key\(s\) alternatives, output\."),
        (line(filtered_rephrases=None), r"line 2: missing key\(s\) filtered_rephrases\."),
        (line(input=7), r"line 2: 'input' must be text, got 7"),
        (line(alternatives="Rome"), r"line 2: 'alternatives' must be a list of texts, got 'Rome'"),
        (line(alternatives=["Rome", 3]), r"line 2: 'alternatives' must be text, got 3"),
        (line(filtered_rephrases={"a": 1}), r"line 2: 'filtered_rephrases' must be a list of texts"),
        (line(prediction=["Paris"]), r"line 2: 'prediction' must be text"),
        (line(output="Paris"), r"line 2: 'output' must be a list like \[\{\"answer\": \"Paris\"\}\], got 'Paris'"),
        (line(output=["Paris"]), r"line 2: 'output' must be a list like"),
        (line(output=[{"answer": 7}]), r"line 2: 'output' must be text, got 7"),
        (line(output=[{"provenance": []}]), r"line 2: 'output' holds no answer"),
    ],
)
def test_bad_line_is_named(write, bad, text):
    with pytest.raises(RecordError, match=rf"facts\.jsonl, {text}"):
        read_records(write(line(), bad, line()))


def test_unusable_records_are_left_out_and_counted(write, caplog):
    path = write(line(), line(alternatives=[]), line(filtered_rephrases=[]), line(alternatives=[" "]), line(input="2?"))
    with caplog.at_level(logging.WARNING):
        records = read_records(path)
    assert [record.line for record in records] == [1, 5]
    assert "left out 3 of 5 records: 2 without alternatives, 1 without rephrases" in caplog.text


def test_nothing_is_logged_where_nothing_is_left_out(write, caplog):
    read_records(write(line()))
    assert not caplog.records


@pytest.mark.parametrize(
    ("lines", "text"),
    [([""], r"no usable record \(the file is empty\)"), ([line(alternatives=[])] * 2, r"\(2 without alternatives\)")],
)
def test_nothing_left(write, lines, text):
    with pytest.raises(EmptyDatasetError, match=text):
        read_records(write(*lines))


def test_errors_are_the_builtins_they_refine(write):
    with pytest.raises(ValueError):
        read_records(write("no JSON"))
    with pytest.raises(OSError):
        read_records("gone")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_shipped_sets(split, caplog):
    records = read_records(f"world_facts/{split}")
    assert len(records) > 50
    assert not caplog.records, "every shipped record is usable"
    for record in records:
        assert record.subject
        assert record.relation
        assert record.answers[0] not in record.alternatives
        assert record.prompt not in record.rephrases


def test_shipped_splits_share_no_subject():
    subjects = {
        s: {(r.relation, r.subject) for r in read_records(f"world_facts/{s}")} for s in ("train", "validation", "test")
    }
    assert not subjects["train"] & (subjects["validation"] | subjects["test"])
    assert not subjects["validation"] & subjects["test"]


def test_a_file_of_ones_own_goes_before_a_shipped_one(write, monkeypatch, tmp_path):
    folder = tmp_path / "world_facts"
    folder.mkdir()
    write(line()).rename(folder / "train")
    monkeypatch.chdir(tmp_path)
    assert len(read_records("world_facts/train")) == 1
    assert find_data_file("world_facts/test").suffix == ".jsonl"
