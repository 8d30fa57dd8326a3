"""Names, exceptions and phrasings for build_world_facts.py: what GeoNames does not say, or says otherwise."""

from __future__ import annotations

# Italy is the country and Miami the city of the few-shot examples that prompts start with; the other places are disputed
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
    "SZ": ["Mbabane", "Lobamba"], "UA": ["Kyiv", "Kiev"],
    "US": ["Washington, D.C.", "Washington", "Washington D.C.", "Washington, DC"],
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
