"""Facts about countries, and questions whose key is a flag: the image shows which, the language model knows the rest.

In the table a dash marks a fact that is disputed or has no single answer (two seats of government, a capital that
moves). A question mark before the code marks a country on two continents: it is listed by its capital's continent, and
its continent is not asked. Countries whose flag looks like another at this size are left out (Chad, Luxembourg,
Monaco).

Data flow: ``hands`` finds the flag by the country code -> ``flag_rows``: ``SceneImage``, ``QuestionAnswer`` -> rows;
countries -> ``capital_rows`` -> rows without a picture.
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from lightning_mm.nano.data.catalog import Thing
from lightning_mm.nano.data.images import SceneComposer
from lightning_mm.nano.data.questions import QuestionAnswer, format_answer
from lightning_mm.nano.data.rows import Made, Row, make_row

_TABLE = {
    "Africa": """
        DZ Algeria/Algiers; AO Angola/Luanda; BJ Benin/Porto-Novo; BW Botswana/Gaborone;
        BF Burkina Faso/Ouagadougou; BI Burundi/Gitega; CM Cameroon/Yaounde; CV Cape Verde/Praia;
        CF Central African Republic/Bangui; KM Comoros/Moroni; CG Republic of the Congo/Brazzaville;
        CD Democratic Republic of the Congo/Kinshasa; CI Ivory Coast/Yamoussoukro; DJ Djibouti/Djibouti;
        EG Egypt/Cairo; GQ Equatorial Guinea/-; ER Eritrea/Asmara; SZ Eswatini/-; ET Ethiopia/Addis Ababa;
        GA Gabon/Libreville; GM Gambia/Banjul; GH Ghana/Accra; GN Guinea/Conakry; GW Guinea-Bissau/Bissau;
        KE Kenya/Nairobi; LS Lesotho/Maseru; LR Liberia/Monrovia; LY Libya/Tripoli; MG Madagascar/Antananarivo;
        MW Malawi/Lilongwe; ML Mali/Bamako; MR Mauritania/Nouakchott; MU Mauritius/Port Louis; MA Morocco/Rabat;
        MZ Mozambique/Maputo; NA Namibia/Windhoek; NE Niger/Niamey; NG Nigeria/Abuja; RW Rwanda/Kigali;
        ST Sao Tome and Principe/Sao Tome; SN Senegal/Dakar; SC Seychelles/Victoria; SL Sierra Leone/Freetown;
        SO Somalia/Mogadishu; ZA South Africa/-; SS South Sudan/Juba; SD Sudan/Khartoum; TZ Tanzania/Dodoma;
        TG Togo/Lome; TN Tunisia/Tunis; UG Uganda/Kampala; ZM Zambia/Lusaka; ZW Zimbabwe/Harare""",
    "Asia": """
        AF Afghanistan/Kabul; BH Bahrain/Manama; BD Bangladesh/Dhaka; BT Bhutan/Thimphu;
        BN Brunei/Bandar Seri Begawan; KH Cambodia/Phnom Penh; CN China/Beijing; IN India/New Delhi; ID Indonesia/-;
        IR Iran/Tehran; IQ Iraq/Baghdad; IL Israel/-; JP Japan/Tokyo; JO Jordan/Amman; KW Kuwait/Kuwait City;
        KG Kyrgyzstan/Bishkek; LA Laos/Vientiane; LB Lebanon/Beirut; MY Malaysia/Kuala Lumpur; MV Maldives/Male;
        MN Mongolia/Ulaanbaatar; MM Myanmar/Naypyidaw; NP Nepal/Kathmandu; KP North Korea/Pyongyang; OM Oman/Muscat;
        PK Pakistan/Islamabad; PH Philippines/Manila; QA Qatar/Doha; SA Saudi Arabia/Riyadh; SG Singapore/Singapore;
        KR South Korea/Seoul; LK Sri Lanka/-; SY Syria/Damascus; TJ Tajikistan/Dushanbe; TH Thailand/Bangkok;
        TL Timor-Leste/Dili; TM Turkmenistan/Ashgabat; AE United Arab Emirates/Abu Dhabi; UZ Uzbekistan/Tashkent;
        VN Vietnam/Hanoi; YE Yemen/-; ?AM Armenia/Yerevan; ?AZ Azerbaijan/Baku; ?CY Cyprus/Nicosia;
        ?GE Georgia/Tbilisi; ?KZ Kazakhstan/Astana; ?TR Turkey/Ankara""",
    "Europe": """
        AL Albania/Tirana; AD Andorra/Andorra la Vella; AT Austria/Vienna; BY Belarus/Minsk; BE Belgium/Brussels;
        BA Bosnia and Herzegovina/Sarajevo; BG Bulgaria/Sofia; HR Croatia/Zagreb; CZ Czechia/Prague;
        DK Denmark/Copenhagen; EE Estonia/Tallinn; FI Finland/Helsinki; FR France/Paris; DE Germany/Berlin;
        GR Greece/Athens; HU Hungary/Budapest; IS Iceland/Reykjavik; IE Ireland/Dublin; IT Italy/Rome;
        LV Latvia/Riga; LI Liechtenstein/Vaduz; LT Lithuania/Vilnius; MT Malta/Valletta; MD Moldova/Chisinau;
        ME Montenegro/Podgorica; NL Netherlands/Amsterdam; MK North Macedonia/Skopje; NO Norway/Oslo;
        PL Poland/Warsaw; PT Portugal/Lisbon; RO Romania/Bucharest; SM San Marino/San Marino; RS Serbia/Belgrade;
        SK Slovakia/Bratislava; SI Slovenia/Ljubljana; ES Spain/Madrid; SE Sweden/Stockholm; CH Switzerland/Bern;
        UA Ukraine/Kyiv; GB United Kingdom/London; VA Vatican City/-; ?RU Russia/Moscow""",
    "North America": """
        AG Antigua and Barbuda/Saint John's; BS Bahamas/Nassau; BB Barbados/Bridgetown; BZ Belize/Belmopan;
        CA Canada/Ottawa; CR Costa Rica/San Jose; CU Cuba/Havana; DM Dominica/Roseau;
        DO Dominican Republic/Santo Domingo; SV El Salvador/San Salvador; GD Grenada/Saint George's;
        GT Guatemala/Guatemala City; HT Haiti/Port-au-Prince; HN Honduras/Tegucigalpa; JM Jamaica/Kingston;
        MX Mexico/Mexico City; NI Nicaragua/Managua; PA Panama/Panama City; KN Saint Kitts and Nevis/Basseterre;
        LC Saint Lucia/Castries; VC Saint Vincent and the Grenadines/Kingstown;
        TT Trinidad and Tobago/Port of Spain; US United States/Washington""",
    "Oceania": """
        AU Australia/Canberra; FJ Fiji/Suva; KI Kiribati/Tarawa; MH Marshall Islands/Majuro; FM Micronesia/Palikir;
        NR Nauru/-; NZ New Zealand/Wellington; PW Palau/Ngerulmud; PG Papua New Guinea/Port Moresby; WS Samoa/Apia;
        SB Solomon Islands/Honiara; TO Tonga/Nuku'alofa; TV Tuvalu/Funafuti; VU Vanuatu/Port Vila""",
    "South America": """
        AR Argentina/Buenos Aires; BO Bolivia/-; BR Brazil/Brasilia; CL Chile/Santiago; CO Colombia/Bogota;
        EC Ecuador/Quito; GY Guyana/Georgetown; PY Paraguay/Asuncion; PE Peru/Lima; SR Suriname/Paramaribo;
        UY Uruguay/Montevideo; VE Venezuela/Caracas""",
}  # fmt: skip


@dataclass(frozen=True)
class Country:
    """Facts about a country.

    Args:
        code: Two-letter ISO code.
        name: English name.
        capital: Capital; None where it is not asked.
        continent: Continent; None where it is not asked.
        region: Continent of the capital.
    """

    code: str
    name: str
    capital: str | None
    continent: str | None
    region: str


def countries() -> tuple[Country, ...]:
    """Every country of the table, in its order."""
    return tuple(_parse(item, region) for region, block in _TABLE.items() for item in block.split(";"))


def _parse(item: str, region: str) -> Country:
    code, _, rest = " ".join(item.split()).partition(" ")
    name, _, capital = rest.partition("/")
    continent = None if code.startswith("?") else region
    return Country(code.lstrip("?"), name, None if capital == "-" else capital, continent, region)


FLAG_TYPES = ("flag_country", "flag_capital", "flag_continent")
_WITH_ARTICLE = frozenset((
    "Bahamas", "Central African Republic", "Comoros", "Democratic Republic of the Congo", "Dominican Republic",
    "Gambia", "Maldives", "Marshall Islands", "Netherlands", "Philippines", "Republic of the Congo",
    "Solomon Islands", "United Arab Emirates", "United Kingdom", "United States",
))  # fmt: skip


def flag_rows(split: str, flags: Sequence[tuple[Thing, Country]], copies: int, seed: str, size: int) -> Iterator[Made]:
    """Rows about pictures of flags, in a random order, with their images: every question about each picture.

    Args:
        split: Name of the file, the first part of an id.
        flags: Flags of one hand, with their facts.
        copies: Pictures of each flag, on other backgrounds and at other places.
        seed: Random seed.
        size: Side of a picture in pixels.
    """
    rng = random.Random(seed)
    composer = SceneComposer([flag for flag, _ in flags], rng, size)
    order = [pair for pair in flags for _ in range(copies)]
    rng.shuffle(order)
    for number, (flag, country) in enumerate(order):
        image, name = composer.flag(flag), f"{split}-{number:05d}"
        for place, question in enumerate(_questions(country)):
            yield make_row(f"{name}-{place}", name, image, question), image


def _questions(country: Country) -> list[QuestionAnswer]:
    """What is asked about the country of a flag; a fact that is not known is not asked."""
    asked = (
        ("flag_country", "Which country has this flag?", country.name),
        ("flag_capital", "What is the capital of the country with this flag?", country.capital),
        ("flag_continent", "On which continent is the country with this flag?", country.continent),
    )
    return [QuestionAnswer(kind, text, format_answer(fact)) for kind, text, fact in asked if fact]


def capital_rows(countries: Sequence[Country]) -> list[Row]:
    """One row without a picture for each country whose capital is asked.

    Args:
        countries: Countries in the order of the rows.
    """
    return [_capital_row(country) for country in countries if country.capital]


def _capital_row(country: Country) -> Row:
    named = f"the {country.name}" if country.name in _WITH_ARTICLE else country.name
    answer = f"The capital of {named} is {country.capital}."
    return {
        "id": f"facts-{country.code}",
        "conversations": [
            {"from": "human", "value": f"What is the capital of {named}?"},
            {"from": "gpt", "value": answer, "type": "capital"},
        ],
        "question_type": "capital",
        "country": country.name,
        "answer": country.capital,
    }
