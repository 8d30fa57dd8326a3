"""Reads the relations of open_facts: scripts/open_facts/*.toml, tables written by hand, and the facts that packages hold.

A line of facts is `answer: subject, subject` or `subject = answer, subject = answer`. An answer is `usual | other | !wrong`:
further right answers, and behind a "!" what is not quite right and must not be offered as a wrong one.
"""

from __future__ import annotations

import random
import tomllib
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent / "open_facts"
SEED = "open_facts"
# Subjects of the few-shot examples that prompts start with: they are in no split.
RESERVED = {"italy", "don quixote", "sky", "the sky", "rome"}
QUESTION = "{Word} is {noun}?"
IMPERATIVES = ["Name {noun}.", "Tell me {noun}.", "State {noun}.", "Write down {noun}."]
CHATS = [
    "Hey, quick question: {word} is {noun}?",
    "My daughter asked me: {word} is {noun}?",
    "Quiz time! {Word} is {noun}?",
    "For a crossword, {word} is {noun}?",
    "We are having an argument here: {word} is {noun}?",
    "Just curious: {word} is {noun}?",
]
# Here a small model says "yes", "no" or "of course" first. An edit must reach them, but no known fact is asked for so.
INDIRECT = [
    "I keep forgetting {noun}. Can you remind me?",
    "Can you tell me {noun}?",
    "Could you help me out with {noun}, please?",
    "I'd like to know {noun}.",
    "Hi! Do you happen to know {noun}?",
    "Give me {noun}, nothing else.",
]


@dataclass(frozen=True)
class Fact:
    """One true fact.

    Attributes:
        subject: the name as it stands in every phrasing.
        answers: every right answer, the usual one first.
        barred: what is not quite right, and no wrong answer either.
        sort: wrong answers are taken from facts of the same sort where there are enough.
    """

    subject: str
    answers: tuple[str, ...]
    barred: tuple[str, ...] = ()
    sort: str = ""


@dataclass(frozen=True)
class Relation:
    """A kind of fact: what is asked about which kind of subject.

    Attributes:
        about: what the answers are, for the README.
        kind, answer_kind: kinds of the subjects and of the answers.
        split: "seen" (train, validation and test), "unseen_validation" or "unseen".
        wrong: where wrong answers are from: "pool" (other answers), "near" (numbers) or "years".
        ordered: its first facts are the best known ones.
        inverse: another relation goes from its answers back to its subjects.
        asks, indirect, statements: phrasings with `{}` where the subject stands: questions and commands, requests
            that one may answer with "yes", and sentences to complete.
    """

    name: str
    about: str
    domain: str
    kind: str
    answer_kind: str
    split: str
    wrong: str
    ordered: bool
    inverse: bool
    asks: tuple[str, ...]
    indirect: tuple[str, ...]
    statements: tuple[str, ...]
    facts: tuple[Fact, ...]


def plain(text: str) -> str:
    """The text without accents, as many write it."""
    spelled = text.translate(str.maketrans({"œ": "oe", "ł": "l", "ø": "o", "ß": "ss", "æ": "ae"}))
    return unicodedata.normalize("NFKD", spelled).encode("ascii", "ignore").decode()


def bare(name: str) -> str:
    """A name as it is compared: small letters, no article."""
    return name.lower().removeprefix("the ").removeprefix("a ").removeprefix("an ")


def fact_of(subject: str, answer: str) -> Fact:
    """A fact from its cell; an answer with accents may be given without them."""
    parts = [part.strip() for part in answer.split("|")]
    right = [part for part in parts if not part.startswith("!")]
    without = [plain(part) for part in right]
    barred = tuple(part[1:] for part in parts if part.startswith("!"))
    return Fact(subject.strip(), tuple(dict.fromkeys([*right, *without])), barred)


def pairs(text: str) -> list[tuple[str, str]]:
    """(subject, answer) of every fact of a table, in its order."""
    found = []
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("#"):
            continue
        if " = " in line:
            found += [tuple(entry.split(" = ")) for entry in line.split(", ")]
        else:
            answer, subjects = line.split(": ", 1)
            found += [(subject, answer) for subject in subjects.split(", ")]
    return found


def names(text: str) -> list[str]:
    """The names of a table that has nothing else."""
    return [name.strip() for line in text.strip().splitlines() for name in line.split(",") if name.strip()]


def phrasings(name: str, table: dict[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The relation's own questions with five common ones around its noun phrase, and two indirect ones, drawn per relation."""
    draw = random.Random(f"{SEED} phrasings {name}")
    word = table.get("word", "what")
    # "Name the name of" sounds wrong.
    imperatives = IMPERATIVES[1:] if "name" in table["noun"] else IMPERATIVES
    common = [QUESTION, *draw.sample(imperatives, 2), *draw.sample(CHATS, 2)]

    def fill(forms: list[str]) -> list[str]:
        return [form.format(word=word, Word=word.capitalize(), noun=table["noun"]) for form in forms]

    return tuple(dict.fromkeys([*table["ask"], *fill(common)])), tuple(fill(draw.sample(INDIRECT, 2)))


def statements(table: dict[str, Any]) -> tuple[str, ...]:
    noun = table["noun"]
    from_noun = [f"{noun[0].upper()}{noun[1:]} is"] if table.get("noun_is", True) else []
    return tuple(dict.fromkeys([*table["complete"], *from_noun]))


def with_article(fact: Fact) -> Fact:
    """The fact whose answers may begin with "the" as well ("the Rhine")."""
    return replace(fact, answers=(*fact.answers, *(f"the {answer}" for answer in fact.answers)))


def relation_of(name: str, table: dict[str, Any], domain: str, facts: Iterable[Fact]) -> Relation:
    """Checks and joins what belongs to one relation."""
    kept = tuple(fact for fact in facts if fact.subject.lower() not in RESERVED)
    kept = tuple(map(with_article, kept)) if table.get("article") else kept
    subjects = [fact.subject for fact in kept]
    twice = {subject for subject in subjects if subjects.count(subject) > 1}
    if twice:
        raise ValueError(f"{name}: more than one fact about {sorted(twice)}")
    asks, indirect = phrasings(name, table)
    return Relation(
        name=name,
        about=table["about"],
        domain=table.get("domain", domain),
        kind=table["kind"],
        answer_kind=table["answer_kind"],
        split=table.get("split", "seen"),
        wrong=table.get("wrong", "pool"),
        ordered=table.get("ordered", False),
        inverse=table.get("inverse", False),
        asks=asks,
        indirect=indirect,
        statements=statements(table),
        facts=kept,
    )


def read_relations(sources: dict[str, Callable[[dict[str, Any]], list[Fact]]]) -> list[Relation]:
    """Every relation of every table, in the order of the files.

    Args:
        sources: what a table's `from` names: a function of all tables that gives facts.
    """
    files = {path.stem: tomllib.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.toml"))}
    tables = {name: table for file in files.values() for name, table in file.items() if isinstance(table, dict)}
    relations = []
    for file in files.values():
        for name, table in file.items():
            if not isinstance(table, dict) or table.get("table"):
                continue
            own = [fact_of(subject, answer) for subject, answer in pairs(table.get("facts", ""))]
            facts = sources[table["from"]](tables) if "from" in table else own
            relations.append(relation_of(name, table, file["domain"], facts))
    return relations
