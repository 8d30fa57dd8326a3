"""Neighboring questions: those of a fact, asked about other subjects of the same kind.

"Who is the prime minister of the UK?" has "Who is the prime minister of Germany?" for a neighbor. What an edit must leave alone
is first of all its neighbors, for they look most like it. They are made by putting other names in the subject's place; which
names are of its kind is known from the training facts, and from a list that the package ships.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

from mend_lightning.data.record import Record
from mend_lightning.data.sources import shipped_folder

# Kind -> names of that kind.
Names = Mapping[str, Sequence[str]]
# A name has at most so many words.
LONGEST_NAME = 8
_WORD = re.compile(r"[^\W_]+(?:[-.'’&][^\W_]+)*\.?")
# Where the subject's kind is not known: those that most questions are about.
USUAL_KINDS = ("person", "city", "country", "organisation", "written work")
# Names of these kinds are words of everyday language, or parts of other names.
WORD_KINDS = (
    "word", "noun", "verb", "adjective", "plural", "past tense", "comparative", "category", "topic", "thing", "letter",
    "abbreviation", "Roman numeral", "number word", "surname", "first name", "set", "state abbreviation", "currency code",
)  # fmt: skip


def names_of(records: Iterable[Record]) -> dict[str, tuple[str, ...]]:
    """The subjects of records, by kind; of those that do not name one, by relation.

    Example:
        >>> names_of([Record("Capital of France?", ("Paris",), ("X",), (), subject="France", relation="capital")])
        {'capital': ('France',)}
    """
    found: dict[str, dict[str, None]] = {}
    for record in records:
        if record.subject:
            found.setdefault(record.kind or record.relation, {})[record.subject] = None
    return {kind: tuple(names) for kind, names in found.items()}


def joined_names(first: Names, second: Names) -> dict[str, tuple[str, ...]]:
    """The names of both, those of `first` in front."""
    kinds = dict.fromkeys([*first, *second])
    return {kind: tuple(dict.fromkeys([*first.get(kind, ()), *second.get(kind, ())])) for kind in kinds}


def few_of_each(names: Names, most: int = 100) -> dict[str, tuple[str, ...]]:
    """At most so many names of each kind, the same ones every time: what an editor's file holds."""
    draw = random.Random("names")
    return {kind: tuple(draw.sample(each, min(most, len(each)))) for kind, each in names.items()}


@cache
def listed_names() -> dict[str, tuple[str, ...]]:
    """The package's list: people, places, organisations, works, things and years (open_facts/README.md has its sources)."""
    text = (shipped_folder() / "open_facts" / "names.json").read_text(encoding="utf-8")
    return {kind: tuple(names) for kind, names in json.loads(text).items()}


def find_subject(question: str, names: Names) -> str | None:
    """What a question is about; None: nothing is found.

    In this order: what stands in double quotes; the longest known name with a capital or a digit, with other words with
    capitals that it is a part of; the last words with capitals; the longest known name without, the last of several. Words
    that are asked about as words ("go", "river") are subjects in quotes only, for most questions hold some.

    Example:
        >>> names = {"country": ("France", "New Zealand"), "animal": ("spider", "cow"), "word": ("river", "legs")}
        >>> find_subject("What is the capital of New Zealand?", names), find_subject("Has a spider ten legs?", names)
        ('New Zealand', 'spider')
        >>> find_subject("Which river is in Ruritania?", names), find_subject('What rhymes with "river"?', names)
        ('Ruritania', 'river')
        >>> find_subject("Why is that so?", names) is None
        True
    """
    quoted = re.search(r'["“]([^"“”]+)["”]', question)
    if quoted:
        return quoted[1]
    words = [match.span() for match in _WORD.finditer(question)]
    known = {name for kind, of_kind in names.items() if kind not in WORD_KINDS for name in of_kind}
    proper = {name for name in known if _has_capital(name)}
    name, run = _longest_known(question, words, proper), _last_capitals(question, words)
    # "Barack Obama" is about him, and not about the Obama of a list; but "India's PM" is about India.
    longer = name is not None and run is not None and name in run and not re.match(rf"{re.escape(name)}['’]s ", run)
    return (run if longer else name) or run or _longest_known(question, words, known)


def _longest_known(question: str, words: Sequence[tuple[int, int]], known: set[str]) -> str | None:
    """The longest of the names that stands in the question, the last of several."""
    for length in range(min(LONGEST_NAME, len(words)), 0, -1):
        for (start, _), (_, end) in reversed(list(zip(words, words[length - 1 :]))):
            text = question[start:end]
            for form in (text, _without_ending(text)):
                if form in known:
                    return form
    return None


def _without_ending(text: str) -> str:
    """Without a possessive's ending, or the full stop behind it."""
    return re.sub(r"['’]s$", "", text).rstrip(".")


def _has_capital(text: str) -> bool:
    return any(letter.isupper() or letter.isdigit() for letter in text)


def _last_capitals(question: str, words: Sequence[tuple[int, int]]) -> str | None:
    """The last run of words with capitals or digits, the question's first word apart."""
    end = next((i for i in range(len(words) - 1, 0, -1) if _is_name(question, words[i])), 0)
    start = end
    while start > 1 and _is_name(question, words[start - 1]):
        start -= 1
    return _without_ending(question[words[start][0] : words[end][1]]) if end else None


def _is_name(question: str, word: tuple[int, int]) -> bool:
    return question[word[0]].isupper() or question[word[0]].isdigit()


def kind_of(subject: str, names: Names) -> str | None:
    """The first kind that the subject is of; of an unknown one that ends like a person's name, "person".

    Example:
        >>> names = {"person": ("Ada Lovelace",), "surname": ("Planck",), "country": ("Peru",)}
        >>> kind_of("Peru", names), kind_of("Erwin Planck", names), kind_of("Ruritania", names)
        ('country', 'person', None)
    """
    known = next((kind for kind, of_kind in names.items() if subject in of_kind and kind not in WORD_KINDS), None)
    person = "person" if subject.split(" ")[-1] in names.get("surname", ()) and "person" in names else None
    return known or person or next((kind for kind, of_kind in names.items() if subject in of_kind), None)


def neighbors(
    question: str,
    subject: str,
    names: Names,
    count: int,
    avoided: Iterable[str] = (),
    kind: str | None = None,
    key: str = "",
) -> tuple[str, ...]:
    """The question about other subjects.

    Args:
        question: holds `subject`; else it has no neighbors.
        subject: what it is about.
        names: kind -> names.
        count: how many.
        avoided: texts that no neighbor's subject may be in: other questions that are to be left out.
        kind: the subject's, beside the one that `names` tells; where there is neither, names are of the usual kinds.
        key: of the draw; the same gives the same neighbors.

    Example:
        >>> names = {"country": ("France", "Spain", "Peru")}
        >>> sorted(neighbors("Capital of France?", "France", names, 8, avoided=["Who rules Peru?"]))
        ['Capital of Spain?']
    """
    if not subject or subject not in question:
        return ()
    # A relation's subjects stand in for a kind where a file names none, and may be few.
    kinds = [each for each in dict.fromkeys([kind or "", kind_of(subject, names) or ""]) if each in names]
    pool = list(dict.fromkeys(name for each in kinds or USUAL_KINDS for name in names.get(each, ())))
    draw, texts = random.Random(f"{key}/{question}"), list(avoided)
    found: list[str] = []
    for name in draw.sample(pool, len(pool)):
        if len(found) == count:
            break
        # Neither the subject under a longer or shorter name, nor one that is asked about elsewhere.
        if name not in subject and subject not in name and not any(name in text for text in texts):
            found.append(question.replace(subject, name))
    return tuple(found)
