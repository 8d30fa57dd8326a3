"""Where records come from: `datasets` sources, column mappings, and unrelated facts from elsewhere."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import datasets
import pytest
from helpers.commandline import assert_says, call

from mend_lightning.data import sources
from mend_lightning.data.columns import rename
from mend_lightning.data.datamodule import EditDataModule
from mend_lightning.data.locality import SHARES, read_locality, share_of
from mend_lightning.data.records import read_records
from mend_lightning.data.sources import split_name
from mend_lightning.errors import ConfigError, DataFileError, EmptyDatasetError, RecordError

ROWS = [
    dict(zip(("question", "other", "new", "old", "about"), row))
    for row in (
        ("In which year did the war end?", "When was the war over?", "1955", "1945", "war"),
        ("What is the code of Namibia?", "Namibia's code?", "None", "NA", "Namibia"),
        ("Which city, if any, is largest?", "Largest city?", 'Rome"s', "Oslo", "cities"),
    )
]
COLUMNS = {"prompt": "question", "target": "new", "answers": "old", "rephrases": ["other"], "subject": "about"}


def simple(records) -> list[tuple]:
    return [(r.prompt, r.alternatives, r.answers, r.rephrases, r.subject, r.line) for r in records]


EXPECTED = [
    (row["question"], (row["new"],), (row["old"],), (row["other"],), row["about"], number)
    for number, row in enumerate(ROWS, start=1)
]


def write_csv(path: Path, delimiter: str = ",") -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)
    return path


def write_table(folder: Path, kind: str) -> str:
    """The rows as a source of that kind; its name."""
    table = datasets.Dataset.from_list(ROWS)
    if kind == "csv":
        return str(write_csv(folder / "facts.csv"))
    if kind == "tsv":
        return str(write_csv(folder / "facts.tsv", "\t"))
    if kind == "parquet":
        table.to_parquet(folder / "facts.parquet")
        return str(folder / "facts.parquet")
    if kind == "folder":
        table.to_parquet(folder / "train.parquet")
        table.select([1]).to_parquet(folder / "test.parquet")
        return str(folder)
    if kind == "saved":
        datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(folder / "saved")
        return str(folder / "saved")
    path = folder / f"facts.{kind}"
    path.write_text(json.dumps(ROWS) if kind == "json" else "\n".join(map(json.dumps, ROWS)), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "folder", "saved", "json", "jsonl"])
def test_every_kind_of_source_gives_the_same_records(kind, tmp_path):
    """Cells of a CSV are text, whatever pandas would make of 1955, NA and None."""
    assert simple(read_records(write_table(tmp_path, kind), columns=COLUMNS)) == EXPECTED


@pytest.mark.parametrize("kind", ["folder", "saved"])
def test_a_split_is_chosen_by_name(kind, tmp_path):
    name = write_table(tmp_path, kind)
    records = read_records(f"{name}:test", columns=COLUMNS)
    assert [record.prompt for record in records] == [ROWS[1]["question"]]


def test_a_slice_of_a_table(tmp_path):
    name = write_table(tmp_path, "csv")
    assert len(read_records(f"{name}:train[:2]", columns=COLUMNS)) == 2


def test_nothing_is_left_behind(tmp_path, monkeypatch):
    """Neither a cache beside the file nor one in the library's folder: a changed file is read anew."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = write_csv(tmp_path / "facts.csv")
    assert len(read_records(path, columns=COLUMNS)) == 3
    path.write_text("\n".join(path.read_text().splitlines()[:2]))
    assert len(read_records(path, columns=COLUMNS)) == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["facts.csv"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("facts.csv", ("facts.csv", "", "")),
        ("owner/set:test", ("owner/set", "", "test")),
        ("owner/set:config:train[:10%]", ("owner/set", "config", "train[:10%]")),
        ("owner/set:train[5:10]", ("owner/set", "", "train[5:10]")),
    ],
)
def test_names_with_splits(name, expected):
    assert split_name(name) == expected


def test_a_file_with_a_colon_in_its_name(tmp_path):
    path = tmp_path / "facts:train.jsonl"
    path.write_text('{"prompt": "Q?", "target": "A", "rephrases": ["R?"]}')
    assert len(read_records(path)) == 1


def test_what_cannot_be_loaded(tmp_path):
    with pytest.raises(DataFileError, match=r"'no\.csv' does not exist.*JSONL, JSON, CSV or Parquet"):
        read_records("no.csv")
    with pytest.raises(
        DataFileError, match=r"library cannot load 'owner/none' \(config default, split test; looked in"
    ):
        read_records("owner/none:test")
    with pytest.raises(DataFileError, match=r"'world_facts/tarin' does not exist.*world_facts/train"):
        read_records("world_facts/tarin")
    name = write_table(tmp_path, "folder")
    with pytest.raises(DataFileError, match=r"cannot load .*split validation"):
        read_records(f"{name}:validation", columns=COLUMNS)
    with pytest.raises(DataFileError, match="a JSON file has no splits"):
        read_records(f"{write_table(tmp_path, 'jsonl')}:train")
    (tmp_path / "broken.parquet").write_bytes(b"no table")
    with pytest.raises(DataFileError, match="cannot load"):
        read_records(tmp_path / "broken.parquet", columns=COLUMNS)


def test_a_shipped_set_in_several_files(tmp_path, monkeypatch):
    """It is one set: one name, its parts in order, lines that count on; an error names the part."""
    folder = tmp_path / "shipped" / "facts"
    folder.mkdir(parents=True)
    for part, names in (("train-1", "ab"), ("train-2", "cd"), ("test", "e")):
        lines = [json.dumps({"prompt": f"{name}?", "target": "A", "rephrases": ["B"]}) + "\n" for name in names]
        (folder / f"{part}.jsonl").write_text("".join(lines))
    monkeypatch.setattr(sources, "shipped_folder", lambda: folder.parent)
    assert sources.shipped_names() == ["facts/test", "facts/train"]
    assert [(r.prompt, r.line) for r in read_records("facts/train")] == [("a?", 1), ("b?", 2), ("c?", 3), ("d?", 4)]
    assert [(r.prompt, r.line) for r in read_records("facts/test")] == [("e?", 1)]
    assert sources.find_data_file("facts/train") == folder / "train-1.jsonl"
    with pytest.raises(DataFileError, match=r"'facts/train-1' does not exist.*sets: facts/test, facts/train\."):
        read_records("facts/train-1")
    (folder / "train-2.jsonl").write_text("\nnothing\n")
    with pytest.raises(RecordError, match=r"train-2\.jsonl, line 2: not valid JSON"):
        read_records("facts/train")


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_wrong_column_is_named_with_a_near_one(kind, tmp_path):
    name = write_table(tmp_path, kind)
    with pytest.raises(
        RecordError, match=r"1: there is no column 'qestion'\. Did you mean 'question'\? The columns: que"
    ):
        read_records(name, columns={**COLUMNS, "prompt": "qestion"})


NESTED = {
    "id": 7, "fact": {"ask": "Q?", "new": {"text": "A"}}, "output": [{"answer": "B"}, {"answer": "C"}], "more": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        ("fact.ask", "Q?"), ("fact.new.text", "A"), ("output.answer", ["B", "C"]), ("output.1.answer", "C"),
        (["fact.ask", "output.0.answer"], ["Q?", "B"]), ("more.inside", None),
    ],
)  # fmt: skip
def test_dotted_columns(column, expected):
    assert rename(NESTED, {"key": column}, "line 1")["key"] == expected


@pytest.mark.parametrize(
    ("column", "near"), [("fact.new.txt", "fact.new.text"), ("output.answr", "output.answer"), ("fakt.ask", "fact.ask")]
)
def test_wrong_dotted_columns(column, near):
    with pytest.raises(RecordError, match=rf"line 1: there is no column '{column}'. Did you mean '{near}'"):
        rename(NESTED, {"key": column}, "line 1")


def test_columns_of_another_format():
    """Keys that are not renamed keep their names."""
    record = {"question": "Q?", "output": [{"answer": "B"}]}
    assert rename(record, {"input": "question"}, "line 1") == {"input": "Q?", "output": [{"answer": "B"}]}


def test_later_records_may_lack_an_optional_column(tmp_path):
    path = tmp_path / "facts.jsonl"
    lines = [{"q": "Q?", "a": "A", "r": "R?", "s": "S"}, {"q": "P?", "a": "A", "r": "R?"}]
    path.write_text("\n".join(map(json.dumps, lines)))
    records = read_records(path, columns={"prompt": "q", "target": "a", "rephrases": "r", "subject": "s"})
    assert [record.subject for record in records] == ["S", ""]


@pytest.fixture
def questions(tmp_path) -> Path:
    path = tmp_path / "nq.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"what is {i}", "answer": [str(i), "x"]}) for i in range(200)))
    return path


def test_unrelated_facts_from_elsewhere(questions):
    files = {"train": "world_facts/train", "test": "world_facts/test", "locality_data": questions}
    data = EditDataModule(**files, locality=3, eval_hard_locality=0)
    for split in ("train", "test"):
        sampler = data.sampler(split)
        asked = {pair for index in range(40) for pair in sampler.task(0, index).locality}
        assert len(asked) > 15
        for prompt, answer in asked:
            assert prompt == f"what is {answer}"
            assert share_of(prompt) in SHARES[split]


def test_hard_ones_are_of_the_same_set_still(questions):
    data = EditDataModule("world_facts/train", locality=3, hard_locality=1, locality_data=questions)
    task = data.sampler("train").task(0, 0)
    assert task.hard == 1
    assert not task.locality[0][0].startswith("what is") and task.locality[1][0].startswith("what is")


def test_the_shares_of_one_source_do_not_overlap(questions):
    parts = {split: {record.prompt for record in read_locality(questions, split)} for split in SHARES}
    assert sum(map(len, parts.values())) == 200 == len(set.union(*parts.values()))
    assert 130 < len(parts["train"]) < 190
    # The checksum is of the text alone: no run and no machine gives another.
    assert [share_of(f"what is {i}") for i in range(6)] == [0, 4, 4, 0, 3, 9]


def test_a_source_for_each_split(questions):
    data = EditDataModule("world_facts/train", test="world_facts/test", locality_data={"test": str(questions)})
    assert not data.sampler("train").task(0, 0).locality[0][0].startswith("what is")
    asked = {data.sampler("test").task(0, i).locality[0][0] for i in range(200)}
    assert {share_of(prompt) for prompt in asked} == set(range(10)), "all of the file, not a share"
    with pytest.raises(ConfigError, match=r"locality_data names tset; its splits are train, validation, test"):
        EditDataModule(locality_data={"tset": str(questions)})


def test_a_source_too_small_to_share(tmp_path):
    path = tmp_path / "nq.jsonl"
    path.write_text('{"question": "what is 0", "answer": "0"}')
    assert len(read_locality(path, "train")) == 1
    with pytest.raises(EmptyDatasetError, match="no question with a true answer for test"):
        read_locality(path, "test")


def test_the_command_line_takes_all_of_it(tmp_path):
    """Up to the data itself: an unknown column is the data module's error, not the parser's."""
    config = tmp_path / "data.yaml"
    config.write_text(
        f"data:\n  train: {write_csv(tmp_path / 'facts.csv')}\n  format: native\n  columns: {{prompt: question, "
        f"rephrases: [other]}}\n  locality_data: {{train: x.jsonl}}\n  stop: null\n  require_rephrases: false\n"
    )
    said = call("fit", "--config", config, "--print_config")
    assert said.code in (0, None), said.err
    assert "columns: prompt: question rephrases: - other locality_data: train: x.jsonl require_rephrases" in said.out
    assert "stop: null" in said.out
    assert_says(call("fit", "--config", config, "--data.colums", "{}").err, "colums")
