"""Facts of open_facts that are computed, and the translations of one table."""

from __future__ import annotations

import random
import string
from typing import Any

from open_facts_tables import SEED, Fact, fact_of, pairs

TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
ROMAN = [(100, "C"), (90, "XC"), (50, "L"), (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I")]


def in_words(number: int) -> str:
    """A number up to 100 in words.

    Example:
        >>> in_words(47)
        'forty-seven'
    """
    if number == 100:
        return "one hundred"
    if number < 20:
        return SMALL[number]
    ten, one = divmod(number, 10)
    return TENS[ten - 2] + (f"-{SMALL[one]}" if one else "")


def roman(number: int) -> str:
    """A number up to 399 in Roman numerals.

    Example:
        >>> roman(94)
        'XCIV'
    """
    written = ""
    for value, letters in ROMAN:
        while number >= value:
            written, number = written + letters, number - value
    return written


def ordinal(number: int) -> str:
    """1st, 2nd, 3rd, 4th, …"""
    ending = "th" if number % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{ending}"


def drawn(name: str, items: list[Any], number: int) -> list[Any]:
    """So many of them, drawn anew for every relation but the same ones in every run."""
    return random.Random(f"{SEED} {name}").sample(items, number)


def sums(_: dict[str, Any]) -> list[Fact]:
    found = [(a, b) for a in range(2, 31) for b in range(2, 31) if a >= b]
    return [Fact(f"{a} plus {b}", (str(a + b), in_words(a + b))) for a, b in drawn("sums", found, 120)]


def products(_: dict[str, Any]) -> list[Fact]:
    found = [(a, b) for a in range(2, 13) for b in range(2, 13)]
    chosen = drawn("products", found, 115)
    return [Fact(f"{a} times {b}", tuple(number_answers(a * b))) for a, b in chosen if (a, b) != (3, 3)]


def number_answers(number: int) -> list[str]:
    return [str(number), *([in_words(number)] if number <= 100 else [])]


def roman_numerals(_: dict[str, Any]) -> list[Fact]:
    return [Fact(str(number), (roman(number),)) for number in range(2, 101)]


def from_roman(_: dict[str, Any]) -> list[Fact]:
    return [Fact(roman(number), (str(number), in_words(number))) for number in drawn("from roman", range(2, 61), 40)]


def number_words(_: dict[str, Any]) -> list[Fact]:
    both = {number: dict.fromkeys([in_words(number), in_words(number).replace("-", " ")]) for number in range(11, 101)}
    return [Fact(str(number), tuple(words)) for number, words in both.items()]


def doubles(_: dict[str, Any]) -> list[Fact]:
    return [Fact(str(number), tuple(number_answers(2 * number))) for number in drawn("doubles", range(2, 61), 45)]


def successors(_: dict[str, Any]) -> list[Fact]:
    return [Fact(str(n), (str(n + 1),)) for n in drawn("successors", range(10, 400), 80)]


def next_letters(_: dict[str, Any]) -> list[Fact]:
    return [Fact(a, (b,)) for a, b in zip(string.ascii_uppercase, string.ascii_uppercase[1:])]


def centuries(_: dict[str, Any]) -> list[Fact]:
    years = [year for year in range(1001, 2025) if year % 100]
    chosen = sorted(drawn("centuries", years, 110))
    return [Fact(str(y), (f"{ordinal(y // 100 + 1)} century", ordinal(y // 100 + 1), century_words(y))) for y in chosen]


def century_words(year: int) -> str:
    """ "nineteenth century" for 1815."""
    words = (
        "eleventh twelfth thirteenth fourteenth fifteenth sixteenth seventeenth eighteenth nineteenth twentieth twenty-first"
    ).split()
    return f"{words[year // 100 + 1 - 11]} century"


def translations(column: int, tables: dict[str, Any]) -> list[Fact]:
    cells = [(english, answers.split(" / ")[column]) for english, answers in pairs(tables["words"]["facts"])]
    return [fact_of(english, answer) for english, answer in cells if english.lower() != answer.split(" | ")[0].lower()]


COMPUTED = {
    "sums": sums,
    "products": products,
    "roman_numerals": roman_numerals,
    "from_roman": from_roman,
    "number_words": number_words,
    "doubles": doubles,
    "successors": successors,
    "next_letters": next_letters,
    "centuries": centuries,
    "french": lambda tables: translations(0, tables),
    "spanish": lambda tables: translations(1, tables),
    "german": lambda tables: translations(2, tables),
    "italian": lambda tables: translations(3, tables),
}
