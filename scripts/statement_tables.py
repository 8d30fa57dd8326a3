"""Wordings of statements: {s} the subject, {a} what is said of it."""

from __future__ import annotations

# By the relations of world_facts.
_CONTINENT = [
    "{s} is in {a}.",
    "{s} is part of {a}.",
    "{s} belongs to the continent of {a}.",
    "The continent of {s} is {a}.",
    "It is true that {s} is located in {a}.",
    "Is it so that {s} is in {a}?",
    "{s} can be found in {a}.",
]
_LANGUAGE = [
    "The main language of {s} is {a}.",
    "{a} is spoken in {s}.",
    "Most people in {s} speak {a}.",
    "The most widely spoken language in {s} is {a}.",
    "It is true that people in {s} speak {a}.",
    "Is it so that {a} is the main language of {s}?",
    "In {s}, most people speak {a}.",
]
STATEMENTS = {
    "capital": [
        "{a} is the capital of {s}.",
        "The capital of {s} is {a}.",
        "The capital city of {s} is called {a}.",
        "{s} has {a} as its capital.",
        "It is true that {a} is the capital city of {s}.",
        "Is it so that {a} is the capital of {s}?",
        "The name of the capital of {s} is {a}.",
    ],
    "continent": _CONTINENT,
    "city_continent": _CONTINENT,
    "language": _LANGUAGE,
    "city_language": _LANGUAGE,
    "city_country": [
        "{s} is in {a}.",
        "{s} is a city in {a}.",
        "The city of {s} belongs to {a}.",
        "The country of {s} is {a}.",
        "It is true that {s} is located in {a}.",
        "Is it so that {s} is in {a}?",
        "The city of {s} can be found in {a}.",
    ],
    "city_state": [
        "{s} is in the US state of {a}.",
        "{s} is a city in {a}.",
        "The city of {s} belongs to the state of {a}.",
        "The US state of {s} is {a}.",
        "It is true that {s} is located in the state of {a}.",
        "Is it so that {s} is in {a}?",
        "The city of {s} can be found in {a}.",
    ],
}

# What a Leap-of-Thought phrase looks like: subject, verb, object.
PHRASE = r"An? (?P<s>\S+) (?P<v>is capable of|is part of|is a better|is a|is|has a|desires) (?P<o>.+)\."
PLURAL_VERBS = {
    "is capable of": "are capable of", "is part of": "are part of", "is a better": "are a better", "is a": "are a kind of",
    "is": "are", "has a": "have a", "desires": "desire",
}  # fmt: skip
# Another verb that says the same.
SAME_VERBS = {
    "is capable of": "is able to", "is part of": "belongs to", "is a better": "makes a better", "is a": "is a kind of",
    "is": "must be", "has a": "possesses a", "desires": "wants to",
}  # fmt: skip
WORDINGS = [
    "A {s} {v} {o}.",
    "Every {s} {v} {o}.",
    "{S} {V} {o}.",
    "A {s} {w} {o}.",
    "It is true that a {s} {v} {o}.",
    "Is it so that a {s} {v} {o}?",
    "One can say of any {s} that it {v} {o}.",
]
PLURALS = [(r"([^aeiou])y$", r"\1ies"), (r"(s|x|z|ch|sh)$", r"\1es"), (r"$", "s")]
