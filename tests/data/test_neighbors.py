"""Whose name stands in a question, and which others are put in its place."""

from __future__ import annotations

import pytest

from mend_lightning.data.neighbors import (
    USUAL_KINDS,
    few_of_each,
    find_subject,
    joined_names,
    kind_of,
    listed_names,
    names_of,
    neighbors,
)
from mend_lightning.data.record import Record

NAMES = {
    "country": ("France", "Spain", "Peru", "the UK", "UK", "New Zealand", "Zealand"),
    "animal": ("spider", "ant", "cow"),
    "year": ("1945", "1989"),
    "word": ("legs", "past", "rhymes", "that", "What"),
}


@pytest.mark.parametrize(
    ("question", "subject"),
    [
        ("What is the capital of France?", "France"),
        ("What is France's capital?", "France"),
        ("How large is New Zealand?", "New Zealand"),
        ("Who rules the UK?", "the UK"),
        ("Who is Peru's PM?", "Peru"),
        ("Who is New Zealand’s PM today?", "New Zealand"),
        ("Who leads Peru's Apristas?", "Peru"),
        ("Who leads Zarblex's CDU?", "Zarblex's CDU"),
        ("Who is the UK's prime minister?", "the UK"),
        ("How many legs does a spider have?", "spider"),
        ("What ended in 1945?", "1945"),
        ("Who runs Zarblex?", "Zarblex"),
        ("Who wrote The Old Man's Harbour in spring?", "The Old Man's Harbour"),
        ("Who is Ana María Matute's sister?", "Ana María Matute"),
        ("Which spider is in Qorvath?", "Qorvath"),
        ("When did New Zealand Railways close?", "New Zealand Railways"),
        ("When did World War II end?", "World War II"),
        ("Has a cow or a spider more legs?", "spider"),
        ('Which word rhymes with "legs"?', "legs"),
        ("What is the past tense of “go”?", "go"),
        ("What is that?", None),
        ("Is it?", None),
        ("", None),
        ("???", None),
    ],
)
def test_subjects_are_found(question, subject):
    found = find_subject(question, NAMES)
    assert found == subject
    assert found is None or found in question


def test_a_name_inside_of_a_word_is_none():
    assert find_subject("what makes an elephant tall?", {"animal": ("ant", "tall order")}) is None


def test_neighbors_are_the_question_about_others_of_its_kind():
    found = neighbors("How many legs does a spider have?", "spider", NAMES, 8)
    assert sorted(found) == ["How many legs does a ant have?", "How many legs does a cow have?"]
    assert len(neighbors("What ended in 1945?", "1945", NAMES, 8)) == 1


def test_the_same_key_draws_the_same():
    names = {"country": tuple(f"Land {letter}" for letter in "ABCDEFGHIJKLMNOP")}
    draws = {neighbors("Who rules Land A?", "Land A", names, 4, key=str(key)) for key in range(5)}
    assert len(draws) > 1 and all(len(set(draw)) == 4 for draw in draws)
    assert neighbors("Who rules Land A?", "Land A", names, 4) == neighbors("Who rules Land A?", "Land A", names, 4)


def test_no_neighbor_is_the_subject_or_avoided():
    found = neighbors("Who rules the UK?", "the UK", NAMES, 8, avoided=["What is Spain's capital?"])
    assert sorted(found) == ["Who rules France?", "Who rules New Zealand?", "Who rules Peru?", "Who rules Zealand?"]


def test_a_subject_of_no_known_kind_has_others_of_the_usual_ones():
    names = {**NAMES, "person": ("Ada Lovelace",)}
    found = neighbors("Who runs Zarblex?", "Zarblex", names, 20)
    assert "Who runs Ada Lovelace?" in found and "Who runs Peru?" in found and "Who runs spider?" not in found


def test_there_may_be_none():
    assert neighbors("What is that?", "", NAMES, 8) == ()
    assert neighbors("What is that?", "Peru", NAMES, 8) == ()
    assert neighbors("Who runs Zarblex?", "Zarblex", {}, 8) == ()
    assert neighbors("Who rules Peru?", "Peru", NAMES, 0) == ()


def test_a_given_kind_is_one_more():
    names = {"planet": ("Mercury", "Venus"), "god": ("Mercury", "Apollo")}
    found = neighbors("What is Mercury?", "Mercury", names, 8, kind="god")
    assert sorted(found) == ["What is Apollo?", "What is Venus?"]
    assert neighbors("What is Mercury?", "Mercury", names, 8, kind="metal") == ("What is Venus?",)
    assert kind_of("Mercury", names) == "planet" and kind_of("Pluto", names) is None


def test_names_of_records():
    def record(subject: str, relation: str, kind: str = "") -> Record:
        return Record("?", ("a",), ("b",), (), subject=subject, relation=relation, kind=kind)

    records = [record("Peru", "capital"), record("Peru", "capital"), record("ant", "legs", "animal"), record("", "x")]
    assert names_of(records) == {"capital": ("Peru",), "animal": ("ant",)}
    joined = joined_names({"animal": ("ant", "bee")}, {"animal": ("bee", "cow"), "year": ("1945",)})
    assert joined == {"animal": ("ant", "bee", "cow"), "year": ("1945",)}


def test_few_of_each_are_the_same_few():
    names = {"number": tuple(map(str, range(1000))), "year": ("1945",)}
    few = few_of_each(names, 10)
    assert few == few_of_each(names, 10) and len(few["number"]) == 10 and few["year"] == ("1945",)


def test_the_shipped_list_has_the_usual_kinds():
    names = listed_names()
    assert set(USUAL_KINDS) <= set(names)
    for kind, name in [("country", "Germany"), ("person", "Charles Darwin"), ("animal", "dog"), ("year", "1945")]:
        assert name in names[kind]
    assert find_subject("Who is the prime minister of the UK?", names) in ("the UK", "UK")
    assert all(name == name.strip() and name for of_kind in names.values() for name in of_kind)
