"""The generated language of the demo: how values are asked for in English, and what a tool call should make of them.

`make_sample_data.py` (the sample that ships) and `make_tiny_model.py` (the text that the tiny model is pretrained on) both draw
from here. Concepts marked `convention` stand in the sample only: that a team's tools want "Germany" as "DE" where their
schema just says "the country" is what a pretrained model cannot know and fine-tuning has to teach.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

CITIES = (
    "Amsterdam Athens Auckland Austin Barcelona Bergen Berlin Bilbao Bogota Bologna Boston Bristol Brisbane Brussels "
    "Budapest Cairo Calgary Chennai Chicago Cologne Copenhagen Dakar Dallas Denver Dublin Durban Edinburgh Florence Geneva "
    "Genoa Ghent Glasgow Gothenburg Granada Graz Hamburg Hanoi Helsinki Houston Istanbul Izmir Jakarta Kigali Kyoto Lagos "
    "Leeds Leipzig Lille Lima Lisbon Liverpool London Lyon Madrid Malaga Manchester Manila Marseille Melbourne Memphis "
    "Miami Milan Montreal Mumbai Munich Nairobi Nantes Naples Osaka Oslo Ottawa Oxford Palermo Paris Perth Phoenix Pisa "
    "Porto Prague Quito Reykjavik Riga Rome Rotterdam Salzburg Santiago Seattle Seoul Seville Singapore Sofia Stockholm "
    "Stuttgart Sydney Tallinn Tampa Tokyo Toronto Toulouse Trieste Turin Utrecht Valencia Vancouver Venice Vienna Vilnius "
    "Warsaw Wellington York Zagreb Zurich"
).split()
FIRST = (
    "Ada Adam Aisha Alan Amara Amir Ana Anders Anita Ben Bianca Carla Carlos Chen Clara Dana Daniel Diego Elena Emil Emma "
    "Erik Farid Fatima Felix Fiona Grace Hana Hugo Ines Ivan Jack Jan Jonas Julia Kai Karim Laila Lars Lena Leo Lucia Maja "
    "Marco Maria Mei Milan Mina Nadia Nils Nina Noah Olga Omar Oscar Paula Pedro Petra Priya Rosa Sam Sara Sofia Tariq Tom "
    "Vera Yuki Zoe"
).split()
LAST = (
    "Adler Ahmed Bauer Becker Berg Brandt Brown Castro Clark Costa Cruz Dahl Diaz Dubois Evans Fischer Fontana Garcia Green "
    "Haas Hansen Hill Holm Ito Jansen Kaya Keller Khan Kim King Klein Kovac Kumar Lang Larsen Lee Lopez Marino Martin Meyer "
    "Mills Mori Nagy Novak Okafor Olsen Ortiz Park Patel Perez Petrov Reed Rossi Sato Schmidt Silva Singh Smith Stone "
    "Suzuki Tanaka Vogel Walker Wang Weber White Wolf Wong Wright Young Zhang"
).split()
WORDS = (
    "account agenda anchor apple archive autumn balance banner basket beacon bicycle blanket boiler bottle bridge bronze "
    "budget cable camera candle canvas carbon castle cedar cellar chapter cherry circle client cloud cobalt coffee contract "
    "copper corner cotton cradle cycle delta desert draft dragon engine escape fabric falcon feather filter forest fossil "
    "garden garnet ginger glacier granite guitar harbor harvest hazel helmet hollow horizon indigo invoice island ivory "
    "jacket jasmine journal jungle kernel kettle ladder lagoon lantern laptop launch lemon lesson letter linen lobby locket "
    "magnet mango maple marble market meadow melody mirror module mosaic motor museum nectar needle notice number ocean "
    "office olive onboarding orange orchid packet paddle panel parcel payroll pebble pencil pepper petal piano picture "
    "pigeon pillow planet pocket policy portal printer project purple quarter quartz rabbit radar receipt record refund "
    "release report ribbon river rocket saddle saffron sample sandal schedule school sensor shadow signal silver sketch "
    "socket spiral spring status stereo storm studio summer summit survey switch table target temple ticket timber tomato "
    "topaz training tunnel turtle update valley vanilla vector velvet vendor violet wallet walnut weekly willow window "
    "winter yellow zipper"
).split()
ITEMS = (
    "apples bananas batteries beans bread brushes butter candles carrots cheese chocolate coffee cookies cups eggs "
    "envelopes flour folders forks garlic gloves grapes honey juice ketchup lamps lemons lentils markers milk mushrooms "
    "napkins nuts oats onions oranges paper pasta pears pencils peppers plates potatoes rice salt scissors soap spinach "
    "spoons staplers sugar tape tea tissues tofu tomatoes towels vinegar walnuts yogurt"
).split()
MONTHS = ("January February March April May June July August September October November December").split()
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"]
COUNTRIES = {
    "Austria": "AT", "Brazil": "BR", "Canada": "CA", "France": "FR", "Germany": "DE", "India": "IN", "Italy": "IT", "Japan": "JP",
    "Mexico": "MX", "Norway": "NO", "Poland": "PL", "Spain": "ES",
}  # fmt: skip
CURRENCIES = {
    "euros": "EUR", "US dollars": "USD", "pounds": "GBP", "yen": "JPY", "Swiss francs": "CHF", "rupees": "INR", "zloty": "PLN",
    "pesos": "MXN",
}  # fmt: skip
LANGUAGES = {
    "English": "en", "French": "fr", "German": "de", "Spanish": "es", "Italian": "it", "Dutch": "nl", "Polish": "pl", "Greek": "el",
}  # fmt: skip
SIZES = {"small": "S", "medium": "M", "large": "L", "extra large": "XL"}
PRIORITIES = {"urgent": 1, "high": 2, "normal": 3, "low": 4}
CABINS = {"economy": "Y", "premium economy": "W", "business": "C", "first": "F"}
DAYS = {"Mondays": "mon", "Tuesdays": "tue", "Wednesdays": "wed", "Thursdays": "thu", "Fridays": "fri", "weekends": "weekend"}
UNITS = {"Celsius": "metric", "Fahrenheit": "imperial"}

NOT_ASKED = 0.45  # chance that an optional parameter is not asked for

Value = tuple[str, Any]  # how it is said, what the call should hold


class Speaker(Random):
    """A seeded source of values. With `invented` it makes up most names and words: what is drawn cannot be learned by heart."""

    def __init__(self, seed: str, invented: float = 0.0):
        super().__init__(seed)
        self.invented = invented

    def word(self, known: Sequence[str]) -> str:
        """One of the known words, or with probability `invented` a made-up one of 3 to 9 letters, half of them with a part of a known one."""
        if self.random() >= self.invented:
            return self.choice(known)
        pattern = self.choice(
            ("cvc", "cvcv", "cvccv", "vcvc", "cvcvc", "ccvc", "cvccvc", "vccvc", "cvcvcv", "ccvcvc", "cvcvccv", "cvccvcvc")
        )
        made = "".join(self.choice("bcdfghjklmnpqrstvwxyz" if kind == "c" else "aeiouaeiouy") for kind in pattern)
        if self.random() < 0.5:
            part = self.choice(known).lower().replace("_", "")
            made = part[: self.randint(1, 4)] + made[:4] if self.random() < 0.5 else made[:4] + part[-self.randint(1, 4) :]
        return made.title() if known[0][0].isupper() else made

    def words(self, known: Sequence[str], count: int) -> list[str]:
        """That many different words."""
        found: dict[str, None] = {}
        while len(found) < count:
            found[self.word(known)] = None
        return list(found)


def _date(rng: Speaker) -> Value:
    year, month, day = rng.choice((2026, 2027)), rng.randint(1, 12), rng.randint(1, 28)
    said = rng.choice((f"{day} {MONTHS[month - 1]} {year}", f"{MONTHS[month - 1]} {day}, {year}", f"{year}-{month:02}-{day:02}"))
    return said, f"{year}-{month:02}-{day:02}"


def _time(rng: Speaker) -> Value:
    hour, minute = rng.randint(7, 21), rng.choice((0, 15, 30, 45))
    clock = f"{hour:02}:{minute:02}"
    half = f"{(hour - 1) % 12 + 1}:{minute:02} {'am' if hour < 12 else 'pm'}"
    return rng.choice((clock, half)), clock


def _spoken_time(rng: Speaker) -> Value:
    hour = rng.randint(7, 21)
    part = "in the morning" if hour < 12 else "in the afternoon" if hour < 18 else "in the evening"
    word = NUMBERS[(hour - 1) % 12 + 1]
    return rng.choice(((f"half past {word} {part}", f"{hour:02}:30"), (f"{word} {part}", f"{hour:02}:00")))


def _count(rng: Speaker) -> Value:
    number = rng.randint(2, 12)
    return rng.choice((str(number), NUMBERS[number])), number


def _number(rng: Speaker) -> Value:
    number = rng.randint(5, 900)
    return str(number), number


def _amount(rng: Speaker) -> Value:
    number = rng.choice((rng.randint(5, 900), rng.randint(50, 9000) / 10, rng.randint(500, 90000) / 100))
    return str(number), float(number) if number != int(number) else int(number)


def _minutes(rng: Speaker) -> Value:
    number = rng.choice((10, 15, 20, 25, 30, 40, 45, 50, 60, 75, 80, 90, 100, 120))
    return f"{number} minutes", number


def _spoken_minutes(rng: Speaker) -> Value:
    said = {
        "half an hour": 30,
        "an hour": 60,
        "an hour and a half": 90,
        "two hours": 120,
        "three hours": 180,
        "a quarter of an hour": 15,
    }
    return rng.choice(list(said.items()))


def _percent(rng: Speaker) -> Value:
    number = rng.choice((5, 8, 10, 12, 15, 18, 20, 25, 30, 40, 50))
    return rng.choice((f"{number}%", f"{number} percent")), number


def _fraction(rng: Speaker) -> Value:
    said, number = _percent(rng)
    return said, number / 100


def _person(rng: Speaker) -> Value:
    name = f"{rng.word(FIRST)} {rng.word(LAST)}"
    return name, name


def _email(rng: Speaker) -> Value:
    first, last = rng.word(FIRST).lower(), rng.word(LAST).lower()
    address = f"{first}{rng.choice('._')}{last}@{rng.word(WORDS)}.{rng.choice(('com', 'org', 'net', 'io'))}"
    return address, address


def _code(rng: Speaker) -> Value:
    letters = "".join(rng.choices("ABCDEFGHJKLMNPQRSTUVWXYZ", k=rng.randint(1, 3)))
    code = f"{letters}{rng.choice(('-', ''))}{rng.randint(100, 99999)}"
    return code, code


def _title(rng: Speaker) -> Value:
    text = " ".join(rng.words(WORDS, rng.randint(1, 3)))
    return f"'{text}'", text


def _message(rng: Speaker) -> Value:
    text = " ".join(rng.words(WORDS, rng.randint(3, 5)))
    return f'"{text}"', text


def _items(rng: Speaker) -> Value:
    return _listed(rng.words(ITEMS, rng.randint(2, 4)))


def _tags(rng: Speaker) -> Value:
    return _listed(rng.words(WORDS, rng.randint(2, 3)))


def _people(rng: Speaker) -> Value:
    return _listed([_person(rng)[1] for _ in range(rng.randint(2, 3))])


def _numbers(rng: Speaker) -> Value:
    return _listed([rng.randint(1, 99) for _ in range(rng.randint(2, 4))])


def _listed(values: list) -> Value:
    said = [str(value) for value in values]
    return f"{', '.join(said[:-1])} and {said[-1]}", values


def _from(table: dict[str, Any]) -> Callable[[Speaker], Value]:
    return lambda rng: rng.choice(list(table.items()))


def _copied(*words: str) -> Callable[[Speaker], Value]:
    return lambda rng: (lambda word: (word, word))(rng.choice(words))


def _city(rng: Speaker) -> Value:
    city = rng.word(CITIES)
    return city, city


def _link(rng: Speaker) -> Value:
    link = f"https://{rng.word(WORDS)}.{rng.choice(('com', 'org', 'net'))}/{rng.word(WORDS)}"
    return link, link


def _phone(rng: Speaker) -> Value:
    number = f"+{rng.randint(1, 99)}-{rng.randint(100, 999)}-{rng.randint(1000, 9999)}"
    return number, number


@dataclass(frozen=True)
class Concept:
    """A kind of value: its xLAM type, what a parameter of it is described as, how it is drawn and how it is asked for.

    `phrases` hold one `{}` for the spoken value; those behind the first `general` are heard in the sample only.
    """

    type: str
    description: str
    draw: Callable[[Speaker], Value]
    phrases: tuple[str, ...]
    names: tuple[str, ...]
    general: int = 2
    convention: bool = False


CONCEPTS: dict[str, Concept] = {
    "city": Concept("str", "The city", _city, ("in {}", "for {}", "over in {}", "around {}"), ("city", "location", "town", "place", "area")),
    "origin": Concept("str", "Where it starts", _city, ("from {}", "leaving {}", "starting out in {}"), ("origin", "departure", "start", "source_city")),
    "goal": Concept("str", "Where it ends", _city, ("to {}", "going to {}", "headed for {}"), ("destination", "arrival", "target_city", "end")),
    "date": Concept("str", "The date as YYYY-MM-DD", _date, ("on {}", "for {}", "dated {}"), ("date", "day", "when", "scheduled_date")),
    "until": Concept("str", "Last date as YYYY-MM-DD", _date, ("until {}", "ending {}", "through {}"), ("end_date", "until", "deadline", "to_date")),
    "time": Concept("str", "The time as HH:MM", _time, ("at {}", "starting at {}"), ("time", "start_time", "hour", "at_time")),
    "spoken_time": Concept("str", "The time as HH:MM", _spoken_time, ("at {}", "starting at {}", "around {}"), ("time", "start_time", "hour", "at_time")),
    "people": Concept("int", "Number of people", _count, ("for {} people", "with {} guests", "for a group of {}"), ("people", "guests", "party_size", "seats")),
    "nights": Concept("int", "Number of nights", _count, ("for {} nights", "staying {} nights", "{} nights in all"), ("nights", "stay_length", "num_nights")),
    "quantity": Concept("int", "How many", _count, ("{} of them", "quantity {}", "and I want {}"), ("quantity", "count", "units", "amount_of_items")),
    "limit": Concept("int", "Maximum number of results", _count, ("show {} results", "limit it to {}", "no more than {} hits"), ("limit", "max_results", "top_k", "page_size")),
    "number": Concept("int", "The number", _number, ("with number {}", "number {}"), ("number", "value", "level", "index")),
    "amount": Concept("float", "The amount of money", _amount, ("of {}", "amount {}", "worth {}"), ("amount", "total", "sum", "price")),
    "budget": Concept("float", "Highest price", _amount, ("under {}", "at most {}", "not over {}"), ("max_price", "budget", "price_limit", "ceiling")),
    "minutes": Concept("int", "Length in minutes", _minutes, ("for {}", "lasting {}"), ("duration", "minutes", "length", "duration_minutes")),
    "spoken_minutes": Concept("int", "Length in minutes", _spoken_minutes, ("for {}", "lasting {}"), ("duration", "minutes", "length", "duration_minutes")),
    "percent": Concept("int", "Share in percent", _percent, ("at {}", "of {}"), ("percent", "rate", "percentage", "share")),
    "fraction": Concept("float", "Share between 0 and 1", _fraction, ("at {}", "of {}"), ("rate", "share", "fraction")),
    "person": Concept("str", "Full name of the person", _person, ("for {}", "with {}", "under the name {}"), ("name", "customer", "person", "full_name", "contact")),
    "email": Concept("str", "E-mail address", _email, ("to {}", "at {}", "reachable at {}"), ("email", "recipient", "address", "mail")),
    "phone": Concept("str", "Telephone number", _phone, ("at {}", "on {}", "by calling {}"), ("phone", "phone_number", "tel", "mobile")),
    "code": Concept("str", "The identifier", _code, ("{}", "with id {}", "known as {}"), ("id", "code", "reference", "key", "identifier")),
    "title": Concept("str", "The title", _title, ("called {}", "titled {}", "by the name {}"), ("title", "label", "subject", "heading")),
    "message": Concept("str", "The text", _message, ("saying {}", "with the text {}", "that reads {}"), ("message", "text", "body", "content", "note")),
    "link": Concept("str", "The link", _link, ("at {}", "from {}", "found under {}"), ("url", "link", "href", "page")),
    "items": Concept("List[str]", "The items", _items, ("with {}", "including {}", "and put in {}"), ("items", "products", "things", "contents")),
    "tags": Concept("List[str]", "Tags", _tags, ("tagged {}", "with the tags {}", "filed under {}"), ("tags", "labels", "topics", "keywords")),
    "team": Concept("List[str]", "Full names of the people", _people, ("with {}", "together with {}", "inviting {}"), ("attendees", "members", "participants", "people_names")),
    "numbers": Concept("List[int]", "The numbers", _numbers, ("for {}", "of {}", "over {}"), ("numbers", "values", "data", "series")),
    "order": Concept("str", "Sort order: newest, oldest, cheapest or closest", _copied("newest", "oldest", "cheapest", "closest"), ("{} first", "sorted by {}", "with the {} on top"), ("sort", "order", "sort_by", "ordering")),
    "format": Concept("str", "File format: pdf, csv, json or xml", _copied("pdf", "csv", "json", "xml"), ("as {}", "in {} format", "saved as {}"), ("format", "file_type", "output", "export_format")),
    "color": Concept("str", "The color", _copied("red", "blue", "green", "black", "white", "gray", "brown", "pink"), ("in {}", "colored {}", "the {} one"), ("color", "colour", "shade", "paint")),
}  # fmt: skip


def _coded(
    key: str, noun: str, table: dict[str, Any], phrases: tuple[str, ...], names: tuple[str, ...] = ()
) -> dict[str, Concept]:
    """Three concepts of one table: said as it is, as a code where the description asks for one, and the convention: as a code
    although the description does not say so."""
    words = {word: word for word in table}
    code = "int" if isinstance(next(iter(table.values())), int) else "str"
    names = (key, *names)
    return {
        f"{key}_word": Concept("str", f"The {noun}", _from(words), phrases, names),
        f"{key}_code": Concept(code, f"Code of the {noun}", _from(table), phrases, (*names, f"{key}_code")),
        key: Concept(code, f"The {noun}", _from(table), phrases, names, convention=True),
    }


CONCEPTS |= {
    **_coded("country", "country", COUNTRIES, ("in {}", "for {}", "within {}"), ("nation", "state")),
    **_coded("currency", "currency", CURRENCIES, ("in {}", "paid in {}"), ("money", "unit")),
    **_coded("base", "currency to convert from", CURRENCIES, ("from {}", "held in {}"), ("source_currency",)),
    **_coded("target", "currency to convert to", CURRENCIES, ("to {}", "into {}"), ("target_currency",)),
    **_coded("language", "language", LANGUAGES, ("in {}", "into {}"), ("lang", "spoken_language")),
    **_coded("units", "units", UNITS, ("in {}", "using {}"), ("unit_system", "scale")),
    **_coded("size", "size", SIZES, ("in size {}", "size {}", "in {}"), ("fit", "dimension")),
    **_coded("priority", "priority", PRIORITIES, ("with {} priority", "marked {}"), ("urgency", "rank")),
    **_coded("cabin", "cabin", CABINS, ("in {} class", "flying {}"), ("travel_class", "seat_class")),
    **_coded("repeat", "days that it repeats on", DAYS, ("on {}", "every week on {}"), ("days", "weekdays")),
}
CODED = tuple(key for key in CONCEPTS if key.endswith(("_word", "_code")))

OPENINGS = (
    "",
    "",
    "",
    "Please ",
    "Could you ",
    "Can you ",
    "I want to ",
    "I need to ",
    "I'd like you to ",
    "Hi, ",
    "Kindly ",
    "Let's ",
)
CLOSINGS = ("", "", "", ".", ".", ", please", ", thanks", ". Thank you!", " if you can", " when you have a moment")


def say(rng: Speaker, concept: Concept, general: bool) -> tuple[str, Any]:
    """One value of a concept: the phrase that asks for it and the value that the call should hold."""
    said, value = concept.draw(rng)
    phrases = concept.phrases[: concept.general] if general else concept.phrases
    return rng.choice(phrases).format(said), value


def sentence(rng: Speaker, ask: str, phrases: list[str]) -> str:
    """A request: an opening, what is asked, the phrases in any order, a closing."""
    phrases = rng.sample(phrases, len(phrases))
    opening, closing = rng.choice(OPENINGS), rng.choice(CLOSINGS)
    text = opening + " ".join([ask, *phrases]) + closing
    return text[0].upper() + text[1:]


@dataclass(frozen=True)
class Parameter:
    """A tool's parameter: `default` makes it optional, `optional` too."""

    name: str
    concept: str
    optional: bool = False
    default: object = None


@dataclass(frozen=True)
class Tool:
    name: str
    description: str
    asks: tuple[str, ...]
    parameters: tuple[Parameter, ...]

    def to_xlam(self) -> dict:
        """The tool as xLAM-60k writes one: a flat map of parameters, optionality inside the type string."""
        parameters = {}
        for parameter in self.parameters:
            concept = CONCEPTS[parameter.concept]
            optional = parameter.optional or parameter.default is not None
            entry = {"description": f"{concept.description}.", "type": concept.type + (", optional" if optional else "")}
            if parameter.default is not None:
                entry["default"] = parameter.default
            elif optional:
                entry["default"] = ""
            parameters[parameter.name] = entry
        return {"name": self.name, "description": self.description, "parameters": parameters}


def draw_call(rng: Speaker, tool: Tool, noise: float = 0.0, general: bool = False) -> tuple[str, dict]:
    """One request for a tool and the call that answers it, `{"name", "arguments"}`; wrong for a share `noise` of them."""
    arguments, phrases = {}, []
    for parameter in tool.parameters:
        if (parameter.optional or parameter.default is not None) and rng.random() < NOT_ASKED:
            continue
        phrase, arguments[parameter.name] = say(rng, CONCEPTS[parameter.concept], general=general)
        phrases.append(phrase)
    if rng.random() < noise:
        spoil(rng, tool, arguments)
    return sentence(rng, rng.choice(tool.asks), phrases), {"name": tool.name, "arguments": arguments}


def spoil(rng: Speaker, tool: Tool, arguments: dict) -> None:
    """Make the gold wrong the way real gold is: a default written out, or another value than was asked for."""
    unasked = [p for p in tool.parameters if p.default is not None and p.name not in arguments]
    if unasked and rng.random() < 0.7:
        parameter = rng.choice(unasked)
        arguments[parameter.name] = parameter.default
    else:
        parameter = rng.choice([p for p in tool.parameters if p.name in arguments])
        arguments[parameter.name] = say(rng, CONCEPTS[parameter.concept], general=False)[1]
