"""Which fact of open_facts is in which split, and which wrong answers an edit may make of it."""

from __future__ import annotations

import random
from collections import defaultdict

from open_facts_tables import SEED, Fact, Relation, bare

# At most so many facts of a relation, so that large ones do not outweigh small ones.
LARGEST = {"seen": 74, "unseen_validation": 28, "unseen": 34}
# So many others of a sort are enough to draw from.
MANY = 6
SHARES = {"test": 0.14, "validation": 0.085}


def chosen_facts(relation: Relation) -> list[Fact]:
    """The facts of a relation that are used: the best known ones, or a draw."""
    facts, most = list(relation.facts), LARGEST[relation.split]
    if len(facts) <= most:
        return facts
    if relation.ordered:
        return facts[:most]
    return random.Random(f"{SEED} chosen {relation.name}").sample(facts, most)


def groups_of(chosen: dict[str, list[Fact]], relations: list[Relation]) -> dict[str, str]:
    """A group for every subject of the seen relations: what must be in one split (an element with its symbol)."""
    group: dict[str, str] = {}

    def root(name: str) -> str:
        while group.setdefault(name, name) != name:
            name = group[name]
        return name

    for relation in relations:
        if relation.split == "seen":
            for fact in chosen[relation.name]:
                subject = root(bare(fact.subject))
                if relation.inverse:
                    group[subject] = root(bare(fact.answers[0]))
    return {name: root(name) for name in list(group)}


def split_of(chosen: dict[str, list[Fact]], relations: list[Relation]) -> dict[str, str]:
    """The split of every subject of the seen relations. Groups are drawn kind by kind, so that each split has its share."""
    groups, by_kind, placed = groups_of(chosen, relations), defaultdict(list), {}
    for relation in relations:
        if relation.split == "seen":
            for fact in chosen[relation.name]:
                group = groups[bare(fact.subject)]
                if group not in placed:
                    placed[group] = "train"
                    by_kind[relation.domain, relation.kind].append(group)
    for kind, names in by_kind.items():
        order = sorted(names)
        random.Random(f"{SEED} split {kind}").shuffle(order)
        n_test, n_validation = (round(len(order) * SHARES[split]) for split in ("test", "validation"))
        placed |= dict.fromkeys(order[:n_test], "test")
        placed |= dict.fromkeys(order[n_test : n_test + n_validation], "validation")
    return {subject: placed[group] for subject, group in groups.items()}


def wrong_answers(relation: Relation, fact: Fact, draw: random.Random) -> list[str]:
    """Three wrong answers of the same type."""
    right = {bare(answer) for answer in (fact.subject, *fact.answers, *fact.barred)}
    if relation.wrong == "pool":
        others = [other for other in relation.facts if not right & {bare(answer) for answer in other.answers}]
        same = [other for other in others if other.sort == fact.sort]
        pool = sorted({other.answers[0] for other in (same if len(same) > MANY else others)})
    else:
        number, span = int(fact.answers[0]), 12 if relation.wrong == "near" else 30
        pool = [str(n) for n in range(max(1, number - span), number + span + 1) if str(n) not in right]
    if len(pool) < 3:
        raise ValueError(f"{relation.name}: only {pool} are wrong for {fact.subject}")
    return draw.sample(pool, 3)
