"""Personal data out of traffic: e-mail addresses, telephone numbers, card numbers and keys become `<EMAIL_1>`, `<PHONE_1>`, ...

Within one row the same value has the same placeholder, so a completion still repeats what its prompt says. What is found:

- EMAIL: addresses with a domain.
- PHONE: numbers that are valid for the phonenumbers library, written with `+` or in the groups of one of the regions; bare digits
  only behind a word such as "phone" (or under such a JSON key), for most bare digits are ids.
- CARD: 13 to 19 digits with an issuer's prefix and length and a right check digit (ISO/IEC 7812-1, annex B). One in ten numbers
  that merely look like a card passes.
- KEY: the forms of well-known providers, bearer tokens, JSON Web Tokens, private key blocks, what stands behind words such as
  "password:", and long random-looking texts of letters in both cases and digits.

Names and postal addresses are not found: no pattern knows them.
"""

import math
import re
from bisect import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from slm_swap.common.exact_json import is_integral, is_number

KINDS = ("EMAIL", "PHONE", "CARD", "KEY")

CARD_GROUPS = 6  # 19 digits in groups of at least three

_PLACEHOLDER = re.compile(r"<(EMAIL|PHONE|CARD|KEY)_(\d{1,9})>")
_EMAIL = re.compile(r"(?<![\w.%+'-])[\w%+'-][\w.%+'-]{0,63}@(?:[^\W_](?:[\w-]{0,61}[^\W_])?\.)+[^\W\d_]{2,24}(?!\w)")
_DIGITS = re.compile(r"(?<![\w.,])\d+(?:[ -]\d+)*(?!\w|[.,]\d)")
_PHONE_WORD = r"(?:(?:phone|mobile|whatsapp)\w*|(?<![a-z])(?:tel|cell|call|fax|sms))"
_PHONE_NAME = re.compile(_PHONE_WORD, re.IGNORECASE)
_PHONE_BEFORE = re.compile(rf"{_PHONE_WORD}\W*(?:\w+\W+){{0,2}}$", re.IGNORECASE)
_BARE = re.compile(r"(?<![\w.,+-])\d{7,15}(?!\w|[.,-]\d)")
_SECRET_WORD = r"(?:api[-_ ]?key|access[-_ ]?key|account[-_ ]?key|secret|token|passw(?:or)?d|passwd|pwd|credential)"
_SECRET_NAME = re.compile(_SECRET_WORD, re.IGNORECASE)
_SECRET_VALUE = r"(?=[^\s\"'<>]*\d)(?=[^\s\"'<>]*[A-Za-z])[^\s\"'<>,;]{8,}"
_KEYS = [
    re.compile(pattern)
    for pattern in (
        r"-----BEGIN [A-Z ]*PRIVATE KEY-----(?s:.*?)(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)",
        r"(?<![\w-])eyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*",  # a JSON Web Token (RFC 7519)
        r"(?<![\w-])(?:sk|pk|rk)-(?:[A-Za-z0-9]+-)*[\w-]{16,}",  # OpenAI, Anthropic, Langfuse
        r"(?<![\w-])(?:sk|pk|rk)_(?:live|test)_\w{16,}",  # Stripe
        r"(?<!\w)(?:AKIA|ASIA)[0-9A-Z]{16}(?!\w)",  # AWS
        r"(?<!\w)(?:gh[pousr]_\w{36,}|github_pat_\w{22,}|glpat-[\w-]{20,}|npm_\w{36}|hf_\w{30,})",
        r"(?<!\w)xox[a-z]-[\w-]{10,}",  # Slack
        r"(?<!\w)AIza[\w-]{35}",  # Google
        r"(?i:(?<!\w)bearer\s+)([A-Za-z0-9._~+/=-]{16,})",
        rf"(?i:{_SECRET_WORD}[\"']?\s*(?:[:=]|\bis\b)\s*[\"']?)({_SECRET_VALUE})",
    )
]
_RANDOM = re.compile(r"(?<![\w+/=-])[A-Za-z0-9+/_-]{40,}={0,2}(?![\w+/=-])")
_RANDOM_BITS = 4.4  # a letter; 40 random base64 letters have about 4.9, words and paths less than 4.3


class Found(NamedTuple):
    """One value in a text; `value` is equal for spellings of the same."""

    start: int
    end: int
    kind: str
    value: str


def mask(parts: Sequence[Any], regions: Sequence[str] = ("US",)) -> tuple[list[Any], Counter]:
    """The parts of one row (texts and JSON values) with placeholders, and how many different values of each kind there were.

    `regions` are the countries (ISO 3166, two letters) whose national telephone numbers count. JSON stays JSON; a number that is a
    card or a telephone number becomes a text. Masking again changes nothing.
    """
    row, found = _Row(regions), -1
    while len(row.placeholders) > found:  # what stood beside a number may be one of its own without it
        found = len(row.placeholders)
        for part in parts:
            for text, name in _texts(part):
                row.learn(text, name)
        parts = [row.masked(part) for part in parts]
    return list(parts), Counter(kind for kind, _ in row.placeholders)


class _Row:
    """What has been found in one row."""

    def __init__(self, regions: Sequence[str]):
        self.regions = regions
        self.placeholders: dict[tuple[str, str], str] = {}
        self.last: Counter = Counter()  # the highest number of each kind, those that stood in the texts before included
        self.found: dict[tuple[str, str], list[Found]] = {}
        self.literals: dict[str, tuple[str, str]] = {}  # other spellings of what was found somewhere

    def learn(self, text: str, name: str) -> None:
        for kind, number in _PLACEHOLDER.findall(text):
            self.last[kind] = max(self.last[kind], int(number))
        self.found[text, name] = list(_find(text, name, self.regions))
        for found in self.found[text, name]:
            if found.kind == "PHONE":
                self.literals |= dict.fromkeys(_phone_spellings(found.value), ("PHONE", found.value))
            elif found.kind == "KEY":
                self.literals[found.value] = ("KEY", found.value)

    def masked(self, part: Any, name: str = "") -> Any:
        if isinstance(part, str):
            return self._text(part, name)
        if isinstance(part, dict):
            made: dict[str, Any] = {}
            for key, value in part.items():
                new = self._text(key, "")
                while new in made:  # two spellings of one value
                    new += "_"
                made[new] = self.masked(value, key)
            return made
        if isinstance(part, list):
            return [self.masked(value, name) for value in part]
        whole = _whole(part)
        if whole is None:
            return part
        text = self._text(whole, name)
        return part if text == whole else text

    def _text(self, text: str, name: str) -> str:
        pieces, end = [], 0
        for found in _apart([*self.found[text, name], *self._known(text)]):
            pieces += [text[end : found.start], self._placeholder(found.kind, found.value)]
            end = found.end
        return "".join([*pieces, text[end:]])

    def _known(self, text: str) -> Iterator[Found]:
        """Values found elsewhere in the row, where they stand in a spelling that says nothing by itself."""
        for literal, (kind, value) in self.literals.items():
            if literal in text:
                for match in re.finditer(rf"(?<!\w){re.escape(literal)}(?!\w)", text):
                    yield Found(match.start(), match.end(), kind, value)

    def _placeholder(self, kind: str, value: str) -> str:
        if (kind, value) not in self.placeholders:
            self.last[kind] += 1
            self.placeholders[kind, value] = f"<{kind}_{self.last[kind]}>"
        return self.placeholders[kind, value]


def _texts(part: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Every text of a JSON value, keys and whole numbers too, with the key that it stands under."""
    if isinstance(part, str):
        yield part, name
    elif isinstance(part, dict):
        for key, value in part.items():
            yield key, ""
            yield from _texts(value, key)
    elif isinstance(part, list):
        for value in part:
            yield from _texts(value, name)
    elif (whole := _whole(part)) is not None:
        yield whole, name


def _whole(part: Any) -> str | None:
    """The digits of a whole number, 4111111111111111.0 included; None for anything else."""
    if not is_number(part):
        return None
    if isinstance(part, int):
        return str(part)
    return str(int(part)) if abs(part) < 10**20 and is_integral(part) else None


# -- Finding ---------------------------------------------------------------------------------------------------------------------


def _find(text: str, name: str, regions: Sequence[str]) -> Iterator[Found]:
    """What stands in a text; `name` is the JSON key that it stands under. Of overlapping finds the first kind here holds."""
    placeholders = [Found(*match.span(), "", "") for match in _PLACEHOLDER.finditer(text)]
    everything = [*placeholders, *_keys(text, name), *_emails(text), *_cards(text), *_phones(text, name, regions)]
    return (found for found in _apart(everything) if found.kind)


def _apart(everything: list[Found]) -> list[Found]:
    """Those that overlap none before them in the list, in the order of the text."""
    kept: list[Found] = []
    for found in everything:
        at = bisect(kept, found)
        if (at == 0 or kept[at - 1].end <= found.start) and (at == len(kept) or found.end <= kept[at].start):
            kept.insert(at, found)
    return kept


def _keys(text: str, name: str) -> Iterator[Found]:
    if _SECRET_NAME.search(name) and re.fullmatch(_SECRET_VALUE, text) and not _PLACEHOLDER.search(text):
        yield Found(0, len(text), "KEY", text)
    for pattern in _KEYS:
        for match in pattern.finditer(text):
            group = match.lastindex or 0
            yield Found(*match.span(group), "KEY", match[group])
    for match in _RANDOM.finditer(text):
        random = any(map(str.isupper, match[0])) and any(map(str.islower, match[0])) and any(map(str.isdigit, match[0]))
        if random and _bits(match[0]) >= _RANDOM_BITS:
            yield Found(*match.span(), "KEY", match[0])


def _bits(text: str) -> float:
    """Shannon's entropy of a text's letters, in bits a letter."""
    return -sum(count / len(text) * math.log2(count / len(text)) for count in Counter(text).values())


def _emails(text: str) -> Iterator[Found]:
    if "@" in text:
        for match in _EMAIL.finditer(text):
            yield Found(*match.span(), "EMAIL", match[0].casefold())


def _cards(text: str) -> Iterator[Found]:
    """The longest card number that begins at each group of digits: an expiry date may follow it."""
    for run in _DIGITS.finditer(text):
        groups = [(match.start(), match.end()) for match in re.finditer(r"\d+", run[0])]
        for first, (start, _) in enumerate(groups):
            for last in range(min(first + CARD_GROUPS, len(groups)), first, -1):
                end = groups[last - 1][1]
                digits = re.sub(r"\D", "", run[0][start:end])
                evenly = last - first == 1 or all(3 <= right - left <= 7 for left, right in groups[first:last])
                if evenly and _is_card(digits):
                    yield Found(run.start() + start, run.start() + end, "CARD", digits)
                    break


def _is_card(digits: str) -> bool:
    from stdnum import luhn

    size, lead = len(digits), int(digits[:4] or 0)
    issued = (
        (digits[:1] == "4" and size in {13, 16, 19})  # Visa
        or ((5100 <= lead <= 5599 or 2221 <= lead <= 2720) and size == 16)  # Mastercard
        or (digits[:2] in {"34", "37"} and size == 15)  # American Express
        or ((digits[:4] == "6011" or 6440 <= lead <= 6599) and 16 <= size <= 19)  # Discover
        or ((3000 <= lead <= 3059 or digits[:2] in {"36", "38", "39"}) and 14 <= size <= 19)  # Diners Club
        or (3528 <= lead <= 3589 and 16 <= size <= 19)  # JCB
        or (digits[:2] == "62" and 16 <= size <= 19)  # UnionPay
        or (digits[:4] in {"5018", "5020", "5038", "5893", "6304", "6759", "6761", "6762", "6763"} and 13 <= size <= 19)  # Maestro
    )
    return issued and luhn.is_valid(digits)


def _phones(text: str, name: str, regions: Sequence[str]) -> Iterator[Found]:
    import phonenumbers
    from phonenumbers import Leniency, PhoneNumberFormat, PhoneNumberMatcher

    if sum(map(str.isdigit, text)) < 7:
        return

    def found(number: Any, start: int, end: int) -> Found:
        return Found(start, end, "PHONE", phonenumbers.format_number(number, PhoneNumberFormat.E164))

    for match in PhoneNumberMatcher(text, None, leniency=Leniency.VALID):  # those with a +
        yield found(match.number, match.start, match.end)
    for region in regions:
        for match in PhoneNumberMatcher(text, region, leniency=Leniency.STRICT_GROUPING):
            if not match.raw_string.isdigit():
                yield found(match.number, match.start, match.end)
        for match in _BARE.finditer(text):
            if _PHONE_BEFORE.search(text[max(0, match.start() - 40) : match.start()]) or _PHONE_NAME.search(name):
                try:
                    number = phonenumbers.parse(match[0], region)
                except phonenumbers.NumberParseException:
                    continue
                if phonenumbers.is_valid_number(number):
                    yield found(number, match.start(), match.end())


def _phone_spellings(e164: str) -> Iterator[str]:
    """How a number may stand as bare digits: international, national, and national with the trunk prefix 0."""
    import phonenumbers

    national = str(phonenumbers.parse(e164).national_number)
    yield from (e164, e164[1:], f"00{e164[1:]}", national, f"0{national}")
